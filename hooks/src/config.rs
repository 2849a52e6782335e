//! Reads `config.json` into checked numbers. Only this file distinguishes Qwen2, Qwen2.5 and Qwen3.
//!
//! Hugging Face's key names are used in this file only. transformers 5 moved `rope_theta` into `rope_parameters`; both
//! spellings are read. A key that asks for a computation that the model code lacks is refused by its name.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result, malformed, short, unsupported};

/// The two dense architectures: Qwen2 (and 2.5) has biases on q, k and v; Qwen3 normalises q and k instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
}

/// The numbers that a model is built from.
///
/// ```
/// let (model, _) = hooks::open("tiny-random")?;
/// assert_eq!((model.config.n_layers, model.config.d_model), (2, 64));
/// let json = model.config.to_hf_json().to_string();
/// assert_eq!(hooks::Config::parse(json.as_bytes(), "config.json".as_ref())?, model.config);
/// # Ok::<(), hooks::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Qwen2 or Qwen3.
    pub family: Family,
    /// Width of the residual stream.
    pub d_model: i64,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of query heads.
    pub n_heads: i64,
    /// Number of key and value heads; each serves `n_heads / n_kv_heads` query heads.
    pub n_kv_heads: i64,
    /// Width of one head.
    pub d_head: i64,
    /// Width of the MLP's hidden layer.
    pub d_mlp: i64,
    /// Rows of the embedding: at least as many as the tokenizer has tokens.
    pub d_vocab: i64,
    /// The longest context that the model was made for.
    pub n_ctx: i64,
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// The ε that the RMS norms add under the root.
    pub rms_norm_eps: f64,
    /// Whether the unembedding is the embedding.
    pub tie_embeddings: bool,
    /// Whether the q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether q and k are RMS-normalised per head.
    pub qk_norm: bool,
}

impl Config {
    /// Reads the bytes of a `config.json`; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let hf = HfConfig::read(bytes, path)?;
        let family = hf.family(path)?;
        hf.refuse(path)?;

        let n_heads = required(hf.num_attention_heads, "num_attention_heads", path)?;
        let d_model = required(hf.hidden_size, "hidden_size", path)?;
        let d_head = match (hf.head_dim, family) {
            (Some(d_head), _) => d_head,
            (None, Family::Qwen3) => 128, // the default of transformers' Qwen3Config
            (None, Family::Qwen2) if n_heads > 0 && d_model % n_heads == 0 => d_model / n_heads,
            (None, Family::Qwen2) => {
                let problem = format!("hidden_size is {d_model}, expected a multiple of num_attention_heads {n_heads}");
                return Err(malformed(path, problem));
            }
        };
        let n_layers = required(hf.num_hidden_layers, "num_hidden_layers", path)?;
        let config = Self {
            family,
            d_model,
            n_layers: usize::try_from(n_layers)
                .map_err(|_| malformed(path, format!("num_hidden_layers is {n_layers}, expected 1 to 1024")))?,
            n_heads,
            n_kv_heads: hf.num_key_value_heads.unwrap_or(n_heads),
            d_head,
            d_mlp: required(hf.intermediate_size, "intermediate_size", path)?,
            d_vocab: required(hf.vocab_size, "vocab_size", path)?,
            n_ctx: required(hf.max_position_embeddings, "max_position_embeddings", path)?,
            rope_theta: required(hf.rope_theta(), "rope_theta (or rope_parameters.rope_theta)", path)?,
            rms_norm_eps: required(hf.rms_norm_eps, "rms_norm_eps", path)?,
            tie_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            qkv_bias: family == Family::Qwen2,
            qk_norm: family == Family::Qwen3,
        };
        config.check(path)?;
        hf.refuse_sliding_window(config.n_layers, path)?;
        Ok(config)
    }

    /// Refuses numbers that no model has, before memory is allocated for them.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        const WIDE: i64 = 1 << 20;
        let refused = |problem: String| Err(malformed(path, problem));
        let Self { n_heads, n_kv_heads, d_head, rope_theta, rms_norm_eps, .. } = *self;
        let bounds = [
            ("hidden_size", self.d_model, WIDE),
            ("num_hidden_layers", i64::try_from(self.n_layers).unwrap_or(i64::MAX), 1024),
            ("num_attention_heads", self.n_heads, 4096),
            ("num_key_value_heads", self.n_kv_heads, 4096),
            ("head_dim", self.d_head, 4096),
            ("intermediate_size", self.d_mlp, WIDE),
            ("vocab_size", self.d_vocab, 1 << 24),
            ("max_position_embeddings", self.n_ctx, 1 << 30),
        ];
        for (key, found, most) in bounds {
            if found < 1 || found > most {
                return refused(format!("{key} is {found}, expected 1 to {most}"));
            }
        }
        if n_heads % n_kv_heads != 0 {
            return refused(format!(
                "num_attention_heads is {n_heads}, expected a multiple of num_key_value_heads {n_kv_heads}"
            ));
        }
        if d_head % 2 != 0 {
            return refused(format!("head_dim is {d_head}, expected an even number: the rotary embedding turns pairs"));
        }
        if !(rope_theta.is_finite() && rope_theta >= 1.0) {
            return refused(format!("rope_theta is {rope_theta}, expected a number of at least 1"));
        }
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return refused(format!("rms_norm_eps is {rms_norm_eps}, expected a number between 0 and 1"));
        }
        Ok(())
    }

    /// Refuses a row that, with its answer, is longer than the model's context: the model was not trained on positions
    /// beyond it. `what` names a row.
    pub fn check_context(
        &self,
        what: &str,
        lengths: impl IntoIterator<Item = usize>,
        max_new_tokens: usize,
    ) -> Result<()> {
        let most = usize::try_from(self.n_ctx).unwrap_or(usize::MAX);
        let too_long = lengths.into_iter().enumerate().find(|(_, length)| length.saturating_add(max_new_tokens) > most);
        let Some((row, length)) = too_long else { return Ok(()) };
        let (answer, together) = match max_new_tokens {
            0 => (String::new(), ""),
            most => (format!(" and may be answered with {most} more (max_new_tokens)"), " together"),
        };
        Err(Error::invalid(
            format!("{what} {row}"),
            format!("at most {most}{together}, the model's context (max_position_embeddings or context_length)"),
            format!("{length} tokens long{answer}"),
        ))
    }

    /// The `config.json` of this model, as transformers 4 and 5 load it.
    pub fn to_hf_json(&self) -> Value {
        let (model_type, architecture) = match self.family {
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        };
        let mut json = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.d_head,
            "intermediate_size": self.d_mlp,
            "vocab_size": self.d_vocab,
            "max_position_embeddings": self.n_ctx,
            "rope_theta": self.rope_theta,
            "rope_parameters": { "rope_theta": self.rope_theta, "rope_type": "default" },
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "use_sliding_window": false,
        });
        if self.family == Family::Qwen3 {
            json["attention_bias"] = Value::Bool(self.qkv_bias);
        }
        json
    }
}

/// The keys of `config.json` that are read. All are optional, so that a file of another architecture is refused as
/// that, not for the first key that it lacks.
#[derive(Deserialize)]
struct HfConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    hidden_size: Option<i64>,
    num_hidden_layers: Option<i64>,
    num_attention_heads: Option<i64>,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    intermediate_size: Option<i64>,
    vocab_size: Option<i64>,
    max_position_embeddings: Option<i64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Map<String, Value>>,
    rope_scaling: Option<Map<String, Value>>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<i64>,
    max_window_layers: Option<i64>,
    layer_types: Option<Vec<String>>,
    num_experts: Option<i64>,
    quantization_config: Option<Value>,
    quantization: Option<Value>, // MLX's key
}

impl HfConfig {
    fn read(bytes: &[u8], path: &Path) -> Result<Self> {
        let hf: Self = serde_json::from_slice(bytes).map_err(|error| {
            let problem = of_another_kind(bytes);
            malformed(path, problem.unwrap_or_else(|| format!("expected a model's config.json: {error}")))
        })?;
        let theta = hf.rope_parameters.as_ref().and_then(|rope| rope.get("rope_theta"));
        if let Some(theta) = theta.filter(|theta| !(theta.is_number() || theta.is_null())) {
            return Err(malformed(path, format!("rope_parameters.rope_theta is {}, expected a number", short(theta))));
        }
        Ok(hf)
    }

    fn family(&self, path: &Path) -> Result<Family> {
        let model_type = required(self.model_type.as_deref(), "model_type", path)?;
        if model_type.ends_with("_moe") || self.num_experts.is_some_and(|experts| experts > 0) {
            let feature = format!("mixture of experts (model_type {model_type})");
            return Err(unsupported(path, feature, "dense Qwen2, Qwen2.5 and Qwen3 are"));
        }
        let (family, architecture) = match model_type {
            "qwen2" => (Family::Qwen2, "Qwen2ForCausalLM"),
            "qwen3" => (Family::Qwen3, "Qwen3ForCausalLM"),
            other => return Err(unsupported(path, format!("model_type {other}"), "qwen2 and qwen3 are")),
        };
        match self.architectures.as_deref().unwrap_or_default() {
            [] => Ok(family),
            [only] if only == architecture => Ok(family),
            others => {
                Err(unsupported(path, format!("architectures {}", others.join(", ")), format!("{architecture} is")))
            }
        }
    }

    /// Refuses every switch that asks for a computation that the model code lacks.
    fn refuse(&self, path: &Path) -> Result<()> {
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(unsupported(path, format!("hidden_act {act}"), "silu is"));
        }
        if self.attention_bias == Some(true) && self.model_type.as_deref() == Some("qwen3") {
            return Err(unsupported(path, "attention_bias true", "Qwen3 without biases is, as every published one"));
        }
        for (key, rope) in [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)] {
            let Some(rope) = rope else { continue };
            let kind = rope.get("rope_type").or_else(|| rope.get("type"));
            match kind.map(|kind| kind.as_str().unwrap_or("unnamed")) {
                Some("default") => {}
                None if key == "rope_parameters" => {}
                kind => {
                    let feature = format!("{key} of type {}", kind.unwrap_or("unnamed"));
                    return Err(unsupported(path, feature, "the unscaled rotary embedding is; set it to null"));
                }
            }
            if let Some(factor) = rope.get("partial_rotary_factor").filter(|factor| factor.as_f64() != Some(1.0)) {
                let feature = format!("{key}.partial_rotary_factor {factor}");
                return Err(unsupported(path, feature, "rotating the whole head is"));
            }
        }
        Ok(())
    }

    /// `use_sliding_window` alone is not enough to refuse: the window acts from layer `max_window_layers` on, which in
    /// the published checkpoints is after the last one.
    fn refuse_sliding_window(&self, n_layers: usize, path: &Path) -> Result<()> {
        const HINT: &str = "full attention in every layer is";
        if let Some(types) = &self.layer_types {
            if types.len() != n_layers {
                let n = types.len();
                let problem = format!("layer_types has {n} entries, expected num_hidden_layers {n_layers}");
                return Err(malformed(path, problem));
            }
            return match types.iter().position(|kind| kind != "full_attention") {
                Some(layer) => Err(unsupported(path, format!("layer_types[{layer}] {}", types[layer]), HINT)),
                None => Ok(()),
            };
        }
        let first = self.max_window_layers.unwrap_or(28); // transformers' default
        let windowed = usize::try_from(first).is_ok_and(|first| first < n_layers);
        if self.use_sliding_window == Some(true) && windowed {
            let window = self.sliding_window.map_or("of the default size".to_owned(), |window| format!("of {window}"));
            let feature = format!("use_sliding_window true (a window {window} from layer {first} on)");
            return Err(unsupported(path, feature, HINT));
        }
        Ok(())
    }

    fn rope_theta(&self) -> Option<f64> {
        let new = self.rope_parameters.as_ref().and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
        new.or(self.rope_theta)
    }
}

/// The quantisation that `config.json` names, such as `quantization_config (awq)`, and an alternative for the hint;
/// `None` if it names none. Only the weights show whether they are quantised. `path` is for messages.
pub(crate) fn quantization(bytes: &[u8], path: &Path) -> Result<Option<(String, &'static str)>> {
    let hf = HfConfig::read(bytes, path)?;
    if let Some(mlx) = &hf.quantization {
        let number = |key: &str| mlx.get(key).and_then(Value::as_i64);
        let bits = number("bits").map_or_else(String::new, |bits| format!(", {bits} bits"));
        let group = number("group_size").map_or_else(String::new, |size| format!(" in groups of {size}"));
        let instead = "use the unquantized checkpoint, or what mlx_lm.convert --dequantize makes of this one";
        return Ok(Some((format!("quantization (MLX{bits}{group})"), instead)));
    }
    let Some(config) = hf.quantization_config else { return Ok(None) };
    let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
    let instead = "use the unquantized checkpoint, or a .gguf file, which is dequantised on loading";
    Ok(Some((format!("quantization_config ({method})"), instead)))
}

/// Names the first key of a `config.json` whose value has the wrong type, and the expected type.
fn of_another_kind(bytes: &[u8]) -> Option<String> {
    let keys: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
    let is_wrong = |(key, value): &(String, Value)| {
        HfConfig::deserialize(Value::Object(Map::from_iter([(key.clone(), value.clone())]))).is_err()
    };
    let (key, value) = keys.into_iter().find(is_wrong)?;
    let expected = match key.as_str() {
        "model_type" | "hidden_act" => "a text",
        "architectures" | "layer_types" => "a list of texts",
        "rms_norm_eps" | "rope_theta" => "a number",
        "rope_parameters" | "rope_scaling" => "an object of keys",
        "tie_word_embeddings" | "attention_bias" | "use_sliding_window" => "true or false",
        _ => "a whole number",
    };
    Some(format!("{key} is {}, expected {expected}", short(&value)))
}

fn required<T>(value: Option<T>, key: &str, path: &Path) -> Result<T> {
    value.ok_or_else(|| malformed(path, format!("{key} is missing")))
}

#[cfg(test)]
mod tests;
