//! Formulas on tensors, without a model: products, attention, rows by index, and the precision of norms, rotations and
//! softmaxes.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::mixed;
use crate::profile::{self, Op};

/// `x Wᵀ + b`. `x`: `[.., d_in]`, the result is `[.., d_out]`.
///
/// A CPU multiplies a few rows with a large matrix faster as `(W xᵀ)ᵀ`: a whole decoding step of the 0.5B is 1.5 times
/// as fast.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const FEW_ROWS: i64 = 32;
    let mut shape = x.size();
    let rows: i64 = shape[..shape.len() - 1].iter().product();
    let is_mixed = mixed::is_meant(weight);
    if !is_mixed && (x.device() != Device::Cpu || !(2..=FEW_ROWS).contains(&rows)) {
        return Ok(x.f_linear(weight, bias)?);
    }
    let flat = x.f_reshape([rows, weight.size2()?.1])?;
    let y = if is_mixed {
        mixed::matmul(&flat, &weight.f_transpose(0, 1)?)?
    } else {
        weight.f_matmul(&flat.f_transpose(0, 1)?)?.f_transpose(0, 1)?.f_contiguous()?
    };
    let y = match bias {
        Some(bias) => y.f_add(bias)?,
        None => y,
    };
    if let (Some(width), Some(d_out)) = (shape.last_mut(), y.size().last()) {
        *width = *d_out;
    }
    Ok(y.f_view(shape.as_slice())?)
}

/// The logits `h Wᵀ`: `h` is `[.., d_model]`, the unembedding W `[d_vocab, d_model]`. A GPU's product of bf16 numbers would
/// round them to bf16, whose spacing is 0.125 between 16 and 32, so it is asked for f32 unless autograd records.
pub(crate) fn logits(h: &Tensor, unembed: &Tensor) -> Result<Tensor> {
    if h.device() == Device::Cpu || h.kind() != Kind::BFloat16 || mixed::is_recorded(h) || mixed::is_recorded(unembed) {
        return linear(h, unembed, None);
    }
    let (d_vocab, d_model) = unembed.size2()?;
    let mut shape = h.size();
    let product = h.f_reshape([-1, d_model])?.f_mm_dtype(&unembed.f_transpose(0, 1)?, Kind::Float)?;
    if let Some(width) = shape.last_mut() {
        *width = d_vocab;
    }
    Ok(product.f_view(shape.as_slice())?)
}

/// `softmax(s q kᵀ) v` by libtorch's fused kernel; `scale`: s, or 1 / √d by the width d of a head. `q` and the result:
/// `[batch, n_heads, pos, d_head]`; `k` and `v`: `[batch, n_kv_heads, slots, d_head]`; `mask`: which query sees which
/// slot, bool, or what is added to the scores, in their shape.
pub(crate) fn fused_attention(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    causal: bool,
    scale: Option<f64>,
) -> Result<Tensor> {
    let span = profile::op(Op::Attention);
    let groups = q.size4()?.1 / k.size4()?.1;
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor, grouped| {
        Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, grouped)
    };
    let z = match mask {
        // A GPU's kernels take a mask or grouped heads, but not both.
        Some(mask) if groups > 1 && q.device() != Device::Cpu => without_groups([q, k, v], mask, causal, scale)?,
        _ => attend(q, k, v, groups != 1)?,
    };
    span.flops(|| profile::attention(q, k, causal, z.requires_grad()))?;
    Ok(z)
}

/// [`fused_attention`] of grouped heads for kernels that know no groups. The keys and values of many rows would be spread
/// over the heads at each answered token; where each row has one query, the heads of a group take the place of its
/// queries instead. `mask`: the same for all heads, `[batch, 1, pos, slots]`.
fn without_groups([q, k, v]: [&Tensor; 3], mask: &Tensor, causal: bool, scale: Option<f64>) -> Result<Tensor> {
    let ((batch, n_heads, pos, d_head), n_kv_heads) = (q.size4()?, k.size4()?.1);
    let groups = n_heads / n_kv_heads;
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
        Tensor::f_scaled_dot_product_attention(q, k, v, Some(mask), 0.0, causal, scale, false)
    };
    if pos == 1 {
        let z = attend(&q.f_reshape([batch, n_kv_heads, groups, d_head])?, k, v)?;
        return Ok(z.f_reshape([batch, n_heads, pos, d_head])?);
    }
    let spread = |x: &Tensor| x.f_repeat_interleave_self_int(groups, 1, None);
    Ok(attend(q, &spread(k)?, &spread(v)?)?)
}

/// `x z`; on a CPU f32 if one of them is bf16. If only one of them has a dimension of losses, parts or students before
/// the matrix, these share the other.
pub(crate) fn matmul(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    if mixed::is_meant(x) || mixed::is_meant(z) {
        return mixed::matmul(x, z);
    }
    if x.dim() <= z.dim() {
        return Ok(x.f_matmul(z)?);
    }
    Ok(x.f_bmm(&z.f_unsqueeze(0)?.f_expand([x.size()[0], -1, -1], false)?)?)
}

/// Adds [`matmul`]'s result to y, in place. `y` is contiguous.
pub(crate) fn add_matmul(y: &mut Tensor, x: &Tensor, z: &Tensor) -> Result<()> {
    if mixed::is_meant(x) || mixed::is_meant(z) {
        return mixed::add_matmul(y, x, z);
    }
    let _ = if y.dim() == 2 { y.f_addmm_(x, z)? } else { y.f_baddbmm_(x, z)? };
    Ok(())
}

/// Each head's part of `x Wᵀ`, computed in one product. `x`: `[batch, pos, n_heads, d_head]`, `weight`: `[d_out,
/// n_heads · d_head]`; the result is `[batch, pos, n_heads, d_out]`.
pub(crate) fn by_head(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, pos, n_heads, d_head) = x.size4()?;
    let weight = weight.f_to_kind(x.kind())?;
    let x = x.f_reshape([batch * pos, n_heads, d_head])?.f_transpose(0, 1)?;
    let weight = weight.f_view([-1, n_heads, d_head])?.f_permute([1, 2, 0])?; // [n_heads, d_head, d_out]
    Ok(x.f_bmm(&weight)?.f_transpose(0, 1)?.f_reshape([batch, pos, n_heads, -1])?)
}

/// The precision of norms, rotations, softmaxes and adapters. It is f32 for any weights, as in transformers and PEFT,
/// but f64 in an f64 model, so that such a model is f64 throughout.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { kind } else { Kind::Float }
}

/// `x` in a precision; itself if it is in it already, without a call of libtorch's conversion.
pub(crate) fn of_kind(x: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(if x.kind() == kind { x.shallow_clone() } else { x.f_to_kind(kind)? })
}

/// Rows by index. `index_select` gives the same, but its backward pass adds row by row in one thread on a CPU.
pub(crate) fn embedding(rows: &Tensor, index: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_embedding(rows, index, -1, false, false)?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn attention_without_groups_is_that_of_grouped_heads() {
        let numbers = |shape: &[i64], seed: f64| {
            let n: i64 = shape.iter().product();
            Tensor::arange(n, (Kind::Double, Device::Cpu)).g_mul_scalar(seed).sin().view(shape)
        };
        for pos in [1, 3] {
            let (q, k, v) = (numbers(&[2, 6, pos, 4], 1.3), numbers(&[2, 2, 5, 4], 0.7), numbers(&[2, 2, 5, 4], 2.1));
            let mask = Tensor::from_slice(&[true, true, false, true, true, true, false, true, true, true]);
            let mask = mask.view([2, 1, 1, 5]).expand([2, 1, pos, 5], false);
            let expected = fused_attention([&q, &k, &v], Some(&mask), false, None).unwrap();
            let found = without_groups([&q, &k, &v], &mask, false, None).unwrap();
            assert_eq!(found.size(), expected.size());
            assert!((found - expected).abs().max().double_value(&[]) < 1e-12, "{pos} queries");
        }
    }
}
