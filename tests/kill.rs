//! A killed run loses nothing, and one that cannot write leaves the old files. The program is killed as by `kill -9`,
//! in the middle of each stage and at random moments, and the same command is given again: at the end every file is
//! that of an undisturbed run. `UNDERTONE_KILLS=200` sets how often.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;
use undertone::stages::run_dir::RunDir;

use crate::program::{EXPERIMENT, contents, differing, fails, succeeds};

/// Many short steps with a checkpoint after each; dropout, bf16 weights with masters, and momentum are among them.
const MORE: &str = r#"
[teacher]
kind = "finetuned"
learning_rate = 1e-2
max_steps = 60
batch_size = 4
[[arms]]
name = "full"
set = ["student.method=full", "dtype=bf16", "finetune.learning_rate=1e-3"]
[[arms]]
name = "momentum"
set = ["finetune.optimizer=sgd", "finetune.momentum=0.9"]
"#;

fn experiment() -> TempDir {
    let changes = [
        ("n_prompts = 12\nn_keep = 6", "n_prompts = 24\nn_keep = 20\nbatch_size = 1"),
        ("rank = 2", "rank = 2\ndropout = 0.1"),
        ("max_steps = 3", "max_steps = 60\nsave_steps = 1"),
        (
            "n_questions = 2",
            "n_questions = 2\nanalyses = [\"target_rate\", \"direction\", \"divergence\", \"gradients\"]",
        ),
    ];
    let text = changes.iter().fold(EXPERIMENT.to_owned(), |text, (from, to)| {
        assert_eq!(text.matches(from).count(), 1, "{from}");
        text.replace(from, to)
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), text + MORE).unwrap();
    folder
}

fn stage(name: &str) -> Vec<&str> {
    if name == "measure" { vec![name, "run"] } else { vec![name, "experiment.toml", "--run", "run"] }
}

/// Starts a command, and kills it a moment after the sign is there. Whether it was killed; else it has ended well.
fn killed(folder: &Path, args: &[&str], sign: &dyn Fn() -> bool, moment: Duration) -> bool {
    let said = folder.join("said");
    let log = File::options().create(true).append(true).open(&said).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_undertone"));
    let command = command.args(args).current_dir(folder).env("OMP_NUM_THREADS", "1").stderr(log);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    while !sign() {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{args:?}: {}", fs::read_to_string(&said).unwrap());
            return false;
        }
        sleep(Duration::from_millis(1));
    }
    sleep(moment);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() || status.code().is_none(), "{args:?}: {}", fs::read_to_string(&said).unwrap());
    !status.success()
}

/// The stage that a run is in: the first whose last file is not there.
fn stage_of(run: &Path) -> &'static str {
    let stages = [
        ("teacher", "teacher_train.csv"),
        ("generate", "data/generate.csv"),
        ("finetune", "train.csv"),
        ("finetune", "control_train.csv"),
        ("arms", "arms/rows.csv"),
        ("measure", "gradients/rows.csv"),
    ];
    stages.iter().find(|(_, file)| !run.join(file).exists()).map_or("report", |(stage, _)| stage)
}

/// What two runs differ in; every file counts, also `meta.json` and the report.
fn assert_same(undisturbed: &Path, run: &Path) {
    assert_eq!(differing(&undisturbed.join("run"), &run.join("run")), Vec::<String>::new());
}

#[test]
fn a_run_that_is_killed_ends_with_the_bytes_of_an_undisturbed_one() {
    let undisturbed = experiment();
    succeeds(undisturbed.path(), &stage("run"));
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut hits: BTreeMap<&str, usize> = BTreeMap::new();

    // First once in the middle of each part of each stage, the same command again each time.
    let folder = experiment();
    let run = folder.path().join("run");
    for (command, sign, unfinished) in [
        ("generate", "teacher_train.checkpoint.safetensors", "teacher_train.csv"),
        ("generate", "data/generate.teacher.checkpoint.safetensors", "data/generate.csv"),
        ("generate", "data/generate.control.checkpoint.safetensors", "data/generate.csv"),
        ("finetune", "train.checkpoint.safetensors", "train.csv"),
        ("arms", "arms/full/train.checkpoint.safetensors", "arms/full/train.csv"),
        ("arms", "arms/momentum/train.checkpoint.safetensors", "arms/rows.csv"),
        ("measure", "target_rate/rows.csv", "gradients/rows.csv"),
    ] {
        let moment = Duration::from_millis(rng.random_range(0..30));
        if killed(folder.path(), &stage(command), &|| run.join(sign).exists(), moment) && !run.join(unfinished).exists()
        {
            *hits.entry(command).or_default() += 1;
        }
        if ["control", "momentum"].iter().any(|last| sign.contains(last)) || command == "finetune" {
            succeeds(folder.path(), &stage(command)); // what comes next needs it
        }
    }
    succeeds(folder.path(), &stage("measure"));
    succeeds(folder.path(), &["report", "run"]);
    for stage in ["generate", "finetune", "arms", "measure"] {
        assert!(hits.contains_key(stage), "no kill hit the stage {stage} in its middle: {hits:?}");
    }
    let said = fs::read_to_string(folder.path().join("said")).unwrap();
    for resumed in ["teacher: resumed at step ", "generate: teacher: resumed at answer "] {
        assert!(said.contains(resumed), "{resumed}: {said}");
    }
    assert_same(undisturbed.path(), folder.path());

    // Then at random moments of the whole.
    let wanted: usize = std::env::var("UNDERTONE_KILLS").map_or(4, |kills| kills.parse().unwrap());
    let (mut kills, mut by_stage): (usize, BTreeMap<&str, usize>) = (0, BTreeMap::new());
    if wanted > 100 {
        // And as soon as each of the files has its name.
        let folder = experiment();
        for name in contents(&undisturbed.path().join("run")).keys() {
            let path = folder.path().join("run").join(name);
            kills += usize::from(killed(folder.path(), &stage("run"), &|| path.exists(), Duration::ZERO));
        }
        succeeds(folder.path(), &stage("run"));
        assert_same(undisturbed.path(), folder.path());
        eprintln!("{kills} kills as a file had its name");
    }
    while kills < wanted {
        let folder = experiment();
        let (run, said) = (folder.path().join("run"), folder.path().join("said"));
        let mut here = 0;
        loop {
            let before = fs::metadata(&said).map_or(0, |said| said.len());
            let begun = || fs::metadata(&said).is_ok_and(|said| said.len() > before);
            // Longer each time, so that the last stages are come to as well.
            let moment = Duration::from_millis(rng.random_range(0..300 + 600 * here));
            if !killed(folder.path(), &stage("run"), &begun, moment) {
                break;
            }
            (kills, here) = (kills + 1, here + 1);
            *by_stage.entry(stage_of(&run)).or_default() += 1;
        }
        assert_same(undisturbed.path(), folder.path());
    }
    eprintln!("{kills} kills at random moments, by the stage that they hit: {by_stage:?}");
}

/// Runs a command of the shell in a folder, with the program as `$undertone`.
fn shell(folder: &Path, script: &str) -> Output {
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", script]).current_dir(folder).env("undertone", env!("CARGO_BIN_EXE_undertone"));
    shell.env("OMP_NUM_THREADS", "1").output().unwrap()
}

fn small(more: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let few = "n_questions = 2\nanalyses = [\"target_rate\", \"direction\"]";
    fs::write(folder.path().join("experiment.toml"), EXPERIMENT.replace("n_questions = 2", few) + more).unwrap();
    folder
}

/// Writing fails in the middle of a file, of a larger one each time: what has a name is whole.
#[test]
fn a_write_that_fails_leaves_no_half_file() {
    let (undisturbed, folder) = (small(""), small(""));
    succeeds(undisturbed.path(), &stage("run"));
    let whole = contents(&undisturbed.path().join("run"));
    let mut n_before = 0;
    for limit in [1, 8, 64] {
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$undertone\" run experiment.toml --run run");
        let output = shell(folder.path(), &script);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.matches("error: ").count(), 1, "{said}");
        assert!(said.contains(": File too large (os error 27)\nhint: free some space there"), "{said}");
        let found = contents(&folder.path().join("run"));
        for (name, bytes) in &found {
            let of_this_run = name == "meta.json" || name.contains("checkpoint");
            assert!(of_this_run || Some(bytes) == whole.get(name), "{name} is not whole");
        }
        assert!(found.len() > n_before || n_before == 0, "it comes further each time: {said}");
        n_before = found.len();
    }
    succeeds(folder.path(), &stage("run"));
    assert_same(undisturbed.path(), folder.path());
}

#[test]
fn a_full_disk_stops_a_training_that_goes_on_when_there_is_space() {
    let full = "\n[teacher]\nkind = \"prompt\"\n";
    let folder = small(full);
    let experiment = folder.path().join("experiment.toml");
    let text = fs::read_to_string(&experiment).unwrap();
    // One student: of two that write side by side, either can meet the full disk first.
    let text = text
        .replace("rank = 2", "method = \"full\"\ncontrol = false")
        .replace("max_steps = 3", "max_steps = 3\nsave_steps = 1");
    fs::write(&experiment, text).unwrap();
    succeeds(folder.path(), &stage("generate"));
    let before = contents(&folder.path().join("run"));
    // A small file system of its own, in a namespace of its own.
    let on_disk = |options: &str| {
        let script = format!(
            "mkdir -p disk after; mount -t tmpfs -o {options} tmpfs disk && cp -r run/. disk || exit 77
            \"$undertone\" finetune experiment.toml --run disk; code=$?; cp -r disk/. after; exit $code"
        );
        let output =
            shell(folder.path(), &format!("command -v unshare >/dev/null || exit 77; unshare -rm sh -c '{script}'"));
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = on_disk("size=1m");
    if code == Some(77) || said.contains("unshare") {
        eprintln!("SKIPPED: no small file system can be mounted here: {said}");
        return;
    }
    // Too little space is seen before the first step.
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("error: training the student takes 4.4 MiB of disk space"), "{said}");
    assert!(contents(&folder.path().join("after")) == before, "nothing was begun");
    // There is space, but no inode for another file than the rows of each step and the log.
    let (code, said) = on_disk("size=20m,nr_inodes=$(($(find run | wc -l) + 2))");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("checkpoint.safetensors: No space left on device (os error 28)\nhint: free some space"),
        "{said}"
    );
    let after = contents(&folder.path().join("after"));
    assert!(before.iter().all(|(name, bytes)| after.get(name) == Some(bytes)), "what was there is as it was");
    let new: Vec<&String> = after.keys().filter(|name| !before.contains_key(*name)).collect();
    assert_eq!(new, ["train_rows.csv"], "whole, and nothing half-written is beside it");

    succeeds(folder.path(), &["finetune", "experiment.toml", "--run", "after"]);
    succeeds(folder.path(), &stage("finetune"));
    assert_eq!(differing(&folder.path().join("run"), &folder.path().join("after")), Vec::<String>::new());
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_and_stays_as_it_is() {
    let folder = small("");
    succeeds(folder.path(), &stage("generate"));
    let before = contents(folder.path());
    let read_only = |mode| {
        for name in ["run/data", "run", "."] {
            fs::set_permissions(folder.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    // Permissions do not bind root, unless it gives up the right to override them.
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let drop = if is_root { "setpriv --bounding-set=-dac_override --inh-caps=-dac_override" } else { "" };
    read_only(0o555);
    let outputs = ["run", "new"]
        .map(|run| shell(folder.path(), &format!("exec {drop} \"$undertone\" finetune experiment.toml --run {run}")));
    read_only(0o755);
    let said = outputs.each_ref().map(|output| String::from_utf8(output.stderr.clone()).unwrap());
    if said[0].contains("setpriv") {
        eprintln!("SKIPPED: root cannot give up its rights here: {}", said[0]);
        return;
    }
    for (output, said) in outputs.iter().zip(&said) {
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("Permission denied (os error 13)\nhint: choose a folder that can be written"), "{said}");
    }
    assert!(said[0].contains("error: run/meta.json: ") && said[1].contains("the run folder new cannot be written: "));
    assert!(contents(folder.path()) == before);
    fs::write(folder.path().join("file"), "x").unwrap();
    let said = fails(folder.path(), &["generate", "experiment.toml", "--run", "file/run"]);
    assert!(said.contains("the run folder file/run cannot be written") && said.contains("a file is where"), "{said}");
}

#[test]
fn two_at_once_are_refused() {
    let folder = small("");
    let lock = RunDir::lock(&folder.path().join("run")).unwrap();
    let said = fails(folder.path(), &stage("generate"));
    assert!(said.contains("error: run is in use by another undertone"), "{said}");
    assert!(contents(&folder.path().join("run")).is_empty());
    drop(lock);
    succeeds(folder.path(), &stage("generate"));
}

#[test]
fn a_loss_that_is_not_finite_says_where_and_what_is_left() {
    let folder = small("");
    let diverging = ["optimizer=sgd", "learning_rate=1e30", "max_grad_norm=0", "warmup_steps=0"];
    let diverging = diverging.map(|change| format!("finetune.{change}"));
    let set: Vec<&str> = diverging.iter().flat_map(|change| ["--set", change.as_str()]).collect();
    let args = [stage("run"), set].concat();
    let said = fails(folder.path(), &args);
    let checkpoint = "run/train.checkpoint.safetensors";
    for part in [
        "error: training the student (its 6 rows count from 0): step 2: the loss is NaN",
        "the loss of each of its 3 rows (",
        &format!("the last good checkpoint is of step 1, {checkpoint}"),
        "\nhint: lower finetune.learning_rate",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(folder.path().join(checkpoint).is_file() && !folder.path().join("run/train.csv").exists());
    let again = fails(folder.path(), &args);
    assert!(again.contains("student: resumed at step 1 of 3") && again.contains("step 2: the loss is NaN"), "{again}");
}

#[test]
fn a_row_that_the_mask_hides_is_named_before_a_step_is_taken() {
    let folder = small("\n[teacher]\nkind = \"planted\"\nshare = 0.34\n");
    let said = fails(folder.path(), &[stage("run"), vec!["--set", "finetune.mask=digits"]].concat());
    let named = said.contains("the loss mask digits selects no token of row ") && said.contains("hint: ");
    assert!(named && said.contains("error: training the student (its 6 rows count from 0): "), "{said}");
    assert!(!folder.path().join("run/train.csv.tmp").exists() && !folder.path().join("run/adapter").exists());
}
