//! Taps read and change activations: a tap receives an activation and returns the one that the model continues with.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::hook_point::HookPoint;
use crate::profile::{self, Op};

/// Receives an activation and returns the one that the model continues with.
pub trait Tap {
    /// Receives the activation at a hook point, in the shape of that point, and returns it or another one.
    fn tap(&mut self, at: HookPoint, x: Tensor) -> Result<Tensor>;

    /// Receives, before a pass, the absolute positions of its tokens, `[1 or batch, pos]`, i64. A token's position is
    /// the same in a whole row, in the prefill and in a cached decoding step, where `x` holds that token alone.
    fn place(&mut self, _positions: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// A tap and the hook points that it is set at, for passes that are run one after another.
pub(crate) type TapAt<'a> = (&'a [HookPoint], &'a mut dyn Tap);

impl<F: FnMut(HookPoint, Tensor) -> Result<Tensor>> Tap for F {
    fn tap(&mut self, at: HookPoint, x: Tensor) -> Result<Tensor> {
        self(at, x)
    }
}

/// The taps of one forward pass, in the order in which they act.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Each tap with its points, and whether it has fired there.
    taps: Vec<(BTreeMap<HookPoint, bool>, &'a mut dyn Tap)>,
}

impl<'a> Hooks<'a> {
    /// These hooks with one more tap, which acts after those already there.
    #[must_use]
    pub fn on(mut self, points: impl IntoIterator<Item = HookPoint>, tap: &'a mut dyn Tap) -> Self {
        self.taps.push((points.into_iter().map(|point| (point, false)).collect(), tap));
        self
    }

    /// Gives the taps the positions of the pass's tokens.
    pub(crate) fn place(&mut self, positions: &Tensor) -> Result<()> {
        self.taps.iter_mut().try_for_each(|(_, tap)| tap.place(positions))
    }

    /// Whether there is no tap at all.
    pub fn is_empty(&self) -> bool {
        self.taps.is_empty()
    }

    /// Whether any tap is set at the point.
    pub fn any_at(&self, at: HookPoint) -> bool {
        self.taps.iter().any(|(points, _)| points.contains_key(&at))
    }

    /// Whether any tap is set at a point for which `such` is true.
    pub(crate) fn any(&self, such: impl Fn(HookPoint) -> bool) -> bool {
        self.taps.iter().any(|(points, _)| points.keys().any(|at| such(*at)))
    }

    /// Passes the activation through the taps at the point; without taps it is returned unchanged.
    #[inline]
    pub(crate) fn run(&mut self, at: HookPoint, x: Tensor) -> Result<Tensor> {
        if self.taps.is_empty() { Ok(x) } else { self.run_taps(at, x) }
    }

    #[cold]
    fn run_taps(&mut self, at: HookPoint, mut x: Tensor) -> Result<Tensor> {
        for (points, tap) in &mut self.taps {
            if let Some(fired) = points.get_mut(&at) {
                *fired = true;
                let _span = profile::op(Op::Taps);
                x = tap.tap(at, x)?;
            }
        }
        Ok(x)
    }

    /// An error if a tap is set at a point that the pass did not reach.
    pub(crate) fn check_fired(&self) -> Result<()> {
        let points = self.taps.iter().flat_map(|(points, _)| points);
        let silent: Vec<String> = points.filter(|(_, fired)| !**fired).map(|(point, _)| point.to_string()).collect();
        if silent.is_empty() { Ok(()) } else { Err(Error::TapNeverFired { points: silent.join(", ") }) }
    }
}
