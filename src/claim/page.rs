//! Publishes the results of a claim's table of outcomes: tests and verdict, tables for plots, figures, and the page.

use std::path::Path;

use anyhow::Result;
use hooks::{Adapter, ModelFiles, files};
use serde::Serialize;
use tch::Device;

use super::figures;
use super::outcome::{Measurement, OutcomeRow};
use super::study::{Study, UnitStudent};
use super::tables::{self, SpectrumRow};
use super::verdict::{ALL, TestRow, Verdict, tests};
use crate::output::html::{Figure, Number, Opening, Report, Section, html};
use crate::output::publish::{Table, write_csv};
use crate::stages::report;
use crate::stages::run_dir::RunDir;

/// Writes the table and everything that is computed from it.
pub(super) fn publish(study: &Study, outcomes: &[OutcomeRow], root: &Path, folder: &Path) -> Result<Verdict> {
    let at = |name: &str| folder.join(name);
    write_csv(&at("outcomes.csv"), outcomes)?;
    let rows = tests(&study.claim, outcomes)?;
    write_csv(&at("tests.csv"), &rows)?;
    let verdict = Verdict::of(&study.claim, study.size, &rows);
    let runs = tables::runs(study)?;
    write_csv(&at("runs.csv"), &runs)?;
    write_some(&at("matrix.csv"), &tables::matrix(outcomes))?;
    write_some(&at("context.csv"), &tables::contexts(study, &runs, outcomes))?;
    write_some(&at("digit_conf.csv"), &tables::digit_conf(outcomes))?;
    write_some(&at("steer.csv"), &tables::steer(outcomes))?;
    let mut of_adapters = vec![];
    if study.claim.measures.contains(&Measurement::Spectrum) {
        of_adapters = spectra(study, root)?;
        write_csv(&at("spectrum.csv"), &of_adapters)?;
    }
    let mut drawn = vec![];
    for (index, figure) in study.claim.figures.iter().enumerate() {
        let name = format!("figure-{}.svg", index + 1);
        let svg = figure.draw(&study.claim, outcomes)?;
        files::write_atomic(&at(&name), svg.0.as_bytes())?;
        let reading = figure.reading(&study.claim, outcomes)?;
        drawn.push((Figure { svg, path: name }, reading));
    }
    let mut page = page(study, &rows, &verdict, drawn, Table::read(&at("tests.csv"))?);
    if let Some((svg, reading)) = figures::spectrum(&of_adapters)? {
        let name = "spectrum.svg".to_owned();
        files::write_atomic(&at(&name), svg.0.as_bytes())?;
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
    files::write_atomic(&at("report.html"), html(&page).as_bytes())?;
    files::write_atomic(&at("verdict.txt"), format!("{}\n", verdict.line).as_bytes())?; // last: it marks the end
    Ok(verdict)
}

/// Writes a table, unless it is empty.
fn write_some<R: Serialize>(path: &Path, rows: &[R]) -> Result<()> {
    if rows.is_empty() { Ok(files::remove(path)?) } else { write_csv(path, rows) }
}

/// The singular values of all adapters whose spectrum is measured.
fn spectra(study: &Study, root: &Path) -> Result<Vec<SpectrumRow>> {
    let config = ModelFiles::open(&study.units[0].experiment.model)?.config;
    let mut rows = vec![];
    for unit in &study.units {
        let run = RunDir::open(&root.join(&unit.name))?;
        let is_measured = |student: &UnitStudent<'_>| study.claim.measures(Measurement::Spectrum, student.name);
        for student in unit.students().iter().filter(|student| student.rank().is_some() && is_measured(student)) {
            let (folder, _) = student.files(&run)?;
            rows.extend(tables::spectrum(unit, student, &Adapter::load(&folder, &config, Device::Cpu)?.spectra()?));
        }
    }
    Ok(rows)
}

fn page(study: &Study, rows: &[TestRow], verdict: &Verdict, figures: Vec<(Figure, String)>, tests: Table) -> Report {
    let claim = &study.claim;
    let experiment = &study.units[0].experiment;
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
        table: Some(tests),
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
    let more = figures.zip(claim.figures.iter().skip(1)).enumerate().map(|(at, ((figure, reading), spec))| Section {
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
        ("runs", format!("beside this folder, {}-d0 and so on, shared with the other claims of this size", words[0])),
        ("undertone", env!("CARGO_PKG_VERSION").to_owned()),
        ("the claim's file", "claim.toml, beside this page, with every value filled in".to_owned()),
    ];
    Report {
        title: format!("Claim {}: {}", claim.claim, claim.statement),
        banner: report::banner(experiment, None),
        opening: Opening {
            headline: format!("At {} size: {}, as {}.", study.size, verdict.word, verdict.because),
            figure: first,
            numbers,
        },
        sections: std::iter::once(tests).chain(more).collect(),
        provenance: provenance.map(|(name, value)| (name.to_owned(), value)).into(),
    }
}
