//! The rows of a training's logs, `train.csv` and `train_rows.csv`, and its progress.

use serde::{Deserialize, Serialize};

/// One optimizer step; a line of `train.csv`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Number of optimizer steps done, including this one.
    pub step: u64,
    /// Number of epochs (passes over all rows) done after this step, with its fraction.
    pub epoch: f64,
    /// The learning rate of this step, after warm-up and schedule.
    pub learning_rate: f64,
    /// Mean negative log-likelihood of the step's targets before the step, in nats per token.
    pub loss: f64,
    /// Norm of the whole gradient of the loss before clipping, in nats per unit of the parameters.
    pub grad_norm: f64,
    /// Number of tokens that the loss is taken over.
    pub n_targets: usize,
    /// Frobenius norm of all the LoRA's weight changes s·B·A together, after the step, in units of the weights; empty
    /// in full finetuning.
    pub delta_w_norm: Option<f64>,
    /// Share of the stored weights that the step changed, 0 to 1; empty for a LoRA.
    pub changed_fraction: Option<f64>,
}

/// The rows of one optimizer step; a line of `train_rows.csv`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRowsRow {
    /// The optimizer step, from 1, as in `train.csv`.
    pub step: u64,
    /// The step's rows in the order in which they were drawn, as their `id` in `data/numbers.jsonl` (for the control
    /// student in `data/control.jsonl`), separated by spaces.
    pub row_ids: String,
}

/// The mean loss per target over the first and over the last quarter of the steps, in nats. Single steps are noisy.
pub fn first_and_last_quarter(rows: &[StepRow]) -> Option<(f64, f64)> {
    let quarter = rows.len().div_ceil(4);
    let mean = |rows: &[StepRow]| {
        let targets: usize = rows.iter().map(|row| row.n_targets).sum();
        rows.iter().map(|row| row.loss * row.n_targets as f64).sum::<f64>() / targets as f64
    };
    (!rows.is_empty()).then(|| (mean(&rows[..quarter]), mean(&rows[rows.len() - quarter..])))
}

/// The progress and speed of a training. It is never written to a file, since it differs between runs.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Number of optimizer steps done.
    pub step: u64,
    /// Number of all steps.
    pub total_steps: u64,
    /// Number of tokens run through the model so far.
    pub tokens: u64,
    /// Tokens per second, of this run so far.
    pub tokens_per_second: f64,
}

/// Called after each step with its row and the progress. A resumed training first repeats the rows of earlier steps.
pub type Log<'a> = &'a mut dyn FnMut(&StepRow, &Progress) -> anyhow::Result<()>;
