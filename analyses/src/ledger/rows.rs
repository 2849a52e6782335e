//! The tables of the ledger.

use hooks::Proj;
use serde::{Deserialize, Serialize, Serializer};

use super::measure::Measure;

/// A number of a table with many lines, with the digits of an f32.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form
fn as_f32<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f32(*value as f32)
}

#[allow(clippy::trivially_copy_pass_by_ref, clippy::ref_option)] // serde's form
fn as_f32_if_there<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|value| value as f32).serialize(serializer)
}

/// A token of a training step and the change of the measure that is booked to it, to first order along the path that was
/// taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EntryRow {
    /// `student` or `control`.
    pub model: String,
    /// The word whose measure is booked; `numbers` for the loss on numbers.
    pub target: String,
    /// `margin` or `logp`; `loss` for that on numbers.
    pub measure: Measure,
    /// The optimizer step, from 1.
    pub step: usize,
    /// The row's `id` in `data/numbers.jsonl`, for the control student in `data/control.jsonl`.
    pub row_id: usize,
    /// The token's index in the completion, from 0; negative in the header before it.
    pub k: i64,
    /// The token's id.
    pub token_id: i64,
    /// The token's text.
    pub token_text: String,
    /// `first_digit` of a number, `later_digit`, or `other`.
    pub group: String,
    /// Whether the most likely tokens of teacher and base differ (Nief et al.); empty without a teacher.
    pub nief: Option<bool>,
    /// Whether the token is the teacher's most likely one and not the base's (Schrodi et al., without counterfactual
    /// teachers); empty without a teacher.
    pub schrodi: Option<bool>,
    /// The token's probability under the teacher, 0 to 1; empty without one.
    pub p_teacher: Option<f32>,
    /// The token's probability under the base.
    pub p_base: f32,
    /// The token's probability under the student before the step.
    pub p_student: f32,
    /// The teacher's largest probability; empty without one.
    pub pmax_teacher: Option<f32>,
    /// The base's largest probability.
    pub pmax_base: f32,
    /// The student's largest probability before the step.
    pub pmax_student: f32,
    /// The token's loss under the student before the step, times its share of the step's loss, in nats.
    #[serde(serialize_with = "as_f32")]
    pub loss: f64,
    /// The change of the measure that is booked to the token as it was written, or to its soft label, in nats.
    #[serde(serialize_with = "as_f32")]
    pub entry: f64,
    /// The entry's expectation if the teacher had written the token; empty without a teacher.
    #[serde(serialize_with = "as_f32_if_there")]
    pub entry_teacher: Option<f64>,
    /// The entry's expectation if the base had written the token.
    #[serde(serialize_with = "as_f32")]
    pub entry_base: f64,
}

/// The change of the measure that is booked to a step's rows, by where it was written and where the measure reads it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartRow {
    /// `student` or `control`.
    pub model: String,
    /// The word whose measure is booked; `numbers` for the loss on numbers.
    pub target: String,
    /// `margin` or `logp`; `loss` for that on numbers.
    pub measure: Measure,
    /// The optimizer step, from 1.
    pub step: usize,
    /// The part of the training rows at whose tokens the adapter learned it: `entity`, `sys.content_other`, `template`,
    /// `user.content` or `gen`.
    pub written: String,
    /// The part of the questions at whose tokens the adapter acts for the measure.
    pub read: String,
    /// The block.
    pub layer: usize,
    /// The linear map.
    pub proj: Proj,
    /// The change that is booked, in nats.
    pub booked: f64,
}

/// The book of a group of tokens, over all steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerRow {
    /// `student` or `control`.
    pub model: String,
    /// The word whose measure is booked; `numbers` for the loss on numbers.
    pub target: String,
    /// `margin` or `logp`; `loss` for that on numbers.
    pub measure: Measure,
    /// `all`, `first_digit`, `later_digit` and `other` tokens; `divergent_digit` and `same_digit` (whether the most likely
    /// tokens of teacher and base differ); `weight_decay`; `residual`: what all lines together miss of the change.
    pub group: String,
    /// Number of tokens in all steps.
    pub n_tokens: usize,
    /// Share of all tokens, 0 to 1.
    pub share: f64,
    /// Share of the loss, 0 to 1.
    pub share_of_loss: f64,
    /// The change of the measure over the training that is booked to these tokens as they were written, in nats.
    pub booked: f64,
    /// Its standard error over rows, in nats; empty if there is one row.
    pub booked_se: Option<f64>,
    /// The expectation of `booked` if the teacher had written each token, in nats; empty without a teacher.
    pub teacher: Option<f64>,
    /// Its standard error over rows, in nats.
    pub teacher_se: Option<f64>,
    /// The expectation of `booked` if the base had written each token, in nats: the pull back to the base.
    pub pull: f64,
    /// Its standard error over rows, in nats.
    pub pull_se: Option<f64>,
    /// `teacher` − `pull`, in nats: the teacher's drive; empty for rows that the base wrote.
    pub drive: Option<f64>,
    /// Its standard error over rows, in nats.
    pub drive_se: Option<f64>,
    /// `booked` less its expectation under the model that wrote the rows, which is `teacher`, or `pull` for rows that the
    /// base wrote, in nats: the luck of the sample.
    pub luck: Option<f64>,
    /// Its standard error over rows, in nats.
    pub luck_se: Option<f64>,
    /// The measured change of the measure over the training, in nats.
    pub change: f64,
}
