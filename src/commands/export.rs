//! Stage 4: writes the learned direction of one layer, or of all, as a file for other tools.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::args::ForceArg;
use super::pocket::unfinished;
use crate::output::hint::Hinted;
use crate::output::progress::{note, say};
use crate::output::vectors::Vectors;
use crate::stages::run_dir::RunDir;

/// Writes the learned direction as safetensors, CSV or control-vector GGUF, by the file's ending.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  undertone export runs/demo --layer 1 --to direction.gguf
  undertone export runs/demo --to directions.csv")]
pub struct ExportArgs {
    /// The run's folder.
    run: PathBuf,
    /// The block after which the direction was measured; if left out, all blocks (in a GGUF, all except block 0).
    #[arg(long)]
    layer: Option<usize>,
    /// The file: .safetensors, .csv or .gguf.
    #[arg(long)]
    to: PathBuf,
    #[command(flatten)]
    force: ForceArg,
}

/// Reads the run's vectors and writes the chosen ones.
pub fn run(args: &ExportArgs) -> Result<()> {
    let run = RunDir::open(&args.run)?;
    let file = run.vectors().join("vectors.safetensors");
    let mut vectors = Vectors::read(&file)
        .map_err(|error| Hinted::because(error, "undertone measure RUN direction writes the vectors"))?;
    match args.layer {
        Some(layer) => {
            vectors.layer(layer)?;
            vectors.by_layer.retain(|known, _| *known == layer);
        }
        None if args.to.extension().is_some_and(|ending| ending == "gguf") => {
            vectors.by_layer.remove(&0);
        }
        None => (),
    }
    unfinished(&args.to, &args.force)?;
    vectors.write(&args.to, vectors.provenance.get("architecture").map_or("qwen2", String::as_str))?;
    note(&args.to.display().to_string(), &vectors.remarks()?);
    let layers: Vec<String> = vectors.by_layer.keys().map(ToString::to_string).collect();
    say(format!("export: layer {} of {} in {}", layers.join(", "), args.run.display(), args.to.display()));
    Ok(())
}
