//! How strongly an adapter acts: factors on its output by token, block and projection, as a gate gives them.

use std::collections::BTreeSet;
use std::ops::Range;

use tch::Tensor;

use crate::error::Result;
use crate::proj::Proj;
use crate::select::Numbers;

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
    pub(crate) fn narrow(&self, rows: usize, at: &Range<usize>) -> Result<Self> {
        let tokens = self.tokens.f_narrow(0, 0, rows as i64)?.f_narrow(1, at.start as i64, at.len() as i64)?;
        Ok(Self { tokens, layers: self.layers.clone(), modules: self.modules.clone(), elsewhere: self.elsewhere })
    }
}
