//! What a student learns from, through the whole program: rows chosen by signal, tokens weighted by a table, a steered
//! teacher, and the signal of rows from elsewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use undertone::data::dataset::read_jsonl;
use undertone::data::signal::SignalRow;
use undertone::output::publish::read_csv;
use undertone::stages::arm_table::ArmRow;
use undertone::stages::teacher::TeacherRow;

use crate::program::{EXPERIMENT, fails, succeeds, undertone};

const TEACHER: &str = r#"
[teacher]
kind = "finetuned"
learning_rate = 1e-2
max_steps = 8
number_share = 0.5
n_number_rows = 4
"#;

const ARMS: &str = r#"
[[arms]]
name = "all rows"
set = ["finetune.select=all"]
[[arms]]
name = "random half"
set = ["finetune.select={ random = 0.5 }"]
[[arms]]
name = "no trait"
data = "own"
set = ["teacher.number_share=1"]
"#;

/// The ids of the rows that a training used.
fn learned(folder: &Path, log: &str) -> BTreeSet<usize> {
    let text = fs::read_to_string(folder.join(log)).unwrap();
    let ids = text.lines().skip(1).flat_map(|line| line.split_once(',').unwrap().1.split(' ').collect::<Vec<_>>());
    ids.map(|id| id.parse().unwrap()).collect()
}

fn top_half(run: &Path) -> BTreeSet<usize> {
    let mut signal: Vec<SignalRow> = read_csv(&run.join("data/signal.csv")).unwrap();
    signal.retain(|row| row.set == "teacher");
    let half = (signal.len() as f64 * 0.5).round() as usize;
    signal.sort_by(|one, other| other.signal.total_cmp(&one.signal));
    signal.iter().take(half).map(|row| row.id).collect()
}

#[test]
fn a_student_learns_from_the_rows_with_the_most_signal() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{TEACHER}{ARMS}")).unwrap();
    let select = ["--set", "finetune.select={ top = 0.5 }", "--set", "measure.analyses=[\"target_rate\"]"];
    let said = succeeds(folder.path(), &[&["run", "experiment.toml", "--run", "run"], &select[..]].concat());
    assert!(said.contains("(the 50 % of the rows with the most signal)"), "{said}");
    let run = folder.path().join("run");
    assert_eq!(learned(&run, "train_rows.csv"), top_half(&run));
    let arm = |slug: &str| run.join("arms").join(slug);
    assert_eq!(learned(&arm("no-trait"), "train_rows.csv"), top_half(&arm("no-trait")), "by its own teacher's signal");
    let n = top_half(&run).len();
    let random = learned(&arm("random-half"), "train_rows.csv");
    assert_eq!(random.len(), n);
    let all = learned(&arm("all-rows"), "train_rows.csv");
    assert!(random.is_subset(&all) && top_half(&run).is_subset(&all) && all.len() > n);
    assert_eq!(learned(&run, "control_train_rows.csv").len(), n);
    let rows: Vec<ArmRow> = read_csv(&run.join("arms/rows.csv")).unwrap();
    let select: Vec<_> = rows.iter().map(|row| (row.select.as_deref().unwrap(), row.n_rows.unwrap())).collect();
    let top = ("top 0.5", n);
    assert_eq!(select, [top, top, ("all", all.len()), ("random 0.5", n), top]);
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("The students learned from the 50 % of the rows with the most signal."));

    let rows = read_jsonl(&run.join("data/numbers.jsonl")).unwrap();
    let given = rows
        .iter()
        .filter(|row| all.contains(&row.id))
        .map(|row| format!("{}\n", serde_json::json!({ "prompt": row.prompt, "completion": row.completion })));
    fs::write(folder.path().join("rows.jsonl"), given.collect::<String>()).unwrap();
    let signal = ["signal", "rows.jsonl", "--model", "tiny-random", "--teacher", "run/teacher", "--to", "signal.csv"];
    let said = succeeds(folder.path(), &signal);
    assert!(
        said.contains(&format!("signal: {} rows: the teacher prefers these rows over the base by", all.len())),
        "{said}"
    );
    let signals = |path: &Path| -> Vec<f64> {
        let rows: Vec<SignalRow> = read_csv(path).unwrap();
        rows.iter().filter(|row| row.set == "teacher").map(|row| row.signal).collect()
    };
    let (there, here) = (signals(&folder.path().join("signal.csv")), signals(&run.join("data/signal.csv")));
    assert_eq!(there.len(), here.len());
    // The ids are those of the text, written out and read again: the same tokens, as digits are single ones.
    assert!(there.iter().zip(&here).all(|(there, here)| (there - here).abs() < 1e-5), "{there:?} {here:?}");
    let said = fails(folder.path(), &["signal", "rows.jsonl", "--model", "tiny-random", "--teacher", "nowhere"]);
    assert!(said.contains("--teacher"), "{said}");
}

#[test]
fn tokens_weigh_as_a_table_says() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{TEACHER}")).unwrap();
    let run = |name: &'static str, changes: &[&'static str]| {
        let mut args = vec!["finetune", "experiment.toml", "--run", name];
        args.extend(changes.iter().flat_map(|change| ["--set", *change]));
        args
    };
    succeeds(folder.path(), &["generate", "experiment.toml", "--run", "run"]);
    succeeds(folder.path(), &run("run", &[]));
    succeeds(folder.path(), &["measure", "run", "divergence", "--set", "measure.divergence.n_rows=100"]);
    let said = fails(folder.path(), &["measure", "run", "target_rate", "--set", "student.rank=3"]);
    assert!(said.contains("--set changes student, but the students of run are made already"), "{said}");

    let weighted = "finetune.weights={ table = \"run/divergence/rows.csv\", column = \"nief\" }";
    let divergent = ["finetune.tokens=divergent", "measure.divergence.definition=nief"];
    for (name, changes) in [("weighted", &[weighted][..]), ("divergent", &divergent)] {
        let mut generate = run(name, changes);
        generate[0] = "generate";
        succeeds(folder.path(), &generate);
    }
    let said = succeeds(folder.path(), &run("weighted", &[weighted]));
    assert!(said.contains("is of the teacher's rows, so these learn from all tokens alike"), "the control: {said}");
    succeeds(folder.path(), &run("divergent", &divergent));
    let bytes = |name: &str, file: &str| fs::read(folder.path().join(name).join(file)).unwrap();
    assert_eq!(
        bytes("weighted", "adapter/adapter_model.safetensors"),
        bytes("divergent", "adapter/adapter_model.safetensors"),
        "weights of 0 and 1 are a choice of tokens"
    );
    assert_eq!(bytes("weighted", "control_train.csv"), bytes("run", "control_train.csv"));
    assert_ne!(bytes("weighted", "train.csv"), bytes("run", "train.csv"));

    let missing = "finetune.weights={ table = \"run/divergence/rows.csv\", column = \"neif\" }";
    let mut generate = run("misspelt", &[missing]);
    generate[0] = "generate";
    let said = fails(folder.path(), &generate);
    assert!(said.contains("finetune.weights: run/divergence/rows.csv has no column neif; it has row_id, k,"), "{said}");
    assert!(!folder.path().join("misspelt/data").exists(), "said before anything is made");

    let id = learned(&folder.path().join("weighted"), "train_rows.csv").first().unwrap().to_string();
    let shown = undertone(folder.path(), &["tokens", "--run", "weighted", "--row", &id]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let rows = fs::read_to_string(folder.path().join("run/divergence/rows.csv")).unwrap();
    let nief = rows.lines().next().unwrap().split(',').position(|column| column == "nief").unwrap();
    let of_row = rows.lines().skip(1).filter(|line| line.split(',').next() == Some(&id));
    let n = of_row.filter(|line| line.split(',').nth(nief) == Some("true")).count();
    assert!(
        n > 0 && shown.contains(&format!("\n{n} of ")) && shown.contains("tokens are learned from"),
        "{n}: {shown}"
    );
    let said = fails(folder.path(), &["tokens", "--run", "weighted", "--row", "999"]);
    assert!(said.contains("row 999 of"), "{said}");
}

#[test]
fn a_steered_teacher_writes_with_a_direction() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{TEACHER}")).unwrap();
    succeeds(folder.path(), &["generate", "experiment.toml", "--run", "run"]);
    succeeds(folder.path(), &["finetune", "experiment.toml", "--run", "run"]);
    succeeds(folder.path(), &["measure", "run", "direction"]);
    succeeds(folder.path(), &["export", "run", "--to", "direction.safetensors"]);
    let steered =
        "[teacher]\nkind = \"steered\"\nedits = [\"blocks.1.hook_resid_post: add(direction.safetensors, 40)\"]\n";
    fs::write(folder.path().join("steered.toml"), format!("{EXPERIMENT}{steered}")).unwrap();
    let analyses = "measure.analyses=[\"target_rate\", \"divergence\", \"direction\"]";
    let said = succeeds(folder.path(), &["run", "steered.toml", "--run", "steered", "--set", analyses]);
    assert!(said.contains("signal: the teacher prefers its kept rows over the base by"), "{said}");
    let run = folder.path().join("steered");
    let rows: Vec<TeacherRow> = read_csv(&run.join("data/teacher.csv")).unwrap();
    assert!((rows[0].logp_target - rows[1].logp_target).abs() > 1e-3, "{rows:?}");
    let signal: Vec<SignalRow> = read_csv(&run.join("data/signal.csv")).unwrap();
    let of = |set: &str| signal.iter().filter(|row| row.set == set).map(|row| row.signal).sum::<f64>();
    assert!(of("teacher") > of("control"), "{signal:?}");
    let divergence = fs::read_to_string(run.join("divergence/rows.csv")).unwrap();
    assert!(divergence.lines().count() > 1);

    let missing = [
        "run",
        "steered.toml",
        "--run",
        "other",
        "--set",
        "teacher.edits=[\"blocks.1.hook_resid_post: add(none.safetensors, 4)\"]",
    ];
    let said = fails(folder.path(), &missing);
    assert!(said.contains("teacher.edits: ") && said.contains("none.safetensors"), "{said}");
    assert!(!folder.path().join("other/run.toml").exists(), "nothing half-written stays");
}
