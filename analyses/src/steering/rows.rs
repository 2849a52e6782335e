//! The table of steering: a row has an edit's scores, and its rank among random directions in the same edit.

use serde::{Deserialize, Serialize};

use crate::direction::Extraction;
use crate::error::Result;
use crate::stats::standard_deviation;
use crate::subject::Mean;
use crate::target::{Score, ScoreField, column};

/// One edit of the residual stream, as means over the questions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SteeringRow {
    /// The block, from 0, after which the residual stream is edited.
    pub layer: usize,
    /// The edit. Of the base: `learned` (the student's direction added), `random` (a random vector of its length added,
    /// as the mean over `n_random` vectors), `control_student` (the control student's direction, scaled to its length),
    /// `other_trait` (the direction of a student of another trait's teacher, scaled to its length), `project_out_base`
    /// (the learned direction taken out, which shows the effect of the removal alone). Of the student: `project_out`
    /// (the learned direction taken out), `project_out_random` (random directions taken out, as their mean). With the
    /// setting `replace`, after every block from `layer` 0 on, at the prompt's tokens: `replace` (the student, with its
    /// stream along each block's learned direction set to the base's on the same prompt), `transplant` (the base, with
    /// its stream set to the student's), and both along random directions, `replace_random` and `transplant_random`.
    pub kind: String,
    /// Factor of the vector; empty if a direction is taken out or replaced.
    pub coefficient: Option<f64>,
    /// The positions of the number prompts at which the direction was read: `all`, `last` or `class:CLASS[+CLASS]`.
    pub extraction: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the means are over.
    pub n_questions: usize,
    /// Number of random directions that the row is the mean over, or that it is ranked among; empty for other rows.
    pub n_random: Option<usize>,
    /// Length of the vector before its factor, in units of the residual stream: that of the learned direction after
    /// `layer`, to which the other vectors are scaled (`replace` and `transplant` use each block's direction; the
    /// column has the first block's length).
    pub vector_norm: f64,
    /// log p of the target minus the unedited base's, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired; for random directions, over the questions' means), in
    /// nats; empty with one question.
    pub delta_logp_se: Option<f64>,
    /// Standard deviation of `delta_logp` over the random directions, in nats; only for rows of random directions.
    pub delta_logp_sd: Option<f64>,
    /// Rank of `delta_logp` among the `n_random` random directions in the same edit, 1 to `n_random` + 1: 1 if no
    /// random direction raises the target as much (for `project_out` and `replace`: lowers it as much). Empty for
    /// random directions and `project_out_base`.
    pub rank_logp: Option<usize>,
    /// Margin minus the unedited base's, in nats.
    pub delta_margin: f64,
    /// Standard error of `delta_margin` over questions (paired, as `delta_logp_se`), in nats; empty with one question.
    pub delta_margin_se: Option<f64>,
    /// Standard deviation of `delta_margin` over the random directions, in nats; only for rows of random directions.
    pub delta_margin_sd: Option<f64>,
    /// Rank of `delta_margin` among the random directions, in the way of `rank_logp`.
    pub rank_margin: Option<usize>,
    /// log p of the target under the unedited student minus the unedited base's, in nats.
    pub student_delta_logp: f64,
    /// Margin of the unedited student minus the unedited base's, in nats.
    pub student_delta_margin: f64,
    /// `delta_logp` over `student_delta_logp`; empty unless the latter is three of its standard errors clear of zero.
    pub fraction_logp: Option<f64>,
    /// `delta_margin` over `student_delta_margin`; empty unless the latter is three of its standard errors clear of
    /// zero.
    pub fraction_margin: Option<f64>,
}

/// An edit: its block, kind and coefficient, and the length of its vector.
pub(super) type SteeringEdit<'a> = (usize, &'a str, Option<f64>, f64);

/// The unedited scores that edits are compared with, and the columns that all rows share.
pub(super) struct Around<'a> {
    pub(super) extraction: &'a Extraction,
    pub(super) target: &'a str,
    pub(super) base: &'a [Score],
    pub(super) student: &'a [Score],
}

impl Around<'_> {
    pub(super) fn row(&self, edit: SteeringEdit<'_>, scores: &[Score]) -> SteeringRow {
        let (layer, kind, coefficient, vector_norm) = edit;
        let (logp, margin) = (self.change(scores, LOGP), self.change(scores, MARGIN));
        let (student_logp, student_margin) = (self.change(self.student, LOGP), self.change(self.student, MARGIN));
        SteeringRow {
            layer,
            kind: kind.to_owned(),
            coefficient,
            extraction: self.extraction.to_string(),
            target: self.target.to_owned(),
            n_questions: scores.len(),
            vector_norm,
            delta_logp: logp.mean,
            delta_logp_se: logp.se,
            delta_margin: margin.mean,
            delta_margin_se: margin.se,
            student_delta_logp: student_logp.mean,
            student_delta_margin: student_margin.mean,
            fraction_logp: student_logp.share(logp.mean),
            fraction_margin: student_margin.share(margin.mean),
            ..SteeringRow::default()
        }
    }

    /// The row of an edit, with its rank among random directions in the same edit.
    pub(super) fn among(&self, edit: SteeringEdit<'_>, scores: &[Score], random: &[Vec<Score>]) -> SteeringRow {
        let (_, kind, ..) = edit;
        // A removal should lower the target, an addition should raise it.
        let sign = if kind == "project_out" || kind == "replace" { -1.0 } else { 1.0 };
        let rank = |of: ScoreField| {
            let own = sign * self.change(scores, of).mean;
            1 + random.iter().filter(|scores| sign * self.change(scores, of).mean >= own).count()
        };
        let given = |rank: usize| (!random.is_empty()).then_some(rank);
        SteeringRow {
            n_random: given(random.len()),
            rank_logp: given(rank(LOGP)),
            rank_margin: given(rank(MARGIN)),
            ..self.row(edit, scores)
        }
    }

    /// The row of random directions, with their mean and spread; `None` if there are none.
    pub(super) fn by_chance(&self, edit: SteeringEdit<'_>, random: &[Vec<Score>]) -> Result<Option<SteeringRow>> {
        if random.is_empty() {
            return Ok(None);
        }
        let mean = |question: usize| {
            let of =
                |of: ScoreField| random.iter().map(|scores| of(&scores[question])).sum::<f64>() / random.len() as f64;
            Score { logp_target: of(LOGP), margin: of(MARGIN), ..random[0][question] }
        };
        let means: Vec<Score> = (0..random[0].len()).map(mean).collect();
        let spread = |of: ScoreField| {
            standard_deviation(&random.iter().map(|scores| self.change(scores, of).mean).collect::<Vec<_>>())
        };
        Ok(Some(SteeringRow {
            n_random: Some(random.len()),
            delta_logp_sd: Some(spread(LOGP)?),
            delta_margin_sd: Some(spread(MARGIN)?),
            ..self.row(edit, &means)
        }))
    }

    /// The change from the base, question by question.
    fn change(&self, scores: &[Score], of: ScoreField) -> Mean {
        Mean::paired(&column(scores, of), &column(self.base, of))
    }
}

const LOGP: ScoreField = |score| score.logp_target;
const MARGIN: ScoreField = |score| score.margin;
