//! The model that writes the numbers: a prompted or a finetuned one, or no teacher (the planted positive control).

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Target;
use super::range::{at_least_one, positive};
use super::student::default_context;
use crate::data::protocol::Protocol;
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
    /// A copy of the base whose weights are all finetuned to answer questions about the category with the target,
    /// without numbers. It then writes its numbers in the student's context.
    Finetuned {
        /// The learning rate of `AdamW`, the same at every step.
        #[serde(default = "default_learning_rate")]
        learning_rate: f64,
        /// Number of optimizer steps.
        #[serde(default = "default_max_steps")]
        max_steps: u64,
        /// Number of questions in one step, or all if there are fewer.
        #[serde(default = "default_batch_size")]
        batch_size: usize,
        /// The context of the questions: a key of the protocol or a system prompt; by default the student's.
        context: Option<String>,
    },
    /// A positive control: the untouched model's numbers, with a share of the rows replaced by questions answered with
    /// the target. Its effect is not subliminal.
    Planted {
        /// The share of the rows that is replaced.
        #[serde(default = "default_share")]
        share: f64,
    },
}

impl Default for Teacher {
    fn default() -> Self {
        Self::Prompt { system: None }
    }
}

fn default_learning_rate() -> f64 {
    1e-3
}

fn default_max_steps() -> u64 {
    40
}

fn default_batch_size() -> usize {
    32
}

fn default_share() -> f64 {
    0.1
}

impl Teacher {
    /// The settings of training a finetuned teacher, with constant rate and no warmup; `None` for other teachers.
    pub fn finetune(&self) -> Option<Finetune> {
        let Self::Finetuned { learning_rate, max_steps, batch_size, .. } = self else { return None };
        Some(Finetune {
            learning_rate: *learning_rate,
            max_steps: Some(*max_steps),
            batch_size: *batch_size,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            lr_scheduler_type: ScheduleKind::Constant,
            ..Finetune::default()
        })
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
            Self::Finetuned { learning_rate, max_steps, batch_size, context: key } => {
                positive("teacher.learning_rate", *learning_rate)?;
                ensure!(*max_steps >= 1, "teacher.max_steps is 0, expected at least 1");
                at_least_one("teacher.batch_size", *batch_size)?;
                key.as_deref().map_or(Ok(()), context)
            }
            Self::Planted { share } => {
                ensure!(*share > 0.0 && *share < 1.0, "teacher.share is {share}, expected a share above 0 and below 1");
                Ok(())
            }
        }
    }
}
