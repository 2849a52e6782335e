//! The adapter, gate, taps and cache of one forward pass.

use tch::Tensor;

use crate::dose::Doses;
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::lora::{Adapter, Dropout};
use crate::tap::Hooks;

/// The adapter, gate, taps and cache of one forward pass. The default is the bare base model.
#[derive(Default)]
pub struct Pass<'a> {
    /// The LoRA that acts, if any.
    pub adapter: Option<&'a Adapter>,
    /// How strongly the adapter acts at each token; `None` means 1 everywhere.
    pub gate: Option<Doses>,
    /// The taps.
    pub hooks: Hooks<'a>,
    /// Keys and values of past positions, read and extended.
    pub kv_cache: Option<&'a mut KvCache>,
    /// Dropout on the adapter's input, in training only.
    pub dropout: Option<&'a mut Dropout>,
}

impl Pass<'_> {
    /// This pass at some places of the flattened `[batch · pos]`, without taps and cache.
    pub(crate) fn at(&mut self, places: &Tensor) -> Result<Pass<'_>> {
        let gate = self.gate.as_ref().map(|doses| doses.at_places(places)).transpose()?;
        Ok(Pass { adapter: self.adapter, gate, dropout: self.dropout.as_deref_mut(), ..Pass::default() })
    }
}
