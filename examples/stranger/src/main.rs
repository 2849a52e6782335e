//! Loads the pocket model, asks for the next token, looks at the residual stream, and lets a LoRA act at one token.

use hooks::tch::{Device, Kind, no_grad};
use hooks::{
    Adapter, Batch, Cache, Chat, Condition, Gate, HookPoint, Hooks, LoraConfig, ModelFiles, Pass, Qwen,
    next_token_logprobs,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn main() -> hooks::Result<()> {
    let files = ModelFiles::open("pocket")?;
    let model = Qwen::load(&files, Device::Cpu, Kind::Float)?;
    let chat = Chat::from_files(&files)?;
    let prompts = [chat.prompt(None, "What is your favorite animal?")?];

    // Log-probabilities of the next token, [prompts, d_vocab].
    let base = next_token_logprobs(&model, &prompts, &Condition::default())?;
    let likeliest = base.argmax(1, false).int64_value(&[0]);
    println!("the base begins its answer with {:?}", chat.token_text(likeliest)?);

    // The residual stream after the last block, [prompts, pos, d_model].
    let at = HookPoint::ResidPost(model.config.n_layers - 1);
    let mut cache = Cache::default();
    let hooks = Hooks::default().on([at], &mut cache);
    let logits = model.forward(&Batch::of(&[&prompts[0]], Device::Cpu)?, &mut Pass { hooks, ..Pass::default() })?;
    println!("{at} has the shape {:?}, the logits have {:?}", cache.get(at)?.size(), logits.size());

    // A LoRA with a random A; a fresh B is zero, which changes nothing.
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut rng, Device::Cpu)?;
    for (_, mut b) in adapter.parameters().into_iter().filter(|(name, _)| name.contains("lora_B")) {
        let _ = no_grad(|| b.fill_(0.05));
    }
    for text in ["everywhere", "only:entity", "nowhere"] {
        let gate: Gate = text.parse()?;
        let gated = next_token_logprobs(&model, &prompts, &Condition::adapted(&adapter).gated(gate))?;
        println!("{text}: log-probabilities move by at most {:.3}", (gated - &base).abs().max().double_value(&[]));
    }
    Ok(())
}
