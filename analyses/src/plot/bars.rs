//! Horizontal bars: category names stand at the left in full, which is what gates and token classes need.

use super::canvas::{
    AXIS, Align, Axis, Canvas, Drawn, FAINT_INK, GRID, INK, MARGIN, SMALL, TEXT, TITLE, draw, legend_places, name,
    series_colour, short, text_width, wrap,
};
use super::{Reference, Svg, check_value, refuse};
use crate::error::Result;
use plotters::style::WHITE;

/// One bar of a [`BarChart`].
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// The category, written at the left. Neighbouring bars with the same label share it, as one cluster.
    pub label: String,
    /// What gives the bar its colour; a legend appears where a chart has more than one series.
    pub series: String,
    /// The bar's length.
    pub value: f64,
    /// Low and high end of the error bar.
    pub interval: Option<(f64, f64)>,
}

impl Bar {
    /// A bar without error bar, of the chart's only series.
    pub fn new(label: impl Into<String>, value: f64) -> Self {
        Self { label: label.into(), series: String::new(), value, interval: None }
    }

    /// The same bar with an error bar from `interval.0` to `interval.1`.
    #[must_use]
    pub fn with_interval(self, interval: (f64, f64)) -> Self {
        Self { interval: Some(interval), ..self }
    }

    /// The same bar in the colour of `series`.
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
    /// What the bars measure, under the value axis.
    pub value_label: String,
    /// The bars, from top to bottom.
    pub bars: Vec<Bar>,
    /// Dashed lines.
    pub references: Vec<Reference>,
}

const PLOT_WIDTH: f64 = 460.0;
const BAR: f64 = 17.0;
const GAP: f64 = 9.0;

/// Draws bars; an error if there are none or if a value is not finite.
pub fn bars(chart: &BarChart) -> Result<Svg> {
    if chart.bars.is_empty() {
        return refuse(&chart.title, "there are no bars to draw");
    }
    for bar in &chart.bars {
        check_value(&chart.title, &bar.label, bar.value, bar.interval)?;
    }
    for line in &chart.references {
        check_value(&chart.title, &line.label, line.value, None)?;
    }
    let layout = Layout::of(chart);
    draw(&chart.title, layout.width, layout.height, |canvas| layout.paint(chart, canvas))
}

/// Where everything stands, in pixels.
struct Layout {
    axis: Axis,
    title: Vec<String>,
    value_label: Vec<String>,
    series: Vec<String>,
    legend: Vec<(f64, f64)>,
    legend_top: f64,
    label_end: f64,
    left: f64,
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
        let ends = chart.bars.iter().flat_map(|bar| {
            let (low, high) = bar.interval.unwrap_or((bar.value, bar.value));
            [low, high, bar.value]
        });
        let axis = Axis::around(ends.chain(chart.references.iter().map(|r| r.value)).chain([0.0]), 5.0, false);
        let widest = |texts: &mut dyn Iterator<Item = f64>| texts.fold(0.0, f64::max);
        let numbers = widest(&mut chart.bars.iter().map(|bar| text_width(&short(bar.value), SMALL))) + 10.0;
        let below_zero = if axis.low < 0.0 { numbers } else { 0.0 };
        let label_end = MARGIN + widest(&mut chart.bars.iter().map(|bar| text_width(&name(&bar.label), TEXT)));
        let left = label_end + 10.0 + below_zero;
        let width = left + PLOT_WIDTH + numbers + MARGIN;

        let title = wrap(&chart.title, width - 2.0 * MARGIN, TITLE);
        let mut series: Vec<String> = Vec::new();
        for bar in &chart.bars {
            if !series.contains(&bar.series) {
                series.push(bar.series.clone());
            }
        }
        let named = series.iter().any(|name| !name.is_empty());
        let (legend, legend_height) = if named { legend_places(&series, width - left) } else { (Vec::new(), 0.0) };
        let legend_top = MARGIN + TITLE * 1.3 * title.len() as f64 + 4.0;

        let spans: Vec<(f64, f64)> = chart
            .references
            .iter()
            .map(|line| label_span(line, left + PLOT_WIDTH * axis.part(line.value), width))
            .collect();
        let reference_rows = rows_without_overlap(&spans);
        let rows = reference_rows.iter().max().map_or(0, |row| row + 1);
        let top = legend_top + legend_height + 15.0 * rows as f64 + 8.0;

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
        let value_label = wrap(&chart.value_label, PLOT_WIDTH + numbers, TEXT);
        let height = bottom + 34.0 + 17.0 * value_label.len() as f64;
        Self {
            axis,
            title,
            value_label,
            series,
            legend,
            legend_top,
            label_end,
            left,
            top,
            tops,
            bottom,
            reference_rows,
            width,
            height,
        }
    }

    fn x(&self, value: f64) -> f64 {
        self.left + PLOT_WIDTH * self.axis.part(value)
    }

    fn paint(&self, chart: &BarChart, canvas: &Canvas<'_>) -> Drawn {
        canvas.title(&self.title)?;
        if !self.legend.is_empty() {
            canvas.legend(&self.series, &self.legend, (self.left, self.legend_top))?;
        }
        for (value, text) in self.axis.ticks() {
            let x = self.x(value);
            canvas.line((x, self.top), (x, self.bottom), GRID, 1)?;
            canvas.text(&text, (x, self.bottom + 12.0), Align::Centre, SMALL, FAINT_INK)?;
        }
        for (row, text) in self.value_label.iter().enumerate() {
            let at = (self.left + PLOT_WIDTH / 2.0, self.bottom + 33.0 + 17.0 * row as f64);
            canvas.text(text, at, Align::Centre, TEXT, INK)?;
        }
        for (line, row) in chart.references.iter().zip(&self.reference_rows) {
            let y = self.top - 8.0 - 15.0 * *row as f64;
            canvas.dashes((self.x(line.value), y + 7.0), (self.x(line.value), self.bottom), INK)?;
        }
        for (line, row) in chart.references.iter().zip(&self.reference_rows) {
            // on white, so that the line of a name above does not cross this one
            let (from, to) = label_span(line, self.x(line.value), self.width);
            let y = self.top - 8.0 - 15.0 * *row as f64;
            canvas.rect((from - 2.0, y - 6.0), (to + 2.0, y + 6.0), WHITE)?;
            canvas.text(&reference_text(line), (from, y), Align::Left, SMALL, INK)?;
        }
        self.paint_bars(chart, canvas)?;
        canvas.line((self.x(0.0), self.top), (self.x(0.0), self.bottom), AXIS, 1)
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
        let index = self.series.iter().position(|series| *series == bar.series).unwrap_or(0);
        let (zero, end, middle) = (self.x(0.0), self.x(bar.value), top + BAR / 2.0);
        canvas.rect((zero.min(end), top), (zero.max(end), top + BAR), series_colour(index, self.series.len()))?;
        let (low, high) = bar.interval.unwrap_or((bar.value, bar.value));
        if bar.interval.is_some() {
            canvas.line((self.x(low), middle), (self.x(high), middle), INK, 1)?;
            for whisker in [low, high] {
                canvas.line((self.x(whisker), middle - 4.0), (self.x(whisker), middle + 4.0), INK, 1)?;
            }
        }
        // the number stands beyond the bar and its whisker, on white so that grid and dashes do not cross it
        let text = short(bar.value);
        let width = text_width(&text, SMALL);
        let from =
            if bar.value < 0.0 { self.x(low.min(bar.value)) - 5.0 - width } else { self.x(high.max(bar.value)) + 5.0 };
        canvas.rect((from - 1.0, top + 1.0), (from + width, top + BAR - 1.0), WHITE)?;
        let (x, align) = if bar.value < 0.0 { (from + width, Align::Right) } else { (from, Align::Left) };
        canvas.text(&text, (x, middle), align, SMALL, INK)
    }
}

fn reference_text(line: &Reference) -> String {
    format!("{} {}", line.label, short(line.value))
}

/// From where to where a reference's name runs above its line at `x`, kept on a sheet of `width`.
fn label_span(line: &Reference, x: f64, width: f64) -> (f64, f64) {
    let long = text_width(&reference_text(line), SMALL);
    let from = (x - long / 2.0).min(width - MARGIN - long).max(MARGIN);
    (from, from + long)
}

/// The lowest row for each span in which it overlaps none before it.
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
