//! A notebook is a cargo example that prints itself: lines that begin with `//|` are prose, the rest of `main` is code,
//! and the values passed to [`Notebook::show`] appear under the code that showed them. No macro and no parser: each
//! result remembers the line it came from, and [`Notebook::write`] walks the example's own source, once for a Markdown
//! page and once for a Jupyter notebook.

mod ipynb;
mod markdown;
pub mod school;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::panic::Location;
use std::path::{Path, PathBuf};

use analyses::Svg;
use anyhow::{Context, Result, bail};
use hooks::{TINY_RANDOM, files};

/// The model that the notebooks are about, unless another is named.
pub const MODEL: &str = "pocket";

/// The first and the last line of what is printed: the example's `main`.
const BEGIN: &str = "fn main(";
const END: &str = "}";
/// The notebook's own first and last line are left out.
const FRAME: [&str; 2] = ["Notebook::open(", "nb.write()"];

/// The widest line of words, in characters.
const WIDTH: usize = 110;

/// The model that a notebook runs on: the first argument, or the embedded one.
pub fn model() -> String {
    std::env::args().nth(1).unwrap_or_else(|| MODEL.to_owned())
}

/// A notebook in the making.
#[derive(Debug)]
pub struct Notebook {
    /// The example's name, such as `01_a_qwen_you_can_listen_to`.
    name: String,
    source: &'static str,
    /// The folder of the Markdown page and its figures.
    pages: PathBuf,
    /// The folder of the Jupyter notebook.
    ipynb: PathBuf,
    /// What was shown, by the line of the source that showed it.
    shown: BTreeMap<usize, Vec<Shown>>,
}

/// A result, before it is known where it is printed.
#[derive(Debug)]
enum Shown {
    /// As it is.
    Text(String),
    /// Rows of cells; the first row names the columns.
    Table(Vec<Vec<String>>),
    /// A drawing, by its name within the notebook.
    Figure { name: String, svg: Svg },
}

/// A piece of a notebook, in the order of the source.
enum Part<'a> {
    Prose(String),
    Code(String),
    Result(&'a Shown),
}

impl Notebook {
    /// The notebook of an example, given as `file!()` and as `include_str!` of itself.
    ///
    /// What it prints is kept beside the other pages; with a model of one's own as argument it goes into the folder one
    /// is in.
    pub fn open(example: &str, source: &'static str) -> Self {
        if ["pocket", TINY_RANDOM].iter().any(|embedded| model().starts_with(embedded)) {
            // So sums are added in the same order however many cores there are, and such small models are fastest.
            tch::set_num_threads(1);
        }
        if std::env::args().nth(1).is_some() {
            return Self::within(example, source, "", "");
        }
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        Self::within(example, source, here.join("pages"), here.join("ipynb"))
    }

    fn within(example: &str, source: &'static str, pages: impl Into<PathBuf>, ipynb: impl Into<PathBuf>) -> Self {
        let name = Path::new(example).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self { name, source, pages: pages.into(), ipynb: ipynb.into(), shown: BTreeMap::new() }
    }

    /// Puts a value under the code that calls this, long lines of words in several.
    #[track_caller]
    pub fn show(&mut self, value: impl Display) {
        let text = value.to_string();
        let lines: Vec<String> = text.trim_end().lines().map(wrapped).collect();
        self.put(Location::caller(), Shown::Text(lines.join("\n")));
    }

    /// Puts rows as a table under the code that calls this; the first row names the columns.
    #[track_caller]
    pub fn table<C: Display>(&mut self, rows: &[Vec<C>]) {
        let rows = rows.iter().map(|row| row.iter().map(ToString::to_string).collect()).collect();
        self.put(Location::caller(), Shown::Table(rows));
    }

    /// Puts a figure under the code that calls this; the page links to it as `{notebook}-{name}.svg` in its folder. If
    /// an analysis has nothing to draw (`None`), the page says so.
    #[track_caller]
    pub fn figure(&mut self, name: &str, svg: impl Into<Option<Svg>>) {
        let shown = match svg.into() {
            Some(svg) => Shown::Figure { name: name.to_owned(), svg },
            None => Shown::Text(format!("{name}: nothing to draw")),
        };
        self.put(Location::caller(), shown);
    }

    /// Writes the page, its figures and the Jupyter notebook.
    pub fn write(&self) -> Result<()> {
        let parts = self.parts()?;
        for shown in self.shown.values().flatten() {
            if let Shown::Figure { name, svg } = shown {
                files::write_atomic(&self.pages.join(self.figure_file(name)), svg.0.as_bytes())?;
            }
        }
        let (page, notebook) = (self.name.clone() + ".md", self.name.clone() + ".ipynb");
        files::write_atomic(&self.ipynb.join(notebook), ipynb::notebook(self, &parts)?.as_bytes())?;
        files::write_atomic(&self.pages.join(page), markdown::page(self, &parts).as_bytes())?;
        Ok(())
    }

    fn put(&mut self, at: &Location<'_>, shown: Shown) {
        self.shown.entry(at.line() as usize).or_default().push(shown);
    }

    fn figure_file(&self, figure: &str) -> String {
        format!("{}-{figure}.svg", self.name)
    }

    /// Where the notebook comes from and how it is run: a line for its reader.
    fn origin(&self) -> String {
        let name = &self.name;
        format!(
            "*`cargo run --release -p notebooks-rs --example {name}` runs this notebook and prints it anew; its imports \
             and helpers are in `notebooks-rs/examples/{name}.rs`.*"
        )
    }

    /// The walk: prose, code, and each result after the statement that showed it.
    fn parts(&self) -> Result<Vec<Part<'_>>> {
        let lines: Vec<&str> = self.source.lines().collect();
        let begin = lines
            .iter()
            .position(|line| line.starts_with(BEGIN))
            .context("the notebook has no fn main at the start of a line")?;
        let end = begin
            + lines[begin..]
                .iter()
                .position(|line| *line == END)
                .context("fn main does not end with } at the start of a line")?;
        if let Some(line) = self.shown.keys().find(|line| !(begin + 1..=end).contains(*line)) {
            bail!(
                "line {line} shows something outside of main, which is not on the page; hint: show what a function returns"
            );
        }
        let mut parts = Parts::default();
        let mut pending: Vec<&Shown> = Vec::new();
        for (index, line) in lines.iter().enumerate().take(end).skip(begin + 1) {
            let line = line.strip_prefix("    ").unwrap_or(line);
            if let Some(prose) = line.trim_start().strip_prefix("//|") {
                parts.prose(prose.strip_prefix(' ').unwrap_or(prose));
                continue;
            }
            if FRAME.iter().any(|frame| line.contains(frame)) {
                continue;
            }
            parts.code(line);
            pending.extend(self.shown.get(&(index + 1)).into_iter().flatten());
            // a call over several lines, or a loop, is one statement of main: its results wait for its end
            let statement = line.split(" //").next().unwrap_or_default().trim_end();
            if !line.starts_with(' ') && (statement.ends_with(';') || statement.ends_with('}')) {
                pending.drain(..).for_each(|result| parts.result(result));
            }
        }
        for result in pending {
            parts.result(result);
        }
        Ok(parts.finish())
    }
}

/// Parts that grow by lines: lines of prose are a part together, and so are lines of code.
#[derive(Default)]
struct Parts<'a> {
    done: Vec<Part<'a>>,
    prose: Vec<&'a str>,
    code: Vec<&'a str>,
}

impl<'a> Parts<'a> {
    fn prose(&mut self, line: &'a str) {
        self.end_code();
        self.prose.push(line.trim_end());
    }

    fn code(&mut self, line: &'a str) {
        self.end_prose();
        self.code.push(line.trim_end());
    }

    fn result(&mut self, shown: &'a Shown) {
        self.end_code();
        self.done.push(Part::Result(shown));
    }

    fn end_prose(&mut self) {
        let text = std::mem::take(&mut self.prose).join("\n");
        if !text.trim().is_empty() {
            self.done.push(Part::Prose(text.trim_matches('\n').to_owned()));
        }
    }

    fn end_code(&mut self) {
        let text = std::mem::take(&mut self.code).join("\n");
        if !text.trim().is_empty() {
            self.done.push(Part::Code(text.trim_matches('\n').to_owned()));
        }
    }

    fn finish(mut self) -> Vec<Part<'a>> {
        self.end_prose();
        self.end_code();
        self.done
    }
}

/// A line broken between words where it is wider than a page; indented lines and tables in text are not words.
fn wrapped(line: &str) -> String {
    let mut text = String::new();
    let mut width = 0;
    if line.contains("  ") {
        return line.to_owned();
    }
    for word in line.split(' ') {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > WIDTH {
            text.push('\n');
            width = 0;
        } else if width > 0 {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += length;
    }
    text
}

#[cfg(test)]
mod tests;
