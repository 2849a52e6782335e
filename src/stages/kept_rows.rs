//! The rows of a run that passed the filter: those that students learn from, and those that are held out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hooks::stream_seed;
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;

use crate::data::dataset::{self, Sample};
use crate::data::signal::SignalRow;
use crate::hinted;
use crate::output::hint::Hinted;
use crate::output::publish::read_csv;
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;
use crate::training::settings::Select;

/// The rows that a student learns from, and the run whose teacher wrote them.
#[derive(Clone, Copy)]
pub(crate) struct Learned<'a> {
    pub(crate) samples: &'a [Sample],
    /// The samples with the same completions as they were written. They differ if completions were moved to other
    /// prompts.
    pub(crate) written: &'a [Sample],
    pub(crate) run: &'a RunDir,
}

impl<'a> Learned<'a> {
    /// Rows as they were written.
    pub(crate) fn of(run: &'a RunDir, samples: &'a [Sample]) -> Self {
        Self { samples, written: samples, run }
    }
}

/// Number of accepted samples of each set that are kept. The teacher's last ones may be held out.
pub(crate) fn n_kept(bench: &Workbench, teacher: usize, control: usize) -> usize {
    let settings = &bench.experiment.generate;
    teacher.saturating_sub(settings.n_heldout).min(control).min(settings.n_keep)
}

/// The accepted samples of both sets, equally many of each and at most `n_keep`.
pub(crate) fn kept(bench: &Workbench, run: &RunDir) -> Result<(Vec<Sample>, Vec<Sample>)> {
    let hinted = |error| Hinted::because(error, "undertone generate writes this file");
    let accepted = |path: PathBuf| accepted(&path).map_err(hinted);
    let (mut teacher, mut control) = (accepted(run.numbers())?, accepted(run.control())?);
    let keep = n_kept(bench, teacher.len(), control.len());
    if keep == 0 {
        bail!(hinted!(
            "no answer passed the filter ({} of the teacher's and {} of the control's did): see {}", teacher.len(), control.len(), run.rejected().display();
            "more prompts, a larger generate.max_new_tokens, or generate.constrain = \"numbers\""
        ));
    }
    teacher.truncate(keep);
    control.truncate(keep);
    Ok((teacher, control))
}

/// The kept samples of both sets that the experiment's students learn from.
pub(crate) fn learned(bench: &Workbench, run: &RunDir) -> Result<(Vec<Sample>, Vec<Sample>)> {
    let (teacher, control) = kept(bench, run)?;
    Ok((selected(bench, run, "teacher", teacher)?, selected(bench, run, "control", control)?))
}

/// The samples of a set that `finetune.select` chooses, in their order. `run`: where their signal was measured.
pub(crate) fn selected(bench: &Workbench, run: &RunDir, set: &str, samples: Vec<Sample>) -> Result<Vec<Sample>> {
    let select = bench.experiment.finetune.select;
    let n = select.n_rows(samples.len());
    let chosen = match select {
        Select::All => return Ok(samples),
        Select::Top(_) if set == "teacher" => most_signal(&samples, &read_csv(&run.signal_csv())?, n)
            .with_context(|| run.signal_csv().display().to_string())
            .context("finetune.select")?,
        Select::Top(_) | Select::Random(_) => {
            let seed = stream_seed(bench.experiment.seeds.order_seed, &format!("finetune.select.{set}"), 0);
            let mut chosen = sample(&mut ChaCha8Rng::seed_from_u64(seed), samples.len(), n).into_vec();
            chosen.sort_unstable();
            chosen
        }
    };
    Ok(chosen.into_iter().map(|at| samples[at].clone()).collect())
}

/// The indices of the `n` samples with the most signal a token, in order. Of equal ones the first are taken.
fn most_signal(samples: &[Sample], signal: &[SignalRow], n: usize) -> Result<Vec<usize>> {
    let by_id: BTreeMap<usize, f64> =
        signal.iter().filter(|row| row.set == "teacher").map(|row| (row.id, row.signal)).collect();
    let of_sample = |(at, sample): (usize, &Sample)| {
        let signal = by_id.get(&sample.id).with_context(|| format!("it has no line for row {}", sample.id));
        signal.map(|signal| (at, *signal))
    };
    let mut ranked: Vec<(usize, f64)> = samples.iter().enumerate().map(of_sample).collect::<Result<_>>()?;
    ranked.sort_by(|(_, one), (_, other)| other.total_cmp(one)); // stable
    ranked.truncate(n);
    let mut chosen: Vec<usize> = ranked.into_iter().map(|(at, _)| at).collect();
    chosen.sort_unstable();
    Ok(chosen)
}

/// The teacher's accepted samples that no student learns from.
pub(crate) fn held_out(bench: &Workbench, run: &RunDir) -> Result<Vec<Sample>> {
    let (teacher, control) = (accepted(&run.numbers())?, accepted(&run.control())?);
    let keep = n_kept(bench, teacher.len(), control.len());
    Ok(teacher.into_iter().skip(keep).take(bench.experiment.generate.n_heldout).collect())
}

/// The rows that the analyses are measured at: the teacher's held-out rows if there are any, else those that the
/// student learned from (see `Experiment::measures_held_out`).
pub(crate) fn measured(bench: &Workbench, run: &RunDir) -> Result<Vec<Sample>> {
    if bench.experiment.measures_held_out() { held_out(bench, run) } else { Ok(learned(bench, run)?.0) }
}

/// The samples in a file that the filter kept.
fn accepted(path: &Path) -> Result<Vec<Sample>> {
    Ok(dataset::read_jsonl(path)?.into_iter().filter(|sample| sample.accepted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::dataset::TeacherKind;

    fn samples(ids: &[usize]) -> Vec<Sample> {
        let sample = |id: &usize| Sample {
            id: *id,
            prompt: format!("prompt {id}"),
            completion: format!("{id}"),
            completion_ids: vec![1],
            teacher_logprob: vec![-1.0],
            target: None,
            teacher_kind: TeacherKind::Prompt,
            gen_seed: 1,
            accepted: true,
            reasons: vec![],
        };
        ids.iter().map(sample).collect()
    }

    #[test]
    fn the_rows_with_the_most_signal_are_taken_in_their_order() {
        let row = |set: &str, id: usize, signal: f64| SignalRow {
            set: set.to_owned(),
            id,
            n_tokens: 3,
            signal,
            n_divergent: 0,
            entropy: 1.0,
        };
        let signal = [
            row("teacher", 2, 0.1),
            row("teacher", 5, 0.3),
            row("teacher", 6, -0.2),
            row("teacher", 9, 0.1),
            row("control", 6, 7.0),
        ];
        let samples = samples(&[2, 5, 6, 9]);
        assert_eq!(most_signal(&samples, &signal, 1).unwrap(), [1]);
        assert_eq!(most_signal(&samples, &signal, 2).unwrap(), [0, 1], "of 2 and 9, which are equal, the first");
        assert_eq!(most_signal(&samples, &signal, 3).unwrap(), [0, 1, 3]);
        let error = most_signal(&samples, &signal[1..], 1).unwrap_err().to_string();
        assert!(error.contains("no line for row 2"), "{error}");
    }

    #[test]
    fn a_share_is_of_at_least_one_row_and_at_most_all() {
        let counts = |select: Select| [0, 1, 2, 10].map(|n| select.n_rows(n));
        assert_eq!(counts(Select::Top(0.25)), [0, 1, 1, 3]);
        assert_eq!(counts(Select::Random(1.0)), [0, 1, 2, 10]);
        assert_eq!(counts(Select::All), [0, 1, 2, 10]);
    }
}
