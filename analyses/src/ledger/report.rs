//! The ledger's figures and its sentence, from the tables alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Measure;
use super::rows::{EntryRow, LedgerRow, PartRow};
use crate::alignment::Part;
use crate::error::Result;
use crate::plot::{HeatMap, Line, Panel, PanelChart, Point, Scale, Svg, heatmap, panels};

/// The figures, each with its name: the rise of the measure over the steps, where it was written and read, the matrices
/// that hold it, and the entries by confidence. Of several targets the first is drawn.
pub fn plots(entries: &[EntryRow], parts: &[PartRow], rows: &[LedgerRow]) -> Result<Vec<(&'static str, Svg)>> {
    let Some(first) = rows.first() else { return Ok(vec![]) };
    let target = first.target.as_str();
    let (measure, residual) = (name(first.measure), residual(rows, &first.model, target));
    let of = |what: &str| format!("{what}: {measure} of {target} (residual {residual})");
    let entries: Vec<&EntryRow> = entries.iter().filter(|entry| entry.target == target).collect();
    let parts: Vec<&PartRow> = parts.iter().filter(|part| part.target == target && part.model == first.model).collect();
    let mut plots = vec![("steps", over_steps(of("Booked so far"), &entries)?)];
    if let Some(svg) = by_confidence(of("Expected entries by confidence"), &entries, &first.model)? {
        plots.push(("confidence", svg));
    }
    let names: Vec<String> = Part::ALL.iter().map(|part| part.name().to_owned()).collect();
    let read = HeatMap {
        title: of("Written (rows) and read (columns)"),
        x_label: "part of the questions at which it is read".to_owned(),
        y_label: "part of the training rows at which it was written".to_owned(),
        value_label: format!("{measure} (nats)"),
        values: table(&parts, &names, &names, |part| (part.written.clone(), part.read.clone())),
        rows: names.clone(),
        columns: names,
    };
    let projs: Vec<String> = hooks::Proj::ALL.iter().map(|proj| proj.name().to_owned()).collect();
    let n_layers = parts.iter().map(|part| part.layer + 1).max().unwrap_or(0);
    let layers: Vec<String> = (0..n_layers).map(|layer| layer.to_string()).collect();
    let matrices = HeatMap {
        title: of("By block and map"),
        x_label: "map".to_owned(),
        y_label: "block".to_owned(),
        value_label: format!("{measure} (nats)"),
        values: table(&parts, &layers, &projs, |part| (part.layer.to_string(), part.proj.name().to_owned())),
        rows: layers,
        columns: projs,
    };
    if n_layers > 0 {
        plots.extend([("parts", heatmap(&read)?), ("matrices", heatmap(&matrices)?)]);
    }
    Ok(plots)
}

fn name(measure: Measure) -> &'static str {
    match measure {
        Measure::Margin => "margin",
        Measure::Logp => "log p",
        Measure::Loss => "loss",
    }
}

/// The residual as a share of the change.
fn residual(rows: &[LedgerRow], model: &str, target: &str) -> String {
    let found = rows.iter().find(|row| row.model == model && row.target == target && row.group == "residual");
    found.map_or("unknown".to_owned(), |row| format!("{:.1} %", 100.0 * (row.booked / row.change).abs()))
}

/// Σ booked, `[rows][columns]`.
fn table(
    parts: &[&PartRow],
    rows: &[String],
    columns: &[String],
    of: impl Fn(&PartRow) -> (String, String),
) -> Vec<Vec<f64>> {
    let mut sums: BTreeMap<(String, String), f64> = BTreeMap::new();
    for part in parts {
        *sums.entry(of(part)).or_default() += part.booked;
    }
    let cell = |row: &String, column: &String| sums.get(&(row.clone(), column.clone())).copied().unwrap_or_default();
    rows.iter().map(|row| columns.iter().map(|column| cell(row, column)).collect()).collect()
}

/// A panel for each model: what was booked up to each step, in all and by group.
fn over_steps(title: String, entries: &[&EntryRow]) -> Result<Svg> {
    let mut models: Vec<&str> = vec![];
    for entry in entries {
        if !models.contains(&entry.model.as_str()) {
            models.push(&entry.model);
        }
    }
    let panel = |model: &&str| {
        let of_group = |label: &str, belongs: &dyn Fn(&EntryRow) -> bool| {
            let mut by_step: BTreeMap<usize, f64> = BTreeMap::new();
            for entry in entries.iter().filter(|entry| entry.model == **model) {
                *by_step.entry(entry.step).or_default() += if belongs(entry) { entry.entry } else { 0.0 };
            }
            let mut sum = 0.0;
            let points = by_step.iter().map(|(step, booked)| {
                sum += booked;
                Point::new(*step as f64, sum)
            });
            Line { label: label.to_owned(), points: points.collect() }
        };
        let lines = vec![
            of_group("all", &|_| true),
            of_group("first digits", &|entry| entry.group == "first_digit"),
            of_group("later digits", &|entry| entry.group == "later_digit"),
            of_group("other tokens", &|entry| entry.group == "other"),
        ];
        Panel { y_label: format!("{model} (nats)"), lines, references: vec![] }
    };
    let panels_of = models.iter().map(panel).collect();
    panels(&PanelChart { title, x_label: "optimizer step".to_owned(), x_scale: Scale::Linear, panels: panels_of })
}

/// The expected entries under the teacher, by decile of the student's excess confidence over the teacher's, of divergent
/// and of other digits. `None` without a teacher, or with few digits.
fn by_confidence(title: String, entries: &[&EntryRow], model: &str) -> Result<Option<Svg>> {
    const DECILES: usize = 10;
    let digits: Vec<(f64, f64, bool)> = entries
        .iter()
        .filter(|entry| entry.model == model && entry.group != "other")
        .filter_map(|entry| {
            Some((f64::from(entry.pmax_student - entry.pmax_teacher?), entry.entry_teacher?, entry.nief?))
        })
        .collect();
    let line = |label: &str, divergent: bool| {
        let mut of: Vec<_> = digits.iter().filter(|digit| digit.2 == divergent).collect();
        of.sort_by(|one, other| one.0.total_cmp(&other.0));
        let chunks = of.chunks(of.len().div_ceil(DECILES).max(1)).enumerate();
        let points = chunks.map(|(at, some)| Point::new(at as f64 + 1.0, some.iter().map(|digit| digit.1).sum()));
        Line { label: label.to_owned(), points: points.collect() }
    };
    if digits.len() < 10 * DECILES {
        return Ok(None);
    }
    let lines = [line("divergent digits", true), line("other digits", false)];
    let lines = lines.into_iter().filter(|line| !line.points.is_empty()).collect();
    panels(&PanelChart {
        title,
        x_label: "decile of student's less teacher's largest probability".to_owned(),
        x_scale: Scale::Linear,
        panels: vec![Panel { y_label: "expected under the teacher (nats)".to_owned(), lines, references: vec![] }],
    })
    .map(Some)
}

/// The books in a paragraph.
pub fn reading(rows: &[LedgerRow]) -> String {
    let of_model = |all: &LedgerRow| {
        let find = |group: &str| {
            rows.iter().find(|row| row.model == all.model && row.target == all.target && row.group == group)
        };
        let signed = |value: f64, error: Option<f64>| {
            error.map_or(format!("{value:+.3}"), |error| format!("{value:+.3} \u{b1} {error:.3}"))
        };
        let mut said = format!(
            "The {}'s {} of {} moved by {:+.3} nats, of which {} are not booked",
            if all.model == "control" { "control student" } else { all.model.as_str() },
            name(all.measure),
            all.target,
            all.change,
            residual(rows, &all.model, &all.target)
        );
        let pull = signed(all.pull, all.pull_se);
        let luck = all.luck.map(|luck| signed(luck, all.luck_se));
        match (all.drive, luck) {
            (Some(drive), Some(luck)) => {
                let drive = signed(drive, all.drive_se);
                let _ = write!(
                    said,
                    ": {drive} by the teacher's drive, {pull} by the pull back to the base and {luck} by the luck of the sample"
                );
            }
            (None, Some(luck)) => {
                let _ =
                    write!(said, ": {pull} by the base, which wrote its numbers, and {luck} by the luck of the sample");
            }
            _ => {}
        }
        if let Some(divergent) = find("divergent_digit").filter(|_| all.drive.is_some())
            && let Some(teacher) = divergent.teacher
        {
            let _ = write!(
                said,
                "; divergent digits, {:.1} % of the tokens and {:.1} % of the loss, hold {} of the {} that drive and pull \
                 leave",
                100.0 * divergent.share,
                100.0 * divergent.share_of_loss,
                signed(teacher, divergent.teacher_se),
                signed(all.teacher.unwrap_or(f64::NAN), all.teacher_se)
            );
        }
        said + "."
    };
    let said: Vec<String> = rows.iter().filter(|row| row.group == "all").map(of_model).collect();
    said.join(" ").replace('-', "\u{2212}")
}
