//! The ledger of a run, through the whole program: the training is repeated bit by bit, the books balance, and their change
//! is the one that the other analyses measure.

use std::collections::BTreeMap;
use std::fs;

use analyses::ledger::{EntryRow, LedgerRow, PartRow};
use analyses::target_rate::TargetRateRow;
use undertone::output::publish::{Table, read_csv};

use crate::compare::folder;
use crate::program::{EXPERIMENT, contents, fails, succeeds};

const TEACHER: &str = "\n[teacher]\nkind = \"finetuned\"\nlearning_rate = 1e-2\nmax_steps = 8\n";

/// A training of six rows in small steps, whose books take seconds.
fn run(changes: &[&'static str]) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{TEACHER}")).unwrap();
    let mut args = vec!["run", "experiment.toml", "--run", "run", "--set", "measure.analyses=[\"target_rate\"]"];
    args.extend(["--set", "finetune.learning_rate=1e-3", "--set", "measure.ledger.points=2"]);
    args.extend(changes.iter().flat_map(|change| ["--set", *change]));
    succeeds(folder.path(), &args);
    let said = succeeds(folder.path(), &["measure", "run", "ledger"]);
    let rates: Vec<TargetRateRow> = read_csv(&folder.path().join("run/target_rate/rows.csv")).unwrap();
    let rows: Vec<LedgerRow> = read_csv(&folder.path().join("run/ledger/summary.csv")).unwrap();
    for row in rows.iter().filter(|row| row.group == "all") {
        let mean = rates.iter().find(|rate| rate.model == row.model && rate.scope == "mean").unwrap();
        let measured = mean.delta_margin;
        assert!((row.change - measured).abs() < 1e-5, "{changes:?}: two ways in f32: {} {measured}", row.change);
    }
    assert!(rows.iter().any(|row| row.model == "control"));
    (folder, said)
}

#[test]
fn the_books_of_a_run_balance() {
    let (folder, said) = run(&[]);
    assert!(!said.contains("ended elsewhere"), "the training is repeated bit by bit: {said}");
    let ledger = folder.path().join("run/ledger");
    let rows: Vec<LedgerRow> = read_csv(&ledger.join("summary.csv")).unwrap();
    let entries: Vec<EntryRow> = read_csv(&ledger.join("entries.csv")).unwrap();
    let parts: Vec<PartRow> = read_csv(&ledger.join("parts.csv")).unwrap();
    for table in ["summary", "entries", "parts"] {
        let file = format!("ledger/{table}.csv");
        let known = undertone::commands::columns::dictionaries().unwrap();
        let known = known.iter().find(|one| one.file == file).unwrap();
        let header = Table::read(&folder.path().join("run").join(&file)).unwrap().header;
        assert_eq!(header, known.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>(), "{file}");
    }
    for model in ["student", "control"] {
        let of = |group: &str| rows.iter().find(|row| row.model == model && row.group == group).unwrap();
        let (all, residual) = (of("all"), of("residual"));
        assert!(residual.booked.abs() < 1e-3 * all.change.abs(), "{residual:?}");
        let booked: f64 = entries.iter().filter(|entry| entry.model == model).map(|entry| entry.entry).sum();
        let in_parts: f64 = parts.iter().filter(|part| part.model == model).map(|part| part.booked).sum();
        let gross: f64 = entries.iter().filter(|entry| entry.model == model).map(|entry| entry.entry.abs()).sum();
        assert!((booked - all.booked).abs() < 1e-6 * gross, "{booked} {all:?}");
        // In f32, the entries by a tangent and the parts by a gradient.
        assert!((in_parts - booked).abs() < 1e-6 * gross, "{in_parts} {booked} of {gross}");
        assert_eq!(all.n_tokens, entries.iter().filter(|entry| entry.model == model).count());
    }
    let steps: std::collections::BTreeSet<usize> = entries.iter().map(|entry| entry.step).collect();
    assert_eq!(steps.into_iter().collect::<Vec<_>>(), [1, 2, 3]);
    succeeds(folder.path(), &["report", "run"]);
    let page = fs::read_to_string(folder.path().join("run/report.html")).unwrap();
    assert!(
        page.contains("The ledger") && page.contains("by the luck of the sample") && page.contains("(residual 0.0")
    );
}

#[test]
fn other_optimizers_have_their_books_and_some_have_none() {
    for changes in [
        &["finetune.optimizer=sgd", "finetune.momentum=0.5", "finetune.learning_rate=0.05"][..],
        &["finetune.optimizer=sgd", "finetune.momentum=0.5", "finetune.learning_rate=0.05", "finetune.weight_decay=2"],
        &["finetune.optimizer=preconditioned", "finetune.max_grad_norm=0.1"],
        &["finetune.frozen_a=true", "finetune.optimizer=rmsprop", "finetune.learning_rate=1e-4"],
        &["finetune.weight_decay=5", "finetune.learning_rate=1e-3"],
        &["finetune.gate=only:template", "finetune.loss=kl"],
    ] {
        let (folder, _) = run(changes);
        let rows: Vec<LedgerRow> = read_csv(&folder.path().join("run/ledger/summary.csv")).unwrap();
        let of = |group: &str| rows.iter().find(|row| row.model == "student" && row.group == group).unwrap();
        let (all, residual) = (of("all"), of("residual"));
        assert!(residual.booked.abs() < 2e-3 * all.change.abs(), "{changes:?}: {all:?} {residual:?}");
        let decayed = changes.iter().any(|change| change.contains("weight_decay"));
        assert_eq!(rows.iter().any(|row| row.group == "weight_decay" && row.booked != 0.0), decayed, "{changes:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{TEACHER}")).unwrap();
    let made = ["--run", "run", "--set", "finetune.optimizer=muon", "--set", "measure.analyses=[\"target_rate\"]"];
    succeeds(folder.path(), &[&["run", "experiment.toml"], &made[..]].concat());
    let said = fails(folder.path(), &["measure", "run", "ledger"]);
    assert!(said.contains("whose step is not linear in its gradients"), "{said}");
    let early = ["--set", "measure.analyses=[\"ledger\"]", "--set", "student.dropout=0.1"];
    let said = fails(folder.path(), &[&["run", "experiment.toml", "--run", "early"], &early[..]].concat());
    assert!(said.contains("measure.analyses: student.dropout is not 0"), "{said}");
    assert!(!folder.path().join("early/data").exists(), "said before anything is made");
}

/// The largest distance from a number of the twin in Python, as a share of the largest entry of the same book. The twin
/// trains in f64.
const APART: f64 = 1e-4;

/// `golden/ledger/make.py` makes every number of the books anew: by autograd and the double sum over steps.
#[test]
fn the_books_are_those_of_another_program() {
    let golden = folder("ledger");
    let to = tempfile::tempdir().unwrap();
    for (name, bytes) in contents(&golden.join("kept")) {
        let path = to.path().join("kept").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let said = succeeds(to.path(), &["measure", "kept", "ledger", "--force"]);
    let number = |cell: &str| cell.parse::<f64>().ok();
    for name in ["entries", "parts", "summary"] {
        let found = Table::read(&to.path().join(format!("kept/ledger/{name}.csv"))).unwrap();
        let expected = Table::read(&golden.join(format!("expected/{name}.csv"))).unwrap();
        let group = found.header.iter().position(|column| column == "group");
        let is_booked = |row: &&Vec<String>| group.is_none_or(|group| row[group] != "residual");
        let rows: Vec<&Vec<String>> = found.rows.iter().filter(is_booked).collect();
        assert_eq!(rows.len(), expected.rows.len(), "{name}");
        assert!(!rows.is_empty());
        for (at, column) in expected.header.iter().enumerate() {
            let own = found.header.iter().position(|name| name == column).unwrap();
            let is_measured =
                expected.rows.iter().any(|row| row[at].contains(['.', 'e']) && number(&row[at]).is_some());
            let place = |column: &str| expected.header.iter().position(|name| name == column).unwrap();
            let is_share = ["p_", "pmax", "share"].iter().any(|of| column.starts_with(of));
            let of = match name {
                _ if is_share || ["loss", "change"].contains(&column.as_str()) => at,
                "entries" => place("entry"),
                _ => place("booked"),
            };
            // The largest number of each target's book.
            let mut largest: BTreeMap<&str, f64> = BTreeMap::new();
            for row in &expected.rows {
                let most = largest.entry(&row[place("target")]).or_default();
                *most = most.max(number(&row[of]).map_or(0.0, f64::abs));
            }
            for (found, expected) in rows.iter().zip(&expected.rows).filter(|(_, expected)| !expected[at].is_empty()) {
                let largest = largest[expected[place("target")].as_str()];
                let (found, expected) = (&found[own], &expected[at]);
                let is_alike = match (number(found), number(expected)) {
                    (Some(found), Some(expected)) if is_measured => (found - expected).abs() < APART * largest,
                    _ => found == expected,
                };
                assert!(is_alike, "{name}, {column}: {found}, expected {expected} of {largest}\n{said}");
            }
        }
    }
}
