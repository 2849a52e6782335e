//! The signal in rows as a table: by how much the teacher prefers each row over the base, its means over a set, and a
//! sentence.

use analyses::stats::standard_deviation;
use serde::{Deserialize, Serialize};

use crate::data::dataset::SummaryRow;

/// Nats per token below which no language model is known to have learned a trait from sampled rows. A pocket model has
/// at 0.014, from three thousand rows.
const LEAST_SIGNAL: f64 = 0.03;
/// The share of divergent tokens below which none is known to have.
const LEAST_DIVERGENT: f64 = 0.04;

/// The rows of a run in words, for [`reading`].
pub const KEPT: &str = "its kept rows";

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

/// The signal in a sentence, with what it means for a student; `None` if it was not measured. `whose`: the rows in words.
pub fn reading(rows: &[SummaryRow], whose: &str) -> Option<String> {
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
        "the teacher prefers {whose} over the base by {signal:.3}{error} nats a token{control}; the most likely token \
         differs at {:.1} % of them. It writes with an entropy of {entropy:.2} nats a token{of_base}. {means}",
        100.0 * divergent
    ).replace('-', "\u{2212}"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(reading(&rows, KEPT).unwrap().contains("not reliably"));
        assert!(
            reading(&summary(&[of(10, 0.02, 5)]), KEPT)
                .unwrap()
                .contains("learned a trait from sampled rows below 0.03 nats")
        );
        assert!(
            reading(&summary(&[of(100, 0.2, 3)]), KEPT)
                .unwrap()
                .contains("learned a trait from sampled rows below 0.03 nats"),
            "3 % diverge"
        );
        assert_eq!(reading(&[], KEPT), None);
        assert!(
            summary(&[of(10, 0.1, 1)]).iter().all(|row| !row.measure.starts_with("signal_")),
            "one row spreads nowhere"
        );
    }
}
