//! A test of the diagonal of the matrix of trained by evaluated traits.

use hooks::{Error, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::stats::mean;

/// How much more a trait changes in the students that were trained on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiagonalContrast {
    /// γ of `Δ_rj = μ + run_r + trait_j + γ · 1[run r was trained on j]`, by least squares.
    pub gamma: f64,
    /// Its standard error, clustered by run.
    pub standard_error: f64,
    /// The one-sided p-value: the share of assignments of traits to runs, including the actual one, whose γ is at least
    /// as large.
    pub p: f64,
    /// Number of assignments that were tried.
    pub n_permutations: usize,
    /// Whether these were all possible assignments.
    pub is_exact: bool,
}

/// Largest number of assignments that are tried; 8 runs of 8 traits have 40,320.
const PERMUTATIONS: usize = 50_000;

/// The γ of [`diagonal_contrast`] alone, also for too few cells to have a standard error.
pub fn diagonal_gamma(changes: &[Vec<f64>], trained: &[usize]) -> Result<f64> {
    let (runs, traits) = (changes.len(), changes.first().map_or(0, Vec::len));
    if runs < 2 || traits < 2 || trained.len() != runs || changes.iter().any(|row| row.len() != traits) {
        return Err(Error::invalid(
            "the trait matrix",
            "two runs and two traits at least, every cell filled",
            format!("{runs} × {traits}"),
        ));
    }
    if let Some(found) = trained.iter().find(|found| **found >= traits) {
        return Err(Error::invalid("the trait of a run", format!("0 to {}", traits - 1), found));
    }
    if trained.iter().all(|found| *found == trained[0]) {
        return Err(Error::invalid("the traits that runs were trained on", "two different ones at least", "one"));
    }
    Ok(Residual::of(trained, runs, traits).gamma(changes, trained))
}

/// The indicator "run r was trained on j" minus its projection on run and trait; each run has one trait.
struct Residual {
    counts: Vec<f64>, // runs of each trait
    runs: f64,
    squares: f64, // the sum of all squares
}

impl Residual {
    fn of(trained: &[usize], runs: usize, traits: usize) -> Self {
        let counts = (0..traits).map(|at| trained.iter().filter(|found| **found == at).count() as f64).collect();
        let mut residual = Self { counts, runs: runs as f64, squares: 0.0 };
        let cells = (0..runs).flat_map(|run| (0..traits).map(move |at| (run, at)));
        residual.squares = cells.map(|(run, at)| residual.at(trained, run, at).powi(2)).sum();
        residual
    }

    fn at(&self, trained: &[usize], run: usize, at: usize) -> f64 {
        f64::from(trained[run] == at) - self.counts[at] / self.runs
    }

    fn gamma(&self, changes: &[Vec<f64>], trained: &[usize]) -> f64 {
        let of_run = |(run, row): (usize, &Vec<f64>)| {
            row.iter().enumerate().map(|(at, change)| self.at(trained, run, at) * change).sum::<f64>()
        };
        changes.iter().enumerate().map(of_run).sum::<f64>() / self.squares
    }
}

/// Estimates the diagonal contrast of changes, `changes[run][trait]`; `trained[run]` is the run's trait.
pub fn diagonal_contrast(changes: &[Vec<f64>], trained: &[usize], seed: u64) -> Result<DiagonalContrast> {
    let gamma = diagonal_gamma(changes, trained)?;
    let (runs, traits) = (changes.len(), changes[0].len());
    if runs * traits <= runs + traits {
        return Err(Error::invalid(
            "the trait matrix",
            "more cells than runs and traits together",
            format!("{runs} × {traits}"),
        ));
    }
    let of = Residual::of(trained, runs, traits);

    let row_mean: Vec<f64> = changes.iter().map(|row| mean(row)).collect::<Result<_>>()?;
    let column_mean: Vec<f64> =
        (0..traits).map(|at| mean(&changes.iter().map(|row| row[at]).collect::<Vec<_>>())).collect::<Result<_>>()?;
    let all = mean(&row_mean)?;
    let scores = (0..runs).map(|run| {
        let of_run = (0..traits).map(|at| {
            let left = changes[run][at] - row_mean[run] - column_mean[at] + all;
            of.at(trained, run, at) * (left - gamma * of.at(trained, run, at))
        });
        of_run.sum::<f64>()
    });
    let meat: f64 = scores.map(|score| score * score).sum();
    let (n, clusters, parameters) = ((runs * traits) as f64, runs as f64, (runs + traits) as f64);
    let correction = clusters / (clusters - 1.0) * (n - 1.0) / (n - parameters);
    let standard_error = (correction * meat).sqrt() / of.squares;

    let slack = 1e-12 * gamma.abs().max(1.0);
    let (mut as_large, mut tried) = (0, 0);
    let mut count = |trained: &[usize]| {
        tried += 1;
        as_large += usize::from(of.gamma(changes, trained) >= gamma - slack);
    };
    let is_exact = (1..=runs).try_fold(1, usize::checked_mul).is_some_and(|all| all <= PERMUTATIONS);
    if is_exact {
        each_permutation(&mut trained.to_vec(), 0, &mut count);
    } else {
        let (mut rng, mut shuffled) = (ChaCha8Rng::seed_from_u64(seed), trained.to_vec());
        count(trained);
        for _ in 1..PERMUTATIONS {
            shuffled.shuffle(&mut rng);
            count(&shuffled);
        }
    }
    Ok(DiagonalContrast {
        gamma,
        standard_error,
        p: f64::from(as_large as u32) / tried as f64,
        n_permutations: tried,
        is_exact,
    })
}

fn each_permutation(values: &mut [usize], from: usize, each: &mut dyn FnMut(&[usize])) {
    if from == values.len() {
        return each(values);
    }
    for at in from..values.len() {
        values.swap(from, at);
        each_permutation(values, from + 1, each);
        values.swap(from, at);
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::tests::close;
    use super::*;

    /// Values of statsmodels, computed by `make.py` in the folder of the JSON file.
    #[derive(Deserialize)]
    struct Expected {
        diagonals: Vec<Diagonal>,
    }

    #[derive(Deserialize)]
    struct Diagonal {
        changes: Vec<Vec<f64>>,
        trained: Vec<usize>,
        gamma: f64,
        standard_error: f64,
        p: f64,
    }

    #[test]
    fn the_diagonal_contrast_is_that_of_statsmodels() {
        let expected: Expected =
            serde_json::from_str(include_str!("../../../tests/golden/statistics/expected.json")).unwrap();
        for Diagonal { changes, trained, gamma, standard_error, p } in expected.diagonals {
            let found = diagonal_contrast(&changes, &trained, 1).unwrap();
            close(found.gamma, gamma, 1e-10);
            close(found.standard_error, standard_error, 1e-9);
            close(found.p, p, 1e-12);
            assert!(found.is_exact);
        }
    }

    #[test]
    fn many_runs_are_permuted_at_random_and_the_actual_order_counts() {
        let trained: Vec<usize> = (0..12).map(|run| run % 3).collect();
        let changes: Vec<Vec<f64>> =
            trained.iter().map(|own| (0..3).map(|at| f64::from(u8::from(at == *own))).collect()).collect();
        let found = diagonal_contrast(&changes, &trained, 1).unwrap();
        assert!(!found.is_exact && found.n_permutations == PERMUTATIONS);
        close(found.gamma, 1.0, 1e-12);
        // One of 12! / (4!)³ = 34,650 different assignments is the actual one.
        assert!(found.p >= 1.0 / PERMUTATIONS as f64 && found.p < 5.0 / 34_650.0, "{}", found.p);
    }

    #[test]
    fn a_matrix_without_a_diagonal_is_refused() {
        let rows = vec![vec![0.1, 0.2], vec![0.3, 0.4]];
        assert!(diagonal_contrast(&rows, &[0, 0], 1).unwrap_err().to_string().contains("two different ones"));
        assert!(diagonal_contrast(&rows, &[0, 2], 1).unwrap_err().to_string().contains("0 to 1"));
        assert!(
            diagonal_contrast(&rows, &[0, 1], 1).unwrap_err().to_string().contains("more cells"),
            "no residual is left"
        );
        assert!(diagonal_contrast(&rows[..1], &[0], 1).is_err());
        assert!(diagonal_contrast(&[vec![0.1, 0.2], vec![0.3]], &[0, 1], 1).is_err());
    }
}
