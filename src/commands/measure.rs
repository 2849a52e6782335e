//! Runs analyses on a run.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;

use super::args::Overrides;
use crate::experiment::{AnalysisName, Experiment};
use crate::hinted;
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
    refuse_another_training(&folder.experiment(&[])?, &experiment, &args.run)?;
    let names = if args.analyses.is_empty() { experiment.measure.analyses.clone() } else { args.analyses.clone() };
    measure::stage(&Workbench::open(experiment)?, &folder, &names)
}

/// Refuses changes of what was made already: the measurements would be those of the run's students all the same.
fn refuse_another_training(made: &Experiment, asked: &Experiment, run: &Path) -> Result<()> {
    let parts = [
        ("model", made.model != asked.model),
        ("teacher", made.teacher != asked.teacher),
        ("generate", made.generate != asked.generate),
        ("student", made.student != asked.student),
        ("finetune", made.finetune != asked.finetune),
    ];
    if let Some((part, _)) = parts.iter().find(|(_, is_changed)| *is_changed) {
        bail!(hinted!(
            "--set changes {part}, but the students of {} are made already, and measure only measures them", run.display();
            "undertone run, with another folder"
        ));
    }
    Ok(())
}
