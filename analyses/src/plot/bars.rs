//! Horizontal bars, with full category names at the left, as gates and token classes need.

use super::axis::Axis;
use super::canvas::{AXIS, Align, COLUMN, Canvas, Drawn, FAINT_INK, GRID, Head, INK, MARGIN, SMALL, TEXT, draw};
use super::text::{beside, name, text_width, wrap};
use super::{Reference, Svg, check_value, refuse};
use crate::error::Result;
use plotters::style::WHITE;

/// One bar of a [`BarChart`].
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// The category, written at the left. Neighbouring bars with the same label share it, as one cluster.
    pub label: String,
    /// The series, which gives the bar its colour. A chart with several series has a legend.
    pub series: String,
    /// The bar's length.
    pub value: f64,
    /// Low and high end of the error bar.
    pub interval: Option<(f64, f64)>,
    /// The single values that the bar's value is the mean of, drawn as rings.
    pub values: Vec<f64>,
}

impl Bar {
    /// A bar without an error bar, for a chart with one series.
    pub fn new(label: impl Into<String>, value: f64) -> Self {
        Self { label: label.into(), series: String::new(), value, interval: None, values: Vec::new() }
    }

    /// Adds an error bar from `interval.0` to `interval.1`.
    #[must_use]
    pub fn with_interval(self, interval: (f64, f64)) -> Self {
        Self { interval: Some(interval), ..self }
    }

    /// Adds a ring for each of the single values.
    #[must_use]
    pub fn with_values(self, values: Vec<f64>) -> Self {
        Self { values, ..self }
    }

    /// Draws the bar in the colour of `series`.
    #[must_use]
    pub fn in_series(self, series: impl Into<String>) -> Self {
        Self { series: series.into(), ..self }
    }
}

/// Horizontal bars from zero, with error bars, the value at the end of each, and dashed reference lines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarChart {
    /// The title above the chart.
    pub title: String,
    /// The quantity of the bars, under the value axis.
    pub value_label: String,
    /// The bars, from top to bottom.
    pub bars: Vec<Bar>,
    /// Dashed lines.
    pub references: Vec<Reference>,
}

/// The least width of the plot. Names that leave less room make the sheet wider.
const PLOT_WIDTH: f64 = 190.0;
const BAR: f64 = 16.0;
const GAP: f64 = 8.0;
const REFERENCE_ROW: f64 = 14.0;

/// Draws bars; an error if there are none or if a value is not finite.
pub fn bars(chart: &BarChart) -> Result<Svg> {
    if chart.bars.is_empty() {
        return refuse(&chart.title, "there are no bars to draw");
    }
    for bar in &chart.bars {
        check_value(&chart.title, &bar.label, bar.value, bar.interval)?;
        bar.values.iter().try_for_each(|&value| check_value(&chart.title, &bar.label, value, None))?;
    }
    for line in &chart.references {
        check_value(&chart.title, &line.label, line.value, None)?;
    }
    let layout = Layout::of(chart);
    draw(&chart.title, layout.width, layout.height, |canvas| layout.paint(chart, canvas))
}

/// The lowest and highest of zero and a bar's value, interval and single values.
fn reach(bar: &Bar) -> (f64, f64) {
    let (low, high) = bar.interval.unwrap_or((bar.value, bar.value));
    let ends = [low, high, bar.value, 0.0].into_iter().chain(bar.values.iter().copied());
    ends.fold((0.0, 0.0), |(least, most), end| (end.min(least), end.max(most)))
}

/// The positions of all elements, in pixels.
struct Layout {
    axis: Axis,
    head: Head,
    value_label: Vec<String>,
    /// The largest value that is written, which sets the decimals of all.
    largest: f64,
    label_end: f64,
    left: f64,
    right: f64,
    top: f64,
    /// The upper edge of each bar.
    tops: Vec<f64>,
    bottom: f64,
    /// The row above the plot in which each reference is named, 0 the lowest.
    reference_rows: Vec<usize>,
    width: f64,
    height: f64,
}

impl Layout {
    fn of(chart: &BarChart) -> Self {
        let references = || chart.references.iter().map(|line| line.value);
        let ends = || chart.bars.iter().map(reach).flat_map(|(low, high)| [low, high]).chain(references());
        let (low, high) = ends().fold((0.0, 0.0), |(l, h): (f64, f64), end| (l.min(end), h.max(end)));
        let largest = chart.bars.iter().map(|bar| bar.value).chain(references()).fold(0.0, |l: f64, v| l.max(v.abs()));

        let widest = |texts: &mut dyn Iterator<Item = f64>| texts.fold(0.0, f64::max);
        // room outside of the plot for the numbers at the ends of the bars, on the sides that have any
        let number = |bar: &Bar| text_width(&beside(bar.value, largest), SMALL) + 8.0;
        let before = widest(&mut chart.bars.iter().filter(|bar| bar.value < 0.0).map(number));
        // half of the last tick's number is always outside of the plot
        let behind = widest(&mut chart.bars.iter().filter(|bar| bar.value >= 0.0).map(number)).max(8.0);
        let label_end = MARGIN + widest(&mut chart.bars.iter().map(|bar| text_width(&name(&bar.label), TEXT)));
        let ring = if chart.bars.iter().any(|bar| !bar.values.is_empty()) { 4.0 } else { 0.0 };
        let left = label_end + 8.0 + before + ring;
        let plot_width = (COLUMN - left - behind - MARGIN).max(PLOT_WIDTH);
        let (right, width) = (left + plot_width, left + plot_width + behind + MARGIN);
        let mut axis = Axis::around([low, high].into_iter(), (plot_width / 42.0).max(2.0), false);
        axis.end_at(low, high);

        let head = Head::of(&chart.title, chart.bars.iter().map(|bar| &bar.series), width, false);

        let at = |value: f64| left + plot_width * axis.part(value);
        let spans: Vec<(f64, f64)> =
            chart.references.iter().map(|line| label_span(line, largest, at(line.value), width)).collect();
        let reference_rows = rows_without_overlap(&spans);
        let rows = reference_rows.iter().max().map_or(0, |row| row + 1);
        let top = head.bottom + REFERENCE_ROW * rows as f64 + 6.0;

        let mut y = top + GAP / 2.0;
        let mut tops = Vec::new();
        for (index, bar) in chart.bars.iter().enumerate() {
            if index > 0 {
                y += if chart.bars[index - 1].label == bar.label { 1.0 } else { GAP };
            }
            tops.push(y);
            y += BAR;
        }
        let bottom = y + GAP / 2.0;
        let value_label = wrap(&chart.value_label, width - 2.0 * MARGIN, TEXT);
        let height = bottom + 24.0 + 16.0 * value_label.len() as f64 + 6.0;
        Self {
            axis,
            head,
            value_label,
            largest,
            label_end,
            left,
            right,
            top,
            tops,
            bottom,
            reference_rows,
            width,
            height,
        }
    }

    fn x(&self, value: f64) -> f64 {
        self.left + (self.right - self.left) * self.axis.part(value)
    }

    fn paint(&self, chart: &BarChart, canvas: &Canvas<'_>) -> Drawn {
        canvas.head(&self.head)?;
        for (value, text) in self.axis.ticks() {
            let x = self.x(value);
            canvas.line((x, self.top), (x, self.bottom), GRID, 1.0)?;
            canvas.text(&text, (x, self.bottom + 11.0), Align::Centre, SMALL, FAINT_INK)?;
        }
        // centred under the plot, if it is not longer than the plot
        let half = self.value_label.iter().map(|text| text_width(text, TEXT) / 2.0).fold(0.0, f64::max);
        let middle = f64::midpoint(self.left, self.right).min(self.width - MARGIN - half).max(MARGIN + half);
        for (row, text) in self.value_label.iter().enumerate() {
            canvas.text(text, (middle, self.bottom + 30.0 + 16.0 * row as f64), Align::Centre, TEXT, INK)?;
        }
        canvas.line((self.x(0.0), self.top), (self.x(0.0), self.bottom), AXIS, 1.0)?;
        self.paint_bars(chart, canvas)?;
        let row_y = |row: usize| self.top - 8.0 - REFERENCE_ROW * row as f64;
        for (line, row) in chart.references.iter().zip(&self.reference_rows) {
            canvas.reference((self.x(line.value), row_y(*row) + 7.0), (self.x(line.value), self.bottom))?;
        }
        for (line, row) in chart.references.iter().zip(&self.reference_rows) {
            // on white, so that the line of a name above does not cross this name
            let (from, to) = label_span(line, self.largest, self.x(line.value), self.width);
            canvas.rect((from - 2.0, row_y(*row) - 6.0), (to + 2.0, row_y(*row) + 6.0), WHITE)?;
            canvas.text(&reference_text(line, self.largest), (from, row_y(*row)), Align::Left, SMALL, INK)?;
        }
        // last, so that neither grid nor dashes cross a number
        chart.bars.iter().zip(&self.tops).try_for_each(|(bar, top)| self.paint_number(bar, *top, canvas))
    }

    fn paint_bars(&self, chart: &BarChart, canvas: &Canvas<'_>) -> Drawn {
        let mut tops = self.tops.iter().copied();
        for cluster in chart.bars.chunk_by(|a, b| a.label == b.label) {
            let cluster_tops: Vec<f64> = tops.by_ref().take(cluster.len()).collect();
            let middle = cluster_tops[0] + (BAR * cluster.len() as f64 + cluster.len() as f64 - 1.0) / 2.0;
            canvas.text(&name(&cluster[0].label), (self.label_end, middle), Align::Right, TEXT, INK)?;
            for (bar, top) in cluster.iter().zip(cluster_tops) {
                self.paint_bar(bar, top, canvas)?;
            }
        }
        Ok(())
    }

    fn paint_bar(&self, bar: &Bar, top: f64, canvas: &Canvas<'_>) -> Drawn {
        let (zero, end, middle) = (self.x(0.0), self.x(bar.value), top + BAR / 2.0);
        if let Some(look) = self.head.look(&bar.series) {
            canvas.rect((zero.min(end), top), (zero.max(end), top + BAR), look.fill())?;
        }
        for (index, &value) in bar.values.iter().enumerate() {
            // three heights in turn, so that equal values do not hide each other
            canvas.ring((self.x(value), middle + [0.0, -4.0, 4.0][index % 3]))?;
        }
        if let Some((low, high)) = bar.interval {
            canvas.whiskers((self.x(low), middle), (self.x(high), middle), 4.0, INK)?;
        }
        Ok(())
    }

    /// Paints the number beyond the bar, its whisker and its rings.
    fn paint_number(&self, bar: &Bar, top: f64, canvas: &Canvas<'_>) -> Drawn {
        let text = beside(bar.value, self.largest);
        let width = text_width(&text, SMALL);
        let rings = if bar.values.is_empty() { 0.0 } else { 3.0 };
        let (low, high) = reach(bar);
        let from = if bar.value < 0.0 { self.x(low) - 5.0 - rings - width } else { self.x(high) + 5.0 + rings };
        canvas.rect((from - 1.0, top + 2.0), (from + width, top + BAR - 2.0), WHITE)?;
        let (x, align) = if bar.value < 0.0 { (from + width, Align::Right) } else { (from, Align::Left) };
        canvas.text(&text, (x, top + BAR / 2.0), align, SMALL, INK)
    }
}

fn reference_text(line: &Reference, largest: f64) -> String {
    format!("{} {}", line.label, beside(line.value, largest))
}

/// The left and right end of a reference's name above its line at `x`, on a sheet of `width`.
fn label_span(line: &Reference, largest: f64, x: f64, width: f64) -> (f64, f64) {
    let long = text_width(&reference_text(line, largest), SMALL);
    let from = (x - long / 2.0).min(width - MARGIN - long).max(MARGIN);
    (from, from + long)
}

/// For each span, the lowest row in which it overlaps no earlier span.
fn rows_without_overlap(spans: &[(f64, f64)]) -> Vec<usize> {
    let mut rows: Vec<usize> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        let free = |row: usize| {
            let taken = rows.iter().zip(&spans[..index]).filter(|(other, _)| **other == row);
            taken.into_iter().all(|(_, other)| span.1 + 6.0 < other.0 || other.1 + 6.0 < span.0)
        };
        let row = (0..=index).find(|&row| free(row)).unwrap_or(index);
        rows.push(row);
    }
    rows
}
