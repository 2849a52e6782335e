//! The subcommands, a file each. Stages of the pipeline are functions of a loaded experiment and a run's folder.

pub mod activations;
pub mod ask;
pub mod columns;
pub mod completions;
pub mod export;
pub mod paint;
pub mod pocket;
pub mod profile;
pub mod tokens;

use anyhow::{Context, Result, ensure};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use hooks::{Edit, EditText, Gate, ModelFiles, Provenance};

use crate::claim::Size;
use crate::experiment::Dtype;

/// Which model, and in which precision.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A folder in Hugging Face form, a hub id, a .gguf file, pocket, or tiny-random.
    #[arg(long)]
    pub model: String,
    /// The kind of the weights.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
}

impl ValueEnum for Dtype {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::F32, Self::Bf16]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }))
    }
}

impl ValueEnum for Size {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Pocket, Self::Small, Self::Paper]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::Pocket => "The embedded pocket model: minutes on two CPU cores",
            Self::Small => "A Qwen of half a billion parameters",
            Self::Paper => "A Qwen of 7 or 14 billion parameters, on CUDA",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

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
        "the gate is {gate}, but there is no adapter to gate; hint: name one with --adapter"
    );
    Ok(())
}
