//! Gradients of a scalar at any tensor or hook point (reverse-mode differentiation, as `torch.autograd.grad`).

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use tch::{Kind, Tensor};

use crate::adapter::lora::Adapter;
use crate::ask::condition::{Condition, run_with_hooks};
use crate::chat::tokens::Sequence;
use crate::error::{Error, Result};
use crate::hook_point::HookPoint;
use crate::model::loss::Targets;
use crate::model::pass::Pass;
use crate::model::qwen::Qwen;
use crate::ops::wide;
use crate::profile;
use crate::rows::batch::Batch;
use crate::rows::packing::PackedRow;
use crate::taps::cache::Cache;
use crate::taps::tap::Tap;

/// ∂loss/∂input of each input, in its shape; zero if the loss does not depend on it. With `keep_graph`, gradients of
/// another loss of the same pass can be taken afterwards.
pub fn gradients<T: Borrow<Tensor>>(loss: &Tensor, inputs: &[T], keep_graph: bool) -> Result<Vec<Tensor>> {
    let inputs: Vec<&Tensor> = inputs.iter().map(Borrow::borrow).collect();
    let _span = profile::backward();
    let found = Tensor::f_run_backward(&[loss], &inputs, keep_graph, false)?;
    // A tensor that a loss does not depend on has an undefined gradient; it becomes zeros.
    let defined = |(gradient, input): (Tensor, &&Tensor)| {
        if gradient.defined() { Ok(gradient) } else { Ok(input.f_zeros_like()?) }
    };
    found.into_iter().zip(&inputs).map(defined).collect()
}

/// A loss of one row, the activations at some hook points, and the gradients of the loss there.
#[derive(Debug)]
pub struct AtPoints {
    /// The loss.
    pub loss: f64,
    /// The activations, `[1, pos, ..]` in the shapes of their hook points.
    pub activations: BTreeMap<HookPoint, Tensor>,
    /// ∂loss/∂activation, shaped as the activation.
    pub gradients: BTreeMap<HookPoint, Tensor>,
}

/// Runs one row and takes the gradient of a scalar function of its logits, `[1, pos, d_vocab]`, at some hook points,
/// after the condition's edits.
///
/// ```
/// use hooks::{Condition, HookPoint, gradient, tch::Kind};
///
/// let (model, chat) = hooks::open("tiny-random")?;
/// let prompt = chat.prompt(None, "Name an animal.")?;
/// let at = HookPoint::ResidPost(0);
/// let found = gradient::at_points(&model, &prompt, &Condition::default(), &[at], |logits| {
///     Ok(logits.f_select(1, -1)?.f_log_softmax(-1, Kind::Float)?.f_max()?)
/// })?;
/// assert_eq!(found.gradients[&at].size(), found.activations[&at].size()); // [1, pos, d_model]
/// # Ok::<(), hooks::Error>(())
/// ```
pub fn at_points(
    model: &Qwen,
    row: &Sequence,
    condition: &Condition<'_>,
    points: &[HookPoint],
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<AtPoints> {
    tch::with_grad(|| {
        let mut watch = Watch { wanted: points.iter().copied().collect(), cache: Cache::default() };
        let with_embed: Vec<HookPoint> = points.iter().copied().chain([HookPoint::Embed]).collect();
        let logits = run_with_hooks(model, row, condition, &with_embed, &mut watch)?;
        let loss = loss(&logits)?;
        let (points, seen): (Vec<HookPoint>, Vec<Tensor>) =
            watch.cache.iter().map(|(point, seen)| (point, seen.shallow_clone())).unzip();
        let found = gradients(&loss, &seen, false)?;
        let detached = seen.iter().map(Tensor::f_detach).collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(AtPoints {
            loss: loss.f_double_value(&[])?,
            activations: points.iter().copied().zip(detached).collect(),
            gradients: points.into_iter().zip(found).collect(),
        })
    })
}

/// The gradients of some losses of one row, each loss alone.
#[derive(Debug)]
pub struct OfLosses {
    /// The indices of these losses among all.
    pub losses: Range<usize>,
    /// The log-probabilities of all tokens at the positions that predict the losses' tokens, loss by loss, `[tokens,
    /// d_vocab]`.
    pub logprobs: Tensor,
    /// ∂ℓ/∂θ of the adapter's tensors in the order of `Adapter::parameters`, each `[losses, ..]`; empty without an
    /// adapter.
    pub adapter: Vec<Tensor>,
    /// `∂ℓ/∂resid_post` block by block, each `[losses, pos, d_model]`; positions after the losses' last token are not
    /// run. For the last block `[losses, places, d_model]`, at the predicting positions only: it is zero at all others.
    pub resid_post: Vec<Tensor>,
}

/// The squared Euclidean norms of gradients, in f64.
#[derive(Debug)]
pub struct Squares {
    /// `adapter[tensor][loss]`.
    pub adapter: Vec<Vec<f64>>,
    /// `resid_post[block][loss]`, over all positions.
    pub resid_post: Vec<Vec<f64>>,
}

impl OfLosses {
    /// ‖∂ℓ/∂θ‖² of each tensor and `‖∂ℓ/∂resid_post‖²` of each block, loss by loss.
    pub fn squares(&self) -> Result<Squares> {
        let of = |gradient: &Tensor| -> Result<Tensor> {
            let wide = gradient.f_to_kind(Kind::Double)?.f_square()?;
            Ok(wide.f_sum_dim_intlist([1, 2].as_slice(), false, Kind::Double)?)
        };
        let squares = self.adapter.iter().chain(&self.resid_post).map(of).collect::<Result<Vec<_>>>()?;
        let flat = Vec::<f64>::try_from(Tensor::f_stack(&squares, 0)?.f_reshape([-1])?)?;
        let mut squares = flat.chunks(self.losses.len()).map(<[f64]>::to_vec);
        let adapter = squares.by_ref().take(self.adapter.len()).collect();
        Ok(Squares { adapter, resid_post: squares.collect() })
    }
}

/// The exact gradients of several losses of one row, `ℓ = Σ_k −log p(token k | the tokens before it)`. Each loss is
/// given by the indices k of its tokens in the completion; for single tokens `[[0], [1], ..]`. `each` is called with
/// the gradients of some losses at a time, in the order of the losses.
///
/// The row is run once, and several losses share a written-out backward pass (`qwen/lora_backward.rs`), which keeps
/// each loss's gradients apart. Under edits, libtorch runs one backward pass over the recorded graph per loss.
pub fn of_losses(
    model: &Qwen,
    row: &Sequence,
    condition: &Condition<'_>,
    losses: &[Vec<usize>],
    each: &mut dyn FnMut(OfLosses) -> Result<()>,
) -> Result<()> {
    let at_a_time = losses_at_a_time(row.ids.len(), condition.adapter);
    if condition.edits.is_empty() {
        manual_backward(model, row, condition, losses, at_a_time, each)
    } else {
        recorded(model, row, condition, losses, each)
    }
}

/// The number of losses that share a backward pass. It is bounded so that their tokens, and the adapter's gradients,
/// take some hundred MB each.
fn losses_at_a_time(tokens: usize, adapter: Option<&Adapter>) -> usize {
    const TOKENS: usize = 4096;
    const NUMBERS: usize = 1 << 26;
    let learned: usize =
        adapter.map_or(0, |adapter| adapter.pairs().map(|(_, _, pair)| pair.a.numel() + pair.b.numel()).sum());
    (TOKENS / tokens.max(1)).min(NUMBERS / learned.max(1)).max(1)
}

/// The tokens of all the losses, ascending.
fn tokens_of(row: &Sequence, losses: &[Vec<usize>]) -> Result<Vec<usize>> {
    let n_tokens = row.completion.len();
    if let Some(at) = losses.iter().position(|loss| loss.is_empty() || loss.iter().any(|k| *k >= n_tokens)) {
        return Err(Error::invalid(
            format!("loss {at} of a row"),
            format!("tokens of its completion, 0 to {}", n_tokens as i64 - 1),
            format!("{:?}", losses[at]),
        ));
    }
    Ok(losses.iter().flatten().copied().collect::<BTreeSet<_>>().into_iter().collect())
}

fn manual_backward(
    model: &Qwen,
    row: &Sequence,
    condition: &Condition<'_>,
    losses: &[Vec<usize>],
    at_a_time: usize,
    each: &mut dyn FnMut(OfLosses) -> Result<()>,
) -> Result<()> {
    let (tokens, device, start) = (tokens_of(row, losses)?, model.device(), row.completion.start);
    let reach = tokens.last().map_or(1, |k| start + k);
    let doses = condition.doses(&[row])?.map(|rows| rows.concat());
    let packed = PackedRow { doses: doses.as_ref().map(|doses| &doses[..reach]), ..PackedRow::of(&row.ids[..reach]) };
    let batch = Batch::packed(&[&[packed]], false, device)?;
    let gate = doses.as_ref().map(|_| condition.gate.spread(batch.doses(), device)).transpose()?;
    let mask: Vec<bool> = (0..row.ids.len()).map(|at| at >= start && tokens.contains(&(at - start))).collect();
    let targets = Targets::of(&batch, &[&row.ids], &[&mask])?;
    let of_target = |k: &usize| tokens.partition_point(|token| token < k) as i64;
    let indices: Vec<Vec<i64>> = losses.iter().map(|loss| loss.iter().map(of_target).collect()).collect();
    let line: &[PackedRow<'_>] = &[PackedRow { doses: None, ..packed }];
    let copies = |n: usize| Batch::packed(&vec![line; n], false, device);
    let mut from = 0;
    let what = (condition.adapter, gate.as_ref());
    model.gradients_of_each(&targets, &indices, at_a_time, what, &copies, &mut |found| {
        let losses = from..(from + at_a_time).min(losses.len());
        from = losses.end;
        each(OfLosses { losses, logprobs: found.logprobs, adapter: found.adapter, resid_post: found.resid_post })
    })
}

fn recorded(
    model: &Qwen,
    row: &Sequence,
    condition: &Condition<'_>,
    losses: &[Vec<usize>],
    each: &mut dyn FnMut(OfLosses) -> Result<()>,
) -> Result<()> {
    let tokens = tokens_of(row, losses)?;
    tch::with_grad(|| {
        let graph = Graph::of(model, row, condition, &tokens)?;
        for (at, loss) in losses.iter().enumerate() {
            let (logprobs, adapter, resid_post) = graph.gradients(model, loss)?;
            each(OfLosses { losses: at..at + 1, logprobs, adapter, resid_post })?;
        }
        Ok(())
    })
}

/// A row's forward pass with its recorded graph.
struct Graph {
    parameters: Vec<Tensor>, // of the adapter, [1, ..]
    resid_post: Vec<Tensor>, // per block [1, pos, d_model]; of the last [1, places, d_model]
    places: Vec<i64>,        // the positions of these
    labels: Vec<i64>,
    start: usize,
}

impl Graph {
    /// Runs a row as far as the losses' tokens reach.
    fn of(model: &Qwen, row: &Sequence, condition: &Condition<'_>, tokens: &[usize]) -> Result<Self> {
        let (device, start) = (model.device(), row.completion.start);
        // A stack of one is a copy of the adapter, so the caller's tensors need not require gradients.
        let alone = condition.adapter.map(|adapter| Adapter::stacked(&[adapter])).transpose()?;
        let parameters: Vec<Tensor> = alone.iter().flat_map(Adapter::parameters).map(|(_, tensor)| tensor).collect();
        for tensor in &parameters {
            let _ = tensor.f_set_requires_grad(true)?;
        }
        let reach = tokens.last().map_or(1, |k| start + k);
        let batch = Batch::packed(&[&[PackedRow::of(&row.ids[..reach])]], false, device)?;
        let places: Vec<i64> = tokens.iter().map(|k| (start + k - 1) as i64).collect();
        let flat = Tensor::f_from_slice(&places)?.f_to_device(device)?;

        let points: Vec<HookPoint> = (0..model.config.n_layers.saturating_sub(1)).map(HookPoint::ResidPost).collect();
        let mut watch = Watch { wanted: points.iter().copied().collect(), cache: Cache::default() };
        let with_embed: Vec<HookPoint> = points.iter().copied().chain([HookPoint::Embed]).collect();
        let condition = Condition { adapter: alone.as_ref(), ..condition.clone() };
        let mut prepared = condition.prepare(&[row], model, None)?;
        let at_places = |model: &Qwen, batch: &Batch, pass: &mut Pass<'_>| model.resid_at(batch, &flat, pass);
        let last = prepared.run_with_hooks(model, &batch, &with_embed, &mut watch, at_places)?.f_unsqueeze(0)?;
        let resid_post = points.iter().map(|point| Ok(watch.cache.get(*point)?.shallow_clone()));
        let resid_post = resid_post.chain([Ok(last)]).collect::<Result<_>>()?;
        Ok(Self { parameters, resid_post, places, labels: row.ids[row.completion.clone()].to_vec(), start })
    }

    /// The log-probabilities where a loss's tokens are predicted, and the gradients of the loss at the adapter and the
    /// residual stream.
    fn gradients(&self, model: &Qwen, loss: &[usize]) -> Result<(Tensor, Vec<Tensor>, Vec<Tensor>)> {
        let place = |k: &usize| self.places.partition_point(|place| *place < (self.start + k - 1) as i64) as i64;
        let index = |values: Vec<i64>| Tensor::f_from_slice(&values)?.f_to_device(model.device());
        let (rows, labels) =
            (index(loss.iter().map(place).collect())?, index(loss.iter().map(|k| self.labels[*k]).collect())?);
        let resid = self.resid_post.last().map_or_else(Tensor::new, Tensor::shallow_clone).f_flatten(0, 1)?;
        let logprobs = model.unembed(&resid.f_index_select(0, &rows)?)?; // [tokens, d_vocab]
        let logprobs = logprobs.f_log_softmax(-1, wide(logprobs.kind()))?;
        let nll = logprobs.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_sum(logprobs.kind())?.f_neg()?;
        let inputs: Vec<&Tensor> = self.parameters.iter().chain(&self.resid_post).collect();
        let mut adapter = gradients(&nll, &inputs, true)?; // the next loss goes through the graph, too
        let resid_post = adapter.split_off(self.parameters.len());
        Ok((logprobs.f_detach()?, adapter, resid_post))
    }
}

/// Keeps the activations. It makes the embedding a leaf of the graph, so that gradients flow at every point although no
/// weight requires one.
struct Watch {
    wanted: BTreeSet<HookPoint>,
    cache: Cache,
}

impl Tap for Watch {
    fn tap(&mut self, at: HookPoint, x: Tensor) -> Result<Tensor> {
        let x = if at == HookPoint::Embed { x.f_detach()?.f_set_requires_grad(true)? } else { x };
        if !self.wanted.contains(&at) {
            return Ok(x);
        }
        // An edit that replaces the whole activation cuts the graph, so a new one begins here.
        let x = if x.requires_grad() { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        self.cache.tap(at, x)
    }
}

#[cfg(test)]
mod tests;
