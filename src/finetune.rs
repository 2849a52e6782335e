//! Finetuning, in order: the examples of a step, the step, its line in `train.csv`.
//!
//! One loop trains a LoRA and the whole model: it moves "the trained tensors". A step's loss is the sum of its targets'
//! losses over their number, however the rows fall into micro-batches (never the mean of means).

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use hooks::dose::Doses;
use hooks::gate::Gate;
use hooks::gradient::gradients;
use hooks::lora::{Adapter, Dropout, LoraPair};
use hooks::loss::{Targets, cross_entropy_sum};
use hooks::packing::Row;
use hooks::pass::Pass;
use hooks::profile::{self, Stage};
use hooks::qwen::Qwen;
use hooks::tokens::{LossMask, Prompt};
use hooks::{Batch, Error};

use crate::checkpoint::Checkpoint;
pub use crate::optim::ScheduleKind;
use crate::optim::{Gradients, Optimizer, Rule, Schedule};
use crate::publish;
pub use together::{LogOf, finetune_together};

mod together;

/// Which optimizer moves the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`.
    #[default]
    AdamW,
    /// Gradient descent with momentum, as `torch.optim.SGD`.
    Sgd,
    /// Descent by the gradient's sign (Bernstein et al. 2018): Adam without its averages.
    SignSgd,
    /// Adam's division without its momentum, as `torch.optim.RMSprop` with α = `adam_beta2`.
    RmsProp,
    /// Steps of singular values about 1 (Jordan et al. 2024), as `torch.optim.Muon`.
    Muon,
    /// SGD with Adam's scales after an epoch, kept fixed (Blank et al. 2026): Adam's scales without its adapting.
    Preconditioned,
}

/// Which of the mask's tokens are learned from. All kinds but `All` leave out rows without a divergent token, and rows
/// with no other, so that they learn from the same rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tokens {
    /// All.
    #[default]
    All,
    /// The divergent ones, by the definition of the divergence measurement: by default the teacher's most likely token,
    /// and not the base's (Schrodi et al. 2026).
    Divergent,
    /// The others.
    NotDivergent,
    /// As many as a row has divergent ones, drawn from all.
    Random,
    /// All, of the rows that have divergent tokens and others.
    AllOfThose,
}

/// How a model is finetuned, in the names of Hugging Face's Trainer. The default is the LoRA column of Nief et al. 2026.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Finetune {
    /// `adamw`, `sgd`, `signsgd`, `rmsprop`, `muon`, or `preconditioned`: SGD over √(v + 1e-8), with v from an epoch of
    /// `adamw` from the same start, whose steps are taken back.
    pub optimizer: OptimizerKind,
    /// The learning rate after warmup.
    pub learning_rate: f64,
    /// Decay: decoupled from the gradient for `adamw` and `muon`, added to it for the others.
    pub weight_decay: f64,
    /// `AdamW`'s average of the gradient.
    pub adam_beta1: f64,
    /// The average of the squared gradient of `AdamW` and `RMSProp`.
    pub adam_beta2: f64,
    /// What both add under the division.
    pub adam_epsilon: f64,
    /// The momentum of SGD and Muon.
    pub momentum: f64,
    /// `linear`, `cosine` or `constant`.
    pub lr_scheduler_type: ScheduleKind,
    /// Steps over which the learning rate rises from zero.
    pub warmup_steps: u64,
    /// How often every row is seen; parts of an epoch count. Without effect where `max_steps` is set.
    pub num_train_epochs: f64,
    /// How many optimizer steps are taken.
    pub max_steps: Option<u64>,
    /// The step after which the training ends although the schedule continues, for a student from the middle of a
    /// training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_after_steps: Option<u64>,
    /// Rows that are run at once.
    pub batch_size: usize,
    /// Batches whose gradients make one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Longer gradients are shortened to this length; 0 turns that off.
    pub max_grad_norm: f64,
    /// Which tokens are learned from.
    pub mask: LossMask,
    /// Which of these are learned from: `all`, or `divergent` (by `measure.divergence.definition`), `not_divergent`,
    /// `random` (as many as are divergent, drawn anew in each row), `all_of_those` (all, of the rows that have
    /// divergent tokens and others).
    pub tokens: Tokens,
    /// Where and how strongly the LoRA acts while it is trained.
    pub gate: Gate,
    /// Whether the LoRA's A stays as it was drawn, and B alone is trained.
    pub frozen_a: bool,
    /// Whether weights that are not in f32 are trained through a copy in f32.
    pub masters: bool,
    /// Steps between checkpoints, from which a killed training continues. By default they are at least ten seconds
    /// apart, and take at most a fiftieth of the time. They change no result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_steps: Option<u64>,
}

impl Default for Finetune {
    fn default() -> Self {
        Self {
            optimizer: OptimizerKind::AdamW,
            learning_rate: 2e-4,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            momentum: 0.0,
            lr_scheduler_type: ScheduleKind::Linear,
            warmup_steps: 5,
            num_train_epochs: 3.0,
            max_steps: None,
            stop_after_steps: None,
            batch_size: 22,
            gradient_accumulation_steps: 3,
            max_grad_norm: 1.0,
            mask: LossMask::ContentEot,
            tokens: Tokens::All,
            gate: Gate::default(),
            frozen_a: false,
            masters: true,
            save_steps: None,
        }
    }
}

impl Finetune {
    /// Refuses numbers that nothing can be trained with.
    pub fn check(&self) -> hooks::Result<()> {
        let share = |x: f64| (0.0..1.0).contains(&x);
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let checks = [
            ("learning_rate", positive(self.learning_rate), "a positive number", self.learning_rate),
            ("weight_decay", not_negative(self.weight_decay), "a number of at least 0", self.weight_decay),
            ("adam_beta1", share(self.adam_beta1), "at least 0 and less than 1", self.adam_beta1),
            ("adam_beta2", share(self.adam_beta2), "at least 0 and less than 1", self.adam_beta2),
            ("adam_epsilon", positive(self.adam_epsilon), "a positive number", self.adam_epsilon),
            ("momentum", share(self.momentum), "at least 0 and less than 1", self.momentum),
            (
                "num_train_epochs",
                self.max_steps.is_some() || positive(self.num_train_epochs),
                "a positive number",
                self.num_train_epochs,
            ),
            ("max_steps", self.max_steps != Some(0), "at least 1", 0.0),
            ("stop_after_steps", self.stop_after_steps != Some(0), "at least 1", 0.0),
            ("save_steps", self.save_steps != Some(0), "at least 1", 0.0),
            ("batch_size", self.batch_size > 0, "at least 1", 0.0),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps > 0, "at least 1", 0.0),
            (
                "weight_decay",
                !self.frozen_a || self.weight_decay == 0.0,
                "0 where frozen_a is true, as it would shrink A",
                self.weight_decay,
            ),
            (
                "max_grad_norm",
                not_negative(self.max_grad_norm),
                "a number of at least 0 (0: no clipping)",
                self.max_grad_norm,
            ),
        ];
        match checks.into_iter().find(|(_, holds, _, _)| !holds) {
            None => Ok(()),
            Some((key, _, expected, found)) => {
                Err(Error::Invalid { what: key.to_owned(), expected: expected.to_owned(), found: found.to_string() })
            }
        }
    }

    /// Rows that one optimizer step learns from; the last step of an epoch may have fewer.
    pub fn rows_per_step(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }

    /// How many optimizer steps a run over `n_rows` rows has.
    pub fn total_steps(&self, n_rows: usize) -> u64 {
        let steps_per_epoch = n_rows.div_ceil(self.rows_per_step());
        self.max_steps.unwrap_or_else(|| (self.num_train_epochs * steps_per_epoch as f64).ceil() as u64)
    }

    /// The number of steps that are taken.
    fn last_step(&self, n_rows: usize) -> u64 {
        self.stop_after_steps.unwrap_or(u64::MAX).min(self.total_steps(n_rows))
    }

    fn rule(&self) -> Rule {
        self.rule_of(self.optimizer)
    }

    fn rule_of(&self, optimizer: OptimizerKind) -> Rule {
        let Self { adam_beta1: beta1, adam_beta2: beta2, adam_epsilon: epsilon, weight_decay, momentum, .. } = *self;
        match optimizer {
            OptimizerKind::AdamW => Rule::AdamW { beta1, beta2, epsilon, weight_decay },
            OptimizerKind::Sgd => Rule::Sgd { momentum, weight_decay },
            OptimizerKind::SignSgd => Rule::SignSgd { weight_decay },
            OptimizerKind::RmsProp => Rule::RmsProp { alpha: beta2, epsilon, weight_decay },
            OptimizerKind::Muon => Rule::Muon { momentum, weight_decay },
            OptimizerKind::Preconditioned => Rule::Preconditioned { weight_decay },
        }
    }
}

/// The seeds of a finetuning, each of a random stream of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Seeds {
    /// For the LoRA's A; used by the caller of `Adapter::init`.
    pub init: u64,
    /// For the order of the rows in each epoch.
    pub order: u64,
    /// For the LoRA's dropout.
    pub dropout: u64,
}

impl Default for Seeds {
    fn default() -> Self {
        Self { init: 42, order: 42, dropout: 42 }
    }
}

/// A line of `train.csv`: one optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// How many optimizer steps are done, this one included.
    pub step: u64,
    /// How many epochs are done after this step: passes over all rows, with its fraction.
    pub epoch: f64,
    /// The learning rate of this step, after warm-up and schedule.
    pub learning_rate: f64,
    /// Mean negative log-likelihood (nats) of the step's targets, before the step.
    pub loss: f64,
    /// Norm of the whole gradient of the loss before clipping, in nats per unit of the parameters.
    pub grad_norm: f64,
    /// Number of tokens learned from.
    pub n_targets: usize,
    /// Frobenius norm of all the LoRA's weight changes s·B·A together, after the step, in units of the weights; empty in
    /// full finetuning.
    pub delta_w_norm: Option<f64>,
    /// Share of the stored weights that the step changed, 0 to 1; empty for a LoRA.
    pub changed_fraction: Option<f64>,
}

/// A line of `train_rows.csv`: the rows of one optimizer step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRowsRow {
    /// The optimizer step, from 1, as in `train.csv`.
    pub step: u64,
    /// The step's rows in the order in which they were drawn, as their `id` in `data/numbers.jsonl` (for the control
    /// student in `data/control.jsonl`), separated by spaces.
    pub row_ids: String,
}

/// The rows of each step of a training over `n_rows` rows, by index, in the order in which they are drawn.
pub fn rows_by_step(config: &Finetune, n_rows: usize, order_seed: u64) -> Vec<Vec<usize>> {
    let mut order = Order::new(config, n_rows, order_seed);
    (0..config.last_step(n_rows)).map(|step| order.of_step(step)).collect()
}

/// The mean loss per target of the first and of the last quarter of the steps: single steps are noisy.
pub fn first_and_last_quarter(rows: &[StepRow]) -> Option<(f64, f64)> {
    let quarter = rows.len().div_ceil(4);
    let mean = |rows: &[StepRow]| {
        let targets: usize = rows.iter().map(|row| row.n_targets).sum();
        rows.iter().map(|row| row.loss * row.n_targets as f64).sum::<f64>() / targets as f64
    };
    (!rows.is_empty()).then(|| (mean(&rows[..quarter]), mean(&rows[rows.len() - quarter..])))
}

/// How far a finetuning is and how fast; never written to a file, since no two runs share it.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// How many optimizer steps are done.
    pub step: u64,
    /// How many there will be.
    pub total_steps: u64,
    /// Tokens run through the model so far.
    pub tokens: u64,
    /// Tokens per second, of this run so far.
    pub tokens_per_second: f64,
}

/// Called after each step with its line and the speed. A resumed training first repeats the lines of earlier steps.
pub type Log<'a> = &'a mut dyn FnMut(&StepRow, &Progress) -> anyhow::Result<()>;

/// A training: what learns, from what, how.
pub struct Training<'a> {
    /// The model; it stays as it is where there is an adapter.
    pub model: &'a Qwen,
    /// The adapter, trained in place; `None` trains all weights of the model.
    pub adapter: Option<&'a Adapter>,
    /// Rows of the chat.
    pub rows: &'a [Prompt],
    /// Per row and token, whether it may be learned from; all may where there is none.
    pub only: Option<&'a [Vec<bool>]>,
    /// Which tokens are digits.
    pub is_digit: &'a dyn Fn(i64) -> bool,
    /// How it is trained.
    pub config: &'a Finetune,
    /// The seeds of its random streams.
    pub seeds: Seeds,
    /// Where its state is kept. The training records what it depends on, except the model: the caller adds that, and
    /// removes the checkpoint at the end.
    pub checkpoint: Option<&'a mut Checkpoint>,
}

impl<'a> Training<'a> {
    /// Trains from the beginning, or from the checkpoint on; the result is the same, bit by bit.
    pub fn run(self, log: Log<'_>) -> anyhow::Result<()> {
        let mut course = self.begin()?;
        course.learner.require_gradients(true)?;
        let result = course.run(log);
        course.learner.require_gradients(false)?;
        result
    }

    fn begin(mut self) -> anyhow::Result<Course<'a>> {
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
            bail!("optimizer is muon, which trains matrices, but all weights are not; hint: adamw, or a LoRA");
        }
        if self.rows.is_empty() {
            bail!("the training data has no rows; generate some first, or let the filter keep more");
        }
        if config.tokens != Tokens::All && self.only.is_none() {
            bail!("tokens is not all, but nobody said which ones these are");
        }
        self.model.config.check_context("row", self.rows.iter().map(|row| row.ids.len()), 0)?;
        let only = |at: usize| self.only.and_then(|only| only.get(at)).map(Vec::as_slice);
        let example = |(at, row)| Example::of(row, at, self.is_digit, config, only(at));
        let examples = self.rows.iter().enumerate().map(example);
        let examples = examples.collect::<anyhow::Result<Vec<_>>>().map_err(|error| match error.downcast_ref() {
            Some(Error::EmptyLossMask { .. }) => {
                anyhow!("{error}; hint: choose another finetune.mask, or leave the row out")
            }
            _ => error,
        })?;
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.depends_on("rows", &self.rows)?;
            checkpoint.depends_on("only", &self.only)?;
            checkpoint.depends_on("finetune", &Finetune { save_steps: None, ..config.clone() })?;
            checkpoint.depends_on("seeds", &self.seeds)?;
        }
        let parameters = self.adapter.map_or_else(|| self.model.parameters(), Adapter::parameters);
        let optimizer = Optimizer::new(config.rule(), &parameters, config.masters)?;
        let learner = Learner { model: self.model, adapter: self.adapter, parameters, frozen_a: config.frozen_a };
        let total_steps = config.total_steps(examples.len());
        let schedule = Schedule { kind: config.lr_scheduler_type, warmup_steps: config.warmup_steps, total_steps };
        let (seeds, checkpoint, start) = (self.seeds, self.checkpoint, Instant::now());
        let (rows, tokens, order) = (vec![], 0, Order::new(config, examples.len(), seeds.order));
        Ok(Course { learner, examples, optimizer, config, seeds, schedule, checkpoint, rows, order, start, tokens })
    }
}

/// Trains an adapter in place on rows of the chat; the model stays as it is. No checkpoint is kept.
pub fn finetune_lora(
    model: &Qwen,
    adapter: &Adapter,
    rows: &[Prompt],
    is_digit: &dyn Fn(i64) -> bool,
    config: &Finetune,
    seeds: Seeds,
    log: Log<'_>,
) -> anyhow::Result<()> {
    Training { model, adapter: Some(adapter), rows, only: None, is_digit, config, seeds, checkpoint: None }.run(log)
}

/// Trains all weights of the model in place, with `config.masters` through copies in f32. No checkpoint is kept.
pub fn finetune_full(
    model: &Qwen,
    rows: &[Prompt],
    is_digit: &dyn Fn(i64) -> bool,
    config: &Finetune,
    seeds: Seeds,
    log: Log<'_>,
) -> anyhow::Result<()> {
    Training { model, adapter: None, rows, only: None, is_digit, config, seeds, checkpoint: None }.run(log)
}

/// What the next step of a training from scratch is made of.
pub struct NextStep {
    /// Its rows; each is seen once.
    pub rows: Vec<Prompt>,
    /// Its learning rate.
    pub learning_rate: f64,
}

/// Trains all weights on rows that are drawn step by step: `next` gets the last step and returns the next one, or
/// `None` at the end. Of `config` only the optimizer, the mask, clipping and `batch_size` are used.
pub fn pretrain(
    model: &Qwen,
    is_digit: &dyn Fn(i64) -> bool,
    config: &Finetune,
    next: &mut dyn FnMut(Option<&StepRow>) -> anyhow::Result<Option<NextStep>>,
) -> anyhow::Result<()> {
    let learner = Learner { model, adapter: None, parameters: model.parameters(), frozen_a: false };
    let mut optimizer = Optimizer::new(config.rule(), &learner.parameters, config.masters)?;
    learner.require_gradients(true)?;
    let mut last: Option<StepRow> = None;
    while let Some(NextStep { rows, learning_rate }) = next(last.as_ref())? {
        let examples = rows.iter().enumerate().map(|(index, row)| Example::of(row, index, is_digit, config, None));
        let examples = examples.collect::<anyhow::Result<Vec<_>>>()?;
        let chosen: Vec<usize> = (0..examples.len()).collect();
        let done = learner.step(&examples, &chosen, &mut optimizer, learning_rate, config, None)?;
        last = Some(StepRow {
            step: optimizer.steps(),
            epoch: 0.0,
            learning_rate,
            loss: done.loss,
            grad_norm: done.grad_norm,
            n_targets: done.n_targets,
            delta_w_norm: None,
            changed_fraction: None,
        });
    }
    learner.require_gradients(false)
}

/// A row made ready: checked once, before the first step.
struct Example<'a> {
    ids: &'a [i64],
    mask: Vec<bool>,
    doses: Option<Vec<f64>>, // how strongly the adapter acts; 1 everywhere if None
    n_targets: usize,
    end: usize, // the last target: nothing from here on needs to be run
}

impl<'a> Example<'a> {
    fn of(
        row: &'a Prompt,
        index: usize,
        is_digit: &dyn Fn(i64) -> bool,
        config: &Finetune,
        only: Option<&[bool]>,
    ) -> anyhow::Result<Self> {
        let mut mask = config.mask.targets(row, is_digit);
        if let Some(only) = only {
            mask.iter_mut().zip(only).for_each(|(counts, may)| *counts &= may);
        }
        let empty = || Error::EmptyLossMask { mask: config.mask.to_string(), row: index };
        let end = mask.iter().rposition(|counts| *counts).ok_or_else(empty)?;
        let doses = if config.gate.is_everywhere() {
            None
        } else {
            let mut doses = config.gate.doses(row).with_context(|| format!("row {index} of the training data"))?;
            doses.truncate(end);
            if doses.iter().all(|dose| *dose == 0.0) && !config.gate.acts_elsewhere() {
                bail!(
                    "row {index} of the training data: gate {} lets the adapter act at no token that a learned one depends on, so \
                     nothing can be learned from it; hint: another finetune.gate or finetune.mask",
                    config.gate
                );
            }
            Some(doses)
        };
        let n_targets = mask.iter().filter(|counts| **counts).count();
        Ok(Self { ids: &row.ids, mask, doses, n_targets, end })
    }
}

/// A training under way.
struct Course<'a> {
    learner: Learner<'a>,
    examples: Vec<Example<'a>>,
    optimizer: Optimizer,
    config: &'a Finetune,
    seeds: Seeds,
    schedule: Schedule,
    checkpoint: Option<&'a mut Checkpoint>,
    rows: Vec<StepRow>, // of the steps so far
    order: Order,
    start: Instant,
    tokens: u64, // run since then
}

impl Course<'_> {
    fn run(&mut self, log: Log<'_>) -> anyhow::Result<()> {
        self.resume(log)?;
        while let Some(chosen) = self.next()? {
            let (learning_rate, steps) = (self.learning_rate(), self.optimizer.steps());
            let mut dropout = self.learner.dropout(self.seeds, steps);
            let Self { learner, examples, optimizer, config, .. } = self;
            let done = learner.step(examples, &chosen, optimizer, learning_rate, config, dropout.as_mut());
            self.after(learning_rate, done, log)?;
        }
        Ok(())
    }

    /// Continues from the checkpoint, if there is one, and repeats the lines of earlier steps.
    fn resume(&mut self, log: Log<'_>) -> anyhow::Result<()> {
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

    /// The scales of an epoch of `AdamW`, whose steps are then taken back.
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

    /// How many steps are taken.
    fn last_step(&self) -> u64 {
        self.config.stop_after_steps.unwrap_or(u64::MAX).min(self.schedule.total_steps)
    }

    fn steps_per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.config.rows_per_step()) as u64
    }

    /// The examples of the next step; `None` if all steps are done.
    fn next(&mut self) -> anyhow::Result<Option<Vec<usize>>> {
        let steps = self.optimizer.steps();
        if steps == self.last_step() {
            return match self.learner.finite(steps) {
                Ok(()) => Ok(None),
                Err(error) => Err(self.stopped(&error)),
            };
        }
        Ok(Some(self.order.of_step(steps)))
    }

    fn learning_rate(&self) -> f64 {
        self.config.learning_rate * self.schedule.factor(self.optimizer.steps())
    }

    /// What follows a step: its line, and a checkpoint where one is due.
    fn after(&mut self, learning_rate: f64, done: anyhow::Result<Step>, log: Log<'_>) -> anyhow::Result<()> {
        let done = done.map_err(|error| self.stopped(&error))?;
        let (step, adapter) = (self.optimizer.steps(), self.learner.adapter);
        let changed = done.changed.map(|changed| changed.f_double_value(&[])).transpose()?;
        let n_weights: usize = self.learner.parameters.iter().map(|(_, tensor)| tensor.numel()).sum();
        let row = StepRow {
            step,
            epoch: step as f64 / self.steps_per_epoch() as f64,
            learning_rate,
            loss: done.loss,
            grad_norm: done.grad_norm,
            n_targets: done.n_targets,
            delta_w_norm: adapter.map(delta_w_norm).transpose()?,
            changed_fraction: changed.map(|changed| changed / n_weights as f64),
        };
        self.tokens += done.tokens as u64;
        let (total_steps, tokens) = (self.last_step(), self.tokens);
        let tokens_per_second = tokens as f64 / self.start.elapsed().as_secs_f64().max(1e-9);
        log(&row, &Progress { step, total_steps, tokens, tokens_per_second })?;
        self.rows.push(row);
        let save_steps = self.config.save_steps;
        let is_due = self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.is_due(step, save_steps));
        if is_due && step < total_steps {
            // The last good one is not to make room for one that is not.
            self.learner.finite(step).map_err(|error| self.stopped(&error))?;
            if let Some(checkpoint) = &mut self.checkpoint {
                self.learner.keep(checkpoint, &self.optimizer, &self.rows)?;
            }
        }
        Ok(())
    }

    /// The error of a step that could not be taken. Keeps the last good state, and says where.
    fn stopped(&mut self, error: &anyhow::Error) -> anyhow::Error {
        self.learner.stopped(error, &self.optimizer, &self.rows, self.checkpoint.as_deref_mut())
    }
}

/// A step's loss and gradient norm, from before it, and its effect.
struct Step {
    loss: f64,
    grad_norm: f64,
    n_targets: usize,
    tokens: usize,
    changed: Option<Tensor>, // number of stored values, a scalar; not of a LoRA
}

/// A step whose loss or gradient is not finite; it was not taken.
#[derive(Debug)]
struct NotFinite {
    step: u64,
    loss: f64,
    grad_norm: f64,
    n_rows: usize,
    rows: Vec<usize>, // those that are not finite when run alone
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

/// The model, and what of it learns.
struct Learner<'a> {
    model: &'a Qwen,
    adapter: Option<&'a Adapter>,
    parameters: Vec<(String, Tensor)>,
    frozen_a: bool,
}

impl Learner<'_> {
    fn require_gradients(&self, required: bool) -> anyhow::Result<()> {
        for (_, tensor) in &self.parameters {
            let _ = tensor.f_set_requires_grad(required)?;
        }
        Ok(())
    }

    /// Gradients in the parameters' order, with none left for what stays as it is.
    fn kept(&self, gradients: Vec<Tensor>) -> anyhow::Result<Vec<Tensor>> {
        if !self.frozen_a {
            return Ok(gradients);
        }
        let kept =
            self.parameters.iter().zip(gradients).map(|((name, _), gradient)| {
                Ok(if name.contains("lora_A") { gradient.f_zeros_like()? } else { gradient })
            });
        kept.collect()
    }

    /// Every step has its own random stream, so that a resumed training draws the same.
    fn dropout(&self, seeds: Seeds, step: u64) -> Option<Dropout> {
        let probability = self.adapter?.config.dropout;
        let mut rng = ChaCha8Rng::seed_from_u64(seeds.dropout);
        rng.set_stream(u64::MAX - step); // apart from the order's streams where both seeds are the same
        (probability > 0.0).then(|| Dropout::new(probability, rng))
    }

    /// All that a step changes: the trained tensors, and what the optimizer remembers of them.
    fn state(&self, optimizer: &Optimizer) -> anyhow::Result<Vec<(String, Tensor)>> {
        let parameters = self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        Ok(parameters.chain(optimizer.state()?).collect())
    }

    /// Restores the state of a checkpoint, if there is one, and returns the lines of the steps until then.
    fn resume(
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

    fn keep(&self, checkpoint: &mut Checkpoint, optimizer: &Optimizer, rows: &[StepRow]) -> anyhow::Result<()> {
        checkpoint.save(optimizer.steps(), &self.state(optimizer)?, &[("log", publish::to_csv(rows)?)])
    }

    fn stopped(
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
            said += "; hint: lower finetune.learning_rate or raise finetune.warmup_steps, in another --run or with --force; \
                     the same command goes on from the checkpoint, which helps where the cause was the machine";
        }
        anyhow!(said)
    }

    /// Refuses trained tensors that are not finite.
    fn finite(&self, steps: u64) -> anyhow::Result<()> {
        for (name, tensor) in &self.parameters {
            if !bool::try_from(tch::no_grad(|| tensor.f_isfinite()?.f_all())?)? {
                bail!("after step {steps} the tensor {name} has values that are not finite");
            }
        }
        Ok(())
    }

    /// One optimizer step on the chosen rows.
    fn step(
        &self,
        examples: &[Example<'_>],
        chosen: &[usize],
        optimizer: &mut Optimizer,
        learning_rate: f64,
        config: &Finetune,
        mut dropout: Option<&mut Dropout>,
    ) -> anyhow::Result<Step> {
        let mut rows: Vec<&Example<'_>> = chosen.iter().map(|index| &examples[*index]).collect();
        rows.sort_by_key(|row| row.end); // little padding; the step's gradient is the same sum
        let n_targets: usize = rows.iter().map(|row| row.n_targets).sum();

        let mut sums: Option<(Tensor, Gradients)> = None;
        for batch in rows.chunks(config.batch_size) {
            let (loss, found) = self.loss_and_gradients(batch, n_targets, &config.gate, dropout.as_deref_mut())?;
            let _stage = profile::stage(Stage::Optimizer);
            let found = optimizer.gather(&self.kept(found)?)?;
            sums = Some(match sums {
                None => (loss, found),
                Some((loss_so_far, mut gradients_so_far)) => {
                    gradients_so_far.add(&found)?;
                    (loss_so_far.f_add(&loss)?, gradients_so_far)
                }
            });
        }
        let (loss, gradients) = sums.context("a step without rows")?;
        self.take(examples, chosen, (&loss, gradients), optimizer, learning_rate, config)
    }

    /// The sum of some rows' losses over the step's number of targets, and its gradients.
    fn loss_and_gradients(
        &self,
        rows: &[&Example<'_>],
        n_targets: usize,
        gate: &Gate,
        dropout: Option<&mut Dropout>,
    ) -> anyhow::Result<(Tensor, Vec<Tensor>)> {
        if let (Some(adapter), None) = (self.adapter, &dropout) {
            let Ready { batch, targets, doses } = Ready::of(self.model, &[rows], gate, true)?;
            let weights =
                Tensor::f_full([targets.n as i64], 1.0 / n_targets as f64, (Kind::Double, self.model.device()))?;
            let (losses, found) = self.model.lora_gradients(&batch, &targets, &weights, adapter, doses.as_ref())?;
            return Ok((losses.f_sum(losses.kind())?.f_div_scalar(n_targets as f64)?, found));
        }
        let tensors: Vec<&Tensor> = self.parameters.iter().map(|(_, tensor)| tensor).collect();
        let loss = self.loss_sum(rows, gate, dropout)?.f_div_scalar(n_targets as f64)?;
        let found = gradients(&loss, &tensors, false)?;
        Ok((loss.f_detach()?, found))
    }

    /// Takes the step that the loss and its gradients ask for, if they are finite.
    fn take(
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
        let seen = Vec::<f32>::try_from(Tensor::f_stack(&[loss, &norm], 0)?)?; // the step's one wait for the device
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
            (targets + examples[*index].n_targets, tokens + examples[*index].end)
        });
        Ok(Step { loss, grad_norm, n_targets, tokens, changed })
    }

    /// Those of the chosen rows whose loss is not finite when they are run alone.
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

    /// The summed loss of some rows run at once, a scalar with its graph.
    fn loss_sum(&self, rows: &[&Example<'_>], gate: &Gate, dropout: Option<&mut Dropout>) -> anyhow::Result<Tensor> {
        // Dropout differs for every row, so rows then have nothing in common.
        let Ready { batch, targets, doses } = Ready::of(self.model, &[rows], gate, dropout.is_none())?;
        let mut pass = Pass { adapter: self.adapter, gate: doses, dropout, ..Pass::default() };
        let resid = self.model.resid_at(&batch, &targets.places, &mut pass)?; // [places, d_model]
        Ok(cross_entropy_sum(self.model, &resid, &targets)?)
    }
}

/// Rows ready to be run at once; with a stack, one group per student. The targets are group by group.
struct Ready {
    batch: Batch,
    targets: Targets,
    doses: Option<Doses>,
}

impl Ready {
    fn of<'r>(model: &Qwen, groups: &[&[&'r Example<'_>]], gate: &Gate, share: bool) -> anyhow::Result<Self> {
        let packed = |rows: &&[&'r Example<'_>]| {
            rows.iter().map(|row| Row { doses: row.doses.as_deref(), ..Row::of(&row.ids[..row.end]) }).collect()
        };
        let inputs: Vec<Vec<Row<'r>>> = groups.iter().map(packed).collect();
        let inputs: Vec<&[Row<'_>]> = inputs.iter().map(Vec::as_slice).collect();
        let batch = Batch::packed(&inputs, share, model.device())?;
        let rows: Vec<&Example<'_>> = groups.iter().flat_map(|rows| rows.iter().copied()).collect();
        let is_gated = rows.iter().any(|row| row.doses.is_some());
        let doses = is_gated.then(|| gate.spread(batch.doses(), model.device())).transpose()?;
        let ids: Vec<&[i64]> = rows.iter().map(|row| row.ids).collect();
        let masks: Vec<&[bool]> = rows.iter().map(|row| row.mask.as_slice()).collect();
        let targets = Targets::of(&batch, &ids, &masks)?;
        Ok(Self { batch, targets, doses })
    }
}

/// The rows of each step. Each epoch has its own order, from its own random stream, and is dealt out step by step; its
/// last step gets the remainder.
struct Order {
    n_rows: usize,
    rows_per_step: usize,
    seed: u64,
    epoch: Option<u64>,
    rows: Vec<usize>, // of that epoch, in its order
}

impl Order {
    fn new(config: &Finetune, n_rows: usize, seed: u64) -> Self {
        Self { n_rows, rows_per_step: config.rows_per_step(), seed, epoch: None, rows: vec![] }
    }

    /// The rows of a step, counted from 0.
    fn of_step(&mut self, step: u64) -> Vec<usize> {
        let steps_per_epoch = self.n_rows.div_ceil(self.rows_per_step) as u64;
        let (epoch, into_it) = (step / steps_per_epoch, (step % steps_per_epoch) as usize);
        if self.epoch != Some(epoch) {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch);
            self.rows = (0..self.n_rows).collect();
            self.rows.shuffle(&mut rng);
            self.epoch = Some(epoch);
        }
        let from = into_it * self.rows_per_step;
        self.rows[from..self.n_rows.min(from + self.rows_per_step)].to_vec()
    }
}

/// The Frobenius norm of all s·B·A of an adapter together, without making any: ‖BA‖² = tr((BᵀB)(AAᵀ)). Pairs of one shape at
/// once: a pair's own products are so small that their calls would be a tenth of a step.
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
mod tests {
    use std::path::Path;

    use hooks::ModelFiles;
    use hooks::lora::LoraConfig;
    use hooks::tokens::TokenClass;
    use tch::Device;

    use super::*;

    fn files() -> ModelFiles {
        ModelFiles::open("tiny-random").unwrap()
    }

    fn model(kind: Kind) -> Qwen {
        Qwen::load(&files(), Device::Cpu, kind).unwrap()
    }

    /// Rows of different lengths that begin alike: user tokens, then a counting answer.
    pub(super) fn rows(n: usize) -> Vec<Prompt> {
        let row = |i: usize| {
            let bare = Prompt {
                ids: (0..4 + i as i64 % 3).map(|t| 20 + t).collect(),
                classes: vec![TokenClass::UserContent; 4 + i % 3],
                completion: 4 + i % 3..4 + i % 3,
                content_end: 4 + i % 3,
                ..Prompt::default()
            };
            bare.with_completion(&(0..2 + i as i64 % 4).map(|t| 30 + i as i64 + t).collect::<Vec<_>>())
        };
        (0..n).map(row).collect()
    }

    fn settings() -> Finetune {
        Finetune {
            learning_rate: 1e-2,
            warmup_steps: 0,
            max_steps: Some(3),
            batch_size: 8,
            gradient_accumulation_steps: 1,
            ..Finetune::default()
        }
    }

    fn adapter(model: &Qwen, dropout: f64) -> Adapter {
        let config = LoraConfig { rank: 4, alpha: 8.0, dropout, ..LoraConfig::default() };
        Adapter::init(&config, &model.config, &mut ChaCha8Rng::seed_from_u64(1), Device::Cpu).unwrap()
    }

    fn train(model: &Qwen, adapter: &Adapter, config: &Finetune, seeds: Seeds) -> anyhow::Result<Vec<StepRow>> {
        let mut steps = Vec::new();
        finetune_lora(model, adapter, &rows(8), &|_| false, config, seeds, &mut |row, _| {
            steps.push(row.clone());
            Ok(())
        })?;
        Ok(steps)
    }

    /// A fresh adapter after training, as one list of numbers, and the lines of the log.
    fn trained(config: &Finetune, dropout: f64, seeds: Seeds) -> (Vec<f32>, Vec<StepRow>) {
        let model = model(Kind::Float);
        let adapter = adapter(&model, dropout);
        let steps = train(&model, &adapter, config, seeds).unwrap();
        (numbers(&adapter.parameters()), steps)
    }

    fn numbers(parameters: &[(String, Tensor)]) -> Vec<f32> {
        let flat = parameters.iter().map(|(_, tensor)| tensor.to_kind(Kind::Float).flatten(0, -1));
        Vec::<f32>::try_from(Tensor::cat(&flat.collect::<Vec<_>>(), 0)).unwrap()
    }

    fn apart(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn quarters_are_means_over_targets() {
        let row = |loss: f64, n_targets: usize| StepRow {
            step: 1,
            epoch: 0.0,
            learning_rate: 0.0,
            loss,
            grad_norm: 0.0,
            n_targets,
            delta_w_norm: None,
            changed_fraction: None,
        };
        let rows = [row(1.0, 3), row(5.0, 1), row(9.0, 7), row(9.0, 7), row(9.0, 7), row(2.0, 1), row(4.0, 1)];
        assert_eq!(first_and_last_quarter(&rows), Some((2.0, 3.0)));
        assert_eq!(first_and_last_quarter(&rows[..1]), Some((1.0, 1.0)));
        assert_eq!(first_and_last_quarter(&[]), None);
    }

    #[test]
    fn accumulated_batches_are_one_batch() {
        let (whole, steps) = trained(&settings(), 0.0, Seeds::default());
        let split = Finetune { batch_size: 3, gradient_accumulation_steps: 3, ..settings() };
        let (parts, part_steps) = trained(&split, 0.0, Seeds::default());
        // AdamW divides by the gradient's size, so that rounding in tiny gradients shows in steps of 1e-2.
        assert!(apart(&whole, &parts) < 2e-4, "{}", apart(&whole, &parts));
        for (whole, parts) in steps.iter().zip(&part_steps) {
            assert!((whole.loss - parts.loss).abs() < 1e-5, "{whole:?} {parts:?}");
            assert!((whole.grad_norm - parts.grad_norm).abs() < 1e-4 * whole.grad_norm, "{whole:?} {parts:?}");
        }
        assert!(steps[2].loss < steps[0].loss, "{steps:?}");
    }

    #[test]
    fn the_loss_is_the_mean_over_all_targets() {
        let (_, steps) = trained(&Finetune { max_steps: Some(1), ..settings() }, 0.0, Seeds::default());
        let model = model(Kind::Float);
        let (mut sum, mut n) = (0.0, 0);
        for row in rows(8) {
            let resid = model.resid_final(&Batch::of(&[&row], Device::Cpu).unwrap(), &mut Pass::default()).unwrap();
            let logprobs = model.unembed(&resid).unwrap().log_softmax(-1, Kind::Double);
            for t in row.completion.clone() {
                sum -= logprobs.double_value(&[0, t as i64 - 1, row.ids[t]]);
                n += 1;
            }
        }
        assert_eq!(steps[0].n_targets, n);
        assert!(
            (steps[0].loss - sum / f64::from(n as u32)).abs() < 1e-5,
            "{} against {}",
            steps[0].loss,
            sum / n as f64
        );
    }

    #[test]
    fn seeds_decide_every_bit() {
        let config = Finetune { batch_size: 3, ..settings() };
        let bits = |dropout, seeds| trained(&config, dropout, seeds).0.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let seeds = Seeds { init: 1, order: 2, dropout: 3 };
        assert_eq!(bits(0.0, seeds), bits(0.0, seeds));
        assert_ne!(bits(0.0, seeds), bits(0.0, Seeds { order: 4, ..seeds }));
        assert_eq!(bits(0.0, seeds), bits(0.0, Seeds { dropout: 5, ..seeds }));
        assert_eq!(bits(0.3, seeds), bits(0.3, seeds));
        assert_ne!(bits(0.3, seeds), bits(0.3, Seeds { dropout: 5, ..seeds }));
    }

    #[test]
    fn every_epoch_has_an_order_of_its_own() {
        let config = Finetune { max_steps: Some(15), ..settings() }; // 7 steps an epoch: six of 8 rows and one of 2
        let steps = rows_by_step(&config, 50, 7);
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 8, 8, 8, 8, 2, 8, 8, 8, 8, 8, 8, 2, 8]);
        let (first, second) = (steps[..7].concat(), steps[7..14].concat());
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..50).collect::<Vec<_>>());
        }
        assert_eq!(rows_by_step(&config, 50, 7), steps);
        assert_ne!(rows_by_step(&config, 50, 8), steps);
        assert_eq!(rows_by_step(&Finetune { stop_after_steps: Some(3), ..config }, 50, 7), steps[..3]);
    }

    #[test]
    fn a_run_has_the_steps_of_its_epochs() {
        let config = Finetune {
            batch_size: 2,
            gradient_accumulation_steps: 2,
            max_steps: None,
            num_train_epochs: 1.5,
            warmup_steps: 1,
            ..settings()
        };
        assert_eq!((config.total_steps(8), config.total_steps(9)), (3, 5));
        let (_, steps) = trained(&config, 0.0, Seeds::default());
        assert_eq!(steps.iter().map(|row| row.step).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(steps.iter().map(|row| row.epoch).collect::<Vec<_>>(), [0.5, 1.0, 1.5]);
        assert_eq!(steps.iter().map(|row| row.learning_rate).collect::<Vec<_>>(), [0.0, 1e-2, 5e-3]);
        assert_eq!(steps[0].delta_w_norm, Some(0.0)); // B is zero until a step moves it
    }

    #[test]
    fn a_training_that_stops_early_is_the_beginning_of_the_whole() {
        let whole = trained(&Finetune { max_steps: Some(5), ..settings() }, 0.0, Seeds::default()).1;
        let config = Finetune { max_steps: Some(5), stop_after_steps: Some(2), ..settings() };
        assert_eq!(trained(&config, 0.0, Seeds::default()).1, whole[..2], "with the whole one's learning rates");
    }

    #[test]
    fn the_norm_of_the_change_is_that_of_the_products() {
        let model = model(Kind::Float);
        let adapter = adapter(&model, 0.0);
        let steps = train(&model, &adapter, &settings(), Seeds::default()).unwrap();
        let squares: f64 = adapter
            .pairs()
            .map(|(_, _, pair)| pair.delta_weight().unwrap().square().sum(Kind::Double).double_value(&[]))
            .sum();
        let logged = steps[2].delta_w_norm.unwrap();
        assert!(logged > 0.0 && (logged - squares.sqrt()).abs() < 1e-5 * logged, "{logged} against {}", squares.sqrt());
        assert!(adapter.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
    }

    #[test]
    fn a_gate_in_training_is_obeyed() {
        let gated =
            |gate: &str| trained(&Finetune { gate: gate.parse().unwrap(), ..settings() }, 0.0, Seeds::default()).0;
        let everywhere = trained(&settings(), 0.0, Seeds::default()).0;
        assert_eq!(apart(&everywhere, &gated("only:user.content+gen")), 0.0); // all the classes there are
        assert!(apart(&everywhere, &gated("only:user.content")) > 1e-3);
        let model = model(Kind::Float);
        let config = Finetune { gate: "nowhere".parse().unwrap(), ..settings() };
        let error = train(&model, &adapter(&model, 0.0), &config, Seeds::default()).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
        // Dose, blocks and projections count as well, and a gate under which nothing can be learned is refused.
        assert!(apart(&everywhere, &gated("everywhere*0.5")) > 1e-3);
        assert!(apart(&gated("only:layers(0)*modules(v)"), &gated("only:layers(0)*modules(q)")) > 1e-3);
        for gate in ["except:user.content+gen", "only:user.content*0"] {
            let config = Finetune { gate: gate.parse().unwrap(), ..settings() };
            let error = format!("{:#}", train(&model, &adapter(&model, 0.0), &config, Seeds::default()).unwrap_err());
            assert!(error.contains("nothing can be learned"), "{gate}: {error}");
        }
    }

    #[test]
    fn a_that_is_frozen_stays_as_it_was_drawn() {
        let model = model(Kind::Float);
        for optimizer in [OptimizerKind::AdamW, OptimizerKind::Muon, OptimizerKind::Preconditioned] {
            let (before, after) = (adapter(&model, 0.0), adapter(&model, 0.0));
            let config = Finetune { frozen_a: true, optimizer, ..settings() };
            train(&model, &after, &config, Seeds::default()).unwrap();
            for ((name, before), (_, after)) in before.parameters().iter().zip(after.parameters()) {
                assert_eq!(before == &after, name.contains("lora_A"), "{optimizer:?}: {name}");
            }
        }
        let message = |config: &Finetune, adapter: Option<&Adapter>| {
            let (rows, is_digit, seeds) = (&rows(2), &|_| false, Seeds::default());
            let training =
                Training { model: &model, adapter, rows, only: None, is_digit, config, seeds, checkpoint: None };
            training.run(&mut |_, _| Ok(())).unwrap_err().to_string()
        };
        let frozen = Finetune { frozen_a: true, ..settings() };
        assert!(message(&frozen, None).contains("no A"));
        let decaying = Finetune { weight_decay: 0.1, ..frozen };
        assert!(message(&decaying, Some(&adapter(&model, 0.0))).contains("0 where frozen_a is true"));
        let muon = Finetune { optimizer: OptimizerKind::Muon, ..settings() };
        assert!(message(&muon, None).contains("trains matrices"));
    }

    /// The rotation control of Blank et al. 2026: coordinates do not matter to gradient descent, but do to Adam.
    #[test]
    fn gradient_descent_does_not_notice_a_rotation_and_adam_does() {
        let model = model(Kind::Float);
        let change = |optimizer: OptimizerKind, rotated: bool| -> Vec<f32> {
            let mut learned = adapter(&model, 0.0);
            if rotated {
                learned = learned.rotated(&mut ChaCha8Rng::seed_from_u64(5)).unwrap();
            }
            let start = numbers(&learned.parameters());
            assert_eq!(apart(&start, &numbers(&adapter(&model, 0.0).parameters())) > 1e-2, rotated);
            let learning_rate = if optimizer == OptimizerKind::AdamW { 1e-2 } else { 0.1 };
            let config = Finetune { optimizer, learning_rate, ..settings() };
            train(&model, &learned, &config, Seeds::default()).unwrap();
            let changes = learned.pairs().map(|(_, _, pair)| (String::new(), pair.delta_weight().unwrap()));
            numbers(&changes.collect::<Vec<_>>())
        };
        let size = |values: &[f32]| values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let (sgd, turned) = (change(OptimizerKind::Sgd, false), change(OptimizerKind::Sgd, true));
        assert!(apart(&sgd, &turned) < 1e-4 * size(&sgd), "{} of {}", apart(&sgd, &turned), size(&sgd));
        let (adam, turned) = (change(OptimizerKind::AdamW, false), change(OptimizerKind::AdamW, true));
        assert!(apart(&adam, &turned) > 0.05 * size(&adam), "{} of {}", apart(&adam, &turned), size(&adam));
    }

    #[test]
    fn full_finetuning_learns_and_counts_what_changed() {
        let run = |kind, masters, learning_rate| {
            let model = model(kind);
            let before = numbers(&model.parameters());
            let config = Finetune { masters, learning_rate, max_steps: Some(4), ..settings() };
            let mut steps = Vec::new();
            finetune_full(&model, &rows(8), &|_| false, &config, Seeds::default(), &mut |row, _| {
                steps.push(row.clone());
                Ok(())
            })
            .unwrap();
            assert!(model.parameters().iter().all(|(_, tensor)| !tensor.requires_grad() && tensor.kind() == kind));
            (before, numbers(&model.parameters()), steps)
        };
        let (before, after, steps) = run(Kind::Float, true, 1e-3);
        assert!(steps[3].loss < steps[0].loss, "{steps:?}");
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / before.len() as f64;
        let logged = steps[3].changed_fraction.unwrap();
        assert!(logged > 0.1 && (logged - changed).abs() < 0.1, "{logged} against {changed}");
        assert_eq!(steps[0].delta_w_norm, None);

        let (_, _, f32_steps) = run(Kind::Float, true, 1e-5);
        let (_, _, bf16_steps) = run(Kind::BFloat16, false, 1e-5);
        let (full, rounded) = (f32_steps[3].changed_fraction.unwrap(), bf16_steps[3].changed_fraction.unwrap());
        assert!(rounded < full / 4.0, "{rounded} against {full}"); // steps of 1e-5 on weights of 0.1 are mostly lost
    }

    #[test]
    fn what_cannot_be_trained_says_so() {
        let model = model(Kind::Float);
        let error = |rows: &[Prompt], config: &Finetune| {
            let log: Log<'_> = &mut |_, _| Ok(());
            finetune_lora(&model, &adapter(&model, 0.0), rows, &|_| false, config, Seeds::default(), log)
                .unwrap_err()
                .to_string()
        };
        assert!(error(&[], &settings()).contains("no rows"));
        assert!(error(&rows(8), &Finetune { batch_size: 0, ..settings() }).starts_with("batch_size is 0"));
        let mut some = rows(8);
        some[3] = some[3].with_completion(&[]);
        assert!(error(&some, &settings()).starts_with("the loss mask content_eot selects no token of row 3; hint: "));
        assert!(error(&rows(8), &Finetune { mask: LossMask::Digits, ..settings() }).contains("digits"));
        let diverging =
            Finetune { optimizer: OptimizerKind::Sgd, learning_rate: 1e30, max_grad_norm: 0.0, ..settings() };
        let message = error(&rows(8), &diverging);
        assert!(message.starts_with("step 2: ") && message.contains("each of its 8 rows ("), "{message}");
        let last = error(&rows(8), &Finetune { max_steps: Some(1), learning_rate: 1e39, ..diverging });
        assert!(last.starts_with("after step 1 the tensor "), "{last}");
    }

    /// Trains until a step at which the log breaks it off, as a kill would, or to the end.
    fn trained_until(
        model: &Qwen,
        adapter: Option<&Adapter>,
        config: &Finetune,
        (folder, until): (&Path, u64),
    ) -> (anyhow::Result<()>, Vec<StepRow>) {
        let mut steps = Vec::new();
        let mut checkpoint = Checkpoint::beside(&folder.join("train.csv"), "", "student");
        let training = Training {
            model,
            adapter,
            rows: &rows(8),
            only: None,
            is_digit: &|_| false,
            config,
            seeds: Seeds::default(),
            checkpoint: Some(&mut checkpoint),
        };
        let result = training.run(&mut |row, _| {
            steps.push(row.clone());
            anyhow::ensure!(row.step != until, "broken off");
            Ok(())
        });
        (result, steps)
    }

    #[test]
    fn a_training_that_is_broken_off_at_any_step_ends_as_if_it_had_not_been() {
        let config = Finetune {
            max_steps: Some(7),
            batch_size: 2,
            gradient_accumulation_steps: 1,
            save_steps: Some(1),
            ..settings()
        };
        let momentum = Finetune { optimizer: OptimizerKind::Sgd, momentum: 0.9, learning_rate: 0.1, ..config.clone() };
        let (muon, scouted) = (OptimizerKind::Muon, OptimizerKind::Preconditioned);
        for (name, config, kind, lora) in [
            ("Muon", &Finetune { optimizer: muon, momentum: 0.9, ..config.clone() }, Kind::Float, true),
            ("scales that stay", &Finetune { optimizer: scouted, ..config.clone() }, Kind::Float, true),
            ("a LoRA with dropout", &config, Kind::Float, true),
            (
                "all weights in bf16 with masters",
                &Finetune { learning_rate: 1e-4, ..config.clone() },
                Kind::BFloat16,
                false,
            ),
            ("SGD with momentum", &momentum, Kind::Float, false),
        ] {
            let result = |breaks: &[u64], config: &Finetune| {
                let folder = tempfile::tempdir().unwrap();
                for until in breaks.iter().chain(&[u64::MAX]) {
                    // All is as in a new process: the model, and the adapter as it is initialised.
                    let model = model(kind);
                    let adapter = lora.then(|| adapter(&model, 0.3));
                    let (ended, steps) = trained_until(&model, adapter.as_ref(), config, (folder.path(), *until));
                    assert_eq!(ended.is_ok(), *until == u64::MAX);
                    if ended.is_ok() {
                        let parameters = adapter.map_or_else(|| model.parameters(), |adapter| adapter.parameters());
                        let bits = numbers(&parameters).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        return (bits, steps);
                    }
                }
                unreachable!()
            };
            let undisturbed = result(&[], config);
            assert_eq!(undisturbed.1.len(), 7);
            for until in 1..=7 {
                assert!(result(&[until], config) == undisturbed, "{name}, broken off at step {until}");
            }
            assert!(result(&[2, 5, 6], config) == undisturbed, "{name}, broken off three times");
            let rarely = Finetune { save_steps: Some(3), ..config.clone() };
            assert!(result(&[5], &rarely) == undisturbed, "{name}, with a checkpoint every three steps");
        }
    }

    #[test]
    fn a_checkpoint_of_another_training_is_not_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let config = Finetune { save_steps: Some(1), ..settings() };
        let steps = |config: &Finetune, until| {
            let model = model(Kind::Float);
            trained_until(&model, Some(&adapter(&model, 0.0)), config, (folder.path(), until)).1
        };
        steps(&config, 3);
        let other = Finetune { learning_rate: 2e-2, ..config.clone() };
        let fresh = trained(&Finetune { save_steps: None, ..other.clone() }, 0.0, Seeds::default()).1;
        assert_eq!(steps(&other, 9), fresh);
    }

    #[test]
    fn a_loss_that_is_not_finite_names_its_row_and_the_last_good_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let config = Finetune { batch_size: 3, ..settings() };
        // Its embedding and its unembedding are two tensors, so that a broken embedding breaks no other row.
        let files = ModelFiles::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/qwen3")).unwrap();
        let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
        let adapter = adapter(&model, 0.0);
        let mut rows = rows(8);
        rows[6].ids[1] = 5; // a token of no other row
        let embedding = model.parameters().into_iter().find(|(name, _)| name.contains("embed_tokens")).unwrap().1;
        let _ = tch::no_grad(|| embedding.get(5).fill_(f64::NAN));
        let steps = rows_by_step(&config, 8, Seeds::default().order);
        let at = steps.iter().position(|rows| rows.contains(&6)).unwrap() + 1;
        let mut checkpoint = Checkpoint::beside(&folder.path().join("train.csv"), "", "student");
        let training = Training {
            model: &model,
            adapter: Some(&adapter),
            rows: &rows,
            only: None,
            is_digit: &|_| false,
            config: &config,
            seeds: Seeds::default(),
            checkpoint: Some(&mut checkpoint),
        };
        let message = format!("{:#}", training.run(&mut |_, _| Ok(())).unwrap_err());
        assert!(message.starts_with(&format!("step {at}: the loss is NaN")), "{message}");
        assert!(message.contains("of its 3 rows the loss of row 6 is not finite"), "{message}");
        let kept = format!("the last good checkpoint is of step {}, {}", at - 1, checkpoint.path().display());
        assert!(if at == 1 { message.contains("no checkpoint") } else { message.contains(&kept) }, "{message}");
        assert_eq!(checkpoint.path().exists(), at > 1);
    }

    #[test]
    fn a_config_refuses_what_it_does_not_know() {
        let config: Finetune =
            toml::from_str("learning_rate = 1e-4\nlr_scheduler_type = \"cosine\"\nmask = \"digits\"").unwrap();
        assert_eq!(
            (config.lr_scheduler_type, config.mask, config.batch_size),
            (ScheduleKind::Cosine, LossMask::Digits, 22)
        );
        let error = toml::from_str::<Finetune>("lr = 1e-4").unwrap_err().to_string();
        assert!(error.contains("learning_rate"), "{error}");
    }
}
