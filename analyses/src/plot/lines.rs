//! Lines over layers, ranks, steps: one colour per series, a band where an interval is known, a legend above.

use super::canvas::{
    AXIS, Align, Axis, Canvas, Drawn, FAINT_INK, GRID, INK, MARGIN, SMALL, TEXT, TITLE, draw, legend_places,
    series_colour, short, spread, text_width, wrap,
};
use super::{Reference, Svg, check_value, refuse};
use crate::error::Result;

/// How a value is laid along the x axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// By its logarithm to base 2, with a tick at each power of two: ranks.
    Log2,
    /// By its logarithm to base 10, with a tick at each power of ten: learning rates.
    Log10,
}

/// One point of a [`Line`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Where it stands.
    pub x: f64,
    /// How high.
    pub y: f64,
    /// Low and high end of the band at this point.
    pub interval: Option<(f64, f64)>,
}

impl Point {
    /// A point without a band.
    pub fn new(x: f64, y: f64) -> Self {
        Self { x, y, interval: None }
    }
}

/// One series of a [`LineChart`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Line {
    /// Its name in the legend.
    pub label: String,
    /// Its points, in rising x.
    pub points: Vec<Point>,
}

/// Several lines, each with an optional band.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineChart {
    /// The title above the chart.
    pub title: String,
    /// What runs along the x axis.
    pub x_label: String,
    /// What the lines measure.
    pub y_label: String,
    /// How x is laid out.
    pub x_scale: Scale,
    /// The lines, in the order of the legend.
    pub lines: Vec<Line>,
    /// Dashed horizontal lines.
    pub references: Vec<Reference>,
}

const PLOT: (f64, f64) = (560.0, 300.0);
/// Above so many points a line is drawn without dots.
const DOTTED: usize = 64;

/// Draws lines; an error if a line has no points, or if a value is not finite or not on the scale.
pub fn lines(chart: &LineChart) -> Result<Svg> {
    check(chart)?;
    let layout = Layout::of(chart);
    draw(&chart.title, layout.width, layout.bottom + 46.0, |canvas| layout.paint(chart, canvas))
}

fn check(chart: &LineChart) -> Result<()> {
    if chart.lines.is_empty() {
        return refuse(&chart.title, "there are no lines to draw");
    }
    for line in &chart.lines {
        if line.points.is_empty() {
            return refuse(&chart.title, format!("line {:?} has no points", line.label));
        }
        for point in &line.points {
            let at = format!("{} of {:?}", point.x, line.label);
            check_value(&chart.title, &at, point.y, point.interval)?;
            if !chart.x_scale.of(point.x).is_finite() {
                return refuse(
                    &chart.title,
                    format!("x is {at}, expected a finite number, above zero on a logarithmic scale"),
                );
            }
        }
        if let Some(pair) = line.points.windows(2).find(|pair| pair[0].x > pair[1].x) {
            return refuse(
                &chart.title,
                format!("line {:?} goes back from x {} to {}", line.label, pair[0].x, pair[1].x),
            );
        }
    }
    chart.references.iter().try_for_each(|line| check_value(&chart.title, &line.label, line.value, None))
}

impl Scale {
    /// Where a value lies on the scale: itself or its logarithm.
    fn of(self, x: f64) -> f64 {
        match self {
            Self::Linear => x,
            Self::Log2 => x.log2(),
            Self::Log10 => x.log10(),
        }
    }

    /// The axis' ticks, written as values of x.
    fn ticks(self, axis: &Axis) -> Vec<(f64, String)> {
        let base = match self {
            Self::Linear => return axis.ticks(),
            Self::Log2 => 2_f64,
            Self::Log10 => 10.0,
        };
        axis.ticks().into_iter().map(|(place, _)| (place, short(base.powf(place)))).collect()
    }
}

/// Where everything stands, in pixels.
struct Layout {
    x_axis: Axis,
    y_axis: Axis,
    title: Vec<String>,
    names: Vec<String>,
    legend: Vec<(f64, f64)>,
    legend_top: f64,
    left: f64,
    top: f64,
    bottom: f64,
    width: f64,
}

impl Layout {
    fn of(chart: &LineChart) -> Self {
        let points = || chart.lines.iter().flat_map(|line| &line.points);
        let xs = || points().map(|point| chart.x_scale.of(point.x));
        let whole = chart.x_scale != Scale::Linear || xs().all(|x| x.fract() == 0.0);
        let mut x_axis = Axis::around(xs(), if chart.x_scale == Scale::Linear { 8.0 } else { 12.0 }, whole);
        if chart.x_scale == Scale::Linear {
            // no empty stretch behind the last layer: the axis ends where the data ends
            let (low, high) = xs().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
            x_axis.end_at(low, high);
        }
        let ys = points().flat_map(|point| {
            let (low, high) = point.interval.unwrap_or((point.y, point.y));
            [low, high, point.y]
        });
        let ys: Vec<f64> = ys.chain(chart.references.iter().map(|line| line.value)).collect();
        let (low, high) = ys.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &y| (l.min(y), h.max(y)));
        // zero belongs on the axis unless the lines live far from it
        let zero = (low > 0.0 && low < 0.6 * high) || (high < 0.0 && high > 0.6 * low);
        let y_axis = Axis::around(ys.iter().copied().chain(zero.then_some(0.0)), 6.0, false);

        let widest =
            |texts: &mut dyn Iterator<Item = String>| texts.map(|text| text_width(&text, SMALL)).fold(0.0, f64::max);
        let left = MARGIN + widest(&mut y_axis.ticks().into_iter().map(|(_, text)| text)) + 8.0;
        let beside = widest(&mut chart.references.iter().map(|line| line.label.clone()));
        let width = left + PLOT.0 + if beside > 0.0 { beside + 8.0 } else { 8.0 } + MARGIN;

        let title = wrap(&chart.title, width - 2.0 * MARGIN, TITLE);
        let names: Vec<String> = chart.lines.iter().map(|line| line.label.clone()).collect();
        let shown = if names.iter().any(|name| !name.is_empty()) { &names[..] } else { &[] };
        let (legend, legend_height) = legend_places(shown, width - left - MARGIN);
        let legend_top = MARGIN + TITLE * 1.3 * title.len() as f64 + 4.0;
        let top = legend_top + legend_height + 28.0;
        Self { x_axis, y_axis, title, names, legend, legend_top, left, top, bottom: top + PLOT.1, width }
    }

    fn y(&self, value: f64) -> f64 {
        self.bottom - PLOT.1 * self.y_axis.part(value)
    }

    fn x(&self, place: f64) -> f64 {
        // a little room so that the first and last dots do not sit on the edge
        self.left + 8.0 + (PLOT.0 - 16.0) * self.x_axis.part(place)
    }

    fn paint(&self, chart: &LineChart, canvas: &Canvas<'_>) -> Drawn {
        canvas.title(&self.title)?;
        canvas.legend(&self.names, &self.legend, (self.left, self.legend_top))?;
        canvas.text(&chart.y_label, (MARGIN, self.top - 14.0), Align::Left, TEXT, FAINT_INK)?;
        let right = self.left + PLOT.0;
        for (value, text) in self.y_axis.ticks() {
            let colour = if value == 0.0 { AXIS } else { GRID };
            canvas.line((self.left, self.y(value)), (right, self.y(value)), colour, 1)?;
            canvas.text(&text, (self.left - 7.0, self.y(value)), Align::Right, SMALL, FAINT_INK)?;
        }
        for (place, text) in chart.x_scale.ticks(&self.x_axis) {
            canvas.line((self.x(place), self.bottom), (self.x(place), self.bottom + 4.0), AXIS, 1)?;
            canvas.text(&text, (self.x(place), self.bottom + 13.0), Align::Centre, SMALL, FAINT_INK)?;
        }
        canvas.text(&chart.x_label, (self.left + PLOT.0 / 2.0, self.bottom + 33.0), Align::Centre, TEXT, INK)?;

        let wishes: Vec<f64> = chart.references.iter().map(|line| self.y(line.value)).collect();
        for (line, label_y) in chart.references.iter().zip(spread(&wishes, 14.0)) {
            canvas.dashes((self.left, self.y(line.value)), (right, self.y(line.value)), INK)?;
            canvas.text(&line.label, (right + 6.0, label_y), Align::Left, SMALL, INK)?;
        }
        for (index, line) in chart.lines.iter().enumerate() {
            self.paint_band(chart, line, index, canvas)?;
        }
        for (index, line) in chart.lines.iter().enumerate() {
            let colour = series_colour(index, chart.lines.len());
            let places: Vec<_> =
                line.points.iter().map(|point| (self.x(chart.x_scale.of(point.x)), self.y(point.y))).collect();
            canvas.path(&places, colour, 2)?;
            let dots = if places.len() <= DOTTED { &places[..] } else { &[] };
            dots.iter().try_for_each(|&place| canvas.dot(place, colour))?;
        }
        Ok(())
    }

    /// The area between the interval's ends, over each stretch of neighbouring points that have one.
    fn paint_band(&self, chart: &LineChart, line: &Line, index: usize, canvas: &Canvas<'_>) -> Drawn {
        let colour = series_colour(index, chart.lines.len());
        for stretch in line.points.split(|point| point.interval.is_none()) {
            let edge = |pick: fn((f64, f64)) -> f64| {
                let place =
                    move |point: &Point| Some((self.x(chart.x_scale.of(point.x)), self.y(pick(point.interval?))));
                stretch.iter().filter_map(place).collect::<Vec<_>>()
            };
            let (lower, upper) = (edge(|interval| interval.0), edge(|interval| interval.1));
            // a lone point has no area: it gets an error bar
            if let ([low], [high]) = (&lower[..], &upper[..]) {
                canvas.line(*low, *high, colour, 1)?;
            } else if !lower.is_empty() {
                let outline: Vec<_> = lower.into_iter().chain(upper.into_iter().rev()).collect();
                canvas.band(&outline, colour)?;
            }
        }
        Ok(())
    }
}
