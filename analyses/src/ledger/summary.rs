//! The books of groups of tokens, with errors over rows, and what they miss.

use std::collections::BTreeMap;

use super::measure::Measure;
use super::rows::{EntryRow, LedgerRow};

/// A group of tokens and what belongs to it.
type Group = (&'static str, fn(&EntryRow) -> bool);

const GROUPS: [Group; 6] = [
    ("all", |_| true),
    ("first_digit", |entry| entry.group == "first_digit"),
    ("later_digit", |entry| entry.group == "later_digit"),
    ("other", |entry| entry.group == "other"),
    ("divergent_digit", |entry| entry.nief == Some(true) && entry.group != "other"),
    ("same_digit", |entry| entry.nief == Some(false) && entry.group != "other"),
];

/// The lines of a measure's books. `by_teacher`: whether the teacher wrote the rows; `entries`: all of the training;
/// `decay`: what weight decay changed; `change`: the measured change.
pub(super) fn rows(
    (model, target, measure): (&str, &str, Measure),
    by_teacher: bool,
    entries: &[EntryRow],
    (decay, change): (f64, f64),
) -> Vec<LedgerRow> {
    let n_rows = entries.iter().map(|entry| entry.row_id).collect::<std::collections::BTreeSet<_>>().len();
    let loss: f64 = entries.iter().map(|entry| entry.loss).sum();
    let bare = |group: &str, booked: f64| LedgerRow {
        model: model.to_owned(),
        target: target.to_owned(),
        measure,
        group: group.to_owned(),
        n_tokens: 0,
        share: 0.0,
        share_of_loss: 0.0,
        booked,
        booked_se: None,
        teacher: None,
        teacher_se: None,
        pull: 0.0,
        pull_se: None,
        drive: None,
        drive_se: None,
        luck: None,
        luck_se: None,
        change,
    };
    let of_group = |(group, belongs): &Group| -> Option<LedgerRow> {
        let chosen: Vec<&EntryRow> = entries.iter().filter(|entry| belongs(entry)).collect();
        if chosen.is_empty() {
            return None;
        }
        let sum = |of: &dyn Fn(&EntryRow) -> Option<f64>| -> Option<(f64, Option<f64>)> {
            let mut by_row: BTreeMap<usize, f64> = BTreeMap::new();
            for entry in &chosen {
                *by_row.entry(entry.row_id).or_default() += of(entry)?;
            }
            let total: f64 = by_row.values().sum();
            // Rows without a token of the group count with 0.
            let mean = total / n_rows as f64;
            let squares: f64 = by_row.values().map(|sum| (sum - mean).powi(2)).sum::<f64>()
                + (n_rows - by_row.len()) as f64 * mean.powi(2);
            let error = (n_rows > 1).then(|| (squares * n_rows as f64 / (n_rows as f64 - 1.0)).sqrt());
            Some((total, error))
        };
        let (booked, booked_se) = sum(&|entry| Some(entry.entry))?;
        let (pull, pull_se) = sum(&|entry| Some(entry.entry_base))?;
        let teacher = sum(&|entry| entry.entry_teacher);
        let drive = sum(&|entry| Some(entry.entry_teacher.filter(|_| by_teacher)? - entry.entry_base));
        let expected = |entry: &EntryRow| if by_teacher { entry.entry_teacher } else { Some(entry.entry_base) };
        let luck = sum(&|entry| Some(entry.entry - expected(entry)?));
        Some(LedgerRow {
            n_tokens: chosen.len(),
            share: chosen.len() as f64 / entries.len() as f64,
            share_of_loss: chosen.iter().map(|entry| entry.loss).sum::<f64>() / loss,
            booked_se,
            teacher: teacher.map(|sum| sum.0),
            teacher_se: teacher.and_then(|sum| sum.1),
            pull,
            pull_se,
            drive: drive.map(|sum| sum.0),
            drive_se: drive.and_then(|sum| sum.1),
            luck: luck.map(|sum| sum.0),
            luck_se: luck.and_then(|sum| sum.1),
            ..bare(group, booked)
        })
    };
    let mut rows: Vec<LedgerRow> = GROUPS.iter().filter_map(of_group).collect();
    let booked = rows.first().map_or(0.0, |all| all.booked);
    if decay != 0.0 {
        rows.push(bare("weight_decay", decay));
    }
    rows.push(bare("residual", change - booked - decay));
    rows
}
