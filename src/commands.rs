//! The subcommands, a file each. They read arguments and print; what they do is in `stages` and `claim`.

pub mod activations;
pub mod args;
pub mod ask;
pub mod columns;
pub mod completions;
pub mod export;
pub mod measure;
pub mod pocket;
pub mod profile;
pub mod report;
pub mod run;
pub mod style;
pub mod tokens;

use anyhow::{Context, Result, ensure};
use hooks::{Edit, EditText, Gate, ModelFiles, Provenance};

use crate::hinted;

/// The edits of a command line, with their tensors.
fn load_edits(edits: &[EditText], files: &ModelFiles) -> Result<Vec<Edit>> {
    if edits.is_empty() {
        return Ok(vec![]);
    }
    let here = Provenance::of(files);
    let loaded = edits.iter().map(|edit| edit.load(&files.config, &here).with_context(|| format!("--edit {edit}")));
    Ok(loaded.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Refuses a gate that nothing would pass through.
fn gate_needs_adapter(gate: &Gate, adapter: bool) -> Result<()> {
    ensure!(
        adapter || gate.is_everywhere(),
        hinted!("the gate is {gate}, but there is no adapter to gate"; "name one with --adapter")
    );
    Ok(())
}
