//! The table `[generate]`: writing and filtering the numbers.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::range::at_least_one;

/// The settings of writing and filtering the numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Generate {
    /// Largest number of prompts that are answered.
    pub n_prompts: usize,
    /// Largest number of accepted rows that are kept.
    pub n_keep: usize,
    /// The number of further accepted rows that the teacher writes and no student learns from. Directions, steering,
    /// divergence and gradients are measured at these; if it is 0, at the training rows.
    pub n_heldout: usize,
    /// 0 takes the most likely token each time, 1 samples from the model's probabilities.
    pub temperature: f64,
    /// Largest number of tokens of an answer.
    pub max_new_tokens: usize,
    /// The tokens that can be written.
    pub constrain: Constrain,
    /// Number of prompts that are answered at once.
    pub batch_size: usize,
    /// Numbers for which an answer is rejected.
    pub banned: Vec<u32>,
    /// The least signal, in nats per token, with which the run goes on to training; see `data/generate.csv`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least_signal: Option<f64>,
    /// A file of the student's rows, if they were written elsewhere: JSON lines of messages, or of prompt and
    /// completion. The teacher then writes none.
    pub numbers: Option<PathBuf>,
}

impl Default for Generate {
    fn default() -> Self {
        Self {
            n_prompts: 512,
            n_keep: 256,
            n_heldout: 0,
            temperature: 1.0,
            max_new_tokens: 200,
            constrain: Constrain::None,
            batch_size: 64,
            banned: vec![],
            least_signal: None,
            numbers: None,
        }
    }
}

/// The tokens that can be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Constrain {
    /// All tokens.
    #[default]
    None,
    /// Tokens that continue a list of numbers; for models too small to keep a format.
    Numbers,
}

impl Generate {
    pub(super) fn check(&self) -> Result<()> {
        at_least_one("generate.n_prompts", self.n_prompts)?;
        at_least_one("generate.n_keep", self.n_keep)?;
        at_least_one("generate.max_new_tokens", self.max_new_tokens)?;
        at_least_one("generate.batch_size", self.batch_size)?;
        let in_range = self.temperature.is_finite() && self.temperature >= 0.0;
        ensure!(in_range, "generate.temperature is {}, expected 0 or a number above", self.temperature);
        let least = self.least_signal.unwrap_or_default();
        ensure!(least.is_finite(), "generate.least_signal is {least}, expected a number");
        let (keep, prompts, heldout) = (self.n_keep, self.n_prompts, self.n_heldout);
        ensure!(keep <= prompts, "generate.n_keep is {keep}, expected at most generate.n_prompts, which is {prompts}");
        let left = prompts - keep;
        ensure!(
            heldout <= left,
            "generate.n_heldout is {heldout}, expected at most {left}: generate.n_prompts is {prompts}, of which {keep} are to be kept"
        );
        Ok(())
    }
}
