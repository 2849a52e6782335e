//! The cost of a claim: how many students, and from a few steps on this machine, how long and how much memory.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use hooks::{Adapter, Condition, Sequence, generate, stream_seed};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::study::{Study, UnitStudent};
use crate::data::dataset;
use crate::experiment::{Experiment, Method};
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;
use crate::training::settings::{Finetune, OptimizerKind, TargetTokens};
use crate::training::side_by_side::workers;
use crate::training::step_log::{Progress, StepRow};
use crate::training::training_loop::finetune_lora;

/// Answers drawn to estimate the time of all; at most as many as a step has rows, since equal rows are run once.
const ANSWERS: usize = 64;

/// The table of what would be done, with its estimates.
pub(crate) fn plan(study: &Study, root: &Path) -> Result<String> {
    let units = &study.units;
    let first = &units[0].experiment;
    let bench = Workbench::open(first.clone())?;
    let students = units[0].students();
    let mut done = 0;
    for unit in units {
        let Ok(run) = RunDir::open(&root.join(&unit.name)) else { continue };
        let is_done = |student: &UnitStudent<'_>| student.files(&run).is_ok_and(|(_, log)| RunDir::stage_done(&log));
        done += unit.students().iter().filter(|student| is_done(student)).count();
    }

    let (rows, seconds_per_answer) = sampled(&bench)?;
    let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
    let per_row = tokens as f64 / rows.len() as f64;
    let rate = tokens_per_second(&bench, &rows)?;
    let threads = workers(bench.n_parameters(), units.len()) as f64;
    let rows_seen = |experiment: &Experiment| {
        let (of, n) = (&experiment.finetune, experiment.generate.n_keep as f64);
        let of_steps = |steps: u64| (steps as usize * of.rows_per_step()) as f64;
        let whole = of.max_steps.map_or(of.num_train_epochs * n, of_steps);
        let scout = if of.optimizer == OptimizerKind::Preconditioned { n } else { 0.0 };
        scout + of.stop_after_steps.map_or(whole, |steps| whole.min(of_steps(steps)))
    };
    let training: f64 = students.iter().map(|student| rows_seen(student.experiment) * per_row / rate).sum();
    let writing = (2 * (first.generate.n_keep + first.generate.n_heldout)) as f64 * seconds_per_answer;
    let all = (training + writing) * units.len() as f64 / threads;

    let mut text = format!(
        "Claim {} at {} size: {}\n\n  runs       {} ({} traits × {} data sets)\n  students   {} in each run, {} in all, of which {done} are trained already\n",
        study.claim.claim,
        study.size,
        study.claim.statement,
        units.len(),
        study.claim.targets.len(),
        study.claim.datasets,
        students.len(),
        students.len() * units.len()
    );
    write!(
        text,
        "  time       about {} from nothing, measurements not counted: {} of training a run ({rate:.0} tokens/s here) and {} of numbers, {threads} at once\n  memory     {:.1} GiB at the least: what a step and some answers took here\n\n  students of a run:\n",
        span(all),
        span(training),
        span(writing),
        peak_gib(),
    )?;
    for student in students {
        let (name, experiment) = (student.slug(), student.experiment);
        let what = match experiment.student.method {
            Method::Lora => format!("rank {}", experiment.student.rank),
            Method::Full => "all weights".to_owned(),
        };
        writeln!(text, "    {name:40} {what:12} {}", span(rows_seen(experiment) * per_row / rate))?;
    }
    Ok(text)
}

/// Rows with some answers, and the seconds that one answer takes.
fn sampled(bench: &Workbench) -> Result<(Vec<Sequence>, f64)> {
    let n = ANSWERS.min(bench.experiment.finetune.rows_per_step());
    let users = dataset::number_prompts(&bench.protocol, n, bench.experiment.seeds.gen_seed);
    let system = bench.student_system()?;
    let prompts =
        users.iter().map(|user| bench.chat.prompt(system.as_deref(), user)).collect::<hooks::Result<Vec<_>>>()?;
    let streams: Vec<u64> = (0..n).map(|at| stream_seed(0, "plan", at as u64)).collect();
    let sampling = bench.sampling()?;
    let begun = Instant::now();
    let answers = generate(&bench.base, &prompts, &Condition::default(), &sampling, &streams, &mut |_| ())?;
    let seconds_per_answer = begun.elapsed().as_secs_f64() / n as f64;
    let rows = users.iter().zip(&answers).map(|(user, answer)| bench.chat.row(system.as_deref(), user, &answer.ids));
    Ok((rows.collect::<hooks::Result<_>>()?, seconds_per_answer))
}

/// Tokens of rows that a LoRA of the experiment's shape is trained on in a second.
fn tokens_per_second(bench: &Workbench, rows: &[Sequence]) -> Result<f64> {
    let experiment = &bench.experiment;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let adapter = Adapter::init(&experiment.student.lora(), &bench.base.config, &mut rng, bench.base.device())?;
    let rows_per_step = experiment.finetune.rows_per_step();
    let many: Vec<Sequence> = rows.iter().cycle().take(rows_per_step).cloned().collect();
    let (max_steps, tokens) = (Some(2), TargetTokens::All);
    let config = Finetune { max_steps, warmup_steps: 0, tokens, ..experiment.finetune.clone() };
    let tokens: usize = many.iter().map(|row| row.ids.len()).sum();
    let (mut begun, mut last) = (Instant::now(), None);
    let log = &mut |_: &StepRow, _: &Progress| {
        last = Some(begun.elapsed().as_secs_f64()); // of the second step: the first one finds its memory
        begun = Instant::now();
        Ok(())
    };
    let is_digit = |id| bench.chat.is_digit(id);
    finetune_lora(&bench.base, &adapter, &many, &is_digit, &config, experiment.seeds.finetune(), log)?;
    Ok(tokens as f64 / last.context("no step was taken")?)
}

/// The most memory that this process has had, in GiB; 0 where the system does not say.
fn peak_gib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / f64::from(1 << 20)
}

/// A time in the largest units that say something.
pub(crate) fn span(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}
