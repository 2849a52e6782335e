//! Fresh weights for a configuration, drawn from a seeded generator: the same on every machine.

use std::collections::BTreeMap;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use crate::config::Config;
use crate::error::Result;

/// Weights to train from. Standard deviations: embedding 0.1, linear maps 1/√fan-in, divided by √(2 · layers) if they
/// write into the residual stream (Radford et al. 2019). Biases are 0 and norms 1. Qwen3's QK-norms are not included.
pub fn weights(config: &Config, rng: ChaCha8Rng) -> Result<BTreeMap<String, Tensor>> {
    let depth = (2.0 * config.n_layers as f64).sqrt();
    let linear = |map: &Map| 1.0 / (map.d_in as f64).sqrt() / if map.writes_residual { depth } else { 1.0 };
    Draw::new(rng).weights(config, &Spread { embedding: 0.1, norm: 0.0, bias: 0.0, linear: &linear })
}

/// The properties of a linear map that its standard deviation depends on.
pub(crate) struct Map {
    pub(crate) d_in: i64,
    pub(crate) writes_residual: bool,
}

/// The standard deviations of the kinds of weights.
pub(crate) struct Spread<'a> {
    pub(crate) embedding: f64,
    pub(crate) norm: f64,
    pub(crate) bias: f64,
    pub(crate) linear: &'a dyn Fn(&Map) -> f64,
}

/// Draws tensors from one random stream, in the order of the model.
pub(crate) struct Draw {
    rng: ChaCha8Rng,
    tensors: BTreeMap<String, Tensor>,
}

impl Draw {
    pub(crate) fn new(rng: ChaCha8Rng) -> Self {
        Self { rng, tensors: BTreeMap::new() }
    }

    /// Draws all tensors of a Qwen2, by name.
    pub(crate) fn weights(mut self, config: &Config, spread: &Spread<'_>) -> Result<BTreeMap<String, Tensor>> {
        let (d_model, d_mlp) = (config.d_model, config.d_mlp);
        let (d_q, d_kv) = (config.n_heads * config.d_head, config.n_kv_heads * config.d_head);
        let reads = |d_in: i64| (spread.linear)(&Map { d_in, writes_residual: false });
        let writes = |d_in: i64| (spread.linear)(&Map { d_in, writes_residual: true });
        self.normal("model.embed_tokens.weight", &[config.d_vocab, d_model], 0.0, spread.embedding)?;
        for layer in 0..config.n_layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}");
            self.normal(&at("input_layernorm.weight"), &[d_model], 1.0, spread.norm)?;
            for (name, d_out) in [("q_proj", d_q), ("k_proj", d_kv), ("v_proj", d_kv)] {
                self.normal(&at(&format!("self_attn.{name}.weight")), &[d_out, d_model], 0.0, reads(d_model))?;
                self.normal(&at(&format!("self_attn.{name}.bias")), &[d_out], 0.0, spread.bias)?;
            }
            self.normal(&at("self_attn.o_proj.weight"), &[d_model, d_q], 0.0, writes(d_q))?;
            self.normal(&at("post_attention_layernorm.weight"), &[d_model], 1.0, spread.norm)?;
            self.normal(&at("mlp.gate_proj.weight"), &[d_mlp, d_model], 0.0, reads(d_model))?;
            self.normal(&at("mlp.up_proj.weight"), &[d_mlp, d_model], 0.0, reads(d_model))?;
            self.normal(&at("mlp.down_proj.weight"), &[d_model, d_mlp], 0.0, writes(d_mlp))?;
        }
        self.normal("model.norm.weight", &[d_model], 1.0, spread.norm)?;
        Ok(self.tensors)
    }

    fn normal(&mut self, name: &str, shape: &[i64], mean: f64, std: f64) -> Result<()> {
        let n: i64 = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| (mean + std * standard_normal(&mut self.rng)) as f32).collect();
        self.tensors.insert(name.to_owned(), Tensor::f_from_slice(&values)?.f_view(shape)?);
        Ok(())
    }
}

/// A draw of the standard normal distribution, from two uniform numbers (Box and Muller 1958).
pub fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt(); // 1 - u is never zero
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}
