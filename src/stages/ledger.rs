//! The ledger of a run: repeats the trainings of its students, and books what they learned of the trait.

use std::path::PathBuf;

use analyses::ledger::{Average, Books, LearnedRow, Ledger, Measure, NAME, SoftTargets, Step, path, report};
use analyses::{Subject, Tuned};
use anyhow::{Context, Result, bail, ensure};
use hooks::tch::Tensor;
use hooks::{Adapter, Chat, Sequence, files};

use crate::data::dataset::Sample;
use crate::experiment::{AnalysisName, Experiment, Method, Teacher};
use crate::hinted;
use crate::output::progress::{bar, say, spinner};
use crate::output::publish::write_csv;
use crate::stages::finetune::{Chosen, chosen};
use crate::stages::kept_rows::{self, Learned};
use crate::stages::run_dir::RunDir;
use crate::stages::subject_data::SubjectData;
use crate::stages::workbench::Workbench;
use crate::training::examples;
use crate::training::optim::Rule;
use crate::training::settings::Finetune;
use crate::training::side_by_side::{side_by_side, workers};
use crate::training::training_loop::{Taken, Training};

/// The control student in the tables; the base wrote its rows.
pub(crate) const CONTROL: &str = "control";
/// The share of a change that the books may miss without a word.
const NOT_BOOKED: f64 = 0.02;
/// The largest difference of a tensor of the repeated training from the student's, as a share of its largest value, above
/// which the two are told apart.
const SAME: f64 = 1e-6;

/// A student whose training is booked.
pub(crate) struct Booked<'a> {
    /// `student` or `control`.
    pub(crate) who: &'a str,
    /// What it learned from.
    pub(crate) learned: Learned<'a>,
    /// Its adapter's folder.
    pub(crate) folder: PathBuf,
}

/// Writes `ledger/`: entries, parts, summary and figures.
pub(super) fn measure(bench: &Workbench, run: &RunDir, texts: &str) -> Result<()> {
    let settings = &bench.experiment.measure.ledger;
    let (numbers, control) = kept_rows::learned(bench, run)?;
    let booked = |who, samples, folder| Booked { who, learned: Learned::of(run, samples), folder };
    let mut students = vec![booked("student", &numbers, run.adapter())];
    if bench.experiment.student.control {
        students.push(booked(CONTROL, &control, run.control_adapter()));
    }
    let of_student = |bench: &Workbench, student: &Booked<'_>| -> Result<Books> {
        let data = SubjectData::of(bench, run, &kept_rows::measured(bench, run)?)?;
        books(bench, &data.subject(bench, Tuned::of(&bench.base)), student, settings)
    };
    let workers = workers(bench.n_parameters(), students.len());
    let all = if workers > 1 {
        let experiment = &bench.experiment;
        side_by_side(&students, workers, |_, student| of_student(&Workbench::again(experiment.clone())?, student))?
    } else {
        students.iter().map(|student| of_student(bench, student)).collect::<Result<_>>()?
    };
    let (mut entries, mut parts, mut rows) = (vec![], vec![], vec![]);
    for books in all {
        entries.extend(books.entries);
        parts.extend(books.parts);
        rows.extend(books.rows);
    }
    let (name, folder) = (AnalysisName::Ledger, run.analysis(AnalysisName::Ledger));
    files::remove(&run.rows(name))?; // old rows do not belong to the new files
    files::write_atomic(&run.settings(name), (toml::to_string(settings)? + "\n" + texts).as_bytes())?;
    for (which, svg) in report::plots(&entries, &parts, &rows)? {
        files::write_atomic(&run.more_plot(name, which), svg.0.as_bytes())?;
    }
    write_csv(&folder.join("entries.csv"), &entries)?;
    write_csv(&folder.join("parts.csv"), &parts)?;
    write_csv(&run.rows(name), &rows)?; // last: it marks the end
    say(format!("measure: {NAME}: {}", report::reading(&rows)));
    let most = rows.iter().filter(|row| row.group == "residual").map(|row| (row.booked / row.change).abs());
    let most = most.fold(0.0, f64::max);
    if most > NOT_BOOKED && settings.points < 3 {
        say(format!(
            "measure: {NAME}: {:.0} % of a change are not booked; hint: measure.ledger.points = 3",
            100.0 * most
        ));
    }
    Ok(())
}

/// Repeats a student's training and books it.
pub(crate) fn books(
    bench: &Workbench,
    subject: &Subject<'_>,
    student: &Booked<'_>,
    settings: &Ledger,
) -> Result<Books> {
    let path = repeated(bench, subject, student)?;
    let spinner = spinner(NAME);
    let like = bench.initial_adapter()?;
    let books =
        settings.books(subject, student.who, (&like, &path), &mut |doing| spinner.set_message(doing.to_owned()));
    spinner.finish_and_clear();
    Ok(books?)
}

/// How the optimizer averages gradients. Refuses a training that has no books.
pub(super) fn average(experiment: &Experiment) -> Result<Average> {
    let (settings, student) = (&experiment.finetune, &experiment.student);
    let is_steered = matches!(experiment.teacher, Teacher::Steered { .. });
    let can_be = [
        (student.method == Method::Lora, "student.method is full, but the path that is booked is a LoRA's"),
        (student.dropout == 0.0, "student.dropout is not 0, but the books have no dropout"),
        (!is_steered, "teacher.kind is steered, but expected entries are under a teacher without edits"),
    ];
    if let Some((_, why)) = can_be.iter().find(|(holds, _)| !holds) {
        bail!(hinted!("{why}"; "leave ledger out of measure.analyses"));
    }
    if experiment.measure.ledger.measure == Measure::Loss {
        bail!(
            hinted!("measure.ledger.measure is loss, expected margin or logp"; "measure.ledger.numbers = 64 books the loss beside it")
        );
    }
    match settings.rule() {
        Rule::AdamW { beta1, .. } => Ok(Average::Corrected(beta1)),
        Rule::Sgd { momentum, .. } => Ok(Average::Sum(momentum)),
        Rule::RmsProp { .. } | Rule::Preconditioned { .. } => Ok(Average::Sum(0.0)),
        Rule::SignSgd { .. } | Rule::Muon { .. } => bail!(hinted!(
            "finetune.optimizer is {:?}, whose step is not linear in its gradients", settings.optimizer;
            "leave ledger out of measure.analyses"
        )),
    }
}

/// Repeats a student's training and keeps its path.
fn repeated(bench: &Workbench, subject: &Subject<'_>, student: &Booked<'_>) -> Result<path::Path> {
    let settings = &bench.experiment.finetune;
    let average = average(&bench.experiment)?;
    let is_decoupled = matches!(settings.rule(), Rule::AdamW { .. });
    let who = student.who;
    let chosen = chosen(bench, who, student.learned)?;
    let adapter = bench.initial_adapter()?;
    let values = |parameters: &[(String, Tensor)]| -> Result<Vec<Tensor>> {
        Ok(parameters.iter().map(|(_, tensor)| tensor.f_detach_copy()).collect::<std::result::Result<_, _>>()?)
    };
    let (mut states, mut steps) = (vec![values(&adapter.parameters())?], vec![]);
    let frozen_a = settings.frozen_a;
    let mut record = |taken: &Taken<'_>| -> Result<()> {
        let mut scales = taken.optimizer.scales()?;
        if frozen_a {
            let of = |(name, tensor): &(String, Tensor)| {
                if name.contains("lora_A") { tensor.f_zeros_like() } else { tensor.f_ones_like() }
            };
            let trained = taken.parameters.iter().map(of).collect::<std::result::Result<Vec<_>, _>>()?;
            scales = Some(match scales {
                None => trained,
                Some(scales) => {
                    let pairs = scales.iter().zip(&trained);
                    pairs.map(|(scale, trained)| scale.f_mul(trained)).collect::<std::result::Result<_, _>>()?
                }
            });
        }
        // As `Gradients::clip` does.
        let clip = settings.max_grad_norm / (taken.grad_norm + 1e-6);
        let clip = if settings.max_grad_norm > 0.0 && clip < 1.0 { clip } else { 1.0 };
        states.push(values(taken.parameters)?);
        steps.push(Step { rows: taken.rows.to_vec(), learning_rate: taken.learning_rate, clip, scales });
        Ok(())
    };
    let bar = bar(&format!("{NAME}: the {who}'s training again"), settings.total_steps(chosen.rows.len()));
    let training = Training {
        model: bench.frozen()?,
        adapter: Some(&adapter),
        rows: &chosen.rows,
        weights: chosen.weights.as_deref(),
        soft: chosen.soft.as_deref(),
        is_digit: &|id| bench.chat.is_digit(id),
        config: settings,
        seeds: bench.experiment.seeds.finetune(),
        until: None,
        checkpoint: None,
    };
    let recorded = training.recorded(
        &mut |_, progress| {
            bar.set_position(progress.step);
            Ok(())
        },
        &mut record,
    );
    recorded.with_context(|| format!("training the {who} again"))?;
    bar.finish_and_clear();
    is_the_students(&adapter, &Adapter::load_on(&student.folder, &bench.base)?, who)?;
    let rows = learned_rows(bench, subject, student.learned.samples, &chosen)?;
    let [decay, decay_in_gradient] =
        if is_decoupled { [settings.weight_decay, 0.0] } else { [0.0, settings.weight_decay] };
    let (by_teacher, gate) = (who != CONTROL, settings.gate.clone());
    Ok(path::Path { states, steps, average, decay, decay_in_gradient, rows, by_teacher, gate })
}

/// Says if the repeated training did not end where the student's did, as on another machine.
fn is_the_students(again: &Adapter, student: &Adapter, who: &str) -> Result<()> {
    let (again, student) = (again.parameters(), student.parameters());
    ensure!(
        again.len() == student.len(),
        "the {who}'s adapter has {} tensors, expected {}",
        student.len(),
        again.len()
    );
    let mut apart: f64 = 0.0;
    for ((_, again), (_, student)) in again.iter().zip(&student) {
        let most = student.f_abs()?.f_max()?.f_double_value(&[])?;
        let differ = again.f_sub(student)?.f_abs()?.f_max()?.f_double_value(&[])?;
        apart = apart.max(if most > 0.0 { differ / most } else { differ });
    }
    if apart > SAME {
        say(format!(
            "measure: {NAME}: the {who}'s training was repeated on this machine and ended elsewhere, by {apart:.1e} of the \
             largest values; the books are of the repeated one"
        ));
    }
    Ok(())
}

fn learned_rows(
    bench: &Workbench,
    subject: &Subject<'_>,
    samples: &[Sample],
    chosen: &Chosen,
) -> Result<Vec<LearnedRow>> {
    let Finetune { mask, gate, .. } = &bench.experiment.finetune;
    let in_template = bench.in_template()?; // in which teachers write
    let chat: &Chat = &in_template.chat;
    let row = |(at, (row, id)): (usize, (&Sequence, &usize))| -> Result<LearnedRow> {
        let is_target = mask.targets(row, |id| bench.chat.is_digit(id));
        let weight = |at_token: usize| chosen.weights.as_ref().map_or(1.0, |weights| weights[at][at_token]);
        let weights: Vec<f64> = (0..is_target.len()).map(|at| if is_target[at] { weight(at) } else { 0.0 }).collect();
        let sample = samples.iter().find(|sample| sample.id == *id).context("a row without a sample")?;
        let in_teacher = subject
            .teacher()
            .map(|(_, system)| chat.row(system, &sample.prompt, &sample.completion_ids))
            .transpose()?;
        let doses = if gate.is_everywhere() { None } else { Some(gate.doses(row)?) };
        let learned: Vec<bool> = weights.iter().map(|weight| *weight > 0.0).collect();
        let soft = chosen.soft.as_ref().map(|soft| examples::SoftTargets::of(row, &learned, &soft[at])).transpose()?;
        let soft = soft.map(|examples::SoftTargets { k, ids, probs }| SoftTargets { k, ids, probs });
        Ok(LearnedRow { id: *id, row: row.clone(), in_teacher, weights, doses, soft })
    };
    chosen.rows.iter().zip(&chosen.ids).enumerate().map(row).collect()
}

/// The files of the run that hold the books, for its report.
pub(super) const TABLES: &str = "The table is ledger/summary.csv. ledger/entries.csv has a line for each token of each step, \
                                 and ledger/parts.csv for each block, map, part written and part read of each step.";
