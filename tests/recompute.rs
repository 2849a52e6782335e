//! Compares a fresh run with a small kept run, every number of which was recomputed with transformers, PEFT and PyTorch
//! as docs/redo-a-number.md says (`golden/recompute/make.py`).

use std::fs;

use tempfile::TempDir;
use undertone::output::publish::Table;

use crate::compare::folder;
use crate::program::{contents, succeeds};

/// How far a number may be from the recomputed one, relative to the largest in its column (for an error, in the column
/// that it is the error of). Recomputed numbers are f64, ours f32: the last place of a log-probability of -50 is 4e-6.
const SHARE: f64 = 1e-5;

/// Tables and columns whose numbers may be further away, how far, and why.
const FURTHER: [(&str, &str, f64, &str); 2] = [
    ("divergence_summary", "soft", 1e-4, "a mean of differences of logs, which nearly cancel"),
    (
        "gradients",
        "alignment",
        5e-5,
        "a product of two gradients that nearly stand at a right angle: both are off by up to 1e-5",
    ),
];

/// Cells that are not recomputed, and why: a table, its rows in which a column contains a text, and their column, or
/// `*` for every column.
const NOT_MADE: [(&str, (&str, &str), &str, &str); 3] = [
    (
        "train",
        ("step", ""),
        "*",
        "ten steps are: rounding carries two trainings apart, as Adam divides by what is nearly zero",
    ),
    ("control_train", ("step", ""), "*", "the same"),
    ("gradients", ("model", "start_draw"), "*", "adapters drawn beside the start, which the folder does not hold"),
];

/// The recomputed tables, by the names of their files.
const TABLES: [&str; 10] = [
    "target_rate",
    "token_ablation",
    "position_scan",
    "lens",
    "interventions",
    "direction",
    "steering",
    "divergence",
    "divergence_summary",
    "gradients",
];

/// The experiment and its kept run, copied into a new folder.
fn copied() -> TempDir {
    let to = tempfile::tempdir().unwrap();
    for (name, bytes) in contents(&folder("recompute")).into_iter().filter(|(name, _)| !name.starts_with("__pycache__"))
    {
        let path = to.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    to
}

fn expected(name: &str) -> Table {
    Table::read(&folder("recompute").join("expected").join(format!("{name}.csv"))).unwrap()
}

/// The column whose error a column is; any other column itself.
fn value_of<'a>(column: &'a str, header: &[String]) -> &'a str {
    match column.strip_suffix("_se") {
        Some(value) if header.iter().any(|name| name == value) => value,
        _ => column,
    }
}

fn is_listed((table, column): (&str, &str), (of_table, of_column): (&str, &str)) -> bool {
    table == of_table && (of_column == "*" || column == of_column)
}

/// The cells of our table that are wrong, and how many numbers were compared.
fn wrong(name: &str, ours: &Table, made: &Table) -> (Vec<String>, usize) {
    assert_eq!(ours.header, made.header, "{name}");
    assert_eq!(ours.rows.len(), made.rows.len(), "{name}");
    let number = |cell: &str| cell.parse::<f64>().ok();
    let at = |column: &str| made.header.iter().position(|name| name == column).unwrap();
    let largest = |column: &str| {
        made.rows.iter().filter_map(|row| number(&row[at(column)])).fold(0.0, |most, x: f64| x.abs().max(most))
    };
    let (mut problems, mut n, mut worst) = (vec![], 0, (0.0, "no column"));
    for (index, column) in made.header.iter().map(String::as_str).enumerate() {
        let further = FURTHER.iter().find(|(table, of, ..)| is_listed((name, column), (*table, *of)));
        let share = further.map_or(SHARE, |(_, _, share, _)| *share);
        let scale = largest(column).max(largest(value_of(column, &made.header)));
        for (line, (row, made_row)) in ours.rows.iter().zip(&made.rows).enumerate() {
            let is_in = |list: &[(&str, (&str, &str), &str, &str)]| {
                let here = |(of, text): (&str, &str)| made_row[at(of)].contains(text);
                list.iter().any(|(table, place, of, _)| is_listed((name, column), (*table, *of)) && here(*place))
            };
            let (ours, made) = (row[index].as_str(), made_row[index].as_str());
            let is_right = match (number(ours), number(made)) {
                _ if made == "?" => is_in(&NOT_MADE[..]),
                (Some(ours), Some(made)) => {
                    let apart = (ours - made).abs();
                    n += 1;
                    if further.is_none() && scale > 0.0 && apart / scale > worst.0 {
                        worst = (apart / scale, column);
                    }
                    apart <= share * scale
                }
                _ => ours == made,
            };
            if !is_right {
                problems.push(format!("{name}, line {}, {column}: {ours:?}, made anew {made:?}", line + 2));
            }
        }
    }
    eprintln!("{name}: {n} numbers, at most {:.1e} of the largest apart, in {}", worst.0, worst.1);
    (problems, n)
}

#[test]
fn every_table_is_what_others_make_of_the_same_run() {
    let folder = copied();
    let kept = folder.path().join("kept");
    let measured = |name: &str| match name {
        "divergence_summary" => kept.join("divergence/summary.csv"),
        name => kept.join(name).join("rows.csv"),
    };
    for name in TABLES {
        fs::remove_file(measured(name)).unwrap();
    }
    let said = succeeds(folder.path(), &["run", "experiment.toml", "--run", "kept"]);
    assert!(said.contains("generate: done already") && said.contains("finetune: student is done already"), "{said}");
    let (mut problems, mut n) = (vec![], 0);
    for name in TABLES {
        let (of_table, compared) = wrong(name, &Table::read(&measured(name)).unwrap(), &expected(name));
        problems.extend(of_table);
        n += compared;
    }
    let shown: Vec<&String> = problems.iter().take(20).collect();
    assert!(problems.is_empty(), "{} of {n} numbers are others: {shown:#?}", problems.len());
    assert!(n > 8000, "{n} numbers were compared");
}

#[test]
fn the_first_steps_of_a_training_are_what_others_make_from_the_folder() {
    let folder = copied();
    let at = |name: &str| folder.path().join("kept").join(name);
    let kept = contents(&folder.path().join("kept"));
    for name in ["train.csv", "control_train.csv", "train_rows.csv", "control_train_rows.csv"] {
        fs::remove_file(at(name)).unwrap();
    }
    for name in ["adapter", "control_adapter", "initial_adapter"] {
        fs::remove_dir_all(at(name)).unwrap();
    }
    succeeds(folder.path(), &["finetune", "experiment.toml", "--run", "kept"]);
    // The recomputed training began with this adapter and had this order of rows.
    for name in ["initial_adapter/adapter_model.safetensors", "train_rows.csv", "control_train_rows.csv"] {
        assert_eq!(fs::read(at(name)).unwrap(), kept[name], "{name}");
    }
    for name in ["train", "control_train"] {
        let (problems, n) = wrong(name, &Table::read(&at(&format!("{name}.csv"))).unwrap(), &expected(name));
        assert!(problems.is_empty(), "{problems:#?}");
        assert!(n >= 100, "{name}: {n} numbers, six of each of ten steps and the steps' own");
    }
}

/// The page states the largest deviation of each table in `deviations.csv`.
#[test]
fn the_deviations_on_the_page_are_those_of_the_table() {
    let page = include_str!("../docs/redo-a-number.md");
    let table = Table::read(&folder("recompute").join("deviations.csv")).unwrap();
    let mut names: Vec<&str> = table.rows.iter().map(|row| row[0].as_str()).collect();
    names.dedup();
    for name in names {
        // Reversed, since max_by takes the last of equal ones.
        let of_table = || table.rows.iter().rev().filter(|row| row[0] == name);
        let share = |row: &&Vec<String>| row[4].parse::<f64>().unwrap();
        let worst = of_table().max_by(|a, b| share(a).total_cmp(&share(b))).unwrap();
        let line = format!("| `{name}.csv` | {} | {} | `{}` |", of_table().count(), worst[4], worst[1]);
        assert!(page.contains(&line), "the page does not have the line\n{line}");
    }
}

#[test]
fn a_number_that_is_another_is_seen() {
    let table = |cells: &[&str]| Table {
        header: ["row_id", "soft", "soft_se"].map(str::to_owned).to_vec(),
        rows: cells.iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect(),
    };
    let made = table(&["3 -2 0.001", "4 1 ?"]);
    let problems = |cells: &[&str]| wrong("x", &table(cells), &made).0;
    assert_eq!(problems(&["3 -2.00001 0.00101", "4 1 5"]).len(), 1, "only what nobody may leave out");
    assert_eq!(problems(&["3 -2.0001 0.001", "4 1 ?"]).len(), 2);
    assert!(problems(&["5 -2 0.001", "4 x ?"]).len() == 3);
}
