//! The three layers that a Qwen is made of.

use tch::{Kind, Tensor};

use crate::config::Config;
use crate::error::Result;
use crate::hook_point::HookPoint;
use crate::load::weights::Scope;
use crate::model::pass::Pass;
use crate::ops::{by_head, linear, of_kind, wide};
use crate::profile::{self, Op};
use crate::proj::Proj;
use crate::taps::tap::Hooks;

/// A linear map with its block and projection, by which a pass looks up the adapter's pair.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor, // [d_out, d_in]
    bias: Option<Tensor>,
    pub(crate) layer: usize,
    pub(crate) proj: Proj,
}

impl Linear {
    pub(crate) fn load(block: &Scope<'_>, layer: usize, proj: Proj, bias: bool, model: &Config) -> Result<Self> {
        let (d_in, d_out) = proj.widths(model);
        let scope = block.at(proj.path());
        let weight = scope.get("weight", &[d_out, d_in])?;
        let bias = if bias { Some(scope.get("bias", &[d_out])?) } else { None };
        Ok(Self { weight, bias, layer, proj })
    }

    /// `x`: `[batch, pos, d_in]`; the result is `[batch, pos, d_out]`. The adapter's part is computed in f32 or wider,
    /// as in PEFT.
    pub(crate) fn forward(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let Some((pair, dose, dropout)) = pass.acting(self.layer, self.proj) else { return self.base(x) };
        let (batch, pos, d_in) = x.size3()?;
        let x = x.f_reshape([batch * pos, d_in])?;
        let y = self.base(&x)?;
        let span = profile::op(Op::Lora);
        let y = pair.add_to(y, &x, dose, dropout)?;
        span.flops(|| Ok(pair.flops(&x, y.requires_grad())))?;
        Ok(y.f_view([batch, pos, -1])?)
    }

    /// The output for each head's part of `x` separately. These add up to the result of `forward`, since there is no
    /// bias. `x`: `[batch, pos, n_heads, d_head]`; the result is `[batch, pos, n_heads, d_out]`.
    pub(crate) fn forward_by_head(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let y = self.times_weight(x, by_head)?;
        let Some((pair, dose, dropout)) = pass.acting(self.layer, self.proj) else { return Ok(y) };
        let span = profile::op(Op::Lora);
        let y = pair.add_by_head(&y, x, dose, dropout)?;
        span.flops(|| Ok(pair.flops(x, y.requires_grad())))?;
        Ok(y)
    }

    /// The output without the adapter's part.
    pub(crate) fn base(&self, x: &Tensor) -> Result<Tensor> {
        self.times_weight(x, |x, weight| linear(x, weight, self.bias.as_ref()))
    }

    fn times_weight(&self, x: &Tensor, product: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let span = profile::op(Op::Projections);
        let y = product(x, &self.weight)?;
        span.flops(|| profile::product(x, &self.weight, y.requires_grad()))?;
        Ok(y)
    }

    pub(crate) fn parameters(&self) -> Vec<(String, Tensor)> {
        let stem = self.proj.path();
        let weight = (format!("{stem}.weight"), self.weight.shallow_clone());
        let bias = self.bias.as_ref().map(|bias| (format!("{stem}.bias"), bias.shallow_clone()));
        [weight].into_iter().chain(bias).collect()
    }
}

/// Root-mean-square norm, computed in f32 or wider: `weight · x / √(mean(x²) + eps)`.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Tensor, // [width]
    eps: f64,
}

impl RmsNorm {
    pub(crate) fn load(scope: &Scope<'_>, width: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.get("weight", &[width])?, eps })
    }

    /// Normalises `x`; it and the result are `[.., width]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (scale, wide) = self.scale(x)?;
        Ok(wide.f_div(&scale)?.f_to_kind(x.kind())?.f_mul(&self.weight)?)
    }

    /// The norm with its two hook points: the divisor and the normalised value.
    pub(crate) fn hooked(&self, x: &Tensor, hooks: &mut Hooks<'_>, at: [HookPoint; 2]) -> Result<Tensor> {
        let (scale, wide) = self.scale(x)?;
        let scale = hooks.run(at[0], scale)?;
        let normalized = hooks.run(at[1], wide.f_div(&scale)?.f_to_kind(x.kind())?)?;
        Ok(normalized.f_mul(&self.weight)?)
    }

    /// The divisor `[.., 1]` and `x`, both in f32 or wider.
    pub(crate) fn scale(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let wide = of_kind(x, wide(x.kind()))?;
        let mean = wide.f_square()?.f_mean_dim(-1, true, wide.kind())?;
        Ok((mean.f_add_scalar(self.eps)?.f_sqrt()?, wide))
    }
}

/// Rotary position embedding (Su et al. 2021). As in Qwen, the two halves of a head are rotated against each other.
#[derive(Debug)]
pub(crate) struct Rope {
    cos: Tensor, // [1 or batch, pos, 1, d_head]
    sin: Tensor,
}

impl Rope {
    /// The rotations of some positions, `[1 or batch, pos]`.
    pub(crate) fn at(positions: &Tensor, model: &Config, kind: Kind) -> Result<Self> {
        let half: Vec<f64> =
            (0..model.d_head / 2).map(|i| 1.0 / model.rope_theta.powf(2.0 * i as f64 / model.d_head as f64)).collect();
        let frequencies = Tensor::f_from_slice(&half)?.f_to_kind(wide(kind))?.f_to_device(positions.device())?;
        let angles = positions.f_to_kind(wide(kind))?.f_unsqueeze(-1)?.f_mul(&frequencies)?; // [.., pos, d_head / 2]
        let angles = Tensor::f_cat(&[&angles, &angles], -1)?.f_unsqueeze(2)?;
        Ok(Self { cos: angles.f_cos()?.f_to_kind(kind)?, sin: angles.f_sin()?.f_to_kind(kind)? })
    }

    /// The rotations at some places of the flattened `[batch · pos]`, if rows have different positions.
    pub(crate) fn at_places(&self, places: &Tensor) -> Result<Self> {
        let pick = |x: &Tensor| x.f_flatten(0, 1)?.f_index_select(0, places)?.f_unsqueeze(0);
        Ok(Self { cos: pick(&self.cos)?, sin: pick(&self.sin)? })
    }

    /// The cosines and sines of all rows' tokens, `[batch · pos, 1, d_head]`, the sines negative in a head's first half.
    pub(crate) fn signed(&self) -> Result<(Tensor, Tensor)> {
        let halves = self.sin.f_flatten(0, 1)?.f_chunk(2, -1)?;
        Ok((self.cos.f_flatten(0, 1)?, Tensor::f_cat(&[&halves[0].f_neg()?, &halves[1]], -1)?))
    }

    /// The precision of the rotations.
    pub(crate) fn kind(&self) -> Kind {
        self.cos.kind()
    }

    /// Rotates `x`; it and the result are `[batch, pos, heads, d_head]`.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let halves = x.f_chunk(2, -1)?;
        let turned = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        Ok(x.f_mul(&self.cos)?.f_add(&turned.f_mul(&self.sin)?)?)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use tch::Device;

    use super::*;
    use crate::adapter::dose::Doses;
    use crate::adapter::lora::{Adapter, Dropout, LoraConfig};
    use crate::chat::select::Numbers;
    use crate::load::model_files::ModelFiles;

    /// Compares one product for all heads with the plain way: each head alone, the others zero, through the whole map.
    #[test]
    fn a_product_by_heads_is_each_head_alone() {
        let files = ModelFiles::open("tiny-random").unwrap();
        let config = &files.config;
        let scope = files.weights.root(Kind::Double, Device::Cpu).at("model.layers").at(1);
        let o = Linear::load(&scope, 1, Proj::O, false, config).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let adapter = Adapter::init(&LoraConfig::default(), config, &mut rng, Device::Cpu).unwrap();
        let pair = adapter.pair(1, Proj::O).unwrap();
        pair.b.shallow_clone().copy_(&pair.a.transpose(0, 1).sin());
        let z = (Tensor::arange(2 * 5 * 64, (Kind::Double, Device::Cpu)) * 0.37).sin().view([2, 5, 4, 16]);
        let doses = || {
            Doses::of_tokens(Tensor::from_slice(&[1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0, -1.0, 0.25]).view([2, 5, 1]))
        };
        let elsewhere =
            || Doses { layers: Some(Numbers::parse("0..1", "the layers").unwrap()), elsewhere: 0.5, ..doses() };

        for (adapter, gate) in
            [(None, None), (Some(&adapter), None), (Some(&adapter), Some(doses())), (Some(&adapter), Some(elsewhere()))]
        {
            let mut pass = Pass { adapter, doses: gate, ..Pass::default() };
            let found = o.forward_by_head(&z, &mut pass).unwrap();
            for head in 0..4 {
                let alone = z.zeros_like();
                alone.narrow(2, head, 1).copy_(&z.narrow(2, head, 1));
                let plain = o.forward(&alone.view([2, 5, 64]), &mut pass).unwrap();
                let apart = f64::try_from((found.select(2, head) - plain).abs().max()).unwrap();
                assert!(apart < 1e-12, "head {head}: {apart}"); // f64, another order of sums
            }
        }

        // Dropout drops the same values as in the product that sums all heads.
        let dropped = |by_head: bool| {
            let mut dropout = Dropout::new(0.5, ChaCha8Rng::seed_from_u64(3));
            let mut pass = Pass { adapter: Some(&adapter), dropout: Some(&mut dropout), ..Pass::default() };
            if by_head {
                o.forward_by_head(&z, &mut pass).unwrap().sum_dim_intlist(2, false, Kind::Double)
            } else {
                o.forward(&z.view([2, 5, 64]), &mut pass).unwrap()
            }
        };
        assert!(f64::try_from((dropped(true) - dropped(false)).abs().max()).unwrap() < 1e-12);
    }
}
