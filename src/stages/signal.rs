//! The signal in a run's rows, before any training: by how much the teacher prefers them over the base. A student of rows
//! without signal has nothing of the teacher to learn.

use anyhow::{Result, bail};
use hooks::{Condition, Prediction, Qwen, Sequence, completion_predictions};

use crate::data::dataset::{Sample, SummaryRow};
use crate::data::signal::SignalRow;
use crate::hinted;
use crate::output::publish::read_csv;
use crate::stages::run_dir::RunDir;
use crate::stages::teacher::TeacherModel;
use crate::stages::workbench::Workbench;

/// The signal of each of some rows, in order. `bench` has the template in which the teacher writes.
pub fn of_rows(bench: &Workbench, teacher: &TeacherModel, set: &str, samples: &[Sample]) -> Result<Vec<SignalRow>> {
    let frozen = bench.frozen()?;
    let rows = |system: Option<&str>| -> Result<Vec<Sequence>> {
        let row = |sample: &Sample| Ok(bench.chat.row(system, &sample.prompt, &sample.completion_ids)?);
        samples.iter().map(row).collect()
    };
    let student_system = bench.student_system()?;
    let by_teacher = predictions(teacher.qwen(frozen), &rows(teacher.system.as_deref())?, &teacher.condition())?;
    let by_base = predictions(frozen, &rows(student_system.as_deref())?, &Condition::default())?;
    let both = samples.iter().zip(by_teacher.iter().zip(&by_base));
    Ok(both.map(|(sample, (teacher, base))| row(set, sample.id, teacher, base)).collect())
}

/// A model's predictions at each answer and the end of its turn.
pub fn predictions(qwen: &Qwen, rows: &[Sequence], condition: &Condition<'_>) -> Result<Vec<Vec<Prediction>>> {
    let mut found = completion_predictions(qwen, rows, condition, 1)?;
    for (found, row) in found.iter_mut().zip(rows) {
        found.truncate(row.content_end - row.completion.start + 1);
    }
    Ok(found)
}

/// The signal of a row, from both models' predictions at it.
pub fn row(set: &str, id: usize, by_teacher: &[Prediction], by_base: &[Prediction]) -> SignalRow {
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
}
