//! A tap that only reads.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::hook_point::HookPoint;
use crate::taps::tap::Tap;

/// Keeps activations without copying them, with their graph if gradients flow.
#[derive(Default, Debug)]
pub struct Cache {
    seen: BTreeMap<HookPoint, Tensor>,
}

impl Cache {
    /// The activation at a point, in the shape of the hook point.
    pub fn get(&self, at: HookPoint) -> Result<&Tensor> {
        self.seen.get(&at).ok_or_else(|| Error::NotCaptured {
            point: at.to_string(),
            captured: self.seen.keys().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        })
    }

    /// All captured activations, in the order of the hook points.
    pub fn iter(&self) -> impl Iterator<Item = (HookPoint, &Tensor)> {
        self.seen.iter().map(|(point, tensor)| (*point, tensor))
    }
}

impl Tap for Cache {
    fn tap(&mut self, at: HookPoint, x: Tensor) -> Result<Tensor> {
        self.seen.insert(at, x.shallow_clone());
        Ok(x)
    }
}
