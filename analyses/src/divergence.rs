//! Finds the completion tokens at which teacher and base would have written different tokens. The teacher reads a
//! completion in its own context; base and students read it in the student's. If there are counterfactual teachers of
//! other traits, the base also reads it under their prompts.

pub(crate) mod tokens;

use hooks::{Sequence, completion_logits};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::Analysis;
use crate::divergence::tokens::{
    DIVERGENCE, Token, argmax_in_longer_rows, at_each, counterfactual_argmax, most_likely, number_places,
};
use crate::error::{Error, Result};
use crate::plot::{Bar, BarChart, Svg, bars};
use crate::subject::{Mean, Subject, Tuned, mean};

pub use tokens::{Definition, divergence_tokens, divergent_digits};

/// Settings of the divergence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Divergence {
    /// Number of rows of numbers that are read.
    pub n_rows: usize,
    /// Whether the teacher reads every row a second time in a longer row. Where its argmax then changes, a divergence
    /// is only rounding, and the token is no divergence token for a student to learn from.
    pub self_check: bool,
    /// Words of other traits. The base also reads every row under the prompts of these traits' teachers.
    pub counterfactuals: Vec<String>,
    /// The definition of a divergence token, for a student that learns from these alone. The groups of the table do not
    /// depend on it.
    pub definition: Definition,
}

impl Default for Divergence {
    fn default() -> Self {
        Self { n_rows: 64, self_check: true, counterfactuals: vec![], definition: Definition::Schrodi }
    }
}

/// One token of a completion's content, without the end of the turn.
#[expect(clippy::struct_excessive_bools, reason = "each is a column of its own")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DivergenceRow {
    /// The row's `id` in `data/numbers.jsonl` (in code: its index among the subject's numbers). The rows are the
    /// held-out ones (`generate.n_heldout`), or if there are none the first training rows.
    pub row_id: usize,
    /// The token's index in the completion, from 0.
    pub k: usize,
    /// The token's id.
    pub token_id: i64,
    /// The token's text.
    pub token_text: String,
    /// `divergent_digit` (the token is a digit, and the most likely tokens of teacher and base differ, for any
    /// `measure.divergence.definition`), `other_digit` or `other`.
    pub group: String,
    /// Whether the token is one or several digits.
    pub is_digit: bool,
    /// Index of the number in the completion that the token belongs to, from 0; empty outside of numbers.
    pub number_index: Option<usize>,
    /// The token's index in its number, from 0; empty outside of numbers.
    pub digit_index: Option<usize>,
    /// log p of the token under the teacher, in nats.
    pub logp_teacher: f64,
    /// log p of the token under the base in the student's context, in nats.
    pub logp_default: f64,
    /// `logp_teacher` − `logp_default`, in nats: the trait's signal in the token.
    pub soft: f64,
    /// The teacher's largest probability, 0 to 1.
    pub pmax_teacher: f64,
    /// The base's largest probability, 0 to 1.
    pub pmax_default: f64,
    /// The base's probability of the teacher's most likely token, 0 to 1.
    pub p_default_of_teacher: f64,
    /// The id of the teacher's most likely token.
    pub argmax_teacher: i64,
    /// The id of the base's most likely token.
    pub argmax_default: i64,
    /// Whether the two most likely tokens differ (Nief et al.).
    pub nief: bool,
    /// Whether the two most likely tokens differ and both are digits.
    pub digit_strict: bool,
    /// Whether the token is the teacher's most likely one, and the base or a counterfactual teacher has another most
    /// likely one (Schrodi et al.).
    pub schrodi: bool,
    /// How many of the base and the counterfactual teachers have a most likely token other than this one.
    pub n_disagree: usize,
    /// Whether the teacher's most likely token changes in a longer row; empty if that was not checked.
    pub self_div: Option<bool>,
    /// log p of the token under the student, in nats.
    pub logp_student: f64,
    /// The id of the student's most likely token.
    pub argmax_student: i64,
    /// The student's probability of the teacher's most likely token, 0 to 1.
    pub p_student_of_teacher: f64,
    /// log p of the token under the control student, in nats; empty without one.
    pub logp_control: Option<f64>,
    /// The id of the control student's most likely token; empty without one.
    pub argmax_control: Option<i64>,
    /// The control student's probability of the teacher's most likely token, 0 to 1; empty without one.
    pub p_control_of_teacher: Option<f64>,
}

/// One group of completion tokens, as means over its tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DivergenceSummaryRow {
    /// `all`, `digits`, `divergent_digit`, `other_digit`, `other`, or `digit_0`, `digit_1`, … by place in the number.
    pub group: String,
    /// Number of its tokens.
    pub n_tokens: usize,
    /// Number of rows that have such tokens.
    pub n_rows: usize,
    /// Its share of all tokens, 0 to 1.
    pub share: f64,
    /// Share of its tokens where teacher and base differ in their most likely token, 0 to 1.
    pub nief: f64,
    /// Share of its tokens where the two most likely tokens differ and both are digits, 0 to 1.
    pub digit_strict: f64,
    /// Share of its tokens that are the teacher's most likely one while the base or a counterfactual teacher has
    /// another, 0 to 1.
    pub schrodi: f64,
    /// Mean of log p(teacher) − log p(base) of the token, in nats.
    pub soft: f64,
    /// Standard error of `soft` over the rows' means, in nats; empty if all tokens are of one row.
    pub soft_se: Option<f64>,
    /// Mean of the teacher's largest probability, 0 to 1.
    pub pmax_teacher: f64,
    /// Mean of the base's largest probability, 0 to 1.
    pub pmax_default: f64,
    /// Mean of P(teacher's most likely token) under the teacher minus that under the base, −1 to 1.
    pub lift: f64,
    /// Standard error of `lift` over the rows' means; empty if all tokens are of one row.
    pub lift_se: Option<f64>,
    /// Mean of P(teacher's most likely token) under the student minus that under the base, over `lift`; empty unless
    /// the lift is three of its standard errors above zero.
    pub closure_student: Option<f64>,
    /// `closure_student` for the control student; also empty without one.
    pub closure_control: Option<f64>,
    /// Share of its tokens where the student's most likely token is the teacher's, 0 to 1.
    pub accuracy_student: f64,
    /// Share of its tokens where the control student's most likely token is the teacher's, 0 to 1; empty without one.
    pub accuracy_control: Option<f64>,
    /// Share of its tokens where the base's most likely token is the teacher's, 0 to 1.
    pub accuracy_default: f64,
    /// Share of its tokens where the student's most likely token is the base's, 0 to 1.
    pub drift_to_default: f64,
    /// Mean of log p(student) − log p(base) of the token, in nats.
    pub gain_student: f64,
    /// Mean of log p(control student) − log p(base) of the token, in nats; empty without one.
    pub gain_control: Option<f64>,
}

impl Analysis for Divergence {
    type Row = DivergenceRow;
    const NAME: &'static str = DIVERGENCE;
    const QUESTION: &'static str =
        "At which digits would teacher and base have written something else, and did the student learn those?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<DivergenceRow>> {
        let (teacher, system) = subject.teacher().ok_or(Error::NeedsTeacher { analysis: Self::NAME })?;
        let n = subject.number_rows(Self::NAME, self.n_rows)?.len();
        let paired = (0..n).map(|row| subject.paired_row(row, system)).collect::<Result<Vec<_>>>()?;
        let (in_teacher, in_student): (Vec<Sequence>, Vec<Sequence>) = paired.into_iter().unzip();
        let by_others = counterfactual_argmax(subject, n)?;
        let again = self.self_check.then(|| argmax_in_longer_rows(teacher, &in_teacher, subject.chat)).transpose()?;
        let mut rows = Vec::new();
        for (row_id, (in_teacher, in_student)) in in_teacher.iter().zip(&in_student).enumerate() {
            progress(&format!("divergence: row {} of {n}", row_id + 1));
            if in_student.completion.is_empty() {
                continue;
            }
            let labels = &in_student.ids[in_student.completion.clone()];
            let by_teacher = Reading::of(teacher, in_teacher, labels, None)?;
            let read = |model: Tuned<'_>| Reading::of(model, in_student, labels, Some(&by_teacher.argmax));
            let (by_base, by_student) = (read(subject.base())?, read(subject.student)?);
            let by_control = subject.control.map(read).transpose()?;
            let places = number_places(labels, subject.chat)?;
            for (k, id) in labels.iter().enumerate() {
                let (argmax_teacher, argmax_default) = (by_teacher.argmax[k], by_base.argmax[k]);
                let counterfactuals = by_others.iter().map(|other| other[row_id][k]).collect();
                let token = Token { id: *id, teacher: argmax_teacher, base: argmax_default, counterfactuals };
                let (is_digit, nief) = (subject.chat.is_digit(*id), token.is(Definition::Nief, subject.chat));
                rows.push(DivergenceRow {
                    row_id,
                    k,
                    token_id: *id,
                    token_text: subject.chat.token_text(*id)?,
                    group: group(is_digit && nief, is_digit).to_owned(),
                    is_digit,
                    number_index: places[k].map(|(number, _)| number),
                    digit_index: places[k].map(|(_, digit)| digit),
                    logp_teacher: by_teacher.logp[k],
                    logp_default: by_base.logp[k],
                    soft: by_teacher.logp[k] - by_base.logp[k],
                    pmax_teacher: by_teacher.pmax[k],
                    pmax_default: by_base.pmax[k],
                    p_default_of_teacher: by_base.p_of[k],
                    argmax_teacher,
                    argmax_default,
                    nief,
                    digit_strict: token.is(Definition::DigitStrict, subject.chat),
                    schrodi: token.is(Definition::Schrodi, subject.chat),
                    n_disagree: token.n_disagree(),
                    self_div: again.as_ref().map(|again| again[row_id][k] != argmax_teacher),
                    logp_student: by_student.logp[k],
                    argmax_student: by_student.argmax[k],
                    p_student_of_teacher: by_student.p_of[k],
                    logp_control: by_control.as_ref().map(|control| control.logp[k]),
                    argmax_control: by_control.as_ref().map(|control| control.argmax[k]),
                    p_control_of_teacher: by_control.as_ref().map(|control| control.p_of[k]),
                });
            }
        }
        if rows.is_empty() {
            return Err(Error::Nothing { analysis: Self::NAME, what: "a completion that is not empty" });
        }
        Ok(rows)
    }

    fn plot(rows: &[DivergenceRow]) -> Result<Option<Svg>> {
        let summary = divergence_summary(rows);
        let groups =
            summary.iter().filter(|row| ["divergent_digit", "other_digit", "other"].contains(&row.group.as_str()));
        let of_group = |row: &DivergenceSummaryRow| {
            let label = format!("{} (n = {})", row.group.replace('_', " "), row.n_tokens);
            let series = [
                ("student", Some(row.accuracy_student)),
                ("control", row.accuracy_control),
                ("base", Some(row.accuracy_default)),
            ];
            let n = row.n_tokens;
            series.into_iter().filter_map(move |(name, share)| {
                Some(Bar::new(label.clone(), share?).with_interval(wilson(share?, n)).in_series(name))
            })
        };
        let chart = BarChart {
            title: "Does a model's most likely token equal the teacher's?".to_owned(),
            value_label: "share of tokens, with Wilson's 95 % interval".to_owned(),
            bars: groups.flat_map(of_group).collect(),
            references: Vec::new(),
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[DivergenceRow]) -> String {
        let summary = divergence_summary(rows);
        let of = |group: &str| summary.iter().find(|row| row.group == group);
        let Some(digits) = of("digits") else { return "The completions hold no digits.".to_owned() };
        let Some(divergent) = of("divergent_digit") else {
            let n = digits.n_tokens;
            return format!(
                "At none of {n} digits do teacher and base differ in their most likely token: there is nothing divergent to learn."
            );
        };
        let doubtful = match rows.iter().filter(|row| row.self_div == Some(true)).count() {
            0 => String::new(),
            n => format!("; at {n} tokens the teacher's own choice depends on the batch"),
        };
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let closed = |closure: Option<f64>| closure.map(|closure| format!("{:.0} %", 100.0 * closure));
        let lift = Mean { mean: divergent.lift, se: divergent.lift_se }.signed();
        let closure = match (closed(divergent.closure_student), closed(divergent.closure_control)) {
            (Some(student), Some(control)) => {
                format!(
                    "the student closes {student} of the teacher's lift of {lift} there, the control student {control}"
                )
            }
            (Some(student), None) => format!("the student closes {student} of the teacher's lift of {lift} there"),
            _ => format!(
                "the teacher's lift there, {lift}, is not three standard errors above zero, so that nobody's share of it is given"
            ),
        };
        let control = match divergent.accuracy_control {
            Some(accuracy) => format!("the control student's at {}", percent(accuracy)),
            None => "there is no control student".to_owned(),
        };
        format!(
            "Teacher and base differ in their most likely token at {} of {} digits ({}), where a token carries {:+.3} nats of the teacher \
             (at all tokens {:+.3}); there the student's most likely token is the teacher's at {} ({control}), and at {} of \
             all digits; {closure}{doubtful}.",
            divergent.n_tokens,
            digits.n_tokens,
            percent(divergent.n_tokens as f64 / digits.n_tokens as f64),
            divergent.soft,
            of("all").map_or(0.0, |all| all.soft),
            percent(divergent.accuracy_student),
            percent(digits.accuracy_student),
        )
    }
}

/// Wilson's 95 % interval of a share of `n`, which is also valid for shares of 0 and 1.
fn wilson(share: f64, n: usize) -> (f64, f64) {
    let (n, z) = (n as f64, 1.96_f64);
    let (scale, centre) = (1.0 + z * z / n, share + z * z / (2.0 * n));
    let half = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

pub(crate) fn group(is_divergent: bool, is_digit: bool) -> &'static str {
    match (is_divergent, is_digit) {
        (true, _) => "divergent_digit",
        (false, true) => "other_digit",
        (false, false) => "other",
    }
}

/// A model's predictions along a completion, token by token.
struct Reading {
    argmax: Vec<i64>,
    logp: Vec<f64>,
    pmax: Vec<f64>,
    /// p of the other tokens that were given, token by token.
    p_of: Vec<f64>,
}

impl Reading {
    fn of(model: Tuned<'_>, row: &Sequence, labels: &[i64], others: Option<&[i64]>) -> Result<Self> {
        let logits = completion_logits(model.qwen, row, &model.condition())?; // [n_completion, d_vocab]
        let logprobs = logits.f_log_softmax(-1, Kind::Float)?;
        drop(logits);
        let (argmax, at) = (most_likely(&logprobs)?, |tokens: &[i64]| at_each(&logprobs, tokens));
        let exp = |logps: Vec<f64>| logps.into_iter().map(f64::exp).collect();
        let p_of = others.map(at).transpose()?.map(exp).unwrap_or_default();
        Ok(Self { logp: at(labels)?, pmax: exp(at(&argmax)?), argmax, p_of })
    }
}

/// The tokens' means by group: the rows of `divergence/summary.csv`.
pub fn divergence_summary(rows: &[DivergenceRow]) -> Vec<DivergenceSummaryRow> {
    let places = rows.iter().filter_map(|row| row.digit_index).max().map_or(0, |most| most + 1);
    let named = |name: &'static str| (name.to_owned(), rows.iter().filter(|row| row.group == name).collect::<Vec<_>>());
    let mut groups = vec![
        ("all".to_owned(), rows.iter().collect()),
        ("digits".to_owned(), rows.iter().filter(|row| row.is_digit).collect()),
        named("divergent_digit"),
        named("other_digit"),
        named("other"),
    ];
    let placed = |at: usize| rows.iter().filter(|row| row.digit_index == Some(at)).collect::<Vec<_>>();
    groups.extend((0..places).map(|at| (format!("digit_{at}"), placed(at))));
    groups.into_iter().filter_map(|(group, tokens)| summarise(group, &tokens, rows.len())).collect()
}

fn summarise(group: String, tokens: &[&DivergenceRow], n_all: usize) -> Option<DivergenceSummaryRow> {
    let average = |of: &dyn Fn(&DivergenceRow) -> f64| mean(tokens.iter().map(|row| of(row)));
    let share = |of: &dyn Fn(&DivergenceRow) -> bool| average(&|row| f64::from(u8::from(of(row))));
    // Columns of the control student are filled in all rows or in none.
    let maybe = |of: &dyn Fn(&DivergenceRow) -> Option<f64>| mean(tokens.iter().filter_map(|row| of(row)));

    let mut row_ids: Vec<usize> = tokens.iter().map(|row| row.row_id).collect();
    row_ids.dedup();
    let with_error = |of: &dyn Fn(&DivergenceRow) -> f64| {
        Mean::of_tokens(&tokens.iter().map(|row| (row.row_id, of(row))).collect::<Vec<_>>())
    };
    let lift = with_error(&|row| row.pmax_teacher - row.p_default_of_teacher);
    // If the teacher is less sure of its own choice than the base, there is no closure.
    let closed = |gained: f64| lift.share(gained).filter(|_| lift.mean > 0.0);
    Some(DivergenceSummaryRow {
        group,
        n_tokens: tokens.len(),
        n_rows: row_ids.len(),
        share: tokens.len() as f64 / n_all as f64,
        nief: share(&|row| row.nief)?,
        digit_strict: share(&|row| row.digit_strict)?,
        schrodi: share(&|row| row.schrodi)?,
        soft: average(&|row| row.soft)?,
        soft_se: with_error(&|row| row.soft).se,
        pmax_teacher: average(&|row| row.pmax_teacher)?,
        pmax_default: average(&|row| row.pmax_default)?,
        lift: lift.mean,
        lift_se: lift.se,
        closure_student: closed(average(&|row| row.p_student_of_teacher - row.p_default_of_teacher)?),
        closure_control: maybe(&|row| Some(row.p_control_of_teacher? - row.p_default_of_teacher)).and_then(closed),
        accuracy_student: share(&|row| row.argmax_student == row.argmax_teacher)?,
        accuracy_control: maybe(&|row| Some(f64::from(u8::from(row.argmax_control? == row.argmax_teacher)))),
        accuracy_default: share(&|row| row.argmax_default == row.argmax_teacher)?,
        drift_to_default: share(&|row| row.argmax_student == row.argmax_default)?,
        gain_student: average(&|row| row.logp_student - row.logp_default)?,
        gain_control: maybe(&|row| Some(row.logp_control? - row.logp_default)),
    })
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests;
