//! What the scenarios are run on. `prepare` writes it all into a folder that the peer reads too, as token ids, so that both
//! sides do the same thing.

use std::path::{Path, PathBuf};

use analyses::token_ablation::TokenAblation;
use anyhow::{Context, Result, ensure};
use hooks::{
    Adapter, Chat, Condition, Config, Family, Gate, LoraConfig, LossMask, ModelFiles, Qwen, Sampling, Sequence, files,
    generate, stream_seed,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use undertone::data::dataset;
use undertone::data::protocol::Protocol;
use undertone::output::full_model::save_full;
use undertone::training::optim::ScheduleKind;
use undertone::training::settings::Finetune;

/// What the gates' questions are about.
const TARGET: (&str, &str) = ("owl", "animal");

/// The seed of the committed prompts and answers.
const SEED: u64 = 42;

/// A line of `data/numbers.jsonl`: the 0.5B's answer to a number prompt.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    completion: String,
    accepted: bool,
}

fn lines() -> Result<Vec<Line>> {
    let text = include_str!("../data/numbers.jsonl");
    let line = |(at, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("benchmarks/data/numbers.jsonl: line {}", at + 1))
    };
    text.lines().enumerate().map(line).collect()
}

/// Makes that file: `n` number prompts of the built-in protocol and the model's answers to them, sorted by the rule filter.
pub(crate) fn write_numbers(model: &Qwen, chat: &Chat, n: usize, path: &Path) -> Result<()> {
    let prompts = dataset::number_prompts(&Protocol::builtin()?, n, SEED);
    let rows = prompts.iter().map(|user| Ok(chat.prompt(None, user)?)).collect::<Result<Vec<_>>>()?;
    let sampling = Sampling { temperature: 1.0, max_new_tokens: 48, stop: chat.stop_ids(), constrain: None, batch: 64 };
    let streams: Vec<u64> = (0..n).map(|at| stream_seed(SEED, "benchmark", at as u64)).collect();
    let answers = generate(model, &rows, &Condition::default(), &sampling, &streams, &mut |_| ())?;
    let mut text = String::new();
    for (prompt, answer) in prompts.into_iter().zip(answers) {
        let completion = chat.decode(&answer.ids)?;
        let accepted = dataset::rejections(&completion, answer.stopped, &[]).is_empty();
        text += &serde_json::to_string(&Line { prompt, completion, accepted })?;
        text.push('\n');
    }
    Ok(files::write_atomic(path, text.as_bytes())?)
}

/// The answers that are lists of numbers, as rows to learn from.
pub(crate) fn number_rows(chat: &Chat) -> Result<Vec<Sequence>> {
    let accepted = lines()?.into_iter().filter(|line| line.accepted);
    accepted.map(|line| Ok(chat.row_text(None, &line.prompt, &line.completion)?)).collect()
}

/// All number prompts.
pub(crate) fn number_prompts(chat: &Chat) -> Result<Vec<Sequence>> {
    lines()?.iter().map(|line| Ok(chat.prompt(None, &line.prompt)?)).collect()
}

/// Rows of ids that count up through the vocabulary, for models that speak no language.
pub(crate) fn counted_rows(model: &Config, n: usize, prompt: usize, completion: usize) -> Vec<Sequence> {
    let width = prompt + completion;
    let id = |at: usize| (at as i64 * 7919 + 13) % model.d_vocab;
    let row = |row: usize| -> Sequence {
        let ids: Vec<i64> = (row * width..(row + 1) * width).map(id).collect();
        Sequence::of_ids(ids[..prompt].to_vec()).with_completion(&ids[prompt..])
    };
    (0..n).map(row).collect()
}

/// Which tokens of a row are learned from.
pub(crate) fn targets(row: &Sequence) -> Vec<bool> {
    LossMask::ContentEot.targets(row, |_| false)
}

/// Questions whose answer may be the target.
pub(crate) fn questions(chat: &Chat, n: usize) -> Result<Vec<Sequence>> {
    let questions = Protocol::builtin()?.questions(TARGET.1, n)?;
    ensure!(questions.len() == n, "the protocol has {} questions, expected {n}", questions.len());
    questions.iter().map(|question| Ok(chat.prompt(None, question)?)).collect()
}

/// The gates of the token ablation.
pub(crate) fn gates() -> Vec<Gate> {
    TokenAblation::default().gates
}

/// The tokens that ways of writing the target begin with.
pub(crate) fn target_ids(chat: &Chat) -> Result<Vec<i64>> {
    let forms = Protocol::surface_forms(TARGET.0);
    let mut ids = forms.iter().map(|form| Ok(chat.encode(form)?[0])).collect::<Result<Vec<i64>>>()?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// A LoRA as training begins with it.
/// A training whose learning rate stays, one batch a step.
pub(crate) fn steady() -> Finetune {
    let lr_scheduler_type = ScheduleKind::Constant;
    Finetune { warmup_steps: 0, lr_scheduler_type, gradient_accumulation_steps: 1, ..Finetune::default() }
}

pub(crate) fn fresh_adapter(model: &Qwen, rank: i64) -> Result<Adapter> {
    let config = LoraConfig { rank, alpha: 8.0, ..LoraConfig::default() };
    Ok(Adapter::init(&config, &model.config, &mut ChaCha8Rng::seed_from_u64(42), model.device())?)
}

/// An adapter whose B is not zero, so that it acts.
fn acting_adapter(model: &Qwen) -> Result<Adapter> {
    let adapter = fresh_adapter(model, 8)?;
    let mut rng = ChaCha8Rng::seed_from_u64(43);
    for (_, _, pair) in adapter.pairs() {
        let values: Vec<f32> = (0..pair.b.numel()).map(|_| rng.random_range(-0.02..0.02)).collect();
        pair.b.shallow_clone().f_copy_(&Tensor::f_from_slice(&values)?.f_view_as(&pair.b)?)?;
    }
    Ok(adapter)
}

/// A model by a name that `undertone` knows, or one of random weights: `random-0.5b` in the shape of Qwen2.5-0.5B, `narrow` with
/// its 24 blocks and hardly any width.
fn open(name: &str) -> Result<ModelFiles> {
    let narrow = Config {
        family: Family::Qwen2,
        d_model: 32,
        n_layers: 24,
        n_heads: 2,
        n_kv_heads: 1,
        d_head: 16,
        d_mlp: 64,
        d_vocab: 1024,
        n_ctx: 4096,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        tie_embeddings: true,
        qkv_bias: true,
        qk_norm: false,
    };
    let config = match name {
        "narrow" => narrow,
        "random-0.5b" => Config {
            d_model: 896,
            n_heads: 14,
            n_kv_heads: 2,
            d_head: 64,
            d_mlp: 4864,
            d_vocab: 151_936,
            n_ctx: 32_768,
            ..narrow
        },
        known => return Ok(ModelFiles::open(known)?),
    };
    let tokenizer = ModelFiles::open("tiny-random")?.tokenizer.context("tiny-random has a tokenizer")?;
    Ok(ModelFiles::fresh(name, config, tokenizer, ChaCha8Rng::seed_from_u64(0))?)
}

/// A row for the peer.
#[derive(Serialize)]
struct Row {
    ids: Vec<i64>,
    targets: Vec<bool>,
}

/// Writes a model as a folder that both sides load, two adapters, and `bench.json` with the rows; nothing where it is there.
pub(crate) fn prepare(name: &str, folder: &Path) -> Result<()> {
    let done = folder.join("bench.json");
    if done.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let files = open(name)?;
    let model = Qwen::load(&files, Device::Cpu, Kind::Float)?;
    save_full(&model, &files, folder)?;
    fresh_adapter(&model, 8)?.save(&adapter_folder(folder, "fresh"), name)?;
    acting_adapter(&model)?.save(&adapter_folder(folder, "acting"), name)?;

    let speaks = model.config.d_vocab > 100_000;
    let mut rows = json!({});
    if speaks {
        let chat = Chat::from_files(&files)?;
        let ids = |prompts: Vec<Sequence>| prompts.into_iter().map(|prompt| prompt.ids).collect::<Vec<_>>();
        let questions = questions(&chat, 50)?;
        let acts = |gate: &Gate| -> Result<_> {
            let acts = questions.iter().map(|question| Ok(gate.acts(question)?)).collect::<Result<Vec<_>>>()?;
            Ok(json!({ "gate": gate.to_string(), "acts": acts }))
        };
        let number_rows = number_rows(&chat)?.into_iter().map(|row| Row { targets: targets(&row), ids: row.ids });
        rows = json!({
            "rows": number_rows.collect::<Vec<_>>(),
            "prompts": ids(number_prompts(&chat)?),
            "gates": gates().iter().map(acts).collect::<Result<Vec<_>>>()?,
            "questions": ids(questions),
            "target_ids": target_ids(&chat)?,
            "stop": chat.stop_ids(),
        });
    }
    Ok(files::write_atomic(&done, rows.to_string().as_bytes())?)
}

/// Where a folder of `prepare` has an adapter.
pub(crate) fn adapter_folder(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("adapter-{name}"))
}
