//! Estimates the cost of a claim: the number of students, and the time and memory, from a few steps on this machine.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use super::study::{Study, UnitStudent};
use crate::experiment::Method;
use crate::stages::plan::{Pace, span};
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;
use crate::training::side_by_side::workers;

/// The table of the students to be trained, with the estimates.
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

    let pace = Pace::here(&bench)?;
    let threads = workers(bench.n_parameters(), units.len()) as f64;
    let training: f64 = students.iter().map(|student| pace.training(student.experiment)).sum();
    let writing = pace.writing(first);
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
        "  time       about {} from nothing, measurements not counted: {} of training a run ({:.0} tokens/s here) and {} of numbers, {threads} at once\n  memory     {:.1} GiB at the least: what a step and some answers took here\n\n  students of a run:\n",
        span(all),
        span(training),
        pace.tokens_per_second,
        span(writing),
        peak_gib(),
    )?;
    for student in students {
        let (name, experiment) = (student.slug(), student.experiment);
        let what = match experiment.student.method {
            Method::Lora => format!("rank {}", experiment.student.rank),
            Method::Full => "all weights".to_owned(),
        };
        writeln!(text, "    {name:40} {what:12} {}", span(pace.training(experiment)))?;
    }
    Ok(text)
}

/// The peak memory of this process, in GiB; 0 if the system does not report it.
fn peak_gib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / f64::from(1 << 20)
}
