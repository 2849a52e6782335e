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
/// another loss of the same pass can follow.
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

/// A loss of one row, with the activations at some hook points and its gradients there.
#[derive(Debug)]
pub struct AtPoints {
    /// The loss.
    pub loss: f64,
    /// The activations, `[1, pos, ..]` as their points' documentation says.
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
    /// Which of the losses these are.
    pub losses: Range<usize>,
    /// The log-probabilities of the vocabulary at the positions that predict the losses' tokens, loss by loss,
    /// `[tokens, d_vocab]`.
    pub logprobs: Tensor,
    /// ∂ℓ/∂θ of the adapter's tensors in the order of `Adapter::parameters`, each `[losses, ..]`; none without an
    /// adapter.
    pub adapter: Vec<Tensor>,
    /// `∂ℓ/∂resid_post` block by block, each `[losses, pos, d_model]`; positions after the losses' last token are not
    /// run. For the last block `[losses, places, d_model]`, only at the predicting positions: it is zero at the others.
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
/// given by the indices k of its tokens in the completion; for single tokens `[[0], [1], ..]`. `each` gets the
/// gradients in the order of the losses, some losses at a time.
///
/// The row is run once, and several losses share a written-out backward pass (`qwen/lora_backward.rs`), which keeps
/// each loss's gradients apart. Under edits, each loss is a backward pass of libtorch over the recorded graph.
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

/// The number of losses that share a backward pass: their tokens, and the adapter's gradients, take some hundred MB
/// each.
fn losses_at_a_time(tokens: usize, adapter: Option<&Adapter>) -> usize {
    const TOKENS: usize = 4096;
    const NUMBERS: usize = 1 << 26;
    let learned: usize =
        adapter.map_or(0, |adapter| adapter.pairs().map(|(_, _, pair)| pair.a.numel() + pair.b.numel()).sum());
    (TOKENS / tokens.max(1)).min(NUMBERS / learned.max(1)).max(1)
}

/// The tokens that the losses are of, in order.
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
            let (logprobs, adapter, resid_post) = graph.gradients(model, loss, at + 1 < losses.len())?;
            each(OfLosses { losses: at..at + 1, logprobs, adapter, resid_post })?;
        }
        Ok(())
    })
}

/// A row, run with its graph.
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
        // A stack of one is the adapter in tensors of its own, so that its own ask for nothing.
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

    /// The log-probabilities where a loss' tokens are predicted, and its gradients at the adapter and the residual
    /// stream.
    fn gradients(&self, model: &Qwen, loss: &[usize], keep_graph: bool) -> Result<(Tensor, Vec<Tensor>, Vec<Tensor>)> {
        let place = |k: &usize| self.places.partition_point(|place| *place < (self.start + k - 1) as i64) as i64;
        let index = |values: Vec<i64>| Tensor::f_from_slice(&values)?.f_to_device(model.device());
        let (rows, labels) =
            (index(loss.iter().map(place).collect())?, index(loss.iter().map(|k| self.labels[*k]).collect())?);
        let resid = self.resid_post.last().map_or_else(Tensor::new, Tensor::shallow_clone).f_flatten(0, 1)?;
        let logprobs = model.unembed(&resid.f_index_select(0, &rows)?)?; // [tokens, d_vocab]
        let logprobs = logprobs.f_log_softmax(-1, wide(logprobs.kind()))?;
        let nll = logprobs.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_sum(logprobs.kind())?.f_neg()?;
        let inputs: Vec<&Tensor> = self.parameters.iter().chain(&self.resid_post).collect();
        let mut adapter = gradients(&nll, &inputs, keep_graph)?;
        let resid_post = adapter.split_off(self.parameters.len());
        Ok((logprobs.f_detach()?, adapter, resid_post))
    }
}

/// Keeps the activations, and makes the embedding a leaf, so that gradients flow at every point although no weight
/// requires one.
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
        // An edit that replaces everything cuts the graph; a new one begins here.
        let x = if x.requires_grad() { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        self.cache.tap(at, x)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::Proj;
    use crate::adapter::lora::LoraPair;
    use crate::laws::gate_laws::{completion_loss, gate};
    use crate::laws::model_laws::{exact, exact_model, world};

    /// Each loss by its own forward and backward pass over the row alone, with gradients of the adapter's own tensors.
    fn plainly(model: &Qwen, row: &Sequence, condition: &Condition<'_>, loss: &[usize]) -> (Vec<f64>, Vec<f64>) {
        let parameters = condition.adapter.map_or_else(Vec::new, Adapter::parameters);
        for (_, tensor) in &parameters {
            let _ = tensor.set_requires_grad(true);
        }
        let doses = condition.gate.spread(&[condition.gate.doses(row).unwrap()], Device::Cpu).unwrap();
        let points: Vec<HookPoint> = (0..model.config.n_layers).map(HookPoint::ResidPost).collect();
        let mut watch = Watch { wanted: points.iter().copied().collect(), cache: Cache::default() };
        let hooks = crate::Hooks::default().on(points.iter().copied().chain([HookPoint::Embed]), &mut watch);
        let mut pass = Pass { adapter: condition.adapter, doses: Some(doses), hooks, ..Pass::default() };
        let logits = model.forward(&Batch::of(&[row], Device::Cpu).unwrap(), &mut pass).unwrap();
        let of_one = |k: &usize| {
            let at = row.completion.start + k;
            completion_loss(&logits, &Sequence { completion: at..at + 1, ..row.clone() })
        };
        let loss = loss.iter().map(of_one).reduce(|sum, loss| sum + loss).unwrap();
        let seen = points.iter().map(|point| watch.cache.get(*point).unwrap().shallow_clone());
        let inputs: Vec<Tensor> = parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).chain(seen).collect();
        let squares = gradients(&loss, &inputs, false).unwrap().into_iter();
        let mut squares: Vec<f64> =
            squares.map(|gradient| gradient.to_kind(Kind::Double).square().sum(None).double_value(&[])).collect();
        for (_, tensor) in &parameters {
            let _ = tensor.set_requires_grad(false);
        }
        let resid_post = squares.split_off(parameters.len());
        (squares, resid_post)
    }

    #[test]
    fn the_gradients_of_losses_are_those_of_each_alone() {
        let (model, chat, adapter) = world();
        let (exact_model, row) =
            (exact_model(), chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap());
        let exact = exact(&exact_model, &adapter);
        let mut losses: Vec<Vec<usize>> = (0..row.completion.len()).map(|k| vec![k]).collect();
        losses.push(vec![3, 0, 1]);
        for (model, adapter, tolerance) in [(&model, &adapter, 1e-4), (&exact_model, &exact, 1e-11)] {
            for condition in [
                Condition::adapted(adapter),
                Condition::adapted(adapter).gated(gate(&chat, "except:entity*0.5")),
                Condition::adapted(adapter).gated(gate(&chat, "only:user+gen*layers(1)*modules(v,down)")),
                Condition::default(),
            ] {
                let twins: Vec<_> = losses.iter().map(|loss| plainly(model, &row, &condition, loss)).collect();
                for at_a_time in [0, 1, 4, 100] {
                    let mut seen = 0;
                    let mut compare = |found: OfLosses| {
                        let Squares { adapter, resid_post } = found.squares()?;
                        for (at, (of_adapter, of_resid)) in twins[found.losses.clone()].iter().enumerate() {
                            let twin = of_adapter.iter().chain(of_resid);
                            let (n, mut compared) = (adapter.len() + resid_post.len(), 0);
                            for (place, (ours, twin)) in adapter.iter().chain(&resid_post).zip(twin).enumerate() {
                                let apart = (ours[at] - twin).abs();
                                let (text, loss) = (condition.gate.to_string(), &losses[found.losses.start + at]);
                                assert!(
                                    apart <= tolerance * twin,
                                    "{text}, {at_a_time} at a time, {loss:?}, {place}: {} {twin}",
                                    ours[at]
                                );
                                compared += usize::from(*twin > 0.0);
                            }
                            assert!(compared >= 2, "{compared} of {n} are not zero");
                            seen += 1;
                        }
                        Ok(())
                    };
                    if at_a_time == 0 {
                        recorded(model, &row, &condition, &losses, &mut compare).unwrap();
                    } else {
                        manual_backward(model, &row, &condition, &losses, at_a_time, &mut compare).unwrap();
                    }
                    assert_eq!(seen, losses.len());
                }
            }
        }
        assert!(adapter.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
    }

    /// The adapter's gradient, position by position, from each map's input and the gradient at its output.
    #[test]
    fn a_parts_gradient_is_the_sum_over_its_positions() {
        let (model, (_, chat, adapter)) = (exact_model(), world());
        let adapter = exact(&model, &adapter);
        let row = chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap();
        let n_tokens = row.ids.len();
        // In turn, so that each part has positions of the prompt and of the completion.
        let part_of = |t: usize| t % 3;
        let batch = Batch::packed(&[&[PackedRow::of(&row.ids)]], true, Device::Cpu).unwrap();
        let mask: Vec<bool> = (0..n_tokens).map(|t| row.completion.contains(&t)).collect();
        let targets = Targets::of(&batch, &[&row.ids], &[&mask]).unwrap();
        let ones = Tensor::ones([targets.n as i64], (Kind::Double, Device::Cpu));
        let parts = Tensor::zeros([3, n_tokens as i64], (Kind::Double, Device::Cpu));
        for t in 0..n_tokens {
            let _ = parts.get(part_of(t) as i64).get(batch.place(0, t)).fill_(1.0);
        }
        let found = model.lora_gradients_by_part(&batch, &targets, &ones, &adapter, &parts).unwrap();
        let whole = model.lora_gradients(&batch, &targets, &ones, &adapter, None).unwrap().1;

        let layers = 0..model.config.n_layers;
        let given_and_gives = |layer: usize, proj: Proj| match proj {
            Proj::Q => (HookPoint::Ln1Normalized(layer), HookPoint::Q(layer)),
            Proj::K => (HookPoint::Ln1Normalized(layer), HookPoint::K(layer)),
            Proj::V => (HookPoint::Ln1Normalized(layer), HookPoint::V(layer)),
            Proj::O => (HookPoint::Z(layer), HookPoint::AttnOut(layer)),
            Proj::Gate => (HookPoint::Ln2Normalized(layer), HookPoint::MlpPre(layer)),
            Proj::Up => (HookPoint::Ln2Normalized(layer), HookPoint::MlpPreLinear(layer)),
            Proj::Down => (HookPoint::MlpPost(layer), HookPoint::MlpOut(layer)),
        };
        let points: BTreeSet<HookPoint> = layers
            .flat_map(|layer| Proj::ALL.map(|proj| given_and_gives(layer, proj)))
            .flat_map(|(given, gives)| [given, gives])
            .collect();
        let points: Vec<HookPoint> = points.into_iter().collect();
        let seen =
            at_points(&model, &row, &Condition::adapted(&adapter), &points, |logits| Ok(completion_loss(logits, &row)))
                .unwrap();
        let flat = |x: &Tensor| x.squeeze_dim(0).flatten(1, -1);
        for (at, (layer, proj, pair)) in adapter.pairs().enumerate() {
            let (given, gives) = given_and_gives(layer, proj);
            let (x, delta) = (flat(&seen.activations[&given]), flat(&seen.gradients[&gives]));
            let name = match given {
                HookPoint::Ln1Normalized(_) => Some("input_layernorm"),
                HookPoint::Ln2Normalized(_) => Some("post_attention_layernorm"),
                _ => None,
            };
            let x = name.map_or(x.shallow_clone(), |name| {
                let name = format!("model.layers.{layer}.{name}.weight");
                x * model.parameters().into_iter().find(|(known, _)| *known == name).unwrap().1
            });
            for part in 0..3 {
                let here: Vec<i64> = (0..n_tokens as i64).filter(|t| part_of(*t as usize) == part).collect();
                let here = Tensor::from_slice(&here);
                let (x, delta) = (x.index_select(0, &here), delta.index_select(0, &here));
                let of_b = delta.tr().matmul(&x.matmul(&pair.a.tr())) * pair.scaling;
                let of_a = delta.matmul(&pair.b).tr().matmul(&x) * pair.scaling;
                for (tensor, twin) in [(2 * at, of_a), (2 * at + 1, of_b)] {
                    let (ours, largest) = (found[tensor].get(part as i64), whole[tensor].abs().max().double_value(&[]));
                    let apart = (&ours - &twin).abs().max().double_value(&[]);
                    assert!(
                        largest > 0.0 && apart < 1e-10 * largest,
                        "{layer} {proj} part {part}: {apart} of {largest}"
                    );
                }
            }
        }
        for (found, whole) in found.iter().zip(&whole) {
            let apart = (found.sum_dim_intlist(0, false, Kind::Double) - whole).abs().max().double_value(&[]);
            assert!(apart < 1e-12 * (1.0 + whole.abs().max().double_value(&[])), "{apart}");
        }
        let short = parts.narrow(1, 0, 2);
        let error = model.lora_gradients_by_part(&batch, &targets, &ones, &adapter, &short).unwrap_err();
        assert!(error.to_string().starts_with("the parts of a gradient is"), "{error}");
    }

    #[test]
    fn log_probabilities_are_those_of_the_losses_tokens_in_order() {
        let (model, chat, adapter) = world();
        let row = chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap();
        let batch = Batch::of(&[&row], Device::Cpu).unwrap();
        let logits = model.forward(&batch, &mut Pass { adapter: Some(&adapter), ..Pass::default() }).unwrap();
        let whole = logits.squeeze_dim(0).log_softmax(-1, Kind::Float);
        let losses = [vec![2], vec![4, 1], vec![0]];
        for at_a_time in [0, 1, 2] {
            let mut found = vec![];
            let condition = Condition::adapted(&adapter);
            let mut keep = |some: OfLosses| {
                found.push(some.logprobs);
                Ok(())
            };
            if at_a_time == 0 {
                recorded(&model, &row, &condition, &losses, &mut keep).unwrap();
            } else {
                manual_backward(&model, &row, &condition, &losses, at_a_time, &mut keep).unwrap();
            }
            let found = Tensor::cat(&found, 0);
            for (at, k) in [2, 4, 1, 0].into_iter().enumerate() {
                let expected = whole.get((row.completion.start + k) as i64 - 1);
                assert!(
                    crate::laws::model_laws::max_diff(&found.get(at as i64), &expected)
                        < crate::laws::model_laws::SUM_ORDER,
                    "{at_a_time}, {k}"
                );
            }
        }
    }

    #[test]
    fn tokens_that_there_are_not_are_refused() {
        let (model, chat, adapter) = world();
        let row = chat.row(None, "Go on", &chat.encode("480").unwrap()).unwrap();
        let n = row.completion.len();
        for (losses, found) in [
            (vec![vec![0], vec![n]], format!("loss 1 of a row is [{n}]")),
            (vec![vec![]], "loss 0 of a row is []".into()),
        ] {
            let error = of_losses(&model, &row, &Condition::adapted(&adapter), &losses, &mut |_| Ok(())).unwrap_err();
            assert!(error.to_string().starts_with(&found), "{error}");
        }
    }

    #[test]
    fn losses_share_a_pass_as_memory_allows() {
        // 2²⁵ numbers without memory of their own: two losses' gradients are 2²⁶.
        let mut large = Adapter::empty(crate::LoraConfig::default(), 1);
        let half = || Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand([1 << 12, 1 << 12], false);
        large.set(0, Proj::Q, LoraPair { a: half(), b: half(), scaling: 1.0, scalings: None });
        assert_eq!([None, Some(&large)].map(|adapter| losses_at_a_time(100, adapter)), [40, 2]);
        assert_eq!(losses_at_a_time(5000, None), 1);
    }
}
