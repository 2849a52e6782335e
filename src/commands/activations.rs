//! Writes activations at hook points as safetensors. Each tensor has its hook point's name.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hooks::{
    Cache, Chat, Condition, EditText, HookPoint, ModelFiles, Provenance, Qwen, Sequence, files, gradient,
    run_rows_with_hooks, tensor_file,
};
use tch::Kind;

use super::args::{ConditionArgs, ForceArg, ModelArgs};
use crate::hinted;
use crate::output::progress::say;
use crate::stages::workbench::open_model;

/// Writes activations of one chat turn, or of rows of token ids, as f32 safetensors.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  undertone activations --model pocket --user Hello \\
    --points 'logits,blocks.*.hook_resid_post' --out hello.safetensors")]
pub struct ActivationsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of token ids as JSON, such as `[[1,2,3],[4,5]]`; no tokenizer is needed. Shorter rows are padded on the
    /// right.
    #[arg(long, conflicts_with_all = ["system", "user"], required_unless_present = "user")]
    ids: Option<PathBuf>,
    /// The system prompt; if left out, the template's default; "" is an empty block.
    #[arg(long)]
    system: Option<String>,
    /// The user's text.
    #[arg(long)]
    user: Option<String>,
    /// Hook points, separated by commas, in TransformerLens' spelling; * means every block.
    #[arg(long, value_delimiter = ',', required = true)]
    points: Vec<String>,
    #[command(flatten)]
    with: ConditionArgs,
    /// An answer to the user, run after the prompt.
    #[arg(long, conflicts_with = "ids")]
    answer: Option<String>,
    /// Also writes POINT.grad: the gradient, at each point, of the answer's summed −log p.
    #[arg(long, requires = "answer", conflicts_with = "stop_at_layer")]
    gradients: bool,
    /// Stops before this block, as in TransformerLens: 0 runs the embeddings alone.
    #[arg(long)]
    stop_at_layer: Option<usize>,
    /// The file to write.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    force: ForceArg,
}

/// Runs the model once and writes the activations.
pub fn run(args: &ActivationsArgs) -> Result<()> {
    ensure!(
        args.force.force || !args.out.exists(),
        hinted!("{} is there already", args.out.display(); "overwrite it with --force")
    );
    let files = open_model(&args.model.model)?;
    let device = hooks::device::device(&args.model.device)?;
    let n_layers = files.config.n_layers;
    let points =
        args.points.iter().map(|name| HookPoint::select(name.trim(), n_layers)).collect::<hooks::Result<Vec<_>>>()?;
    let points: BTreeSet<HookPoint> = points.into_iter().flatten().collect();
    let points: Vec<HookPoint> = points.into_iter().collect();
    let edits = args.with.load_edits(&files)?;

    let rows = rows(args, &files)?;
    let model = Qwen::load(&files, device, args.model.dtype.kind())?;
    let adapter = args.with.open_adapter(&model)?;
    let condition = Condition { adapter: adapter.as_ref(), gate: args.with.gate.clone(), edits };

    let seen = if args.gradients {
        let row = &rows[0];
        let found = gradient::at_points(&model, row, &condition, &points, |logits| {
            let completion = row.completion.start as i64..row.completion.end as i64;
            let logprobs = logits.f_squeeze_dim(0)?.f_log_softmax(-1, Kind::Float)?;
            let predicting = logprobs.f_narrow(0, completion.start - 1, completion.end - completion.start)?;
            let labels = tch::Tensor::f_from_slice(&row.ids[row.completion.clone()])?.f_to_device(logits.device())?;
            Ok(predicting.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_sum(Kind::Float)?.f_neg()?)
        })?;
        say(format!("activations: −log p of the answer is {:.6}", found.loss));
        let gradients = found.gradients.into_iter().map(|(point, gradient)| (format!("{point}.grad"), gradient));
        found.activations.into_iter().map(|(point, seen)| (point.to_string(), seen)).chain(gradients).collect()
    } else {
        let mut cache = Cache::default();
        let rows: Vec<&Sequence> = rows.iter().collect();
        let stop_at_layer = args.stop_at_layer.unwrap_or(n_layers);
        let whole = args.stop_at_layer.is_none();
        let _ = tch::no_grad(|| {
            run_rows_with_hooks(&model, &rows, &condition, &points, &mut cache, |model, batch, pass| {
                if whole { model.forward(batch, pass) } else { model.resid_before(stop_at_layer, batch, pass) }
            })
        })?;
        cache.iter().map(|(point, seen)| (point.to_string(), seen.shallow_clone())).collect::<Vec<_>>()
    };
    let float = |(name, tensor): (String, tch::Tensor)| Ok((name, tensor.f_to_kind(Kind::Float)?));
    let tensors = seen.into_iter().map(float).collect::<Result<Vec<_>>>()?;
    for (name, tensor) in &tensors {
        let n_broken = tensor_file::n_broken(name, tensor)?;
        ensure!(
            n_broken == 0,
            hinted!(
                "{name} is NaN or infinite in {n_broken} of its {} values, so nothing was written", tensor.numel();
                "look for values that overflow in the model, the adapter, the edits and their files"
            )
        );
    }
    let mut metadata = Provenance::of(&files).metadata();
    let lengths: Vec<String> = rows.iter().map(|row| row.ids.len().to_string()).collect();
    metadata.insert("lengths".to_owned(), lengths.join(","));
    if adapter.is_some() {
        let said = [("gate", args.with.gate.to_string()), ("decode_policy", args.with.gate.decode_policy().to_owned())];
        metadata.extend(said.map(|(key, value)| (key.to_owned(), value)));
    }
    let edits = args.with.edits.iter().enumerate().map(|(at, edit)| (format!("edit.{at}"), edit.to_string()));
    metadata.extend(edits);
    tensor_file::write(&args.out, &tensors, &metadata)?;
    say(format!("activations: {} tensors in {}", tensors.len(), args.out.display()));
    Ok(())
}

/// The rows to run: one chat turn, or rows of token ids without classes and text.
fn rows(args: &ActivationsArgs, files: &ModelFiles) -> Result<Vec<Sequence>> {
    if let Some(path) = &args.ids {
        if !args.with.gate.is_blind() || args.with.edits.iter().any(EditText::names_tokens) {
            bail!(hinted!(
                "a gate or an edit speaks of tokens, whose classes and text --ids does not have";
                "use --system and --user"
            ));
        }
        return ids(path, files.config.d_vocab)?.into_iter().map(|ids| Ok(Sequence::of_ids(ids))).collect();
    }
    let (system, user) = (args.system.as_deref(), args.user.as_deref().unwrap_or_default());
    let chat = Chat::from_files(files)?;
    let row = match &args.answer {
        Some(answer) => {
            // The row with the answer, without the end of the turn.
            let row = chat.row_text(system, user, answer)?;
            row.with_completion(&row.ids[row.completion.start..row.content_end])
        }
        None => chat.prompt(system, user)?,
    };
    Ok(vec![row])
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
