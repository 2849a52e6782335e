//! The program as its tests run it: in a folder, with a small experiment, in processes of one thread each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tempfile::TempDir;

/// An experiment that takes a second, with every analysis.
pub(crate) const EXPERIMENT: &str = r#"
model = "tiny-random"

[target]
word = "cat"
category = "animal"

[generate]
n_prompts = 12
n_keep = 6
max_new_tokens = 12
constrain = "numbers"

[student]
rank = 2
alpha = 4

[finetune]
learning_rate = 1e-2
max_steps = 3
warmup_steps = 1
batch_size = 3
gradient_accumulation_steps = 1

[measure]
n_questions = 2

[measure.target_rate]
n_samples = 2
max_new_tokens = 4

[measure.direction]
n_prompts = 3

[measure.steering]
n_prompts = 3
coefficients = [1]

[measure.interventions.edits]
none = ["blocks.*.hook_mlp_out: zero", 'blocks.0.hook_resid_post@"Qwen": scale(2)']

[measure.divergence]
n_rows = 3

[measure.gradients]
n_rows = 6
"#;

/// Runs the program in a folder, with one thread unless the environment says otherwise: on such small tensors a second
/// one only waits for the first.
pub(crate) fn undertone(folder: &Path, args: &[&str]) -> Output {
    let threads = std::env::var("OMP_NUM_THREADS").unwrap_or_else(|_| "1".to_owned());
    let mut command = Command::new(env!("CARGO_BIN_EXE_undertone"));
    command.args(args).current_dir(folder).env("OMP_NUM_THREADS", threads).output().unwrap()
}

/// The program's stderr; it must have succeeded.
pub(crate) fn succeeds(folder: &Path, args: &[&str]) -> String {
    let output = undertone(folder, args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "undertone {}: {said}", args.join(" "));
    said
}

/// The program's stderr; it must have failed with an error of its own.
pub(crate) fn fails(folder: &Path, args: &[&str]) -> String {
    let output = undertone(folder, args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "undertone {}: {said}", args.join(" "));
    said
}

/// Runs the experiment, with changes, in a new folder, which has it as `experiment.toml`.
pub(crate) fn run(changes: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), EXPERIMENT).unwrap();
    succeeds(folder.path(), &[&["run", "experiment.toml", "--run", "."], changes].concat());
    folder
}

/// The finished run: made once for all tests that only read it, and removed with the last of them.
pub(crate) fn finished() -> Arc<TempDir> {
    static RUN: Mutex<Weak<TempDir>> = Mutex::new(Weak::new());
    let mut known = RUN.lock().unwrap_or_else(PoisonError::into_inner);
    known.upgrade().unwrap_or_else(|| {
        let folder = Arc::new(run(&[]));
        *known = Arc::downgrade(&folder);
        folder
    })
}

/// A copy of the finished run, to be changed.
pub(crate) fn copy() -> TempDir {
    let (from, to) = (finished(), tempfile::tempdir().unwrap());
    for (name, bytes) in contents(from.path()) {
        let path = to.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    to
}

/// Every file below a folder, by its path there.
pub(crate) fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// The files that differ between two folders.
pub(crate) fn differing(left: &Path, right: &Path) -> Vec<String> {
    let (left, right) = (contents(left), contents(right));
    let names = left.keys().chain(right.keys().filter(|name| !left.contains_key(*name)));
    names.filter(|name| left.get(*name) != right.get(*name)).cloned().collect()
}
