//! Draws charts as SVG: bars with intervals, lines in one panel or several, heat maps, bars along the tokens of a
//! prompt. A chart is a plain value. Drawing it is an error if it has no bars or a value that is not finite, so no
//! panel is empty. All charts have one style: as wide as a journal's column, with colours by the kind of series
//! (`looks.rs`). Text stays text, in the reader's own sans-serif font; its width is estimated from the mean width of a
//! character.

mod axis;
mod bars;
mod canvas;
mod heatmap;
mod lines;
mod looks;
mod positions;
mod text;

pub use bars::{Bar, BarChart, bars};
pub use heatmap::{HeatMap, heatmap};
pub use lines::{Line, LineChart, Panel, PanelChart, Point, Scale, lines, panels};
pub(crate) use text::visible;

pub use positions::{Position, PositionChart, positions};

use crate::error::{Error, Result};

/// A drawing as SVG text: white background, `viewBox` set, so that it scales.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Svg(pub String);

/// A dashed line across the chart at one value, e.g. the base's rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// The name at the line's end, such as "base" or "student".
    pub label: String,
    /// Its value on the axis.
    pub value: f64,
}

impl Reference {
    /// A dashed line called `label` at `value`.
    pub fn new(label: impl Into<String>, value: f64) -> Self {
        Self { label: label.into(), value }
    }
}

/// The error for a chart, with its title and the problem.
fn refuse<T>(title: &str, problem: impl Into<String>) -> Result<T> {
    Err(Error::Plot { title: title.to_owned(), problem: problem.into() })
}

/// Accepts a value with its interval if all numbers are finite and the interval is the right way round.
fn check_value(title: &str, at: &str, value: f64, interval: Option<(f64, f64)>) -> Result<()> {
    let (low, high) = interval.unwrap_or((value, value));
    if !(value.is_finite() && low.is_finite() && high.is_finite()) {
        return refuse(
            title,
            format!("the value at {at} is {value} with interval {low} to {high}, expected finite numbers"),
        );
    }
    if low > high {
        return refuse(title, format!("the interval at {at} runs from {low} down to {high}, expected low before high"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
