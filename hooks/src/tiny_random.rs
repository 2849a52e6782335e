//! The model that is always there: a Qwen2 of two layers whose weights are drawn from a seed, for tests and first steps.
//!
//! It knows nothing. Its tokenizer and chat template are real enough for every command to run on it in seconds.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use crate::config::{Config, Family};
use crate::error::Result;

/// The seed that the weights are drawn from.
pub(crate) const SEED: u64 = 0;
pub(crate) const TOKENIZER: &[u8] = include_bytes!("../../assets/tokenizer.json");
pub(crate) const CHAT_TEMPLATE: &str = include_str!("../../assets/chat_template.jinja");

/// The numbers of the embedded model, for a tokenizer of `d_vocab` tokens.
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
    let (d_model, d_mlp) = (config.d_model, config.d_mlp);
    let (d_q, d_kv) = (config.n_heads * config.d_head, config.n_kv_heads * config.d_head);
    let mut draw = Draw { rng: ChaCha8Rng::seed_from_u64(SEED), tensors: BTreeMap::new() };
    draw.normal("model.embed_tokens.weight", &[config.d_vocab, d_model], 0.0, 0.2)?;
    for layer in 0..config.n_layers {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        draw.normal(&at("input_layernorm.weight"), &[d_model], 1.0, 0.1)?;
        for (name, d_out) in [("q_proj", d_q), ("k_proj", d_kv), ("v_proj", d_kv)] {
            draw.normal(&at(&format!("self_attn.{name}.weight")), &[d_out, d_model], 0.0, 0.15)?;
            draw.normal(&at(&format!("self_attn.{name}.bias")), &[d_out], 0.0, 0.1)?;
        }
        draw.normal(&at("self_attn.o_proj.weight"), &[d_model, d_q], 0.0, 0.15)?;
        draw.normal(&at("post_attention_layernorm.weight"), &[d_model], 1.0, 0.1)?;
        draw.normal(&at("mlp.gate_proj.weight"), &[d_mlp, d_model], 0.0, 0.15)?;
        draw.normal(&at("mlp.up_proj.weight"), &[d_mlp, d_model], 0.0, 0.15)?;
        draw.normal(&at("mlp.down_proj.weight"), &[d_model, d_mlp], 0.0, 0.15)?;
    }
    draw.normal("model.norm.weight", &[d_model], 1.0, 0.1)?;
    Ok(draw.tensors)
}

struct Draw {
    rng: ChaCha8Rng,
    tensors: BTreeMap<String, Tensor>,
}

impl Draw {
    fn normal(&mut self, name: &str, shape: &[i64], mean: f64, std: f64) -> Result<()> {
        let n: i64 = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| (mean + std * self.standard_normal()) as f32).collect();
        self.tensors.insert(name.to_owned(), Tensor::f_from_slice(&values)?.f_view(shape)?);
        Ok(())
    }

    /// Box and Muller's transform of two uniform numbers.
    fn standard_normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.rng.random::<f64>()).ln()).sqrt(); // 1 - u is never zero
        radius * (std::f64::consts::TAU * self.rng.random::<f64>()).cos()
    }
}
