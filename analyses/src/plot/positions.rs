//! A bar per position of a prompt, with the tokens as tick labels. The sheet is as wide as the text needs, so mostly
//! wider than a column.

use super::axis::Axis;
use super::canvas::{
    AXIS, Align, COLUMN, Canvas, Drawn, FAINT_INK, GRID, Head, INK, MARGIN, SMALL, TEXT, draw, room_for,
};
use super::text::{text_width, visible};
use super::{Reference, Svg, check_value, refuse};
use crate::error::Result;

/// One token of a [`PositionChart`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Position {
    /// The token's text. In the chart, blanks and line ends are made visible.
    pub token: String,
    /// The token's class, which gives the bar its colour.
    pub class: String,
    /// The bar's height.
    pub value: f64,
    /// Low and high end of the error bar.
    pub interval: Option<(f64, f64)>,
    /// A second value, drawn as a ring.
    pub ring: Option<f64>,
}

/// Upright bars from zero along the tokens of a prompt, coloured by class.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PositionChart {
    /// The title above the chart.
    pub title: String,
    /// The label of the x axis, under the tokens.
    pub x_label: String,
    /// The quantity of the bars, with its unit.
    pub value_label: String,
    /// The tokens in their order.
    pub positions: Vec<Position>,
    /// Dashed horizontal lines.
    pub references: Vec<Reference>,
}

/// The distance from one token to the next: the height of its rotated text.
const PITCH: f64 = 15.0;
const BAR: f64 = 10.0;
const HEIGHT: f64 = 170.0;

/// Draws the bars; an error if there are none or if a value is not finite.
pub fn positions(chart: &PositionChart) -> Result<Svg> {
    if chart.positions.is_empty() {
        return refuse(&chart.title, "there are no positions to draw");
    }
    for (index, position) in chart.positions.iter().enumerate() {
        let at = format!("position {index} ({:?})", position.token);
        check_value(&chart.title, &at, position.value, position.interval)?;
        check_value(&chart.title, &at, position.ring.unwrap_or_default(), None)?;
    }
    chart.references.iter().try_for_each(|line| check_value(&chart.title, &line.label, line.value, None))?;
    let layout = Layout::of(chart);
    draw(&chart.title, layout.width, layout.height, |canvas| layout.paint(chart, canvas))
}

/// The positions of all elements, in pixels.
struct Layout {
    axis: Axis,
    head: Head,
    left: f64,
    right: f64,
    pitch: f64,
    top: f64,
    bottom: f64,
    tokens_height: f64,
    width: f64,
    height: f64,
}

impl Layout {
    fn of(chart: &PositionChart) -> Self {
        let ends = chart.positions.iter().flat_map(|position| {
            let (low, high) = position.interval.unwrap_or((position.value, position.value));
            [low, high, position.value, position.ring.unwrap_or(position.value)]
        });
        let axis = Axis::around(ends.chain(chart.references.iter().map(|line| line.value)).chain([0.0]), 4.0, false);
        let widest =
            |texts: &mut dyn Iterator<Item = String>| texts.map(|text| text_width(&text, SMALL)).fold(0.0, f64::max);
        let left = MARGIN + widest(&mut axis.ticks().into_iter().map(|(_, text)| text)) + 7.0;
        let after = room_for(chart.references.iter());
        let count = chart.positions.len() as f64;
        let width = COLUMN.max(left + PITCH * count + after);
        let (right, pitch) = (width - after, (width - after - left) / count);

        let head = Head::of(&chart.title, chart.positions.iter().map(|position| &position.class), width, false);
        let top = head.bottom + 26.0;
        let bottom = top + HEIGHT;
        let tokens_height = widest(&mut chart.positions.iter().map(|position| visible(&position.token))) + 8.0;
        let height = bottom + tokens_height + if chart.x_label.is_empty() { MARGIN } else { 28.0 };
        Self { axis, head, left, right, pitch, top, bottom, tokens_height, width, height }
    }

    fn y(&self, value: f64) -> f64 {
        self.bottom - HEIGHT * self.axis.part(value)
    }

    fn paint(&self, chart: &PositionChart, canvas: &Canvas<'_>) -> Drawn {
        canvas.head(&self.head)?;
        canvas.text(&chart.value_label, (MARGIN, self.top - 14.0), Align::Left, TEXT, INK)?;
        for (value, text) in self.axis.ticks() {
            canvas.line((self.left, self.y(value)), (self.right, self.y(value)), GRID, 1.0)?;
            canvas.text(&text, (self.left - 6.0, self.y(value)), Align::Right, SMALL, FAINT_INK)?;
        }
        let (sides, ends) = ((self.left, self.right), (self.top, self.bottom));
        canvas.references(&chart.references, sides, ends, &|value| self.y(value))?;
        let half = (self.pitch * BAR / PITCH).min(2.0 * BAR) / 2.0;
        for (index, position) in chart.positions.iter().enumerate() {
            let x = self.left + self.pitch * (index as f64 + 0.5);
            let (zero, end) = (self.y(0.0), self.y(position.value));
            if let Some(look) = self.head.look(&position.class) {
                canvas.rect((x - half, zero.min(end)), (x + half, zero.max(end)), look.fill())?;
            }
            if let Some((low, high)) = position.interval {
                canvas.whiskers((x, self.y(low)), (x, self.y(high)), 2.5, INK)?;
            }
            if let Some(ring) = position.ring {
                canvas.ring((x, self.y(ring)))?;
            }
            canvas.text(&visible(&position.token), (x, self.bottom + 5.0), Align::UpEnd, SMALL, INK)?;
        }
        canvas.line((self.left, self.y(0.0)), (self.right, self.y(0.0)), AXIS, 1.0)?;
        let below = (f64::midpoint(self.left, self.right), self.bottom + self.tokens_height + 10.0);
        canvas.text(&chart.x_label, below, Align::Centre, TEXT, INK)
    }
}
