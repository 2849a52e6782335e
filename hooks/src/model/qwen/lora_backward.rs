//! The gradients of a LoRA by a manual backward pass, block by block, instead of libtorch's recorded graph.
//!
//! Training needs only losses and their gradients at the adapter's tensors. A manual pass keeps fewer tensors per
//! block, adds gradients in place, and makes about half as many calls. Taps, edits and dropout need the recorded graph.
//!
//! One forward pass can carry many backward passes at once. Gradients have the shape `[tokens, width]`, or for several
//! losses `[losses · tokens, width]`, loss by loss. Tensors kept from the forward pass are always `[tokens, width]`.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::kept::{Around, KeptMix, KeptNorm, by_loss, flat};
use super::{Attention, Block, Layout, Mlp, Qwen};
use crate::adapter::dose::{Dose, Doses};
use crate::adapter::lora::{Adapter, LoraPair};
use crate::error::{Error, Result};
use crate::model::gated;
use crate::model::layers::Linear;
use crate::model::loss::{Targets, loss_gradient, losses_and_gradients};
use crate::model::pass::{Pass, acting};
use crate::ops::{add_matmul, embedding, matmul, of_kind, wide};
use crate::profile::{self, Op, Stage};
use crate::proj::Proj;
use crate::rows::batch::Batch;

/// The gradients at each pair's A and B; for several losses `[losses, ..]`.
type Found = BTreeMap<(usize, Proj), (Tensor, Tensor)>;

/// The gradients of some losses of one forward pass, each loss alone.
pub(crate) struct OfEach {
    /// The log-probabilities of the vocabulary at each target, `[targets, d_vocab]`.
    pub(crate) logprobs: Tensor,
    /// `∂ℓ/∂θ` of the adapter's tensors in the order of `Adapter::parameters`, `[losses, ..]`.
    pub(crate) adapter: Vec<Tensor>,
    /// `∂ℓ/∂resid_post` block by block, `[losses, pos, d_model]`; of the last block `[losses, places, d_model]`.
    pub(crate) resid_post: Vec<Tensor>,
}

impl Qwen {
    /// The loss ℓ of each target, `[n]` (see [`Labels`](crate::Labels)), and ∂(Σ wᵢ ℓᵢ)/∂θ of the adapter's tensors in the order of
    /// `Adapter::parameters`. Both are f32, or f64 in an f64 model. `weights`: w, `[n]`. `doses`: the adapter's doses;
    /// `None` means 1 everywhere. For a stack the gradients are `[students, ..]`.
    ///
    /// The gradients equal libtorch's, except for the order of sums. The batch must be packed.
    pub fn lora_gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        weights: &Tensor,
        adapter: &Adapter,
        doses: Option<&Doses>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.gradients_in_parts(batch, targets, weights, Lora { adapter: Some(adapter), doses, parts: None })
    }

    /// The gradients of the adapter's tensors as in [`Self::lora_gradients`], split by the position of the adapter's
    /// input, `[parts, ..]`. `∇B = s Σ_t δ_t (A x_t)ᵀ` and `∇A = s Σ_t (Bᵀ δ_t) x_tᵀ` are sums over positions t, and a
    /// part is the sum over some of them. `parts`: 1 if a position is in a part, else 0, `[parts, batch · pos]`. Parts
    /// that cover all positions once add up to the whole gradient. A stack is refused.
    pub fn lora_gradients_by_part(
        &self,
        batch: &Batch,
        targets: &Targets,
        weights: &Tensor,
        adapter: &Adapter,
        parts: &Tensor,
    ) -> Result<Vec<Tensor>> {
        check_parts(batch, adapter, Some(parts))?;
        let lora = Lora { adapter: Some(adapter), doses: None, parts: Some(parts) };
        Ok(self.gradients_in_parts(batch, targets, weights, lora)?.1)
    }

    fn gradients_in_parts(
        &self,
        batch: &Batch,
        targets: &Targets,
        weights: &Tensor,
        lora: Lora<'_, '_>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        tch::no_grad(|| {
            let at = LoraAt::places(lora, &targets.places)?;
            let kept = KeptPass::forward(self, batch, &targets.places, lora, &at, None)?;
            let (losses, at_normed) = {
                let _stage = profile::stage(Stage::Loss);
                let normed = embedding(&kept.normed, &targets.rows)?;
                let (losses, at_normed) = losses_and_gradients(self, &normed, &targets.labels)?;
                let weighted = weighted(&at_normed, weights)?;
                let places = targets.places.size()[0];
                (losses, Tensor::f_embedding_dense_backward(&weighted, &targets.rows, places, -1, false)?)
            };
            let at_top = kept.ln_final.backward(&at_normed)?;
            let mut found = Found::new();
            backward(kept.blocks.into_iter(), at_top, &kept.tokens, &mut found, &mut |_| ())?;
            let n_parts = lora.parts.map(|parts| parts.size()[0]);
            let found = lora.adapter.map_or_else(|| Ok(vec![]), |adapter| in_order(found, adapter, n_parts))?;
            Ok((losses, found))
        })
    }

    /// The gradients of each loss of one row, `ℓᵢ = Σ −log p(label)` over some targets, `at_a_time` losses per backward
    /// pass. `losses[i]`: the indices of its targets; `copies_of(n)`: the row, packed n times.
    pub(crate) fn gradients_of_each(
        &self,
        targets: &Targets,
        losses: &[Vec<i64>],
        at_a_time: usize,
        (adapter, doses): (Option<&Adapter>, Option<&Doses>),
        copies_of: &dyn Fn(usize) -> Result<Batch>,
        each: &mut dyn FnMut(OfEach) -> Result<()>,
    ) -> Result<()> {
        tch::no_grad(|| {
            let (batch, lora) = (copies_of(1)?, Lora { adapter, doses, parts: None });
            let at = LoraAt::places(lora, &targets.places)?;
            let kept = KeptPass::forward(self, &batch, &targets.places, lora, &at, Some(0))?;
            let (pos, places) = (batch.ids.numel() as i64, targets.places.size()[0]);
            for losses in losses.chunks(at_a_time) {
                let index = |values: Vec<i64>| Tensor::f_from_slice(&values)?.f_to_device(self.device());
                let n = losses.len() as i64;
                let all = index(losses.concat())?;
                let (rows, labels) = (targets.rows.f_index_select(0, &all)?, targets.labels.select(&all)?);
                let (logprobs, at_normed) = {
                    let _stage = profile::stage(Stage::Loss);
                    let logits = self.logits(&embedding(&kept.normed, &rows)?)?;
                    let logprobs = logits.f_log_softmax(-1, wide(logits.kind()))?;
                    let at_targets = loss_gradient(self, logprobs.f_detach_copy()?, &labels)?;
                    let of_loss = losses.iter().zip(0..).flat_map(|(loss, i)| loss.iter().map(move |_| i * places));
                    let rows = rows.f_add(&index(of_loss.collect())?)?;
                    (logprobs, Tensor::f_embedding_dense_backward(&at_targets, &rows, n * places, -1, false)?)
                };
                let batch = copies_of(losses.len())?;
                let (_, layout) = self.begin(&batch, &mut Pass::default())?;
                let starts = Tensor::f_arange(n, (Kind::Int64, self.device()))?.f_mul_scalar(pos)?.f_unsqueeze(1)?;
                let of_copies = starts.f_add(&targets.places.f_unsqueeze(0)?)?.f_flatten(0, 1)?;
                let copies = Tokens { copies: Some(n), ..Tokens::of(self, &layout, &of_copies)? };
                let (mut found, mut resid_post) = (Found::new(), vec![]);
                let at_top = kept.ln_final.backward(&at_normed)?;
                let mut seen = |at: &Tensor| resid_post.push(at.shallow_clone());
                backward(kept.blocks.iter(), at_top, &copies, &mut found, &mut seen)?;
                resid_post.reverse();
                let by_loss = resid_post.iter().map(|at| Ok(at.f_view([n, -1, self.config.d_model])?));
                let adapter = adapter.map_or_else(|| Ok(vec![]), |adapter| in_order(found, adapter, Some(n)))?;
                each(OfEach { logprobs, adapter, resid_post: by_loss.collect::<Result<_>>()? })?;
            }
            Ok(())
        })
    }
}

/// Refuses parts of another batch, and derivatives of a stack.
fn check_parts(batch: &Batch, adapter: &Adapter, parts: Option<&Tensor>) -> Result<()> {
    let of_batch = |parts: &Tensor| parts.size() == [parts.size()[0], batch.ids.numel() as i64];
    if parts.is_none_or(of_batch) && adapter.n_stacked().is_none() {
        return Ok(());
    }
    Err(Error::invalid(
        "the parts of a gradient",
        format!("of one adapter, [parts, {}]", batch.ids.numel()),
        format!("{:?}, {} adapters", parts.map(Tensor::size), adapter.n_stacked().unwrap_or(1)),
    ))
}

/// Rows `[n, d]` times weights `[n]`, rounded once. A mean's weight 1/n in bf16 would be wrong by up to 0.4 %, by the same
/// factor at every target.
fn weighted(rows: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let exact = rows.f_to_kind(wide(rows.kind()))?;
    let weights = weights.f_unsqueeze(1)?.f_to_kind(exact.kind())?;
    Ok(exact.f_mul(&weights)?.f_to_kind(rows.kind())?)
}

/// Sorts the gradients into the order of `Adapter::parameters`, `[n, ..]` for several losses or parts, with zeros if
/// the adapter does not act.
fn in_order(mut found: Found, adapter: &Adapter, n: Option<i64>) -> Result<Vec<Tensor>> {
    let mut ordered = vec![];
    for (layer, proj, pair) in adapter.pairs() {
        let shape = |tensor: &Tensor| n.into_iter().chain(tensor.size()).collect::<Vec<_>>();
        let zeros = |tensor: &Tensor| Tensor::f_zeros(shape(tensor), (tensor.kind(), tensor.device()));
        let (a, b) = match found.remove(&(layer, proj)) {
            Some(found) => found,
            None => (zeros(&pair.a)?, zeros(&pair.b)?),
        };
        ordered.extend([a.f_view(shape(&pair.a).as_slice())?, b.f_view(shape(&pair.b).as_slice())?]);
    }
    Ok(ordered)
}

/// A forward pass with the tensors that its backward passes need.
struct KeptPass<'m> {
    /// The blocks from the first one that needs gradients.
    blocks: Vec<KeptBlock<'m>>,
    tokens: Tokens,
    ln_final: KeptNorm<'m>,
    normed: Tensor, // [places, d_model]
}

impl<'m> KeptPass<'m> {
    /// Runs the model to the final norm at some places. Activations are kept from block `from` on, or from the first
    /// block where the adapter acts.
    fn forward(
        model: &'m Qwen,
        batch: &Batch,
        places: &Tensor,
        lora: Lora<'m, '_>,
        at: &LoraAt,
        from: Option<usize>,
    ) -> Result<Self> {
        let _stage = profile::stage(Stage::Forward);
        let (mut resid, layout) = model.begin(batch, &mut Pass { adapter: lora.adapter, ..Pass::default() })?;
        let acts = |block: &Block| Proj::ALL.into_iter().any(|proj| lora.at(block.layer, proj).is_some());
        let last = model.blocks.len().saturating_sub(1);
        let from = from.or_else(|| model.blocks.iter().position(acts)).unwrap_or(last).min(last);
        let (below, above) = model.blocks.split_at(from);
        for block in below {
            resid = block.forward(resid, &layout, &mut Pass::default())?;
        }
        let mut resid = resid.f_flatten(0, 1)?;
        let (mut blocks, tokens) = (vec![], Tokens::of(model, &layout, places)?);
        for block in above {
            let is_last = block.layer == last;
            let lora_at = if is_last { at.of(lora) } else { lora };
            let (block, out) = block.forward_kept(&resid, &tokens.at(is_last), (lora, lora_at))?;
            blocks.push(block);
            resid = out;
        }
        let (ln_final, normed) = KeptNorm::forward(&model.ln_final, &resid)?;
        Ok(Self { blocks, tokens, ln_final, normed })
    }
}

/// The tokens of a pass. The last block runs only some places.
struct Tokens {
    all: Around,
    last: Around,
    places: Tensor,
    /// For several losses: the tokens are those of as many copies of the one row.
    copies: Option<i64>,
}

/// The tokens of a block, and the places that it runs if it is the last.
struct At<'t> {
    around: &'t Around,
    places: Option<&'t Tensor>,
    copies: Option<i64>,
}

impl Tokens {
    fn of(model: &Qwen, layout: &Layout<'_>, places: &Tensor) -> Result<Self> {
        let packing = layout.placement.packing.ok_or_else(not_packed)?;
        let all = Around::of(&model.config, &layout.rope, packing)?;
        let last = all.at_places(&layout.rope, packing, places)?;
        Ok(Self { all, last, places: places.shallow_clone(), copies: None })
    }

    fn at(&self, is_last: bool) -> At<'_> {
        let (around, places) = if is_last { (&self.last, Some(&self.places)) } else { (&self.all, None) };
        At { around, places, copies: self.copies }
    }
}

fn not_packed() -> Error {
    Error::invalid("the batch of a backward pass by hand", "a packed one", "one with padding")
}

/// Runs backward through some blocks, from the gradient at the top, `[losses · places, d_model]`. `seen` is called with
/// the gradient at each block's `resid_post`, the last block's first.
fn backward<'m, B: Borrow<KeptBlock<'m>>>(
    blocks: impl DoubleEndedIterator<Item = B> + ExactSizeIterator,
    mut at_top: Tensor,
    tokens: &Tokens,
    found: &mut Found,
    seen: &mut dyn FnMut(&Tensor),
) -> Result<()> {
    let _stage = profile::stage(Stage::Backward);
    for (below, block) in blocks.enumerate().rev() {
        seen(&at_top);
        let block = block.borrow();
        match block.backward(&at_top, below > 0, &tokens.at(block.is_last), found)? {
            Some(gradient) => at_top = gradient,
            None => break,
        }
    }
    Ok(())
}

/// The adapter, if there is one, its doses, and the parts of the positions that get separate gradients.
#[derive(Clone, Copy)]
struct Lora<'m, 'd> {
    adapter: Option<&'m Adapter>,
    doses: Option<&'d Doses>,
    parts: Option<&'d Tensor>, // [parts, tokens]
}

/// The doses and parts at some places only.
struct LoraAt {
    doses: Option<Doses>,
    parts: Option<Tensor>,
}

impl LoraAt {
    fn places(lora: Lora<'_, '_>, places: &Tensor) -> Result<Self> {
        Ok(Self {
            doses: lora.doses.map(|doses| doses.at_places(places)).transpose()?,
            parts: lora.parts.map(|parts| parts.f_index_select(1, places)).transpose()?,
        })
    }

    fn of<'m, 'd>(&'d self, lora: Lora<'m, '_>) -> Lora<'m, 'd> {
        Lora { adapter: lora.adapter, doses: self.doses.as_ref(), parts: self.parts.as_ref() }
    }
}

impl<'m, 'd> Lora<'m, 'd> {
    /// The pair of a projection and its dose, unless the dose is zero.
    fn at(self, layer: usize, proj: Proj) -> Option<(&'m LoraPair, Dose<'d>)> {
        acting(self.adapter, self.doses, layer, proj)
    }
}

/// A pair that acts, with its factor s · g.
struct Acting<'m> {
    pair: &'m LoraPair,
    factor: f64,
    /// Factors by token, `[tokens, 1]`, or for a stack `[students, 1 or tokens, 1]`, which multiply `factor`.
    by_token: Option<Tensor>,
    /// 1 for the tokens of each part, else 0, `[parts, tokens, 1]`.
    parts: Option<Tensor>,
}

impl<'m> Acting<'m> {
    fn of((pair, dose): (&'m LoraPair, Dose<'_>), parts: Option<&Tensor>, kind: Kind) -> Result<Self> {
        let (factor, doses) = match dose {
            Dose::Uniform(dose) => (dose * pair.scaling, None),
            Dose::Tokens(doses) => (pair.scaling, Some(pair.by_student(&doses.f_to_kind(kind)?.f_reshape([-1, 1])?)?)),
        };
        let scalings = pair.scalings.as_ref().map(|scalings| scalings.f_to_kind(kind)).transpose()?;
        let by_token = match (doses, scalings) {
            (Some(doses), Some(scalings)) => Some(doses.f_mul(&scalings)?),
            (doses, scalings) => doses.or(scalings),
        };
        let parts = parts.map(|parts| parts.f_to_kind(kind)?.f_unsqueeze(-1)).transpose()?;
        Ok(Self { pair, factor, by_token, parts })
    }

    /// Returns `x`, `[tokens, rank]`, as it is, or masked for each part, `[parts, tokens, rank]`.
    fn by_part(&self, x: &Tensor) -> Result<Tensor> {
        self.parts.as_ref().map_or_else(|| Ok(x.shallow_clone()), |parts| Ok(x.f_mul(parts)?))
    }

    /// s · g ⊙ x, in place.
    #[allow(clippy::float_cmp)]
    fn scale(&self, mut x: Tensor) -> Result<Tensor> {
        if self.factor != 1.0 {
            x = x.f_mul_scalar_(self.factor)?;
        }
        if let Some(by_token) = &self.by_token {
            x = x.f_mul_(by_token)?;
        }
        Ok(x)
    }
}

/// The activation as a product with `linear`'s weight takes it: on a CPU rounded, if the weight is bf16. All maps of a
/// block take the same kind, so an activation is rounded once, and kept so.
fn taken(x: &Tensor, linear: &Linear) -> Result<Tensor> {
    of_kind(x, linear.weight.kind())
}

/// The kind of the factors A and B in products with `x`, [`taken`] by a linear map. These products are in f32 or wider, but
/// on a CPU a product of bf16 numbers is f32 itself.
fn kind_of_factors(x: &Tensor) -> Kind {
    if x.device() == Device::Cpu { x.kind() } else { wide(x.kind()) }
}

/// [`matmul`] of `x` with a z of few columns, as `(zᵀ xᵀ)ᵀ`: of 8 columns, this takes a CPU half the time.
fn few_columns(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    Ok(matmul(&z.f_transpose(-2, -1)?, &x.f_transpose(-2, -1)?)?.f_transpose(-2, -1)?)
}

/// A linear map with the tensors that its backward pass needs besides the input.
struct KeptLinear<'m> {
    linear: &'m Linear,
    acting: Option<(Acting<'m>, Tensor)>, // with s · g ⊙ A x, [.., rank]
}

impl<'m> KeptLinear<'m> {
    /// `x`: `[tokens, d_in]`, [`taken`] by the map; the result is `[tokens, d_out]`.
    fn forward(linear: &'m Linear, x: &Tensor, lora: Lora<'m, '_>) -> Result<(Self, Tensor)> {
        let mut y = linear.base(x)?;
        let (wide, kind) = (wide(x.kind()), kind_of_factors(x));
        let Some(acting) = lora.at(linear.layer, linear.proj) else { return Ok((Self { linear, acting: None }, y)) };
        let acting = Acting::of(acting, lora.parts, wide)?;
        let span = profile::op(Op::Lora);
        let pair = acting.pair;
        let (a, b) = (of_kind(&pair.a, kind)?.f_transpose(-2, -1)?, of_kind(&pair.b, kind)?.f_transpose(-2, -1)?);
        let bottleneck = acting.scale(few_columns(&pair.by_student(&of_kind(x, kind)?)?, &a)?)?;
        if y.kind() == wide {
            add_matmul(&mut pair.by_student(&y)?, &bottleneck, &b)?;
        } else {
            let part = bottleneck.f_matmul(&b)?.f_view(y.size().as_slice())?;
            y = y.f_add(&part)?.f_to_kind(x.kind())?;
        }
        span.flops(|| Ok(pair.flops(x, false)))?;
        Ok((Self { linear, acting: Some((acting, bottleneck)) }, y))
    }

    fn acts(&self) -> bool {
        self.acting.is_some()
    }

    /// Computes ∂/∂A and ∂/∂B from ∂/∂y, `[losses · tokens, d_out]`. If `wanted`, also returns ∂/∂x, added to `into`;
    /// it is not wanted if no gradient is needed below.
    fn backward(
        &self,
        at_y: &Tensor,
        x: &Tensor,
        wanted: bool,
        into: Option<Tensor>,
        found: &mut Found,
    ) -> Result<Option<Tensor>> {
        let mut at_x = into;
        let weight = &self.linear.weight;
        let at_y = of_kind(at_y, weight.kind())?;
        if wanted {
            let span = profile::op(Op::Projections);
            at_x = Some(match at_x {
                Some(mut at_x) => {
                    add_matmul(&mut at_x, &at_y, weight)?;
                    at_x
                }
                None => matmul(&at_y, weight)?,
            });
            span.flops(|| Ok((2.0 * at_y.numel() as f64 * weight.size2()?.1 as f64, 0.0)))?;
        }
        let Some((acting, bottleneck)) = &self.acting else { return Ok(at_x) };
        let span = profile::op(Op::Lora);
        let (pair, wide, kind) = (acting.pair, bottleneck.kind(), kind_of_factors(x));
        let (a, b, x) = (of_kind(&pair.a, kind)?, of_kind(&pair.b, kind)?, of_kind(x, kind)?);
        let tokens = x.size()[0];
        let at_y = by_loss(&pair.by_student(&of_kind(&at_y, kind)?)?, tokens)?;
        let at_b = few_columns(&at_y.f_transpose(-2, -1)?, &acting.by_part(bottleneck)?)?;
        let at_bottleneck = acting.scale(few_columns(&at_y, &b)?)?;
        let at_a = matmul(&acting.by_part(&at_bottleneck)?.f_transpose(-2, -1)?, &pair.by_student(&x)?)?;
        if let Some(at_x) = &mut at_x {
            let at_bottleneck = if a.dim() == 2 { flat(&at_bottleneck)? } else { at_bottleneck };
            if at_x.kind() == wide {
                add_matmul(&mut pair.by_student(at_x)?, &at_bottleneck, &a)?;
            } else {
                let part = at_bottleneck.f_matmul(&a)?.f_view(at_x.size().as_slice())?;
                let _ = at_x.f_add_(&part.f_to_kind(at_x.kind())?)?;
            }
        }
        // The products for the gradients of B and the bottleneck, then of A and, if wanted, x.
        span.flops(|| {
            let (rank, d_in) = (b.size().last().copied().unwrap_or(0), a.size().last().copied().unwrap_or(0));
            let tokens = at_y.numel() as f64 / weight.size2()?.0 as f64;
            let sides = if wanted { 4.0 } else { 2.0 };
            Ok((4.0 * at_y.numel() as f64 * rank as f64 + sides * tokens * (rank * d_in) as f64, 0.0))
        })?;
        let kind = pair.a.kind();
        found.insert((self.linear.layer, self.linear.proj), (of_kind(&at_a, kind)?, of_kind(&at_b, kind)?));
        Ok(at_x)
    }
}

/// Attention with its input `x` and the heads' outputs `z`.
struct KeptAttention<'m> {
    q: KeptLinear<'m>,
    k: KeptLinear<'m>,
    v: KeptLinear<'m>,
    o: KeptLinear<'m>,
    mix: KeptMix<'m>,
    x: Tensor,      // [tokens, d_model]
    x_of_q: Tensor, // x, only at the places if there are some
    z: Tensor,      // [places or tokens, n_heads · d_head]
}

impl<'m> KeptAttention<'m> {
    /// `x`: `[tokens, d_model]`; the result is `[tokens, d_model]`, or `[places, d_model]`.
    fn forward(
        attention: &'m Attention,
        x: &Tensor,
        at: &At<'_>,
        (lora, lora_at): (Lora<'m, '_>, Lora<'m, '_>),
    ) -> Result<(Self, Tensor)> {
        let x = taken(x, &attention.q)?;
        let x_of_q = at.places.map_or_else(|| Ok(x.shallow_clone()), |places| embedding(&x, places))?;
        let (q, of_q) = KeptLinear::forward(&attention.q, &x_of_q, lora_at)?;
        let (k, of_k) = KeptLinear::forward(&attention.k, &x, lora)?;
        let (v, of_v) = KeptLinear::forward(&attention.v, &x, lora)?;
        let norms = [attention.q_norm.as_ref(), attention.k_norm.as_ref()];
        let (mix, z) = KeptMix::forward([&of_q, &of_k, &of_v], norms, at.around)?;
        let z = taken(&z, &attention.o)?;
        let (o, out) = KeptLinear::forward(&attention.o, &z, lora_at)?;
        Ok((Self { q, k, v, o, mix, x, x_of_q, z }, out))
    }

    fn acts(&self) -> bool {
        [&self.q, &self.k, &self.v, &self.o].into_iter().any(KeptLinear::acts)
    }

    /// Returns ∂/∂x if it is wanted.
    fn backward(&self, at_out: &Tensor, wanted: bool, at: &At<'_>, found: &mut Found) -> Result<Option<Tensor>> {
        let before = wanted || [&self.q, &self.k, &self.v].into_iter().any(KeptLinear::acts);
        let Some(at_z) = self.o.backward(at_out, &self.z, before, None, found)? else { return Ok(None) };
        let [at_q, at_k, at_v] = self.mix.backward(&at_z, at.around, at.copies)?;
        let at_x = self.k.backward(&at_k, &self.x, wanted, None, found)?;
        let at_x = self.v.backward(&at_v, &self.x, wanted, at_x, found)?;
        let Some(places) = at.places else {
            return self.q.backward(&at_q, &self.x_of_q, wanted, at_x, found);
        };
        let of_q = self.q.backward(&at_q, &self.x_of_q, wanted, None, found)?;
        let (Some(mut at_x), Some(of_q)) = (at_x, of_q) else { return Ok(None) };
        Ok(Some(at_x.f_index_add_(0, places, &of_q)?))
    }
}

/// The MLP with the activations of its forward pass: `post` is `silu(pre) ⊙ linear`.
struct KeptMlp<'m> {
    gate: KeptLinear<'m>,
    up: KeptLinear<'m>,
    down: KeptLinear<'m>,
    x: Tensor,   // [tokens, d_model]
    pre: Tensor, // [tokens, d_mlp], like the other two
    linear: Tensor,
    post: Tensor,
}

impl<'m> KeptMlp<'m> {
    fn forward(mlp: &'m Mlp, x: &Tensor, lora: Lora<'m, '_>) -> Result<(Self, Tensor)> {
        let x = taken(x, &mlp.gate)?;
        let (gate, pre) = KeptLinear::forward(&mlp.gate, &x, lora)?;
        let (up, linear) = KeptLinear::forward(&mlp.up, &x, lora)?;
        let [post, pre, linear] = gated::product(&pre, &linear, mlp.down.weight.kind())?;
        let (down, out) = KeptLinear::forward(&mlp.down, &post, lora)?;
        Ok((Self { gate, up, down, x, pre, linear, post }, out))
    }

    /// Returns ∂/∂x if it is wanted.
    fn backward(&self, at_out: &Tensor, wanted: bool, found: &mut Found) -> Result<Option<Tensor>> {
        let Self { gate, up, down, x, pre, linear, post } = self;
        let before = wanted || gate.acts() || up.acts();
        let Some(at_post) = down.backward(at_out, post, before, None, found)? else { return Ok(None) };
        let at_post = by_loss(&at_post, x.size()[0])?;
        let [at_pre, at_linear] = gated::backward(at_post, pre, linear)?;
        let at_x = gate.backward(&flat(&at_pre)?, x, wanted, None, found)?;
        up.backward(&flat(&at_linear)?, x, wanted, at_x, found)
    }
}

/// A block with the tensors that its backward pass needs.
struct KeptBlock<'m> {
    ln1: KeptNorm<'m>,
    attention: KeptAttention<'m>,
    ln2: KeptNorm<'m>,
    mlp: KeptMlp<'m>,
    is_last: bool,
}

impl Block {
    /// Runs the block on `resid_pre`, `[tokens, d_model]`. The result has `resid_post` of all tokens or only of some
    /// places.
    fn forward_kept<'m>(
        &'m self,
        resid_pre: &Tensor,
        at: &At<'_>,
        (lora, lora_at): (Lora<'m, '_>, Lora<'m, '_>),
    ) -> Result<(KeptBlock<'m>, Tensor)> {
        let (ln1, normed) = KeptNorm::forward(&self.ln1, resid_pre)?;
        let (attention, out) = KeptAttention::forward(&self.attention, &normed, at, (lora, lora_at))?;
        let resid_mid = match at.places {
            Some(places) => embedding(resid_pre, places)?.f_add_(&out)?,
            None => out.f_add(resid_pre)?,
        };
        let (ln2, normed) = KeptNorm::forward(&self.ln2, &resid_mid)?;
        let (mlp, mut out) = KeptMlp::forward(&self.mlp, &normed, lora_at)?;
        let resid_post = out.f_add_(&resid_mid)?;
        Ok((KeptBlock { ln1, attention, ln2, mlp, is_last: at.places.is_some() }, resid_post))
    }
}

impl KeptBlock<'_> {
    /// Returns `∂/∂resid_pre` from `∂/∂resid_post` if gradients are needed in blocks `below`.
    fn backward(&self, at_post: &Tensor, below: bool, at: &At<'_>, found: &mut Found) -> Result<Option<Tensor>> {
        let Self { ln1, attention, ln2, mlp, .. } = self;
        let Some(at_normed) = mlp.backward(at_post, below || attention.acts(), found)? else { return Ok(None) };
        let at_mid = ln2.backward(&at_normed)?.f_add_(at_post)?;
        let Some(at_normed) = attention.backward(&at_mid, below, at, found)? else { return Ok(None) };
        let mut at_pre = ln1.backward(&at_normed)?;
        Ok(Some(match at.places {
            Some(places) => at_pre.f_index_add_(0, places, &at_mid)?,
            None => at_pre.f_add_(&at_mid)?,
        }))
    }
}

mod linearized;

pub use linearized::Linearized;

#[cfg(test)]
mod tests;
