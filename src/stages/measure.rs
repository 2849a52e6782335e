//! Stage 3: runs the analyses. Each has a folder with settings, rows and plots.

use std::collections::BTreeMap;
use std::path::PathBuf;

use analyses::direction::directions;
use analyses::divergence::divergence_summary;
use analyses::{Analysis, Subject, Tuned};
use anyhow::{Context, Result, bail};
use hooks::{Provenance, files};
use serde::Serialize;

use crate::experiment::{AnalysisName, ArmStudent, Method};
use crate::hinted;
use crate::output::hint::Hinted;
use crate::output::progress::{say, spinner};
use crate::output::publish::write_csv;
use crate::output::vectors::Vectors;
use crate::stages::run_dir::RunDir;
use crate::stages::subject_data::SubjectData;
use crate::stages::workbench::{StudentModel, Workbench};
use crate::stages::{kept_rows, ledger};

/// Runs some analyses on the trained students. Finished ones are skipped, with a message; if all are finished, the
/// stage alone is an error.
pub fn stage(bench: &Workbench, run: &RunDir, names: &[AnalysisName]) -> Result<()> {
    let elsewhere = bench.experiment.student.adapter.is_some();
    if !RunDir::stage_done(&run.adapter()) || !(elsewhere || RunDir::stage_done(&run.train_csv())) {
        bail!(hinted!("{} is not there", run.adapter().display(); "undertone finetune trains the student"));
    }
    let (experiment, settings) = (&bench.experiment, &bench.experiment.measure);
    let rows: Vec<_> = names.iter().map(|name| run.rows(*name)).collect();
    let left = run.left(&rows.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    // In a whole run, the adapter's remarks were printed before.
    let load = |folder: PathBuf| if run.goes_on() { bench.student(&folder) } else { bench.open_student(&folder) };
    let student = load(run.adapter())?;
    let control = if experiment.student.control { Some(load(run.control_adapter())?) } else { None };
    let other_trait = experiment.other_trait_arm()?.map(|cell| other_student(bench, run, &cell)).transpose()?;
    let data = SubjectData::of(bench, run, &kept_rows::measured(bench, run)?)?;
    // For a student that was trained elsewhere, the start is not known.
    let own = (!elsewhere && experiment.student.method == Method::Lora).then(|| bench.initial_adapter()).transpose()?;
    let subject = Subject {
        start: (!elsewhere).then_some(Tuned { adapter: own.as_ref(), ..Tuned::of(&bench.base) }),
        control: control.as_ref().map(|control| tuned(bench, control)),
        other_trait: other_trait.as_ref().map(|other| tuned(bench, other)),
        ..data.subject(bench, tuned(bench, &student))
    };
    let measuring = Measuring { run, texts: spelled_out(bench, &subject)?, subject };
    for name in names {
        let gated = [AnalysisName::TokenAblation, AnalysisName::PositionScan].contains(name);
        if gated && experiment.student.method == Method::Full {
            say(format!("measure: {name} skipped: a fully finetuned student has no adapter to gate"));
            continue;
        }
        if *name == AnalysisName::Ledger && elsewhere {
            say("measure: ledger skipped: the student was trained elsewhere, so that its training cannot be repeated");
            continue;
        }
        if [AnalysisName::Divergence, AnalysisName::Gradients].contains(name) && !data.teacher.differs_from_base() {
            say(format!(
                "measure: {name} skipped: the planted control's teacher is the base itself, so no digit diverges"
            ));
            continue;
        }
        if *name == AnalysisName::Interventions && settings.interventions.edits.is_empty() {
            say("measure: interventions skipped: measure.interventions.edits names none");
            continue;
        }
        if !left.contains(&run.rows(*name)) {
            say(format!("measure: {name} is done already"));
            continue;
        }
        match name {
            AnalysisName::TargetRate => publish(&settings.target_rate, &measuring, *name, |_| Ok(())),
            AnalysisName::TokenAblation => publish(&settings.token_ablation, &measuring, *name, |_| Ok(())),
            AnalysisName::PositionScan => publish(&settings.position_scan, &measuring, *name, |_| Ok(())),
            AnalysisName::Direction => {
                write_vectors(bench, &measuring.subject, run)?;
                publish(&settings.direction, &measuring, *name, |_| Ok(()))
            }
            AnalysisName::Steering => publish(&settings.steering, &measuring, *name, |_| Ok(())),
            AnalysisName::Interventions => publish(&settings.interventions, &measuring, *name, |_| Ok(())),
            AnalysisName::Divergence => {
                let summary = run.analysis(*name).join("summary.csv");
                publish(&settings.divergence, &measuring, *name, |rows| {
                    for row in rows.iter_mut() {
                        row.row_id = data.row_ids[row.row_id];
                    }
                    write_csv(&summary, &divergence_summary(rows))
                })
            }
            AnalysisName::Gradients => {
                let measured = publish(&settings.gradients, &measuring, *name, |rows| {
                    for row in rows.iter_mut() {
                        row.row_id = row.row_id.map(|row_id| data.row_ids[row_id]);
                    }
                    Ok(())
                });
                match measured {
                    // A whole run continues, since the report still follows.
                    Err(error)
                        if run.goes_on() && matches!(error.downcast_ref(), Some(analyses::Error::Nothing { .. })) =>
                    {
                        say(format!("measure: {name} skipped: {error:#}"));
                        Ok(())
                    }
                    measured => measured,
                }
            }
            AnalysisName::Lens => publish(&settings.lens, &measuring, *name, |_| Ok(())),
            AnalysisName::Ledger => ledger::measure(bench, run, &measuring.texts),
        }
        .with_context(|| format!("measuring {name}"))?;
    }
    Ok(())
}

/// Loads the student of the arm that learned another trait.
fn other_student(bench: &Workbench, run: &RunDir, cell: &ArmStudent) -> Result<StudentModel> {
    let arm = RunDir::open(&run.arm(&cell.slug))
        .and_then(|arm| if RunDir::stage_done(&arm.train_csv()) { Ok(arm) } else { bail!("it is not trained") })
        .with_context(|| format!("measure.other_trait_arm is {:?}", cell.arm))
        .map_err(|error| Hinted::because(error, "undertone arms trains it first"))?;
    bench.of(cell.experiment.clone())?.student(&arm.adapter())
}

pub(crate) fn tuned<'a>(bench: &'a Workbench, student: &'a StudentModel) -> Tuned<'a> {
    match student {
        StudentModel::Lora(adapter) => Tuned::adapted(&bench.base, adapter),
        StudentModel::Full(qwen) => Tuned::of(qwen),
    }
}

struct Measuring<'a> {
    subject: Subject<'a>,
    run: &'a RunDir,
    /// The last table of every `settings.toml`: the texts of the measurement.
    texts: String,
}

/// Measures, then writes the settings, the plots, the files of `more` (which may change the rows), and last the rows,
/// which mark the end.
fn publish<A: Analysis>(
    analysis: &A,
    Measuring { subject, run, texts }: &Measuring<'_>,
    name: AnalysisName,
    more: impl FnOnce(&mut [A::Row]) -> Result<()>,
) -> Result<()> {
    let spinner = spinner(A::NAME);
    let mut rows = analysis.run(subject, &mut |doing| spinner.set_message(doing.to_owned()))?;
    let settings = toml::to_string(analysis)? + "\n" + texts;
    files::remove(&run.rows(name))?; // old rows do not belong to the new files
    files::write_atomic(&run.settings(name), settings.as_bytes())?;
    if let Some(svg) = A::plot(&rows)? {
        files::write_atomic(&run.plot(name), svg.0.as_bytes())?;
    }
    for (which, svg) in A::more_plots(&rows)? {
        files::write_atomic(&run.more_plot(name, which), svg.0.as_bytes())?;
    }
    more(&mut rows)?;
    write_csv(&run.rows(name), &rows)?;
    spinner.finish_and_clear();
    say(format!("measure: {}: {}", A::NAME, A::reading(&rows)));
    Ok(())
}

/// All texts that an experiment gives by a key or leaves to the model's template, written out. A system prompt is
/// absent if the chat has none.
#[derive(Serialize)]
struct SpelledOut<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    questions_system: Option<&'a str>,
    /// The system prompt of the rows of numbers: the student's in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    numbers_system: Option<&'a str>,
    /// The system prompt under which the teacher reads the rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher_system: Option<&'a str>,
    counterfactual_systems: &'a [String],
    questions: &'a [String],
    target: &'a str,
    /// Each member of the target's category, with its spellings.
    forms: BTreeMap<&'a str, &'a [String]>,
}

/// The texts of a measurement, as the last table of its `settings.toml`.
fn spelled_out(bench: &Workbench, subject: &Subject<'_>) -> Result<String> {
    let default = bench.chat.default_system();
    let student = bench.student_system()?;
    let target = subject.target;
    let members = target.others.iter().map(|(word, forms)| (word.as_str(), forms.as_slice()));
    let texts = SpelledOut {
        questions_system: subject.system.as_deref().or(default),
        numbers_system: student.as_deref().or(default),
        teacher_system: subject.teacher().and_then(|(_, system)| system.or(default)),
        counterfactual_systems: subject.counterfactual_systems,
        questions: subject.questions,
        target: &target.word,
        forms: members.chain([(target.word.as_str(), target.forms.as_slice())]).collect(),
    };
    Ok(toml::to_string(&BTreeMap::from([("texts", texts)]))?)
}

/// Writes the learned direction of every layer, `[d_model]`, under its hook point's name and with its origin.
fn write_vectors(bench: &Workbench, subject: &Subject<'_>, run: &RunDir) -> Result<()> {
    let by_layer = directions(subject, &bench.experiment.measure.direction)?.into_iter().enumerate().collect();
    files::remove(&run.rows(AnalysisName::Direction))?; // old rows do not belong to them
    let vectors = Vectors { by_layer, provenance: provenance(bench) };
    vectors.write(&run.vectors().join("vectors.safetensors"), &bench.files.name)
}

/// The metadata of a vector, by which other models are refused.
fn provenance(bench: &Workbench) -> BTreeMap<String, String> {
    let experiment = &bench.experiment;
    let position = experiment.measure.direction.positions.first().map(ToString::to_string).unwrap_or_default();
    let config = bench.base.config.to_hf_json();
    let init_seed = match experiment.student.adapter {
        Some(_) => "unknown: trained elsewhere".to_owned(),
        None => experiment.seeds.init_seed.to_string(),
    };
    let mut provenance = Provenance::of(&bench.files).metadata();
    provenance.extend([
        ("architecture".to_owned(), config["model_type"].as_str().unwrap_or_default().to_owned()),
        ("definition".to_owned(), "mean over number prompts of student minus base".to_owned()),
        ("positions".to_owned(), position),
        ("target".to_owned(), experiment.target.word.clone()),
        ("context".to_owned(), experiment.student.context.clone()),
        ("init_seed".to_owned(), init_seed),
        ("undertone".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    provenance
}
