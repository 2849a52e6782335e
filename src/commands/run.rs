//! All of an experiment, or the test of a claim.

use anyhow::{Result, ensure};
use clap::Args;

use super::args::ExperimentArgs;
use crate::claim::{self, Size, Study};
use crate::stages;
use crate::stages::run_dir::WhenDone;

/// An experiment or a claim.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    experiment: ExperimentArgs,
    /// On what a claim is tried: pocket (minutes on two CPU cores; the default), small (a Qwen of 0.5B), paper (7B,
    /// CUDA).
    #[arg(long, value_enum, hide_possible_values = true)]
    size: Option<Size>,
    /// Says what a claim would take: its students, and from a few steps here time and memory. Does nothing more.
    #[arg(long)]
    plan: bool,
}

/// Does all stages of an experiment, or tests a claim.
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
    for (flag, given) in [("--size", args.size.is_some()), ("--plan", args.plan)] {
        ensure!(!given, "{flag} is for claims, and {} is an experiment of its own", path.display());
    }
    args.experiment.stage(WhenDone::Keep, stages::run::run)
}
