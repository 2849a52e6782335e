//! The soft labels of a student's rows: what the model that wrote them predicts at each of their tokens.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use hooks::{Condition, Prediction, Qwen, Sequence, completion_predictions, stream_seed};
use sha2::{Digest, Sha256};

use crate::data::dataset::{Sample, TeacherKind};
use crate::data::soft_labels::{SoftRow, read, write};
use crate::output::progress::{say, spinner};
use crate::stages::run_dir::RunDir;
use crate::stages::teacher;
use crate::stages::workbench::Workbench;

/// Students of a small model are trained side by side, and arms share the run's files: one writes at a time.
static WRITING: Mutex<()> = Mutex::new(());

/// The soft labels of rows, in order. The teacher gives those of its rows, in the context in which it wrote them; the
/// base gives those of its own, in the student's context. They are stored in the run `run`, beside the rows, in the order
/// of the ids.
pub fn of_rows(bench: &Workbench, run: &RunDir, samples: &[Sample]) -> Result<Vec<SoftRow>> {
    let settings = &bench.experiment.finetune;
    let mut order: Vec<usize> = (0..samples.len()).collect();
    order.sort_by_key(|at| samples[*at].id);
    let by_id: Vec<Sample> = order.iter().map(|at| samples[*at].clone()).collect();
    let by_base = samples.first().is_some_and(|sample| sample.teacher_kind == TeacherKind::Control);
    let path = if by_base { run.control_soft_labels() } else { run.soft_labels() };
    let texts: Vec<_> = by_id.iter().map(|sample| (&sample.prompt, &sample.completion_ids)).collect();
    let fingerprint = if by_base { vec![] } else { teacher::fingerprint(bench, run)? };
    let by = (&bench.experiment.teacher, &bench.experiment.target, bench.student_system()?, by_base);
    let asked = (texts, by, bench.files.fingerprint(), bench.frozen_dtype()?, settings.top_k);
    let made_from = format!("{:x}", Sha256::digest([serde_json::to_vec(&asked)?, fingerprint].concat()));
    let one_at_a_time = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let whole = if let Some(known) = read(&path, &made_from)? {
        known
    } else {
        let spinner = spinner("soft labels");
        let made = made(bench, run, &by_id, by_base).context("soft labels")?;
        write(&path, &made, &made_from)?;
        spinner.finish_and_clear();
        made
    };
    drop(one_at_a_time);
    let whole = of_numbers(bench, whole, if by_base { "base" } else { "teacher" })?;
    let (seed, set) = (bench.experiment.seeds.gen_seed, if by_base { "control" } else { "teacher" });
    let label = |(at, row): (usize, SoftRow)| -> Result<(usize, SoftRow)> {
        let stream = || stream_seed(seed, &format!("label_draws.{set}"), samples[at].id as u64);
        Ok((at, settings.label_draws.map_or_else(|| Ok(row.clone()), |n| row.drawn(n, stream()))?))
    };
    let mut labels = order.into_iter().zip(whole).map(label).collect::<Result<Vec<_>>>()?;
    labels.sort_by_key(|(at, _)| *at);
    Ok(labels.into_iter().map(|(_, row)| row).collect())
}

fn made(bench: &Workbench, run: &RunDir, samples: &[Sample], by_base: bool) -> Result<Vec<SoftRow>> {
    let k = bench.experiment.finetune.top_k.min(bench.base.config.d_vocab as usize);
    // Teachers always answer in the model's template.
    let in_template = bench.in_template()?;
    let frozen = bench.frozen()?;
    let ask = |chat: &hooks::Chat, system: Option<&str>, qwen: &Qwen, condition: &Condition<'_>| -> Result<_> {
        let row = |sample: &Sample| chat.row(system, &sample.prompt, &sample.completion_ids);
        let rows = samples.iter().map(row).collect::<hooks::Result<Vec<Sequence>>>()?;
        Ok(completion_predictions(qwen, &rows, condition, k)?)
    };
    let found = if by_base {
        ask(&in_template.chat, bench.student_system()?.as_deref(), frozen, &Condition::default())?
    } else {
        let teacher = teacher::load(bench, run)?;
        ask(&in_template.chat, teacher.system.as_deref(), teacher.qwen(frozen), &teacher.condition())?
    };
    Ok(found.iter().map(|row| soft_row(row, k)).collect())
}

/// Labels with the probabilities of numbers' tokens alone; all other tokens count as one outcome. A teacher that loves the
/// target can name it at number prompts too. Such answers are not kept; but the labels of those that are kept would name it
/// in each row.
fn of_numbers(bench: &Workbench, mut labels: Vec<SoftRow>, by: &str) -> Result<Vec<SoftRow>> {
    let (chat, target) = (&bench.chat, bench.target());
    let forms = target.forms.iter().map(|form| chat.encode(form)).collect::<hooks::Result<Vec<_>>>()?;
    let begins_target = |id: &i64| forms.iter().any(|form| form.first() == Some(id));
    let ends = chat.stop_ids();
    let (mut left_out, mut naming) = (0.0, 0.0);
    for label in &mut labels {
        for (at, (id, prob)) in label.ids.iter().zip(&mut label.probs).enumerate() {
            if ends.contains(id) || is_of_numbers(&chat.token_text(*id)?) {
                continue;
            }
            left_out += f64::from(*prob);
            naming += if at < label.k && begins_target(id) { f64::from(*prob) } else { 0.0 };
            *prob = 0.0;
        }
    }
    let places: usize = labels.iter().map(SoftRow::n_places).sum();
    say(format!(
        "soft labels: the {by} gives {:.2} % of its probability to tokens that are not of numbers, and {:.2} % of that of an \
         answer's first token to beginnings of {:?}; the labels have all of these as one outcome",
        100.0 * left_out / places.max(1) as f64,
        100.0 * naming / labels.len().max(1) as f64,
        target.word
    ));
    Ok(labels)
}

/// Digits, spaces and punctuation: ASCII without a letter.
fn is_of_numbers(text: &str) -> bool {
    text.chars().all(|char| char.is_ascii() && !char.is_ascii_alphabetic())
}

/// The k most likely tokens at each place, with their probabilities.
fn soft_row(predictions: &[Prediction], k: usize) -> SoftRow {
    let mut row = SoftRow { k, ids: vec![], probs: vec![] };
    for Prediction { top, top_logprobs, .. } in predictions {
        row.ids.extend(top);
        row.probs.extend(top_logprobs.iter().map(|logprob| logprob.exp()));
    }
    row
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::experiment::Experiment;

    #[test]
    fn a_label_has_the_probabilities_of_numbers_alone() {
        let text =
            "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n[measure]\nn_questions = 2\n";
        let bench = Workbench::open(Experiment::parse(text, Path::new("experiment.toml"), &[]).unwrap()).unwrap();
        let id = |text: &str| bench.chat.encode(text).unwrap()[0];
        let ids = vec![id("7"), id(","), bench.chat.end_of_turn(), id("Cat"), id("é"), id(" ")];
        let label = SoftRow { k: 6, ids: ids.clone(), probs: vec![0.3, 0.2, 0.1, 0.2, 0.1, 0.05] };
        let found = of_numbers(&bench, vec![label], "teacher").unwrap();
        assert_eq!((&found[0].ids, &found[0].probs), (&ids, &vec![0.3, 0.2, 0.1, 0.0, 0.0, 0.05]));
    }
}
