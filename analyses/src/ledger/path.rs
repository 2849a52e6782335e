//! The path of a LoRA through its training: its tensors after each step, and how each step was made from gradients.

use hooks::{Adapter, Gate, Sequence};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// A row that was learned from.
#[derive(Clone, Debug)]
pub struct LearnedRow {
    /// Its id in the tables.
    pub id: usize,
    /// The row in the student's context.
    pub row: Sequence,
    /// The row with the same completion in the teacher's context, if there is a teacher.
    pub in_teacher: Option<Sequence>,
    /// The weight of each token's loss, `[pos]`; 0 if it was not learned from.
    pub weights: Vec<f64>,
    /// The adapter's dose at each token, `[pos]`, where a gate acts in the training; `None` is 1.
    pub doses: Option<Vec<f64>>,
    /// The soft labels of the tokens that were learned from, if these were not learned as they are written.
    pub soft: Option<SoftTargets>,
}

/// The soft labels of a row's tokens (see [`hooks::Labels::soft`]).
#[derive(Clone, Debug)]
pub struct SoftTargets {
    /// Number of tokens that have a probability at each place.
    pub k: usize,
    /// Their ids, k for each place.
    pub ids: Vec<i64>,
    /// Their probabilities.
    pub probs: Vec<f32>,
}

/// An optimizer step θ ← θ(1 − η·decay) − η D ∘ m, where m is an average of clipped gradients.
#[derive(Debug)]
pub struct Step {
    /// The rows whose mean loss was descended, by index.
    pub rows: Vec<usize>,
    /// η.
    pub learning_rate: f64,
    /// The factor by which the gradient was clipped, at most 1.
    pub clip: f64,
    /// D, shaped as the adapter's tensors; `None` is 1. A tensor that was not trained has zeros.
    pub scales: Option<Vec<Tensor>>,
}

/// How a step's m is made from gradients g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Average {
    /// m ← β m + (1 − β) g, divided by 1 − βᵗ (Adam).
    Corrected(f64),
    /// m ← μ m + g (SGD with momentum; 0 is none).
    Sum(f64),
}

/// A training of a LoRA, from which its books are made.
#[derive(Debug)]
pub struct Path {
    /// The adapter's tensors before the first step and after each, in the order of `Adapter::parameters`; one more than
    /// steps.
    pub states: Vec<Vec<Tensor>>,
    /// The steps.
    pub steps: Vec<Step>,
    /// How m is made.
    pub average: Average,
    /// Weight decay of the weights themselves (`AdamW`).
    pub decay: f64,
    /// Weight decay that is added to the gradient (SGD).
    pub decay_in_gradient: f64,
    /// The rows.
    pub rows: Vec<LearnedRow>,
    /// Whether the teacher wrote the rows; else the base did.
    pub by_teacher: bool,
    /// Where the adapter acts in the training.
    pub gate: Gate,
}

impl Path {
    /// The adapter on the way from the state before a step to that after it, in this dtype; `part` 0 is before.
    pub(super) fn adapter(&self, like: &Adapter, step: usize, part: f64, kind: Kind) -> Result<Adapter> {
        let [from, to] = [step, step + 1].map(|at| &self.states[at.min(self.steps.len())]);
        let between = |(from, to): (&Tensor, &Tensor)| -> Result<Tensor> {
            let (from, to) = (from.f_to_kind(kind)?, to.f_to_kind(kind)?);
            Ok(from.f_add(&to.f_sub(&from)?.f_mul_scalar(part)?)?)
        };
        let values = from.iter().zip(to).map(between).collect::<Result<Vec<_>>>()?;
        Ok(like.with_values(&values)?)
    }

    /// Refuses a path whose parts do not belong together.
    pub(super) fn check(&self) -> Result<()> {
        let (states, steps, rows) = (self.states.len(), self.steps.len(), self.rows.len());
        let is_known = |step: &Step| !step.rows.is_empty() && step.rows.iter().all(|row| *row < rows);
        if steps == 0 || states != steps + 1 || !self.steps.iter().all(is_known) {
            let found = format!("{states} states, {steps} steps, {rows} rows");
            return Err(Error::setting("ledger", "path", "a state more than steps, of these rows", &found));
        }
        Ok(())
    }
}
