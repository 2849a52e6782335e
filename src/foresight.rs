//! What an experiment asks of its prompts, looked at before anything is made. A gate, an edit or a position that no prompt has a token
//! for would be noticed only after hours of training, and rows that cannot be read only after the teacher was asked.

use analyses::direction::Extraction;
use anyhow::{Context, Result, anyhow, bail};
use hooks::{Gate, Prompt};

use crate::experiment::{AnalysisName, Experiment, Method};
use crate::run_dir::RunDir;
use crate::workbench::Workbench;
use crate::{dataset, given_numbers};

/// How many number prompts are looked at: classes are alike in all, and a text that stands in none of so many will not be learned at.
const PROMPTS: usize = 16;

/// The workbench, once its prompts have proven to hold what the experiment names in them.
pub fn foreseen(bench: Workbench, run: &RunDir) -> Result<Workbench> {
    let users = number_prompts(&bench, run)?;
    questions(&bench)?;
    directions(&bench, &users)?;
    training(&bench, &users)?;
    // An arm of another model is looked at when its model is loaded.
    for cell in bench.experiment.cells()?.into_iter().filter(|cell| bench.has_model_of(&cell.experiment)) {
        training(&bench.of(cell.experiment)?, &users).with_context(|| format!("arm {:?}", cell.arm))?;
    }
    Ok(bench)
}

/// What the teacher will be asked, or what it was asked elsewhere. A file of rows is of no use any more once the run has taken them.
fn number_prompts(bench: &Workbench, run: &RunDir) -> Result<Vec<String>> {
    let taken = RunDir::stage_done(&run.generate_csv()) && !run.forced();
    let given = if taken { None } else { given_numbers::rows(&bench.in_template()?)? };
    let settings = &bench.experiment.generate;
    Ok(match given {
        Some(given) => given.rows.into_iter().map(|row| row.user).take(PROMPTS).collect(),
        None if settings.numbers.is_some() => vec![], // they stand in the run's data, and were looked at when it was begun
        None => {
            dataset::number_prompts(&bench.protocol, settings.n_prompts.min(PROMPTS), bench.experiment.seeds.gen_seed)
        }
    })
}

/// The gates and edits at the questions.
fn questions(bench: &Workbench) -> Result<()> {
    let Experiment { measure, student, .. } = &bench.experiment;
    let asks = |name: AnalysisName| measure.analyses.contains(&name);
    let refused = |key: &str, error: analyses::Error| {
        anyhow!("{key}: {error}; hint: other tokens, or a context of the questions (measure.context) that has them")
    };
    let system = bench.protocol.context(bench.experiment.measure_context())?;
    let prompts = bench.questions()?;
    let prompts = prompts.iter().map(|question| bench.chat.prompt(system.as_deref(), question));
    let prompts = prompts.collect::<hooks::Result<Vec<Prompt>>>()?;
    if asks(AnalysisName::TokenAblation) && student.method == Method::Lora {
        let checked = measure.token_ablation.check(&prompts);
        checked.map_err(|error| refused("measure.token_ablation.gates", error))?;
    }
    if asks(AnalysisName::Interventions) {
        let checked = measure.interventions.check(&prompts);
        checked.map_err(|error| refused("measure.interventions.edits", error))?;
    }
    Ok(())
}

/// The positions that directions are read at.
fn directions(bench: &Workbench, users: &[String]) -> Result<()> {
    let measure = &bench.experiment.measure;
    let read = [AnalysisName::Direction, AnalysisName::Steering].iter().any(|name| measure.analyses.contains(name));
    let is_named = measure.direction.positions.iter().any(|positions| matches!(positions, Extraction::Class(_)));
    if !read || !is_named {
        return Ok(());
    }
    Ok(measure.direction.check(&in_context(bench, users)?)?)
}

/// The gate of a training.
fn training(bench: &Workbench, users: &[String]) -> Result<()> {
    let gate: &Gate = &bench.experiment.finetune.gate;
    // What is learned is not written yet: a gate that speaks of generated tokens finds its own there.
    if bench.experiment.student.adapter.is_some() || gate.is_blind() || gate.names_generated() {
        return Ok(());
    }
    let prompts = in_context(bench, users)?;
    let refusals = prompts.iter().map(|prompt| gate.acts(prompt).err()).collect::<Option<Vec<_>>>();
    match refusals.and_then(|refusals| refusals.into_iter().next()) {
        None => Ok(()), // one at which it acts is enough here: the training looks at every row
        Some(error) => bail!(
            "finetune.gate: {error}; hint: other tokens, or a context of the training (student.context) that has them"
        ),
    }
}

/// Number prompts in the student's context.
fn in_context(bench: &Workbench, users: &[String]) -> Result<Vec<Prompt>> {
    let system = bench.student_system()?;
    users.iter().map(|user| Ok(bench.chat.prompt(system.as_deref(), user)?)).collect()
}
