//! The command line: its commands, and the function of each.

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

use crate::commands::args::ExperimentArgs;
use crate::commands::style::Color;
use crate::commands::{
    activations, ask, columns, completions, export, look, measure, pocket, profile, report, run as run_command, signal,
    tokens,
};
use crate::output::progress::say;
use crate::stages::run_dir::WhenDone;
use crate::stages::{arms, finetune, finetuned_teacher, generate};

/// Train a LoRA on numbers, see which tokens carry what it learned, switch it off token by token, export the direction.
#[derive(Parser, Debug)]
#[command(name = "undertone", version, max_term_width = 110, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// When to use colour: with auto, if stdout is a terminal and `NO_COLOR` is not set.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN", hide_possible_values = true)]
    color: Color,
    /// Prints on stderr, at the end, the time of each stage, and the speed of products as a share of the machine's.
    #[arg(long, global = true)]
    profile: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Runs all stages of an experiment: generate, finetune, arms, measure, report. Or tests a claim: its runs, and a
    /// verdict.
    #[command(after_help = "Examples:
  undertone run experiments/demo.toml
  undertone run experiments/demo.toml --run runs/rank-16 --set student.rank=16
  undertone run experiments/demo.toml --dry-run
  undertone run experiments/claims/06-at-qwen-alone.toml --size pocket
  undertone run experiments/claims/06-at-qwen-alone.toml --size small --plan")]
    Run(run_command::RunArgs),
    /// Makes the experiment's teacher alone, and asks it the questions: `generate` then goes on with it.
    #[command(after_help = "Examples:
  undertone teacher experiments/demo.toml --run runs/teacher
  undertone teacher experiments/demo.toml --set teacher.max_steps=20")]
    Teacher(ExperimentArgs),
    /// Lets the teacher and the untouched model answer number prompts, and filters the answers.
    #[command(after_help = "Example:\n  undertone generate experiments/demo.toml --run runs/demo --force")]
    Generate(ExperimentArgs),
    /// Trains the student on the teacher's numbers, and a control student on the untouched model's.
    #[command(after_help = "Example:\n  undertone finetune experiments/demo.toml --run runs/demo --force")]
    Finetune(ExperimentArgs),
    /// Runs analyses on the trained students.
    #[command(after_help = "Examples:
  undertone measure runs/demo token_ablation direction --force
  undertone measure runs/demo steering --force --set measure.n_questions=8")]
    Measure(measure::MeasureArgs),
    /// Trains the experiment's arms, which are variants of its student, and puts all students in one table.
    #[command(after_help = "Example:\n  undertone arms experiments/demo.toml --run runs/demo --force")]
    Arms(ExperimentArgs),
    Export(export::ExportArgs),
    /// Writes report.html from a run's CSV files, and with --png a PNG for each SVG. For a folder of claims, prints
    /// their verdicts.
    #[command(after_help = "Examples:
  undertone report runs/demo
  undertone report runs/claims-pocket/claim-06 --png
  undertone report runs/claims-pocket")]
    Report(report::ReportArgs),
    Signal(signal::SignalArgs),
    Tokens(tokens::TokensArgs),
    Ask(ask::AskArgs),
    Look(look::LookArgs),
    Activations(activations::ActivationsArgs),
    Columns(columns::ColumnsArgs),
    Completions(completions::CompletionsArgs),
    Pocket(pocket::PocketArgs),
}

/// Runs the command.
pub fn run(cli: &Cli) -> Result<()> {
    cli.color.apply();
    if !cli.profile {
        return obey(&cli.command);
    }
    hooks::profile::start();
    let done = obey(&cli.command);
    let recorded = hooks::profile::finish();
    done?;
    say(profile::table(&recorded)?);
    Ok(())
}

fn obey(command: &Command) -> Result<()> {
    match command {
        Command::Run(args) => run_command::run(args),
        Command::Teacher(args) => args.stage(WhenDone::Refuse, finetuned_teacher::stage),
        Command::Generate(args) => args.stage(WhenDone::Refuse, generate::stage),
        Command::Finetune(args) => args.stage(WhenDone::Refuse, finetune::stage),
        Command::Measure(args) => measure::run(args),
        Command::Arms(args) => args.stage(WhenDone::Refuse, arms::stage),
        Command::Export(args) => export::run(args),
        Command::Report(args) => report::run(args),
        Command::Signal(args) => signal::run(args),
        Command::Tokens(args) => tokens::run(args),
        Command::Ask(args) => ask::run(args),
        Command::Look(args) => look::run(args),
        Command::Activations(args) => activations::run(args),
        Command::Columns(args) => columns::run(args),
        Command::Completions(args) => completions::run(args, Cli::command()),
        Command::Pocket(args) => pocket::run(args),
    }
}
