//! Stage 4: the learned direction of one layer, or of all, as a file that other tools read.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::output::progress::{note, say};
use crate::output::vectors::Vectors;
use crate::stages::run_dir::RunDir;

/// Writes the learned direction as safetensors, CSV, or a control-vector GGUF, by the file's ending.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  undertone export runs/demo --layer 1 --to direction.gguf
  undertone export runs/demo --to directions.csv")]
pub struct Export {
    /// The run's folder.
    run: PathBuf,
    /// The block after which the direction was measured; all blocks when left out (a GGUF leaves out block 0).
    #[arg(long)]
    layer: Option<usize>,
    /// The file: .safetensors, .csv or .gguf.
    #[arg(long)]
    to: PathBuf,
}

/// Reads the run's vectors and writes those asked for.
pub fn run(args: &Export, force: bool) -> Result<()> {
    let run = RunDir::open(&args.run, force)?;
    let file = run.vectors().join("vectors.safetensors");
    let mut vectors = Vectors::read(&file).context("hint: undertone measure RUN direction writes the vectors")?;
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
    if args.to.exists() && !force {
        bail!("{} is there already; hint: overwrite it with --force", args.to.display());
    }
    vectors.write(&args.to, vectors.provenance.get("architecture").map_or("qwen2", String::as_str))?;
    note(&args.to.display().to_string(), &vectors.remarks()?);
    let layers: Vec<String> = vectors.by_layer.keys().map(ToString::to_string).collect();
    say(format!("export: layer {} of {} in {}", layers.join(", "), args.run.display(), args.to.display()));
    Ok(())
}
