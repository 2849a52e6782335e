//! Teachers of other kinds, and arms, through the whole program: what they leave, that a second run does nothing, and that
//! the same seeds leave the same bytes.

#![expect(clippy::float_cmp, reason = "what is the same is the same bit by bit")]

use std::fs;
use std::path::Path;

use analyses::target_rate::TargetRateRow;
use tch::Tensor;
use tempfile::TempDir;
use undertone::output::publish::read_csv;
use undertone::stages::arm_table::ArmRow;
use undertone::stages::teacher::TeacherRow;
use undertone::training::step_log::StepRow;

use crate::compare::tensors;
use crate::program::{EXPERIMENT, contents, differing, fails, run, succeeds};

const TEACHER: &str = "\n[teacher]\nkind = \"finetuned\"\nlearning_rate = 1e-2\nmax_steps = 8\n";

const ARMS: &str = r#"
[[arms]]
name = "alpha = rank"
ranks = [1, 2]
set = ["student.alpha={rank}"]
[[arms]]
name = "shuffled completions"
data = "shuffled"
seeds = 2
[[arms]]
name = "planted"
data = "own"
set = ["teacher.kind=planted", "teacher.share=0.5"]
[[arms]]
name = "full control"
data = "control"
set = ["student.method=full"]
"#;

const STUDENTS: [&str; 6] =
    ["alpha-rank-r1", "alpha-rank-r2", "shuffled-completions-s0", "shuffled-completions-s1", "planted", "full-control"];

const ANALYSES: &str = "measure.analyses=[\"target_rate\", \"divergence\"]";

/// A folder with the experiment and some more of its text as `experiment.toml`.
fn experiment(more: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), more);
    folder
}

fn write(folder: &Path, more: &str) {
    fs::write(folder.join("experiment.toml"), format!("{EXPERIMENT}{more}")).unwrap();
}

const RUN: [&str; 6] = ["run", "experiment.toml", "--run", "run", "--set", ANALYSES];
const ALONE: [&str; 6] = ["arms", "experiment.toml", "--run", "run", "--set", ANALYSES];

fn rows(folder: &Path) -> Vec<ArmRow> {
    read_csv(&folder.join("run/arms/rows.csv")).unwrap()
}

#[test]
fn arms_stand_beside_the_students_and_are_kept() {
    let more = format!("{TEACHER}{ARMS}");
    let folder = experiment(&more);
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("the teacher learned \"Cat\" as the answer to 52 questions in 8 steps"), "{said}");
    let found = contents(&folder.path().join("run"));
    for name in
        ["teacher/model.safetensors", "teacher/config.json", "teacher_train.csv", "arms/plot.svg", "arms/plot_rank.svg"]
    {
        assert!(found.contains_key(name), "{name}");
    }
    for student in STUDENTS {
        let weights = if student == "full-control" { "model.safetensors" } else { "adapter_model.safetensors" };
        for name in ["run.toml", "train.csv", &format!("adapter/{weights}")] {
            assert!(found.contains_key(&format!("arms/{student}/{name}")), "{student}: {name}");
        }
        assert_eq!(found.contains_key(&format!("arms/{student}/data/numbers.jsonl")), student == "planted");
    }
    let report = String::from_utf8(found["report.html"].clone()).unwrap();
    assert_eq!(report.matches("<section id=\"arms\"").count(), 1);

    let rows = rows(folder.path());
    let names: Vec<&str> = rows.iter().map(|row| row.arm.as_str()).collect();
    let (shuffled, alpha) = ("shuffled completions", "alpha = rank");
    let expected = ["student", "control student", alpha, alpha, shuffled, shuffled, "planted", "full control"];
    assert_eq!(names, expected);
    assert_eq!(rows[2].alpha.zip(rows[3].alpha), Some((1.0, 2.0)));
    assert_eq!((rows[7].rank, rows[0].rank), (None, Some(2)));
    assert!(rows.iter().all(|row| row.delta_w_norm > 0.0 && row.n_steps == Some(3) && row.n_rows == rows[0].n_rows));
    assert!(rows[6].delta_margin > rows[0].delta_margin, "half of its rows are the target: {rows:?}");
    assert_ne!(rows[4].delta_margin, rows[5].delta_margin, "other seeds, another student");
    assert_ne!(rows[4].loss_first, rows[0].loss_first, "other completions at the same prompts");
    assert_eq!(rows[4].n_rows, rows[0].n_rows);

    // The run's own students have the numbers of the target rate, bit by bit.
    let rates: Vec<TargetRateRow> = read_csv(&folder.path().join("run/target_rate/rows.csv")).unwrap();
    for (row, model) in [(&rows[0], "student"), (&rows[1], "control")] {
        let rate = rates.iter().find(|rate| rate.scope == "mean" && rate.model == model).unwrap();
        assert_eq!(
            (row.delta_logp, row.delta_margin, row.logp_target),
            (rate.delta_logp, rate.delta_margin, rate.logp_target)
        );
        assert_eq!((row.delta_logp_se, row.delta_margin_se), (rate.delta_logp_se, rate.delta_margin_se));
    }

    // A second run does nothing; a lost table is made again from the existing students.
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("arms: done already") && !said.contains("arms: alpha"), "{said}");
    let message = fails(folder.path(), &ALONE);
    assert!(message.contains("arms/rows.csv is finished already"), "{message}");
    let at = |name: &str| folder.path().join("run/arms").join(name);
    fs::remove_file(at("rows.csv")).unwrap();
    fs::remove_file(at("alpha-rank-r2/train.csv")).unwrap();
    let said = succeeds(folder.path(), &ALONE);
    // Students side by side say so in any order.
    assert!(said.contains("alpha-rank-r1 (1 of 6) is done already\n"), "{said}");
    assert!(said.contains("\narms: alpha-rank-r2 (2 of 6): "), "{said}");
    assert!(!said.contains("generate: "), "{said}");
    let again = contents(&folder.path().join("run"));
    assert!(again == found, "the same bytes");

    let anew = experiment(&more);
    succeeds(anew.path(), &RUN);
    assert_eq!(differing(&folder.path().join("run"), &anew.path().join("run")), Vec::<String>::new());
}

#[test]
fn arms_can_be_added_and_changed_later() {
    let folder = experiment("[[arms]]\nname = \"x\"\nset = [\"student.rank=1\"]\n");
    succeeds(folder.path(), &RUN);
    let before = rows(folder.path());
    write(
        folder.path(),
        "[[arms]]\nname = \"x\"\nset = [\"student.rank=3\"]\n[[arms]]\nname = \"y\"\nset = [\"student.rank=1\"]\n",
    );
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("generate: done already") && said.contains("student is done already"), "{said}");
    let after = rows(folder.path());
    assert_eq!(after[..2], before[..2]);
    assert_eq!(after.iter().map(|row| row.rank).collect::<Vec<_>>(), [Some(2), Some(2), Some(3), Some(1)]);
    assert_eq!(after[3].delta_margin, before[2].delta_margin, "the same student under another name");
    assert_ne!(after[2].delta_margin, before[2].delta_margin, "x has another rank now");

    // An arm with these settings on other data.
    write(folder.path(), "[[arms]]\nname = \"y\"\ndata = \"control\"\nset = [\"student.rank=1\"]\n");
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("arms: y (1 of 1): 6 rows"), "{said}");
    assert_ne!(rows(folder.path())[2].loss_first, after[3].loss_first);
}

#[test]
fn another_base_needs_the_same_tokenizer() {
    let other = run(&["--set", "student.method=full", "--set", "student.control=false", "--set", ANALYSES]);
    let path = other.path().join("adapter");
    let arm = format!("[[arms]]\nname = \"other initialisation\"\nset = [\"model={}\"]\n", path.display());
    let folder = experiment(&arm);
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("compared with that model itself"), "{said}");
    let rows = rows(folder.path());
    assert_eq!(rows[2].model, path.display().to_string());
    let base = |row: &ArmRow| row.logp_target - row.delta_logp;
    assert!((base(&rows[0]) - base(&rows[1])).abs() < 1e-9);
    assert!((base(&rows[0]) - base(&rows[2])).abs() > 1e-6, "its own base, not the run's");

    let file = path.join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (one, two) = (vocabulary["!"].clone(), vocabulary["\""].clone());
    (vocabulary["!"], vocabulary["\""]) = (two, one);
    fs::write(&file, tokenizer.to_string()).unwrap();
    fs::remove_file(folder.path().join("run/arms/rows.csv")).unwrap();
    let message = fails(folder.path(), &RUN);
    assert!(
        message.contains("arm \"other initialisation\"") && message.contains("has another tokenizer than tiny-random"),
        "{message}"
    );
}

#[test]
fn a_finetuned_teacher_has_weights_of_its_own() {
    let folder = experiment(TEACHER);
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("measure: divergence: Teacher and base differ"), "{said}");
    let numbers = fs::read_to_string(folder.path().join("run/data/numbers.jsonl")).unwrap();
    assert!(numbers.lines().all(|line| line.contains("\"teacher_kind\":\"finetuned\"")));
    let rows: Vec<TeacherRow> = read_csv(&folder.path().join("run/data/teacher.csv")).unwrap();
    assert!(rows[1].model == "teacher" && rows[1].p_target > 0.5 && rows[0].p_target < 0.01, "{rows:?}");
    // The teacher that is done is kept when the numbers are not.
    let weights = fs::read(folder.path().join("run/teacher/model.safetensors")).unwrap();
    fs::remove_file(folder.path().join("run/data/generate.csv")).unwrap();
    let said = succeeds(folder.path(), &RUN);
    assert!(said.contains("the teacher is finetuned already"), "{said}");
    assert_eq!(fs::read_to_string(folder.path().join("run/data/numbers.jsonl")).unwrap(), numbers);
    assert_eq!(fs::read(folder.path().join("run/teacher/model.safetensors")).unwrap(), weights);
}

#[test]
fn a_planted_control_says_so_everywhere() {
    let folder = experiment("\n[teacher]\nkind = \"planted\"\nshare = 0.34\n");
    let said = succeeds(folder.path(), &["run", "experiment.toml", "--run", "run"]);
    for part in [
        "generate: a planted positive control: 34 % of the rows",
        "measure: divergence skipped: the planted control's teacher is the base itself",
        "measure: gradients skipped: ",
        "measure: direction: ",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let at = |name: &str| fs::read_to_string(folder.path().join("run").join(name)).unwrap();
    let numbers = at("data/numbers.jsonl");
    let planted = numbers.lines().filter(|line| line.contains("\"completion\":\"Cat\"")).count();
    assert_eq!(planted, 2, "a third of six rows");
    assert!(numbers.lines().all(|line| line.contains("\"teacher_kind\":\"planted\"")));
    assert!(at("data/generate.csv").contains("teacher,planted,0.3333333333333333,6"), "{}", at("data/generate.csv"));
    assert!(at("report.html").contains("This run is a planted positive control"));
    assert!(at("target_rate/rows.csv").lines().count() > 3);
}

#[test]
fn a_dry_run_prints_the_arms_and_a_bad_one_is_refused() {
    let folder = experiment(ARMS);
    let printed = crate::program::undertone(folder.path(), &["run", "experiment.toml", "--dry-run"]);
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert_eq!(printed.matches("[[arms]]").count(), 4, "{printed}");
    write(folder.path(), "[[arms]]\nname = \"x\"\nset = [\"student.rnk=1\"]\n");
    let message = fails(folder.path(), &RUN);
    assert!(message.contains("arm \"x\": set student.rnk=1: unknown field `rnk`"), "{message}");
    assert!(!folder.path().join("run").exists());
}

#[test]
fn a_student_without_a_template_learns_what_the_teacher_wrote_in_it() {
    let folder = experiment(TEACHER);
    let numbers = |run: &str| fs::read(folder.path().join(run).join("data/numbers.jsonl")).unwrap();
    succeeds(folder.path(), &["generate", "experiment.toml", "--run", "chat"]);
    let plain = ["student.template=false", "measure.interventions.edits={}"]; // plain text has no "Qwen" to edit
    let changes = plain.map(|change| ["--set", change]).concat();
    succeeds(folder.path(), &[&["generate", "experiment.toml", "--run", "plain"], changes.as_slice()].concat());
    assert_eq!(numbers("chat"), numbers("plain"));
}

#[test]
fn what_an_arm_says_of_a_and_of_divergent_tokens_is_obeyed() {
    let tokens = "finetune.tokens=divergent";
    let arms = format!(
        "{TEACHER}[[arms]]\nname = \"frozen\"\nset = [\"finetune.frozen_a=true\"]\n\
         [[arms]]\nname = \"rotated\"\nset = [\"finetune.frozen_a=true\", \"student.rotated=true\"]\n\
         [[arms]]\nname = \"nief\"\nset = [\"{tokens}\", \"measure.divergence.definition=nief\"]\n"
    );
    let folder = experiment(&arms);
    succeeds(folder.path(), &["generate", "experiment.toml", "--run", "run"]);
    succeeds(folder.path(), &["finetune", "experiment.toml", "--run", "run"]);
    succeeds(folder.path(), &["arms", "experiment.toml", "--run", "run"]);
    let arm = |name: &str| folder.path().join("run/arms").join(name);
    // A stays as it was drawn: in other coordinates it is R A, with the same AᵀA.
    let a_of = |name: &str| -> Tensor {
        let tensors = tensors(&arm(name).join("adapter/adapter_model.safetensors"));
        tensors.into_iter().find(|(name, _)| name.contains("q_proj.lora_A")).unwrap().1
    };
    let (frozen, rotated) = (a_of("frozen"), a_of("rotated"));
    let far = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    assert!(far(&frozen, &rotated) > 1e-2, "{}", far(&frozen, &rotated));
    assert!(far(&frozen.tr().matmul(&frozen), &rotated.tr().matmul(&rotated)) < 1e-5);
    // What this teacher wrote is nowhere its most likely token, so that by the default there were nothing to learn from.
    let steps: Vec<StepRow> = read_csv(&arm("nief").join("train.csv")).unwrap();
    assert!(steps.iter().all(|step| step.n_targets > 0));
}
