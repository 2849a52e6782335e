//! A coloured cell per row and column: white is zero (or the lowest value), orange above, blue below. A cell whose row
//! and column have the same name is framed: with students by animals, it is the student's own animal.

use plotters::style::RGBColor;

use super::axis::Axis;
use super::canvas::{AXIS, Align, COLUMN, Canvas, Drawn, FAINT_INK, INK, MARGIN, SMALL, TEXT, TITLE, draw, wrap_title};
use super::looks::blend;
use super::text::{minus, name, short, text_width};
use super::{Svg, check_value, refuse};
use crate::error::Result;

/// A coloured cell per row and column, with its number if there is room.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeatMap {
    /// The title above the chart.
    pub title: String,
    /// The label of the columns.
    pub x_label: String,
    /// The label of the rows.
    pub y_label: String,
    /// The quantity that the colours show, with its unit, under the colour bar.
    pub value_label: String,
    /// The columns' names, from left to right.
    pub columns: Vec<String>,
    /// The rows' names, from top to bottom.
    pub rows: Vec<String>,
    /// One value per row and column, `[rows][columns]`.
    pub values: Vec<Vec<f64>>,
}

const ABOVE: [RGBColor; 5] = [
    RGBColor(0xfa, 0xfa, 0xfa),
    RGBColor(0xfe, 0xe0, 0xb6),
    RGBColor(0xfd, 0xb8, 0x63),
    RGBColor(0xd9, 0x6c, 0x0a),
    RGBColor(0x7f, 0x3b, 0x08),
];
const BELOW: [RGBColor; 5] = [
    RGBColor(0xfa, 0xfa, 0xfa),
    RGBColor(0xc6, 0xdd, 0xee),
    RGBColor(0x81, 0xb5, 0xd8),
    RGBColor(0x2a, 0x72, 0xb2),
    RGBColor(0x08, 0x30, 0x6b),
];
/// The height and the least width of a cell.
const CELL: f64 = 24.0;
/// The largest width of a cell.
const WIDEST: f64 = 64.0;
/// The height and the largest width of the colour bar.
const BAR: (f64, f64) = (10.0, 240.0);
/// The colours of text on cells, which do not change when a page is shown in dark mode.
const ON_COLOUR: (RGBColor, RGBColor) = (RGBColor(0, 0, 0), RGBColor(0xff, 0xff, 0xff));

/// Draws a heat map; an error if it has no cell, if the values are not `[rows][columns]`, or if one is not finite.
pub fn heatmap(chart: &HeatMap) -> Result<Svg> {
    let (rows, columns) = (chart.rows.len(), chart.columns.len());
    if rows == 0 || columns == 0 {
        return refuse(
            &chart.title,
            format!("there are {rows} rows and {columns} columns, expected one cell at least"),
        );
    }
    let widths: Vec<usize> = chart.values.iter().map(Vec::len).collect();
    if widths.len() != rows || widths.iter().any(|&width| width != columns) {
        return refuse(&chart.title, format!("the values have rows of {widths:?}, expected {rows} rows of {columns}"));
    }
    for (row, values) in chart.rows.iter().zip(&chart.values) {
        for (column, &value) in chart.columns.iter().zip(values) {
            check_value(&chart.title, &format!("{row}, {column}"), value, None)?;
        }
    }
    let layout = Layout::of(chart);
    draw(&chart.title, layout.width, layout.height, |canvas| layout.paint(chart, canvas))
}

/// The positions of all elements, in pixels.
struct Layout {
    colours: Colours,
    title: Vec<String>,
    left: f64,
    top: f64,
    cell_width: f64,
    /// Whether the columns' names are rotated, because they have too little room.
    upright: bool,
    /// Whether the cells hold their numbers.
    numbers: bool,
    right: f64,
    bottom: f64,
    names_height: f64,
    bar_top: f64,
    width: f64,
    height: f64,
}

impl Layout {
    fn of(chart: &HeatMap) -> Self {
        let colours = Colours::of(&chart.values);
        let widest = |texts: &mut dyn Iterator<Item = String>, size| {
            texts.map(|text| text_width(&text, size)).fold(0.0, f64::max)
        };
        let columns = chart.columns.len() as f64;
        let left = MARGIN + widest(&mut chart.rows.iter().map(|text| name(text)), TEXT) + 7.0;
        let names = widest(&mut chart.columns.iter().map(|text| name(text)), SMALL);
        let number =
            widest(&mut chart.values.iter().flatten().map(|&value| cell_text(value, largest(chart))), SMALL - 1.0)
                + 4.0;
        // Cells share the sheet's width. The sheet may be half as wide again, for the numbers or for many columns
        // without them.
        let room = (COLUMN - left - MARGIN) / columns;
        let numbers = number <= room || number * columns <= 1.5 * COLUMN;
        let cell_width = if numbers { room.max(number).max(CELL) } else { room.max(CELL * 0.75) }.min(WIDEST);
        let upright = names + 4.0 > cell_width;
        let names_height = if upright { names + 10.0 } else { 20.0 };

        let right = left + cell_width * columns;
        let width = COLUMN.max(right + MARGIN);
        let title = wrap_title(&chart.title, width);
        let head = if chart.y_label.is_empty() { 8.0 } else { 22.0 };
        let top = MARGIN + TITLE * 1.3 * title.len() as f64 + head;
        let bottom = top + CELL * chart.rows.len() as f64;
        let bar_top = bottom + names_height + if chart.x_label.is_empty() { 6.0 } else { 26.0 };
        let height = bar_top + BAR.0 + if chart.value_label.is_empty() { 24.0 } else { 42.0 };
        Self {
            colours,
            title,
            left,
            top,
            cell_width,
            upright,
            numbers,
            right,
            bottom,
            names_height,
            bar_top,
            width,
            height,
        }
    }

    fn paint(&self, chart: &HeatMap, canvas: &Canvas<'_>) -> Drawn {
        canvas.title(&self.title)?;
        canvas.text(&chart.y_label, (MARGIN, self.top - 12.0), Align::Left, TEXT, INK)?;
        let mut own = Vec::new();
        for (row, (label, values)) in chart.rows.iter().zip(&chart.values).enumerate() {
            let y = self.top + CELL * row as f64;
            canvas.text(&name(label), (self.left - 7.0, y + CELL / 2.0), Align::Right, TEXT, INK)?;
            for (column, &value) in values.iter().enumerate() {
                let x = self.left + self.cell_width * column as f64;
                let (colour, end) = (self.colours.of_value(value), (x + self.cell_width - 1.0, y + CELL - 1.0));
                canvas.rect((x, y), end, colour)?;
                if self.numbers {
                    let at = (x + self.cell_width / 2.0, y + CELL / 2.0);
                    canvas.text(
                        &cell_text(value, largest(chart)),
                        at,
                        Align::Centre,
                        SMALL - 1.0,
                        readable_on(colour),
                    )?;
                }
                if *label == chart.columns[column] {
                    own.push(((x, y), end));
                }
            }
        }
        own.into_iter().try_for_each(|(from, to)| canvas.frame(from, to, INK, 1.5))?;
        for (column, label) in chart.columns.iter().enumerate() {
            let x = self.left + self.cell_width * (column as f64 + 0.5);
            let (drop, align) = if self.upright { (6.0, Align::UpEnd) } else { (11.0, Align::Centre) };
            canvas.text(&name(label), (x, self.bottom + drop), align, SMALL, INK)?;
        }
        let middle = f64::midpoint(self.left, self.right);
        canvas.text(&chart.x_label, (middle, self.bottom + self.names_height + 10.0), Align::Centre, TEXT, INK)?;
        self.paint_colour_bar(chart, canvas)
    }

    fn paint_colour_bar(&self, chart: &HeatMap, canvas: &Canvas<'_>) -> Drawn {
        let length = (self.width - 2.0 * MARGIN).min(BAR.1);
        let middle = f64::midpoint(self.left, self.right);
        // centred under the cells, as far as the sheet's width allows
        let left = (middle - length / 2.0).min(self.width - MARGIN - length).max(MARGIN);
        let (top, bottom) = (self.bar_top, self.bar_top + BAR.0);
        let axis = &self.colours.axis;
        let steps = 48_u32;
        for step in 0..steps {
            // each step extends under the following ones, so that there is no visible gap between them
            let part = f64::from(step) / f64::from(steps);
            let value = axis.low + (axis.high - axis.low) * (part + 0.5 / f64::from(steps));
            canvas.rect((left + length * part, top), (left + length, bottom), self.colours.of_value(value))?;
        }
        for (value, text) in axis.ticks() {
            let x = left + length * axis.part(value);
            canvas.line((x, bottom), (x, bottom + 3.0), AXIS, 1.0)?;
            canvas.text(&text, (x, bottom + 11.0), Align::Centre, SMALL, FAINT_INK)?;
        }
        let half = text_width(&chart.value_label, TEXT) / 2.0;
        let label_at = middle.min(self.width - MARGIN - half).max(MARGIN + half);
        canvas.text(&chart.value_label, (label_at, bottom + 29.0), Align::Centre, TEXT, INK)
    }
}

/// The colour of each value: white at `white`, darkest at `span` from it.
struct Colours {
    axis: Axis,
    white: f64,
    span: f64,
}

impl Colours {
    fn of(values: &[Vec<f64>]) -> Self {
        let all = || values.iter().flatten().copied();
        let (low, high) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), value| (l.min(value), h.max(value)));
        // zero is white, unless all values are far from it on one side: then the value nearest to zero is white
        let far = low > 0.6 * high && low > 0.0 || high < 0.6 * low && high < 0.0;
        let mirrored = (low < 0.0 && high > 0.0).then(|| high.max(-low));
        let more = if far { None } else { Some(0.0) };
        let ends = all().chain(more).chain(mirrored).chain(mirrored.map(|end| -end));
        let mut axis = Axis::around(ends.clone(), 4.0, false);
        // the darkest colours belong to the data, not to the next round number
        let (least, most) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), end| (l.min(end), h.max(end)));
        axis.end_at(least, most);
        let white = if axis.low > 0.0 {
            axis.low
        } else if axis.high < 0.0 {
            axis.high
        } else {
            0.0
        };
        let span = (axis.high - white).max(white - axis.low);
        Self { axis, white, span }
    }

    fn of_value(&self, value: f64) -> RGBColor {
        let away = (value - self.white) / self.span;
        if away < 0.0 { blend(&BELOW, -away) } else { blend(&ABOVE, away) }
    }
}

/// A cell's number. Two decimals are enough, since the colour shows more, unless all numbers would be zero.
fn cell_text(value: f64, largest: f64) -> String {
    let plain = value.abs() < 10.0 && (value.abs() >= 0.005 || largest >= 0.1);
    if plain { minus(&format!("{value:.2}")).replace("−0.00", "0.00") } else { short(value) }
}

/// The largest absolute value of a chart.
fn largest(chart: &HeatMap) -> f64 {
    chart.values.iter().flatten().fold(0.0, |largest, value| value.abs().max(largest))
}

/// Black or white: the one that is easier to read on the colour.
fn readable_on(RGBColor(red, green, blue): RGBColor) -> RGBColor {
    let light = 0.299 * f64::from(red) + 0.587 * f64::from(green) + 0.114 * f64::from(blue);
    if light > 140.0 { ON_COLOUR.0 } else { ON_COLOUR.1 }
}
