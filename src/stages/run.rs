//! Runs all stages of an experiment, one after another. Finished stages are kept, unless the run is forced.

use anyhow::Result;

use super::{arms, finetune, generate, measure, report};
use crate::output::progress::say;
use crate::stages::run_dir::RunDir;
use crate::stages::summary::summary;
use crate::stages::workbench::Workbench;

/// Generates, finetunes, trains the arms if there are any, measures, and reports.
pub fn run(bench: &Workbench, run: &RunDir) -> Result<()> {
    let run = &run.for_whole_run()?;
    if RunDir::stage_done(&run.generate_csv()) {
        say("generate: done already; --force does it again");
    } else {
        generate::stage(bench, run)?;
    }
    finetune::stage(bench, run)?;
    if !bench.experiment.arms.is_empty() {
        arms::stage(bench, run)?; // before the analyses, which may read an arm's student
    }
    measure::stage(bench, run, &bench.experiment.measure.analyses)?;
    report::stage(run)?;
    let lines = summary(run, &bench.experiment)?;
    if !lines.is_empty() {
        say(format!("\n{}\n", lines.join("\n")));
    }
    say(format!("Everything, with its controls and tables: {}", run.report().display()));
    Ok(())
}
