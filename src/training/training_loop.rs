//! The loop of a training. The same loop trains a LoRA or the whole model: it updates "the trained tensors".
//!
//! A step's loss is the weighted sum of its targets' losses over the sum of their weights, for any division into
//! micro-batches (never a mean of means).

use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use hooks::{Adapter, Error, Qwen, Sequence};

use crate::data::soft_labels::SoftRow;
use crate::hinted;
use crate::output::checkpoint::Checkpoint;
use crate::training::examples::{EpochOrder, Example};
use crate::training::learner::{Learner, Step, delta_w_norm};
use crate::training::optim::{Optimizer, Schedule};
use crate::training::settings::{Finetune, Loss, OptimizerKind, Seeds, TargetTokens};
use crate::training::step_log::{Log, Progress, StepRow};

/// A training: the model, the rows and the settings.
pub struct Training<'a> {
    /// The model, which is not changed if there is an adapter.
    pub model: &'a Qwen,
    /// The adapter, trained in place; `None` trains all weights of the model.
    pub adapter: Option<&'a Adapter>,
    /// Rows of the chat.
    pub rows: &'a [Sequence],
    /// Per row and token, the weight of its loss: 0 for a token that is not learned from, and 1 for all if `None`. The
    /// mask of the settings chooses among them.
    pub weights: Option<&'a [Vec<f64>]>,
    /// The soft labels of the rows, if the loss is the divergence from them.
    pub soft: Option<&'a [SoftRow]>,
    /// Whether a token is a digit.
    pub is_digit: &'a dyn Fn(i64) -> bool,
    /// The settings.
    pub config: &'a Finetune,
    /// The seeds of its random streams.
    pub seeds: Seeds,
    /// Whether the training ends before its last step, asked with the number of steps that are done.
    pub until: Option<&'a dyn Fn(u64) -> anyhow::Result<bool>>,
    /// The checkpoint of its state. The training records its inputs, except the model: the caller adds that, and
    /// removes the checkpoint at the end.
    pub checkpoint: Option<&'a mut Checkpoint>,
}

/// What an optimizer step did.
pub struct Taken<'t> {
    /// The step's rows, by index.
    pub rows: &'t [usize],
    /// Its learning rate.
    pub learning_rate: f64,
    /// Norm of its gradient before clipping.
    pub grad_norm: f64,
    /// The trained tensors after it.
    pub parameters: &'t [(String, tch::Tensor)],
    /// The optimizer after it.
    pub optimizer: &'t Optimizer,
}

/// Called after each step.
pub type Recorder<'r> = &'r mut dyn FnMut(&Taken<'_>) -> anyhow::Result<()>;

impl<'a> Training<'a> {
    /// Trains from the beginning, or continues from the checkpoint. The result is the same, to the last bit.
    pub fn run(self, log: Log<'_>) -> anyhow::Result<()> {
        self.recorded(log, &mut |_| Ok(()))
    }

    /// Trains as [`Self::run`]. After each step `record` is called with what it did.
    pub fn recorded(self, log: Log<'_>, record: Recorder<'_>) -> anyhow::Result<()> {
        let mut running = self.begin()?;
        running.learner.require_gradients(true)?;
        let result = running.run(log, record);
        running.learner.require_gradients(false)?;
        result
    }

    pub(super) fn begin(mut self) -> anyhow::Result<Loop<'a>> {
        let config = self.config;
        if self.adapter.is_some() && config.gate.is_nowhere() {
            bail!(
                "gate is nowhere, so nothing can be learned; set the gate of the finetuning to the tokens where the adapter acts"
            );
        }
        if let Some(adapter) = self.adapter {
            config.gate.check(adapter)?;
        }
        if self.adapter.is_none() && !config.gate.is_everywhere() {
            bail!("gate is {}, but full finetuning has no adapter to gate; leave the gate out", config.gate);
        }
        config.check()?;
        if self.adapter.is_none() && config.frozen_a {
            bail!("frozen_a is true, but full finetuning has no A; leave it out");
        }
        if self.adapter.is_none() && config.optimizer == OptimizerKind::Muon {
            bail!(hinted!("optimizer is muon, which trains matrices, but all weights are not"; "adamw, or a LoRA"));
        }
        if self.rows.is_empty() {
            bail!("the training data has no rows; generate some first, or let the filter keep more");
        }
        if (config.tokens != TargetTokens::All || config.weights.is_some()) && self.weights.is_none() {
            bail!("tokens is not all, or weights is set, but nobody said what each token weighs");
        }
        if (config.loss == Loss::Kl) != self.soft.is_some() {
            bail!(
                "loss is {:?}, which {} soft labels",
                config.loss,
                if self.soft.is_some() { "has no" } else { "needs" }
            );
        }
        self.model.config.check_context("row", self.rows.iter().map(|row| row.ids.len()), 0)?;
        let weights = |at: usize| self.weights.and_then(|weights| weights.get(at)).map(Vec::as_slice);
        let soft = |at: usize| self.soft.and_then(|soft| soft.get(at));
        let example = |(at, row)| Example::of(row, at, self.is_digit, config, weights(at), soft(at));
        let examples = self.rows.iter().enumerate().map(example);
        let examples = examples.collect::<anyhow::Result<Vec<_>>>().map_err(|error| match error.downcast_ref() {
            Some(Error::EmptyLossMask { .. }) => {
                anyhow!(hinted!("{error}"; "choose another finetune.mask, or leave the row out"))
            }
            _ => error,
        })?;
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.depends_on("rows", &self.rows)?;
            checkpoint.depends_on("weights", &self.weights)?;
            checkpoint.depends_on("soft", &self.soft)?;
            // With dropout, the division into batches changes the result.
            let has_dropout = self.adapter.is_some_and(|adapter| adapter.config.dropout > 0.0);
            let exact = Finetune { save_steps: None, ..config.clone() };
            checkpoint.depends_on("finetune", &if has_dropout { exact } else { config.up_to_rounding() })?;
            checkpoint.depends_on("seeds", &self.seeds)?;
        }
        let parameters = self.adapter.map_or_else(|| self.model.parameters(), Adapter::parameters);
        let optimizer = Optimizer::new(config.rule(), &parameters, config.masters)?;
        let learner = Learner { model: self.model, adapter: self.adapter, parameters, frozen_a: config.frozen_a };
        let total_steps = config.total_steps(examples.len());
        let schedule = Schedule { kind: config.lr_scheduler_type, warmup_steps: config.warmup_steps, total_steps };
        let (seeds, until, checkpoint, start) = (self.seeds, self.until, self.checkpoint, Instant::now());
        let (rows, tokens, order) = (vec![], 0, EpochOrder::new(config, examples.len(), seeds.order));
        Ok(Loop {
            learner,
            examples,
            optimizer,
            config,
            seeds,
            until,
            schedule,
            checkpoint,
            rows,
            order,
            start,
            tokens,
        })
    }
}

/// Trains an adapter in place on rows of the chat, without a checkpoint. The model is not changed.
pub fn finetune_lora(
    model: &Qwen,
    adapter: &Adapter,
    rows: &[Sequence],
    is_digit: &dyn Fn(i64) -> bool,
    config: &Finetune,
    seeds: Seeds,
    log: Log<'_>,
) -> anyhow::Result<()> {
    Training {
        model,
        adapter: Some(adapter),
        rows,
        weights: None,
        soft: None,
        is_digit,
        config,
        seeds,
        until: None,
        checkpoint: None,
    }
    .run(log)
}

/// Trains all weights of the model in place, without a checkpoint; with `config.masters`, through copies in f32.
pub fn finetune_full(
    model: &Qwen,
    rows: &[Sequence],
    is_digit: &dyn Fn(i64) -> bool,
    config: &Finetune,
    seeds: Seeds,
    log: Log<'_>,
) -> anyhow::Result<()> {
    Training {
        model,
        adapter: None,
        rows,
        weights: None,
        soft: None,
        is_digit,
        config,
        seeds,
        until: None,
        checkpoint: None,
    }
    .run(log)
}

pub(super) struct Loop<'a> {
    pub(super) learner: Learner<'a>,
    pub(super) examples: Vec<Example<'a>>,
    pub(super) optimizer: Optimizer,
    pub(super) config: &'a Finetune,
    pub(super) seeds: Seeds,
    pub(super) until: Option<&'a dyn Fn(u64) -> anyhow::Result<bool>>,
    pub(super) schedule: Schedule,
    pub(super) checkpoint: Option<&'a mut Checkpoint>,
    pub(super) rows: Vec<StepRow>, // of the steps so far
    pub(super) order: EpochOrder,
    pub(super) start: Instant,
    pub(super) tokens: u64, // run since `start`
}

impl Loop<'_> {
    fn run(&mut self, log: Log<'_>, record: Recorder<'_>) -> anyhow::Result<()> {
        self.resume(log)?;
        while let Some(chosen) = self.next()? {
            let (learning_rate, steps) = (self.learning_rate(), self.optimizer.steps());
            let mut dropout = self.learner.dropout(self.seeds, steps);
            let Self { learner, examples, optimizer, config, .. } = self;
            let done = learner.step(examples, &chosen, optimizer, learning_rate, config, dropout.as_mut());
            let grad_norm = done.as_ref().map_or(f64::NAN, |step| step.grad_norm);
            self.after(learning_rate, done, log)?;
            let (parameters, optimizer) = (self.learner.parameters.as_slice(), &self.optimizer);
            record(&Taken { rows: &chosen, learning_rate, grad_norm, parameters, optimizer })?;
        }
        Ok(())
    }

    /// Continues from the checkpoint, if there is one, and repeats the rows of earlier steps to the log.
    pub(super) fn resume(&mut self, log: Log<'_>) -> anyhow::Result<()> {
        let total_steps = self.last_step();
        if let Some(checkpoint) = &mut self.checkpoint {
            self.rows = self.learner.resume(checkpoint, &mut self.optimizer, total_steps)?;
        }
        if self.rows.is_empty() && self.config.optimizer == OptimizerKind::Preconditioned {
            self.scout()?;
        }
        for row in &self.rows {
            log(row, &Progress { step: row.step, total_steps, tokens: 0, tokens_per_second: 0.0 })?;
        }
        Ok(())
    }

    /// Finds the scales by an epoch of `AdamW`, whose steps are then undone.
    fn scout(&mut self) -> anyhow::Result<()> {
        let parameters = &self.learner.parameters;
        let start =
            parameters.iter().map(|(_, tensor)| Ok(tensor.f_detach_copy()?)).collect::<Result<Vec<_>, Error>>()?;
        let scouting = self.config.rule_of(OptimizerKind::AdamW);
        self.optimizer = Optimizer::new(scouting, parameters, self.config.masters)?;
        for _ in 0..self.steps_per_epoch().min(self.last_step()) {
            let chosen = self.next()?.context("an epoch without steps")?;
            let (learning_rate, steps) = (self.learning_rate(), self.optimizer.steps());
            let mut dropout = self.learner.dropout(self.seeds, steps);
            let Self { learner, examples, optimizer, config, .. } = self;
            learner.step(examples, &chosen, optimizer, learning_rate, config, dropout.as_mut())?;
        }
        for ((_, tensor), start) in self.learner.parameters.iter().zip(&start) {
            tch::no_grad(|| tensor.shallow_clone().f_copy_(start))?;
        }
        let optimizer = Optimizer::new(self.config.rule(), &self.learner.parameters, self.config.masters)?;
        let scout = std::mem::replace(&mut self.optimizer, optimizer);
        self.optimizer.take_scales(scout)?;
        Ok(())
    }

    fn last_step(&self) -> u64 {
        self.config.stop_after_steps.unwrap_or(u64::MAX).min(self.schedule.total_steps)
    }

    fn steps_per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.config.rows_per_step()) as u64
    }

    /// The examples of the next step; `None` if the training is done.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Vec<usize>>> {
        let steps = self.optimizer.steps();
        let is_ended = self.until.filter(|_| steps > 0).map_or(Ok(false), |until| until(steps))?;
        if is_ended || steps == self.last_step() {
            return match self.learner.finite(steps) {
                Ok(()) => Ok(None),
                Err(error) => Err(self.stopped(&error)),
            };
        }
        Ok(Some(self.order.of_step(steps)))
    }

    pub(super) fn learning_rate(&self) -> f64 {
        self.config.learning_rate * self.schedule.factor(self.optimizer.steps())
    }

    /// Finishes a step: logs its row, and writes a checkpoint if one is due.
    pub(super) fn after(&mut self, learning_rate: f64, done: anyhow::Result<Step>, log: Log<'_>) -> anyhow::Result<()> {
        let done = done.map_err(|error| self.stopped(&error))?;
        let (step, adapter) = (self.optimizer.steps(), self.learner.adapter);
        let changed = done.changed.as_ref().map(|changed| changed.f_double_value(&[])).transpose()?;
        let n_weights: usize = self.learner.parameters.iter().map(|(_, tensor)| tensor.numel()).sum();
        let row = StepRow {
            epoch: step as f64 / self.steps_per_epoch() as f64,
            delta_w_norm: adapter.map(delta_w_norm).transpose()?,
            changed_fraction: changed.map(|changed| changed / n_weights as f64),
            ..done.row(step, learning_rate)
        };
        self.tokens += done.tokens as u64;
        let (total_steps, tokens) = (self.last_step(), self.tokens);
        let tokens_per_second = tokens as f64 / self.start.elapsed().as_secs_f64().max(1e-9);
        log(&row, &Progress { step, total_steps, tokens, tokens_per_second })?;
        self.rows.push(row);
        let save_steps = self.config.save_steps;
        let is_due = self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.is_due(step, save_steps));
        if is_due && step < total_steps {
            // A state that is not finite must not replace the last good checkpoint.
            self.learner.finite(step).map_err(|error| self.stopped(&error))?;
            if let Some(checkpoint) = &mut self.checkpoint {
                self.learner.keep(checkpoint, &self.optimizer, &self.rows)?;
            }
        }
        Ok(())
    }

    /// The error of a step that could not be taken. It saves the last good state and names the file.
    fn stopped(&mut self, error: &anyhow::Error) -> anyhow::Error {
        self.learner.stopped(error, &self.optimizer, &self.rows, self.checkpoint.as_deref_mut())
    }
}
