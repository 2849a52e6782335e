//! All integration tests, in one binary: libtorch is linked and loaded once.
//!
//! Golden files are in `golden/`, each with the Python that made it. Run a part by its name: `cargo test --release
//! --test main parity::`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod compare; // reads golden files, and says where two tensors differ
mod program; // runs the program in a folder, with a small experiment

mod adapters; // PEFT's adapters load and act as in PEFT; ours are read back bit by bit; misfits are refused with both lists
mod arms; // teachers of other kinds, and arms: files, rows, going on, the same bytes
mod claims; // a claim as a file: its runs, table, tests, verdict and page; going on, a changed claim; the kept tables give the kept tests
mod cli; // the program as a user meets it: help, errors and their exit codes, tokens, ask, activations
mod docs; // the pages for readers: experiments, commands, keys and defaults, every message of an error
mod exports; // the learned direction as safetensors, CSV and control-vector GGUF; steering refuses another model
mod kill; // killed at random moments, a run ends with the bytes of an undisturbed one; full disks, read-only folders, a loss that is not finite
mod ledger; // the ledger of a run: repeated bit by bit, it balances, for each optimizer that it takes
mod look; // the page of a run: its numbers are those of the command that it names; other pages and names are refused
mod own_adapter; // an adapter trained elsewhere: taken as it is, measured as a student of ours, misfits refused
mod parity; // logits, every hook point, losses, gradients of the LoRA and the residual stream, the gate: as transformers and PEFT
mod pipeline; // a small experiment through all stages: files, columns, same seeds and same bytes, going on, full finetuning, the report
mod pocket; // the pocket models: ids, logits and answers as in transformers; embedded as they lie in assets/
mod real; // the real model against transformers; only where UNDERTONE_REAL_MODEL names it (`make test-real`)
mod recompute; // a fresh run has the numbers that transformers, PEFT and PyTorch recomputed for a kept run
mod robustness; // every reader of files from elsewhere: saved, mutated and forged bytes never panic and take bounded memory
mod selection; // what a student learns from: rows by signal, tokens by weight, steered teachers, signal of rows from elsewhere
mod soft_labels; // students of soft labels: whose predictions they are, kept beside the rows, moved and drawn
mod stated; // numbers from kept tables, in the README and docs/
mod training; // ten steps of AdamW and SGD: losses, gradient norms and weights as torch.optim

#[test]
fn no_test_file_is_forgotten() {
    let listed = include_str!("main.rs");
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "main") else { continue };
        let declared = listed.lines().any(|line| line.starts_with(&format!("mod {module}; // ")));
        assert!(
            declared,
            "tests/{name} is not listed in tests/main.rs, so it would never run; add `mod {module}; // what it tests`"
        );
    }
}
