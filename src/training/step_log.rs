//! A training's lines: `train.csv`, `train_rows.csv`, and what is shown while it runs.

use serde::{Deserialize, Serialize};

/// A line of `train.csv`: one optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Frobenius norm of all the LoRA's weight changes s·B·A together, after the step, in units of the weights; empty
    /// in full finetuning.
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
