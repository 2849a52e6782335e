//! Formulas on tensors, without a model: products, attention, rows by index, and the precision of everything else.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::profile::{self, Op};

/// `x Wᵀ + b`. `x`: `[.., d_in]`, the result is `[.., d_out]`.
///
/// A CPU multiplies a few rows with a large matrix faster as `(W xᵀ)ᵀ`: 1.5 times in a whole decoding step of the 0.5B.
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

/// `softmax(q kᵀ / √d_head) v` by libtorch's fused kernel. `q` and the result: `[batch, n_heads, pos, d_head]`; `k` and
/// `v`: `[batch, n_kv_heads, slots, d_head]`; `mask`: which query sees which slot, bool, in the shape of the scores.
pub(crate) fn fused_attention([q, k, v]: [&Tensor; 3], mask: Option<&Tensor>, causal: bool) -> Result<Tensor> {
    let span = profile::op(Op::Attention);
    let groups = q.size4()?.1 / k.size4()?.1;
    let attend = |k: &Tensor, v: &Tensor, grouped| {
        Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, grouped)
    };
    let z = if groups == 1 || mask.is_none() || q.device() == Device::Cpu {
        attend(k, v, groups != 1)?
    } else {
        // A GPU's kernels take a mask or grouped heads, but not both. Keys and values are small, so they are repeated.
        let spread = |x: &Tensor| x.f_repeat_interleave_self_int(groups, 1, None);
        attend(&spread(k)?, &spread(v)?, false)?
    };
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

/// The precision of norms, rotations, softmaxes and adapters. It is f32 for any weights, as in transformers and PEFT,
/// but f64 in an f64 model, so that such a model is f64 throughout.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { kind } else { Kind::Float }
}

/// Rows by index. `index_select` gives the same, but its backward pass adds row by row in one thread on a CPU.
pub(crate) fn embedding(rows: &Tensor, index: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_embedding(rows, index, -1, false, false)?)
}
