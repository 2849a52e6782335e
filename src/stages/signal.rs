//! The signal in a run's rows, before any training: by how much the teacher prefers them over the base. A student of rows
//! without signal has nothing of the teacher to learn.

use analyses::stats::standard_deviation;
use anyhow::{Result, bail};
use hooks::{Chat, Condition, Prediction, Qwen, Sequence, completion_predictions};
use serde::{Deserialize, Serialize};

use crate::data::dataset::{Sample, SummaryRow};
use crate::hinted;
use crate::output::publish::read_csv;
use crate::stages::run_dir::RunDir;
use crate::stages::teacher::TeacherModel;
use crate::stages::workbench::Workbench;

/// Nats per token below which no language model is known to have learned a trait from sampled rows. A pocket model has
/// at 0.014, from three thousand rows.
const LEAST_SIGNAL: f64 = 0.03;
/// The share of divergent tokens below which none is known to have.
const LEAST_DIVERGENT: f64 = 0.04;

/// The signal of a kept row; a line of `data/signal.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SignalRow {
    /// `teacher` or `control`.
    pub set: String,
    /// The row's id.
    pub id: usize,
    /// Number of tokens of its answer, with the end of the turn.
    pub n_tokens: usize,
    /// log p of the answer under the teacher, in the context in which it writes, less that under the base in the
    /// student's context; nats per token.
    pub signal: f64,
    /// Number of tokens at which the most likely tokens of the two differ.
    pub n_divergent: usize,
    /// Mean entropy of the predictions of the model that wrote the row, nats per token.
    pub entropy: f64,
}

/// The signal of each of some rows, in order. `bench` has the template in which the teacher writes.
pub fn of_rows(bench: &Workbench, teacher: &TeacherModel, set: &str, samples: &[Sample]) -> Result<Vec<SignalRow>> {
    let frozen = bench.frozen()?;
    let student_system = bench.student_system()?;
    let (system, condition) = (teacher.system.as_deref(), teacher.condition());
    let by_teacher = predictions(&bench.chat, system, samples, teacher.qwen(frozen), &condition)?;
    let by_base = predictions(&bench.chat, student_system.as_deref(), samples, frozen, &Condition::default())?;
    let both = samples.iter().zip(by_teacher.iter().zip(&by_base));
    Ok(both.map(|(sample, (teacher, base))| row(set, sample.id, teacher, base)).collect())
}

/// The predictions at each answer and the end of its turn.
fn predictions(
    chat: &Chat,
    system: Option<&str>,
    samples: &[Sample],
    qwen: &Qwen,
    condition: &Condition<'_>,
) -> Result<Vec<Vec<Prediction>>> {
    let row = |sample: &Sample| chat.row(system, &sample.prompt, &sample.completion_ids);
    let rows = samples.iter().map(row).collect::<hooks::Result<Vec<Sequence>>>()?;
    let mut found = completion_predictions(qwen, &rows, condition, 1)?;
    for (found, sample) in found.iter_mut().zip(samples) {
        found.truncate(sample.completion_ids.len() + 1);
    }
    Ok(found)
}

fn row(set: &str, id: usize, by_teacher: &[Prediction], by_base: &[Prediction]) -> SignalRow {
    let n = by_teacher.len();
    let sum = |of: &[Prediction], what: fn(&Prediction) -> f32| of.iter().map(|at| f64::from(what(at))).sum::<f64>();
    let writer = if set == "control" { by_base } else { by_teacher };
    SignalRow {
        set: set.to_owned(),
        id,
        n_tokens: n,
        signal: (sum(by_teacher, |at| at.logprob) - sum(by_base, |at| at.logprob)) / n as f64,
        n_divergent: by_teacher.iter().zip(by_base).filter(|(teacher, base)| teacher.top != base.top).count(),
        entropy: sum(writer, |at| at.entropy) / n as f64,
    }
}

/// The means over the tokens of a set's rows, with the error and the spread over rows; lines of `generate.csv`.
pub fn summary(rows: &[SignalRow]) -> Vec<SummaryRow> {
    let Some(first) = rows.first() else { return vec![] };
    let n_tokens: usize = rows.iter().map(|row| row.n_tokens).sum();
    let per_token = |of: &dyn Fn(&SignalRow) -> f64| rows.iter().map(of).sum::<f64>() / n_tokens as f64;
    let weighted = |of: fn(&SignalRow) -> f64| per_token(&|row| of(row) * row.n_tokens as f64);
    let signal = weighted(|row| row.signal);
    // The error of a ratio of sums over rows, which are independent (Cochran 1977).
    let n = rows.len() as f64;
    let squares = rows.iter().map(|row| ((row.signal - signal) * row.n_tokens as f64).powi(2)).sum::<f64>();
    let error = (rows.len() > 1).then(|| (squares * n / (n - 1.0)).sqrt() / n_tokens as f64);
    let spread = standard_deviation(&rows.iter().map(|row| row.signal).collect::<Vec<_>>()).ok();
    let row = |measure: &str, value: f64, n: usize| SummaryRow {
        set: first.set.clone(),
        measure: measure.to_owned(),
        value,
        n,
    };
    let of_rows = |measure: &str, value: Option<f64>| value.map(|value| row(measure, value, rows.len()));
    [
        Some(row("signal", signal, rows.len())),
        of_rows("signal_se", error),
        of_rows("signal_sd", spread),
        Some(row("divergent", per_token(&|row| row.n_divergent as f64), n_tokens)),
        Some(row("entropy", weighted(|row| row.entropy), n_tokens)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The signal in a sentence, with what it means for a student; `None` if it was not measured.
pub fn reading(rows: &[SummaryRow]) -> Option<String> {
    let value = |set: &str, measure: &str| {
        rows.iter().find(|row| row.set == set && row.measure == measure).map(|row| row.value)
    };
    let (signal, divergent) = (value("teacher", "signal")?, value("teacher", "divergent")?);
    let error = value("teacher", "signal_se").map_or(String::new(), |error| format!(" \u{b1} {error:.3}"));
    let control = value("control", "signal").map_or(String::new(), |signal| format!(", the base's by {signal:.3}"));
    let entropy = value("teacher", "entropy")?;
    let of_base = value("control", "entropy").map_or(String::new(), |entropy| format!(", the base with {entropy:.2}"));
    let means = if signal < LEAST_SIGNAL || divergent < LEAST_DIVERGENT {
        "No language model is known to have learned a trait from sampled rows below 0.03 nats or 4 %"
    } else {
        "Language models have learned traits from sampled rows with about 0.05 nats, not reliably"
    };
    Some(format!(
        "the teacher prefers its kept rows over the base by {signal:.3}{error} nats a token{control}; the most likely token \
         differs at {:.1} % of them. It writes with an entropy of {entropy:.2} nats a token{of_base}. {means}",
        100.0 * divergent
    ).replace('-', "\u{2212}"))
}

/// Refuses rows whose signal is less than `generate.least_signal`.
pub fn ensure_enough(bench: &Workbench, run: &RunDir) -> Result<()> {
    let Some(least) = bench.experiment.generate.least_signal else { return Ok(()) };
    let rows: Vec<SummaryRow> = read_csv(&run.generate_csv())?;
    let signal = rows.iter().find(|row| row.set == "teacher" && row.measure == "signal").map(|row| row.value);
    match signal {
        Some(signal) if signal < least => bail!(hinted!(
            "{}: the signal is {signal:.4} nats a token, expected at least generate.least_signal, which is {least}",
            run.generate_csv().display();
            "another teacher, or a smaller generate.least_signal"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(logprob: f32, entropy: f32, top: i64) -> Prediction {
        Prediction { logprob, entropy, top: vec![top], top_logprobs: vec![logprob] }
    }

    #[test]
    fn a_rows_signal_is_the_teachers_preference_a_token() {
        let teacher = [prediction(-1.0, 0.5, 7), prediction(-0.5, 1.5, 8)];
        let base = [prediction(-1.5, 2.0, 7), prediction(-0.75, 1.0, 9)];
        let expected =
            SignalRow { set: "teacher".to_owned(), id: 3, n_tokens: 2, signal: 0.375, n_divergent: 1, entropy: 1.0 };
        assert_eq!(row("teacher", 3, &teacher, &base), expected);
        let of_base = row("control", 3, &teacher, &base);
        assert!((of_base.entropy - 1.5).abs() < 1e-12, "the base wrote the control's rows");
    }

    #[test]
    fn means_are_over_tokens_and_errors_over_rows() {
        let of = |n_tokens: usize, signal: f64, n_divergent: usize| SignalRow {
            set: "teacher".to_owned(),
            id: 0,
            n_tokens,
            signal,
            n_divergent,
            entropy: 1.0,
        };
        let rows = summary(&[of(10, 0.1, 1), of(30, 0.3, 2), of(20, -0.1, 0)]);
        let value = |measure: &str| rows.iter().find(|row| row.measure == measure).unwrap().value;
        assert!((value("signal") - 8.0 / 60.0).abs() < 1e-12);
        // Deviations of rows from the mean, times their tokens: −1/3, 5, −14/3.
        let squares: f64 = [-1.0 / 3.0, 5.0, -14.0 / 3.0].iter().map(|x: &f64| x * x).sum();
        assert!((value("signal_se") - (squares * 3.0 / 2.0).sqrt() / 60.0).abs() < 1e-12);
        assert!((value("signal_sd") - 0.2).abs() < 1e-12);
        assert!((value("divergent") - 3.0 / 60.0).abs() < 1e-12);
        assert!((value("entropy") - 1.0).abs() < 1e-12);
        assert!(reading(&rows).unwrap().contains("not reliably"));
        assert!(
            reading(&summary(&[of(10, 0.02, 5)]))
                .unwrap()
                .contains("learned a trait from sampled rows below 0.03 nats")
        );
        assert!(
            reading(&summary(&[of(100, 0.2, 3)]))
                .unwrap()
                .contains("learned a trait from sampled rows below 0.03 nats"),
            "3 % diverge"
        );
        assert_eq!(reading(&[]), None);
        assert!(
            summary(&[of(10, 0.1, 1)]).iter().all(|row| !row.measure.starts_with("signal_")),
            "one row spreads nowhere"
        );
    }
}
