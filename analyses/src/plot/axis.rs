//! An axis with round ticks.

use super::text::{minus, short};

/// The values from `low` to `high` with round ticks.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) high: f64,
    step: f64,
}

impl Axis {
    /// An axis around all of `values` that begins and ends at ticks, of which there are about `count`. With `whole`,
    /// ticks are whole numbers.
    pub(super) fn around(values: impl Iterator<Item = f64>, count: f64, whole: bool) -> Self {
        let (mut low, mut high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if high - low <= 1e-12 * high.abs().max(low.abs()) {
            // all values are equal: room above if they are zero, else on both sides
            let room = if high == 0.0 { 1.0 } else { high.abs() * 0.1 };
            (low, high) = if high == 0.0 { (0.0, room) } else { (low - room, high + room) };
        }
        let step = round_step((high - low) / count);
        let step = if whole { step.max(1.0).round() } else { step };
        Self { low: (low / step + 1e-9).floor() * step, high: (high / step - 1e-9).ceil() * step, step }
    }

    /// Sets the axis' ends to those of the data. Ticks between them stay.
    pub(super) fn end_at(&mut self, low: f64, high: f64) {
        if low < high {
            (self.low, self.high) = (low, high);
        }
    }

    /// A value's place along the axis, 0 to 1.
    pub(super) fn part(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let (first, last) = ((self.low / self.step - 1e-9).ceil(), (self.high / self.step + 1e-9).floor());
        // the decimals that write the step exactly: 0.25 needs two
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
