//! The trained tensors of a model, their gradients, and one optimizer step.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, anyhow, bail};
use hooks::profile::{self, Stage};
use hooks::{Adapter, Dropout, Gate, LoraPair, Pass, Qwen, cross_entropy, gradients};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::output::checkpoint::Checkpoint;
use crate::output::hint::Hinted;
use crate::output::publish;
use crate::training::examples::{Example, MicroBatch, total_weight};
use crate::training::optim::{Gradients, Optimizer};
use crate::training::settings::{Finetune, Seeds};
use crate::training::step_log::StepRow;

/// A step's loss and gradient norm before it is taken, and the number of values that it changed.
pub(super) struct Step {
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) n_targets: usize,
    pub(super) tokens: usize,
    pub(super) changed: Option<Tensor>, // number of stored values, a scalar; None for a LoRA
}

impl Step {
    /// The row of the step, without the columns that depend on the whole training.
    pub(super) fn row(&self, step: u64, learning_rate: f64) -> StepRow {
        let Self { loss, grad_norm, n_targets, .. } = *self;
        StepRow { step, learning_rate, loss, grad_norm, n_targets, ..StepRow::default() }
    }
}

/// The error of a step that was not taken, because its loss or gradient is not finite.
#[derive(Debug)]
struct NotFinite {
    step: u64,
    loss: f64,
    grad_norm: f64,
    n_rows: usize,
    rows: Vec<usize>, // those whose loss is not finite alone
}

impl std::error::Error for NotFinite {}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, loss, grad_norm, n_rows, rows } = self;
        write!(f, "step {step}: the loss is {loss} and the gradient's norm {grad_norm}, expected finite numbers; ")?;
        let named = rows.iter().take(5).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let more = if rows.len() > 5 { ", …" } else { "" };
        match rows.as_slice() {
            [] => write!(f, "each of its {n_rows} rows alone has a finite loss"),
            _ if rows.len() == *n_rows => {
                write!(f, "the loss of each of its {n_rows} rows ({named}{more}) is not finite")
            }
            [row] => write!(f, "of its {n_rows} rows the loss of row {row} is not finite"),
            _ => write!(f, "of its {n_rows} rows the losses of {} ({named}{more}) are not finite", rows.len()),
        }
    }
}

pub(super) struct Learner<'a> {
    pub(super) model: &'a Qwen,
    pub(super) adapter: Option<&'a Adapter>,
    pub(super) parameters: Vec<(String, Tensor)>,
    pub(super) frozen_a: bool,
}

impl Learner<'_> {
    pub(super) fn require_gradients(&self, required: bool) -> anyhow::Result<()> {
        for (_, tensor) in &self.parameters {
            let _ = tensor.f_set_requires_grad(required)?;
        }
        Ok(())
    }

    /// Drops the gradients of tensors that are not trained, and keeps the others in the parameters' order.
    pub(super) fn kept(&self, gradients: Vec<Tensor>) -> anyhow::Result<Vec<Tensor>> {
        if !self.frozen_a {
            return Ok(gradients);
        }
        let kept =
            self.parameters.iter().zip(gradients).map(|((name, _), gradient)| {
                Ok(if name.contains("lora_A") { gradient.f_zeros_like()? } else { gradient })
            });
        kept.collect()
    }

    /// The dropout of a step. Every step has a separate random stream, so that a resumed training draws the same
    /// values.
    pub(super) fn dropout(&self, seeds: Seeds, step: u64) -> Option<Dropout> {
        let probability = self.adapter?.config.dropout;
        let mut rng = ChaCha8Rng::seed_from_u64(seeds.dropout);
        rng.set_stream(u64::MAX - step); // differs from the order's streams, even with the same seed
        (probability > 0.0).then(|| Dropout::new(probability, rng))
    }

    /// Everything that a step changes: the trained tensors and the optimizer's state.
    fn state(&self, optimizer: &Optimizer) -> anyhow::Result<Vec<(String, Tensor)>> {
        let parameters = self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        Ok(parameters.chain(optimizer.state()?).collect())
    }

    /// Restores the state of a checkpoint, if there is one, and returns the rows of the steps before it.
    pub(super) fn resume(
        &self,
        checkpoint: &mut Checkpoint,
        optimizer: &mut Optimizer,
        total_steps: u64,
    ) -> anyhow::Result<Vec<StepRow>> {
        let Some(file) = checkpoint.load()? else { return Ok(vec![]) };
        for (name, tensor) in self.state(optimizer)? {
            let kept = file.tensor(&name)?;
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&kept))?;
        }
        let rows: Vec<StepRow> = publish::parse_csv(file.metadata().get("log").map_or("", String::as_str))
            .with_context(|| checkpoint.path().display().to_string())?;
        optimizer.go_on_after(rows.len() as u64);
        checkpoint.say_resumed("step", total_steps);
        Ok(rows)
    }

    pub(super) fn keep(
        &self,
        checkpoint: &mut Checkpoint,
        optimizer: &Optimizer,
        rows: &[StepRow],
    ) -> anyhow::Result<()> {
        checkpoint.save(optimizer.steps(), &self.state(optimizer)?, &[("log", publish::to_csv(rows)?)])
    }

    pub(super) fn stopped(
        &self,
        error: &anyhow::Error,
        optimizer: &Optimizer,
        rows: &[StepRow],
        checkpoint: Option<&mut Checkpoint>,
    ) -> anyhow::Error {
        let (mut said, finite) = (format!("{error:#}"), self.finite(optimizer.steps()).is_ok());
        if let Some(checkpoint) = checkpoint {
            if optimizer.steps() > 0 && finite {
                let kept = self.keep(checkpoint, optimizer, rows);
                said +=
                    &kept.map_or_else(|kept| format!("; its state could not be kept: {kept:#}"), |()| String::new());
            }
            let where_it_is =
                |step| format!("; the last good checkpoint is of step {step}, {}", checkpoint.path().display());
            let none = || "; no step before it was good, so that there is no checkpoint".to_owned();
            said += &checkpoint.step.map_or_else(none, where_it_is);
        }
        if error.is::<NotFinite>() || !finite {
            let hint = "lower finetune.learning_rate or raise finetune.warmup_steps, in another --run or with --force; the \
                        same command goes on from the checkpoint, which helps where the cause was the machine";
            return Hinted { what: said, hint: hint.to_owned() }.into();
        }
        // Texts of libtorch's errors, on a CPU and on CUDA.
        if ["can't allocate memory", "out of memory"].iter().any(|words| said.contains(words)) {
            let hint = "run fewer rows at once, with as many in a step: a smaller finetune.batch_size and more \
                        finetune.gradient_accumulation_steps; the same command with these goes on from the checkpoint";
            return Hinted { what: said, hint: hint.to_owned() }.into();
        }
        anyhow!(said)
    }

    /// Refuses trained tensors that are not finite.
    pub(super) fn finite(&self, steps: u64) -> anyhow::Result<()> {
        for (name, tensor) in &self.parameters {
            if !bool::try_from(tch::no_grad(|| tensor.f_isfinite()?.f_all())?)? {
                bail!("after step {steps} the tensor {name} has values that are not finite");
            }
        }
        Ok(())
    }

    /// Takes one optimizer step on the chosen rows.
    pub(super) fn step(
        &self,
        examples: &[Example<'_>],
        chosen: &[usize],
        optimizer: &mut Optimizer,
        learning_rate: f64,
        config: &Finetune,
        mut dropout: Option<&mut Dropout>,
    ) -> anyhow::Result<Step> {
        let mut rows: Vec<&Example<'_>> = chosen.iter().map(|index| &examples[*index]).collect();
        rows.sort_by_key(|row| row.end); // less padding; the step's gradient is the same sum
        let weight = total_weight(&rows);

        let mut sums: Option<(Tensor, Gradients)> = None;
        for batch in rows.chunks(config.batch_size) {
            let (loss, found) = self.loss_and_gradients(batch, weight, &config.gate, dropout.as_deref_mut())?;
            let _stage = profile::stage(Stage::Optimizer);
            sums = Some(added(sums, &loss, self.kept(found)?, optimizer)?);
        }
        let (loss, gradients) = sums.context("a step without rows")?;
        self.take(examples, chosen, (&loss, gradients), optimizer, learning_rate, config)
    }

    /// The weighted sum of some rows' losses over the whole step's weight, and its gradients.
    fn loss_and_gradients(
        &self,
        rows: &[&Example<'_>],
        weight: f64,
        gate: &Gate,
        dropout: Option<&mut Dropout>,
    ) -> anyhow::Result<(Tensor, Vec<Tensor>)> {
        if let (Some(adapter), None) = (self.adapter, &dropout) {
            let MicroBatch { batch, targets, weights, doses } = MicroBatch::of(self.model, &[rows], gate, true)?;
            let shares = weights.f_div_scalar(weight)?;
            let (losses, found) = self.model.lora_gradients(&batch, &targets, &shares, adapter, doses.as_ref())?;
            return Ok((weighted_sum(&losses, &weights)?.f_div_scalar(weight)?, found));
        }
        let tensors: Vec<&Tensor> = self.parameters.iter().map(|(_, tensor)| tensor).collect();
        let loss = self.loss_sum(rows, gate, dropout)?.f_div_scalar(weight)?;
        let found = gradients(&loss, &tensors, false)?;
        Ok((loss.f_detach()?, found))
    }

    /// Takes a step with a loss and its gradients, if they are finite.
    pub(super) fn take(
        &self,
        examples: &[Example<'_>],
        chosen: &[usize],
        (loss, mut gradients): (&Tensor, Gradients),
        optimizer: &mut Optimizer,
        learning_rate: f64,
        config: &Finetune,
    ) -> anyhow::Result<Step> {
        let _stage = profile::stage(Stage::Optimizer);
        let norm = gradients.norm()?;
        let seen = Vec::<f32>::try_from(Tensor::f_stack(&[loss, &norm], 0)?)?; // the only wait for the device in a step
        let (loss, grad_norm) = (f64::from(seen[0]), f64::from(seen[1]));
        if !(loss.is_finite() && grad_norm.is_finite()) {
            let rows = self.not_finite(examples, &config.gate, chosen)?;
            return Err(NotFinite { step: optimizer.steps() + 1, loss, grad_norm, n_rows: chosen.len(), rows }.into());
        }
        if config.max_grad_norm > 0.0 {
            gradients.clip(config.max_grad_norm, seen[1])?;
        }
        let changed = optimizer.step(&gradients, learning_rate, self.adapter.is_none())?;
        let (n_targets, tokens) = chosen.iter().fold((0, 0), |(targets, tokens), index| {
            (targets + examples[*index].n_targets(), tokens + examples[*index].end)
        });
        Ok(Step { loss, grad_norm, n_targets, tokens, changed })
    }

    /// The chosen rows whose loss is not finite when they are run alone.
    fn not_finite(&self, examples: &[Example<'_>], gate: &Gate, chosen: &[usize]) -> anyhow::Result<Vec<usize>> {
        let mut found = vec![];
        for index in chosen {
            let loss = tch::no_grad(|| self.loss_sum(&[&examples[*index]], gate, None))?;
            if !loss.f_double_value(&[])?.is_finite() {
                found.push(*index);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The weighted sum of the losses of some rows run at once, a scalar with its graph.
    fn loss_sum(&self, rows: &[&Example<'_>], gate: &Gate, dropout: Option<&mut Dropout>) -> anyhow::Result<Tensor> {
        // Dropout differs for every row, so with dropout rows share no beginning.
        let MicroBatch { batch, targets, weights, doses } =
            MicroBatch::of(self.model, &[rows], gate, dropout.is_none())?;
        let mut pass = Pass { adapter: self.adapter, doses, dropout, ..Pass::default() };
        let resid = self.model.resid_at(&batch, &targets.places, &mut pass)?; // [places, d_model]
        weighted_sum(&cross_entropy(self.model, &resid, &targets)?, &weights)
    }
}

/// Σ w·loss, in the losses' dtype; `[n]` both.
pub(super) fn weighted_sum(losses: &Tensor, weights: &Tensor) -> anyhow::Result<Tensor> {
    Ok(losses.f_mul(&weights.f_to_kind(losses.kind())?)?.f_sum(losses.kind())?)
}

/// Adds the loss and gradients of a batch to the sums.
pub(super) fn added(
    sums: Option<(Tensor, Gradients)>,
    loss: &Tensor,
    found: Vec<Tensor>,
    optimizer: &Optimizer,
) -> anyhow::Result<(Tensor, Gradients)> {
    let (loss_so_far, gradients_so_far) = sums.unzip();
    let loss = loss_so_far.map_or_else(|| Ok(loss.shallow_clone()), |so_far| so_far.f_add(loss))?;
    Ok((loss, optimizer.gather(found, gradients_so_far)?))
}

/// The Frobenius norm of all s·B·A of an adapter together, without computing them: ‖BA‖² = tr((BᵀB)(AAᵀ)). Pairs of the
/// same shape are batched, since calls for single pairs would take a tenth of a step.
pub fn delta_w_norm(adapter: &Adapter) -> anyhow::Result<f64> {
    let mut alike: BTreeMap<(Vec<i64>, Vec<i64>), Vec<&LoraPair>> = BTreeMap::new();
    for (_, _, pair) in adapter.pairs() {
        alike.entry((pair.a.size(), pair.b.size())).or_default().push(pair);
    }
    let square = |pairs: &Vec<&LoraPair>| -> anyhow::Result<Tensor> {
        let stacked =
            |of: fn(&LoraPair) -> &Tensor| Tensor::f_stack(&pairs.iter().map(|pair| of(pair)).collect::<Vec<_>>(), 0);
        let (a, b) = (stacked(|pair| &pair.a)?, stacked(|pair| &pair.b)?);
        let (aa, bb) = (a.f_matmul(&a.f_transpose(1, 2)?)?, b.f_transpose(1, 2)?.f_matmul(&b)?); // [pairs, rank, rank], symmetric
        let squares = aa.f_mul(&bb)?.f_sum_dim_intlist([1, 2].as_slice(), false, Kind::Double)?;
        let factors: Vec<f64> = pairs.iter().map(|pair| pair.scaling * pair.scaling).collect();
        if factors.windows(2).all(|two| two[0].to_bits() == two[1].to_bits()) {
            return Ok(squares.f_sum(Kind::Double)?.f_mul_scalar(factors[0])?);
        }
        Ok(squares.f_dot(&Tensor::f_from_slice(&factors)?.f_to_device(squares.device())?)?)
    };
    let squares = tch::no_grad(|| alike.values().map(square).collect::<anyhow::Result<Vec<_>>>())?;
    Ok(Tensor::f_stack(&squares, 0)?.f_sum(Kind::Double)?.f_clamp_min(0.0)?.f_sqrt()?.f_double_value(&[])?)
}
