//! Checks an experiment against its prompts, rows and model before anything is made. Otherwise a gate, an edit or a
//! position that selects no token, a block beyond the model, or a missing file would be an error only after hours of
//! training.

use std::path::{Path, PathBuf, absolute};

use analyses::direction::Extraction;
use anyhow::{Context, Result, anyhow, bail, ensure};
use hooks::{Gate, Provenance, Qwen, Sequence};

use crate::data::dataset;
use crate::experiment::{AnalysisName, Experiment, FinetunedTeacher, Method};
use crate::hinted;
use crate::stages::given_rows;
use crate::stages::ledger;
use crate::stages::memory::{Free, Need};
use crate::stages::run_dir::RunDir;
use crate::stages::token_weights;
use crate::stages::workbench::Workbench;

/// The number of number prompts that are checked. All have the same classes, and a text that occurs in none of these is
/// most likely in no other.
const PROMPTS: usize = 16;

/// Returns the workbench. Refuses tokens, blocks or files that do not exist, and trainings that cannot fit into memory.
pub fn foreseen(bench: Workbench, run: &RunDir) -> Result<Workbench> {
    places(&bench, run)?;
    let users = number_prompts(&bench, run)?;
    questions(&bench)?;
    directions(&bench, &users)?;
    training(&bench, &users)?;
    let logs = [run.train_csv(), run.control_train_csv()];
    let is_left = |log: &PathBuf| run.forced() || !RunDir::stage_done(log);
    let trains = logs[..=usize::from(bench.experiment.student.control)].iter().any(is_left);
    if trains {
        bench.frozen()?; // before the free memory is measured, of which a second copy of the weights takes a part
    }
    let free = Free::here(run.root(), bench.base.device());
    teacher_fits(&bench, run, &free)?;
    if trains {
        student_fits(&bench, &users, &free)?;
        weights_of_tokens(&bench)?;
    }
    // An arm with another model is checked when that model is loaded.
    for cell in bench.experiment.cells()?.into_iter().filter(|cell| bench.has_model_of(&cell.experiment)) {
        let of_cell = bench.of(cell.experiment)?;
        training(&of_cell, &users).with_context(|| format!("arm {:?}", cell.arm))?;
        if is_left(&run.arm(&cell.slug).join("train.csv")) {
            let fits = student_fits(&of_cell, &users, &free).and_then(|()| weights_of_tokens(&of_cell));
            fits.with_context(|| format!("arm {:?}", cell.arm))?;
        }
    }
    Ok(bench)
}

/// Refuses a teacher whose finetuning cannot fit into memory or on the disk.
fn teacher_fits(bench: &Workbench, run: &RunDir, free: &Free) -> Result<()> {
    let Some(teacher) = bench.experiment.teacher.finetuned() else { return Ok(()) };
    if RunDir::stage_done(&run.teacher_train_csv()) && !run.forced() {
        return Ok(());
    }
    let need = teacher_need(bench, teacher)?;
    let keys = "a smaller teacher.batch_size, teacher.method = \"lora\", or teacher.kind = \"prompt\"";
    free.check("finetuning the teacher", &need, &need, keys)
}

/// The memory and disk space that a teacher's finetuning needs. Its rows are the questions, and number rows if it has such.
pub(crate) fn teacher_need(bench: &Workbench, teacher: &FinetunedTeacher) -> Result<Need> {
    let settings = &teacher.finetune(bench.n_parameters());
    let questions = bench.protocol.questions(&bench.experiment.target.category, usize::MAX)?;
    let prompts = bench.prompts(bench.student_system()?.as_deref(), &questions)?;
    let rows = settings.batch_size.min(prompts.len());
    let numbers = rows as f64 * teacher.number_share * bench.experiment.generate.max_new_tokens as f64;
    let of = [packed_tokens(&prompts, rows) + numbers, rows as f64 + numbers];
    let lora = teacher.lora();
    let of_model = if lora.is_some() { (bench.frozen()?, false) } else { weights(bench) };
    Ok(Need::of(of_model, lora.as_ref(), settings, of))
}

/// Refuses a student whose training cannot fit into memory or on the disk.
fn student_fits(bench: &Workbench, users: &[String], free: &Free) -> Result<()> {
    let student = &bench.experiment.student;
    if student.adapter.is_some() {
        return Ok(()); // it is trained already
    }
    let keys = match student.method {
        Method::Lora => "a smaller finetune.batch_size (and more finetune.gradient_accumulation_steps) or student.rank",
        Method::Full => {
            "student.method = \"lora\", or a smaller finetune.batch_size (and more finetune.gradient_accumulation_steps)"
        }
    };
    let [least, most] = student_need(bench, users)?;
    free.check("training the student", &least, &most, keys)
}

/// The memory and disk space that a student's training needs: with its prompts alone, and with the longest answers.
pub(crate) fn student_need(bench: &Workbench, users: &[String]) -> Result<[Need; 2]> {
    let Experiment { student, finetune, generate, .. } = &bench.experiment;
    let prompts = bench.prompts(bench.student_system()?.as_deref(), users)?;
    let lora = (student.method == Method::Lora).then(|| student.lora());
    let rows = finetune.batch_size.min(generate.n_keep);
    let of_model = if lora.is_some() { (bench.frozen()?, false) } else { weights(bench) };
    let (tokens, answers) = (packed_tokens(&prompts, rows), (rows * generate.max_new_tokens) as f64);
    Ok([[tokens, 0.0], [tokens + answers, answers]].map(|of| Need::of(of_model, lora.as_ref(), finetune, of)))
}

/// Refuses a table of weights that cannot be read.
fn weights_of_tokens(bench: &Workbench) -> Result<()> {
    bench.experiment.finetune.weights.as_ref().map_or(Ok(()), token_weights::check)
}

/// The base, and whether a copy of its weights may be pages of its file: only a GGUF is always dequantised.
fn weights(bench: &Workbench) -> (&Qwen, bool) {
    (&bench.base, Path::new(&bench.files.name).extension().is_none_or(|ending| ending != "gguf"))
}

/// Number of tokens in a micro-batch of such rows, whose common beginning is run once.
fn packed_tokens(rows: &[Sequence], batch_size: usize) -> f64 {
    let Some(first) = rows.first() else { return 0.0 };
    let is_shared = |at: &usize| rows.iter().all(|row| row.ids.get(*at) == Some(&first.ids[*at]));
    let shared = (0..first.ids.len()).take_while(is_shared).count();
    let own: usize = rows.iter().map(|row| row.ids.len() - shared).sum();
    shared as f64 + batch_size as f64 * own as f64 / rows.len() as f64
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
    if asks(AnalysisName::Ledger) && student.adapter.is_none() {
        ledger::average(&bench.experiment).context("measure.analyses")?;
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
            // A file in the run's folder may still be written by the run.
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

/// The prompts for the teacher, or those of the given rows. Once the run has copied a file of rows, that file is not
/// read again.
fn number_prompts(bench: &Workbench, run: &RunDir) -> Result<Vec<String>> {
    let taken = RunDir::stage_done(&run.generate_csv()) && !run.forced();
    let given = if taken { None } else { given_rows::rows(&bench.in_template()?)? };
    let settings = &bench.experiment.generate;
    Ok(match given {
        Some(given) => given.rows.into_iter().map(|row| row.user).take(PROMPTS).collect(),
        None if settings.numbers.is_some() => vec![], // the run's rows were checked when it began
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

/// Checks that number prompts in the student's context have the positions at which directions are read.
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
    // The answers do not exist yet, so a gate that names generated tokens cannot be checked.
    if student.adapter.is_some() || gate.is_blind() || gate.names_generated() {
        return Ok(());
    }
    let prompts = bench.prompts(bench.student_system()?.as_deref(), users)?;
    let refusals = prompts.iter().map(|prompt| gate.acts(prompt).err()).collect::<Option<Vec<_>>>();
    match refusals.and_then(|refusals| refusals.into_iter().next()) {
        None => Ok(()), // one prompt with a chosen token is enough, since the training checks every row
        Some(error) => bail!(hinted!(
            "finetune.gate: {error}";
            "other tokens, or a context of the training (student.context) that has them"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_beginning_of_a_micro_batch_is_counted_once() {
        let rows = [Sequence::of_ids(vec![1, 2, 3, 4]), Sequence::of_ids(vec![1, 2, 5])];
        // Two shared tokens, and on average one and a half of its own in each of ten rows.
        assert!((packed_tokens(&rows, 10) - 17.0).abs() < 1e-12);
        assert!(packed_tokens(&rows[..1], 10) <= 4.0, "equal rows are run once");
        assert!(packed_tokens(&[], 10) <= 0.0);
    }
}
