//! Shapes and text at pixel coordinates, in the style of all charts. A sheet is as wide as a journal's column: printed
//! at 8.5 cm its smallest text is 7 points high.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::looks::{Look, looks};
use super::text::{text_width, wrap};
use super::{Reference, Svg};
use crate::error::{Error, Result};

/// The sheet's width in pixels; long names and many columns make it wider.
pub(super) const COLUMN: f64 = 420.0;
pub(super) const TITLE: f64 = 14.0;
pub(super) const TEXT: f64 = 13.0;
pub(super) const SMALL: f64 = 12.0;
pub(super) const MARGIN: f64 = 10.0;

pub(super) const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub(super) const FAINT_INK: RGBColor = RGBColor(0x59, 0x59, 0x59);
pub(super) const AXIS: RGBColor = RGBColor(0x88, 0x88, 0x88);
pub(super) const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);

/// Names of references to the right of a plot are wrapped at this width.
const REFERENCE_WIDTH: f64 = 84.0;
const REFERENCE_ROW: f64 = 13.0;

/// plotters rounds to whole pixels. Drawing at four times the size, with a `viewBox` to match, keeps curves smooth.
const FINE: f64 = 4.0;

pub(super) type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;
pub(super) type At = (f64, f64);

/// Draws on a white sheet of the given size. A screen reader reads the title.
pub(super) fn draw(title: &str, width: f64, height: f64, paint: impl FnOnce(&Canvas<'_>) -> Drawn) -> Result<Svg> {
    let mut text = String::new();
    let (width, height) = (width.ceil(), height.ceil());
    let size = ((width * FINE) as u32, (height * FINE) as u32);
    let sheet = Canvas(SVGBackend::with_string(&mut text, size).into_drawing_area());
    sheet
        .0
        .fill(&WHITE)
        .and_then(|()| paint(&sheet))
        .and_then(|()| sheet.0.present())
        .map_err(|error| Error::Plot { title: title.to_owned(), problem: error.to_string() })?;
    drop(sheet);
    let drawn_head = format!("<svg width=\"{}\" height=\"{}\"", size.0, size.1);
    let head = format!("<svg role=\"img\" aria-label=\"{}\" width=\"{width}\" height=\"{height}\"", escape(title));
    Ok(Svg(text.replacen(&drawn_head, &head, 1)))
}

/// A text's position relative to its point.
#[derive(Clone, Copy)]
pub(super) enum Align {
    Left,
    Centre,
    Right,
    /// Rotated to read upwards, its end at the point.
    UpEnd,
}

pub(super) struct Canvas<'a>(DrawingArea<SVGBackend<'a>, Shift>);

impl Canvas<'_> {
    /// Text centred vertically on `at`.
    pub(super) fn text(&self, text: &str, at: At, align: Align, size: f64, colour: RGBColor) -> Drawn {
        self.styled(text, at, align, size, colour, FontStyle::Normal)
    }

    fn styled(&self, text: &str, at: At, align: Align, size: f64, colour: RGBColor, weight: FontStyle) -> Drawn {
        let anchor = match align {
            Align::Left => HPos::Left,
            Align::Centre => HPos::Center,
            Align::Right | Align::UpEnd => HPos::Right,
        };
        // plotters' SVG backend divides sizes by 1.24
        let mut style = TextStyle::from(("sans-serif", size * FINE * 1.24, weight))
            .color(&colour)
            .pos(Pos::new(anchor, VPos::Center));
        if matches!(align, Align::UpEnd) {
            style = style.transform(FontTransform::Rotate270);
        }
        self.0.draw(&Text::new(text.to_owned(), pixel(at), style))
    }

    /// Draws the lines of the title from the sheet's top left corner.
    pub(super) fn title(&self, lines: &[String]) -> Drawn {
        for (row, line) in lines.iter().enumerate() {
            let at = (MARGIN, MARGIN + TITLE * (0.6 + 1.3 * row as f64));
            self.styled(line, at, Align::Left, TITLE, INK, FontStyle::Bold)?;
        }
        Ok(())
    }

    pub(super) fn line(&self, from: At, to: At, colour: RGBColor, width: f64) -> Drawn {
        self.path(&[from, to], colour, width)
    }

    pub(super) fn path(&self, points: &[At], colour: RGBColor, width: f64) -> Drawn {
        let points: Vec<_> = points.iter().copied().map(pixel).collect();
        self.0.draw(&PathElement::new(points, colour.stroke_width((width * FINE) as u32)))
    }

    /// A dashed line along straight pieces, with `on` pixels drawn of every `on + off`.
    pub(super) fn dashes(&self, points: &[At], colour: RGBColor, width: f64, (on, off): (f64, f64)) -> Drawn {
        // the place in the pattern at which a piece begins, so that dashes continue around corners
        let mut phase = 0.0;
        for piece in points.windows(2) {
            let (from, to) = (piece[0], piece[1]);
            let (dx, dy) = (to.0 - from.0, to.1 - from.1);
            let length = dx.hypot(dy);
            let at = |done: f64| (from.0 + dx * done / length, from.1 + dy * done / length);
            let mut start = -phase;
            while start < length {
                let (first, last) = (start.max(0.0), (start + on).min(length));
                if first < last {
                    self.line(at(first), at(last), colour, width)?;
                }
                start += on + off;
            }
            phase = (phase + length) % (on + off);
        }
        Ok(())
    }

    pub(super) fn reference(&self, from: At, to: At) -> Drawn {
        self.dashes(&[from, to], INK, 1.0, (5.0, 3.0))
    }

    /// Dashed lines from `left` to `right`, with their names at the right ends. A name that must move is joined to its
    /// line by a thin line. `y` maps a value to a pixel between `top` and `bottom`.
    pub(super) fn references(
        &self,
        references: &[Reference],
        (left, right): (f64, f64),
        (top, bottom): (f64, f64),
        y: &dyn Fn(f64) -> f64,
    ) -> Drawn {
        let wishes: Vec<f64> = references.iter().map(|line| y(line.value)).collect();
        let texts: Vec<Vec<String>> = references.iter().map(reference_rows).collect();
        let heights: Vec<f64> = texts.iter().map(|rows| REFERENCE_ROW * rows.len() as f64 + 1.0).collect();
        let tops = spread(&wishes, &heights, (top - 8.0, bottom + 8.0));
        for (index, rows) in texts.iter().enumerate() {
            let (y, middle) = (wishes[index], tops[index] + heights[index] / 2.0);
            self.reference((left, y), (right, y))?;
            self.line((right, y), (right + 9.0, middle), AXIS, 1.0)?;
            for (row, text) in rows.iter().enumerate() {
                let at = (right + 12.0, tops[index] + REFERENCE_ROW * (row as f64 + 0.5));
                self.text(text, at, Align::Left, SMALL, INK)?;
            }
        }
        Ok(())
    }

    /// An interval with a cap at each end that is `cap` pixels wide on both sides.
    pub(super) fn whiskers(&self, low: At, high: At, cap: f64, colour: RGBColor) -> Drawn {
        self.line(low, high, colour, 1.0)?;
        let level = (low.1 - high.1).abs() < f64::EPSILON;
        for (x, y) in [low, high] {
            let (from, to) = if level { ((x, y - cap), (x, y + cap)) } else { ((x - cap, y), (x + cap, y)) };
            self.line(from, to, colour, 1.0)?;
        }
        Ok(())
    }

    pub(super) fn rect(&self, from: At, to: At, colour: RGBColor) -> Drawn {
        self.0.draw(&Rectangle::new([pixel(from), pixel(to)], colour.filled()))
    }

    pub(super) fn band(&self, outline: &[At], colour: RGBColor) -> Drawn {
        let points: Vec<_> = outline.iter().copied().map(pixel).collect();
        self.0.draw(&Polygon::new(points, colour.mix(0.18)))
    }

    /// A filled marker: circle, square, triangle, diamond, triangle on its tip, cross, and then again from the first.
    pub(super) fn marker(&self, (x, y): At, which: usize, colour: RGBColor) -> Drawn {
        let shape: &[At] = match which % 6 {
            0 => return self.0.draw(&Circle::new(pixel((x, y)), (3.5 * FINE) as u32, colour.filled())),
            1 => &[(-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)],
            2 => &[(0.0, -4.3), (4.2, 3.1), (-4.2, 3.1)],
            3 => &[(0.0, -4.6), (4.6, 0.0), (0.0, 4.6), (-4.6, 0.0)],
            4 => &[(0.0, 4.3), (4.2, -3.1), (-4.2, -3.1)],
            _ => {
                self.line((x - 3.2, y - 3.2), (x + 3.2, y + 3.2), colour, 2.0)?;
                return self.line((x - 3.2, y + 3.2), (x + 3.2, y - 3.2), colour, 2.0);
            }
        };
        let points: Vec<_> = shape.iter().map(|(dx, dy)| pixel((x + dx, y + dy))).collect();
        self.0.draw(&Polygon::new(points, colour.filled()))
    }

    /// A small ring for one of the values of a mean.
    pub(super) fn ring(&self, at: At) -> Drawn {
        self.0.draw(&Circle::new(pixel(at), (2.2 * FINE) as u32, WHITE.filled()))?;
        self.0.draw(&Circle::new(pixel(at), (2.2 * FINE) as u32, INK.stroke_width(FINE as u32)))
    }

    pub(super) fn frame(&self, from: At, to: At, colour: RGBColor, width: f64) -> Drawn {
        self.path(&[from, (to.0, from.1), to, (from.0, to.1), from], colour, width)
    }

    /// Draws the title and the legend: the series' names, each with a sample of its look.
    pub(super) fn head(&self, head: &Head) -> Drawn {
        self.title(&head.title)?;
        for ((name, look), &(x, y)) in head.names.iter().zip(&head.looks).zip(&head.places) {
            if head.lines {
                self.stroke(&[(x, y), (x + 20.0, y)], *look)?;
                self.marker((x + 10.0, y), look.marker, look.colour)?;
            } else {
                self.rect((x, y - 5.0), (x + 11.0, y + 6.0), look.fill())?;
            }
            self.text(name, (x + head.sample(), y), Align::Left, SMALL, INK)?;
        }
        Ok(())
    }

    pub(super) fn stroke(&self, points: &[At], look: Look) -> Drawn {
        match look.repeat {
            0 => self.path(points, look.colour, 1.75),
            1 => self.dashes(points, look.colour, 1.75, (6.0, 3.0)),
            _ => self.dashes(points, look.colour, 1.75, (2.0, 2.5)),
        }
    }
}

/// The part above a plot: the title, and a legend if there are several series.
#[derive(Clone, Debug, Default)]
pub(super) struct Head {
    title: Vec<String>,
    names: Vec<String>,
    looks: Vec<Look>,
    places: Vec<At>,
    lines: bool,
    /// The height at which the plot's space begins.
    pub(super) bottom: f64,
}

impl Head {
    /// Lays out the title and, in rows below it, the names of the series, each once. With `lines`, their samples are
    /// lines with markers instead of squares.
    pub(super) fn of<'a>(title: &str, series: impl Iterator<Item = &'a String>, width: f64, lines: bool) -> Self {
        let title = wrap_title(title, width);
        let mut names: Vec<String> = Vec::new();
        for name in series {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        let bottom = MARGIN + TITLE * 1.3 * title.len() as f64 + 2.0;
        let mut head = Self { looks: looks(&names), title, names, lines, bottom, places: vec![] };
        if head.names.iter().all(String::is_empty) {
            return head;
        }
        let (mut x, mut y) = (0.0, 9.0);
        for name in &head.names {
            let needed = head.sample() + text_width(name, SMALL) + 12.0;
            if x > 0.0 && x + needed - 12.0 > width - 2.0 * MARGIN {
                (x, y) = (0.0, y + 17.0);
            }
            head.places.push((MARGIN + x, bottom + y));
            x += needed;
        }
        head.bottom += y + 11.0;
        head
    }

    pub(super) fn look(&self, series: &str) -> Option<Look> {
        Some(self.looks[self.names.iter().position(|name| name == series)?])
    }

    /// The width of a sample with the gap after it.
    fn sample(&self) -> f64 {
        if self.lines { 25.0 } else { 16.0 }
    }
}

/// A reference's name, wrapped for the end of its line.
fn reference_rows(line: &Reference) -> Vec<String> {
    wrap(&line.label, REFERENCE_WIDTH, SMALL)
}

/// The width to the right of a plot for names of references, including the sheet's margin.
pub(super) fn room_for<'a>(references: impl Iterator<Item = &'a Reference>) -> f64 {
    let widest = references.flat_map(reference_rows).map(|row| text_width(&row, SMALL)).fold(0.0, f64::max);
    MARGIN + if widest > 0.0 { widest + 12.0 } else { 4.0 }
}

/// Wraps a title to a sheet of this width. Bold letters are wider.
pub(super) fn wrap_title(text: &str, width: f64) -> Vec<String> {
    wrap(text, (width - 2.0 * MARGIN) / 1.15, TITLE)
}

/// The upper edges for boxes of `heights` that do not overlap. Each is centred as near to its wish as possible, within
/// `low` to `high` if they fit. `wishes` are in any order.
pub(super) fn spread(wishes: &[f64], heights: &[f64], (low, high): (f64, f64)) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wishes.len()).collect();
    order.sort_by(|&a, &b| wishes[a].total_cmp(&wishes[b]));
    let mut tops: Vec<f64> = wishes.iter().zip(heights).map(|(wish, height)| wish - height / 2.0).collect();
    let mut free = low;
    for &index in &order {
        tops[index] = tops[index].max(free);
        free = tops[index] + heights[index];
    }
    let mut limit = high;
    for &index in order.iter().rev() {
        tops[index] = tops[index].min(limit - heights[index]);
        limit = tops[index];
    }
    tops
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn pixel((x, y): At) -> (i32, i32) {
    ((x * FINE).round() as i32, (y * FINE).round() as i32)
}
