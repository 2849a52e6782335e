//! Runs analyses on a run.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::args::Overrides;
use crate::experiment::AnalysisName;
use crate::output::progress::print;
use crate::stages::measure;
use crate::stages::run_dir::{RunDir, WhenDone};
use crate::stages::workbench::Workbench;

/// A run, and the analyses to run on it.
#[derive(Args, Debug)]
pub struct MeasureArgs {
    /// The run's folder.
    run: PathBuf,
    /// The analyses; if left out, those of the experiment.
    analyses: Vec<AnalysisName>,
    #[command(flatten)]
    overrides: Overrides,
}

/// Measures the run's students.
pub fn run(args: &MeasureArgs) -> Result<()> {
    let folder = RunDir::open(&args.run)?.when_done(WhenDone::Refuse.or_redo(args.overrides.force.force));
    if args.overrides.dry_run {
        return print(&folder.experiment(&args.overrides.changes())?.to_toml()?);
    }
    let _lock = RunDir::lock(&args.run)?;
    let experiment = folder.experiment(&args.overrides.changes())?;
    let names = if args.analyses.is_empty() { experiment.measure.analyses.clone() } else { args.analyses.clone() };
    measure::stage(&Workbench::open(experiment)?, &folder, &names)
}
