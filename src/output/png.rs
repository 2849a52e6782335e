//! Renders SVG as PNG, for programs that do not take SVG. Text uses this machine's fonts, so figures can differ between
//! machines; without fonts there is an error.

use std::path::{Path, PathBuf};

use crate::hinted;

use anyhow::{Context, Result, bail, ensure};
use hooks::files;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Group, Node, Options, Tree, fontdb};

/// Pixels of the PNG per pixel of the SVG, so that it is sharp on paper and on high-resolution screens.
pub const SCALE: f32 = 2.0;

/// The fonts for the figures' `sans-serif`: the first that is installed is used.
const SANS_SERIF: [&str; 10] = [
    "Arial",
    "Helvetica",
    "Helvetica Neue",
    "Liberation Sans",
    "Nimbus Sans",
    "Noto Sans",
    "DejaVu Sans",
    "Segoe UI",
    "Open Sans",
    "Roboto",
];

/// Renders each SVG file of a folder and its subfolders to a PNG in the same place; returns the PNG files.
pub fn beside_svgs(folder: &Path) -> Result<Vec<PathBuf>> {
    let fonts = Fonts::of_system()?;
    let made = |svg: PathBuf| -> Result<PathBuf> {
        let png = svg.with_extension("png");
        let bytes = fonts.png(&files::read_string(&svg)?).with_context(|| svg.display().to_string())?;
        files::write_atomic(&png, &bytes)?;
        Ok(png)
    };
    svgs_in(folder)?.into_iter().map(made).collect()
}

/// The SVG files in a folder and its subfolders, sorted by name.
fn svgs_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        if path.is_dir() {
            found.extend(svgs_in(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "svg") {
            found.push(path);
        }
    }
    Ok(found)
}

/// The fonts that text is drawn with.
pub struct Fonts(Options<'static>);

impl Fonts {
    /// The fonts of this machine; an error if there are none.
    pub fn of_system() -> Result<Self> {
        let mut database = fontdb::Database::new();
        database.load_system_fonts();
        Self::of(&database)
    }

    fn of(found: &fontdb::Database) -> Result<Self> {
        // Characters that the first font lacks come from the next one that has them: known fonts first, others by name,
        // so that the choice does not depend on the order of folders.
        let mut faces: Vec<&fontdb::FaceInfo> = found.faces().collect();
        faces.sort_by_cached_key(|face| {
            let slanted = face.style != fontdb::Style::Normal;
            (place(face), family(face), slanted, face.weight.0.abs_diff(400), face.stretch.to_number())
        });
        let Some(first) = faces.first().map(|face| family(face)) else {
            bail!(hinted!(
                "no font is installed on this machine, so a PNG would have no text";
                "install one (fonts-dejavu-core on Debian and Ubuntu), or use the SVG files, which are set in \
                 their reader's fonts"
            ));
        };
        let mut options = Options::default();
        let database = options.fontdb_mut();
        for face in faces {
            database.push_face_info(face.clone());
        }
        database.set_sans_serif_family(first);
        Ok(Self(options))
    }

    /// Renders a drawing as PNG, [`SCALE`] times its size; an error if these fonts cannot show one of its texts.
    pub fn png(&self, svg: &str) -> Result<Vec<u8>> {
        let tree = Tree::from_str(svg, &self.0)?;
        let (wanted, set) = (svg.matches("<text").count(), texts_in(tree.root()));
        ensure!(
            set == wanted,
            hinted!(
                "{set} of its {wanted} texts can be set in this machine's fonts";
                "install a font with Latin and Greek letters (fonts-dejavu-core on Debian and Ubuntu)"
            )
        );
        let size = tree.size();
        let side = |length: f32| (length * SCALE).ceil() as u32;
        let mut sheet = Pixmap::new(side(size.width()), side(size.height())).context("the drawing has no size")?;
        resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut sheet.as_mut());
        Ok(sheet.encode_png()?)
    }
}

/// The index of a font's family among the known ones, or their number if it is unknown.
fn place(face: &fontdb::FaceInfo) -> usize {
    let family = family(face);
    SANS_SERIF.iter().position(|known| *known == family).unwrap_or(SANS_SERIF.len())
}

fn family(face: &fontdb::FaceInfo) -> String {
    face.families.first().map(|(name, _)| name.clone()).unwrap_or_default()
}

/// Number of texts with characters in a group.
fn texts_in(group: &Group) -> usize {
    let texts = |node: &Node| match node {
        Node::Group(inner) => texts_in(inner),
        Node::Text(text) => usize::from(!text.layouted().is_empty()),
        _ => 0,
    };
    group.children().iter().map(texts).sum()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use analyses::plot::{Bar, BarChart, bars};

    use super::*;

    fn chart() -> String {
        let chart = BarChart {
            title: "γ of the student".to_owned(),
            bars: vec![Bar::new("only:sys.entity", 0.45)],
            ..BarChart::default()
        };
        bars(&chart).unwrap().0
    }

    #[test]
    fn a_picture_has_twice_the_size_and_its_text() {
        let fonts = match Fonts::of_system() {
            Ok(fonts) => fonts,
            Err(error) => {
                // written to stderr directly, since the test harness hides the output of passing tests
                writeln!(std::io::stderr(), "SKIPPED: {error}").unwrap();
                return;
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let svg = folder.path().join("target_rate/plot.svg");
        files::write_atomic(&svg, chart().as_bytes()).unwrap();
        let made = beside_svgs(folder.path()).unwrap();
        assert_eq!(made, [folder.path().join("target_rate/plot.png")]);

        let picture = Pixmap::decode_png(&files::read(&made[0]).unwrap()).unwrap();
        let tree = Tree::from_str(&chart(), &fonts.0).unwrap();
        let (width, height) = (tree.size().width() as u32, tree.size().height() as u32);
        assert_eq!((picture.width(), picture.height()), (2 * width, 2 * height));
        let dark = |x: std::ops::Range<u32>, y: std::ops::Range<u32>| {
            let at = |x, y| picture.pixel(x, y).is_some_and(|pixel| pixel.red() < 0x60 && pixel.green() < 0x60);
            x.flat_map(|x| y.clone().map(move |y| (x, y))).filter(|&(x, y)| at(x, y)).count()
        };
        assert!(dark(0..2 * width, 0..60) > 100, "the title's letters");
        assert!(dark(0..200, 60..2 * height - 90) > 100, "the bar's name, at the left");
        assert_eq!(dark(0..2 * width, 0..10), 0, "the margin is empty");
    }

    #[test]
    fn no_picture_without_fonts() {
        let message = Fonts::of(&fontdb::Database::new()).err().unwrap().to_string();
        assert!(message.contains("no font is installed") && message.contains("hint:"), "{message}");
        // fonts that cannot show a text are an error too
        let fonts = Fonts(Options::default());
        let message = fonts.png(&chart()).unwrap_err().to_string();
        assert!(message.starts_with("0 of its "), "{message}");
    }
}
