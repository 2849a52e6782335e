//! Tests a claim: its runs, each a folder as `undertone run` makes it, which the claims of one size share; the
//! measurements of their students; and from that table alone the tests, the verdict, the figures and the page.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use hooks::{Adapter, ModelFiles, files};
use serde::Serialize;
use tch::Device;

use crate::claim::measure::{Beside, Measuring, Who};
use crate::claim::plan;
use crate::claim::tables::{self, SpectrumRow};
use crate::claim::{
    ALL, Measures, OutcomeRow, Size, Study, TestRow, Unit, Verdict, spectrum_figure, tests, with_chosen,
};
use crate::experiment::{CONTROL_STUDENT, STUDENT};
use crate::output::html::{Figure, Number, Opening, Report, Section, html};
use crate::output::progress::{print, say};
use crate::output::publish::{Table, read_csv, write_csv};
use crate::stages::run_dir::{RunDir, WhenDone};
use crate::stages::workbench::Workbench;
use crate::stages::{arms, finetune, generate, report};
use crate::training::side_by_side::{side_by_side, workers};

/// The options of a claim on the command line.
pub struct Asked<'a> {
    /// The claim's file.
    pub path: &'a Path,
    /// The size.
    pub size: Size,
    /// The folder of the runs that the claims share; runs/claims-SIZE when it is left out.
    pub folder: Option<&'a Path>,
    /// Changes of the size's experiment.
    pub changes: &'a [String],
    /// Whether to print the claim and do nothing.
    pub dry_run: bool,
    /// Whether to say what it would take and do nothing more.
    pub plan: bool,
    /// Whether what is finished is done again.
    pub force: bool,
}

/// Does what is asked.
pub fn run(asked: &Asked<'_>) -> Result<()> {
    let study = Study::load(asked.path, asked.size, asked.changes)?;
    if asked.dry_run {
        return print(&study.to_toml()?);
    }
    let root = asked.folder.map_or_else(|| Path::new("runs").join(format!("claims-{}", study.size)), Path::to_owned);
    if asked.plan {
        return print(&plan::plan(&study, &root)?);
    }
    let _lock = RunDir::lock(&root)?;
    let place = Place::of(&root, &study, asked.force)?;
    let outcomes = place.outcomes(&study, asked.force)?;
    let verdict = place.publish(&study, &outcomes)?;
    say(format!("\n{}\n", verdict.line));
    say(format!("Its figures, tests and table: {}", place.at("report.html").display()));
    Ok(())
}

/// The folders of a claim.
struct Place {
    root: PathBuf,
    folder: PathBuf,
}

impl Place {
    /// The claim's folder. If an earlier version of the claim asked for other numbers, its measurements are removed;
    /// its students stay.
    fn of(root: &Path, study: &Study, force: bool) -> Result<Self> {
        let folder = root.join(format!("claim-{:02}", study.claim.claim));
        let place = Self { root: root.to_owned(), folder };
        let (path, claim) = (place.at("claim.toml"), study.to_toml()?);
        let known = if path.exists() { Some(files::read_string(&path)?) } else { None };
        let is_alike = |known: &String| toml::from_str(known).is_ok_and(|known| study.claim.measures_alike(&known));
        if known.is_some_and(|known| force || !is_alike(&known)) {
            if !force {
                say("claim: the claim asks for other numbers than before: its students stay, and are measured anew");
            }
            std::fs::remove_dir_all(&place.folder).with_context(|| place.folder.display().to_string())?;
        }
        files::create_dir(&place.at("units"))?;
        files::write_atomic(&path, claim.as_bytes())?;
        Ok(place)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The measurements of all students, of each run from disk or made now. All students are trained before any is
    /// measured, since some are compared with another run's.
    fn outcomes(&self, study: &Study, force: bool) -> Result<Vec<OutcomeRow>> {
        let units = study.units()?;
        let first = Workbench::open(units[0].experiment.clone())?;
        crate::claim::measure::foreseen(study, &units[0], &first)?;
        of_all(study, &first, &units, "trained", &|bench, unit| self.train(unit, bench, force))?;
        let tables = of_all(study, &first, &units, "measured", &|bench, unit| {
            let next = study.other_trait(unit)?;
            self.measured(study, unit, bench, next.as_ref())
        })?;
        with_chosen(&study.claim, tables.concat())
    }

    /// Removes what any claim measured on a run whose students are to be replaced.
    fn forget_unit(&self, name: &str) -> Result<()> {
        let claims = std::fs::read_dir(&self.root).with_context(|| self.root.display().to_string())?;
        for claim in claims.flatten() {
            files::remove(&claim.path().join("units").join(format!("{name}.csv")))?;
        }
        Ok(())
    }

    /// One run's numbers and students, if its measurements are still to come.
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
        let (numbers, control) = bench.kept(&run)?;
        let cells = unit.experiment.cells()?;
        let shelf = arms::ArmContext::of(bench, &run, (&numbers, &control), cells.len())?;
        for (at, cell) in cells.iter().enumerate() {
            let train = || arms::trained(&shelf, &bench.of(cell.experiment.clone())?, cell, at);
            train().with_context(|| format!("student {:?}", cell.arm))?;
        }
        Ok(())
    }

    /// The measurements of each student of a run; `next` is another trait's run.
    fn measured(&self, study: &Study, unit: &Unit, bench: &Workbench, next: Option<&Unit>) -> Result<Vec<OutcomeRow>> {
        let table = self.table(unit);
        if table.exists() {
            return read_csv(&table);
        }
        let root = self.root.join(&unit.name);
        let _lock = RunDir::lock(&root)?;
        let run = RunDir::open(&root)?;
        let heldout = bench.held_out(&run)?;
        let mut beside = Beside::default();
        if [Measures::Steering, Measures::Replacement].iter().any(|what| study.claim.measures.contains(what)) {
            beside.control = Some(bench.student(&run.control_adapter())?);
            let other = next.map(|next| RunDir::open(&self.root.join(&next.name))).transpose()?;
            beside.other_trait = other.map(|other| bench.student(&other.adapter())).transpose()?;
        }
        let mut measuring = Measuring::of(study, unit, &run, &heldout, beside);
        let mut rows = measuring.references(bench)?;
        let own = [
            (STUDENT, run.adapter(), run.train_csv()),
            (CONTROL_STUDENT, run.control_adapter(), run.control_train_csv()),
        ];
        let cells = unit.experiment.cells()?;
        let n_students = own.len() + cells.len();
        let mut keep = |of_student: Vec<OutcomeRow>, name: &str, at: usize, begun: Instant| {
            rows.extend(of_student);
            let seconds = begun.elapsed().as_secs_f64();
            if seconds > SLOW {
                let (unit, took) = (&unit.name, plan::span(seconds));
                say(format!("measure: {unit}: {name} ({at} of {n_students}) in {took}"));
            }
        };
        for (at, (name, folder, log)) in own.into_iter().enumerate() {
            let begun = Instant::now();
            let who = Who { name, rank: unit.experiment.student.adapter_rank(), seed_index: 0, run: &run };
            let found = measuring.student(bench, &who, &folder, &log).with_context(|| name.to_owned())?;
            keep(found, name, at + 1, begun);
        }
        for (at, cell) in cells.iter().enumerate() {
            let begun = Instant::now();
            let mut of_cell = || -> Result<Vec<OutcomeRow>> {
                let (of_cell, folder) = (bench.of(cell.experiment.clone())?, RunDir::open(&run.arm(&cell.slug))?);
                let who = Who { name: &cell.arm, rank: cell.rank(), seed_index: cell.seed_index, run: &run };
                measuring.student(&of_cell, &who, &folder.adapter(), &folder.train_csv())
            };
            let found = of_cell().with_context(|| format!("student {:?}", cell.arm))?;
            keep(found, &cell.slug, at + 3, begun);
        }
        write_csv(&table, &rows)?;
        Ok(rows)
    }

    /// The file of a run's measurements.
    fn table(&self, unit: &Unit) -> PathBuf {
        self.at("units").join(format!("{}.csv", unit.name))
    }

    /// The table, and what follows from it.
    fn publish(&self, study: &Study, outcomes: &[OutcomeRow]) -> Result<Verdict> {
        write_csv(&self.at("outcomes.csv"), outcomes)?;
        let rows = tests(&study.claim, outcomes)?;
        write_csv(&self.at("tests.csv"), &rows)?;
        let verdict = Verdict::of(&study.claim, study.size, &rows);
        let runs = tables::runs(study)?;
        write_csv(&self.at("runs.csv"), &runs)?;
        self.write_some("matrix.csv", &tables::matrix(outcomes))?;
        self.write_some("context.csv", &tables::contexts(&study.cells(), &runs, outcomes))?;
        self.write_some("digit_conf.csv", &tables::digit_conf(outcomes))?;
        self.write_some("steer.csv", &tables::steer(outcomes))?;
        let mut spectra = vec![];
        if study.claim.measures.contains(&Measures::Spectrum) {
            spectra = self.spectra(study)?;
            write_csv(&self.at("spectrum.csv"), &spectra)?;
        }
        let mut figures = vec![];
        for (at, figure) in study.claim.figures.iter().enumerate() {
            let name = format!("figure-{}.svg", at + 1);
            let svg = figure.draw(&study.claim, outcomes)?;
            files::write_atomic(&self.at(&name), svg.0.as_bytes())?;
            let reading = figure.reading(&study.claim, outcomes)?;
            figures.push((Figure { svg, path: name }, reading));
        }
        let mut page = self.page(study, &rows, &verdict, figures)?;
        if let Some((svg, reading)) = spectrum_figure(&spectra)? {
            let name = "spectrum.svg".to_owned();
            files::write_atomic(&self.at(&name), svg.0.as_bytes())?;
            page.sections.push(Section {
                id: "spectrum".to_owned(),
                title: "The adapters' spectra".to_owned(),
                question: "How many directions is what an adapter adds to a weight?".to_owned(),
                reading,
                figures: vec![Figure { svg, path: name }],
                csv: "spectrum.csv".to_owned(),
                ..Section::default()
            });
        }
        files::write_atomic(&self.at("report.html"), html(&page).as_bytes())?;
        files::write_atomic(&self.at("verdict.txt"), format!("{}\n", verdict.line).as_bytes())?; // last: where it is, all is
        Ok(verdict)
    }

    /// Writes a table that not every claim has lines of.
    fn write_some<R: Serialize>(&self, name: &str, rows: &[R]) -> Result<()> {
        if rows.is_empty() { Ok(files::remove(&self.at(name))?) } else { write_csv(&self.at(name), rows) }
    }

    /// The singular values of every adapter whose spectrum is measured.
    fn spectra(&self, study: &Study) -> Result<Vec<SpectrumRow>> {
        let (units, mut rows) = (study.units()?, vec![]);
        let config = ModelFiles::open(&units[0].experiment.model)?.config;
        for unit in units {
            let run = RunDir::open(&self.root.join(&unit.name))?;
            let rank = unit.experiment.student.adapter_rank();
            let mut adapters = vec![
                (STUDENT.to_owned(), rank, 0, run.adapter()),
                (CONTROL_STUDENT.to_owned(), rank, 0, run.control_adapter()),
            ];
            for cell in unit.experiment.cells()? {
                let folder = RunDir::open(&run.arm(&cell.slug))?.adapter();
                adapters.push((cell.arm.clone(), cell.rank(), cell.seed_index, folder));
            }
            let is_measured = |student: &str| study.claim.measures(Measures::Spectrum, student);
            adapters.retain(|(student, rank, ..)| rank.is_some() && is_measured(student));
            for (student, rank, seed_index, folder) in adapters {
                let adapter = Adapter::load(&folder, &config, Device::Cpu)?;
                let of_student = tables::SpectrumOf { unit: &unit, student: &student, rank, seed_index };
                rows.extend(tables::spectrum(&of_student, &adapter.spectra()?));
            }
        }
        Ok(rows)
    }

    fn page(
        &self,
        study: &Study,
        rows: &[TestRow],
        verdict: &Verdict,
        figures: Vec<(Figure, String)>,
    ) -> Result<Report> {
        let claim = &study.claim;
        let experiment = &study.units()?[0].experiment;
        let words: Vec<&str> = claim.targets.iter().map(|target| target.word.as_str()).collect();
        let by_trait = rows.iter().filter(|row| row.target != ALL).count();
        let tests = Section {
            id: "tests".to_owned(),
            title: "The tests".to_owned(),
            question: "Which numbers decide, and what was expected of them?".to_owned(),
            reading: verdict.line.clone(),
            control: claim.decisive_control.clone(),
            notes: vec![
                "The unit is the trained run; data sets are clusters, and intervals are over the data sets' means (Student's t; Fieller's for \
                 recovered fractions). Answers to questions are never counted as trials."
                    .to_owned(),
                format!("{by_trait} lines are of single traits; their p is adjusted by Holm, and they decide nothing."),
            ],
            csv: "tests.csv".to_owned(),
            table: Some(Table::read(&self.at("tests.csv"))?),
            ..Section::default()
        };
        let mut figures = figures.into_iter();
        let first = figures.next().map(|(figure, _)| figure);
        let number = |row: &TestRow| Number {
            label: row.test.clone(),
            value: row.number(),
            csv: "tests.csv".to_owned(),
            cell: format!("estimate, low and high where target = {ALL}; {}, expected {}", row.outcome, row.expected),
        };
        let numbers = rows.iter().filter(|row| row.target == ALL).map(number).collect();
        let more =
            figures.zip(claim.figures.iter().skip(1)).enumerate().map(|(at, ((figure, reading), spec))| Section {
                id: format!("figure-{}", at + 2),
                title: spec.title.clone(),
                question: spec.question(),
                reading,
                figures: vec![figure],
                csv: "outcomes.csv".to_owned(),
                ..Section::default()
            });
        let provenance = [
            ("claim", format!("{}: {}", claim.claim, claim.statement)),
            ("source", claim.source.clone()),
            ("model", experiment.model.clone()),
            ("device and dtype", format!("{}, {:?}", experiment.device, experiment.dtype)),
            ("traits", words.join(", ")),
            ("data sets", format!("{}, each with seeds of its own, from seed {}", claim.datasets, experiment.seed)),
            (
                "runs",
                format!("beside this folder, {}-d0 and so on, shared with the other claims of this size", words[0]),
            ),
            ("undertone", env!("CARGO_PKG_VERSION").to_owned()),
            ("the claim's file", "claim.toml, beside this page, with every value filled in".to_owned()),
        ];
        Ok(Report {
            title: format!("Claim {}: {}", claim.claim, claim.statement),
            banner: report::banner(experiment, None),
            opening: Opening {
                headline: format!("At {} size: {}, as {}.", study.size, verdict.word, verdict.because),
                figure: first,
                numbers,
            },
            sections: std::iter::once(tests).chain(more).collect(),
            provenance: provenance.map(|(name, value)| (name.to_owned(), value)).into(),
        })
    }
}

/// Seconds after which a student's measurement is worth a line of its own.
const SLOW: f64 = 10.0;

/// Does one thing with every run: several at once if the model is small.
fn of_all<T: Send>(
    study: &Study,
    first: &Workbench,
    units: &[Unit],
    what: &str,
    done_with: &(dyn Fn(&Workbench, &Unit) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    let (workers, begun) = (workers(first.n_parameters(), units.len()), Instant::now());
    let done = std::sync::atomic::AtomicUsize::new(0);
    let one = |bench: &Workbench, unit: &Unit| -> Result<T> {
        let result = done_with(bench, unit).with_context(|| format!("run {}", unit.name))?;
        let done = done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        let left = begun.elapsed().as_secs_f64() / done as f64 * (units.len() - done) as f64;
        let (n, all, left) = (study.claim.claim, units.len(), plan::span(left));
        say(format!("claim {n}: {done} of {all} runs are {what}, about {left} left"));
        Ok(result)
    };
    if workers > 1 {
        side_by_side(units, workers, |_, unit| one(&Workbench::again(unit.experiment.clone())?, unit))
    } else {
        units.iter().map(|unit| one(&first.of(unit.experiment.clone())?, unit)).collect()
    }
}
