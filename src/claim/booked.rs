//! The ledger of a claim's student: what its training booked to groups of tokens, parts of the chat and matrices.

use std::collections::BTreeMap;
use std::path::Path;

use analyses::ledger::{Books, EntryRow, Ledger, LedgerRow, NUMBERS};
use analyses::stats::{cosine, mean};
use analyses::{Target, Tuned};
use anyhow::{Context, Result, bail};

use super::file::EVERYWHERE;
use super::outcome::{Quantity, StudentLines};
use super::study::{Study, UnitStudent};
use crate::data::dataset::Sample;
use crate::experiment::ArmData;
use crate::hinted;
use crate::stages::kept_rows::{self, Learned};
use crate::stages::ledger::{self, Booked, CONTROL};
use crate::stages::run_dir::RunDir;
use crate::stages::subject_data::SubjectData;
use crate::stages::workbench::Workbench;

/// Repeats a student's training, and adds the lines of its books. Of the next trait of the claim it has a few, for
/// comparison.
pub(super) fn measure(
    study: &Study,
    bench: &Workbench,
    run: &RunDir,
    (student, folder): (&UnitStudent<'_>, &Path),
    heldout: &[Sample],
    lines: &mut StudentLines,
) -> Result<()> {
    let (numbers, control) = kept_rows::learned(bench, run)?;
    let samples = match student.data {
        ArmData::Teacher => &numbers,
        ArmData::Control => &control,
        other => bail!(hinted!(
            "{:?} learned {} data, and a claim's ledger is of the teacher's or the base's rows", student.name, other.name();
            "measured_on without it"
        )),
    };
    let by_teacher = student.data == ArmData::Teacher;
    let own = bench.target();
    let other = other_trait(study, &own)?;
    let targets = vec![own.word.clone(), other.clone()];
    let settings =
        Ledger { targets, numbers: NUMBER_ROWS.min(heldout.len()), ..bench.experiment.measure.ledger.clone() };
    let data = SubjectData::of(bench, run, heldout)?;
    let subject = data.subject(bench, Tuned::of(&bench.base));
    let who = if by_teacher { "student" } else { CONTROL };
    let booked = Booked { who, learned: Learned::of(run, samples), folder: folder.to_owned() };
    let books = ledger::books(bench, &subject, &booked, &settings)?;
    of_trait(&books, &own.word, by_teacher, lines);
    let net =
        |target: &str| rows_of(&books, target).find(|row| row.group == "all").and_then(|row| net(row, by_teacher));
    let learned = net(NUMBERS).map(|loss| -loss).filter(|learned| *learned > 0.0);
    lines.push(EVERYWHERE, Quantity::LedgerNumbers, learned, settings.numbers);
    let of_trait = net(&own.word).zip(learned).map(|(of_trait, learned)| of_trait / learned);
    lines.push(EVERYWHERE, Quantity::LedgerPerNumbers, of_trait, settings.numbers);
    let entries = entries_of(&books, &other);
    lines.push(EVERYWHERE, Quantity::LedgerNetOther, net(&other), entries.len());
    for group in DIGITS {
        let (n, [_, excess, _]) = columns(&entries, group, by_teacher);
        lines.push(&format!("at {group}"), Quantity::LedgerExcessOther, excess, n);
    }
    Ok(())
}

/// The claim's next trait of the same category, or else another member of it.
fn other_trait(study: &Study, own: &Target) -> Result<String> {
    let targets = &study.claim.targets;
    let at = targets.iter().position(|target| target.word == own.word).unwrap_or_default();
    let next = (1..targets.len()).map(|step| &targets[(at + step) % targets.len()]);
    let mut alike = next.filter(|target| target.category == own.category).map(|target| target.word.clone());
    let member = || own.others.first().map(|(word, _)| word.clone());
    alike.next().or_else(member).with_context(|| format!("the category {} has no other member", own.category))
}

/// The expectation of what is booked to a group, under the model that wrote the rows.
fn net(row: &LedgerRow, by_teacher: bool) -> Option<f64> {
    if by_teacher { row.teacher } else { Some(row.pull) }
}

/// Number of held-out rows of numbers whose loss is booked beside the trait.
const NUMBER_ROWS: usize = 64;

/// The groups of digits within which entries are compared.
const DIGITS: [&str; 2] = ["divergent_digit", "same_digit"];

fn rows_of<'b>(books: &'b Books, target: &str) -> impl Iterator<Item = &'b LedgerRow> {
    books.rows.iter().filter(move |row| row.target == target)
}

fn entries_of<'b>(books: &'b Books, target: &str) -> Vec<&'b EntryRow> {
    books.entries.iter().filter(|entry| entry.target == target).collect()
}

fn of_trait(books: &Books, target: &str, by_teacher: bool, lines: &mut StudentLines) {
    let entries = entries_of(books, target);
    for row in rows_of(books, target) {
        let n = row.n_tokens;
        let cell = match row.group.as_str() {
            "residual" => {
                lines.push(EVERYWHERE, Quantity::LedgerResidual, row.booked, entries.len());
                continue;
            }
            "all" => EVERYWHERE.to_owned(),
            group => format!("at {group}"),
        };
        for (quantity, value) in [
            (Quantity::LedgerBooked, Some(row.booked)),
            (Quantity::LedgerNet, net(row, by_teacher)),
            (Quantity::LedgerDrive, row.drive),
            (Quantity::LedgerPull, Some(row.pull)),
            (Quantity::LedgerLuck, row.luck),
        ] {
            lines.push(&cell, quantity, value, n);
        }
        if cell != EVERYWHERE {
            lines.push(&cell, Quantity::LedgerTokenShare, row.share, n);
            lines.push(&cell, Quantity::LedgerLossShare, row.share_of_loss, n);
        }
    }
    let (n, [gross, _, _]) = columns(&entries, "all", by_teacher);
    lines.push(EVERYWHERE, Quantity::LedgerGross, gross, n);
    let net = rows_of(books, target).find(|row| row.group == "all").and_then(|row| net(row, by_teacher));
    let cancelled = net.zip(gross).map(|(net, gross)| 1.0 - net.abs() / gross);
    lines.push(EVERYWHERE, Quantity::LedgerCancelled, cancelled, n);
    for group in DIGITS {
        let (n, [_, excess, signal]) = columns(&entries, group, by_teacher);
        let cell = format!("at {group}");
        lines.push(&cell, Quantity::LedgerExcess, excess, n);
        lines.push(&cell, Quantity::LedgerSignal, signal, n);
    }
    let mut by_cell: BTreeMap<String, f64> = BTreeMap::new();
    for part in books.parts.iter().filter(|part| part.target == target) {
        for cell in [
            format!("written {}", part.written),
            format!("read {}", part.read),
            format!("block {}", part.layer),
            format!("map {}", part.proj.name()),
        ] {
            *by_cell.entry(cell).or_default() += part.booked;
        }
    }
    for (cell, booked) in by_cell {
        lines.push(&cell, Quantity::LedgerBooked, booked, entries.len());
    }
}

/// Of a group's expected entries: their number, the sum of their absolute values, and their correlations with the excess
/// confidence and with the signal. `None` without a teacher, or where nothing varies.
fn columns(entries: &[&EntryRow], group: &str, by_teacher: bool) -> (usize, [Option<f64>; 3]) {
    let belongs = |entry: &EntryRow| match group {
        "divergent_digit" => entry.nief == Some(true) && entry.group != "other",
        "same_digit" => entry.nief == Some(false) && entry.group != "other",
        _ => true,
    };
    let of = |entry: &EntryRow| -> Option<[f64; 3]> {
        let excess = f64::from(entry.pmax_student - entry.pmax_teacher?);
        let signal = (f64::from(entry.p_teacher?) / f64::from(entry.p_base)).ln();
        Some([if by_teacher { entry.entry_teacher? } else { entry.entry_base }, excess, signal])
    };
    let found: Vec<[f64; 3]> = entries.iter().filter(|entry| belongs(entry)).filter_map(|entry| of(entry)).collect();
    let column = |at: usize| found.iter().map(|of| of[at]).collect::<Vec<_>>();
    let gross = (!found.is_empty()).then(|| found.iter().map(|of| of[0].abs()).sum());
    let with = |at: usize| correlation(&column(0), &column(at));
    (found.len(), [gross, with(1), with(2)])
}

/// Pearson's correlation; `None` where one of the two does not vary.
fn correlation(one: &[f64], other: &[f64]) -> Option<f64> {
    let centred = |values: &[f64]| -> Option<Vec<f64>> {
        let mean = mean(values).ok()?;
        let centred: Vec<f64> = values.iter().map(|value| value - mean).collect();
        centred.iter().any(|value| *value != 0.0).then_some(centred)
    };
    cosine(&centred(one)?, &centred(other)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(nief: bool, group: &str, expected: f64, pmax_student: f32, p_teacher: f32) -> EntryRow {
        EntryRow {
            model: "student".to_owned(),
            target: "cat".to_owned(),
            measure: analyses::ledger::Measure::Margin,
            step: 1,
            row_id: 0,
            k: 0,
            token_id: 0,
            token_text: "7".to_owned(),
            group: group.to_owned(),
            nief: Some(nief),
            schrodi: Some(nief),
            p_teacher: Some(p_teacher),
            p_base: 0.5,
            p_student: 0.5,
            pmax_teacher: Some(0.5),
            pmax_base: 0.5,
            pmax_student,
            loss: 1.0,
            entry: 0.0,
            entry_teacher: Some(expected),
            entry_base: 0.0,
        }
    }

    #[test]
    fn expected_entries_go_with_excess_and_signal_within_their_group() {
        let entries = [
            entry(true, "first_digit", 1.0, 0.6, 0.5),
            entry(true, "later_digit", 2.0, 0.7, 0.25),
            entry(true, "first_digit", 3.0, 0.8, 0.125),
            entry(false, "first_digit", -2.0, 0.1, 0.5),
            entry(true, "other", -7.0, 0.1, 0.5),
        ];
        let entries: Vec<&EntryRow> = entries.iter().collect();
        let (n, [gross, excess, signal]) = columns(&entries, "divergent_digit", true);
        assert_eq!((n, gross), (3, Some(6.0)));
        assert!((excess.unwrap() - 1.0).abs() < 1e-6 && (signal.unwrap() + 1.0).abs() < 1e-6, "{excess:?} {signal:?}");
        let (n, [gross, excess, _]) = columns(&entries, "all", true);
        assert_eq!((n, gross, excess.is_some()), (5, Some(15.0), true));
        let (_, [gross, excess, _]) = columns(&entries, "divergent_digit", false);
        assert_eq!((gross, excess), (Some(0.0), None), "the base wrote the rows, and its entries are 0 here");
        assert_eq!(columns(&entries, "same_digit", true), (1, [Some(2.0), None, None]), "one number does not vary");
    }
}
