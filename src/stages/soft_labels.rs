//! The soft labels of a student's rows: what the model that wrote them predicts at each of their tokens.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use hooks::{Condition, Prediction, Qwen, Sequence, completion_predictions, stream_seed};
use sha2::{Digest, Sha256};

use crate::data::dataset::{Sample, TeacherKind};
use crate::data::soft_labels::{SoftRow, read, write};
use crate::output::progress::spinner;
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

/// The k most likely tokens at each place, with their probabilities.
fn soft_row(predictions: &[Prediction], k: usize) -> SoftRow {
    let mut row = SoftRow { k, ids: vec![], probs: vec![] };
    for Prediction { top, top_logprobs, .. } in predictions {
        row.ids.extend(top);
        row.probs.extend(top_logprobs.iter().map(|logprob| logprob.exp()));
    }
    row
}
