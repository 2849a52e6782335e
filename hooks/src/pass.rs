//! What one forward pass is run with, besides the weights.

use tch::Tensor;

use crate::kv_cache::KvCache;
use crate::lora::{Adapter, Dropout};
use crate::tap::Hooks;

/// What one forward pass is run with, besides the weights. The default is the bare base model.
#[derive(Default)]
pub struct Pass<'a> {
    /// The LoRA that acts, if any.
    pub adapter: Option<&'a Adapter>,
    /// How strongly the adapter acts at each token, `[batch, pos, 1]` in f32; `None` means 1 everywhere.
    pub gate: Option<Tensor>,
    /// The taps.
    pub hooks: Hooks<'a>,
    /// Keys and values of past positions, read and extended.
    pub kv_cache: Option<&'a mut KvCache>,
    /// Dropout on the adapter's input, in training only.
    pub dropout: Option<&'a mut Dropout>,
}
