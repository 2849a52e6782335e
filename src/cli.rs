//! The command line: what can be said, and which function does it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::commands::{activations, ask, export, finetune, generate, measure, report, run, tokens};
use crate::experiment::{AnalysisName, Experiment};
use crate::run_dir::RunDir;
use crate::workbench::Workbench;

/// Train a LoRA on numbers, see which tokens carry what it learned, switch it off token by token, export the direction.
#[derive(Parser, Debug)]
#[command(name = "undertone", version, max_term_width = 110, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Where to compute: cpu, cuda or cuda:N. For an experiment it stands in for the file's.
    #[arg(long, global = true)]
    device: Option<String>,
    /// The seed that all random streams derive from. For an experiment it stands in for the file's.
    #[arg(long, global = true)]
    seed: Option<u64>,
    /// Overwrites what is finished.
    #[arg(long, global = true)]
    force: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Does all of an experiment: generate, finetune, measure, report.
    #[command(after_help = "Example:\n  undertone run experiments/demo.toml")]
    Run(Stage),
    /// Lets the teacher and the untouched model answer number prompts, and filters the answers.
    Generate(Stage),
    /// Trains the student on the teacher's numbers, and a control student on the others.
    Finetune(Stage),
    /// Measures what was trained.
    #[command(after_help = "Example:\n  undertone measure runs/demo token_ablation direction --force")]
    Measure(Measure),
    Export(export::Export),
    /// Writes report.html from a run's CSV files.
    Report(Folder),
    Tokens(tokens::Tokens),
    Ask(ask::Ask),
    Activations(activations::Activations),
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
    /// The run's folder.
    run: PathBuf,
}

/// Does what the command line says.
pub fn run(cli: &Cli) -> Result<()> {
    let device = cli.device.as_deref().unwrap_or("cpu");
    match &cli.command {
        Command::Run(stage) => with_stage(cli, stage, |bench, folder| run::run(bench, folder, cli.force)),
        Command::Generate(stage) => with_stage(cli, stage, generate::stage),
        Command::Finetune(stage) => with_stage(cli, stage, |bench, folder| finetune::stage(bench, folder, false)),
        Command::Measure(args) => {
            let folder = RunDir::open(&args.run, cli.force)?;
            let experiment = folder.experiment(&overrides(cli, &args.overrides))?;
            if args.overrides.dry_run {
                return crate::commands::print(&experiment.to_toml()?);
            }
            let names =
                if args.analyses.is_empty() { experiment.measure.analyses.clone() } else { args.analyses.clone() };
            measure::stage(&Workbench::open(experiment)?, &folder, &names, false)
        }
        Command::Export(args) => export::run(args, cli.force),
        Command::Report(args) => report::stage(&RunDir::open(&args.run, cli.force)?),
        Command::Tokens(args) => tokens::run(args),
        Command::Ask(args) => ask::run(args, device, cli.seed.unwrap_or(42)),
        Command::Activations(args) => activations::run(args, device, cli.force),
    }
}

fn with_stage(cli: &Cli, stage: &Stage, what: impl FnOnce(&Workbench, &RunDir) -> Result<()>) -> Result<()> {
    let experiment = Experiment::load(&stage.experiment, &overrides(cli, &stage.overrides))?;
    if stage.overrides.dry_run {
        return crate::commands::print(&experiment.to_toml()?);
    }
    let stem = stage.experiment.file_stem().context("the experiment has no file name")?;
    let folder = stage.run.clone().unwrap_or_else(|| Path::new("runs").join(stem));
    let begun = folder.join("run.toml").exists();
    // The folder is proven writable before the model is loaded, which can take long.
    let folder = RunDir::create(&folder, &experiment, cli.force)?;
    let bench = Workbench::open(experiment).inspect_err(|_| {
        if !begun {
            take_back(&folder);
        }
    })?;
    folder.note("model", &bench.files.report)?;
    what(&bench, &folder)
}

/// Removes a run that could not begin, so that the corrected experiment is not refused as another one.
fn take_back(folder: &RunDir) {
    for file in [folder.config(), folder.root().join("meta.json")] {
        // The error to tell is that of the model.
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
