//! An adapter and its base's weights: loading with a check against them, merging, and extraction from the difference of
//! two models.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::adapter::lora::{Adapter, LoraConfig, LoraPair};
use crate::error::{Error, Result};
use crate::load::weights::Weights;
use crate::model::qwen::Qwen;
use crate::ops::wide;
use crate::proj::Proj;

impl Adapter {
    /// Reads an adapter for this base. Unlike [`Self::load`], accepts embeddings or a head saved with the LoRA if they
    /// equal the base's, with a remark.
    pub fn load_on(dir: &Path, base: &Qwen) -> Result<Self> {
        Self::read(dir, &base.config, base.device(), Some(&by_name(base)))
    }

    /// An adapter of the base that approximates full finetuning: the first `rank` singular directions of each
    /// projection's ΔW = W' − W (Eckart and Young 1936: no matrix of that rank is nearer). Changes of embeddings, norms
    /// and biases are left out. Models of two architectures are an error.
    pub fn of_difference(tuned: &Qwen, base: &Qwen, rank: i64) -> Result<Self> {
        if tuned.config != base.config || rank < 1 {
            return Err(Error::invalid(
                "the difference of two models",
                "one architecture, and a rank of at least 1",
                format!("{:?} and {:?}, rank {rank}", tuned.config, base.config),
            ));
        }
        let config = LoraConfig { rank, alpha: rank as f64, ..LoraConfig::default() };
        let mut cut = Self::empty(config, base.config.n_layers);
        let [after, before] = [tuned, base].map(by_name);
        tch::no_grad(|| {
            for (layer, proj) in (0..base.config.n_layers).flat_map(|layer| Proj::ALL.map(|proj| (layer, proj))) {
                let name = format!("model.layers.{layer}.{}.weight", proj.path());
                let (after, before) = (&after[&name], &before[&name]); // both models have all projections of this block
                let wide = wide(after.kind());
                let (u, sigma, v) = after.f_to_kind(wide)?.f_sub(&before.f_to_kind(wide)?)?.f_svd(true, true)?;
                let n = rank.min(sigma.size()[0]);
                let b = u.f_narrow(1, 0, n)?.f_mul(&sigma.f_narrow(0, 0, n)?)?;
                let a = v.f_narrow(1, 0, n)?.f_transpose(0, 1)?.f_contiguous()?;
                cut.set(layer, proj, LoraPair { a, b, scaling: 1.0, scalings: None });
            }
            Ok(cut)
        })
    }
}

impl Qwen {
    /// A new model with an adapter's weight changes added to this one's, W + s·B·A, as PEFT's `merge_and_unload` does.
    pub fn merged(&self, adapter: &Adapter) -> Result<Self> {
        let mut merged = by_name(self);
        for (layer, proj, pair) in adapter.pairs() {
            let name = format!("model.layers.{layer}.{}.weight", proj.path());
            let missing = || Error::MissingTensor { name: name.clone(), file: "the model".to_owned() };
            let weight = merged.get_mut(&name).ok_or_else(missing)?;
            let delta = pair.delta_weight()?.f_detach()?;
            *weight = weight.f_to_kind(wide(weight.kind()))?.f_add(&delta)?.f_to_kind(weight.kind())?;
        }
        let root = Weights::from_tensors("merged", merged);
        Self::of_weights(&self.config, &root, self.device(), self.kind())
    }
}

fn by_name(model: &Qwen) -> BTreeMap<String, Tensor> {
    model.parameters().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::adapter::spectrum::tests::{adapter, apart};
    use crate::load::model_files::ModelFiles;

    /// The difference of a merged model and its base, cut to the adapter's rank, is the adapter; cut to less, it is the
    /// adapter's strongest part.
    #[test]
    fn a_merged_adapter_is_found_again() {
        let files = ModelFiles::open("tiny-random").unwrap();
        let [base, tuned] = [(); 2].map(|()| Qwen::load(&files, Device::Cpu, Kind::Double).unwrap());
        let whole = adapter(4);
        let weights = by_name(&tuned);
        for (layer, proj, pair) in whole.pairs() {
            let weight = &weights[&format!("model.layers.{layer}.{}.weight", proj.path())];
            let _ = weight.shallow_clone().g_add_(&pair.delta_weight().unwrap());
        }
        for (rank, part) in [(4, whole.of_directions(0..4).unwrap()), (2, whole.of_directions(0..2).unwrap())] {
            let found = Adapter::of_difference(&tuned, &base, rank).unwrap();
            assert_eq!(found.pairs().count(), whole.pairs().count());
            for (layer, proj, pair) in part.pairs() {
                let cut = found.pair(layer, proj).unwrap().delta_weight().unwrap();
                let expected = pair.delta_weight().unwrap();
                assert!(apart(&cut, &expected) < 1e-5 * (1.0 + expected.abs().max().double_value(&[])), "rank {rank}");
            }
        }
        let error = Adapter::of_difference(&tuned, &base, 0).unwrap_err().to_string();
        assert!(error.contains("a rank of at least 1"), "{error}");
    }
}
