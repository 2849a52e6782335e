//! Trains the arms' students, each in a separate folder, and puts them into one table with the run's own students.

use std::collections::btree_map::{BTreeMap, Entry};
use std::path::Path;

use analyses::Svg;
use analyses::stats::{mean, standard_error};
use analyses::target::{Score, TokenForms};
use anyhow::{Context, Result, bail, ensure};
use hooks::{Condition, ModelFiles, Qwen, files, stream_seed};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Kind;

use super::kept_rows::{self, Learned};
use super::{finetune, generate, teacher};
use crate::data::dataset::{Sample, TeacherKind};
use crate::experiment::{ArmData, ArmStudent, CONTROL_STUDENT, Dtype, Experiment, Method, STUDENT};
use crate::hinted;
use crate::output::html::{Figure, Section};
use crate::output::progress::{say, spinner};
use crate::output::publish::{Table, read_csv, write_csv};
use crate::stages::arm_table::{ArmRow, plot, rank_plot, reading};
use crate::stages::run_dir::{RunDir, WhenDone};
use crate::stages::workbench::{StudentModel, Workbench};
use crate::training::learner::delta_w_norm;
use crate::training::side_by_side::{side_by_side, workers};
use crate::training::step_log::{StepRow, first_and_last_quarter};

/// Trains every arm's students and writes `arms/rows.csv`. Finished students are kept, unless the run is forced; a
/// whole run also keeps the table.
pub fn stage(bench: &Workbench, run: &RunDir) -> Result<()> {
    let cells = bench.experiment.cells()?;
    if cells.is_empty() {
        say("arms: the experiment has none");
        return Ok(());
    }
    if run.goes_on() && RunDir::stage_done(&run.arms_rows()) {
        say("arms: done already");
        return Ok(());
    }
    run.claim(&run.arms_rows())?;
    if run.forced() {
        run.forget_arms_table()?; // an interrupted run then has no outdated table
    }
    let (numbers, control) = kept_rows::learned(bench, run)?;
    let mut scorer = Scorer::default();
    let mut rows = vec![];
    let own = [
        (STUDENT, ArmData::Teacher, &numbers, run.adapter(), run.train_csv()),
        (CONTROL_STUDENT, ArmData::Control, &control, run.control_adapter(), run.control_train_csv()),
    ];
    let elsewhere = bench.experiment.student.adapter.is_some();
    for (name, data, samples, folder, log) in &own[..if bench.experiment.student.control { 2 } else { 1 }] {
        let last = if elsewhere { folder } else { log };
        if !RunDir::stage_done(last) {
            bail!(hinted!("{} is not there", last.display(); "undertone finetune makes the {name}"));
        }
        let training = (!elsewhere).then_some(Training { data: *data, samples, log });
        rows.push(scorer.row(bench, &Student { arm: name, seed_index: 0, folder, training })?);
    }
    let (numbers, control) = kept_rows::kept(bench, run)?; // an arm may learn from others of them
    let context = ArmContext::of(bench, run, (&numbers, &control), cells.len())?;
    rows.extend(all(bench, &cells, &context, &mut scorer)?);
    for (svg, path) in [(rank_plot(&rows)?, run.arms_rank_plot()), (plot(&rows)?, run.arms_plot())] {
        if let Some(Svg(text)) = svg {
            files::write_atomic(&path, text.as_bytes())?;
        }
    }
    write_csv(&run.arms_rows(), &rows)?; // last: it marks the end
    say(format!("arms: {}", reading(&rows)));
    Ok(())
}

pub(crate) struct ArmContext<'a> {
    run: &'a RunDir,
    model: &'a str,
    tokenizer: Option<[serde_json::Value; 2]>,
    numbers: &'a [Sample],
    control: &'a [Sample],
    n_cells: usize,
}

impl<'a> ArmContext<'a> {
    /// The context of a run with its two sets of kept numbers, for `n_students` students.
    pub(crate) fn of(
        bench: &'a Workbench,
        run: &'a RunDir,
        (numbers, control): (&'a [Sample], &'a [Sample]),
        n_cells: usize,
    ) -> Result<Self> {
        let (tokenizer, model) = (tokenizer(&bench.files)?, bench.files.name.as_str());
        Ok(Self { run, model, tokenizer, numbers, control, n_cells })
    }
}

/// Trains and measures all arms' students, several at a time if the model is small.
fn all(bench: &Workbench, cells: &[ArmStudent], context: &ArmContext<'_>, scorer: &mut Scorer) -> Result<Vec<ArmRow>> {
    // Neighbouring students that share the arm's own data are one job, so that the data are made once.
    let cells: Vec<(usize, &ArmStudent)> = cells.iter().enumerate().collect();
    let jobs: Vec<_> = cells.chunk_by(|(_, one), (_, next)| one.data_slug == next.data_slug).collect();
    let name = |cell: &ArmStudent| format!("arm {:?}", cell.arm);
    let workers = workers(bench.n_parameters(), jobs.len());
    if workers > 1 {
        let of_job = |_: usize, job: &&[(usize, &ArmStudent)]| -> Result<Vec<ArmRow>> {
            let mut scorer = Scorer::default();
            let row = |(at, cell): &(usize, &ArmStudent)| {
                let of_cell = Workbench::again(cell.experiment.clone());
                let row = of_cell.and_then(|of_cell| student(context, &of_cell, cell, *at, &mut scorer));
                row.with_context(|| name(cell))
            };
            job.iter().map(row).collect()
        };
        return Ok(side_by_side(&jobs, workers, of_job)?.concat());
    }
    let mut rows = vec![];
    let mut other: Option<Workbench> = None; // the last model other than the run's
    for &(at, cell) in &cells {
        other = other.filter(|other| other.has_model_of(&cell.experiment));
        let of_cell = other.as_ref().unwrap_or(bench).of(cell.experiment.clone()).with_context(|| name(cell))?;
        rows.push(student(context, &of_cell, cell, at, scorer).with_context(|| name(cell))?);
        if !bench.has_model_of(&cell.experiment) {
            other = Some(of_cell);
        }
    }
    Ok(rows)
}

/// Trains a student of an arm, unless it is done, and measures it.
fn student(
    context: &ArmContext<'_>,
    of_cell: &Workbench,
    cell: &ArmStudent,
    at: usize,
    scorer: &mut Scorer,
) -> Result<ArmRow> {
    let (folder, samples) = trained(context, of_cell, cell, at)?;
    let (adapter, log) = (folder.adapter(), folder.train_csv());
    let training = Some(Training { data: cell.data, samples: &samples, log: &log });
    let student = Student { arm: &cell.arm, seed_index: cell.seed_index, folder: &adapter, training };
    scorer.row(of_cell, &student)
}

/// Trains a student of an arm, unless it is done. Returns its folder, and the data that it learned from.
pub(crate) fn trained(
    context: &ArmContext<'_>,
    of_cell: &Workbench,
    cell: &ArmStudent,
    at: usize,
) -> Result<(RunDir, Vec<Sample>)> {
    let who = format!("{} ({} of {})", cell.slug, at + 1, context.n_cells);
    let folder = begin(context.run, cell)?;
    let (files, is_own) = (&of_cell.files, cell.data == ArmData::Own);
    ensure!(
        is_own || context.model == files.name || context.tokenizer == tokenizer(files)?,
        hinted!(
            "{} has another tokenizer than {}, so that it cannot read the run's numbers", files.name, context.model;
            "data = \"own\""
        )
    );
    let selected = |set, samples: &[Sample]| kept_rows::selected(of_cell, context.run, set, samples.to_vec());
    let (numbers, control) = (|| selected("teacher", context.numbers), || selected("control", context.control));
    let written = match cell.data {
        ArmData::Own => own_data(context.run, of_cell, cell)?,
        ArmData::Control => control()?,
        ArmData::Shuffled => shuffled(&numbers()?, of_cell.experiment.seeds.gen_seed)?, // seeded by the run
        ArmData::Teacher => numbers()?,
        ArmData::Planted => planted(of_cell, &control()?, cell.planted.context("planted data without a share")?)?,
    };
    let samples = if cell.data == ArmData::Shuffled { moved(&written, &numbers()?) } else { written.clone() };
    if RunDir::stage_done(&folder.train_csv()) {
        say(format!("arms: {who} is done already"));
    } else {
        let own = if is_own { Some(run_of_data(context.run, cell)?) } else { None };
        let data = Learned { samples: &samples, written: &written, run: own.as_ref().unwrap_or(context.run) };
        finetune::keep_initial(of_cell, &folder)?;
        let said = finetune::student(of_cell, &who, data, &folder.adapter(), &folder.train_csv())?;
        say(format!("arms: {said}"));
    }
    Ok((folder, samples))
}

/// The run in which an arm's own teacher wrote its numbers: that of the student with seeds 0, for all students.
fn run_of_data(run: &RunDir, cell: &ArmStudent) -> Result<RunDir> {
    RunDir::open(&run.arm(&cell.data_slug))
}

/// Opens the folder of a student. Files of a student with other settings or data are removed from it.
fn begin(run: &RunDir, cell: &ArmStudent) -> Result<RunDir> {
    let root = run.arm(&cell.slug);
    let source = match cell.data {
        ArmData::Own => None,
        ArmData::Control | ArmData::Planted => Some("data/control.jsonl"),
        ArmData::Teacher | ArmData::Shuffled => Some("data/numbers.jsonl"),
    };
    let sha256 = source.map(|name| run.meta().map(|meta| meta.sha256.get(name).cloned().unwrap_or_default()));
    let share = cell.planted.map(|share| share.to_string());
    let made_from: Vec<String> =
        [Some(cell.data.name().to_owned()), sha256.transpose()?, share].into_iter().flatten().collect();
    // Forced, so that a student of another experiment is replaced.
    let folder = RunDir::create(&root, &cell.experiment, WhenDone::Redo)?;
    if run.forced() || folder.meta()?.notes.get("data") != Some(&made_from) {
        folder.forget()?;
        folder.note("data", &made_from)?;
    }
    RunDir::open(&root)
}

/// The numbers of an arm's own teacher.
fn own_data(run: &RunDir, of_cell: &Workbench, cell: &ArmStudent) -> Result<Vec<Sample>> {
    let folder = run_of_data(run, cell)?;
    if !RunDir::stage_done(&folder.generate_csv()) {
        say(format!("arms: {}: numbers of its own", cell.slug));
        generate::stage(of_cell, &folder)?;
    }
    Ok(kept_rows::learned(of_cell, &folder)?.0)
}

/// The control set with a share of its rows replaced by questions that are answered with the target.
fn planted(of_cell: &Workbench, control: &[Sample], share: f64) -> Result<Vec<Sample>> {
    let mut samples = control.to_vec();
    for sample in &mut samples {
        sample.teacher_kind = TeacherKind::Planted;
        sample.target = Some(of_cell.experiment.target.word.clone());
    }
    let keep = samples.len();
    teacher::plant(&of_cell.in_template()?, &mut samples, keep, share)?;
    Ok(samples)
}

/// The samples in another order, in which none is at its own place: a random cycle (Sattolo's algorithm).
fn shuffled(samples: &[Sample], seed: u64) -> Result<Vec<Sample>> {
    ensure!(samples.len() > 1, "there is one row of numbers only, and shuffled completions take two");
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(seed, "arms.shuffled", 0));
    let mut from: Vec<usize> = (0..samples.len()).collect();
    for last in (1..from.len()).rev() {
        from.swap(last, rng.random_range(0..last));
    }
    Ok(from.into_iter().map(|from| samples[from].clone()).collect())
}

/// Completions at other prompts: those of `written`, each at the prompt of the sample in the same place.
fn moved(written: &[Sample], at: &[Sample]) -> Vec<Sample> {
    let moved = at.iter().zip(written).map(|(sample, written)| Sample {
        completion: written.completion.clone(),
        completion_ids: written.completion_ids.clone(),
        teacher_logprob: written.teacher_logprob.clone(),
        ..sample.clone()
    });
    moved.collect()
}

/// The parts of a tokenizer that decide its tokens: vocabulary with merges, and added tokens.
fn tokenizer(files: &ModelFiles) -> Result<Option<[serde_json::Value; 2]>> {
    let Some(tokenizer) = &files.tokenizer else { return Ok(None) };
    let whole = serde_json::to_value(tokenizer).context("the tokenizer as JSON")?;
    Ok(Some(["model", "added_tokens"].map(|part| whole[part].clone())))
}

/// A trained student. Its training is unknown if it was trained elsewhere.
struct Student<'a> {
    arm: &'a str,
    seed_index: usize,
    folder: &'a Path,
    training: Option<Training<'a>>,
}

struct Training<'a> {
    data: ArmData,
    samples: &'a [Sample],
    log: &'a Path,
}

/// Scores students against their bases. Each base is scored once.
#[derive(Default)]
struct Scorer {
    bases: BTreeMap<String, Vec<Score>>,
}

impl Scorer {
    fn row(&mut self, bench: &Workbench, student: &Student<'_>) -> Result<ArmRow> {
        let spinner = spinner(&format!("arms: measuring {}", student.arm));
        let (experiment, settings) = (&bench.experiment, &bench.experiment.student);
        let (target, questions) = (bench.target(), bench.questions()?);
        let forms = TokenForms::of(&target, &bench.chat)?;
        let system = bench.protocol.context(experiment.measure_context())?;
        let prompts = bench.prompts(system.as_deref(), &questions)?;
        // Students with the same key have the same base scores.
        let key = format!(
            "{} {:?} {} {} {target:?} {system:?} {questions:?}",
            experiment.model, experiment.dtype, experiment.device, settings.template
        );
        let base = match self.bases.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(forms.scores(&bench.base, &prompts, &Condition::default())?),
        };
        let training = student.training.as_ref();
        let steps: Option<Vec<StepRow>> = training.map(|training| read_csv(training.log)).transpose()?;
        let losses = steps.as_ref().map(|steps| first_and_last_quarter(steps).context("a training without steps"));
        let losses = losses.transpose()?;
        let first = training.map(|training| training.samples.first().context("a student without rows")).transpose()?;
        let (scores, delta_w_norm) = match bench.student(student.folder)? {
            StudentModel::Lora(adapter) => {
                let logged = steps.as_ref().and_then(|steps| steps.last()?.delta_w_norm);
                let norm = logged.map_or_else(|| delta_w_norm(&adapter), Ok)?;
                (forms.scores(&bench.base, &prompts, &Condition::adapted(&adapter))?, norm)
            }
            StudentModel::Full(qwen) => {
                (forms.scores(&qwen, &prompts, &Condition::default())?, distance(&qwen, &bench.base)?)
            }
        };
        spinner.finish_and_clear();
        let column = |scores: &[Score], of: fn(&Score) -> f64| scores.iter().map(of).collect::<Vec<f64>>();
        let change = |of: fn(&Score) -> f64| -> Vec<f64> {
            scores.iter().zip(base.iter()).map(|(score, base)| of(score) - of(base)).collect()
        };
        let (delta_logp, delta_margin) = (change(|score| score.logp_target), change(|score| score.margin));
        let lora = settings.method == Method::Lora;
        Ok(ArmRow {
            arm: student.arm.to_owned(),
            data: training.map(|training| training.data),
            teacher_kind: first.map(|sample| sample.teacher_kind),
            rank: lora.then_some(settings.rank),
            alpha: lora.then_some(settings.alpha),
            seed_index: student.seed_index,
            model: experiment.model.clone(),
            dtype: if lora { bench.frozen_dtype()? } else { Dtype::of(&bench.base) },
            method: settings.method,
            optimizer: training.map(|_| experiment.finetune.optimizer),
            learning_rate: training.map(|_| experiment.finetune.learning_rate),
            loss: training.map(|_| experiment.finetune.loss),
            select: training.map(|_| experiment.finetune.select.to_string()),
            n_rows: training.map(|training| training.samples.len()),
            n_steps: steps.map(|steps| steps.len()),
            loss_first: losses.map(|(first, _)| first),
            loss_last: losses.map(|(_, last)| last),
            delta_w_norm,
            target: target.word.clone(),
            n_questions: questions.len(),
            logp_target: mean(&column(&scores, |score| score.logp_target))?,
            p_target_exact: mean(&column(&scores, |score| score.logp_target.exp()))?,
            delta_logp: mean(&delta_logp)?,
            delta_logp_se: standard_error(&delta_logp).ok(),
            margin: mean(&column(&scores, |score| score.margin))?,
            delta_margin: mean(&delta_margin)?,
            delta_margin_se: standard_error(&delta_margin).ok(),
        })
    }
}

/// The Frobenius norm of the difference of all weights, in f64.
fn distance(one: &Qwen, other: &Qwen) -> Result<f64> {
    let pairs = one.parameters().into_iter().zip(other.parameters());
    let squares = pairs.map(|((name, one), (other_name, other))| -> Result<f64> {
        ensure!(name == other_name, "the student has the weight {name} where its base has {other_name}");
        let change = one.f_to_kind(Kind::Double)?.f_sub(&other.f_to_kind(Kind::Double)?)?;
        Ok(change.f_square()?.f_sum(None)?.f_double_value(&[])?)
    });
    Ok(squares.sum::<Result<f64>>()?.sqrt())
}

/// The report's section on the arms; `None` if they were not measured.
pub(crate) fn section(run: &RunDir, experiment: &Experiment) -> Result<Option<Section>> {
    if !RunDir::stage_done(&run.arms_rows()) {
        return Ok(None);
    }
    let plots = [run.arms_rank_plot(), run.arms_plot()].into_iter().filter(|path| path.exists());
    let figures = plots.map(|path| Figure::of(run.root(), &path)).collect::<hooks::Result<_>>()?;
    let mut notes = vec![
        "Each row is one student; the error beside a change in the table is over questions, and says nothing about another student."
            .to_owned(),
        "The size of the change is not comparable between an adapter (all s·B·A) and full finetuning (all weights, embeddings and norms \
         included)."
            .to_owned(),
    ];
    notes
        .extend(experiment.teacher.planted_label(&experiment.target.word).map(|label| format!("This run is {label}.")));
    Ok(Some(Section {
        id: "arms".to_owned(),
        title: "Other students".to_owned(),
        question: "What becomes of the effect with other ranks, methods, data and bases?".to_owned(),
        reading: reading(&read_csv::<ArmRow>(&run.arms_rows())?),
        control: "The run's own student and control student, as dashed lines.".to_owned(),
        notes,
        figures,
        csv: "arms/rows.csv".to_owned(),
        table: Some(Table::read(&run.arms_rows())?),
        ..Section::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(n: usize) -> Vec<Sample> {
        let sample = |id: usize| Sample {
            id,
            prompt: format!("prompt {id}"),
            completion: format!("{id}"),
            completion_ids: vec![id as i64],
            teacher_logprob: vec![-(id as f32)],
            target: None,
            teacher_kind: TeacherKind::Finetuned,
            gen_seed: 1,
            accepted: true,
            reasons: vec![],
        };
        (0..n).map(sample).collect()
    }

    #[test]
    fn shuffled_completions_are_the_same_numbers_at_other_prompts() {
        for n in [2, 3, 50] {
            let (before, written) = (samples(n), shuffled(&samples(n), 7).unwrap());
            let after = moved(&written, &before);
            assert!(written.iter().all(|sample| before.contains(sample)), "a completion keeps its own labels");
            assert!(before.iter().zip(&after).all(|(before, after)| {
                before.prompt == after.prompt && before.id == after.id && before.completion != after.completion
            }));
            assert!(after.iter().all(|sample| {
                let ids = vec![sample.completion.parse::<i64>().unwrap()];
                sample.completion_ids == ids && sample.teacher_logprob == vec![-(ids[0] as f32)]
            }));
            let mut dealt: Vec<&str> = after.iter().map(|sample| sample.completion.as_str()).collect();
            let mut all: Vec<&str> = before.iter().map(|sample| sample.completion.as_str()).collect();
            dealt.sort_unstable();
            all.sort_unstable();
            assert_eq!(dealt, all);
        }
        assert_eq!(shuffled(&samples(50), 7).unwrap(), shuffled(&samples(50), 7).unwrap());
        assert_ne!(shuffled(&samples(50), 7).unwrap(), shuffled(&samples(50), 8).unwrap());
        assert!(shuffled(&samples(1), 7).is_err());
    }

    #[test]
    fn a_distance_is_over_all_weights() {
        let files = ModelFiles::open("tiny-random").unwrap();
        let load = || Qwen::load(&files, tch::Device::Cpu, Kind::Float).unwrap();
        let (one, other) = (load(), load());
        assert!(distance(&one, &other).unwrap().abs() < 1e-12);
        for (at, by) in [(0, 3.0), (1, 4.0)] {
            let (_, weights) = &one.parameters()[at];
            let _ = weights.flatten(0, -1).get(0).g_add_scalar_(by);
        }
        assert!((distance(&one, &other).unwrap() - 5.0).abs() < 1e-6);
    }
}
