//! The three layers that a Qwen is made of.

use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::error::Result;
use crate::hook_point::HookPoint;
use crate::lora::Proj;
use crate::pass::{Dose, Pass};
use crate::profile::{self, Op};
use crate::tap::Hooks;
use crate::weights::Scope;

/// A linear map that knows its place, so that a pass can look up the adapter's pair for it.
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

    /// `x`: `[batch, pos, d_in]`; the result is `[batch, pos, d_out]`. The adapter's part is computed in f32, as
    /// PEFT does, or wider.
    pub(crate) fn forward(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let dose = pass.gate.as_ref().map_or(Dose::Uniform(1.0), |doses| doses.at(self.layer, self.proj));
        let pair = pass.adapter.and_then(|adapter| adapter.pair(self.layer, self.proj));
        let Some(pair) = pair.filter(|_| !matches!(dose, Dose::Uniform(0.0))) else { return self.base(x) };
        let (batch, pos, d_in) = x.size3()?;
        let x = x.f_reshape([batch * pos, d_in])?;
        let y = self.base(&x)?;
        let span = profile::op(Op::Lora);
        let y = pair.add_to(y, &x, dose, pass.dropout.as_deref_mut())?;
        span.flops(|| Ok(profile::lora(&x, pair, y.requires_grad())))?;
        Ok(y.f_view([batch, pos, -1])?)
    }

    /// What `forward` gives for each head's part of `x` alone; they add up to it, as there is no bias. `x`:
    /// `[batch, pos, n_heads, d_head]`; the result is `[batch, pos, n_heads, d_out]`.
    pub(crate) fn forward_by_head(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let y = self.times_weight(x, by_head)?;
        let Some(pair) = pass.adapter.and_then(|adapter| adapter.pair(self.layer, self.proj)) else {
            return Ok(y);
        };
        let dose = pass.gate.as_ref().map_or(Dose::Uniform(1.0), |doses| doses.at(self.layer, self.proj));
        if matches!(dose, Dose::Uniform(0.0)) {
            return Ok(y);
        }
        let span = profile::op(Op::Lora);
        let y = pair.add_by_head(&y, x, dose, pass.dropout.as_deref_mut())?;
        span.flops(|| Ok(profile::lora(x, pair, y.requires_grad())))?;
        Ok(y)
    }

    /// Without the adapter's part.
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

/// `x Wᵀ + b`. `x`: `[.., d_in]`, the result is `[.., d_out]`.
///
/// A CPU multiplies a few rows with a large matrix faster as `(W xᵀ)ᵀ`: 1.5 times for a whole decoding step of the 0.5B.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const FEW_ROWS: i64 = 32;
    let mut shape = x.size();
    let rows: i64 = shape[..shape.len() - 1].iter().product();
    if x.device() != Device::Cpu || !(2..=FEW_ROWS).contains(&rows) {
        return Ok(x.f_linear(weight, bias)?);
    }
    let flat = x.f_reshape([rows, -1])?;
    let y = weight.f_matmul(&flat.f_transpose(0, 1)?)?.f_transpose(0, 1)?.f_contiguous()?;
    let y = match bias {
        Some(bias) => y.f_add(bias)?,
        None => y,
    };
    if let (Some(width), Some(d_out)) = (shape.last_mut(), y.size().last()) {
        *width = *d_out;
    }
    Ok(y.f_view(shape.as_slice())?)
}

/// `softmax(q kᵀ / √d_head) v` by libtorch's fused kernel. `q`: `[batch, n_heads, pos, d_head]`, as the result; `k` and `v`:
/// `[batch, n_kv_heads, slots, d_head]`; `mask`: who may see whom, bool, in the shape of the scores.
pub(crate) fn fused_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
) -> Result<Tensor> {
    let span = profile::op(Op::Attention);
    let groups = q.size4()?.1 / k.size4()?.1;
    let attend = |k: &Tensor, v: &Tensor, grouped| {
        Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, grouped)
    };
    if groups == 1 || mask.is_none() || q.device() == Device::Cpu {
        let z = attend(k, v, groups != 1)?;
        span.flops(|| profile::attention(q, k, causal, z.requires_grad()))?;
        return Ok(z);
    }
    // The kernels of a GPU take a mask or grouped heads, not both; keys and values are the smallest tensors there are.
    let spread = |x: &Tensor| x.f_repeat_interleave_self_int(groups, 1, None);
    let z = attend(&spread(k)?, &spread(v)?, false)?;
    span.flops(|| profile::attention(q, k, causal, z.requires_grad()))?;
    Ok(z)
}

/// Each head's part of `x Wᵀ`, all heads in one product. `x`: `[batch, pos, n_heads, d_head]`, `weight`:
/// `[d_out, n_heads · d_head]`; the result is `[batch, pos, n_heads, d_out]`.
pub(crate) fn by_head(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, pos, n_heads, d_head) = x.size4()?;
    let x = x.f_reshape([batch * pos, n_heads, d_head])?.f_transpose(0, 1)?;
    let weight = weight.f_view([-1, n_heads, d_head])?.f_permute([1, 2, 0])?; // [n_heads, d_head, d_out]
    Ok(x.f_bmm(&weight)?.f_transpose(0, 1)?.f_reshape([batch, pos, n_heads, -1])?)
}

/// The precision of norms, rotations, softmaxes and adapters: f32 whatever the weights are, as in transformers and PEFT, but f64
/// in an f64 model, so that such a model is f64 throughout.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { kind } else { Kind::Float }
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

    /// `x`: `[.., width]`, as the result.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (scale, wide) = self.scale(x)?;
        Ok(wide.f_div(&scale)?.f_to_kind(x.kind())?.f_mul(&self.weight)?)
    }

    /// The same, with the norm's two hook points.
    pub(crate) fn hooked(
        &self,
        x: &Tensor,
        hooks: &mut Hooks<'_>,
        scale_at: HookPoint,
        normalized_at: HookPoint,
    ) -> Result<Tensor> {
        let (scale, wide) = self.scale(x)?;
        let scale = hooks.run(scale_at, scale)?;
        let normalized = hooks.run(normalized_at, wide.f_div(&scale)?.f_to_kind(x.kind())?)?;
        Ok(normalized.f_mul(&self.weight)?)
    }

    /// The divisor `[.., 1]` and `x`, both in f32 or wider.
    pub(crate) fn scale(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let wide = x.f_to_kind(wide(x.kind()))?;
        let mean = wide.f_square()?.f_mean_dim(-1, true, wide.kind())?;
        Ok((mean.f_add_scalar(self.eps)?.f_sqrt()?, wide))
    }
}

/// Rotary position embedding (Su et al. 2021), halves rotated against each other as Qwen does.
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

    /// Those of some places of the flattened `[batch · pos]`, of a batch whose rows each have rotations of their own.
    pub(crate) fn at_places(&self, places: &Tensor) -> Result<Self> {
        let pick = |x: &Tensor| x.f_flatten(0, 1)?.f_index_select(0, places)?.f_unsqueeze(0);
        Ok(Self { cos: pick(&self.cos)?, sin: pick(&self.sin)? })
    }

    /// `x`: `[batch, pos, heads, d_head]`, as the result.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let halves = x.f_chunk(2, -1)?;
        let turned = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        Ok(x.f_mul(&self.cos)?.f_add(&turned.f_mul(&self.sin)?)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::lora::{Adapter, Dropout, LoraConfig};
    use crate::model_files::ModelFiles;
    use crate::pass::Doses;
    use crate::select::Numbers;

    /// All heads in one product against the plain way: each head alone, the others zero, through the whole map.
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
            let mut pass = Pass { adapter, gate, ..Pass::default() };
            let found = o.forward_by_head(&z, &mut pass).unwrap();
            for head in 0..4 {
                let alone = z.zeros_like();
                alone.narrow(2, head, 1).copy_(&z.narrow(2, head, 1));
                let plain = o.forward(&alone.view([2, 5, 64]), &mut pass).unwrap();
                let apart = f64::try_from((found.select(2, head) - plain).abs().max()).unwrap();
                assert!(apart < 1e-12, "head {head}: {apart}"); // f64, another order of sums
            }
        }

        // The same values are dropped as where all heads are summed at once.
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
