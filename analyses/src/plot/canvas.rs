//! What the three charts draw with: shapes and text at pixel coordinates, an axis with round ticks, numbers as text, colours.
//! The palette is Okabe and Ito's (2008), which colour-blind readers can tell apart.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Svg;
use crate::error::{Error, Result};

pub(super) const TITLE: f64 = 16.0;
pub(super) const TEXT: f64 = 13.0;
pub(super) const SMALL: f64 = 12.0;
pub(super) const MARGIN: f64 = 16.0;

pub(super) const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub(super) const FAINT_INK: RGBColor = RGBColor(0x59, 0x59, 0x59);
pub(super) const AXIS: RGBColor = RGBColor(0x88, 0x88, 0x88);
pub(super) const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const PALETTE: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2), // blue
    RGBColor(0xe6, 0x9f, 0x00), // orange
    RGBColor(0x00, 0x9e, 0x73), // green
    RGBColor(0xd5, 0x5e, 0x00), // vermilion
    RGBColor(0xcc, 0x79, 0xa7), // purple
    RGBColor(0x56, 0xb4, 0xe9), // sky
    RGBColor(0x66, 0x66, 0x66), // grey
];
/// Light to dark, for more series than the palette has; the order of the series is then the order of the colours.
const RAMP: [RGBColor; 4] =
    [RGBColor(0xe6, 0x9f, 0x00), RGBColor(0xc4, 0x4e, 0x52), RGBColor(0x7b, 0x3a, 0x8c), RGBColor(0x1b, 0x1b, 0x5e)];

/// plotters rounds to whole pixels; drawing at four times the size and saying so in the head keeps curves smooth.
const FINE: f64 = 4.0;

pub(super) type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;
pub(super) type At = (f64, f64);

/// Draws on a white sheet of the given size; the title is what a screen reader says.
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

/// Where a text stands relative to its point.
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
        let anchor = match align {
            Align::Left => HPos::Left,
            Align::Centre => HPos::Center,
            Align::Right | Align::UpEnd => HPos::Right,
        };
        // plotters' SVG backend divides sizes by 1.24
        let mut style =
            TextStyle::from(("sans-serif", size * FINE * 1.24)).color(&colour).pos(Pos::new(anchor, VPos::Center));
        if matches!(align, Align::UpEnd) {
            style = style.transform(FontTransform::Rotate270);
        }
        self.0.draw(&Text::new(text.to_owned(), pixel(at), style))
    }

    /// The title, wrapped to `width`, from the sheet's top left corner.
    pub(super) fn title(&self, lines: &[String]) -> Drawn {
        for (row, line) in lines.iter().enumerate() {
            self.text(line, (MARGIN, MARGIN + TITLE * (0.6 + 1.3 * row as f64)), Align::Left, TITLE, INK)?;
        }
        Ok(())
    }

    pub(super) fn line(&self, from: At, to: At, colour: RGBColor, width: u32) -> Drawn {
        self.path(&[from, to], colour, width)
    }

    pub(super) fn path(&self, points: &[At], colour: RGBColor, width: u32) -> Drawn {
        let points: Vec<_> = points.iter().copied().map(pixel).collect();
        self.0.draw(&PathElement::new(points, colour.stroke_width(width * FINE as u32)))
    }

    /// A dashed line, vertical or horizontal.
    pub(super) fn dashes(&self, from: At, to: At, colour: RGBColor) -> Drawn {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let length = dx.hypot(dy);
        let at = |done: f64| (from.0 + dx * done / length, from.1 + dy * done / length);
        for dash in 0..(length / 8.0).ceil() as u32 {
            let start = f64::from(dash) * 8.0;
            self.line(at(start), at((start + 5.0).min(length)), colour, 1)?;
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

    pub(super) fn dot(&self, at: At, colour: RGBColor) -> Drawn {
        self.0.draw(&Circle::new(pixel(at), 3 * FINE as u32, colour.filled()))
    }

    /// Coloured squares with names, at the places that [`legend_places`] gave.
    pub(super) fn legend(&self, names: &[String], places: &[At], origin: At) -> Drawn {
        for (index, (name, place)) in names.iter().zip(places).enumerate() {
            let (x, y) = (origin.0 + place.0, origin.1 + place.1);
            self.rect((x, y - 5.0), (x + 11.0, y + 6.0), series_colour(index, names.len()))?;
            self.text(name, (x + 17.0, y), Align::Left, SMALL, INK)?;
        }
        Ok(())
    }
}

/// Where each name of a legend stands when the names flow in rows of `width`, and the height of them all.
pub(super) fn legend_places(names: &[String], width: f64) -> (Vec<At>, f64) {
    let (mut x, mut y) = (0.0, 10.0);
    let mut places = Vec::new();
    for name in names {
        let needed = 17.0 + text_width(name, SMALL) + 16.0;
        if x > 0.0 && x + needed > width {
            (x, y) = (0.0, y + 19.0);
        }
        places.push((x, y));
        x += needed;
    }
    (places, if names.is_empty() { 0.0 } else { y + 12.0 })
}

/// The colour of one series among `count`.
pub(super) fn series_colour(index: usize, count: usize) -> RGBColor {
    if count <= PALETTE.len() {
        return PALETTE[index];
    }
    blend(&RAMP, index as f64 / (count - 1) as f64)
}

/// The colour at `part` of the way (0 to 1) through evenly spaced stops.
pub(super) fn blend(stops: &[RGBColor], part: f64) -> RGBColor {
    let place = part.clamp(0.0, 1.0) * (stops.len() - 1) as f64;
    let below = (place.floor() as usize).min(stops.len() - 2);
    let (from, to, share) = (stops[below], stops[below + 1], place - below as f64);
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// The values from `low` to `high` with round ticks.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) high: f64,
    step: f64,
}

impl Axis {
    /// An axis around all of `values`, its ends on ticks, about `count` of them; `whole`: ticks are whole numbers.
    pub(super) fn around(values: impl Iterator<Item = f64>, count: f64, whole: bool) -> Self {
        let (mut low, mut high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if high - low <= 1e-12 * high.abs().max(low.abs()) {
            // all the same: room above for a chart of zeros, to both sides otherwise
            let room = if high == 0.0 { 1.0 } else { high.abs() * 0.1 };
            (low, high) = if high == 0.0 { (0.0, room) } else { (low - room, high + room) };
        }
        let step = round_step((high - low) / count);
        let step = if whole { step.max(1.0).round() } else { step };
        Self { low: (low / step + 1e-9).floor() * step, high: (high / step - 1e-9).ceil() * step, step }
    }

    /// Lets the axis end where the data does; the ticks within stay.
    pub(super) fn end_at(&mut self, low: f64, high: f64) {
        if low < high {
            (self.low, self.high) = (low, high);
        }
    }

    /// How far along the axis a value is, 0 to 1.
    pub(super) fn part(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// The ticks with their texts.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let (first, last) = ((self.low / self.step - 1e-9).ceil(), (self.high / self.step + 1e-9).floor());
        // as many decimals as write the step exactly: 0.25 needs two
        let written = |decimals: usize| (self.step * 10_f64.powi(decimals as i32)).fract();
        let decimals = (0..5).find(|&d| written(d).min(1.0 - written(d)) < 1e-6).unwrap_or(5);
        (first as i64..=last as i64)
            .map(|k| {
                let value = k as f64 * self.step;
                let plain = decimals <= 4 && value.abs() < 1e6;
                (value, if plain { minus(&format!("{value:.decimals$}")) } else { short(value) })
            })
            .collect()
    }
}

/// The next of 1, 2, 2.5, 5, 10 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factors = if (power - 1.0).abs() < 1e-9 { [1.0, 2.0, 5.0, 5.0] } else { [1.0, 2.0, 2.5, 5.0] };
    factors.iter().copied().find(|f| f * power >= step * (1.0 - 1e-9)).unwrap_or(10.0) * power
}

/// A number in three digits: `0.452`, `12`, `3.1e−5`.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    let text = if size == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.1e}").replace(".0e", "e")
    } else {
        let decimals = (2.0 - size.log10().floor()).max(0.0) as usize;
        let text = format!("{value:.decimals$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    minus(&text)
}

/// The text with real minus signs.
pub(super) fn minus(text: &str) -> String {
    text.replace('-', "\u{2212}")
}

/// About how wide a text is in a wide sans-serif font.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    let share = |character: char| match character {
        'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '|' | '!' | '\'' => 0.33,
        'f' | 't' | 'r' | ' ' | '(' | ')' | '/' => 0.42,
        'm' | 'w' | 'M' | 'W' | '@' | '%' => 0.98,
        'A'..='Z' | '0'..='9' => 0.68,
        character if character.is_ascii() => 0.63,
        '\u{2212}' => 0.8,
        _ => 1.0,
    };
    text.chars().map(share).sum::<f64>() * size
}

/// The text's words in lines of at most `width`.
pub(super) fn wrap(text: &str, width: f64, size: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if text_width(line, size) + text_width(word, size) + size * 0.6 <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A name of at most 60 characters; longer ones lose their middle.
pub(super) fn name(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= 60 {
        return text.to_owned();
    }
    let (head, tail) = (&characters[..40], &characters[characters.len() - 19..]);
    head.iter().chain(&['…']).chain(tail).collect()
}

/// Places at least `apart` from each other, each as near to its wish as the ones before it allow; `wishes` in any order.
pub(super) fn spread(wishes: &[f64], apart: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wishes.len()).collect();
    order.sort_by(|&a, &b| wishes[a].total_cmp(&wishes[b]));
    let mut places = wishes.to_vec();
    for pair in order.windows(2) {
        places[pair[1]] = places[pair[1]].max(places[pair[0]] + apart);
    }
    places
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn pixel((x, y): At) -> (i32, i32) {
    ((x * FINE).round() as i32, (y * FINE).round() as i32)
}
