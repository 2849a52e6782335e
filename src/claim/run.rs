//! Tests a claim: trains its runs and measures their students. A run is a folder as `undertone run` makes it; the
//! claims of one size share them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use hooks::files;

use super::ask::foreseen;
use super::chosen::with_chosen;
use super::measure::{Beside, Measuring};
use super::outcome::{Measurement, OutcomeRow};
use super::study::{Size, Study, Unit};
use super::{page, plan};
use crate::output::progress::{print, say};
use crate::output::publish::{read_csv, write_csv};
use crate::stages::plan::span;
use crate::stages::run_dir::{RunDir, WhenDone};
use crate::stages::workbench::Workbench;
use crate::stages::{arms, finetune, generate, kept_rows};
use crate::training::side_by_side::{side_by_side, workers};

/// The options of a claim on the command line.
pub struct ClaimOptions<'a> {
    /// The claim's file.
    pub path: &'a Path,
    /// The size.
    pub size: Size,
    /// The folder of the runs that the claims share; runs/claims-SIZE if left out.
    pub folder: Option<&'a Path>,
    /// Changes to the size's experiment.
    pub changes: &'a [String],
    /// Whether only to print the claim.
    pub dry_run: bool,
    /// Whether only to print the estimated cost.
    pub plan: bool,
    /// Whether finished stages are done again.
    pub force: bool,
}

/// Tests the claim, or prints the resolved claim (`dry_run`) or the estimated cost (`plan`).
pub fn run(options: &ClaimOptions<'_>) -> Result<()> {
    let study = Study::load(options.path, options.size, options.changes)?;
    if options.dry_run {
        return print(&study.to_toml()?);
    }
    let root = options.folder.map_or_else(|| Path::new("runs").join(format!("claims-{}", study.size)), Path::to_owned);
    if options.plan {
        return print(&plan::plan(&study, &root)?);
    }
    let _lock = RunDir::lock(&root)?;
    let dir = ClaimDir::of(&root, &study, options.force)?;
    let outcomes = dir.outcomes(&study, options.force)?;
    let verdict = page::publish(&study, &outcomes, &root, &dir.folder)?;
    say(format!("\n{}\n", verdict.line));
    say(format!("Its figures, tests and table: {}", dir.at("report.html").display()));
    Ok(())
}

struct ClaimDir {
    root: PathBuf,
    folder: PathBuf,
}

impl ClaimDir {
    /// The claim's folder. If an earlier version of the claim measured other numbers, those measurements are removed;
    /// its students stay.
    fn of(root: &Path, study: &Study, force: bool) -> Result<Self> {
        let folder = root.join(format!("claim-{:02}", study.claim.claim));
        let dir = Self { root: root.to_owned(), folder };
        let (path, claim) = (dir.at("claim.toml"), study.to_toml()?);
        let known = if path.exists() { Some(files::read_string(&path)?) } else { None };
        let is_alike = |known: &String| toml::from_str(known).is_ok_and(|known| study.claim.measures_alike(&known));
        if known.is_some_and(|known| force || !is_alike(&known)) {
            if !force {
                say("claim: the claim asks for other numbers than before: its students stay, and are measured anew");
            }
            std::fs::remove_dir_all(&dir.folder).with_context(|| dir.folder.display().to_string())?;
        }
        files::create_dir(&dir.at("units"))?;
        files::write_atomic(&path, claim.as_bytes())?;
        Ok(dir)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The measurements of all students: for each run, read from disk or made now. All students are trained before any
    /// is measured, since some are compared with another run's.
    fn outcomes(&self, study: &Study, force: bool) -> Result<Vec<OutcomeRow>> {
        let first = Workbench::open(study.units[0].experiment.clone())?;
        foreseen(study, &study.units[0], &first)?;
        of_all(study, &first, "trained", &|bench, unit| self.train(unit, bench, force))?;
        let tables = of_all(study, &first, "measured", &|bench, unit| self.measured(study, unit, bench))?;
        with_chosen(&study.claim, tables.concat())
    }

    /// Removes all claims' measurements of a run whose students will be replaced.
    fn forget_unit(&self, name: &str) -> Result<()> {
        let claims = std::fs::read_dir(&self.root).with_context(|| self.root.display().to_string())?;
        for claim in claims.flatten() {
            files::remove(&claim.path().join("units").join(format!("{name}.csv")))?;
        }
        Ok(())
    }

    /// Generates a run's numbers and trains its students, unless its measurements exist already.
    fn train(&self, unit: &Unit, bench: &Workbench, force: bool) -> Result<()> {
        let root = self.root.join(&unit.name);
        let _lock = RunDir::lock(&root)?;
        let run = RunDir::create(&root, &unit.experiment, WhenDone::Keep.or_redo(force))?;
        if force {
            self.forget_unit(&unit.name)?;
        } else if self.table(unit).exists() {
            return Ok(());
        }
        if force || !RunDir::stage_done(&run.generate_csv()) {
            generate::stage(bench, &run)?;
        }
        finetune::stage(bench, &run)?;
        let (numbers, control) = kept_rows::kept(bench, &run)?;
        let shelf = arms::ArmContext::of(bench, &run, (&numbers, &control), unit.arms.len())?;
        for (at, arm) in unit.arms.iter().enumerate() {
            let train = || arms::trained(&shelf, &bench.of(arm.experiment.clone())?, arm, at);
            train().with_context(|| format!("student {:?}", arm.arm))?;
        }
        Ok(())
    }

    fn measured(&self, study: &Study, unit: &Unit, bench: &Workbench) -> Result<Vec<OutcomeRow>> {
        let table = self.table(unit);
        if table.exists() {
            return read_csv(&table);
        }
        let root = self.root.join(&unit.name);
        let _lock = RunDir::lock(&root)?;
        let run = RunDir::open(&root)?;
        let heldout = kept_rows::held_out(bench, &run)?;
        let mut beside = Beside::default();
        if [Measurement::Steering, Measurement::Replacement].iter().any(|what| study.claim.measures.contains(what)) {
            beside.control = Some(bench.student(&run.control_adapter())?);
            let other = study.other_trait(unit).map(|other| RunDir::open(&self.root.join(&other.name)));
            beside.other_trait = other.transpose()?.map(|other| bench.student(&other.adapter())).transpose()?;
        }
        let mut measuring = Measuring::of(study, unit, &run, &heldout, beside);
        let mut rows = measuring.references(bench)?;
        let students = unit.students();
        for (at, student) in students.iter().enumerate() {
            let begun = Instant::now();
            rows.extend(match student.arm {
                None => measuring.student(bench, student).with_context(|| student.name.to_owned()),
                Some(arm) => (bench.of(arm.experiment.clone()))
                    .and_then(|bench| measuring.student(&bench, student))
                    .with_context(|| format!("student {:?}", arm.arm)),
            }?);
            let seconds = begun.elapsed().as_secs_f64();
            if seconds > SLOW {
                let (unit, name, took) = (&unit.name, student.slug(), span(seconds));
                say(format!("measure: {unit}: {name} ({} of {}) in {took}", at + 1, students.len()));
            }
        }
        write_csv(&table, &rows)?;
        Ok(rows)
    }

    fn table(&self, unit: &Unit) -> PathBuf {
        self.at("units").join(format!("{}.csv", unit.name))
    }
}

/// Seconds after which the measurement of a student is reported in a line.
const SLOW: f64 = 10.0;

/// Does something with every run: several at once if the model is small.
fn of_all<T: Send>(
    study: &Study,
    first: &Workbench,
    what: &str,
    done_with: &(dyn Fn(&Workbench, &Unit) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    let units = &study.units;
    let (workers, begun) = (workers(first.n_parameters(), units.len()), Instant::now());
    let done = AtomicUsize::new(0);
    let one = |bench: &Workbench, unit: &Unit| -> Result<T> {
        let result = done_with(bench, unit).with_context(|| format!("run {}", unit.name))?;
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        let left = begun.elapsed().as_secs_f64() / done as f64 * (units.len() - done) as f64;
        let (n, all, left) = (study.claim.claim, units.len(), span(left));
        say(format!("claim {n}: {done} of {all} runs are {what}, about {left} left"));
        Ok(result)
    };
    if workers > 1 {
        side_by_side(units, workers, |_, unit| one(&Workbench::again(unit.experiment.clone())?, unit))
    } else {
        units.iter().map(|unit| one(&first.of(unit.experiment.clone())?, unit)).collect()
    }
}
