//! Checks an experiment against its prompts, its rows and its model before anything is made. Without this, a gate, an
//! edit or a position that selects no token, a block beyond the model, or a missing file would be noticed only after
//! hours of training, and unreadable rows only after the teacher was asked.

use std::path::absolute;

use analyses::direction::Extraction;
use anyhow::{Context, Result, anyhow, bail, ensure};
use hooks::{Gate, Provenance};

use crate::data::dataset;
use crate::experiment::{AnalysisName, Experiment, Method};
use crate::hinted;
use crate::stages::given_rows;
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;

/// Number prompts that are checked: all have the same classes, and a text that occurs in none of these will not be
/// trained on.
const PROMPTS: usize = 16;

/// Returns the workbench if its prompts have all tokens that the experiment names.
pub fn foreseen(bench: Workbench, run: &RunDir) -> Result<Workbench> {
    places(&bench, run)?;
    let users = number_prompts(&bench, run)?;
    questions(&bench)?;
    directions(&bench, &users)?;
    training(&bench, &users)?;
    // An arm of another model is checked when its model is loaded.
    for cell in bench.experiment.cells()?.into_iter().filter(|cell| bench.has_model_of(&cell.experiment)) {
        training(&bench.of(cell.experiment)?, &users).with_context(|| format!("arm {:?}", cell.arm))?;
    }
    Ok(bench)
}

/// Checks the blocks, maps and files that the analyses name.
fn places(bench: &Workbench, run: &RunDir) -> Result<()> {
    let Experiment { measure, student, .. } = &bench.experiment;
    let (asks, model) = (|name: AnalysisName| measure.analyses.contains(&name), &bench.base.config);
    if asks(AnalysisName::TokenAblation) && student.method == Method::Lora {
        let (gates, lora) = (&measure.token_ablation.gates, student.lora());
        let checked = gates.iter().try_for_each(|gate| gate.check_planned(&lora, model.n_layers));
        checked.context("measure.token_ablation.gates")?;
    }
    if asks(AnalysisName::Steering) {
        measure.steering.check(model.n_layers).map_err(|error| anyhow!("measure.{error}"))?;
    }
    let measured = RunDir::stage_done(&run.rows(AnalysisName::Interventions)) && !run.forced();
    if !asks(AnalysisName::Interventions) || measured {
        return Ok(()); // nothing reads the files again
    }
    let own_folder = absolute(run.root())?;
    for (name, edits) in &measure.interventions.edits {
        ensure!(!edits.is_empty(), "measure.interventions.edits: {name:?} has none, expected at least one edit");
        for edit in edits {
            // The run itself may still write a file in its own folder.
            let is_own = edit.file().is_some_and(|file| absolute(file).is_ok_and(|file| file.starts_with(&own_folder)));
            let checked = if is_own {
                edit.check_places(model)
            } else {
                edit.load(model, &Provenance::of(&bench.files)).map(drop)
            };
            checked.with_context(|| format!("measure.interventions.edits: the edit {edit}"))?;
        }
    }
    Ok(())
}

/// The prompts for the teacher, or those of the given rows. Once the run has taken a file of rows, the file is not read
/// again.
fn number_prompts(bench: &Workbench, run: &RunDir) -> Result<Vec<String>> {
    let taken = RunDir::stage_done(&run.generate_csv()) && !run.forced();
    let given = if taken { None } else { given_rows::rows(&bench.in_template()?)? };
    let settings = &bench.experiment.generate;
    Ok(match given {
        Some(given) => given.rows.into_iter().map(|row| row.user).take(PROMPTS).collect(),
        None if settings.numbers.is_some() => vec![], // the run has its rows, checked when it began
        None => {
            dataset::number_prompts(&bench.protocol, settings.n_prompts.min(PROMPTS), bench.experiment.seeds.gen_seed)
        }
    })
}

/// Checks the gates and edits at the questions.
fn questions(bench: &Workbench) -> Result<()> {
    let Experiment { measure, student, .. } = &bench.experiment;
    let asks = |name: AnalysisName| measure.analyses.contains(&name);
    let refused = |key: &str, error: analyses::Error| {
        anyhow!(
            hinted!("{key}: {error}"; "other tokens, or a context of the questions (measure.context) that has them")
        )
    };
    let system = bench.protocol.context(bench.experiment.measure_context())?;
    let prompts = bench.prompts(system.as_deref(), &bench.questions()?)?;
    if asks(AnalysisName::TokenAblation) && student.method == Method::Lora {
        measure.token_ablation.check(&prompts).map_err(|error| refused("measure.token_ablation.gates", error))?;
    }
    if asks(AnalysisName::Interventions) {
        measure.interventions.check(&prompts).map_err(|error| refused("measure.interventions.edits", error))?;
    }
    Ok(())
}

/// Checks the positions at which directions are read, of number prompts in the student's context.
fn directions(bench: &Workbench, users: &[String]) -> Result<()> {
    let measure = &bench.experiment.measure;
    let read = [AnalysisName::Direction, AnalysisName::Steering].iter().any(|name| measure.analyses.contains(name));
    let is_named = measure.direction.positions.iter().any(|positions| matches!(positions, Extraction::Class(_)));
    if !read || !is_named {
        return Ok(());
    }
    Ok(measure.direction.check(&bench.prompts(bench.student_system()?.as_deref(), users)?)?)
}

/// Checks the blocks and the gate of a training.
fn training(bench: &Workbench, users: &[String]) -> Result<()> {
    let gate: &Gate = &bench.experiment.finetune.gate;
    let (student, model) = (&bench.experiment.student, &bench.base.config);
    if student.adapter.is_none() && student.method == Method::Lora {
        student.lora().check(model).context("student.layers")?;
        gate.check_planned(&student.lora(), model.n_layers).context("finetune.gate")?;
    }
    // The answers are not written yet; a gate that names generated tokens will find them.
    if student.adapter.is_some() || gate.is_blind() || gate.names_generated() {
        return Ok(());
    }
    let prompts = bench.prompts(bench.student_system()?.as_deref(), users)?;
    let refusals = prompts.iter().map(|prompt| gate.acts(prompt).err()).collect::<Option<Vec<_>>>();
    match refusals.and_then(|refusals| refusals.into_iter().next()) {
        None => Ok(()), // one prompt at which it acts is enough here: the training checks every row
        Some(error) => bail!(hinted!(
            "finetune.gate: {error}";
            "other tokens, or a context of the training (student.context) that has them"
        )),
    }
}
