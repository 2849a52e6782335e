//! Activations at hook points, as safetensors: each tensor bears its hook point's name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hooks::listen::Cache;
use hooks::{Adapter, Batch, Chat, Gate, HookPoint, Hooks, Pass, Qwen, condition, files, tensor_file};
use tch::Kind;

use super::ModelArgs;
use crate::progress::say;
use crate::workbench::open_model;

/// Writes activations of one chat turn, or of rows of token ids, as f32 safetensors.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  undertone activations --model pocket --user Hello \\
    --points 'logits,blocks.*.hook_resid_post' --out hello.safetensors")]
pub struct Activations {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of token ids as JSON, such as `[[1,2,3],[4,5]]`; no tokenizer is needed. Shorter rows are padded on the right.
    #[arg(long, conflicts_with_all = ["system", "user"], required_unless_present = "user")]
    ids: Option<PathBuf>,
    /// The system prompt; the template's default when left out, an empty block for "".
    #[arg(long)]
    system: Option<String>,
    /// What the user says.
    #[arg(long)]
    user: Option<String>,
    /// Hook points, separated by commas, in TransformerLens' spelling; * stands for every block.
    #[arg(long, value_delimiter = ',', required = true)]
    points: Vec<String>,
    /// A LoRA as PEFT saves it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// At which tokens the adapter acts.
    #[arg(long, default_value = "everywhere")]
    gate: Gate,
    /// The file to write.
    #[arg(long)]
    out: PathBuf,
}

/// Runs the model once and writes what the taps saw.
pub fn run(args: &Activations, device: &str, force: bool) -> Result<()> {
    ensure!(force || !args.out.exists(), "{} is there already; hint: overwrite it with --force", args.out.display());
    let files = open_model(&args.model.model)?;
    let device = hooks::device::device(device)?;
    let n_layers = files.config.n_layers;
    let points =
        args.points.iter().map(|name| HookPoint::select(name.trim(), n_layers)).collect::<hooks::Result<Vec<_>>>()?;
    let points: BTreeSet<HookPoint> = points.into_iter().flatten().collect();

    let (batch, acts) = match (&args.ids, &args.user) {
        (Some(path), _) => {
            let rows = ids(path, files.config.d_vocab)?;
            let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
            if !(args.gate.is_everywhere() || args.gate.is_nowhere()) {
                bail!(
                    "the gate {} speaks of classes of tokens, which --ids does not have; hint: use --system and --user",
                    args.gate
                );
            }
            (Batch::from_ids(&rows, device)?, None)
        }
        (None, user) => {
            let prompt =
                Chat::from_files(&files)?.prompt(args.system.as_deref(), user.as_deref().unwrap_or_default())?;
            let acts = if args.gate.is_everywhere() { None } else { Some(args.gate.acts(&prompt)?) };
            (Batch::of(&[&prompt], device)?, acts)
        }
    };
    let model = Qwen::load(&files, device, args.model.dtype.kind())?;
    let adapter = args.adapter.as_deref().map(|folder| Adapter::load(folder, &model.config, device)).transpose()?;
    super::gate_needs_adapter(&args.gate, adapter.is_some())?;
    let gate = acts.map(|acts| condition::mask(&[acts], device)).transpose()?;
    let adapter = adapter.as_ref().filter(|_| !args.gate.is_nowhere());

    let mut cache = Cache::default();
    tch::no_grad(|| {
        let hooks = Hooks::default().on(points.iter().copied(), &mut cache);
        model.forward(&batch, &mut Pass { adapter, gate, hooks, ..Pass::default() }).map(drop)
    })?;
    let float = |(point, tensor): (HookPoint, &tch::Tensor)| Ok((point.to_string(), tensor.f_to_kind(Kind::Float)?));
    let tensors = cache.iter().map(float).collect::<Result<Vec<_>>>()?;
    let metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("model".to_owned(), files.name.clone()),
        ("gate".to_owned(), args.gate.to_string()),
    ]);
    tensor_file::write(&args.out, &tensors, &metadata)?;
    say(format!("activations: {} tensors in {}", tensors.len(), args.out.display()));
    Ok(())
}

/// Rows of token ids from a JSON file, each id within the vocabulary.
fn ids(path: &std::path::Path, d_vocab: i64) -> Result<Vec<Vec<i64>>> {
    let expected = || format!("{}: expected rows of token ids such as [[1,2,3],[4,5]]", path.display());
    let rows: Vec<Vec<i64>> = serde_json::from_slice(&files::read(path)?).with_context(expected)?;
    ensure!(!rows.is_empty(), "{}, found no row", expected());
    for (at, row) in rows.iter().enumerate() {
        ensure!(!row.is_empty(), "{}, found an empty row {at}", expected());
        if let Some(id) = row.iter().find(|id| !(0..d_vocab).contains(*id)) {
            bail!("{}: row {at} has the id {id}, expected 0 to {}", path.display(), d_vocab - 1);
        }
    }
    Ok(rows)
}
