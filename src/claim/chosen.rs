//! Students that a measurement picks out of others: a learning rate tuned for each rank, or as good a fit at another rank.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

use super::{Chosen, Claim, EVERYWHERE, Of, OutcomeRow, Quantity};

/// A student of a claim: its trait, data set, rank and seeds.
type Place = (String, u64, Option<i64>, usize);

/// The table with the lines of the claim's chosen students, each a copy of the lines of the one that was picked out, with
/// `chosen`, which of the candidates it is.
pub fn with_chosen(claim: &Claim, mut rows: Vec<OutcomeRow>) -> Result<Vec<OutcomeRow>> {
    let measured = rows.len();
    for chosen in &claim.chosen {
        let more = lines(claim, chosen, &rows[..measured]).with_context(|| format!("chosen {:?}", chosen.name))?;
        rows.extend(more);
    }
    Ok(rows)
}

fn lines(claim: &Claim, chosen: &Chosen, rows: &[OutcomeRow]) -> Result<Vec<OutcomeRow>> {
    let place = |row: &OutcomeRow| -> Place { (row.target.clone(), row.dataset, row.rank, row.seed_index) };
    let of_candidate = |name: &String| -> BTreeMap<Place, f64> {
        let quantity = chosen.lowest.or(chosen.nearest.as_ref().map(|of| of.quantity));
        let here =
            rows.iter().filter(|row| row.student == *name && row.cell == EVERYWHERE && row.evaluated == row.target);
        here.filter(|row| Some(row.quantity) == quantity).map(|row| (place(row), row.value)).collect()
    };
    let candidates: Vec<BTreeMap<Place, f64>> = chosen.of.iter().map(of_candidate).collect();
    let places: BTreeSet<&Place> = candidates.iter().flat_map(BTreeMap::keys).collect();
    ensure!(
        !places.is_empty(),
        "none of its candidates has the number that picks one out; hint: measures = [\"heldout\"]"
    );
    let mut found = vec![];
    for at in places {
        let aim = chosen.nearest.as_ref().map(|of| aim(of, at, rows)).transpose()?;
        let trained = (0..candidates.len()).filter(|index| is_trained(claim, &chosen.of[*index], at.2));
        let values = trained.map(|index| {
            let name = &chosen.of[index];
            let value = candidates[index].get(at).with_context(|| format!("{name:?} was not measured at {at:?}"))?;
            Ok((index, aim.map_or(*value, |aim| (value - aim).abs())))
        });
        let values = values.collect::<Result<Vec<(usize, f64)>>>()?;
        // The first of equals.
        let (best, _) =
            *values.iter().min_by(|(_, a), (_, b)| a.total_cmp(b)).context("none of its candidates has this rank")?;
        let own: Vec<&OutcomeRow> =
            rows.iter().filter(|row| row.student == chosen.of[best] && place(row) == *at).collect();
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

/// Whether the claim trains a student at this rank. If a rate is too high for the larger ranks, only the smaller ones
/// are trained.
fn is_trained(claim: &Claim, name: &str, rank: Option<i64>) -> bool {
    let ranks = claim.students.iter().find(|student| student.name == name).and_then(|student| student.ranks.as_ref());
    ranks.is_none_or(|ranks| rank.is_some_and(|rank| ranks.contains(&rank)))
}

/// The number to come near to, of the same trait and data set.
fn aim(of: &Of, (target, dataset, ..): &Place, rows: &[OutcomeRow]) -> Result<f64> {
    let mut here = rows.iter().filter(|row| {
        (&row.target, row.dataset) == (target, *dataset)
            && row.student == of.student
            && row.cell == of.cell
            && row.evaluated == row.target
            && row.quantity == of.quantity
            && of.rank.is_none_or(|rank| row.rank == Some(rank))
    });
    let aim = here.next().with_context(|| format!("{of} was not measured for {target} in data set {dataset}"))?;
    ensure!(here.next().is_none(), "{of} is several numbers, expected one; hint: name it with rank = 8");
    Ok(aim.value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::float_cmp)]
mod tests {
    use super::*;

    fn row(student: &str, rank: i64, quantity: Quantity, value: f64) -> OutcomeRow {
        OutcomeRow {
            target: "cat".to_owned(),
            dataset: 0,
            student: student.to_owned(),
            rank: Some(rank),
            seed_index: 0,
            cell: EVERYWHERE.to_owned(),
            evaluated: "cat".to_owned(),
            quantity,
            value,
            n: 7,
        }
    }

    /// Two rates at two ranks: at rank 1 the second fits better, at rank 8 the first.
    fn measured() -> Vec<OutcomeRow> {
        let loss = [("slow", 1, 2.0), ("fast", 1, 1.5), ("slow", 8, 1.0), ("fast", 8, 1.3)];
        let rows = loss.into_iter().flat_map(|(student, rank, nll)| {
            [row(student, rank, Quantity::HeldoutNll, nll), row(student, rank, Quantity::DeltaMargin, 10.0 * nll)]
        });
        rows.collect()
    }

    fn chosen(lowest: Option<Quantity>, nearest: Option<Of>) -> Claim {
        let head = "claim = 1\nstatement = \"s\"\nsource = \"x\"\ndecisive_control = \"c\"\ndatasets = 1\ntests = []\nfigures = []\n\
                    targets = [{ word = \"cat\", category = \"animal\" }]\n";
        let of = vec!["slow".to_owned(), "fast".to_owned()];
        let chosen = Chosen { name: "picked".to_owned(), of, lowest, nearest };
        Claim { chosen: vec![chosen], ..toml::from_str(head).unwrap() }
    }

    #[test]
    fn the_one_with_the_lowest_number_is_picked_out_rank_by_rank() {
        let rows = with_chosen(&chosen(Some(Quantity::HeldoutNll), None), measured()).unwrap();
        assert_eq!(rows[..8], measured());
        let of = |rank: i64, quantity: Quantity| {
            let mut here = rows[8..].iter().filter(|row| row.rank == Some(rank) && row.quantity == quantity);
            let value = here.next().unwrap();
            assert!(here.next().is_none() && value.student == "picked");
            value.value
        };
        assert_eq!([of(1, Quantity::DeltaMargin), of(8, Quantity::DeltaMargin)], [15.0, 10.0]);
        assert_eq!([of(1, Quantity::Chosen), of(8, Quantity::Chosen)], [1.0, 0.0]);
    }

    #[test]
    fn the_one_nearest_to_another_is_picked_out() {
        let nearest = Of { student: "fast".to_owned(), rank: Some(8), quantity: Quantity::HeldoutNll, ..Of::default() };
        let rows = with_chosen(&chosen(None, Some(nearest.clone())), measured()).unwrap();
        let picked: Vec<f64> =
            rows[8..].iter().filter(|row| row.quantity == Quantity::HeldoutNll).map(|row| row.value).collect();
        assert_eq!(picked, [1.5, 1.3], "the nearest to 1.3, which at rank 8 is not the lowest");
        let several = chosen(None, Some(Of { rank: None, ..nearest }));
        assert!(format!("{:#}", with_chosen(&several, measured()).unwrap_err()).contains("several numbers"));
        let mut gap = measured();
        gap.retain(|row| !(row.student == "fast" && row.rank == Some(8)));
        let found = format!("{:#}", with_chosen(&chosen(Some(Quantity::HeldoutNll), None), gap).unwrap_err());
        assert!(found.contains("\"fast\" was not measured at"), "{found}");
    }

    #[test]
    fn a_candidate_counts_at_the_ranks_it_is_trained_at() {
        let mut claim = chosen(Some(Quantity::HeldoutNll), None);
        claim.students = vec![toml::from_str("name = \"fast\"\nranks = [1]").unwrap()];
        let without = |rank: i64| {
            let mut rows = measured();
            rows.retain(|row| !(row.student == "fast" && row.rank == Some(rank)));
            with_chosen(&claim, rows)
        };
        let rows = without(8).unwrap();
        let picked: Vec<(f64, usize)> =
            rows[6..].iter().filter(|row| row.quantity == Quantity::Chosen).map(|row| (row.value, row.n)).collect();
        assert_eq!(picked, [(1.0, 2), (0.0, 1)], "at rank 1 the second of two, at rank 8 the only one");
        let gap = format!("{:#}", without(1).unwrap_err());
        assert!(
            gap.contains("\"fast\" was not measured at"),
            "where the claim has it trained, a gap is an error: {gap}"
        );
    }
}
