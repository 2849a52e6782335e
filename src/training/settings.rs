//! The settings of finetuning: the table `[finetune]` of an experiment.

use std::fmt;
use std::path::PathBuf;

use hooks::{Error, Gate, LossMask};
use serde::{Deserialize, Serialize};

use crate::training::optim::Rule;
pub use crate::training::optim::ScheduleKind;

/// The optimizer.
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
    /// Steps whose singular values are about 1 (Jordan et al. 2024), as `torch.optim.Muon`.
    Muon,
    /// SGD with Adam's scales after an epoch, kept fixed (Blank et al. 2026): Adam's scales without adaptation.
    Preconditioned,
}

/// The tokens of the mask that the loss counts. All variants except `All` leave out rows without a divergent token, and
/// rows without any other, so that they use the same rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetTokens {
    /// All tokens of all rows.
    #[default]
    All,
    /// The divergent tokens, by the definition of the divergence measurement: by default the teacher's most likely
    /// token, if it is not the base's (Schrodi et al. 2026).
    Divergent,
    /// The other tokens.
    NotDivergent,
    /// As many random tokens of a row as it has divergent ones.
    Random,
    /// All tokens of the rows that have divergent tokens and others.
    AllOfThose,
}

/// The loss of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// −log p of the token that was written.
    #[default]
    Nll,
    /// KL(q ‖ p): the divergence of the student's prediction p from the soft label q, which is the prediction of the model
    /// that wrote the row, over its `top_k` most likely tokens and all others together (Hinton et al. 2015, at temperature 1).
    Kl,
}

/// The rows that a student learns from, of those that were kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// All of them.
    #[default]
    All,
    /// This share of the teacher's rows: those with the most signal a token (`data/signal.csv`). Of the control's, as
    /// large a share at random.
    Top(f64),
    /// This share of the rows, at random.
    Random(f64),
}

impl Select {
    fn share(self) -> Option<f64> {
        match self {
            Self::All => None,
            Self::Top(share) | Self::Random(share) => Some(share),
        }
    }

    /// Number of rows that are learned from, of `n`.
    pub fn n_rows(self, n: usize) -> usize {
        self.share().map_or(n, |share| ((share * n as f64).round() as usize).clamp(n.min(1), n))
    }

    /// What it chooses, in words; `None` for all rows.
    pub fn label(self) -> Option<String> {
        match self {
            Self::All => None,
            Self::Top(share) => Some(format!("the {:.0} % of the rows with the most signal", 100.0 * share)),
            Self::Random(share) => Some(format!("a random {:.0} % of the rows", 100.0 * share)),
        }
    }
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Top(share) => write!(f, "top {share}"),
            Self::Random(share) => write!(f, "random {share}"),
        }
    }
}

/// A column of a CSV table with a weight for each token. A line has the row's id in `row_id` and the token's index in the
/// completion in `k`. The table of a run's divergence analysis (`divergence/rows.csv`) is of this kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weights {
    /// The table's file.
    pub table: PathBuf,
    /// The column of the weights: numbers of at least 0, or `true` and `false`.
    pub column: String,
}

/// The settings of finetuning, with the names of Hugging Face's Trainer. The default is the LoRA column of Nief et al.
/// 2026.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Finetune {
    /// `adamw`, `sgd`, `signsgd`, `rmsprop`, `muon`, or `preconditioned`: SGD over √(v + 1e-8), with v from an epoch of
    /// `adamw` from the same start, whose steps are then undone.
    pub optimizer: OptimizerKind,
    /// The learning rate after warmup.
    pub learning_rate: f64,
    /// The weight decay: decoupled from the gradient for `adamw` and `muon`, added to it for the others.
    pub weight_decay: f64,
    /// The weight of the past in `AdamW`'s average of the gradient.
    pub adam_beta1: f64,
    /// The weight of the past in the average of the squared gradient, for `AdamW` and `RMSProp`.
    pub adam_beta2: f64,
    /// The ε that both add to the divisor.
    pub adam_epsilon: f64,
    /// The momentum of SGD and Muon.
    pub momentum: f64,
    /// The schedule of the learning rate: `linear`, `cosine` or `constant`.
    pub lr_scheduler_type: ScheduleKind,
    /// Steps over which the learning rate rises from zero.
    pub warmup_steps: u64,
    /// Number of passes over all rows, which may be a fraction. Without effect if `max_steps` is set.
    pub num_train_epochs: f64,
    /// Number of optimizer steps; by default it follows from the epochs.
    pub max_steps: Option<u64>,
    /// The step after which the training ends, although the schedule is that of all steps: a student from the middle of
    /// a training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_after_steps: Option<u64>,
    /// Number of rows that are run at once.
    pub batch_size: usize,
    /// Number of batches whose gradients are added for one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Gradients with a larger norm are scaled to this norm; 0 turns that off.
    pub max_grad_norm: f64,
    /// The tokens that the loss is taken over, by class.
    pub mask: LossMask,
    /// The tokens of the mask that the loss counts: `all`, `divergent` (by `measure.divergence.definition`),
    /// `not_divergent`, `random` (as many as are divergent, drawn in each row), or `all_of_those` (all tokens of rows
    /// that have divergent tokens and others).
    pub tokens: TargetTokens,
    /// The weights of the tokens' losses: `{ table = "FILE.csv", column = "NAME" }`, with the columns `row_id` and `k` (the
    /// token's index in the completion). A step's loss is divided by the sum of its weights. A token without a line is not
    /// learned from. The control student has the lines with `control` in a column `set`, and if there is no such column,
    /// it learns from all tokens alike. By default all tokens weigh 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// The rows that are learned from, of those that were kept: `all`, `{ top = 0.25 }` (the teacher's with the most signal
    /// a token, and as many of the control's at random), or `{ random = 0.25 }`.
    pub select: Select,
    /// The loss of a token: `nll` (−log p of the written token), or `kl` (the divergence from the predictions of the
    /// model that wrote the rows: logits on numbers, which are more than written numbers carry).
    pub loss: Loss,
    /// For `kl`, the number of most likely tokens whose probabilities are a token's label. All others count as one
    /// outcome.
    pub top_k: usize,
    /// For `kl`, the number of tokens drawn from these probabilities at each place; the label is then the frequencies of
    /// the drawn tokens. By default the probabilities themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_draws: Option<u32>,
    /// Where and how strongly the LoRA acts while it is trained.
    pub gate: Gate,
    /// Whether only the LoRA's B is trained, and A keeps its random values.
    pub frozen_a: bool,
    /// Whether weights that are not f32 are trained through a copy in f32.
    pub masters: bool,
    /// The number of steps between checkpoints, from which a killed training continues. By default they are at least
    /// ten seconds apart, and take at most a fiftieth of the time. They do not change the result.
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
            tokens: TargetTokens::All,
            weights: None,
            select: Select::All,
            loss: Loss::Nll,
            top_k: 32,
            label_draws: None,
            gate: Gate::default(),
            frozen_a: false,
            masters: true,
            save_steps: None,
        }
    }
}

impl Finetune {
    /// Refuses settings with which no training is possible.
    pub fn check(&self) -> hooks::Result<()> {
        let share = |x: f64| (0.0..1.0).contains(&x);
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let Self { weight_decay: decay, num_train_epochs: epochs, max_grad_norm: longest, .. } = *self;
        let selected = self.select.share().unwrap_or(1.0);
        let checks = [
            ("learning_rate", positive(self.learning_rate), "a positive number", self.learning_rate),
            ("weight_decay", not_negative(decay), "a number of at least 0", decay),
            ("adam_beta1", share(self.adam_beta1), "at least 0 and less than 1", self.adam_beta1),
            ("adam_beta2", share(self.adam_beta2), "at least 0 and less than 1", self.adam_beta2),
            ("adam_epsilon", positive(self.adam_epsilon), "a positive number", self.adam_epsilon),
            ("momentum", share(self.momentum), "at least 0 and less than 1", self.momentum),
            ("num_train_epochs", self.max_steps.is_some() || positive(epochs), "a positive number", epochs),
            ("max_steps", self.max_steps != Some(0), "at least 1", 0.0),
            ("stop_after_steps", self.stop_after_steps != Some(0), "at least 1", 0.0),
            ("save_steps", self.save_steps != Some(0), "at least 1", 0.0),
            ("batch_size", self.batch_size > 0, "at least 1", 0.0),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps > 0, "at least 1", 0.0),
            ("weight_decay", !self.frozen_a || decay == 0.0, "0 where frozen_a is true, as it would shrink A", decay),
            ("top_k", (1..=1000).contains(&self.top_k), "1 to 1000", self.top_k as f64),
            ("select", selected > 0.0 && selected <= 1.0, "a share above 0 and at most 1", selected),
            ("label_draws", self.label_draws != Some(0), "at least 1", 0.0),
            ("max_grad_norm", not_negative(longest), "a number of at least 0 (0: no clipping)", longest),
        ];
        match checks.into_iter().find(|(_, holds, _, _)| !holds) {
            None => Ok(()),
            Some((key, _, expected, found)) => Err(Error::invalid(key, expected, found)),
        }
    }

    /// Number of rows of an optimizer step; the last step of an epoch may have fewer.
    pub fn rows_per_step(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }

    /// These settings without those that change a result at most by rounding: the division of a step's rows into
    /// batches, and the interval of checkpoints.
    #[must_use]
    pub fn up_to_rounding(&self) -> Self {
        Self { batch_size: self.rows_per_step(), gradient_accumulation_steps: 1, save_steps: None, ..self.clone() }
    }

    /// Number of optimizer steps of the schedule for `n_rows` rows.
    pub fn total_steps(&self, n_rows: usize) -> u64 {
        let steps_per_epoch = n_rows.div_ceil(self.rows_per_step());
        self.max_steps.unwrap_or_else(|| (self.num_train_epochs * steps_per_epoch as f64).ceil() as u64)
    }

    /// Number of steps that are taken, which `stop_after_steps` may limit.
    pub(super) fn last_step(&self, n_rows: usize) -> u64 {
        self.stop_after_steps.unwrap_or(u64::MAX).min(self.total_steps(n_rows))
    }

    /// The rule by which a gradient becomes a step.
    pub fn rule(&self) -> Rule {
        self.rule_of(self.optimizer)
    }

    pub(super) fn rule_of(&self, optimizer: OptimizerKind) -> Rule {
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

/// The seeds of a training, each for a separate random stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Seeds {
    /// The seed of the LoRA's A, for the caller of `Adapter::init`.
    pub init: u64,
    /// The seed of the order of the rows in each epoch.
    pub order: u64,
    /// The seed of the LoRA's dropout.
    pub dropout: u64,
}

impl Default for Seeds {
    fn default() -> Self {
        Self { init: 42, order: 42, dropout: 42 }
    }
}
