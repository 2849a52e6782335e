//! Gradients of a scalar at any tensor or hook point (reverse-mode differentiation, as `torch.autograd.grad`).

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

use tch::Tensor;

use crate::batch::Batch;
use crate::condition::Condition;
use crate::error::Result;
use crate::hook_point::HookPoint;
use crate::listen::Cache;
use crate::qwen::Qwen;
use crate::tap::Tap;
use crate::tokens::Prompt;

/// ∂loss/∂input of each input, shaped as it; zero where the loss does not depend on it. With `keep_graph` another loss of
/// the same pass can follow.
pub fn gradients<T: Borrow<Tensor>>(loss: &Tensor, inputs: &[T], keep_graph: bool) -> Result<Vec<Tensor>> {
    let inputs: Vec<&Tensor> = inputs.iter().map(Borrow::borrow).collect();
    let found = Tensor::f_run_backward(&[loss], &inputs, keep_graph, false)?;
    // What a loss does not depend on has no gradient at all, rather than a zero one.
    let defined = |(gradient, input): (Tensor, &&Tensor)| {
        if gradient.defined() { Ok(gradient) } else { Ok(input.f_zeros_like()?) }
    };
    found.into_iter().zip(&inputs).map(defined).collect()
}

/// A loss of one row, and what was seen and what it pulls at, at some hook points.
#[derive(Debug)]
pub struct AtPoints {
    /// The loss.
    pub loss: f64,
    /// The activations, `[1, pos, ..]` as their points' documentation says.
    pub activations: BTreeMap<HookPoint, Tensor>,
    /// ∂loss/∂activation, shaped as the activation.
    pub gradients: BTreeMap<HookPoint, Tensor>,
}

/// Runs one row and takes the gradient of a scalar function of its logits, `[1, pos, d_vocab]`, at some hook points, after
/// the condition's edits.
pub fn at_points(
    model: &Qwen,
    row: &Prompt,
    condition: &Condition<'_>,
    points: &[HookPoint],
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<AtPoints> {
    tch::with_grad(|| {
        let batch = Batch::of(&[row], model.device())?;
        let mut watch = Watch { wanted: points.iter().copied().collect(), cache: Cache::default() };
        let with_embed: Vec<HookPoint> = points.iter().copied().chain([HookPoint::Embed]).collect();
        let logits =
            condition.prepare(&[row], model, None)?.listen(model, &batch, &with_embed, &mut watch, Qwen::forward)?;
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

/// Keeps what it is to keep, and makes the embedding a leaf, so that gradients flow at every point though no weight asks
/// for one.
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
        // An edit that replaces all of it cuts the graph, which begins anew here.
        let x = if x.requires_grad() { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        self.cache.tap(at, x)
    }
}
