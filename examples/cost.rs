//! What the host does per step, counted in instructions: a Qwen of 24 narrow layers on one thread, so that little is left but
//! the program and libtorch's dispatch. `scripts/check_cost.py` runs this under callgrind, which counts inside `counted` alone
//! and writes a file each time it returns; the name of each count is printed before it.

use std::io::Write;

use anyhow::{Context, Result};
use hooks::{
    Adapter, Cache, Chat, Condition, Config, HookPoint, LoraConfig, ModelFiles, Qwen, Sampling, generate,
    next_token_logprobs, run_with_hooks,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind};
use undertone::training::settings::{Finetune, Seeds};
use undertone::training::training_loop::finetune_lora;

/// What is counted once and then three times: the difference is two steps, without what is done around them.
const FEW: u64 = 1;
const MORE: u64 = 3;

fn main() -> Result<()> {
    tch::set_num_threads(1);
    let tiny = ModelFiles::open("tiny-random")?;
    let config = Config { n_layers: 24, d_model: 32, n_heads: 2, n_kv_heads: 1, d_mlp: 64, ..tiny.config.clone() };
    let tokenizer = tiny.tokenizer.clone().context("tiny-random has a tokenizer")?;
    let files = ModelFiles::fresh("narrow", config, tokenizer, ChaCha8Rng::seed_from_u64(1))?;
    let (model, chat) = (Qwen::load(&files, Device::Cpu, Kind::Float)?, Chat::from_files(&files)?);
    let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut ChaCha8Rng::seed_from_u64(2), Device::Cpu)?;
    let row = chat.row_text(Some(""), "12, 345", "678, 90")?;
    let prompt = chat.prompt(Some(""), "12, 345")?;
    let (rows, prompts) = (vec![row.clone(); 2], vec![prompt.clone(); 4]);
    let (base, student) = (Condition::default(), Condition::adapted(&adapter));
    let points = HookPoint::select("blocks.*.hook_resid_post", model.config.n_layers)?;

    let lora_step = |n: u64| {
        let config = Finetune {
            max_steps: Some(n),
            batch_size: rows.len(),
            gradient_accumulation_steps: 1,
            ..Finetune::default()
        };
        finetune_lora(&model, &adapter, &rows, &|_| false, &config, Seeds::default(), &mut |_, _| Ok(()))
    };
    let forward = |n: u64, condition: &Condition<'_>| {
        (0..n).try_for_each(|_| Ok(next_token_logprobs(&model, std::slice::from_ref(&prompt), condition).map(drop)?))
    };
    let cached_forward = |n: u64| {
        let seen = |_| -> Result<()> {
            let mut cache = Cache::default();
            let logits = tch::no_grad(|| run_with_hooks(&model, &row, &base, &points, &mut cache))?;
            anyhow::ensure!(cache.iter().count() == points.len() && logits.numel() > 0, "the cache is not full");
            Ok(())
        };
        (0..n).try_for_each(seen)
    };
    let decode_step = |n: u64| {
        let sampling =
            Sampling { temperature: 1.0, max_new_tokens: 1 + n as usize, stop: vec![], constrain: None, batch: 4 };
        Ok(generate(&model, &prompts, &base, &sampling, &[1, 2, 3, 4], &mut |_| ()).map(drop)?)
    };
    count("lora_step", &lora_step)?;
    count("forward", &|n| forward(n, &base))?;
    count("adapted_forward", &|n| forward(n, &student))?;
    count("cached_forward", &cached_forward)?;
    count("decode_step", &decode_step)
}

/// Two counts of the same work, after it was done once: what is made ready on first use is in neither.
fn count(name: &str, work: &dyn Fn(u64) -> Result<()>) -> Result<()> {
    work(FEW)?;
    writeln!(std::io::stdout(), "{name} {FEW} {MORE}")?;
    counted(work, FEW)?;
    counted(work, MORE)
}

/// Where callgrind counts.
#[inline(never)]
fn counted(work: &dyn Fn(u64) -> Result<()>, n: u64) -> Result<()> {
    std::hint::black_box(work)(std::hint::black_box(n))
}
