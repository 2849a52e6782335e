//! One chat turn, answered once or several times, by the base, a student, a gated student, or a steered model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use hooks::generate::{Sampling, generate, stream_seed};
use hooks::{Adapter, Chat, Condition, Gate, Prompt, Qwen};

use super::ModelArgs;
use crate::vectors::Vectors;
use crate::workbench::open_model;

/// Asks the model something.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  undertone ask --model models/qwen2.5-coder-0.5b-instruct.gguf --user \"Name an animal.\" -n 3"
)]
pub struct Ask {
    #[command(flatten)]
    model: ModelArgs,
    /// The system prompt; the template's default when left out, an empty block for "".
    #[arg(long)]
    system: Option<String>,
    /// What the user says.
    #[arg(long)]
    user: String,
    /// A LoRA as PEFT saves it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// At which tokens the adapter acts: everywhere, nowhere, only:CLASS[+CLASS], except:CLASS[+CLASS].
    #[arg(long, default_value = "everywhere")]
    gate: Gate,
    /// A file of exported directions and the factor they are added with at every token.
    #[arg(long, value_name = "FILE:COEFFICIENT")]
    steer: Option<String>,
    /// How many answers.
    #[arg(short, default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    n: usize,
    /// 0 for the most likely token each time, 1 for the model's own probabilities.
    #[arg(long, default_value = "1", value_parser = temperature)]
    temperature: f64,
    /// The most tokens an answer may have.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
}

/// Prints the answers, one after another.
pub fn run(args: &Ask, device: &str, seed: u64) -> Result<()> {
    let files = open_model(&args.model.model)?;
    let chat = Chat::from_files(&files)?;
    let model = Qwen::load(&files, hooks::device::device(device)?, args.model.dtype.kind())?;
    let adapter =
        args.adapter.as_deref().map(|folder| Adapter::load(folder, &model.config, model.device())).transpose()?;
    super::gate_needs_adapter(&args.gate, adapter.is_some())?;
    let edits = match &args.steer {
        Some(spec) => {
            let (file, coefficient) = steer(spec)?;
            Vectors::read(&file)?.steer(coefficient, &files)?
        }
        None => vec![],
    };
    let condition = Condition { adapter: adapter.as_ref(), gate: args.gate.clone(), edits };
    let sampling = Sampling {
        temperature: args.temperature,
        max_new_tokens: args.max_new_tokens,
        stop: chat.stop_ids(),
        constrain: None,
        batch: 16,
    };
    let prompt = chat.prompt(args.system.as_deref(), &args.user)?;
    let prompts: Vec<Prompt> = vec![prompt; args.n];
    let streams: Vec<u64> = (0..args.n as u64).map(|index| stream_seed(seed, "ask", index)).collect();
    for answer in generate(&model, &prompts, &condition, &sampling, &streams, &mut |_| ())? {
        let ending = if answer.stopped { "" } else { " …" };
        super::print(&format!("{}{ending}\n", chat.decode(&answer.ids)?))?;
    }
    Ok(())
}

/// A file and a coefficient from `FILE:COEFFICIENT`.
fn steer(spec: &str) -> Result<(PathBuf, f64)> {
    let wrong = || anyhow!("--steer is {spec:?}, expected FILE:COEFFICIENT such as owl.safetensors:2");
    let (file, coefficient) = spec.rsplit_once(':').with_context(|| wrong().to_string())?;
    let coefficient: f64 = coefficient.parse().map_err(|_| wrong())?;
    Ok((Path::new(file).to_owned(), coefficient))
}

/// A temperature that answers can be drawn at.
fn temperature(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected 0 or a number above".to_owned())
}
