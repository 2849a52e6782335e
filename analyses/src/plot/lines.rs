//! Lines over layers, ranks or steps, in one panel or several on a common x axis: a colour and a marker per series,
//! intervals if they are known, a legend above.

use super::axis::Axis;
use super::canvas::{
    AXIS, Align, COLUMN, Canvas, Drawn, FAINT_INK, GRID, Head, INK, MARGIN, SMALL, TEXT, draw, room_for,
};
use super::looks::Look;
use super::text::{short, text_width};
use super::{Reference, Svg, check_value, refuse};
use crate::error::Result;

/// The scale of the x axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Linear.
    #[default]
    Linear,
    /// The logarithm to base 2, for ranks.
    Log2,
    /// The logarithm to base 10, for learning rates.
    Log10,
}

/// One point of a [`Line`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The position on the x axis.
    pub x: f64,
    /// The position on the y axis.
    pub y: f64,
    /// Low and high end of the interval at this point.
    pub interval: Option<(f64, f64)>,
}

impl Point {
    /// A point without an interval.
    pub fn new(x: f64, y: f64) -> Self {
        Self { x, y, interval: None }
    }

    /// Adds an interval from `interval.0` to `interval.1`.
    #[must_use]
    pub fn with_interval(self, interval: (f64, f64)) -> Self {
        Self { interval: Some(interval), ..self }
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

/// Several lines, each with optional intervals.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineChart {
    /// The title above the chart.
    pub title: String,
    /// The label of the x axis.
    pub x_label: String,
    /// The label of the y axis: the quantity and its unit.
    pub y_label: String,
    /// The scale of the x axis.
    pub x_scale: Scale,
    /// The lines, in the order of the legend.
    pub lines: Vec<Line>,
    /// Dashed horizontal lines.
    pub references: Vec<Reference>,
}

/// One panel of a [`PanelChart`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Panel {
    /// The label of the y axis: the quantity and its unit.
    pub y_label: String,
    /// The lines; lines of one name in several panels are one series.
    pub lines: Vec<Line>,
    /// Dashed horizontal lines.
    pub references: Vec<Reference>,
}

/// Panels above each other on a common x axis, such as an effect and, below it, its cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PanelChart {
    /// The title above the chart.
    pub title: String,
    /// The label of the x axis.
    pub x_label: String,
    /// The scale of the x axis.
    pub x_scale: Scale,
    /// The panels, from top to bottom.
    pub panels: Vec<Panel>,
}

/// The height of a panel if it is the only one, and if there are several.
const HEIGHTS: (f64, f64) = (200.0, 130.0);
/// The space between two panels, for the name of the lower one's axis.
const BETWEEN: f64 = 38.0;
/// The least width of the plot.
const PLOT_WIDTH: f64 = 220.0;
/// The largest number of places on the x axis that each get a tick, a marker and an error bar. If there are more, ticks
/// are round numbers and intervals are bands.
const SINGLE: usize = 16;
/// Largest number of points of a line with markers.
const MARKED: usize = 32;

/// Draws lines; an error if a line has no points, or if a value is not finite or not on the scale.
pub fn lines(chart: &LineChart) -> Result<Svg> {
    let LineChart { title, x_label, y_label, x_scale, lines, references } = chart.clone();
    panels(&PanelChart { title, x_label, x_scale, panels: vec![Panel { y_label, lines, references }] })
}

/// Draws panels; an error if there are none, or for the reasons of [`lines`].
pub fn panels(chart: &PanelChart) -> Result<Svg> {
    if chart.panels.is_empty() {
        return refuse(&chart.title, "there are no panels to draw");
    }
    chart.panels.iter().try_for_each(|panel| check(chart, panel))?;
    let layout = Layout::of(chart);
    draw(&chart.title, layout.width, layout.height, |canvas| layout.paint(chart, canvas))
}

fn check(chart: &PanelChart, panel: &Panel) -> Result<()> {
    if panel.lines.is_empty() {
        return refuse(&chart.title, "there are no lines to draw");
    }
    for line in &panel.lines {
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
    panel.references.iter().try_for_each(|line| check_value(&chart.title, &line.label, line.value, None))
}

impl Scale {
    /// A value's place on the scale: the value or its logarithm.
    fn of(self, x: f64) -> f64 {
        match self {
            Self::Linear => x,
            Self::Log2 => x.log2(),
            Self::Log10 => x.log10(),
        }
    }

    /// The ticks, each with its text: at `xs` if they are few, else at round values along the axis.
    fn ticks(self, xs: &[f64], axis: &Axis) -> Vec<(f64, String)> {
        if xs.len() <= SINGLE {
            return xs.iter().map(|&x| (self.of(x), short(x))).collect();
        }
        let base = match self {
            Self::Linear => return axis.ticks(),
            Self::Log2 => 2_f64,
            Self::Log10 => 10.0,
        };
        axis.ticks().into_iter().map(|(place, _)| (place, short(base.powf(place)))).collect()
    }
}

/// The positions of all elements, in pixels.
struct Layout {
    x_axis: Axis,
    x_ticks: Vec<(f64, String)>,
    head: Head,
    /// Whether each point has an error bar, with the series slightly apart; otherwise intervals are bands.
    single: bool,
    left: f64,
    right: f64,
    frames: Vec<Frame>,
    width: f64,
    height: f64,
}

/// One panel's place and y axis.
struct Frame {
    axis: Axis,
    top: f64,
    bottom: f64,
}

impl Frame {
    fn y(&self, value: f64) -> f64 {
        self.bottom - (self.bottom - self.top) * self.axis.part(value)
    }
}

impl Layout {
    fn of(chart: &PanelChart) -> Self {
        let all_lines = || chart.panels.iter().flat_map(|panel| &panel.lines);
        let mut xs: Vec<f64> = all_lines().flat_map(|line| &line.points).map(|point| point.x).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        let places: Vec<f64> = xs.iter().map(|&x| chart.x_scale.of(x)).collect();
        let whole = chart.x_scale != Scale::Linear || places.iter().all(|x| x.fract() == 0.0);
        let mut x_axis = Axis::around(places.iter().copied(), 6.0, whole);
        // the axis ends where the data ends, so no empty space follows the last layer
        x_axis.end_at(places[0], places[places.len() - 1]);

        let several = chart.panels.len() > 1;
        let axes: Vec<Axis> = chart.panels.iter().map(|panel| y_axis(panel, if several { 4.0 } else { 5.0 })).collect();
        let widest =
            |texts: &mut dyn Iterator<Item = String>| texts.map(|text| text_width(&text, SMALL)).fold(0.0, f64::max);
        let left = MARGIN + widest(&mut axes.iter().flat_map(Axis::ticks).map(|(_, text)| text)) + 7.0;
        let after = room_for(chart.panels.iter().flat_map(|panel| &panel.references));
        let width = COLUMN.max(left + PLOT_WIDTH + after);

        let head = Head::of(&chart.title, all_lines().map(|line| &line.label), width, true);
        let panel_height = if several { HEIGHTS.1 } else { HEIGHTS.0 };
        let mut top = head.bottom + 26.0;
        let mut frames = Vec::new();
        for axis in axes {
            frames.push(Frame { axis, top, bottom: top + panel_height });
            top += panel_height + BETWEEN;
        }
        let height = top - BETWEEN + 46.0;
        let x_ticks = chart.x_scale.ticks(&xs, &x_axis);
        let single = xs.len() <= SINGLE;
        let right = width - after;
        Self { x_axis, x_ticks, head, single, left, right, frames, width, height }
    }

    fn x(&self, place: f64) -> f64 {
        // a little room so that the first and last markers do not sit on the edge
        self.left + 12.0 + (self.right - self.left - 24.0) * self.x_axis.part(place)
    }

    fn paint(&self, chart: &PanelChart, canvas: &Canvas<'_>) -> Drawn {
        canvas.head(&self.head)?;
        for (panel, frame) in chart.panels.iter().zip(&self.frames) {
            self.paint_panel(chart.x_scale, panel, frame, canvas)?;
        }
        let bottom = self.frames.last().map_or(0.0, |frame| frame.bottom);
        let mut free = 0.0;
        for (place, text) in &self.x_ticks {
            let (x, half) = (self.x(*place), text_width(text, SMALL) / 2.0);
            // if ticks are too close for their numbers, a number is left out
            if x - half >= free {
                canvas.text(text, (x, bottom + 13.0), Align::Centre, SMALL, FAINT_INK)?;
                free = x + half + 2.0;
            }
        }
        let middle = f64::midpoint(self.left, self.right);
        canvas.text(&chart.x_label, (middle, bottom + 32.0), Align::Centre, TEXT, INK)
    }

    fn paint_panel(&self, scale: Scale, panel: &Panel, frame: &Frame, canvas: &Canvas<'_>) -> Drawn {
        canvas.text(&panel.y_label, (MARGIN, frame.top - 14.0), Align::Left, TEXT, INK)?;
        for (value, text) in frame.axis.ticks() {
            let colour = if value == 0.0 { AXIS } else { GRID };
            canvas.line((self.left, frame.y(value)), (self.right, frame.y(value)), colour, 1.0)?;
            canvas.text(&text, (self.left - 6.0, frame.y(value)), Align::Right, SMALL, FAINT_INK)?;
        }
        canvas.line((self.left, frame.bottom), (self.right, frame.bottom), AXIS, 1.0)?;
        for (place, _) in &self.x_ticks {
            let x = self.x(*place);
            canvas.line((x, frame.bottom), (x, frame.bottom + 4.0), AXIS, 1.0)?;
        }
        let (sides, ends) = ((self.left, self.right), (frame.top, frame.bottom));
        canvas.references(&panel.references, sides, ends, &|value| frame.y(value))?;

        let with_interval = |line: &Line| line.points.iter().any(|point| point.interval.is_some());
        let crowd = if self.single { panel.lines.iter().filter(|line| with_interval(line)).count() } else { 0 };
        let mut drawn = Vec::new();
        for (index, line) in panel.lines.iter().enumerate() {
            let Some(look) = self.head.look(&line.label) else { continue };
            // error bars of several series would hide each other
            let aside = if crowd > 1 { 4.0 * (index as f64 - (panel.lines.len() as f64 - 1.0) / 2.0) } else { 0.0 };
            let x = |point: &Point| self.x(scale.of(point.x)) + aside;
            if self.single {
                for point in &line.points {
                    if let Some((low, high)) = point.interval {
                        canvas.whiskers((x(point), frame.y(low)), (x(point), frame.y(high)), 2.5, look.colour)?;
                    }
                }
            } else {
                paint_band(line, look, &x, frame, canvas)?;
            }
            drawn.push((look, line.points.iter().map(|point| (x(point), frame.y(point.y))).collect::<Vec<_>>()));
        }
        for (look, places) in drawn {
            canvas.stroke(&places, look)?;
            if places.len() <= MARKED {
                places.iter().try_for_each(|&place| canvas.marker(place, look.marker, look.colour))?;
            }
        }
        Ok(())
    }
}

fn y_axis(panel: &Panel, count: f64) -> Axis {
    let ys = panel.lines.iter().flat_map(|line| &line.points).flat_map(|point| {
        let (low, high) = point.interval.unwrap_or((point.y, point.y));
        [low, high, point.y]
    });
    let ys: Vec<f64> = ys.chain(panel.references.iter().map(|line| line.value)).collect();
    let (low, high) = ys.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &y| (l.min(y), h.max(y)));
    // the axis includes zero unless all lines are far from it
    let zero = (low > 0.0 && low < 0.6 * high) || (high < 0.0 && high > 0.6 * low);
    Axis::around(ys.iter().copied().chain(zero.then_some(0.0)), count, false)
}

/// Paints the area between the intervals' ends, over each stretch of neighbouring points with intervals.
fn paint_band(line: &Line, look: Look, x: &dyn Fn(&Point) -> f64, frame: &Frame, canvas: &Canvas<'_>) -> Drawn {
    for stretch in line.points.split(|point| point.interval.is_none()) {
        let edge = |pick: fn((f64, f64)) -> f64| {
            stretch.iter().filter_map(|point| Some((x(point), frame.y(pick(point.interval?))))).collect::<Vec<_>>()
        };
        let (lower, upper) = (edge(|interval| interval.0), edge(|interval| interval.1));
        // a single point has no area and gets an error bar
        if let ([low], [high]) = (&lower[..], &upper[..]) {
            canvas.whiskers(*low, *high, 2.5, look.colour)?;
        } else if !lower.is_empty() {
            let outline: Vec<_> = lower.into_iter().chain(upper.into_iter().rev()).collect();
            canvas.band(&outline, look.colour)?;
        }
    }
    Ok(())
}
