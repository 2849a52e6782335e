use analyses::stats::{mean, t_interval};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Outcome::{Fails, Holds, Undecided};
use super::*;
use crate::claim::outcome::Quantity;

/// Outcomes of two traits, a data set per value of `effects`, which is the student's effect, and a control student near
/// zero.
fn outcomes(effects: &[f64]) -> Vec<OutcomeRow> {
    let mut rows = vec![];
    for (dataset, effect) in effects.iter().enumerate() {
        for (at, target) in ["cat", "owl"].into_iter().enumerate() {
            let row = |student: &str, rank: i64, cell: &str, evaluated: &str, value: f64| OutcomeRow {
                target: target.to_owned(),
                dataset: dataset as u64,
                student: student.to_owned(),
                rank: Some(rank),
                seed_index: 0,
                cell: cell.to_owned(),
                evaluated: evaluated.to_owned(),
                quantity: Quantity::DeltaMargin,
                value,
                n: 1,
            };
            let wobble = 0.01 * (dataset as f64 - 1.0) + 0.02 * at as f64;
            rows.push(row("student", 8, "everywhere", target, effect + wobble));
            rows.push(row("student", 8, "part", target, 0.7 * (effect + wobble)));
            rows.push(row("student", 8, "everywhere", if target == "cat" { "owl" } else { "cat" }, 0.1 * wobble));
            rows.push(row(
                "control student",
                8,
                "everywhere",
                target,
                wobble * if dataset % 2 == 0 { 1.0 } else { -1.0 },
            ));
            for (rank, height) in [(1, 0.0), (2, 0.5), (4, 1.0), (8, 0.6), (16, 0.2)] {
                rows.push(row("ranked", rank, "everywhere", target, height * effect + wobble * 0.3));
            }
        }
    }
    rows
}

fn claim(tests: &str) -> Claim {
    let head = "claim = 1\nstatement = \"s\"\nsource = \"x\"\ndecisive_control = \"c\"\ndatasets = 4\n\
                targets = [{ word = \"cat\", category = \"animal\" }, { word = \"owl\", category = \"animal\" }]\nfigures = []\n";
    toml::from_str(&format!("{head}{tests}")).unwrap()
}

fn first(tests_text: &str, rows: &[OutcomeRow]) -> TestRow {
    tests(&claim(tests_text), rows).unwrap().remove(0)
}

const EFFECT: &str =
    "[[tests]]\nname = \"effect\"\nkind = \"difference\"\nminus = { student = \"control student\" }\nabove = 0\n";

#[test]
fn a_difference_is_paired_and_over_data_sets() {
    let found = first(EFFECT, &outcomes(&[1.0, 1.2, 0.8, 1.0]));
    assert_eq!((found.n_datasets, found.n_runs, found.outcome), (4, 16, Holds));
    // By hand: student minus control in data set d is e_d + w_d − s_d w_d, with w_d = 0.01 (d − 1) + 0.01 and signs s_d
    // + − + −.
    let by_hand = [1.0 + 0.0, 1.2 + 0.02, 0.8 + 0.0, 1.0 + 0.06];
    assert!((found.estimate.unwrap() - mean(&by_hand).unwrap()).abs() < 1e-12, "{found:?}");
    let (low, high) = t_interval(&by_hand, LEVEL).unwrap();
    assert!((found.low.unwrap() - low).abs() < 1e-12 && (found.high.unwrap() - high).abs() < 1e-12);
    assert!((found.p_sign_flip.unwrap() - 0.125).abs() < 1e-12, "2 of 16 sign patterns");
    assert_eq!(first(EFFECT, &outcomes(&[0.3, -0.3, 0.2, -0.1])).outcome, Undecided);
    assert_eq!(first(EFFECT, &outcomes(&[-1.0, -1.2, -0.8, -1.0])).outcome, Fails);
    let alone = first(EFFECT, &outcomes(&[1.0]));
    assert_eq!((alone.outcome, alone.low), (Undecided, None), "one data set decides nothing");
}

#[test]
fn traits_have_lines_of_their_own_that_decide_nothing() {
    let rows = tests(&claim(EFFECT), &outcomes(&[1.0, 1.2, 0.8, 1.0])).unwrap();
    let targets: Vec<&str> = rows.iter().map(|row| row.target.as_str()).collect();
    assert_eq!(targets, [ALL, "cat", "owl"]);
    assert!(rows[0].p_holm.is_none() && rows[1].p_holm.unwrap() >= rows[1].p.unwrap());
}

#[test]
fn a_share_is_told_only_of_an_effect() {
    let share = "[[tests]]\nname = \"share\"\nkind = \"recovered\"\nof = { cell = \"part\" }\nall = {}\nabove = 0.5\n";
    let found = first(share, &outcomes(&[1.0, 1.2, 0.8, 1.0]));
    assert!((found.estimate.unwrap() - 0.7).abs() < 1e-12 && found.outcome == Holds, "{found:?}");
    let none = first(share, &outcomes(&[0.3, -0.3, 0.2, -0.1]));
    assert!(none.estimate.is_none() && none.outcome == Undecided && none.note.contains("not three standard errors"));
    let alone = first(share, &outcomes(&[1.0]));
    assert!(alone.estimate.is_none() && alone.note.contains("no share is given"), "{alone:?}");
}

#[test]
fn a_rise_and_a_fall_are_on_the_sides_of_the_peak() {
    let text = |kind: &str, bound: &str| {
        format!("[[tests]]\nname = \"x\"\nkind = \"{kind}\"\nof = {{ student = \"ranked\" }}\n{bound} = 0\n")
    };
    let rows = outcomes(&[1.0, 1.2, 0.8, 1.0]);
    let (rise, fall) = (first(&text("rise", "above"), &rows), first(&text("fall", "below"), &rows));
    assert!((rise.estimate.unwrap() - 0.5).abs() < 1e-9 && rise.outcome == Holds, "{rise:?}");
    assert!((fall.estimate.unwrap() + 0.4).abs() < 1e-9 && fall.outcome == Holds, "{fall:?}");
    assert!(fall.note.contains("highest at rank 4"));
    // Without the ranks after the peak, nothing falls.
    let rising: Vec<OutcomeRow> = rows
        .into_iter()
        .filter(|row| row.rank != Some(8) || row.student != "ranked")
        .filter(|row| row.rank != Some(16))
        .collect();
    let none = first(&text("fall", "below"), &rising);
    assert!(none.outcome == Fails && none.note.contains("an end of the ranks"), "{none:?}");
}

#[test]
fn a_trait_moves_in_its_own_students_alone() {
    let diagonal = "[[tests]]\nname = \"x\"\nkind = \"diagonal\"\nabove = 0\n";
    let found = first(diagonal, &outcomes(&[1.0, 1.2, 0.8, 1.0]));
    assert_eq!((found.n_runs, found.outcome), (8, Holds));
    // With two traits, γ is the mean of the diagonal minus the mean of the rest.
    let by_hand =
        [1.0 + 0.0, 1.2 + 0.01, 0.8 + 0.02, 1.0 + 0.03].iter().zip([0.0, 0.01, 0.02, 0.03]).map(|(d, w)| d - 0.1 * w);
    let by_hand = mean(&by_hand.collect::<Vec<f64>>()).unwrap();
    assert!((found.estimate.unwrap() - by_hand).abs() < 1e-9, "{found:?} {by_hand}");
    assert!(found.p.unwrap() < 0.02, "8 runs of 2 traits have 70 patterns: {found:?}");
}

#[test]
fn what_compares_traits_says_nothing_of_one() {
    let mut one = claim("[[tests]]\nname = \"x\"\nkind = \"diagonal\"\nabove = 0\n");
    one.targets.truncate(1);
    let found = tests(&one, &outcomes(&[1.0, 1.2, 0.8])).unwrap().remove(0);
    assert!(found.estimate.is_none() && found.outcome == Undecided && found.note.contains("takes two traits"));
}

#[test]
fn peaks_lie_apart_where_traits_differ_and_not_by_chance() {
    let spread = "[[tests]]\nname = \"x\"\nkind = \"peak_spread\"\nof = { student = \"ranked\" }\nabove = 0\n";
    let same = outcomes(&[1.0, 1.2, 0.8, 1.0, 1.1]);
    let found = first(spread, &same);
    assert!(found.estimate.unwrap().abs() < 1e-12 && found.outcome == Undecided, "{found:?}");
    // The owl's series in reverse is still highest at rank 4; shifted by two ranks it is highest at 16.
    let shifted = same.into_iter().map(|mut row| {
        if row.target == "owl" && row.student == "ranked" {
            row.value = row.rank.map_or(0.0, |rank| (rank as f64).log2()) + 0.01 * row.dataset as f64;
        }
        row
    });
    let found = first(spread, &shifted.collect::<Vec<_>>());
    assert!((found.estimate.unwrap() - 2.0).abs() < 1e-12, "{found:?}");
    // Of the 32 ways to exchange two traits in five data sets, these are the ones in which one trait has none or one of
    // the shifted series.
    assert!((found.p.unwrap() - 12.0 / 32.0).abs() < 0.03, "{found:?}");
}

#[test]
fn a_slope_over_another_quantity_takes_both_at_one_place() {
    let mut rows = outcomes(&[1.0, 1.2, 0.8]);
    let more: Vec<OutcomeRow> = rows
        .iter()
        .filter(|row| row.student == "ranked")
        .map(|row| OutcomeRow { quantity: Quantity::CosTeacher, value: 3.0 * row.value - 1.0, ..row.clone() })
        .collect();
    rows.extend(more);
    let text = "[[tests]]\nname = \"x\"\nkind = \"slope\"\nof = { student = \"ranked\", quantity = \"cos_teacher\" }\nover = \"delta_margin\"\nabove = 0\n";
    let found = first(text, &rows);
    assert!((found.estimate.unwrap() - 3.0).abs() < 1e-9, "{found:?}");
    rows.retain(|row| row.quantity != Quantity::DeltaMargin || row.rank != Some(4));
    assert!(tests(&claim(text), &rows).is_err(), "a point without its place");
}

/// With random numbers, an effect is found no more often than the level says: with a 95 % interval one time in forty on
/// the tested side, and one time in twenty by a permutation.
#[test]
fn a_null_is_not_called_an_effect_more_often_than_the_level_says() {
    let kinds = [
        ("kind = \"mean\"\nabove = 0", 400, 0.05),
        ("kind = \"difference\"\nminus = { student = \"control student\" }\nabove = 0", 400, 0.05),
        ("kind = \"slope\"\nover = \"log2_rank\"\nof = { student = \"ranked\" }\nabove = 0", 400, 0.05),
        ("kind = \"rise\"\nof = { student = \"ranked\" }\nabove = 0", 400, 0.06),
        ("kind = \"fall\"\nof = { student = \"ranked\" }\nbelow = 0", 400, 0.06),
        ("kind = \"recovered\"\nof = { cell = \"part\" }\nall = { cell = \"whole\" }\nabove = 0.5", 400, 0.05),
        ("kind = \"diagonal\"\nabove = 0", 60, 0.1),
        ("kind = \"peak_spread\"\nof = { student = \"ranked\" }\nabove = 0", 60, 0.1),
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut chance = move || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0; // nearly normal, of variance 1
    let mut said = vec![];
    for (kind, times, at_most) in kinds {
        let claim = claim(&format!("[[tests]]\nname = \"null\"\n{kind}\n"));
        let mut called = 0;
        for _ in 0..times {
            let mut rows = outcomes(&[0.0; 5]);
            for row in &mut rows {
                row.value = chance();
            }
            // A share of a real effect: the whole is 10, and the true share is a half.
            let whole = rows
                .iter()
                .filter(|row| row.cell == "part")
                .map(|row| OutcomeRow { cell: "whole".to_owned(), ..row.clone() });
            let whole: Vec<OutcomeRow> = whole.map(|row| OutcomeRow { value: 10.0 + chance(), ..row }).collect();
            rows.extend(whole);
            rows.iter_mut().filter(|row| row.cell == "part").for_each(|row| row.value += 5.0);
            called += usize::from(tests(&claim, &rows).unwrap()[0].outcome == Holds);
        }
        let share = f64::from(u32::try_from(called).unwrap()) / f64::from(times);
        said.push(format!("{kind:?}: {called} of {times}"));
        assert!(share <= at_most, "{said:?}");
    }
}

#[test]
fn a_run_whose_teacher_gains_nothing_has_no_fit_and_is_left_out() {
    let text = "[[tests]]\nname = \"x\"\nkind = \"difference\"\nof = { quantity = \"fit\" }\n\
                minus = { student = \"control student\", quantity = \"fit\" }\nabove = 0\n";
    let margins = outcomes(&[1.0, 2.0, 6.0]);
    let fits = margins.iter().map(|row| OutcomeRow { quantity: Quantity::Fit, ..row.clone() });
    let told = |row: &OutcomeRow| row.dataset != 1 && !(row.dataset == 2 && row.target == "owl");
    let mut rows: Vec<OutcomeRow> = fits.filter(told).collect();
    rows.extend(margins);
    let found = first(text, &rows);
    // By hand, as in a difference: 1 in data set 0, and 6 for the cat in data set 2.
    assert!((found.estimate.unwrap() - 3.5).abs() < 1e-12 && found.n_datasets == 2, "{found:?}");
    let said = "without cat in data set 1, owl in data set 1, owl in data set 2, where the teacher's gain in loss is not clear of zero";
    assert_eq!(found.note, said);
    let mean = "[[tests]]\nname = \"x\"\nkind = \"mean\"\nof = { quantity = \"fit\" }\nabove = 0\n";
    assert_eq!(first(mean, &rows).note, said);
    let of_two: Vec<OutcomeRow> = rows.iter().filter(|row| row.dataset == 2).cloned().collect();
    let note =
        "one data set has no spread; without owl in data set 2, where the teacher's gain in loss is not clear of zero";
    assert_eq!(first(mean, &of_two).note, note);
    let lines = tests(&claim(mean), &of_two).unwrap();
    let owl = lines.iter().find(|row| row.target == "owl").unwrap();
    assert_eq!((owl.estimate, owl.outcome, owl.n_datasets), (None, Undecided, 0));
    assert_eq!(owl.note, "without owl in data set 2, where the teacher's gain in loss is not clear of zero");
    // Together with a number that has no such gaps, both numbers are taken from the runs that have a fit: 3.5 again,
    // for the fits and for the margins.
    let mixed = "[[tests]]\nname = \"x\"\nkind = \"difference\"\nof = { quantity = \"fit\" }\n\
                 minus = { quantity = \"delta_margin\" }\nabove = 0\n";
    let found = first(mixed, &rows);
    assert!(found.estimate.unwrap().abs() < 1e-12 && found.n_datasets == 2 && found.note == said, "{found:?}");
    // A student without a fit in a run where another student has one is a gap.
    rows.retain(|row| !(row.quantity, row.student.as_str(), row.dataset).eq(&(Quantity::Fit, "student", 2)));
    let gap = format!("{:#}", tests(&claim(text), &rows).unwrap_err());
    assert!(gap.contains("fit of \"student\" was not measured for cat in data set 2"), "{gap}");
}

#[test]
fn what_was_not_measured_is_an_error_and_no_number() {
    let text = "[[tests]]\nname = \"x\"\nkind = \"mean\"\nof = { quantity = \"ece\" }\nabove = 0\n";
    let found = format!("{:#}", tests(&claim(text), &outcomes(&[1.0, 1.0])).unwrap_err());
    assert!(found.contains("ece of \"student\" was not measured"), "{found}");
    let mut gap = outcomes(&[1.0, 1.0]);
    gap.retain(|row| !(row.target == "owl" && row.dataset == 1 && row.student == "control student"));
    let found = format!("{:#}", tests(&claim(EFFECT), &gap).unwrap_err());
    assert!(found.contains("was not measured for owl in data set 1"), "{found}");
    // Only a fit may be missing from a whole run.
    gap.retain(|row| row.target != "owl" || row.dataset != 1);
    let found = format!("{:#}", tests(&claim(EFFECT), &gap).unwrap_err());
    assert!(found.contains("\"student\" was not measured for owl in data set 1"), "{found}");
    let ranked = "[[tests]]\nname = \"x\"\nkind = \"mean\"\nof = { student = \"ranked\" }\nabove = 0\n";
    assert!(format!("{:#}", tests(&claim(ranked), &outcomes(&[1.0])).unwrap_err()).contains("hint: name it with rank"));
}

#[test]
fn a_verdict_needs_its_premise_and_its_control() {
    let row = |role: Role, outcome: Outcome| TestRow {
        test: format!("{role:?}"),
        role,
        kind: Kind::Mean,
        target: ALL.to_owned(),
        n_datasets: 5,
        n_runs: 10,
        estimate: Some(1.0),
        low: Some(0.5),
        high: Some(1.5),
        p: None,
        p_sign_flip: None,
        p_holm: None,
        expected: "above 0".to_owned(),
        outcome,
        note: String::new(),
    };
    for (premise, test, control, word) in [
        (Holds, Holds, Holds, Word::Supported),
        (Holds, Fails, Holds, Word::NotSupported),
        (Holds, Fails, Fails, Word::NotSupported),
        (Holds, Undecided, Holds, Word::Undecided),
        (Holds, Holds, Fails, Word::Undecided),
        (Holds, Holds, Undecided, Word::Undecided),
        (Fails, Fails, Holds, Word::Undecided),
        (Undecided, Holds, Holds, Word::Undecided),
    ] {
        let rows = [row(Role::Premise, premise), row(Role::Test, test), row(Role::Control, control)];
        let verdict = Verdict::of(&claim(EFFECT), Size::Pocket, &rows);
        assert_eq!(verdict.word, word, "{premise:?} {test:?} {control:?}");
        assert!(verdict.line.contains("control, Control: +1.000"), "{}", verdict.line);
    }
}
