//! Runs all stages of an experiment, or tests a claim.

use anyhow::{Result, ensure};
use clap::Args;

use super::args::ExperimentArgs;
use crate::claim::{self, Size, Study};
use crate::experiment::Experiment;
use crate::output::progress::print;
use crate::stages;
use crate::stages::finetune::proven;
use crate::stages::plan::plan;
use crate::stages::run_dir::WhenDone;
use crate::stages::workbench::Workbench;

/// An experiment or a claim.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    experiment: ExperimentArgs,
    /// The model that a claim is tested on: pocket (minutes on two CPU cores; the default), small (a Qwen of 0.5B),
    /// paper (7B, CUDA).
    #[arg(long, value_enum, hide_possible_values = true)]
    size: Option<Size>,
    /// Prints estimates from a few steps on this machine and does nothing else: time, memory and disk space of each
    /// stage, or of a claim's students.
    #[arg(long)]
    plan: bool,
}

/// Runs all stages of an experiment, or tests a claim.
pub fn run(args: &RunArgs) -> Result<()> {
    let ExperimentArgs { experiment: path, run: folder, overrides } = &args.experiment;
    if Study::is_claim(path)? {
        return claim::run::run(&claim::run::ClaimOptions {
            path,
            size: args.size.unwrap_or(Size::Pocket),
            folder: folder.as_deref(),
            changes: &overrides.changes(),
            dry_run: overrides.dry_run,
            plan: args.plan,
            force: overrides.force.force,
        });
    }
    ensure!(args.size.is_none(), "--size is for claims, and {} is an experiment of its own", path.display());
    if args.plan {
        let bench = Workbench::open(Experiment::load(path, &overrides.changes())?).and_then(proven)?;
        return print(&plan(&bench, &args.experiment.folder()?)?);
    }
    args.experiment.stage(WhenDone::Keep, stages::run::run)
}
