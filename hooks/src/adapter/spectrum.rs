//! The singular values of an adapter's change of each weight, and adapters made of some of its singular directions,
//! which show the effect of each part of a learned change. ΔW = s·B·A = U Σ Vᵀ, by thin QR of B and of Aᵀ and an SVD of
//! the small core between them.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::adapter::lora::{Adapter, LoraPair, no_stack};
use crate::error::Result;
use crate::proj::Proj;

/// The singular values of one pair's weight change.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    /// The block.
    pub layer: usize,
    /// The projection.
    pub proj: Proj,
    /// σ, falling; at most as many as the rank.
    pub sigma: Vec<f64>,
}

impl Spectrum {
    /// The stable rank ‖ΔW‖_F² / ‖ΔW‖₂²: the number of equally strong directions that the change amounts to; 0 if there
    /// is no change.
    pub fn stable_rank(&self) -> f64 {
        let squares = self.sigma.iter().map(|sigma| sigma * sigma).sum::<f64>();
        self.sigma.first().filter(|sigma| **sigma > 0.0).map_or(0.0, |largest| squares / (largest * largest))
    }
}

impl Adapter {
    /// The spectrum of each pair, block by block. A stack is refused.
    pub fn spectra(&self) -> Result<Vec<Spectrum>> {
        let of = |(layer, proj, pair): (usize, Proj, &LoraPair)| {
            let (_, sigma, _) = decomposed(pair)?;
            Ok(Spectrum { layer, proj, sigma: Vec::try_from(sigma)? })
        };
        self.pairs().map(of).collect()
    }

    /// An adapter made of the singular directions `keep` of each pair, counted from 0 by falling σ: `0..1` is the
    /// strongest, `1..` all others.
    pub fn of_directions(&self, keep: Range<usize>) -> Result<Self> {
        let mut part = Self::empty(self.config.clone(), self.n_layers());
        let mut most = 1;
        for (layer, proj, pair) in self.pairs() {
            let (left, sigma, right) = decomposed(pair)?;
            let n = sigma.size()[0];
            let (from, end) = ((keep.start as i64).min(n), (keep.end.min(n as usize) as i64).max(0));
            let length = (end - from).max(0);
            most = most.max(length);
            let sigma = sigma.f_narrow(0, from, length)?.f_div_scalar(pair.scaling)?;
            let kind = pair.b.kind();
            let b = left.f_narrow(1, from, length)?.f_mul(&sigma)?.f_to_kind(kind)?;
            let a = right.f_narrow(1, from, length)?.f_transpose(0, 1)?.f_contiguous()?.f_to_kind(kind)?;
            part.set(layer, proj, LoraPair { a, b, scaling: pair.scaling, scalings: None });
        }
        part.config.rank = most;
        Ok(part)
    }
}

/// U `[d_out, n]`, σ `[n]` and V `[d_in, n]` of s·B·A in f64.
fn decomposed(pair: &LoraPair) -> Result<(Tensor, Tensor, Tensor)> {
    if let Some(n) = pair.n_stacked() {
        return Err(no_stack("one spectrum", n));
    }
    tch::no_grad(|| {
        let wide = |tensor: &Tensor| tensor.f_to_kind(Kind::Double);
        let (of_b, core_b) = Tensor::f_linalg_qr(&wide(&pair.b)?, "reduced")?;
        let (of_a, core_a) = Tensor::f_linalg_qr(&wide(&pair.a)?.f_transpose(0, 1)?, "reduced")?;
        let core = core_b.f_matmul(&core_a.f_transpose(0, 1)?)?.f_mul_scalar(pair.scaling)?;
        let (u, sigma, v) = core.f_svd(true, true)?;
        Ok((of_b.f_matmul(&u)?, sigma, of_a.f_matmul(&v)?))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use tch::Device;

    use super::*;
    use crate::adapter::lora::LoraConfig;
    use crate::load::model_files::ModelFiles;

    pub(crate) fn adapter(rank: i64) -> Adapter {
        let files = ModelFiles::open("tiny-random").unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let config = LoraConfig { rank, alpha: 3.0, ..LoraConfig::default() };
        let adapter = Adapter::init(&config, &files.config, &mut rng, Device::Cpu).unwrap();
        for (_, _, pair) in adapter.pairs() {
            let values: Vec<f32> = (0..pair.b.numel()).map(|_| rng.random_range(-0.5..0.5)).collect();
            pair.b.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(&pair.b));
        }
        adapter
    }

    pub(crate) fn apart(left: &Tensor, right: &Tensor) -> f64 {
        (left - right).abs().max().double_value(&[])
    }

    #[test]
    fn the_strongest_directions_and_the_rest_add_up() {
        for rank in [1, 4, 40] {
            let whole = adapter(rank);
            let (top, rest) = (whole.of_directions(0..1).unwrap(), whole.of_directions(1..usize::MAX).unwrap());
            for (layer, proj, pair) in whole.pairs() {
                let delta = |adapter: &Adapter| adapter.pair(layer, proj).unwrap().delta_weight().unwrap();
                let all = pair.delta_weight().unwrap();
                let sum = if rank == 1 { delta(&top) } else { delta(&top) + delta(&rest) };
                assert!(apart(&sum, &all) < 1e-5, "rank {rank}");
                // Compared with the SVD of the whole change.
                let (_, sigma, _) = all.to_kind(Kind::Double).svd(true, true);
                let found =
                    &whole.spectra().unwrap().into_iter().find(|one| one.layer == layer && one.proj == proj).unwrap();
                let largest = sigma.double_value(&[0]);
                for (at, found) in found.sigma.iter().enumerate() {
                    assert!((found - sigma.double_value(&[at as i64])).abs() < 1e-5 * largest);
                }
                assert!((delta(&top).to_kind(Kind::Double).norm().double_value(&[]) - largest).abs() < 1e-4 * largest);
            }
        }
    }

    #[test]
    fn a_stable_rank_is_between_one_and_the_rank() {
        let spectra = adapter(4).spectra().unwrap();
        assert!(spectra.iter().all(|one| (1.0..=4.0).contains(&one.stable_rank()) && one.sigma.len() <= 4));
        let of = |sigma: &[f64]| Spectrum { layer: 0, proj: Proj::Q, sigma: sigma.to_vec() }.stable_rank();
        assert!((of(&[2.0, 2.0, 2.0]) - 3.0).abs() < 1e-12 && (of(&[2.0, 0.0]) - 1.0).abs() < 1e-12);
        assert!(of(&[0.0, 0.0]).abs() < 1e-12);
    }
}
