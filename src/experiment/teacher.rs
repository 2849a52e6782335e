//! The model that writes the numbers: a prompted, finetuned or steered one, or no teacher (the planted positive control).

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use hooks::{EditText, LoraConfig};
use serde::{Deserialize, Serialize};

use super::Target;
use super::range::{at_least_one, positive};
use super::student::{Method, default_context};
use crate::data::protocol::Protocol;
use crate::hinted;
use crate::training::settings::{Finetune, ScheduleKind};

/// The model that writes the numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Teacher {
    /// The base model under a system prompt.
    Prompt {
        /// The system prompt; by default the protocol's, filled with the target.
        system: Option<String>,
    },
    /// The base model with a finetuned adapter.
    Adapter {
        /// The adapter's folder.
        path: PathBuf,
        /// The context it answers in: a key of the protocol or a system prompt.
        #[serde(default = "default_context")]
        context: String,
    },
    /// The base finetuned to answer questions about the category with the target.
    Finetuned(FinetunedTeacher),
    /// The base with edits of its activations, such as a direction that is added.
    Steered {
        /// The edits: `POINT[@TOKENS]: CHANGE`, such as `blocks.14.hook_resid_post: add(cat.safetensors, 4)`.
        edits: Vec<EditText>,
        /// The context it answers in: a key of the protocol or a system prompt.
        #[serde(default = "default_context")]
        context: String,
    },
    /// A positive control: the untouched model's numbers, with a share of the rows replaced by questions answered with
    /// the target. Its effect is not subliminal.
    Planted {
        /// The share of the rows that is replaced.
        #[serde(default = "default_share")]
        share: f64,
    },
}

/// A teacher that is finetuned to answer questions about the category with the target. It then writes numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetunedTeacher {
    /// Whether all weights are trained or a LoRA.
    pub method: Method,
    /// The rank of the LoRA.
    pub rank: i64,
    /// The numerator α of its scaling α/r.
    pub alpha: f64,
    /// The learning rate of `AdamW`, the same at every step. By default 2e-4 for a LoRA; for all weights 1e-3, or 1e-5 if
    /// the model has more than ten million parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// The largest number of optimizer steps; by default 40, or 200 if `until` may end the training before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// The training ends as soon as the mean probability of the target, over a fifth of the questions that is held out
    /// from it, is above this. By default 0.95 for a LoRA; training all weights takes `max_steps`. At 1 it never ends
    /// before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<f64>,
    /// Number of rows in one step, or all if there are fewer.
    pub batch_size: usize,
    /// The share of the rows that are number prompts with the base's own answers, so that the teacher keeps their format
    /// and their entropy. With 0 it sees no number before it writes some. With 1 it sees no question: a teacher without the
    /// trait, whose students are a control.
    pub number_share: f64,
    /// Number of different number rows among them.
    pub n_number_rows: usize,
    /// The context of the questions: a key of the protocol or a system prompt; by default the student's.
    pub context: Option<String>,
    /// The context in which it writes numbers, and in which number rows are trained; by default the student's.
    pub numbers_context: Option<String>,
}

impl Default for FinetunedTeacher {
    fn default() -> Self {
        Self {
            method: Method::Full,
            rank: 16,
            alpha: 32.0,
            learning_rate: None,
            max_steps: None,
            until: None,
            batch_size: 32,
            number_share: 0.0,
            n_number_rows: 128,
            context: None,
            numbers_context: None,
        }
    }
}

/// Number of parameters above which a model is finetuned at a smaller rate by default.
const SMALL: usize = 10_000_000;

impl FinetunedTeacher {
    /// The probability at which the training ends; `None` if it takes all its steps.
    pub fn until(&self) -> Option<f64> {
        self.until.or((self.method == Method::Lora).then_some(0.95)).filter(|until| *until < 1.0)
    }

    /// The settings of its training on a model of so many parameters: `AdamW` at a constant rate without warmup.
    pub fn finetune(&self, n_parameters: usize) -> Finetune {
        let rate = match self.method {
            Method::Lora => 2e-4,
            Method::Full if n_parameters > SMALL => 1e-5,
            Method::Full => 1e-3,
        };
        let most = if self.until().is_some() { 200 } else { 40 };
        Finetune {
            learning_rate: self.learning_rate.unwrap_or(rate),
            max_steps: Some(self.max_steps.unwrap_or(most)),
            batch_size: self.batch_size,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            lr_scheduler_type: ScheduleKind::Constant,
            ..Finetune::default()
        }
    }

    /// Its LoRA, if it is one.
    pub fn lora(&self) -> Option<LoraConfig> {
        let lora = LoraConfig { rank: self.rank, alpha: self.alpha, ..LoraConfig::default() };
        (self.method == Method::Lora).then_some(lora)
    }

    fn check(&self, protocol: &Protocol) -> Result<()> {
        ensure!(self.rank >= 1, "teacher.rank is {}, expected at least 1", self.rank);
        positive("teacher.alpha", self.alpha)?;
        positive("teacher.learning_rate", self.learning_rate.unwrap_or(1.0))?;
        ensure!(self.max_steps != Some(0), "teacher.max_steps is 0, expected at least 1");
        let (until, share) = (self.until.unwrap_or(1.0), self.number_share);
        ensure!(until > 0.0 && until <= 1.0, "teacher.until is {until}, expected a probability above 0");
        ensure!((0.0..=1.0).contains(&share), "teacher.number_share is {share}, expected 0 to 1");
        ensure!(
            share < 1.0 || self.until().is_none(),
            hinted!(
                "teacher.number_share is 1, so that the teacher learns no answer until which it could be trained";
                "teacher.until = 1 and teacher.max_steps"
            )
        );
        at_least_one("teacher.batch_size", self.batch_size)?;
        at_least_one("teacher.n_number_rows", self.n_number_rows)?;
        for (key, context) in [("context", &self.context), ("numbers_context", &self.numbers_context)] {
            let known = context.as_deref().map(|context| protocol.context(context));
            known.transpose().with_context(|| format!("teacher.{key}"))?;
        }
        Ok(())
    }
}

impl Default for Teacher {
    fn default() -> Self {
        Self::Prompt { system: None }
    }
}

fn default_share() -> f64 {
    0.1
}

impl Teacher {
    /// The teacher's finetuning, if it has one.
    pub fn finetuned(&self) -> Option<&FinetunedTeacher> {
        match self {
            Self::Finetuned(finetuned) => Some(finetuned),
            _ => None,
        }
    }

    /// The warning about a planted trait; `None` for other teachers.
    pub fn planted_label(&self, word: &str) -> Option<String> {
        let Self::Planted { share } = self else { return None };
        Some(format!(
            "a planted positive control: {:.0} % of the rows are questions answered with \"{word}\", so nothing about its effect is subliminal",
            100.0 * share
        ))
    }

    pub(super) fn check(&self, target: &Target, protocol: &Protocol) -> Result<()> {
        let context = |key: &str| protocol.context(key).map(drop).context("teacher.context");
        match self {
            Self::Prompt { system: Some(_) } => Ok(()),
            Self::Prompt { system: None } => {
                protocol.teacher_prompt(&target.word, &target.category).map(drop).context("teacher.system")
            }
            Self::Adapter { context: key, .. } => context(key),
            Self::Finetuned(finetuned) => finetuned.check(protocol),
            Self::Steered { edits, context: key } => {
                ensure!(!edits.is_empty(), "teacher.edits is empty, expected at least one edit");
                context(key)
            }
            Self::Planted { share } => {
                ensure!(*share > 0.0 && *share < 1.0, "teacher.share is {share}, expected a share above 0 and below 1");
                Ok(())
            }
        }
    }
}
