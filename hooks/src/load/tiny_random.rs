//! The embedded random model: a Qwen2 of two layers whose weights are drawn from a seed, for tests and first steps.
//!
//! It is untrained. With its small tokenizer and a real chat template, every command runs on it in seconds.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use crate::config::{Config, Family};
use crate::error::Result;
use crate::load::init::{Draw, Spread};

pub(crate) const SEED: u64 = 0;
pub(crate) const TOKENIZER: &[u8] = include_bytes!("../../../assets/tokenizer.json");
pub(crate) const CHAT_TEMPLATE: &str = include_str!("../../../assets/chat_template.jinja");

/// The configuration of the embedded model, for a tokenizer of `d_vocab` tokens.
pub(crate) fn config(d_vocab: i64) -> Config {
    Config {
        family: Family::Qwen2,
        d_model: 64,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        d_head: 16,
        d_mlp: 192,
        d_vocab,
        n_ctx: 4096,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        tie_embeddings: true,
        qkv_bias: true,
        qk_norm: false,
    }
}

/// Weights for a configuration, the same on every machine. The spreads are wide enough that the blocks outweigh the
/// embedding in the residual stream: otherwise a tied model would only repeat its last token.
pub(crate) fn weights(config: &Config) -> Result<BTreeMap<String, Tensor>> {
    let spread = Spread { embedding: 0.2, norm: 0.1, bias: 0.1, linear: &|_| 0.15 };
    Draw::new(ChaCha8Rng::seed_from_u64(SEED)).weights(config, &spread)
}
