//! All stages of an experiment, one after another. What is finished already is kept, unless the run is forced.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use super::{finetune, generate, measure, report};
use crate::experiment::AnalysisName;
use crate::progress::say;
use crate::run_dir::RunDir;
use crate::workbench::Workbench;

/// Generates, finetunes, measures and reports.
pub fn run(bench: &Workbench, run: &RunDir, force: bool) -> Result<()> {
    if force {
        forget(run)?;
    }
    let done = |stage: &str, what: bool| {
        if what && !force {
            say(format!("{stage}: done already; --force does it again"));
        }
        what && !force
    };
    if !done("generate", RunDir::stage_done(&run.generate_csv())) {
        generate::stage(bench, run)?;
    }
    finetune::stage(bench, run, !force)?;
    measure::stage(bench, run, &bench.experiment.measure.analyses, !force)?;
    report::stage(run)
}

/// Removes what says that a stage is done, so that a forced run that is broken off is not gone on with as if it were whole,
/// and the report shows nothing that the run did not measure.
fn forget(run: &RunDir) -> Result<()> {
    let remove = |path: &Path, result: std::io::Result<()>| match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(|| path.display().to_string()),
        _ => Ok(()),
    };
    for path in [run.generate_csv(), run.train_csv(), run.control_train_csv(), run.report()] {
        remove(&path, fs::remove_file(&path))?;
    }
    for path in AnalysisName::ALL.map(|name| run.analysis(name)) {
        remove(&path, fs::remove_dir_all(&path))?;
    }
    Ok(())
}
