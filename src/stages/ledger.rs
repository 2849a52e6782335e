//! The ledger of a run: repeats the trainings of its students, and books what they learned of the trait.

use std::path::Path;

use analyses::Subject;
use analyses::ledger::{Average, Books, LearnedRow, NAME, Step, path, report};
use anyhow::{Context, Result, bail, ensure};
use hooks::tch::{Kind, Tensor};
use hooks::{Adapter, Chat, Qwen, Sequence, files};

use crate::data::dataset::Sample;
use crate::experiment::{AnalysisName, Experiment, Method, Teacher};
use crate::hinted;
use crate::output::progress::{bar, say, spinner};
use crate::output::publish::write_csv;
use crate::stages::finetune::{Chosen, chosen};
use crate::stages::kept_rows::{self, Learned};
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;
use crate::training::optim::Rule;
use crate::training::settings::Loss;
use crate::training::training_loop::{Taken, Training};

/// Number of parameters up to which the books are made in f64.
const EXACT: usize = 10_000_000;
/// The largest difference of a tensor of the repeated training from the student's, as a share of its largest value, above
/// which the two are told apart.
const SAME: f64 = 1e-6;

/// Writes `ledger/`: entries, parts, summary and figures. `subject`: the run's, with its questions and teacher.
pub(super) fn measure(bench: &Workbench, run: &RunDir, subject: &Subject<'_>, texts: &str) -> Result<()> {
    let settings = &bench.experiment.measure.ledger;
    let exact = (bench.n_parameters() <= EXACT).then(|| Qwen::load(&bench.files, bench.base.device(), Kind::Double));
    let exact = exact.transpose()?;
    let subject = Subject { base: exact.as_ref().unwrap_or(&bench.base), ..subject.clone() };
    let (numbers, control) = kept_rows::learned(bench, run)?;
    let mut students = vec![("student", numbers, run.adapter())];
    if bench.experiment.student.control {
        students.push(("control", control, run.control_adapter()));
    }
    let mut books = Books::default();
    for (name, samples, folder) in students {
        let path = repeated(bench, run, &subject, name, &samples, &folder)?;
        let spinner = spinner(NAME);
        let like = bench.initial_adapter()?;
        let of = settings.books(&subject, name, (&like, &path), &mut |doing| spinner.set_message(doing.to_owned()))?;
        spinner.finish_and_clear();
        books.entries.extend(of.entries);
        books.parts.extend(of.parts);
        books.rows.extend(of.rows);
    }
    let (name, folder) = (AnalysisName::Ledger, run.analysis(AnalysisName::Ledger));
    files::remove(&run.rows(name))?; // old rows do not belong to the new files
    files::write_atomic(&run.settings(name), (toml::to_string(settings)? + "\n" + texts).as_bytes())?;
    for (which, svg) in report::plots(&books.entries, &books.parts, &books.rows)? {
        files::write_atomic(&run.more_plot(name, which), svg.0.as_bytes())?;
    }
    write_csv(&folder.join("entries.csv"), &books.entries)?;
    write_csv(&folder.join("parts.csv"), &books.parts)?;
    write_csv(&run.rows(name), &books.rows)?; // last: it marks the end
    say(format!("measure: {NAME}: {}", report::reading(&books.rows)));
    Ok(())
}

/// How the optimizer averages gradients. Refuses a training that has no books.
pub(super) fn average(experiment: &Experiment) -> Result<Average> {
    let (settings, student) = (&experiment.finetune, &experiment.student);
    let is_steered = matches!(experiment.teacher, Teacher::Steered { .. });
    let can_be = [
        (student.method == Method::Lora, "student.method is full, but the path that is booked is a LoRA's"),
        (student.dropout == 0.0, "student.dropout is not 0, but the books have no dropout"),
        (settings.gate.is_everywhere(), "finetune.gate is not everywhere, but the books are of an adapter that is"),
        (settings.loss == Loss::Nll, "finetune.loss is kl, but entries are of written tokens"),
        (!is_steered, "teacher.kind is steered, but expected entries are under a teacher without edits"),
    ];
    if let Some((_, why)) = can_be.iter().find(|(holds, _)| !holds) {
        bail!(hinted!("{why}"; "leave ledger out of measure.analyses"));
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
fn repeated(
    bench: &Workbench,
    run: &RunDir,
    subject: &Subject<'_>,
    who: &str,
    samples: &[Sample],
    folder: &Path,
) -> Result<path::Path> {
    let settings = &bench.experiment.finetune;
    let average = average(&bench.experiment)?;
    let is_decoupled = matches!(settings.rule(), Rule::AdamW { .. });
    let Chosen { rows, ids, weights, .. } = chosen(bench, who, Learned::of(run, samples))?;
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
    let bar = bar(&format!("{NAME}: the {who}'s training again"), settings.total_steps(rows.len()));
    let training = Training {
        model: bench.frozen()?,
        adapter: Some(&adapter),
        rows: &rows,
        weights: weights.as_deref(),
        soft: None,
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
    is_the_students(&adapter, &Adapter::load_on(folder, &bench.base)?, who)?;
    let learned = learned_rows(bench, subject, samples, &rows, &ids, weights.as_deref())?;
    let [decay, decay_in_gradient] =
        if is_decoupled { [settings.weight_decay, 0.0] } else { [0.0, settings.weight_decay] };
    Ok(path::Path { states, steps, average, decay, decay_in_gradient, rows: learned })
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
    rows: &[Sequence],
    ids: &[usize],
    weights: Option<&[Vec<f64>]>,
) -> Result<Vec<LearnedRow>> {
    let mask = bench.experiment.finetune.mask;
    let in_template = bench.in_template()?; // in which teachers write
    let chat: &Chat = &in_template.chat;
    let row = |(at, (row, id)): (usize, (&Sequence, &usize))| -> Result<LearnedRow> {
        let is_target = mask.targets(row, |id| bench.chat.is_digit(id));
        let weight = |at_token: usize| weights.map_or(1.0, |weights| weights[at][at_token]);
        let weights = is_target.iter().enumerate().map(|(at, is_target)| if *is_target { weight(at) } else { 0.0 });
        let sample = samples.iter().find(|sample| sample.id == *id).context("a row without a sample")?;
        let in_teacher = subject
            .teacher()
            .map(|(_, system)| chat.row(system, &sample.prompt, &sample.completion_ids))
            .transpose()?;
        Ok(LearnedRow { id: *id, row: row.clone(), in_teacher, weights: weights.collect() })
    };
    rows.iter().zip(ids).enumerate().map(row).collect()
}

/// The files of the run that hold the books, for its report.
pub(super) const TABLES: &str = "The table is ledger/summary.csv. ledger/entries.csv has a line for each token of each step, \
                                 and ledger/parts.csv for each block, map, part written and part read of each step.";
