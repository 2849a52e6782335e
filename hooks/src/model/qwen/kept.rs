//! Norms and attention with the tensors that their backward passes by hand need.
//!
//! Attention from queries, keys and values to the heads' outputs is a rotation, a gather of a packed batch's pieces, and
//! for each bucket of pieces a softmax between two products. Gradients have the shape `[tokens, width]`, or for several
//! losses `[losses · tokens, width]`.

use std::rc::Rc;

use tch::{Device, Tensor};

use crate::config::Config;
use crate::error::Result;
use crate::model::layers::{RmsNorm, Rope};
use crate::ops::{fused_attention, of_kind};
use crate::profile::{self, Op};
use crate::rows::gather::{HeadBucket, HeadRows};
use crate::rows::packing::Packing;

/// Reshapes a gradient of several losses, `[losses · tokens, width]`, to `[losses, tokens, width]`. That of one loss
/// and that of a stack are returned as they are.
pub(super) fn by_loss(at: &Tensor, tokens: i64) -> Result<Tensor> {
    if at.dim() > 2 || at.size()[0] == tokens {
        return Ok(at.shallow_clone());
    }
    Ok(at.f_view([-1, tokens, at.size()[1]])?)
}

/// Flattens `[.., width]` to `[all, width]`.
pub(super) fn flat(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_flatten(0, -2)?)
}

/// A norm with the normalised input, x / √(mean(x²) + eps), and the divisor, both in f32 or wider.
pub(super) struct KeptNorm<'m> {
    norm: &'m RmsNorm,
    normalized: Tensor, // [tokens, width]
    scale: Tensor,      // [tokens, 1]
}

impl<'m> KeptNorm<'m> {
    pub(super) fn forward(norm: &'m RmsNorm, x: &Tensor) -> Result<(Self, Tensor)> {
        let (scale, wide) = norm.scale(x)?;
        let normalized = wide.f_div(&scale)?;
        let y = of_kind(&normalized, x.kind())?.f_mul(&norm.weight)?;
        Ok((Self { norm, normalized, scale }, y))
    }

    /// ∂/∂x from ∂/∂y: with n = x / scale and g = ∂/∂y ⊙ weight it is (g − n · mean(g ⊙ n)) / scale.
    pub(super) fn backward(&self, at_y: &Tensor) -> Result<Tensor> {
        let at_y = by_loss(at_y, self.scale.size()[0])?;
        let at_n = of_kind(&at_y.f_mul(&self.norm.weight)?, self.normalized.kind())?;
        let mean = at_n.f_mul(&self.normalized)?.f_mean_dim(-1, true, at_n.kind())?;
        let at_x = at_n.f_addcmul(&self.normalized, &mean.f_neg()?)?.f_div_(&self.scale)?;
        flat(&of_kind(&at_x, at_y.kind())?)
    }

    /// dy from dx: with n = x / scale it is weight ⊙ (dx − n · mean(dx ⊙ n)) / scale.
    pub(super) fn tangent(&self, dx: &Tensor) -> Result<Tensor> {
        let dx = of_kind(dx, self.normalized.kind())?;
        let mean = dx.f_mul(&self.normalized)?.f_mean_dim(-1, true, dx.kind())?;
        Ok(dx.f_addcmul(&self.normalized, &mean.f_neg()?)?.f_div_(&self.scale)?.f_mul(&self.norm.weight)?)
    }
}

/// The rotation of each token's heads, times a factor: `x ⊙ cos + swapped(x) ⊙ sin`, where the halves of a head are
/// swapped. The tensors are `[tokens, heads, d_head]`, since a product that repeats an angle for each head takes five
/// times as long.
struct Rotation {
    cos: Tensor,
    sin: Tensor,  // negative in the first half
    back: Tensor, // the sine of the rotation back
}

impl Rotation {
    fn of(rope: &Rope, heads: i64, factor: f64) -> Result<Self> {
        let (cos, sin) = rope.signed()?; // [tokens, 1, d_head]
        let of_heads = |x: &Tensor| {
            let x = x.f_mul_scalar(factor)?;
            Tensor::f_cat(&vec![&x; heads as usize], 1)
        };
        let sin = of_heads(&sin)?;
        Ok(Self { cos: of_heads(&cos)?, back: sin.f_neg()?, sin })
    }

    /// The rotation at some tokens.
    fn at_places(&self, places: &Tensor) -> Result<Self> {
        let pick = |x: &Tensor| x.f_index_select(0, places);
        Ok(Self { cos: pick(&self.cos)?, sin: pick(&self.sin)?, back: pick(&self.back)? })
    }

    /// The rotated `x`; it and the result are `[tokens · heads, d_head]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.turned(x, &self.sin)
    }

    /// ∂/∂x from the gradient at the rotated x.
    fn backward(&self, at: &Tensor) -> Result<Tensor> {
        self.turned(at, &self.back)
    }

    fn turned(&self, x: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let x = x.f_view_as(&self.cos)?;
        let swapped = x.f_roll(x.size()[2] / 2, 2)?;
        Ok(x.f_mul(&self.cos)?.f_addcmul_(&swapped, sin)?.f_flatten(0, 1)?)
    }
}

/// The heads' tokens: what the attention of all blocks has in common, or of the last one, whose queries are those of some
/// places.
pub(super) struct Around {
    q: Rotation,
    k: Rc<Rotation>,
    rows: HeadRows,
    shape: [i64; 3], // n_heads, n_kv_heads, d_head
    /// What libtorch's kernel multiplies scores by.
    scale: f64,
}

impl Around {
    pub(super) fn of(config: &Config, rope: &Rope, packing: &Packing) -> Result<Self> {
        let shape = [config.n_heads, config.n_kv_heads, config.d_head];
        let scale = 1.0 / (config.d_head as f64).sqrt();
        // The rotation scales the queries. In bf16, as on a GPU, it would be rounded once more, so there the kernel does.
        let (of_q, scale) = if packing.positions.device() == Device::Cpu { (scale, 1.0) } else { (1.0, scale) };
        let (q, k) = (Rotation::of(rope, config.n_heads, of_q)?, Rotation::of(rope, config.n_kv_heads, 1.0)?);
        Ok(Self { q, k: Rc::new(k), rows: HeadRows::of(packing, None, shape, rope.kind())?, shape, scale })
    }

    /// Only the queries at some places.
    pub(super) fn at_places(&self, rope: &Rope, packing: &Packing, places: &Tensor) -> Result<Self> {
        let (q, rows) = (self.q.at_places(places)?, Vec::<i64>::try_from(places)?);
        let rows = HeadRows::of(packing, Some(&rows), self.shape, rope.kind())?;
        Ok(Self { q, k: self.k.clone(), rows, shape: self.shape, scale: self.scale })
    }

    /// The part of each bucket in tensors that hold all, by heads.
    fn by_bucket(&self, x: &Tensor, shape: impl Fn(&HeadBucket) -> [i64; 3]) -> Result<Vec<Tensor>> {
        let shapes: Vec<[i64; 3]> = self.rows.buckets.iter().map(shape).collect();
        let sizes: Vec<i64> = shapes.iter().map(|shape| shape.iter().product()).collect();
        let parts = x.f_split_with_sizes(sizes, 0)?;
        let of_shape =
            |(part, [pieces, heads, n]): (&Tensor, &[i64; 3])| Ok(part.f_view([*pieces, *heads, *n, self.shape[2]])?);
        parts.iter().zip(&shapes).map(of_shape).collect()
    }

    fn queries(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.by_bucket(x, |bucket| [bucket.n_pieces, self.shape[0], bucket.n_queries])
    }

    fn keys(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.by_bucket(x, |bucket| [bucket.n_pieces, self.shape[1], bucket.n_keys])
    }
}

/// Attention from queries, keys and values in the projections' shape to the heads' outputs.
pub(super) struct KeptMix<'m> {
    q_norm: Option<KeptNorm<'m>>,
    k_norm: Option<KeptNorm<'m>>,
    buckets: Vec<KeptBucket>,
}

impl<'m> KeptMix<'m> {
    /// `q` and the result: `[places or tokens, n_heads · d_head]`, `k` and `v`: `[tokens, n_kv_heads · d_head]`.
    pub(super) fn forward(
        [q, k, v]: [&Tensor; 3],
        [q_norm, k_norm]: [Option<&'m RmsNorm>; 2],
        around: &Around,
    ) -> Result<(Self, Tensor)> {
        let Around { rows, shape: [.., d_head], .. } = around;
        let normed = |x: &Tensor, norm: Option<&'m RmsNorm>| -> Result<_> {
            let x = x.f_view([-1, *d_head])?;
            let Some(norm) = norm else { return Ok((None, x)) };
            let (norm, x) = KeptNorm::forward(norm, &x)?;
            Ok((Some(norm), x))
        };
        let shape = q.size();
        let ((q_norm, q), (k_norm, k)) = (normed(q, q_norm)?, normed(k, k_norm)?);
        let q = around.queries(&rows.queries.take(&around.q.forward(&q)?)?)?;
        let k = around.keys(&rows.keys.take(&around.k.forward(&k)?)?)?;
        let v = around.keys(&rows.keys.take(&v.f_view([-1, *d_head])?)?)?;
        let (mut buckets, mut found) = (vec![], vec![]);
        for ((q, (k, v)), bucket) in q.into_iter().zip(k.into_iter().zip(v)).zip(&rows.buckets) {
            let (kept, z) = KeptBucket::forward([q, k, v], &bucket.bias, around.scale)?;
            buckets.push(kept);
            found.push(z);
        }
        let z = rows.back.take(&joined(&found)?)?.f_view(shape.as_slice())?;
        Ok((Self { q_norm, k_norm, buckets }, z))
    }

    /// The gradients at queries, keys and values from that at z, all in the shapes of `forward`. If `around` is that of
    /// `copies` of the one row, for a loss each, these are computed from copies of what was kept.
    pub(super) fn backward(&self, at_z: &Tensor, around: &Around, copies: Option<i64>) -> Result<[Tensor; 3]> {
        let Around { rows, shape: [n_heads, n_kv_heads, d_head], .. } = around;
        let at_z = around.queries(&rows.back.backward(&at_z.f_view([-1, *d_head])?)?)?;
        let (mut at_q, mut at_k, mut at_v) = (vec![], vec![], vec![]);
        for ((kept, at_z), bucket) in self.buckets.iter().zip(&at_z).zip(&rows.buckets) {
            let copied = copies.map(|n| kept.copied(n, &bucket.bias, around.scale)).transpose()?;
            let [q, k, v] = copied.as_ref().unwrap_or(kept).backward(at_z)?;
            at_q.push(q);
            at_k.push(k);
            at_v.push(v);
        }
        let q = around.q.backward(&rows.queries.backward(&joined(&at_q)?)?)?;
        let k = around.k.backward(&rows.keys.backward(&joined(&at_k)?)?)?;
        let v = rows.keys.backward(&joined(&at_v)?)?;
        let before = |at: &Tensor, norm: &Option<KeptNorm<'_>>, heads: i64| -> Result<Tensor> {
            let at = norm.as_ref().map_or_else(|| Ok(at.shallow_clone()), |norm| norm.backward(at))?;
            Ok(at.f_view([-1, heads * d_head])?)
        };
        Ok([
            before(&q, &self.q_norm, *n_heads)?,
            before(&k, &self.k_norm, *n_kv_heads)?,
            before(&v, &None, *n_kv_heads)?,
        ])
    }

    /// dz from the tangents of queries, keys and values, all in the shapes of `forward`.
    pub(super) fn tangent(&self, [dq, dk, dv]: [&Tensor; 3], around: &Around) -> Result<Tensor> {
        let Around { rows, shape: [.., d_head], .. } = around;
        let normed = |dx: &Tensor, norm: &Option<KeptNorm<'_>>| -> Result<Tensor> {
            let dx = dx.f_view([-1, *d_head])?;
            norm.as_ref().map_or_else(|| Ok(dx.shallow_clone()), |norm| norm.tangent(&dx))
        };
        let shape = dq.size();
        let dq = around.queries(&rows.queries.take(&around.q.forward(&normed(dq, &self.q_norm)?)?)?)?;
        let dk = around.keys(&rows.keys.take(&around.k.forward(&normed(dk, &self.k_norm)?)?)?)?;
        let dv = around.keys(&rows.keys.take(&normed(dv, &None)?)?)?;
        let mut found = vec![];
        for ((kept, bucket), (dq, (dk, dv))) in
            self.buckets.iter().zip(&rows.buckets).zip(dq.into_iter().zip(dk.into_iter().zip(dv)))
        {
            found.push(kept.tangent(&[dq, dk, dv], &bucket.bias, around.scale)?);
        }
        Ok(rows.back.take(&joined(&found)?)?.f_view(shape.as_slice())?)
    }
}

/// Buckets' tensors by heads as one, `[all, d_head]`.
fn joined(parts: &[Tensor]) -> Result<Tensor> {
    let flat = parts.iter().map(|part| part.f_flatten(0, -2)).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(if flat.len() == 1 { flat[0].shallow_clone() } else { Tensor::f_cat(&flat, 0)? })
}

/// Attention of a bucket's pieces: q is `[pieces, n_heads, queries, d_head]`, k and v `[pieces, n_kv_heads, keys,
/// d_head]`.
struct KeptBucket {
    inputs: [Tensor; 3],
    by: By,
}

/// How a bucket's gradients are found.
enum By {
    /// From the softmax's result, `[pieces · n_kv_heads, group · queries, keys]`.
    Pattern(Tensor),
    /// From z and libtorch's graph of its fused kernel.
    Graph(Tensor),
}

/// The most keys for which the pattern is kept. On a CPU, plain products are then 1.1 to 1.5 times as fast as the fused
/// kernel with its gradient (heads of 16 and 64 numbers, 80 to 500 keys; of 128 numbers, 4 times). The pattern is a number
/// for each query and key: at more keys, it takes more memory than queries, keys, values and results together.
const FEW_KEYS: i64 = 512;

impl KeptBucket {
    /// The result is z, shaped as q.
    fn forward(inputs: [Tensor; 3], bias: &Tensor, scale: f64) -> Result<(Self, Tensor)> {
        let is_plain = bias.device() == Device::Cpu && bias.size4()?.3 <= FEW_KEYS;
        if is_plain { Self::plain(inputs, bias) } else { Self::fused(&inputs, bias, scale) }
    }

    fn plain(inputs: [Tensor; 3], bias: &Tensor) -> Result<(Self, Tensor)> {
        let span = profile::op(Op::Attention);
        let pattern = pattern(&inputs, bias, None)?;
        let z = pattern.f_bmm(&by_kv_head(&inputs)?[2])?;
        span.flops(|| profile::attention(&inputs[0], &inputs[1], false, false))?;
        Ok((Self { inputs, by: By::Pattern(pattern) }, z))
    }

    fn fused(inputs: &[Tensor; 3], bias: &Tensor, scale: f64) -> Result<(Self, Tensor)> {
        let leaf = |x: &Tensor| x.f_detach()?.f_set_requires_grad(true);
        let inputs = [leaf(&inputs[0])?, leaf(&inputs[1])?, leaf(&inputs[2])?];
        let z =
            tch::with_grad(|| fused_attention([&inputs[0], &inputs[1], &inputs[2]], Some(bias), false, Some(scale)))?;
        let found = z.f_detach()?;
        Ok((Self { inputs, by: By::Graph(z) }, found))
    }

    /// What n copies of the pieces would keep.
    fn copied(&self, n: i64, bias: &Tensor, scale: f64) -> Result<Self> {
        let copied = |x: &Tensor| x.f_detach()?.f_repeat([n, 1, 1, 1]);
        let [q, k, v] = &self.inputs;
        Ok(Self::forward([copied(q)?, copied(k)?, copied(v)?], bias, scale)?.0)
    }

    /// The gradients at q, k and v from that at z. With the pattern `P = softmax(S)` and `∂P = ∂z vᵀ` they are `∂S k`, `∂Sᵀ
    /// q` and `Pᵀ ∂z`, where `∂S = P ⊙ (∂P − Σ P ⊙ ∂P)`, summed over keys. The products add up the heads that share keys.
    fn backward(&self, at_z: &Tensor) -> Result<[Tensor; 3]> {
        let pattern = match &self.by {
            By::Pattern(pattern) => pattern,
            By::Graph(z) => return of_graph(z, at_z, &self.inputs),
        };
        let span = profile::op(Op::Attention);
        let [q, k, v] = by_kv_head(&self.inputs)?;
        let at_z = at_z.f_view_as(&q)?;
        let at_v = pattern.f_transpose(1, 2)?.f_bmm(&at_z)?;
        let at_pattern = at_z.f_bmm(&v.f_transpose(1, 2)?)?;
        let at_scores = Tensor::f_internal_softmax_backward_data(&at_pattern, pattern, -1, pattern.kind())?;
        let (at_q, at_k) = (at_scores.f_bmm(&k)?, at_scores.f_transpose(1, 2)?.f_bmm(&q)?);
        let once = || profile::attention(&self.inputs[0], &self.inputs[1], false, false);
        span.flops(|| Ok((2.0 * once()?.0, 0.0)))?;
        Ok([at_q, at_k, at_v])
    }

    /// dz from dq, dk and dv: with the pattern `P = softmax(S)` it is `dP v + P dv`, where `dS = s (dq kᵀ + q dkᵀ)` and `dP =
    /// P ⊙ (dS − Σ P ⊙ dS)`, summed over keys. The result is shaped as q.
    fn tangent(&self, tangents: &[Tensor; 3], bias: &Tensor, scale: f64) -> Result<Tensor> {
        let span = profile::op(Op::Attention);
        let wide = |x: &Tensor| of_kind(x, tangents[0].kind());
        let inputs = [wide(&self.inputs[0])?, wide(&self.inputs[1])?, wide(&self.inputs[2])?];
        let (pattern, scale) = match &self.by {
            By::Pattern(pattern) => (wide(pattern)?, 1.0), // its queries are scaled
            By::Graph(_) => (pattern(&inputs, &wide(bias)?, Some(scale))?, scale),
        };
        let ([q, k, v], [dq, dk, dv]) = (by_kv_head(&inputs)?, by_kv_head(tangents)?);
        let mut at_scores = dq.f_bmm(&k.f_transpose(1, 2)?)?.f_baddbmm_(&q, &dk.f_transpose(1, 2)?)?;
        let at_scores = at_scores.f_mul_scalar_(scale)?;
        let at_pattern = Tensor::f_internal_softmax_backward_data(&at_scores, &pattern, -1, pattern.kind())?;
        let z = at_pattern.f_bmm(&v)?.f_baddbmm_(&pattern, &dv)?.f_view_as(&self.inputs[0])?;
        let once = || profile::attention(&self.inputs[0], &self.inputs[1], false, false);
        span.flops(|| Ok((2.0 * once()?.0, 0.0)))?;
        Ok(z)
    }
}

/// softmax(s q kᵀ + bias), `[pieces · n_kv_heads, group · queries, keys]`.
fn pattern(inputs: &[Tensor; 3], bias: &Tensor, scale: Option<f64>) -> Result<Tensor> {
    let [q, k, _] = by_kv_head(inputs)?;
    let (pieces, n_heads, queries, _) = inputs[0].size4()?;
    let mut scores = q.f_bmm(&k.f_transpose(1, 2)?)?;
    if let Some(scale) = scale {
        scores = scores.f_mul_scalar_(scale)?;
    }
    let _ = scores.f_view([pieces, n_heads, queries, -1])?.f_add_(bias)?;
    Ok(scores.f_softmax(-1, scores.kind())?)
}

/// q as `[pieces · n_kv_heads, group · queries, d_head]`, k and v as `[pieces · n_kv_heads, keys, d_head]`: the heads
/// that share keys take the place of queries.
fn by_kv_head([q, k, v]: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let (pieces, n_kv_heads, keys, d_head) = k.size4()?;
    let lines = |x: &Tensor, n: i64| x.f_view([pieces * n_kv_heads, n, d_head]);
    Ok([lines(q, -1)?, lines(k, keys)?, lines(v, keys)?])
}

fn of_graph(z: &Tensor, at_z: &Tensor, inputs: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let _span = profile::backward();
    let scalar = tch::with_grad(|| z.f_mul(at_z)?.f_sum(at_z.kind()))?;
    let mut found = Tensor::f_run_backward(&[scalar], inputs, false, false)?.into_iter();
    Ok([(); 3].map(|()| found.next().unwrap_or_else(Tensor::new)))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::load::tiny_random;
    use crate::rows::packing::PackedRow;

    fn numbers(shape: &[i64], step: f64) -> Tensor {
        let n: i64 = shape.iter().product();
        (Tensor::arange(n, (Kind::Double, Device::Cpu)) * step).sin().view(shape)
    }

    fn assert_alike(found: &[Tensor], expected: &[Tensor], what: &str) {
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            let apart = (found.view_as(expected) - expected).abs().max().double_value(&[]);
            assert!(apart < 1e-12, "{what}, tensor {at}: {apart}"); // f64, another order of sums
        }
    }

    #[test]
    fn plain_products_are_the_fused_kernel() {
        let (q, k, v) = (numbers(&[2, 6, 3, 4], 1.3), numbers(&[2, 2, 5, 4], 0.7), numbers(&[2, 2, 5, 4], 2.1));
        let bias =
            Tensor::from_slice(&[0.0, 0.0, 0.0, f64::NEG_INFINITY, f64::NEG_INFINITY]).expand([2, 1, 3, 5], false);
        let inputs = || [q.shallow_clone(), k.shallow_clone(), v.shallow_clone()];
        let (plain, z) = KeptBucket::plain(inputs(), &bias).unwrap();
        let (fused, twin) = KeptBucket::fused(&inputs(), &bias, 1.0).unwrap();
        assert!(matches!((&plain.by, &fused.by), (By::Pattern(_), By::Graph(_))));
        assert_alike(&[z], &[twin], "z");
        let at_z = numbers(&[2, 6, 3, 4], 0.3);
        assert_alike(&plain.backward(&at_z).unwrap(), &fused.backward(&at_z).unwrap(), "gradients");
        let (copies, at_z) = (bias.repeat([3, 1, 1, 1]), numbers(&[6, 6, 3, 4], 0.3));
        let tangents = || [numbers(&[2, 6, 3, 4], 0.9), numbers(&[2, 2, 5, 4], 1.1), numbers(&[2, 2, 5, 4], 0.4)];
        let tangent = |kept: &KeptBucket| tch::no_grad(|| kept.tangent(&tangents(), &bias, 1.0).unwrap());
        assert_alike(&[tangent(&plain)], &[tangent(&fused)], "tangents");
        let (halved, _) = KeptBucket::fused(&inputs(), &bias, 0.5).unwrap();
        let scaled = KeptBucket::plain([&q * 0.5, k.shallow_clone(), v.shallow_clone()], &bias).unwrap().0;
        let [dq, dk, dv] = tangents();
        let expected = scaled.tangent(&[dq * 0.5, dk, dv], &bias, 1.0).unwrap();
        assert_alike(
            &[tch::no_grad(|| halved.tangent(&tangents(), &bias, 0.5).unwrap())],
            &[expected],
            "scaled tangents",
        );
        let of_copies = |kept: &KeptBucket| kept.copied(3, &copies, 1.0).unwrap().backward(&at_z).unwrap();
        assert_alike(&of_copies(&plain), &of_copies(&fused), "gradients of copies");
    }

    /// Compares with libtorch's gradients through [`Packing::attend`], for pieces of very different lengths, in groups of
    /// different sizes.
    #[test]
    fn attention_by_hand_is_the_packings() {
        let config = tiny_random::config(300);
        let row = |shared: usize, own: usize, seed: i64| -> Vec<i64> {
            (0..shared as i64).chain((0..own as i64).map(|at| 100 + seed + at)).collect()
        };
        let rows = [row(40, 30, 1), row(40, 2, 2), row(42, 3, 3), row(5, 90, 4)];
        let rows: Vec<PackedRow<'_>> = rows.iter().map(|ids| PackedRow::of(ids)).collect();
        let (packing, _) = Packing::of(&[&rows[..3], &rows[3..]], true, Device::Cpu).unwrap();
        let rope = Rope::at(&packing.positions, &config, Kind::Double).unwrap();
        let (n, pos) = packing.positions.size2().unwrap();
        let around = Around::of(&config, &rope, &packing).unwrap();
        assert!(around.rows.buckets.len() > 1);

        let Config { n_heads, n_kv_heads, d_head, .. } = config;
        let of = |heads: i64, step: f64| numbers(&[n * pos, heads * d_head], step).set_requires_grad(true);
        let inputs = [of(n_heads, 1.3), of(n_kv_heads, 0.7), of(n_kv_heads, 2.1)];
        let lines = |x: &Tensor, heads: i64| x.view([n, pos, heads, d_head]);
        let (q, k) = (lines(&inputs[0], n_heads), lines(&inputs[1], n_kv_heads));
        let (q, k) = (rope.rotate(&q).unwrap(), rope.rotate(&k).unwrap());
        let z = packing.attend(&q, &k, &lines(&inputs[2], n_kv_heads)).unwrap().view([n * pos, n_heads * d_head]);

        // Tokens of the rows; the others fill up a group.
        let mut tokens: Vec<i64> = packing.places.concat();
        tokens.sort_unstable();
        tokens.dedup();
        assert!((tokens.len() as i64) < n * pos);
        let some: Vec<i64> = tokens.iter().copied().filter(|place| place % 3 > 0 && place % pos > 20).collect();
        let filler = (n * pos) - 1 - (0..n * pos).rev().position(|place| !tokens.contains(&place)).unwrap() as i64;
        for places in [tokens.clone(), some.clone(), [some.clone(), vec![filler]].concat()] {
            let places = {
                let mut sorted = places;
                sorted.sort_unstable();
                Tensor::from_slice(&sorted)
            };
            let real =
                Tensor::isin(&places, &Tensor::from_slice(&tokens), false, false).to_kind(Kind::Double).unsqueeze(1);
            let at_z = numbers(&[places.size()[0], n_heads * d_head], 0.3) * &real;
            let loss = (z.index_select(0, &places) * &at_z).sum(Kind::Double);
            let expected = Tensor::run_backward(&[loss], &inputs, true, false);
            let at = around.at_places(&rope, &packing, &places).unwrap();
            let own = inputs[0].detach().index_select(0, &places);
            let (kept, found) = tch::no_grad(|| {
                KeptMix::forward([&own, &inputs[1].detach(), &inputs[2].detach()], [None, None], &at).unwrap()
            });
            assert_alike(&[found * &real], &[z.detach().index_select(0, &places) * &real], "z at places");
            let [q, k, v] = tch::no_grad(|| kept.backward(&at_z, &at, None)).unwrap();
            let q = Tensor::zeros_like(&inputs[0].detach()).index_add(0, &places, &q);
            assert_alike(&[q, k, v], &expected, "gradients at places");
        }
        let (kept, found) = tch::no_grad(|| {
            let [q, k, v] = inputs.each_ref().map(Tensor::detach);
            KeptMix::forward([&q, &k, &v], [None, None], &around).unwrap()
        });
        let tokens = Tensor::from_slice(&tokens);
        assert_alike(&[found.index_select(0, &tokens)], &[z.detach().index_select(0, &tokens)], "z");
        let at_z = z.detach().zeros_like().index_copy(0, &tokens, &numbers(&[tokens.size()[0], n_heads * d_head], 0.9));
        let expected = Tensor::run_backward(&[(&z * &at_z).sum(Kind::Double)], &inputs, true, false);
        assert_alike(&tch::no_grad(|| kept.backward(&at_z, &around, None)).unwrap(), &expected, "gradients");
    }
}
