//! Claims: a whole one on the pocket model, and the tables of real ones that are kept, from which the same tests follow.

#![expect(clippy::float_cmp, reason = "what is the same is the same bit by bit")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::TempDir;
use undertone::claim::run::{ClaimOptions, run};
use undertone::claim::tables::{ClaimRunRow, ContextRow, DigitConfRow, MatrixRow, SpectrumRow, SteerRow};
use undertone::claim::verdict_table::verdicts;
use undertone::claim::{Claim, EVERYWHERE, OutcomeRow, Quantity, Size, THROUGH, TestRow, tests};
use undertone::output::publish::{Table, read_csv, to_csv};

use crate::program::undertone;

const SIZE: &str = r#"
[values]
ranks = [1, 4]
other = "chatgpt"

[experiment]
model = "pocket"
protocol = "pocket"
seed = 3

[experiment.teacher]
kind = "finetuned"
max_steps = 40

[experiment.generate]
n_prompts = 200
n_keep = 40
n_heldout = 64
max_new_tokens = 24

[experiment.student]
rank = 2
alpha = 4

[experiment.finetune]
learning_rate = 1e-2
max_steps = 4
warmup_steps = 0
batch_size = 8
gradient_accumulation_steps = 1

[experiment.measure]
n_questions = 4
"#;

const CLAIM: &str = r#"
claim = 6
statement = "Twelve rows teach nothing"
source = "nobody"
decisive_control = "the control student"
targets = [{ word = "cat", category = "animal" }, { word = "owl", category = "animal" }]
datasets = 2
measures = ["matrix", "heldout", "direction", "steering", "replacement", "gradients", "sampled", "spectrum", "ledger"]
measured_on = { replacement = ["student"], ledger = ["student", "control student"], spectrum = ["student", "alpha = rank", "all weights"] }

[[students]]
name = "alpha = rank"
ranks = "{ranks}"
set = ["student.alpha={rank}"]

[[students]]
name = "all weights"
set = ["student.method=full", "finetune.learning_rate=1e-3"]

[[students]]
name = "random tokens"
set = ["finetune.tokens=random"]

[[students]]
name = "plain text, half way"
set = ["student.template=false", "student.rotated=true", "finetune.stop_after_steps=2", "finetune.optimizer=muon"]

[[chosen]]
name = "the better fit"
of = ["student", "random tokens"]
lowest = "heldout_nll"

[[cells]]
name = "only Qwen"
students = ["student"]
gate = "only:entity"

[[cells]]
name = "nowhere, in another context"
students = ["student"]
context = "{other}"
gate = "nowhere"

[[cells]]
name = "{other}"
context = "{other}"

[[cells]]
name = "in the user's turn"
students = ["student", "all weights"]
context = "qwen_default"
user_prefix = "qwen_default"

[[tests]]
name = "effect"
kind = "difference"
minus = { student = "control student" }
above = 0

[[tests]]
name = "slope"
kind = "slope"
of = { student = "alpha = rank", quantity = "overconfidence" }
over = "log2_rank"
above = 0

[[tests]]
name = "same digits"
kind = "difference"
of = { quantity = "ledger_net", cell = "at same_digit" }
minus = { student = "control student", quantity = "ledger_net", cell = "at same_digit" }
above = 0

[[tests]]
name = "own traits"
role = "control"
kind = "diagonal"
above = 0

[[figures]]
kind = "ranks"
title = "over the rank"
quantities = ["delta_margin", "heldout_nll"]

[[figures]]
kind = "matrix"
title = "matrix"

[[figures]]
kind = "bars"
title = "bars"
"#;

/// A folder with a claim and its size.
fn begun() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("sizes")).unwrap();
    fs::write(folder.path().join("sizes/pocket.toml"), SIZE).unwrap();
    let path = folder.path().join("06.toml");
    fs::write(&path, CLAIM).unwrap();
    (folder, path)
}

fn ask(path: &Path, root: &Path) -> anyhow::Result<()> {
    let (size, changes, folder) = (Size::Pocket, &[][..], Some(root));
    run(&ClaimOptions { path, size, folder, changes, dry_run: false, plan: false, force: false })
}

fn changed(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

#[test]
fn a_claim_runs_to_its_verdict_and_goes_on() {
    let (folder, path) = begun();
    let root = folder.path().join("runs");
    ask(&path, &root).unwrap();
    let claim = root.join("claim-06");
    let outcomes: Vec<OutcomeRow> = read_csv(&claim.join("outcomes.csv")).unwrap();
    let of = |student: &str, cell: &str, quantity: Quantity| -> Vec<&OutcomeRow> {
        let rows = outcomes.iter().filter(|row| row.student == student && row.cell == cell && row.quantity == quantity);
        rows.collect()
    };
    // Two traits in two data sets, each asked for both traits.
    assert_eq!(of("student", "everywhere", Quantity::DeltaMargin).len(), 8);
    assert_eq!(of("student", "only Qwen", Quantity::DeltaMargin).len(), 4);
    // A gate acts, and the base that a student is set against was asked in the same context.
    let margin = |cell: &str| of("student", cell, Quantity::DeltaMargin)[0].value;
    assert!((margin("only Qwen") - margin("everywhere")).abs() > 1e-4);
    let base = |cell: &str| of("student", cell, Quantity::BasePTargetExact)[0].value;
    assert!((base("everywhere") - base("chatgpt")).abs() > 1e-6);
    assert!(margin("nowhere, in another context").abs() < 1e-6, "{}", margin("nowhere, in another context"));
    assert_eq!(of("control student", "only Qwen", Quantity::DeltaMargin).len(), 0, "the cell is for the student");
    for (quantity, of_student, of_control) in [
        (Quantity::CosTeacher, 4, 4),
        (Quantity::InjectedOtherDeltaMargin, 4, 4),
        (Quantity::ReplacedDeltaMargin, 4, 0),
        (Quantity::StableRank, 4, 0),
    ] {
        let n = |student: &str| of(student, "everywhere", quantity).len();
        assert_eq!((n("student"), n("control student")), (of_student, of_control), "{quantity}");
    }
    assert_eq!(of("all weights", "chatgpt", Quantity::DeltaMargin).len(), 4);
    assert_eq!(of("alpha = rank", "everywhere", Quantity::HeldoutNll).len(), 8, "two ranks");
    for quantity in
        [Quantity::PTarget, Quantity::CosTeacher, Quantity::Ev1, Quantity::GradientShareDivergent, Quantity::StableRank]
    {
        assert_eq!(of("student", "everywhere", quantity).len(), 4, "{quantity}");
    }
    assert_eq!(of("all weights", "everywhere", Quantity::GradientCosine).len(), 0, "there is no adapter");
    assert_eq!(of("all weights", "everywhere", Quantity::ChangedFraction).len(), 4);
    for name in ["base", "teacher"] {
        assert_eq!(of(name, "everywhere", Quantity::HeldoutNll).len(), 4, "{name}");
    }
    let value = |student: &str, quantity| of(student, "everywhere", quantity)[0].value;
    assert!(value("teacher", Quantity::KlTeacher).abs() < 1e-9 && value("base", Quantity::KlTeacher) > 1e-6);
    let prefix = |cell: &str| of("student", cell, Quantity::SharedPrefix)[0].value;
    assert!(prefix("everywhere") > prefix("chatgpt") && prefix("chatgpt") > 0.0);
    let learned = |student: &str| of(student, "everywhere", Quantity::NTargets)[0].value;
    assert!(learned("random tokens") < learned("student"), "of each row as many as are divergent");

    // Of the two that were there to choose from, the one that fits better, line by line.
    let at = |student: &str, quantity: Quantity, like: &OutcomeRow| {
        let here = of(student, "everywhere", quantity).into_iter();
        here.filter(|row| (&row.target, row.dataset) == (&like.target, like.dataset))
            .map(|row| row.value)
            .next()
            .unwrap()
    };
    for chosen in of("the better fit", "everywhere", Quantity::Chosen) {
        let nll = |student: &str| at(student, Quantity::HeldoutNll, chosen);
        let better = usize::from(nll("random tokens") < nll("student"));
        assert_eq!(chosen.value, better as f64);
        assert_eq!(nll("the better fit"), nll(["student", "random tokens"][better]));
    }
    // A student that stopped half way and learned without a template: its prompts, in plain text, share no template
    // tokens.
    assert_eq!(of("plain text, half way", "everywhere", Quantity::LossLast)[0].n, 2, "steps");
    let shared = |student: &str| of(student, "everywhere", Quantity::SharedTokens)[0].value;
    assert!(shared("plain text, half way") < 2.0 && shared("student") > 5.0);
    let base = |student: &str| of(student, "everywhere", Quantity::BasePTargetExact)[0].value;
    assert!((base("plain text, half way") - base("student")).abs() > 1e-6);

    // The tables of one kind are the same numbers.
    let runs: Vec<ClaimRunRow> = read_csv(&claim.join("runs.csv")).unwrap();
    assert_eq!(runs.len(), 4 * 7, "the run's own two, two ranks, and three more, in four runs");
    let half = runs.iter().find(|run| run.student == "plain text, half way").unwrap();
    assert!(!half.template && half.rotated && half.stop_after_steps == Some(2) && half.base_model == "pocket");
    let matrix: Vec<MatrixRow> = read_csv(&claim.join("matrix.csv")).unwrap();
    let own = of("student", "everywhere", Quantity::DeltaMargin);
    let of_student: Vec<&MatrixRow> = matrix.iter().filter(|row| row.student == "student").collect();
    assert_eq!(
        of_student.iter().map(|row| row.delta_margin).collect::<Vec<_>>(),
        own.iter().map(|row| row.value).collect::<Vec<_>>()
    );
    let contexts: Vec<ContextRow> = read_csv(&claim.join("context.csv")).unwrap();
    let cells: Vec<(&str, bool)> = contexts
        .iter()
        .filter(|row| row.student == "student" && row.dataset == 0 && row.target == "cat")
        .map(|row| (row.cell.as_str(), row.matched))
        .collect();
    assert_eq!(cells.len(), 3, "what is gated is no context: {cells:?}");
    assert!(
        cells.contains(&("everywhere", true))
            && cells.contains(&("chatgpt", false))
            && cells.contains(&("in the user's turn", false))
    );
    let digits: Vec<DigitConfRow> = read_csv(&claim.join("digit_conf.csv")).unwrap();
    let teacher = digits.iter().find(|row| row.student == "teacher" && row.group == "divergent").unwrap();
    assert_eq!(teacher.acc, Some(1.0), "the teacher agrees with itself");
    let all = digits.iter().find(|row| row.student == "base" && row.group == "all").unwrap();
    assert!((all.conf.unwrap() - all.acc.unwrap() - all.overconf.unwrap()).abs() < 1e-12);
    let steer: Vec<SteerRow> = read_csv(&claim.join("steer.csv")).unwrap();
    let kinds: BTreeSet<(&str, &str)> = steer.iter().map(|row| (row.edit.as_str(), row.direction.as_str())).collect();
    assert_eq!(kinds.len(), 10, "another trait's student among them: {kinds:?}");
    let injected = |student: &str, direction: &str| {
        let here = steer.iter().find(|row| {
            row.student == student && (row.edit.as_str(), row.direction.as_str()) == ("injected", direction)
        });
        here.unwrap().delta_margin
    };
    assert_ne!(injected("student", "other"), injected("student", "own"), "another trait's student is another one");
    assert_ne!(injected("student", "other"), injected("student", "control"));
    // Its own direction is the control student's where the control student itself is measured.
    let (own, control) = (injected("control student", "own"), injected("control student", "control"));
    assert!((own - control).abs() < 1e-5 && own != 0.0, "{own} {control}");
    let spectrum: Vec<SpectrumRow> = read_csv(&claim.join("spectrum.csv")).unwrap();
    assert_eq!(spectrum.iter().map(|row| row.k).max(), Some(3), "of rank 4");
    assert!(spectrum.iter().all(|row| row.sigma_norm <= 1.0 && row.stable_rank >= 1.0 && row.sigma > 0.0));
    let (drawn, page) = (fs::read_to_string(claim.join("spectrum.svg")), fs::read_to_string(claim.join("report.html")));
    assert!(drawn.unwrap().contains("σ_k / σ_1") && page.unwrap().contains("id=\"spectrum\""));
    let outcomes: Vec<OutcomeRow> = read_csv(&claim.join("outcomes.csv")).unwrap();
    let cut = outcomes.iter().filter(|row| row.quantity == Quantity::TruncatedDeltaMargin);
    let cut: Vec<(&str, f64)> = cut.map(|row| (row.student.as_str(), row.value)).collect();
    assert!(cut.len() == 4 && cut.iter().all(|(student, value)| *student == "all weights" && *value != 0.0), "{cut:?}");
    // What the parts of a chat add to the divergent tokens' alignment is all of it.
    let aligned = |student: &str, whole: bool| -> f64 {
        let of = outcomes.iter().filter(|row| {
            row.quantity == Quantity::AlignmentDivergent
                && row.student == student
                && (row.cell == EVERYWHERE) == whole
                && (whole || row.cell.starts_with(THROUGH))
        });
        of.map(|row| row.value).sum()
    };
    let (whole, parts) = (aligned("student", true), aligned("student", false));
    assert!(whole != 0.0 && (whole - parts).abs() < 1e-4 * whole.abs().max(1e-3), "{whole} {parts}");

    // What a ledger books to groups of tokens, to parts of the chat, blocks and maps is each time all of it.
    for student in ["student", "control student"] {
        let sum = |quantity: Quantity, belongs: &dyn Fn(&str) -> bool| -> f64 {
            let of = outcomes.iter().filter(|row| row.student == student && row.quantity == quantity);
            of.filter(|row| (&row.target[..], row.dataset) == ("owl", 1) && belongs(&row.cell))
                .map(|row| row.value)
                .sum()
        };
        let everywhere = |quantity| sum(quantity, &|cell| cell == EVERYWHERE);
        let booked = everywhere(Quantity::LedgerBooked);
        let tokens = ["at first_digit", "at later_digit", "at other"];
        let gross = everywhere(Quantity::LedgerGross) + booked.abs();
        for cells in [
            sum(Quantity::LedgerBooked, &|cell| tokens.contains(&cell)),
            sum(Quantity::LedgerBooked, &|cell| cell.starts_with("written ")),
            sum(Quantity::LedgerBooked, &|cell| cell.starts_with("read ")),
            sum(Quantity::LedgerBooked, &|cell| cell.starts_with("block ")),
            sum(Quantity::LedgerBooked, &|cell| cell.starts_with("map ")),
            everywhere(Quantity::LedgerNet) + everywhere(Quantity::LedgerLuck),
        ] {
            assert!(gross > 0.0 && (cells - booked).abs() < 1e-4 * gross, "{student}: {cells} {booked} of {gross}");
        }
        let change = sum(Quantity::DeltaMargin, &|cell| cell == EVERYWHERE);
        let evaluated: f64 = outcomes
            .iter()
            .filter(|row| row.student == student && (&row.target[..], &row.evaluated[..]) == ("owl", "cat"))
            .filter(|row| row.dataset == 1 && row.quantity == Quantity::DeltaMargin && row.cell == EVERYWHERE)
            .map(|row| row.value)
            .sum();
        let missed = change - evaluated - booked - everywhere(Quantity::LedgerResidual);
        assert!(missed.abs() < 1e-4, "{student}: {missed}");
        let [drive, pull] = [Quantity::LedgerDrive, Quantity::LedgerPull].map(everywhere);
        let by_author = if student == "student" { drive + pull } else { pull };
        assert!(
            (by_author - everywhere(Quantity::LedgerNet)).abs() < 1e-9,
            "the base wrote the control student's rows"
        );
        assert_eq!(of(student, EVERYWHERE, Quantity::LedgerNetOther).len(), 4);
        assert_eq!(of(student, EVERYWHERE, Quantity::LedgerDrive).len(), if student == "student" { 4 } else { 0 });
    }

    let header = |name: &str| Table::read(&claim.join(name)).unwrap().header;
    for one in undertone::commands::columns::dictionaries().unwrap() {
        let Some(file) = one.file.strip_prefix("claim/") else { continue };
        assert_eq!(header(file), one.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>(), "{file}");
    }
    let page = fs::read_to_string(claim.join("report.html")).unwrap();
    assert!(page.contains("At pocket size: ") && page.matches("<svg").count() == 4);
    let verdict = fs::read_to_string(claim.join("verdict.txt")).unwrap();
    assert!(verdict.starts_with("Claim 6 at pocket size: ") && verdict.contains("control, own traits"), "{verdict}");
    assert!(page.contains("pocket model"), "the banner says what the model is");

    // Given again, nothing is trained or measured; the same page comes from the tables.
    let (adapter, table) = (root.join("cat-d0/train.csv"), claim.join("units/cat-d0.csv"));
    let before = [changed(&adapter), changed(&table)];
    ask(&path, &root).unwrap();
    assert_eq!([changed(&adapter), changed(&table)], before);
    assert_eq!(fs::read_to_string(claim.join("report.html")).unwrap(), page);

    // With another test in the claim, nothing is measured again. With another condition, students are measured but not
    // trained again. Another claim shares the runs.
    fs::write(&path, CLAIM.replace("above = 0", "above = 0.5")).unwrap();
    ask(&path, &root).unwrap();
    assert_eq!([changed(&adapter), changed(&table)], before);
    assert!(fs::read_to_string(claim.join("tests.csv")).unwrap().contains("above 0.5"));
    fs::write(&path, CLAIM.replace("only:entity", "only:template")).unwrap();
    ask(&path, &root).unwrap();
    assert_eq!(changed(&adapter), before[0]);
    assert!(changed(&table) > before[1]);
    let other = folder.path().join("07.toml");
    fs::write(&other, CLAIM.replace("claim = 6", "claim = 7").replace("datasets = 2", "datasets = 1")).unwrap();
    ask(&other, &root).unwrap();
    assert_eq!(changed(&adapter), before[0]);
    let tests: Vec<TestRow> = read_csv(&root.join("claim-07/tests.csv")).unwrap();
    assert!(tests.iter().all(|row| row.low.is_none()), "one data set has no interval");
}

#[test]
fn a_cell_that_no_ledger_has_is_refused_before_anything_is_trained() {
    let (folder, path) = begun();
    let root = folder.path().join("runs");
    for (from, to, said) in [
        ("cell = \"at same_digit\" }\nminus", "cell = \"at same_digits\" }\nminus", "unknown cell \"at same_digits\""),
        (
            "\"ledger_net\", cell = \"at same_digit\" }\nminus",
            "\"ledger_gross\", cell = \"at same_digit\" }\nminus",
            "unknown cell",
        ),
        (
            "\"ledger_net\", cell = \"at same_digit\" }\nminus",
            "\"ledger_excess\" }\nminus",
            "booked to groups of tokens",
        ),
    ] {
        assert!(CLAIM.contains(from), "{from}");
        fs::write(&path, CLAIM.replace(from, to)).unwrap();
        let error = format!("{:#}", ask(&path, &root).unwrap_err());
        assert!(error.contains(said) && error.contains("same digits"), "{error}");
    }
    assert!(!root.exists());
}

#[test]
fn a_size_without_held_out_numbers_is_refused_where_they_are_needed() {
    let (folder, path) = begun();
    fs::write(folder.path().join("sizes/pocket.toml"), SIZE.replace("n_heldout = 64\n", "")).unwrap();
    let error = format!("{:#}", ask(&path, &folder.path().join("runs")).unwrap_err());
    assert!(error.contains("run cat-d0: no numbers are held out") && error.contains("generate.n_heldout"), "{error}");
}

#[test]
fn a_gate_that_selects_nothing_is_refused_before_anything_is_trained() {
    let (folder, path) = begun();
    let plain = "students = [\"plain text, half way\"]\ngate = 'only:user.header'";
    fs::write(&path, CLAIM.replace("students = [\"student\"]\ngate = \"only:entity\"", plain)).unwrap();
    let root = folder.path().join("runs");
    let error = format!("{:#}", ask(&path, &root).unwrap_err());
    let expected = "cell \"only Qwen\", in which \"plain text, half way\" is asked: gate only:user.header selects no token of the prompt";
    assert!(error.starts_with(expected), "{error}");
    assert!(!root.join("cat-d0").exists(), "a run was begun");
}

/// The tables of real claims, kept in golden/claims, from which `tests/check_claims.py` makes the same numbers by other formulas.
#[test]
fn the_kept_tables_give_the_kept_tests() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/claims");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.is_dir() {
            continue; // make.py
        }
        let claim: Claim = toml::from_str(&fs::read_to_string(folder.join("claim.toml")).unwrap()).unwrap();
        let outcomes: Vec<OutcomeRow> = read_csv(&folder.join("outcomes.csv")).unwrap();
        let found = to_csv(&tests(&claim, &outcomes).unwrap()).unwrap();
        assert_eq!(found, fs::read_to_string(folder.join("tests.csv")).unwrap(), "{}", folder.display());
        seen += 1;
    }
    assert!(seen >= 4, "{seen}");
}

#[test]
fn the_table_of_verdicts_on_the_page_is_made_from_the_kept_claims() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/claims");
    let page = include_str!("../docs/claims.md");
    let table = verdicts(&kept).unwrap();
    assert!(page.contains(&table) && table.lines().count() == 2 + 18, "docs/claims.md does not have\n{table}");
    let printed = undertone(Path::new("."), &["report", &kept.display().to_string()]);
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), table);
    let empty = TempDir::new().unwrap();
    let error = format!("{:#}", verdicts(empty.path()).unwrap_err());
    assert!(error.contains("holds no claim; hint: undertone run"), "{error}");
    fs::create_dir(empty.path().join("claim-01")).unwrap();
    fs::copy(kept.join("claim-01/claim.toml"), empty.path().join("claim-01/claim.toml")).unwrap();
    let error = format!("{:#}", verdicts(empty.path()).unwrap_err());
    assert!(error.contains("tests.csv"), "a claim without its tests is named: {error}");
}
