//! The doses of an adapter: a gate's factors g in s · B (g ⊙ A x), by token, block and projection. Two functions
//! multiply by them: `LoraPair::scaled` (`adapter/lora.rs`), and `Acting::scale` (`model/qwen/lora_backward.rs`) in
//! passes whose gradients are computed by hand, as in training.

use std::collections::BTreeSet;
use std::ops::Range;

use tch::Tensor;

use crate::chat::select::Numbers;
use crate::error::Result;
use crate::proj::Proj;

/// Factors on the adapter's output: one per token in the chosen blocks and projections, and one for all others.
#[derive(Debug)]
pub struct Doses {
    /// The factor at each token, `[batch, pos, 1]`. Gradients flow through it.
    pub tokens: Tensor,
    /// The blocks where `tokens` holds; `None` means all.
    pub layers: Option<Numbers>,
    /// The projections where `tokens` holds; `None` means all.
    pub modules: Option<BTreeSet<Proj>>,
    /// The factor at all tokens in other blocks and projections.
    pub elsewhere: f64,
}

/// The factor on the output of one pair.
#[derive(Clone, Copy, Debug)]
pub enum Dose<'a> {
    /// One factor for all tokens.
    Uniform(f64),
    /// A factor for each token, `[batch, pos, 1]`.
    Tokens(&'a Tensor),
}

impl Doses {
    /// Doses that hold in all blocks and projections. `tokens`: `[batch, pos, 1]`.
    pub fn of_tokens(tokens: Tensor) -> Self {
        Self { tokens, layers: None, modules: None, elsewhere: 0.0 }
    }

    /// The factor on the output of a projection of a block.
    pub fn at(&self, layer: usize, proj: Proj) -> Dose<'_> {
        let in_layers = self.layers.as_ref().is_none_or(|layers| layers.contains(layer as i64));
        let in_modules = self.modules.as_ref().is_none_or(|modules| modules.contains(&proj));
        if in_layers && in_modules { Dose::Tokens(&self.tokens) } else { Dose::Uniform(self.elsewhere) }
    }

    /// The doses at some places of the flattened `[batch · pos]`: `tokens` becomes `[1, places, 1]`.
    pub(crate) fn at_places(&self, places: &Tensor) -> Result<Self> {
        let tokens = self.tokens.f_flatten(0, 1)?.f_index_select(0, places)?.f_unsqueeze(0)?;
        Ok(Self { tokens, layers: self.layers.clone(), modules: self.modules.clone(), elsewhere: self.elsewhere })
    }

    /// The doses of the first `rows` rows at the positions `at`.
    pub(crate) fn narrow(&self, rows: usize, at: &Range<usize>) -> Result<Self> {
        let tokens = self.tokens.f_narrow(0, 0, rows as i64)?.f_narrow(1, at.start as i64, at.len() as i64)?;
        Ok(Self { tokens, layers: self.layers.clone(), modules: self.modules.clone(), elsewhere: self.elsewhere })
    }
}
