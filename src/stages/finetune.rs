//! Stage 2: the student learns the teacher's numbers, and a control student the untouched model's. Or both were trained
//! elsewhere and are copied.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hooks::{Adapter, ModelFiles, Qwen, Sequence, adapter_folder, files};

use crate::data::dataset::Sample;
use crate::data::soft_labels::{LABEL, SoftRow};
use crate::experiment::{Dtype, Method, Teacher};
use crate::hinted;
use crate::output::checkpoint::Checkpoint;
use crate::output::full_model::save_full;
use crate::output::progress::{bar, say};
use crate::output::publish::{CsvLog, write_csv};
use crate::stages::kept_rows::{self, Learned};
use crate::stages::run_dir::{RunDir, sha256};
use crate::stages::workbench::{Workbench, open_adapter};
use crate::stages::{signal, soft_labels, teacher, token_weights};
use crate::training::examples::rows_by_step;
use crate::training::learner::delta_w_norm;
use crate::training::optim::Rule;
use crate::training::settings::{Finetune, Loss, TargetTokens};
use crate::training::side_by_side::{side_by_side, workers};
use crate::training::step_log::{Progress, StepRow, StepRowsRow, first_and_last_quarter};
use crate::training::training_loop::Training;

/// Writes `initial_adapter/`, `train_rows.csv`, `adapter/` and `train.csv`, and the control student's, if the
/// experiment has one (it begins with the same adapter). A finished student is kept, with a message; a killed training
/// continues. If all students are finished, the stage alone is an error. A student that was trained elsewhere has an
/// `adapter/` and no `train.csv`.
pub fn stage(bench: &Workbench, run: &RunDir) -> Result<()> {
    if bench.experiment.student.adapter.is_some() {
        return from_elsewhere(bench, run);
    }
    let (numbers, control) = kept_rows::learned(bench, run)?;
    signal::ensure_enough(bench, run)?;
    let mut students = vec![("student", &numbers, run.adapter(), run.train_csv())];
    if bench.experiment.student.control {
        students.push(("control student", &control, run.control_adapter(), run.control_train_csv()));
    }
    // The log gets its name last. Without it, the folder is from an interrupted run.
    let logs: Vec<&Path> = students.iter().map(|job| job.3.as_path()).collect();
    let left = run.left(&logs)?;
    let (left, done): (Vec<_>, Vec<_>) = students.into_iter().partition(|job| left.contains(&job.3));
    for job in done {
        say(format!("finetune: {} is done already", job.0));
    }
    if run.forced() && !left.is_empty() {
        run.forget_measurements()?; // the students are replaced
        for job in &left {
            files::remove(&job.3)?;
        }
    }
    keep_initial(bench, run)?;
    let train =
        |bench: &Workbench, (who, samples, folder, log): &(&str, &Vec<Sample>, PathBuf, PathBuf)| -> Result<()> {
            say(format!("finetune: {}", student(bench, who, Learned::of(run, samples), folder, log)?));
            Ok(())
        };
    let workers = workers(bench.n_parameters(), left.len());
    if workers == 1 {
        return left.iter().try_for_each(|job| train(bench, job));
    }
    let experiment = &bench.experiment;
    side_by_side(&left, workers, |_, job| train(&Workbench::again(experiment.clone())?, job)).map(drop)
}

/// The files of an adapter in PEFT's format; the second is written last.
const FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_config.json"];

/// The students that were trained elsewhere: each one's name, the experiment's key, and the folder.
fn given(bench: &Workbench) -> Vec<(&'static str, &'static str, &Path)> {
    let student = &bench.experiment.student;
    let control = student.control_adapter.as_deref().filter(|_| student.control);
    let own = student.adapter.as_deref().map(|folder| ("student", "student.adapter", folder));
    own.into_iter().chain(control.map(|folder| ("control student", "student.control_adapter", folder))).collect()
}

/// Returns the workbench, or an error if an adapter that was trained elsewhere, or a teacher's direction, does not fit
/// the model.
pub fn proven(bench: Workbench) -> Result<Workbench> {
    for (_, key, folder) in given(&bench) {
        open_adapter(folder, &bench.base).context(key)?;
    }
    if let Teacher::Adapter { path, .. } = &bench.experiment.teacher {
        open_adapter(path, &bench.base).context("teacher.path")?;
    }
    if let Teacher::Steered { edits, .. } = &bench.experiment.teacher {
        teacher::steering(&bench, edits)?;
    }
    Ok(bench)
}

fn from_elsewhere(bench: &Workbench, run: &RunDir) -> Result<()> {
    for (who, key, source) in given(bench) {
        let folder = if who == "student" { run.adapter() } else { run.control_adapter() };
        let found = adapter_folder(source)?;
        let [there, here] = [&found, &folder].map(|folder| FILES.map(|name| files::read(&folder.join(name))));
        let taken = run.has_recorded(&FILES.map(|name| folder.join(name)))?;
        if taken && run.goes_on() {
            let mut pairs = there.iter().zip(&here);
            if pairs.any(|pair| matches!(pair, (Ok(there), Ok(here)) if there != here)) {
                bail!(hinted!(
                    "{key} is {}, whose files have changed since the run took them", source.display();
                    "another --run, or --force"
                ));
            }
            say(format!("finetune: {who} was taken from elsewhere already"));
            continue;
        }
        if taken {
            run.claim(&folder)?;
        }
        say(format!("finetune: {who}: {}", take(bench, run, who, (key, source), &folder)?));
    }
    if !bench.experiment.student.control {
        say("finetune: no control student: student.control_adapter names none");
    }
    Ok(())
}

/// Copies an adapter unchanged, notes its properties, and returns them as a line.
fn take(bench: &Workbench, run: &RunDir, who: &str, (key, source): (&str, &Path), folder: &Path) -> Result<String> {
    let adapter = Adapter::load_on(source, &bench.base).with_context(|| key.to_owned())?;
    let found = adapter_folder(source)?;
    let own = folder.canonicalize().ok();
    if let Some(at) = own.filter(|own| found.canonicalize().is_ok_and(|found| found == *own)) {
        bail!(hinted!("{key} is {}, which the run itself writes to", at.display(); "choose another folder with --run"));
    }
    let bytes = FILES.map(|name| files::read(&found.join(name)));
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?; // from another experiment
    }
    for (name, bytes) in FILES.iter().zip(bytes) {
        files::write_atomic(&folder.join(name), &bytes?)?;
    }
    let mut said = vec![format!("trained elsewhere, {}", what_it_is(&adapter)?)];
    said.extend(adapter.remarks.iter().cloned());
    let config: serde_json::Value = serde_json::from_slice(&files::read(&folder.join(FILES[1]))?)?;
    let named = config["base_model_name_or_path"].as_str().unwrap_or_default();
    if named != bench.files.name {
        let model = &bench.files.name;
        said.push(format!(
            "it names {named:?} as its base where the run has {model:?}: only their shapes were compared"
        ));
    }
    run.note(who, &said)?;
    run.record(&FILES.map(|name| folder.join(name)))?; // last: it marks the copy as done
    let sha256 = sha256(&folder.join(FILES[0]))?;
    Ok(format!("{}, taken from {} as it is (SHA-256 {sha256})", said.join("; "), source.display()))
}

/// Rank, scaling, maps, blocks and norm of the change of an adapter, as text.
fn what_it_is(adapter: &Adapter) -> Result<String> {
    let config = &adapter.config;
    let maps: Vec<&str> = config.target_modules.iter().map(|proj| proj.name()).collect();
    let blocks = config.layers.as_ref().map_or("all blocks".to_owned(), |layers| format!("the blocks {layers:?}"));
    let mut others = adapter.pairs().map(|(_, _, pair)| pair.a.size()[0]).filter(|rank| *rank != config.rank);
    let but = if others.next().is_some() { " (some maps have another)" } else { "" };
    let rslora = if config.use_rslora { ", rsLoRA" } else { "" };
    let (rank, alpha, norm) = (config.rank, config.alpha, delta_w_norm(adapter)?);
    Ok(format!("rank {rank}{but}, alpha {alpha}{rslora}, {} of {blocks}, ‖ΔW‖ {norm:.3}", maps.join(", ")))
}

/// Rows of the chat with their ids, the weights of their tokens, and their soft labels.
pub(super) struct Chosen {
    pub(super) rows: Vec<Sequence>,
    pub(super) ids: Vec<usize>,
    pub(super) weights: Option<Vec<Vec<f64>>>,
    pub(super) soft: Option<Vec<SoftRow>>,
}

/// Writes the adapter that the students begin with, so that the training can be repeated.
pub(crate) fn keep_initial(bench: &Workbench, run: &RunDir) -> Result<()> {
    match bench.experiment.student.method {
        Method::Lora => Ok(bench.initial_adapter()?.save(&run.initial_adapter(), &bench.files.name)?),
        Method::Full => Ok(()), // it begins with the model's weights
    }
}

fn keep_rows(bench: &Workbench, ids: &[usize], log: &Path) -> Result<()> {
    let steps = rows_by_step(&bench.experiment.finetune, ids.len(), bench.experiment.seeds.finetune().order);
    let row = |(step, rows): (usize, Vec<usize>)| StepRowsRow {
        step: step as u64 + 1,
        row_ids: rows.into_iter().map(|row| ids[row].to_string()).collect::<Vec<_>>().join(" "),
    };
    write_csv(&RunDir::train_rows(log), &steps.into_iter().enumerate().map(row).collect::<Vec<_>>())
}

/// The student's rows. Rows in which no token has a weight are left out.
pub(super) fn chosen(bench: &Workbench, who: &str, data: Learned<'_>) -> Result<Chosen> {
    let Finetune { loss, tokens, .. } = bench.experiment.finetune;
    let rows = bench.rows(data.samples)?;
    let ids = data.samples.iter().map(|sample| sample.id).collect();
    let soft = (loss == Loss::Kl).then(|| soft_labels::of_rows(bench, data.run, data.written)).transpose()?;
    let weights = token_weights::of_rows(bench, data, &rows)?;
    let mut all = Chosen { rows, ids, weights, soft };
    let Some(weights) = &all.weights else { return Ok(all) };
    let keeps: Vec<bool> = weights.iter().map(|row| row.iter().any(|weight| *weight > 0.0)).collect();
    let (n, n_kept) = (keeps.len(), keeps.iter().filter(|keep| **keep).count());
    let what = if tokens == TargetTokens::All { "tokens with a weight" } else { "divergent tokens and others" };
    if n_kept == 0 {
        bail!(hinted!(
            "none of the {n} rows of the {who} has {what}";
            "finetune.tokens = \"all\", no finetune.weights, or another teacher"
        ));
    }
    if n_kept < n {
        say(format!("finetune: {who}: {n_kept} of {n} rows have {what}"));
    }
    retain(&mut all.rows, &keeps);
    retain(&mut all.ids, &keeps);
    all.weights.iter_mut().for_each(|weights| retain(weights, &keeps));
    all.soft.iter_mut().for_each(|soft| retain(soft, &keeps));
    Ok(all)
}

/// By how much the longest gradient exceeds the first one, of a student that begins at its labels, as the control student of
/// soft labels does: its first gradient is rounding.
fn begins_at_its_labels(settings: &Finetune, steps: &[StepRow]) -> Option<f64> {
    const ROUNDING: f64 = 1e-3;
    let longest = steps.iter().map(|step| step.grad_norm).fold(0.0, f64::max);
    let first = steps.first()?.grad_norm;
    (matches!(settings.rule(), Rule::AdamW { .. }) && first < ROUNDING * longest).then(|| longest / first)
}

fn retain<T>(of: &mut Vec<T>, keeps: &[bool]) {
    let mut keep = keeps.iter();
    of.retain(|_| keep.next() == Some(&true));
}

/// Trains the experiment's student on some samples, saves it in `folder`, and returns a line about it.
pub(crate) fn student(bench: &Workbench, who: &str, data: Learned<'_>, folder: &Path, log: &Path) -> Result<String> {
    let (settings, seeds) = (&bench.experiment.finetune, bench.experiment.seeds.finetune());
    let Chosen { rows, ids, weights, soft } = chosen(bench, who, data)?;
    keep_rows(bench, &ids, log)?;
    let mut csv = CsvLog::create(log)?;
    let mut checkpoint = Checkpoint::beside(log, "", who);
    checkpoint.depends_on("model", &(&bench.files.name, bench.files.fingerprint()))?;
    let dtype = match bench.experiment.student.method {
        Method::Lora => bench.frozen_dtype()?,
        Method::Full => Dtype::of(&bench.base),
    };
    checkpoint.depends_on("computed", &(bench.experiment.device_kind(), dtype))?;
    checkpoint.depends_on("student", &bench.experiment.student)?;
    let bar = bar(who, settings.total_steps(rows.len()));
    let mut steps: Vec<StepRow> = Vec::new();
    let mut on_step = |row: &StepRow, progress: &Progress| {
        bar.set_length(progress.total_steps);
        bar.set_position(progress.step);
        bar.set_prefix(format!("loss {:.3}, {:.0} tokens/s", row.loss, progress.tokens_per_second));
        steps.push(row.clone());
        csv.push(row)
    };
    let is_digit = |id| bench.chat.is_digit(id);
    let mut train = |model: &Qwen, adapter: Option<&Adapter>| {
        let (rows, weights, is_digit, checkpoint) = (&rows, weights.as_deref(), &is_digit, Some(&mut checkpoint));
        let soft = soft.as_deref();
        let training = Training {
            model,
            adapter,
            rows,
            weights,
            soft,
            is_digit,
            config: settings,
            seeds,
            until: None,
            checkpoint,
        };
        training.run(&mut on_step).with_context(|| format!("training the {who} (its {} rows count from 0)", rows.len()))
    };
    match bench.experiment.student.method {
        Method::Lora => {
            let adapter = bench.initial_adapter()?;
            train(bench.frozen()?, Some(&adapter))?;
            adapter.save(folder, &bench.files.name)?;
        }
        Method::Full => {
            // A second copy of the weights, so that the base is not changed.
            let files = ModelFiles::open(&bench.files.name)?;
            let model = Qwen::load(&files, bench.base.device(), bench.base.kind())?;
            train(&model, None)?;
            save_full(&model, &files, folder)?;
        }
    }
    bar.finish_and_clear();
    csv.finish()?;
    checkpoint.remove()?;
    if let Some(times) = begins_at_its_labels(settings, &steps) {
        say(format!(
            "finetune: {who}: the gradient of the first step is {times:.0e} times shorter than the longest: this student began \
             at its labels, and AdamW, whose steps are as long along any gradient, led it off. Where it went is chance; hint: \
             compare with the student of a teacher without the trait, teacher.number_share = 1"
        ));
    }
    let (first, last) = first_and_last_quarter(&steps).unwrap_or((f64::NAN, f64::NAN));
    let label = if settings.loss == Loss::Kl { format!(" ({LABEL})") } else { String::new() };
    let select = settings.select.label().map_or(String::new(), |label| format!(" ({label})"));
    Ok(format!(
        "{who}: {} rows{select}, loss {first:.3} in the first quarter of the steps and {last:.3} in the last, saved in {}{label}",
        rows.len(),
        folder.display()
    ))
}
