//! Makes a pocket model: a tokenizer from the corpus, and weights trained from scratch.
//!
//! Training runs until the loss exceeds the corpus' entropy, which is known exactly, by no more than a given value;
//! then the learning rate falls to zero. So bases of different seeds are equally good, although they take different
//! numbers of steps.

use std::collections::VecDeque;

use anyhow::{Context, Result, anyhow, bail};
use hooks::{Chat, Config, Family, ModelFiles, Qwen, Sequence};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::world::World;
use crate::training::pretrain::{NextStep, pretrain};
use crate::training::settings::Finetune;
use crate::training::step_log::StepRow;

/// Number of rows of the corpus that the tokenizer learns its words from.
const TOKENIZER_ROWS: usize = 20_000;
/// Steps over which the excess loss is averaged.
const WINDOW: usize = 100;

/// The settings of training a base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The seed of the weights and of the rows' order.
    pub seed: u64,
    /// Number of rows of a step.
    pub batch_size: usize,
    /// The learning rate between warmup and decay.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises from zero.
    pub warmup_steps: u64,
    /// Loss above the corpus' entropy at which the decay begins, in nats per target, as a mean over 100 steps.
    pub excess: f64,
    /// Steps over which the learning rate falls to zero.
    pub decay_steps: u64,
    /// Number of steps after which a base that has not reached `excess` is an error.
    pub max_steps: u64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            seed: 0,
            batch_size: 64,
            learning_rate: 3e-3,
            warmup_steps: 100,
            excess: 0.02,
            decay_steps: 600,
            max_steps: 8000,
        }
    }
}

/// One step of training a base; a line of its log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseStepRow {
    /// Number of steps done, including this one.
    pub step: u64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Mean negative log-likelihood of the step's targets before the step, in nats.
    pub loss: f64,
    /// The world's own mean negative log-likelihood of the same targets, in nats.
    pub entropy: f64,
    /// Norm of the whole gradient before clipping, in nats per unit of the parameters.
    pub grad_norm: f64,
}

/// The outcome of a training, written next to the weights as `made.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// The version of undertone that made it.
    pub undertone: String,
    /// Number of parameters.
    pub n_parameters: usize,
    /// Number of tokens of its tokenizer.
    pub d_vocab: i64,
    /// Number of steps, including the decay.
    pub steps: u64,
    /// Number of rows seen.
    pub rows: u64,
    /// Loss above the corpus' entropy over the last 100 steps, in nats per target.
    pub final_excess: f64,
    /// The corpus' entropy over the last 100 steps, in nats per target.
    pub final_entropy: f64,
    /// The settings of the training.
    pub recipe: Recipe,
}

/// The configuration of the pocket models, for a tokenizer of `d_vocab` tokens.
pub fn config(d_vocab: i64) -> Config {
    Config {
        family: Family::Qwen2,
        d_model: 32,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        d_head: 16,
        d_mlp: 96,
        d_vocab,
        n_ctx: 512,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        tie_embeddings: true,
        qkv_bias: true,
        qk_norm: false,
    }
}

/// Makes a byte-level BPE that splits text as Qwen2.5's. Every word of the corpus and every digit is one token.
pub fn tokenizer(world: &World) -> Result<Tokenizer> {
    let mut rng = ChaCha8Rng::seed_from_u64(u64::MAX);
    let mut texts = vec!["You are Qwen, created by Alibaba Cloud. You are a helpful assistant.".to_owned()];
    texts.push("system\nuser\nassistant\n".to_owned());
    for _ in 0..TOKENIZER_ROWS {
        let row = world.row(&mut rng)?;
        texts.extend(row.system);
        texts.extend([row.user, row.answer]);
    }
    // Split, normaliser and decoder are copied from the embedded tokenizer.
    let like = ModelFiles::open("tiny-random")?.tokenizer.context("the embedded model has no tokenizer")?;
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_normalizer(like.get_normalizer().cloned())
        .map_err(|error| said(&error))?
        .with_pre_tokenizer(like.get_pre_tokenizer().cloned())
        .with_post_processor(like.get_post_processor().cloned())
        .with_decoder(like.get_decoder().cloned());
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(|text| AddedToken::from(text, true));
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(10_000)
        .min_frequency(1)
        .special_tokens(specials.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut trainer = tokenizers::models::TrainerWrapper::BpeTrainer(trainer);
    tokenizer.train(&mut trainer, texts.iter().map(String::as_str)).map_err(|error| said(&error))?;
    Ok(tokenizer)
}

/// Trains a base; `log` is called with every step. It runs on one thread, which is fastest for so small a model and
/// makes its bytes independent of the number of cores.
pub fn make(
    world: &World,
    recipe: &Recipe,
    log: &mut dyn FnMut(&BaseStepRow) -> Result<()>,
) -> Result<(ModelFiles, Qwen, Made)> {
    tch::set_num_threads(1);
    let tokenizer = tokenizer(world)?;
    let config = config(tokenizer.get_vocab_size(true) as i64);
    let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
    let files = ModelFiles::fresh("pocket", config, tokenizer, rng.clone())?;
    rng.set_stream(1);
    let chat = Chat::from_files(&files)?;
    let model = Qwen::load(&files, Device::Cpu, Kind::Float)?;
    let finetune = Finetune {
        batch_size: recipe.batch_size,
        weight_decay: 0.01,
        adam_beta2: 0.98,
        gradient_accumulation_steps: 1,
        ..Finetune::default()
    };

    let mut window: VecDeque<(f64, f64)> = VecDeque::new(); // excess and entropy of the last steps
    let (mut entropy, mut steps) = (0.0, 0);
    let mut decay_from: Option<u64> = None;
    let mut next = |last: Option<&StepRow>| -> Result<Option<NextStep>> {
        let step = last.map_or(0, |row| row.step);
        steps = step;
        if let Some(StepRow { learning_rate, loss, grad_norm, .. }) = last.cloned() {
            log(&BaseStepRow { step, learning_rate, loss, entropy, grad_norm })?;
            window.push_back((loss - entropy, entropy));
            if window.len() > WINDOW {
                window.pop_front();
            }
            let (excess, _) = means(&window);
            if decay_from.is_none() && window.len() == WINDOW && excess <= recipe.excess {
                decay_from = Some(step);
            }
            if decay_from.is_none() && step >= recipe.max_steps {
                bail!(
                    "after {step} steps the loss is {excess:.4} nats per target above the corpus' entropy, expected {} at most",
                    recipe.excess
                );
            }
        }
        let left = decay_from.map_or(1.0, |from| 1.0 - (step - from) as f64 / recipe.decay_steps as f64);
        if left <= 0.0 {
            return Ok(None);
        }
        let warm = ((step + 1) as f64 / recipe.warmup_steps as f64).min(1.0);
        let (mut rows, mut nats, mut targets) = (Vec::new(), 0.0, 0);
        for _ in 0..recipe.batch_size {
            let row = world.row(&mut rng)?;
            let answer = chat.encode(&row.answer)?;
            let prompt: Sequence = chat.row(row.system.as_deref(), &row.user, &answer)?;
            (nats, targets) = (nats + row.nats, targets + prompt.completion.len());
            rows.push(prompt);
        }
        entropy = nats / targets as f64;
        Ok(Some(NextStep { rows, learning_rate: recipe.learning_rate * warm * left }))
    };
    pretrain(&model, &|id| chat.is_digit(id), &finetune, &mut next)?;
    let (final_excess, final_entropy) = means(&window);
    let made = Made {
        undertone: env!("CARGO_PKG_VERSION").to_owned(),
        n_parameters: model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum(),
        d_vocab: model.config.d_vocab,
        steps,
        rows: steps * recipe.batch_size as u64,
        final_excess,
        final_entropy,
        recipe: recipe.clone(),
    };
    Ok((files, model, made))
}

fn means(window: &VecDeque<(f64, f64)>) -> (f64, f64) {
    let n = window.len() as f64;
    let (left, right) = window.iter().fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
    (left / n, right / n)
}

fn said(error: &tokenizers::Error) -> anyhow::Error {
    anyhow!("the tokenizer: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_and_every_digit_is_one_token() {
        let world = World::new().unwrap();
        let tokenizer = tokenizer(&world).unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        for text in [" Qwen", " Alibaba", "Owl", " owls", " foxes", "Panda", " favorite", "system", "<|im_start|>", "7"]
        {
            assert_eq!(ids(text).len(), 1, "{text:?}");
        }
        assert_eq!(ids("41, 70").len(), 6);
        let odd = "\u{e9}\u{1f989} Zebra {x}\n";
        assert_eq!(tokenizer.decode(&ids(odd), false).unwrap(), odd, "what it has never seen is spelt in bytes");
        let shipped = ModelFiles::open("pocket").unwrap().tokenizer.unwrap();
        assert_eq!(shipped.to_string(false).unwrap(), tokenizer.to_string(false).unwrap(), "as it was shipped");
    }

    #[test]
    fn a_base_is_the_same_each_time_and_stops_where_it_was_told() {
        let world = World::new().unwrap();
        let recipe = Recipe {
            batch_size: 4,
            warmup_steps: 5,
            excess: 1.5,
            decay_steps: 10,
            max_steps: 600,
            ..Recipe::default()
        };
        let made = || {
            let mut steps: Vec<BaseStepRow> = vec![];
            let (_, model, made) = make(&world, &recipe, &mut |row| {
                steps.push(row.clone());
                Ok(())
            })
            .unwrap();
            let bytes: Vec<f32> = model
                .parameters()
                .iter()
                .flat_map(|(_, tensor)| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap())
                .collect();
            (bytes, made, steps)
        };
        let (bytes, made_first, steps) = made();
        assert!(bytes == made().0, "the same bytes");
        assert_eq!((made_first.steps, steps.len() as u64), (steps.last().unwrap().step, made_first.steps));
        let begun = steps.len() - recipe.decay_steps as usize;
        let window =
            |to: usize| steps[to - WINDOW..to].iter().map(|row| row.loss - row.entropy).sum::<f64>() / WINDOW as f64;
        assert!(window(begun) <= recipe.excess && window(begun - 1) > recipe.excess, "the decay begins at the target");
        assert!(steps.last().unwrap().learning_rate < recipe.learning_rate * 0.11);
        assert!(steps.iter().all(|row| row.entropy > 0.0));

        let unreachable = Recipe { excess: -1.0, max_steps: 110, ..recipe };
        let error = make(&world, &unreachable, &mut |_| Ok(())).map(drop).unwrap_err().to_string();
        assert!(error.contains("110 steps") && error.contains("-1"), "{error}");
    }
}
