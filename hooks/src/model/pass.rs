//! The adapter, its doses, the taps and the cache of one forward pass.

use tch::Tensor;

use crate::adapter::dose::{Dose, Doses};
use crate::adapter::lora::{Adapter, Dropout, LoraPair};
use crate::error::Result;
use crate::proj::Proj;
use crate::rows::kv_cache::KvCache;
use crate::taps::tap::Hooks;

/// The adapter, its doses, the taps and the cache of one forward pass. The default is the bare base model.
#[derive(Default)]
pub struct Pass<'a> {
    /// The LoRA that acts, if any.
    pub adapter: Option<&'a Adapter>,
    /// How strongly the adapter acts at each token; `None` means 1 everywhere.
    pub doses: Option<Doses>,
    /// The taps.
    pub hooks: Hooks<'a>,
    /// Keys and values of past positions, read and extended.
    pub kv_cache: Option<&'a mut KvCache>,
    /// Dropout on the adapter's input, in training only.
    pub dropout: Option<&'a mut Dropout>,
}

impl Pass<'_> {
    /// This pass limited to some places of the flattened `[batch · pos]`, without taps and cache.
    pub(crate) fn at(&mut self, places: &Tensor) -> Result<Pass<'_>> {
        let doses = self.doses.as_ref().map(|doses| doses.at_places(places)).transpose()?;
        Ok(Pass { adapter: self.adapter, doses, dropout: self.dropout.as_deref_mut(), ..Pass::default() })
    }
    /// The adapter's pair at a projection, its dose, and the pass's dropout; `None` if the adapter does not act there.
    pub(crate) fn acting(&mut self, layer: usize, proj: Proj) -> Option<(&LoraPair, Dose<'_>, Option<&mut Dropout>)> {
        let (pair, dose) = acting(self.adapter, self.doses.as_ref(), layer, proj)?;
        Some((pair, dose, self.dropout.as_deref_mut()))
    }
}

/// An adapter's pair at a projection and its dose; `None` if there is no pair or its dose is 0.
pub(super) fn acting<'a, 'd>(
    adapter: Option<&'a Adapter>,
    doses: Option<&'d Doses>,
    layer: usize,
    proj: Proj,
) -> Option<(&'a LoraPair, Dose<'d>)> {
    let pair = adapter?.pair(layer, proj)?;
    let dose = doses.map_or(Dose::Uniform(1.0), |doses| doses.at(layer, proj));
    (!matches!(dose, Dose::Uniform(0.0))).then_some((pair, dose))
}
