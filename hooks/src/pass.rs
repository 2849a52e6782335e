//! What one forward pass is run with, besides the weights.

use std::collections::BTreeSet;

use tch::Tensor;

use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::lora::{Adapter, Dropout, Proj};
use crate::select::Numbers;
use crate::tap::Hooks;

/// What one forward pass is run with, besides the weights. The default is the bare base model.
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
    /// The same for some places of the flattened `[batch · pos]` alone, without taps and cache.
    pub(crate) fn at(&mut self, places: &Tensor) -> Result<Pass<'_>> {
        let gate = self.gate.as_ref().map(|doses| doses.at_places(places)).transpose()?;
        Ok(Pass { adapter: self.adapter, gate, dropout: self.dropout.as_deref_mut(), ..Pass::default() })
    }
}

/// The factors on the adapter's output, token by token, in some blocks and projections, and one factor in all others.
#[derive(Debug)]
pub struct Doses {
    /// Per token, `[batch, pos, 1]`: gradients flow through it.
    pub tokens: Tensor,
    /// The blocks where these hold; `None` is all.
    pub layers: Option<Numbers>,
    /// The projections where these hold; `None` is all.
    pub modules: Option<BTreeSet<Proj>>,
    /// The factor in all other blocks and projections.
    pub elsewhere: f64,
}

/// The factor on the output of one pair.
#[derive(Clone, Copy, Debug)]
pub enum Dose<'a> {
    /// The same at every token.
    Uniform(f64),
    /// Token by token, `[batch, pos, 1]`.
    Tokens(&'a Tensor),
}

impl Doses {
    /// The same in all blocks and projections, `[batch, pos, 1]`.
    pub fn of_tokens(tokens: Tensor) -> Self {
        Self { tokens, layers: None, modules: None, elsewhere: 0.0 }
    }

    /// The factor at a projection of a block.
    pub fn at(&self, layer: usize, proj: Proj) -> Dose<'_> {
        let in_layers = self.layers.as_ref().is_none_or(|layers| layers.contains(layer as i64));
        let in_modules = self.modules.as_ref().is_none_or(|modules| modules.contains(&proj));
        if in_layers && in_modules { Dose::Tokens(&self.tokens) } else { Dose::Uniform(self.elsewhere) }
    }

    /// Those at some places of the flattened `[batch · pos]`, as `[1, places, 1]`.
    pub(crate) fn at_places(&self, places: &Tensor) -> Result<Self> {
        let tokens = self.tokens.f_flatten(0, 1)?.f_index_select(0, places)?.f_unsqueeze(0)?;
        Ok(Self { tokens, layers: self.layers.clone(), modules: self.modules.clone(), elsewhere: self.elsewhere })
    }

    /// Those of some positions of the first rows.
    pub(crate) fn narrow(&self, rows: usize, at: &std::ops::Range<usize>) -> Result<Self> {
        let tokens = self.tokens.f_narrow(0, 0, rows as i64)?.f_narrow(1, at.start as i64, at.len() as i64)?;
        Ok(Self { tokens, layers: self.layers.clone(), modules: self.modules.clone(), elsewhere: self.elsewhere })
    }
}
