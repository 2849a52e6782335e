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

fn chosen(lowest: Option<Quantity>, nearest: Option<StudentNumber>) -> Claim {
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
    let nearest = StudentNumber {
        student: "fast".to_owned(),
        rank: Some(8),
        quantity: Quantity::HeldoutNll,
        ..StudentNumber::default()
    };
    let rows = with_chosen(&chosen(None, Some(nearest.clone())), measured()).unwrap();
    let picked: Vec<f64> =
        rows[8..].iter().filter(|row| row.quantity == Quantity::HeldoutNll).map(|row| row.value).collect();
    assert_eq!(picked, [1.5, 1.3], "the nearest to 1.3, which at rank 8 is not the lowest");
    let several = chosen(None, Some(StudentNumber { rank: None, ..nearest }));
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
    assert!(gap.contains("\"fast\" was not measured at"), "where the claim has it trained, a gap is an error: {gap}");
}

/// The index of the candidate that each chosen student is, in the order of data sets and ranks.
fn picked(claim: &Claim, rows: Vec<OutcomeRow>) -> Vec<f64> {
    let rows = with_chosen(claim, rows).unwrap().into_iter();
    rows.filter(|row| row.quantity == Quantity::Chosen).map(|row| row.value).collect()
}

#[test]
fn other_traits_and_conditions_choose_nothing_and_each_data_set_for_itself() {
    let mut rows = measured();
    for row in measured() {
        let value = 9.0 - row.value; // candidates in the opposite order
        rows.push(OutcomeRow { evaluated: "owl".to_owned(), value, ..row.clone() });
        rows.push(OutcomeRow { cell: "there".to_owned(), value, ..row.clone() });
        rows.push(OutcomeRow { dataset: 1, value, ..row });
    }
    assert_eq!(picked(&chosen(Some(Quantity::HeldoutNll), None), rows.clone()), [1.0, 0.0, 0.0, 1.0]);
    let nearest = StudentNumber {
        student: "fast".to_owned(),
        rank: Some(8),
        quantity: Quantity::HeldoutNll,
        ..StudentNumber::default()
    };
    assert_eq!(picked(&chosen(None, Some(nearest)), rows), [1.0; 4]);
}

#[test]
fn of_equal_candidates_the_first_is_picked_out() {
    let tied = measured().into_iter().map(|row| OutcomeRow { value: 1.0, ..row });
    assert_eq!(picked(&chosen(Some(Quantity::HeldoutNll), None), tied.collect()), [0.0, 0.0]);
}
