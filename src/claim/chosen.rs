//! Selects students by a measurement: a learning rate tuned for each rank, or an equally good fit at another rank.

use std::collections::{BTreeMap, BTreeSet};

use crate::hinted;

use anyhow::{Context, Result, ensure};

use super::file::{Chosen, Claim, EVERYWHERE, StudentNumber};
use super::outcome::{OutcomeRow, Quantity};

/// Identifies one of a candidate's students: trait, data set, rank and index of seeds.
type CandidateKey = (String, u64, Option<i64>, usize);

/// Adds the lines of the claim's chosen students to the table: copies of the selected candidate's lines, and a line
/// `chosen` with the candidate's index.
pub fn with_chosen(claim: &Claim, mut rows: Vec<OutcomeRow>) -> Result<Vec<OutcomeRow>> {
    let measured = rows.len();
    for chosen in &claim.chosen {
        let more = lines(claim, chosen, &rows[..measured]).with_context(|| format!("chosen {:?}", chosen.name))?;
        rows.extend(more);
    }
    Ok(rows)
}

fn lines(claim: &Claim, chosen: &Chosen, rows: &[OutcomeRow]) -> Result<Vec<OutcomeRow>> {
    let key = |row: &OutcomeRow| -> CandidateKey { (row.target.clone(), row.dataset, row.rank, row.seed_index) };
    let of_candidate = |name: &String| -> BTreeMap<CandidateKey, f64> {
        let quantity = chosen.quantity();
        let here =
            rows.iter().filter(|row| row.student == *name && row.cell == EVERYWHERE && row.evaluated == row.target);
        here.filter(|row| Some(row.quantity) == quantity).map(|row| (key(row), row.value)).collect()
    };
    let candidates: Vec<BTreeMap<CandidateKey, f64>> = chosen.of.iter().map(of_candidate).collect();
    let keys: BTreeSet<&CandidateKey> = candidates.iter().flat_map(BTreeMap::keys).collect();
    ensure!(
        !keys.is_empty(),
        hinted!("none of its candidates has the number that picks one out"; "measures = [\"heldout\"]")
    );
    let mut found = vec![];
    for at in keys {
        let aim = chosen.nearest.as_ref().map(|of| aim(of, at, rows)).transpose()?;
        let trained = (0..candidates.len()).filter(|index| is_trained(claim, &chosen.of[*index], at.2));
        let values = trained.map(|index| {
            let name = &chosen.of[index];
            let value = candidates[index].get(at).with_context(|| format!("{name:?} was not measured at {at:?}"))?;
            Ok((index, aim.map_or(*value, |aim| (value - aim).abs())))
        });
        let values = values.collect::<Result<Vec<(usize, f64)>>>()?;
        // Of equal values, the first counts.
        let (best, _) =
            *values.iter().min_by(|(_, a), (_, b)| a.total_cmp(b)).context("none of its candidates has this rank")?;
        let own: Vec<&OutcomeRow> =
            rows.iter().filter(|row| row.student == chosen.of[best] && key(row) == *at).collect();
        let first = OutcomeRow {
            cell: EVERYWHERE.to_owned(),
            evaluated: at.0.clone(),
            quantity: Quantity::Chosen,
            value: best as f64,
            n: values.len(),
            ..(*own.first().context("a candidate without lines")?).clone()
        };
        let copies = std::iter::once(first).chain(own.into_iter().cloned());
        found.extend(copies.map(|row| OutcomeRow { student: chosen.name.clone(), ..row }));
    }
    Ok(found)
}

/// Whether the claim trains a student at this rank. A candidate may have some ranks only, for instance if its learning
/// rate is too high for larger ones.
fn is_trained(claim: &Claim, name: &str, rank: Option<i64>) -> bool {
    let ranks = claim.students.iter().find(|student| student.name == name).and_then(|student| student.ranks.as_ref());
    ranks.is_none_or(|ranks| rank.is_some_and(|rank| ranks.contains(&rank)))
}

/// The number that the chosen student is to be nearest to, of the same trait and data set.
fn aim(of: &StudentNumber, (target, dataset, ..): &CandidateKey, rows: &[OutcomeRow]) -> Result<f64> {
    let mut here = rows.iter().filter(|row| {
        (&row.target, row.dataset) == (target, *dataset)
            && row.student == of.student
            && row.cell == of.cell
            && row.evaluated == row.target
            && row.quantity == of.quantity
            && of.rank.is_none_or(|rank| row.rank == Some(rank))
    });
    let aim = here.next().with_context(|| format!("{of} was not measured for {target} in data set {dataset}"))?;
    ensure!(here.next().is_none(), hinted!("{of} is several numbers, expected one"; "name it with rank = 8"));
    Ok(aim.value)
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests;
