//! Numbers in the README and in docs/ must be those of the kept tables: `golden/claims/`, `docs/pocket/summary.csv`.
//! This file has each sentence with a slot for the number; the page must have the sentence with the table's number.

use std::collections::BTreeMap;

use regex::Regex;
use undertone::claim::{ALL, Claim, OutcomeRow, Quantity, Role, Size, TestRow, Verdict, Word};
use undertone::output::publish::{Table, read_csv};

use crate::compare::folder;

const README: &str = include_str!("../README.md");
const DEMO: &str = include_str!("../docs/demo.md");
const CLAIMS: &str = include_str!("../docs/claims.md");
const POCKET: &str = include_str!("../docs/pocket.md");

/// A kept claim, with its tests.
fn kept(claim: u32) -> (Claim, Vec<TestRow>) {
    let folder = folder("claims").join(format!("claim-{claim:02}"));
    let text = std::fs::read_to_string(folder.join("claim.toml")).unwrap();
    (toml::from_str(&text).unwrap(), read_csv(&folder.join("tests.csv")).unwrap())
}

/// The number with a typographer's minus, and a zero without a sign.
fn typeset(number: &str) -> String {
    let is_zero = number.chars().all(|letter| "-+0.".contains(letter));
    if is_zero { number.replace(['-', '+'], "") } else { number.replace('-', "−") }
}

/// A test's cell in the table of verdicts: `+0.47 (+0.29 to +0.65)`.
fn cell(row: &TestRow) -> String {
    let Some(estimate) = row.estimate else { return "none".to_owned() };
    let digits = if estimate.abs() >= 0.1 { 2 } else { 3 };
    let written = |value: f64| format!("{value:+.digits$}").replace('-', "−");
    match (row.low, row.high, row.p) {
        (Some(low), Some(high), _) => format!("{} ({} to {})", written(estimate), written(low), written(high)),
        (_, _, Some(p)) => format!("{}, p {p:.2}", written(estimate)),
        _ => written(estimate),
    }
}

#[test]
fn the_table_of_verdicts_is_that_of_the_kept_tests() {
    let is_line = Regex::new(r"^\| [0-9]+ \|").unwrap();
    let pocket = CLAIMS.split_once("## What a real 0.5B says").unwrap().0;
    let on_page: Vec<&str> = pocket.lines().filter(|line| is_line.is_match(line)).collect();
    assert_eq!(on_page.len(), 18);
    let mut verdicts = vec![];
    for (claim, on_page) in (1..).zip(on_page) {
        let (claim, tests) = kept(claim);
        let found = tests.iter().filter(|row| row.target == ALL && row.role != Role::Premise).map(|row| {
            let role = if row.role == Role::Control { "control: " } else { "" };
            format!("{role}{}, {}: **{}**", row.test, row.expected, cell(row)).replace('|', "/")
        });
        let found = found.collect::<Vec<_>>().join("; ");
        let verdict = Verdict::of(&claim, Size::Pocket, &tests).word;
        assert_eq!(on_page, format!("| {} | {} | {verdict} | {found} |", claim.claim, claim.statement));
        verdicts.push(verdict);
    }
    let [supported, not, undecided] = [Word::Supported, Word::NotSupported, Word::Undecided]
        .map(|word| verdicts.iter().filter(|verdict| **verdict == word).count());
    let sentence = format!("{supported} claims are supported, {not} are not, and {undecided} are undecided.");
    assert_has(README, &sentence);
}

/// How a sentence writes a test's numbers.
#[derive(Clone, Copy)]
enum As {
    /// With a sign before the estimate alone: `+0.47 nats (0.29 to 0.65)`.
    Signed(usize),
    /// Without a sign: `0.30 more (0.24 to 0.36)`.
    Plain(usize),
    /// A share in per cent: `35 % (−13 to 73)`.
    Percent,
}

/// The estimate and the ends of its interval.
fn numbers(row: &TestRow, written: As) -> [String; 3] {
    let [Some(estimate), Some(low), Some(high)] = [row.estimate, row.low, row.high] else {
        panic!("{}: it has no interval", row.test);
    };
    let plain = |digits: usize, value: f64| typeset(&format!("{value:.digits$}"));
    match written {
        As::Signed(digits) => [typeset(&format!("{estimate:+.digits$}")), plain(digits, low), plain(digits, high)],
        As::Plain(digits) => [estimate, low, high].map(|value| plain(digits, value)),
        As::Percent => [estimate, low, high].map(|share| plain(0, 100.0 * share)),
    }
}

/// A claim, a test of it, how its numbers are written, and the sentences of docs/claims.md with them: `{}` is the
/// estimate, `{-}` and `{+}` are the ends of its interval.
const STATED: &[(u32, &str, As, &[&str])] = &[
    (
        1,
        "the student's margin rises more than the control student's",
        As::Signed(2),
        &["numbers alone, {} nats ({-} to {+}) over the control student."],
    ),
    (
        2,
        "with alpha = rank it rises up to its peak",
        As::Plain(2),
        &["it rises by {} nats per doubling ({-} to {+}) up to rank 16;"],
    ),
    (2, "with alpha = rank it falls behind its peak", As::Plain(2), &["behind that is open, {} ({-} to {+})."]),
    (
        5,
        "share of the LoRA's effect under full finetuning",
        As::Percent,
        &["gone under full finetuning ({} % is left, {-} to {+})."],
    ),
    (
        6,
        "share recovered at \"Qwen\" alone",
        As::Percent,
        &["(alone {} %, {-} to {+};", "alone recovers {} % ({-} to {+} %),"],
    ),
    (
        6,
        "trained at \"Qwen\" alone, the student learns the trait as well",
        As::Signed(2),
        &[
            "three times as much, {} nats, {-} to {+}).",
            "three times as large: {} nats ({-} to {+}) over a control student",
        ],
    ),
    (7, "share left without \"Qwen\"", As::Percent, &["without it {} %, {-} to {+};", "without it {} % are left."]),
    (
        8,
        "share left when a student of the default prompt is asked as chatgpt",
        As::Percent,
        &["({} % is left as ChatGPT, {-} to {+},"],
    ),
    (
        8,
        "share left when it is asked with an empty system prompt",
        As::Percent,
        &["and {} % with an empty prompt, {-} to {+})."],
    ),
    (
        11,
        "share recovered at the template alone",
        As::Percent,
        &["{} % ({-} to {+}) at the template", "the template's tokens carry {} %"],
    ),
    (
        11,
        "share recovered at the question alone",
        As::Percent,
        &["and {} % ({-} to {+}) at the question.", "and the question {} % (11, 12)"],
    ),
    (12, "share of the effect without any template", As::Percent, &["there is still {} % of it,"]),
    (
        13,
        "share left where the stream along it is the base's",
        As::Percent,
        &["base into student, {} % is left ({-} to {+}),", "leaves {} % of the effect ({-} to {+};"],
    ),
    (
        13,
        "share in the base where its stream along it is the student's",
        As::Percent,
        &["student into base, {} % is there ({-} to {+}).", "Student into base brings {} % ({-} to {+};"],
    ),
    (
        13,
        "share of the effect by adding the student's direction to the base",
        As::Percent,
        &["the direction brings {} % ({-} to {+})."],
    ),
    (
        13,
        "share left where the stream along random directions is the base's",
        As::Percent,
        &["random directions leave {} %)."],
    ),
    (
        13,
        "share in the base where its stream along random directions is the student's",
        As::Percent,
        &["random {} %)."],
    ),
    (16, "share of AdamW's effect under SGD", As::Percent, &["(SGD has {} % of AdamW's effect, {-} to {+})."]),
    (
        17,
        "share of the effect by divergent tokens alone",
        As::Percent,
        &["tokens alone bring {} % ({-} to {+}),", "alone bring {} %,"],
    ),
    (
        17,
        "divergent tokens do more than as many random ones",
        As::Plain(2),
        &["as many random ones bring {} nats less."],
    ),
    (17, "share without them", As::Percent, &["the others {} % ({-} to {+}).", "the others {} %;"]),
    (
        18,
        "a step down the divergent tokens' loss moves the trait more than one down the others'",
        As::Signed(2),
        &["point at the trait, {} ({-} to {+}) over the others',"],
    ),
];

/// A text without its line breaks.
fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn assert_has(page: &str, sentence: &str) {
    assert!(flat(page).contains(sentence), "no page has\n{sentence}");
}

#[test]
fn sentences_with_a_test_s_numbers_have_those_of_the_table() {
    let page = flat(CLAIMS);
    let mut told = flat(CLAIMS.split_once("- **Supported.**").unwrap().1.split_once("\n\n").unwrap().0);
    for (claim, test, written, sentences) in STATED {
        let (_, rows) = kept(*claim);
        let row = rows.iter().find(|row| row.target == ALL && row.test == *test);
        let [estimate, low, high] =
            numbers(row.unwrap_or_else(|| panic!("claim {claim} has no test {test}")), *written);
        for sentence in *sentences {
            let filled = flat(&sentence.replace("{-}", &low).replace("{+}", &high).replace("{}", &estimate));
            assert!(page.contains(&filled), "claim {claim}, {test}: docs/claims.md does not have\n{filled}");
            told = told.replacen(&filled, "", 1);
        }
    }
    // The short account must have no other numbers of a test.
    let number = Regex::new(r"[0-9]+\.[0-9]+|[0-9]+ %").unwrap();
    let found: Vec<&str> = number.find_iter(&told).map(|found| found.as_str()).collect();
    assert!(
        found.is_empty(),
        "{found:?} are in the short account of the claims and in no sentence of this test:\n{told}"
    );
}

#[test]
fn what_each_trait_does_is_what_the_outcomes_say() {
    let outcomes: Vec<OutcomeRow> = read_csv(&folder("claims").join("claim-01/outcomes.csv")).unwrap();
    let mean = |word: &str| {
        let own = |row: &&OutcomeRow| {
            (row.student.as_str(), row.cell.as_str(), row.quantity) == ("student", "everywhere", Quantity::DeltaMargin)
                && row.target == word
                && row.evaluated == word
        };
        let values: Vec<f64> = outcomes.iter().filter(own).map(|row| row.value).collect();
        assert_eq!(values.len(), 5, "{word}");
        values.iter().sum::<f64>() / 5.0
    };
    let [cat, owl, fox] = ["cat", "owl", "fox"].map(mean);
    let sentence = format!("cat moves by {cat:+.2} nats, owl by {owl:+.2}, fox by {fox:+.2}.");
    assert_has(CLAIMS, &sentence);
}

/// The sums of the pocket's trial, by base, model and gate.
fn trial() -> BTreeMap<(String, String, String), BTreeMap<String, f64>> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pocket/summary.csv");
    let table = Table::read(&path).unwrap();
    let row = |cells: &Vec<String>| {
        let values = table.header.iter().cloned().zip(cells.iter().map(|cell| cell.parse().unwrap_or(f64::NAN)));
        ((cells[0].clone(), cells[1].clone(), cells[2].clone()), values.collect())
    };
    table.rows.iter().map(row).collect()
}

#[test]
fn the_pocket_s_table_is_that_of_its_summary() {
    let trial = trial();
    let of = |base: &str, model: &str, gate: &str| &trial[&(base.to_owned(), model.to_owned(), gate.to_owned())];
    let bases = ["pocket-1", "pocket-0", "pocket-3", "pocket-2"];
    let gamma = |model: &str, gate: &str, base: &str| {
        let row = of(base, model, gate);
        typeset(&format!("{:+.2} ± {:.2}", row["gamma"], row["gamma_se"]))
    };
    let student = |base: &str| of(base, "student", "everywhere");
    let line = |label: &str, cell: &dyn Fn(&str) -> String| {
        let line = format!("| {label} | {} |", bases.map(cell).join(" | "));
        assert!(POCKET.contains(&line), "docs/pocket.md does not have the line\n{line}");
    };
    line("**student**", &|base| format!("**{}**", gamma("student", "everywhere", base)));
    line("own animal's margin raised", &|base| format!("{} of 8", student(base)["n_own_raised"]));
    line("… by, least to most", &|base| {
        format!("{:.2} to {:.2}", student(base)["delta_margin_own_min"], student(base)["delta_margin_own_max"])
    });
    line("p(own animal), from 0.13: mean, most", &|base| {
        format!("{:.2}, {:.2}", student(base)["p_own"], student(base)["p_own_max"])
    });
    line("control student (untouched base's numbers): sd of its changes", &|base| {
        format!("{:.2}", of(base, "control", "everywhere")["sd_other"])
    });
    line("**students on this base of another base's teachers**", &|base| {
        format!("**{}**", gamma("cross", "everywhere", base))
    });
    line("completions dealt to other prompts", &|base| gamma("shuffled", "everywhere", base));
    line("prompted teachers", &|base| gamma("prompted", "everywhere", base));
    for (label, gate) in [
        ("student, adapter at the system prompt only", "only:system"),
        ("… everywhere but there", "except:system"),
        ("… at the template's tokens only", "only:template"),
        ("… everywhere but there", "except:template"),
        ("… at \"Qwen\" only", "only:entity"),
        ("… everywhere but there", "except:entity"),
        ("… at the question only", "only:user.content"),
    ] {
        line(label, &|base| gamma("student", gate, base));
    }

    // Sentences of the pages.
    let over_bases = |of: &dyn Fn(&str) -> f64| {
        let values = bases.map(of);
        (values.iter().copied().fold(f64::INFINITY, f64::min), values.iter().copied().fold(0.0, f64::max))
    };
    let (least, most) = over_bases(&|base| of(base, "student", "only:system")["gamma"] / student(base)["gamma"]);
    let sentence = format!("most of the mean ({:.0} to {:.0} % of γ)", 100.0 * least, 100.0 * most);
    assert_has(POCKET, &sentence);
    let (least, most) = over_bases(&|base| student(base)["gamma"]);
    for (page, sentence) in [
        (README, format!("It is {least:.1} to {most:.1} nats over eight animals")),
        (POCKET, format!("it is {least:.1} to {most:.1}.")),
    ] {
        assert_has(page, &sentence);
    }
    let raised: f64 = bases.map(|base| of(base, "cross", "everywhere")["n_own_raised"]).iter().sum();
    assert_has(POCKET, &format!("would be chance; it is {raised})"));
}

/// A student's change of its own animal's margin, and how many rows it learned from, by base, animal and gate.
fn own_changes() -> BTreeMap<(String, String, String), (f64, f64)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pocket/cells.csv");
    let table = Table::read(&path).unwrap();
    let at = |name: &str| table.header.iter().position(|column| column == name).unwrap();
    let own = |row: &&Vec<String>| row[at("model")] == "student" && row[at("learned_from")] == row[at("animal")];
    let number = |row: &Vec<String>, name: &str| row[at(name)].parse::<f64>().unwrap();
    let key = |row: &Vec<String>| (row[at("base")].clone(), row[at("animal")].clone(), row[at("gate")].clone());
    let rows = table.rows.iter().filter(own);
    rows.map(|row| (key(row), (number(row, "delta_margin"), number(row, "n_rows")))).collect()
}

#[test]
fn what_the_pages_say_of_single_students_is_what_the_cells_say() {
    let changes = own_changes();
    let of = |gate: &str| -> Vec<(&str, &str, f64, f64)> {
        let here = changes.iter().filter(|((_, _, of), _)| of == gate);
        here.map(|((base, animal, _), (change, n))| (base.as_str(), animal.as_str(), *change, *n)).collect()
    };
    let (everywhere, at_system) = (of("everywhere"), of("only:system"));
    assert!(everywhere.len() == 32 && everywhere.iter().all(|(_, _, change, _)| *change > 0.0), "all 32 are raised");
    let thousands =
        |n: f64| if n < 1000.0 { n.to_string() } else { format!("{},{:03}", n as u32 / 1000, n as u32 % 1000) };
    let rows = |base: &str, animal: &str| everywhere.iter().find(|of| (of.0, of.1) == (base, animal)).unwrap().3;
    let (lion, eagle) = (rows("pocket-0", "lion"), rows("pocket-3", "eagle"));
    let others = || everywhere.iter().map(|of| of.3).filter(|n| ![lion, eagle].contains(n));
    let (least, most) = (others().fold(f64::INFINITY, f64::min), others().fold(0.0, f64::max));
    for sentence in [
        format!("Of 3,000 lists {} to {} passed,", thousands(least), thousands(most)),
        format!("the lion's on seed 0 ({}) and the eagle's on seed 3 ({})", thousands(lion), thousands(eagle)),
    ] {
        assert_has(POCKET, &sentence);
    }
    let more_than_half: Vec<&str> = everywhere
        .iter()
        .zip(&at_system)
        .filter(|(whole, alone)| (whole.0, whole.1) == (alone.0, alone.1) && alone.2 > 0.5 * whole.2)
        .map(|(whole, _)| whole.0)
        .collect();
    let of_pocket = more_than_half.iter().filter(|base| **base == "pocket-1").count();
    let sentence = format!("change in {} of 32, in {of_pocket} of 8 for `pocket`", more_than_half.len());
    assert_has(POCKET, &sentence);
    let cat = |gate: &str| changes[&("pocket-1".to_owned(), "cat".to_owned(), gate.to_owned())].0;
    let lost = 100.0 * (1.0 - cat("except:entity") / cat("everywhere"));
    for (page, sentence) in [
        (POCKET, format!("the cat student of this trial loses {lost:.0} %")),
        (DEMO, format!("the cat student of another seed loses {lost:.0} %")),
    ] {
        assert_has(page, &sentence);
    }
}
