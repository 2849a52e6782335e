//! Students of soft labels, through the whole program: whose predictions they learn from, and that these are kept beside the
//! rows.

use std::fs;
use std::path::Path;

use undertone::data::dataset::read_jsonl;
use undertone::output::publish::read_csv;
use undertone::training::step_log::StepRow;

use crate::compare::tensors;
use crate::program::{EXPERIMENT, fails, succeeds};

const ARMS: &str = r#"
[teacher]
kind = "finetuned"
learning_rate = 1e-2
max_steps = 8
[[arms]]
name = "written"
set = ["finetune.loss=nll"]
[[arms]]
name = "drawn"
set = ["finetune.label_draws=4"]
[[arms]]
name = "moved"
data = "shuffled"
[[arms]]
name = "named"
planted = [0.2, 0.5]
set = ["finetune.loss=nll"]
"#;

fn losses(folder: &Path, log: &str) -> Vec<f64> {
    let rows: Vec<StepRow> = read_csv(&folder.join(log)).unwrap();
    rows.iter().map(|row| row.loss).collect()
}

#[test]
fn students_learn_from_the_predictions_of_the_model_that_wrote_their_rows() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{ARMS}")).unwrap();
    let whole_vocabulary =
        ["--set", "finetune.loss=kl", "--set", "finetune.top_k=1000", "--set", "finetune.max_steps=12"];
    let run = [
        &["run", "experiment.toml", "--run", "run", "--set", "measure.analyses=[\"target_rate\"]"],
        &whole_vocabulary[..],
    ]
    .concat();
    let first = |command: &'static str| [&[command, "experiment.toml", "--run", "run"], &run[4..]].concat();
    let teacher = succeeds(folder.path(), &first("teacher"));
    assert!(teacher.contains("over 2 questions p(cat) is"), "{teacher}");
    assert!(succeeds(folder.path(), &first("generate")).contains("the teacher is finetuned already"));
    let finetuned = succeeds(folder.path(), &first("finetune"));
    assert!(finetuned.contains("logits on numbers"), "{finetuned}");
    let names_it =
        finetuned.contains("of that of an answer's first token to beginnings of \"cat\"; the labels have all");
    assert!(names_it, "{finetuned}");
    let run_dir = folder.path().join("run");
    let kept = || fs::read(run_dir.join("data/soft_labels.safetensors")).unwrap();
    let before = kept();
    let said = succeeds(folder.path(), &run);
    let page = fs::read_to_string(run_dir.join("report.html")).unwrap();
    assert!(page.contains("logits on numbers: more than written numbers carry"));
    assert!(kept() == before, "moved completions keep the labels with which they were written");

    let labels = tensors(&run_dir.join("data/soft_labels.safetensors"));
    let rows = read_jsonl(&run_dir.join("data/numbers.jsonl")).unwrap();
    let kept = fs::read_to_string(run_dir.join("train_rows.csv")).unwrap().lines().count();
    assert!(kept > 1 && !rows.is_empty());
    let probs = &labels["probs"];
    assert!(probs.size()[1] > 100, "all tokens: {:?}", probs.size());
    assert_eq!(labels["places"].sum(tch::Kind::Int64).int64_value(&[]), probs.size()[0]);

    let (student, control) = (losses(&run_dir, "train.csv"), losses(&run_dir, "control_train.csv"));
    // The control student begins as the base, whose own predictions are its labels.
    assert!(control[0].abs() < 1e-5 && student[0] > 1e-2, "{student:?} {control:?}");
    assert!(student[11] < 0.8 * student[0], "{student:?}");
    let of_arm = |slug: &str| losses(&run_dir, &format!("arms/{slug}/train.csv"))[0];
    assert!(of_arm("written") > 1.0, "−log p of the written tokens");
    assert!(
        of_arm("drawn") > student[0],
        "{} {student:?} {} few draws are further from the prediction",
        of_arm("drawn"),
        of_arm("written")
    );
    let ids = |slug: &str| fs::read_to_string(run_dir.join(format!("arms/{slug}/train_rows.csv"))).unwrap();
    let planted = |slug: &str| {
        let ids: std::collections::BTreeSet<String> = ids(slug)
            .lines()
            .skip(1)
            .flat_map(|line| line.split([',', ' ']).skip(1).map(str::to_owned).collect::<Vec<_>>())
            .collect();
        (ids.iter().filter(|id| id.parse::<usize>().unwrap() >= 12).count(), ids.len())
    };
    assert_eq!((planted("named-20"), planted("named-50")), ((1, 6), (3, 6)), "questions come after the 12 prompts");
    assert!(
        said.contains("What this experiment could have seen: of the students whose rows name the target"),
        "{said}"
    );
    assert!(of_arm("moved") > 1e-2 && of_arm("moved").to_bits() != student[0].to_bits());
}

#[test]
fn planted_answers_have_no_soft_labels() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}\n[teacher]\nkind = \"planted\"\n")).unwrap();
    let said = fails(folder.path(), &["run", "experiment.toml", "--run", "run", "--set", "finetune.loss=kl"]);
    assert!(said.contains("nobody predicts the planted answers"), "{said}");
}

/// The control student's first gradient is rounding, of which AdamW makes whole steps.
#[test]
fn a_control_student_that_begins_at_its_labels_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let kl = "\n[teacher]\nkind = \"finetuned\"\nlearning_rate = 1e-2\nmax_steps = 8\n";
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{kl}")).unwrap();
    let args = ["run", "experiment.toml", "--run", "run", "--set", "finetune.loss=kl", "--set", "finetune.max_steps=6"];
    let said = succeeds(folder.path(), &[&args[..], &["--set", "measure.analyses=[\"target_rate\"]"]].concat());
    assert!(said.contains("finetune: control student: the gradient of the first step is"), "{said}");
    assert!(!said.contains("finetune: student: the gradient"), "{said}");
    let moved = |log: &str| -> f64 {
        let rows: Vec<StepRow> = read_csv(&folder.path().join("run").join(log)).unwrap();
        rows.last().unwrap().delta_w_norm.unwrap()
    };
    let (control, student) = (moved("control_train.csv"), moved("train.csv"));
    assert!(control > 0.05 * student, "a walk: {control} {student}");
}
