//! The command line: its commands and options, and the function of each.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::claim::run as claim;
use crate::claim::{Size, Study};
use crate::commands::paint::Color;
use crate::commands::{activations, ask, columns, completions, export, pocket, profile, tokens};
use crate::experiment::{AnalysisName, Experiment};
use crate::output::progress::{print, say};
use crate::stages::foresight::foreseen;
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;
use crate::stages::{arms, finetune, generate, measure, report, run};

/// Train a LoRA on numbers, see which tokens carry what it learned, switch it off token by token, export the direction.
#[derive(Parser, Debug)]
#[command(name = "undertone", version, max_term_width = 110, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Where to compute: cpu, cuda or cuda:N. For an experiment it replaces the file's.
    #[arg(long, global = true)]
    device: Option<String>,
    /// The seed that all random streams derive from. For an experiment it replaces the file's.
    #[arg(long, global = true)]
    seed: Option<u64>,
    /// Overwrites what is finished.
    #[arg(long, global = true)]
    force: bool,
    /// When to use colour: auto is where stdout is a terminal and `NO_COLOR` is not set.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN", hide_possible_values = true)]
    color: Color,
    /// Says on stderr, at the end, where the time went, and which share of the machine's rate the products reached.
    #[arg(long, global = true)]
    profile: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Does all of an experiment: generate, finetune, measure, arms, report. Puts a claim to the test: its runs, and a verdict.
    #[command(after_help = "Examples:
  undertone run experiments/demo.toml
  undertone run experiments/demo.toml --run runs/rank-16 --set student.rank=16
  undertone run experiments/demo.toml --dry-run
  undertone run experiments/claims/06-at-qwen-alone.toml --size pocket
  undertone run experiments/claims/06-at-qwen-alone.toml --size small --plan")]
    Run(Run),
    /// Lets the teacher and the untouched model answer number prompts, and filters the answers.
    #[command(after_help = "Example:\n  undertone generate experiments/demo.toml --run runs/demo --force")]
    Generate(Stage),
    /// Trains the student on the teacher's numbers, and a control student on the others.
    #[command(after_help = "Example:\n  undertone finetune experiments/demo.toml --run runs/demo --force")]
    Finetune(Stage),
    /// Measures what was trained.
    #[command(after_help = "Examples:
  undertone measure runs/demo token_ablation direction --force
  undertone measure runs/demo steering --force --set measure.n_questions=8")]
    Measure(Measure),
    /// Trains the experiment's arms, which are variants of its student, and puts all students in one table.
    #[command(after_help = "Example:\n  undertone arms experiments/demo.toml --run runs/demo --force")]
    Arms(Stage),
    Export(export::Export),
    /// Writes report.html from a run's CSV files, and with --png a PNG for each SVG.
    #[command(
        after_help = "Examples:\n  undertone report runs/demo\n  undertone report runs/claims-pocket/claim-06 --png"
    )]
    Report(Folder),
    Tokens(tokens::Tokens),
    Ask(ask::Ask),
    Activations(activations::Activations),
    Columns(columns::Columns),
    Completions(completions::Completions),
    Pocket(pocket::Pocket),
}

/// An experiment or a claim.
#[derive(Args, Debug)]
struct Run {
    #[command(flatten)]
    stage: Stage,
    /// On what a claim is tried: pocket (minutes on two CPU cores; the default), small (a Qwen of 0.5B), paper (7B, CUDA).
    #[arg(long, value_enum, hide_possible_values = true)]
    size: Option<Size>,
    /// Says what a claim would take: its students, and from a few steps here time and memory. Does nothing more.
    #[arg(long)]
    plan: bool,
}

/// An experiment and its run's folder.
#[derive(Args, Debug)]
struct Stage {
    /// The experiment's TOML file.
    experiment: PathBuf,
    /// The run's folder; runs/NAME after the experiment's file when left out.
    #[arg(long)]
    run: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
}

/// Changes to an experiment.
#[derive(Args, Debug)]
struct Overrides {
    /// Sets a key of the experiment, such as student.rank=16; can be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Prints the resolved experiment and does nothing.
    #[arg(long)]
    dry_run: bool,
}

/// A run and the analyses to do.
#[derive(Args, Debug)]
struct Measure {
    /// The run's folder.
    run: PathBuf,
    /// The analyses; those of the experiment when left out.
    analyses: Vec<AnalysisName>,
    #[command(flatten)]
    overrides: Overrides,
}

/// A run.
#[derive(Args, Debug)]
struct Folder {
    /// The folder of a run, or of a claim, whose page is written already.
    run: PathBuf,
    /// Also writes each SVG of the folder as PNG, at twice its size, in a font of this machine.
    #[arg(long)]
    png: bool,
}

/// Does what the command line says.
pub fn run(cli: &Cli) -> Result<()> {
    cli.color.apply();
    if !cli.profile {
        return obey(cli);
    }
    hooks::profile::start();
    let done = obey(cli);
    let recorded = hooks::profile::finish();
    done?;
    say(profile::table(&recorded)?);
    Ok(())
}

fn obey(cli: &Cli) -> Result<()> {
    let device = cli.device.as_deref().unwrap_or("cpu");
    match &cli.command {
        Command::Run(run) if Study::is_claim(&run.stage.experiment)? => {
            let stage = &run.stage;
            let changes = overrides(cli, &stage.overrides);
            claim::run(&claim::ClaimOptions {
                path: &stage.experiment,
                size: run.size.unwrap_or(Size::Pocket),
                folder: stage.run.as_deref(),
                changes: &changes,
                dry_run: stage.overrides.dry_run,
                plan: run.plan,
                force: cli.force,
            })
        }
        Command::Run(run) => {
            let alien = [("--size", run.size.is_some()), ("--plan", run.plan)];
            if let Some((flag, _)) = alien.into_iter().find(|(_, given)| *given) {
                bail!("{flag} is for claims, and {} is an experiment of its own", run.stage.experiment.display());
            }
            with_stage(cli, &run.stage, |bench, folder| run::run(bench, folder, cli.force))
        }
        Command::Generate(stage) => with_stage(cli, stage, generate::stage),
        Command::Finetune(stage) => with_stage(cli, stage, |bench, folder| finetune::stage(bench, folder, false)),
        Command::Measure(args) => {
            let folder = RunDir::open(&args.run, cli.force)?;
            let _lock = if args.overrides.dry_run { None } else { Some(RunDir::lock(&args.run)?) };
            let experiment = folder.experiment(&overrides(cli, &args.overrides))?;
            if args.overrides.dry_run {
                return print(&experiment.to_toml()?);
            }
            let names =
                if args.analyses.is_empty() { experiment.measure.analyses.clone() } else { args.analyses.clone() };
            measure::stage(&Workbench::open(experiment)?, &folder, &names, false)
        }
        Command::Arms(stage) => with_stage(cli, stage, |bench, folder| arms::stage(bench, folder, false)),
        Command::Export(args) => export::run(args, cli.force),
        Command::Report(args) if report::is_claim(&args.run) => report::of_claim(&args.run, args.png),
        Command::Report(args) => {
            let folder = RunDir::open(&args.run, cli.force)?;
            let _lock = RunDir::lock(&args.run)?;
            report::run(&folder, args.png)
        }
        Command::Tokens(args) => tokens::run(args),
        Command::Ask(args) => ask::run(args, device, cli.seed.unwrap_or(42)),
        Command::Pocket(args) => pocket::run(args, cli.force),
        Command::Activations(args) => activations::run(args, device, cli.force),
        Command::Columns(args) => columns::run(args),
        Command::Completions(args) => completions::run(args, Cli::command()),
    }
}

fn with_stage(cli: &Cli, stage: &Stage, what: impl FnOnce(&Workbench, &RunDir) -> Result<()>) -> Result<()> {
    let experiment = Experiment::load(&stage.experiment, &overrides(cli, &stage.overrides))?;
    if stage.overrides.dry_run {
        return print(&experiment.to_toml()?);
    }
    let stem = stage.experiment.file_stem().context("the experiment has no file name")?;
    let folder = stage.run.clone().unwrap_or_else(|| Path::new("runs").join(stem));
    let _lock = RunDir::lock(&folder)?;
    let begun = folder.join("run.toml").exists();
    // The folder is proven writable before the model is loaded, which can take long.
    let folder = RunDir::create(&folder, &experiment, cli.force)?;
    let bench = Workbench::open(experiment).and_then(finetune::proven).and_then(|bench| foreseen(bench, &folder));
    let bench = bench.inspect_err(|_| {
        if !begun {
            take_back(&folder);
        }
    })?;
    folder.note("model", &[bench.files.report.as_slice(), &bench.files.remarks].concat())?;
    what(&bench, &folder)
}

/// Removes a run that could not begin, so that the corrected experiment is not refused as another one.
fn take_back(folder: &RunDir) {
    for file in [folder.config(), folder.root().join("meta.json")] {
        // The error to report is the model's.
        let _ = std::fs::remove_file(file);
    }
    let _ = std::fs::remove_dir(folder.root());
}

/// The experiment's changes on the command line, the two global ones included.
fn overrides(cli: &Cli, given: &Overrides) -> Vec<String> {
    let device = cli.device.as_ref().map(|device| format!("device={device}"));
    let seed = cli.seed.map(|seed| format!("seed={seed}"));
    device.into_iter().chain(seed).chain(given.set.iter().cloned()).collect()
}
