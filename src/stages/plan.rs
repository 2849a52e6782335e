//! Estimates the time, memory and disk space of each stage of an experiment, from a few answers and steps on this
//! machine.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use hooks::{Adapter, Condition, Sequence, generate, stream_seed};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::data::dataset;
use crate::experiment::{Experiment, Method};
use crate::stages::foresight::{student_need, teacher_need};
use crate::stages::memory::{Free, Need, size};
use crate::stages::workbench::Workbench;
use crate::training::settings::{Finetune, OptimizerKind, TargetTokens};
use crate::training::side_by_side::workers;
use crate::training::step_log::{Progress, StepRow};
use crate::training::training_loop::finetune_lora;

/// The number of answers drawn to estimate the time of all; at most as many as a step has rows, since equal rows are
/// run once.
const ANSWERS: usize = 64;
/// The time of a step of full finetuning over that of a LoRA: three products for each weight instead of two.
const FULL: f64 = 1.5;

/// The measured speed of this machine on an experiment.
pub(crate) struct Pace {
    pub(crate) tokens_per_second: f64,
    tokens_per_row: f64,
    seconds_per_answer: f64,
}

impl Pace {
    /// Draws some answers and trains an adapter for two steps.
    pub(crate) fn here(bench: &Workbench) -> Result<Self> {
        let (rows, seconds_per_answer) = sampled(bench)?;
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let tokens_per_second = tokens_per_second(bench, &rows)?;
        Ok(Self { tokens_per_second, tokens_per_row: tokens as f64 / rows.len() as f64, seconds_per_answer })
    }

    /// The seconds that the teacher and the untouched model need to write their numbers.
    pub(crate) fn writing(&self, experiment: &Experiment) -> f64 {
        let of = &experiment.generate;
        if of.numbers.is_some() { 0.0 } else { (2 * (of.n_keep + of.n_heldout)) as f64 * self.seconds_per_answer }
    }

    /// The seconds that the training of a student needs.
    pub(crate) fn training(&self, experiment: &Experiment) -> f64 {
        let seconds = rows_seen(experiment) * self.tokens_per_row / self.tokens_per_second;
        if experiment.student.method == Method::Full { FULL * seconds } else { seconds }
    }
}

/// Number of rows in all steps of a student, including the training that finds its scales, if there is one.
fn rows_seen(experiment: &Experiment) -> f64 {
    let of = &experiment.finetune;
    let n = of.select.n_rows(experiment.generate.n_keep) as f64;
    let of_steps = |steps: u64| (steps as usize * of.rows_per_step()) as f64;
    let whole = of.max_steps.map_or(of.num_train_epochs * n, of_steps);
    let scout = if of.optimizer == OptimizerKind::Preconditioned { n } else { 0.0 };
    scout + of.stop_after_steps.map_or(whole, |steps| whole.min(of_steps(steps)))
}

/// The table of an experiment's stages: time, memory and disk space of each, and the free memory and disk space.
pub fn plan(bench: &Workbench, folder: &Path) -> Result<String> {
    let experiment = &bench.experiment;
    let pace = Pace::here(bench)?;
    let mut stages: Vec<(String, f64, Option<Need>)> = vec![];
    if let Some(teacher) = experiment.teacher.finetuned() {
        let need = teacher_need(bench, teacher)?;
        let settings = teacher.finetune(bench.n_parameters());
        let rows = settings.max_steps.unwrap_or(0) as f64 * settings.rows_per_step() as f64;
        let of_method = if teacher.lora().is_some() { 1.0 } else { FULL };
        let seconds = of_method * rows * pace.tokens_per_row / pace.tokens_per_second;
        stages.push(("generate: the teacher's finetuning".to_owned(), seconds, Some(need)));
    }
    stages.push(("generate: numbers".to_owned(), pace.writing(experiment), None));
    let users = dataset::number_prompts(&bench.protocol, ANSWERS, experiment.seeds.gen_seed);
    if experiment.student.adapter.is_none() {
        let (name, n) = if experiment.student.control { ("student and control", 2.0) } else { ("student", 1.0) };
        let [_, need] = student_need(bench, &users)?;
        stages.push((format!("finetune: {name}"), n * pace.training(experiment), Some(need)));
    }
    for cell in experiment.cells()? {
        let need = if bench.has_model_of(&cell.experiment) {
            let [_, need] = student_need(&bench.of(cell.experiment.clone())?, &users)?;
            Some(need)
        } else {
            None // its model is loaded with the arm
        };
        stages.push((format!("arms: {}", cell.slug), pace.training(&cell.experiment), need));
    }
    let threads = workers(bench.n_parameters(), stages.len()) as f64;
    let mut text = format!("  {:48}{:>14}{:>12}{:>12}\n", "stage", "time", "memory", "disk");
    for (name, seconds, need) in &stages {
        let [memory, disk] = need.map_or([const { String::new() }; 2], |need| [size(need.memory()), size(need.disk)]);
        writeln!(text, "  {name:48}{:>14}{memory:>12}{disk:>12}", span(*seconds))?;
    }
    let all = stages.iter().map(|(_, seconds, _)| seconds).sum::<f64>() / threads;
    let free = Free::here(folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder), bench.base.device());
    let known = |bytes: f64| if bytes.is_finite() { size(bytes) } else { "unknown".to_owned() };
    writeln!(
        text,
        "  {:48}{:>14}{:>12}{:>12}",
        "all; and what is free",
        span(all),
        known(free.memory),
        known(free.disk)
    )?;
    writeln!(
        text,
        "\nEstimated from {:.0} tokens/s in training and {:.2} s for an answer, measured here, with {threads} at once; measurements are not \
         counted. Memory comes on top of the base's weights, with the longest answers.",
        pace.tokens_per_second, pace.seconds_per_answer
    )?;
    Ok(text)
}

/// Draws some answers. Returns their rows, and the seconds per answer.
fn sampled(bench: &Workbench) -> Result<(Vec<Sequence>, f64)> {
    let n = ANSWERS.min(bench.experiment.finetune.batch_size);
    let users = dataset::number_prompts(&bench.protocol, n, bench.experiment.seeds.gen_seed);
    let system = bench.student_system()?;
    let prompts =
        users.iter().map(|user| bench.chat.prompt(system.as_deref(), user)).collect::<hooks::Result<Vec<_>>>()?;
    let streams: Vec<u64> = (0..n).map(|at| stream_seed(0, "plan", at as u64)).collect();
    let sampling = bench.sampling()?;
    let begun = Instant::now();
    let answers = generate(bench.frozen()?, &prompts, &Condition::default(), &sampling, &streams, &mut |_| ())?;
    let seconds_per_answer = begun.elapsed().as_secs_f64() / n as f64;
    let rows = users.iter().zip(&answers).map(|(user, answer)| bench.chat.row(system.as_deref(), user, &answer.ids));
    Ok((rows.collect::<hooks::Result<_>>()?, seconds_per_answer))
}

/// Number of tokens per second in training a LoRA of the experiment's shape.
fn tokens_per_second(bench: &Workbench, rows: &[Sequence]) -> Result<f64> {
    let experiment = &bench.experiment;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let adapter = Adapter::init(&experiment.student.lora(), &bench.base.config, &mut rng, bench.base.device())?;
    let many: Vec<Sequence> = rows.iter().cycle().take(experiment.finetune.batch_size).cloned().collect();
    let config = Finetune {
        max_steps: Some(2),
        warmup_steps: 0,
        gradient_accumulation_steps: 1, // a step of one micro-batch is enough to know the rate
        tokens: TargetTokens::All,
        weights: None,
        ..experiment.finetune.clone()
    };
    let tokens: usize = many.iter().map(|row| row.ids.len()).sum();
    let (mut begun, mut last) = (Instant::now(), None);
    let log = &mut |_: &StepRow, _: &Progress| {
        last = Some(begun.elapsed().as_secs_f64()); // of the second step: the first one allocates its memory
        begun = Instant::now();
        Ok(())
    };
    let is_digit = |id| bench.chat.is_digit(id);
    finetune_lora(bench.frozen()?, &adapter, &many, &is_digit, &config, experiment.seeds.finetune(), log)?;
    Ok(tokens as f64 / last.context("no step was taken")?)
}

/// A time as text, in the largest suitable units.
pub(crate) fn span(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}
