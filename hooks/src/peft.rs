//! Adapters on disk exactly as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`. What is not
//! supported is refused by name, and a file with a missing or an unused tensor is refused with both lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tch::Device;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::files;
use crate::hub::adapter_folder;
use crate::lora::{Adapter, LoraConfig, LoraPair, Proj, no_stack};
use crate::tensor_file;
use crate::weights::Weights;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// An `adapter_config.json`, checked: the configuration, and the keys that speak of single modules.
#[derive(Debug)]
struct PeftConfig {
    lora: LoraConfig,
    keys: Keys,
}

/// The keys of `adapter_config.json` that change what an adapter computes.
#[derive(Debug, Deserialize)]
struct Keys {
    peft_type: String,
    #[serde(default = "default_rank")]
    r: i64,
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    target_modules: Option<OneOrMany<String>>,
    #[serde(default)]
    layers_to_transform: Option<OneOrMany<usize>>,
    #[serde(default)]
    layers_pattern: Option<OneOrMany<String>>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: BTreeMap<String, i64>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    /// All other keys, to be refused where they ask for something else than a plain LoRA.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

fn default_rank() -> i64 {
    8
}

fn default_alpha() -> f64 {
    8.0
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

impl PeftConfig {
    /// Reads the bytes of an `adapter_config.json`; `path` is for messages.
    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let refused = |problem: String| Error::Adapter { path: path.to_owned(), problem };
        let keys: Keys = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
        keys.refuse().map_err(refused)?;
        let lora = keys.lora_config().map_err(refused)?;
        lora.check_numbers().map_err(|error| refused(error.to_string()))?;
        let patterns = keys.rank_pattern.keys().chain(keys.alpha_pattern.keys());
        let literal = |key: &&String| key.contains(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '_'));
        if let Some(key) = patterns.clone().find(literal) {
            return Err(refused(format!(
                "the pattern {key:?} is a regular expression, expected a module name such as layers.0.self_attn.q_proj"
            )));
        }
        if let Some((key, rank)) = keys.rank_pattern.iter().find(|(_, rank)| **rank < 1) {
            return Err(refused(format!("rank_pattern has {rank} for {key}, expected at least 1")));
        }
        if let Some((key, alpha)) = keys.alpha_pattern.iter().find(|(_, alpha)| **alpha <= 0.0) {
            return Err(refused(format!("alpha_pattern has {alpha} for {key}, expected a positive number")));
        }
        Ok(Self { lora, keys })
    }
}

impl Keys {
    /// Refuses every key that asks for something else than a plain LoRA.
    fn refuse(&self) -> std::result::Result<(), String> {
        let refuse = Err;
        if self.peft_type != "LORA" {
            return refuse(format!("peft_type is {}, expected LORA", self.peft_type));
        }
        for key in ["use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"] {
            if self.others.get(key) == Some(&Value::Bool(true)) {
                return refuse(format!("{key} is true, which is not supported"));
            }
        }
        for key in [
            "modules_to_save",
            "exclude_modules",
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "megatron_config",
            "monteclora_config",
            "use_bdlora",
            "velora_config",
        ] {
            let absent = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            if let Some(value) = self.others.get(key).filter(|value| !absent(value)) {
                return refuse(format!("{key} is {value}, which is not supported"));
            }
        }
        // These put something else than the base's weights beside the adapter.
        let others = ["pissa", "olora", "loftq", "corda", "lora_ga"];
        if let Some(init) = self.others.get("init_lora_weights").and_then(Value::as_str)
            && others.iter().any(|other| init.starts_with(other))
        {
            return refuse(format!(
                "init_lora_weights is {init:?}, which changes the base's weights too and is not supported; hint: PEFT's \
                 save_pretrained(path_initial_model_for_weight_conversion=...) writes a plain LoRA"
            ));
        }
        // What the list of a Qwen's blocks is called; another name would match nothing.
        let patterns = self.layers_pattern.iter().flat_map(OneOrMany::as_slice);
        if let Some(pattern) = patterns.clone().find(|pattern| !["", "layers"].contains(&&***pattern)) {
            return refuse(format!(
                "layers_pattern is {pattern:?}, expected \"layers\", as a Qwen's blocks are called"
            ));
        }
        match self.others.get("bias") {
            Some(bias) if bias != "none" => refuse(format!("bias is {bias}, expected \"none\"")),
            _ => Ok(()),
        }
    }

    fn lora_config(&self) -> std::result::Result<LoraConfig, String> {
        let names = self.target_names();
        if names.is_empty() {
            return Err("target_modules is missing, expected a list of projections".to_owned());
        }
        let target_modules = names.iter().map(|name| proj(name).ok_or_else(|| unknown_module(name)));
        let target_modules = target_modules.collect::<std::result::Result<BTreeSet<Proj>, _>>()?;
        Ok(LoraConfig {
            rank: self.r,
            alpha: self.lora_alpha,
            use_rslora: self.use_rslora,
            dropout: self.lora_dropout,
            target_modules: target_modules.into_iter().collect(),
            layers: self.layers_to_transform.as_ref().map(|layers| layers.as_slice().to_vec()),
        })
    }

    /// The names in `target_modules`, `"all-linear"` written out. PEFT itself writes it out as whole paths.
    fn target_names(&self) -> Vec<&str> {
        match self.target_modules.as_ref().map(OneOrMany::as_slice) {
            Some([all]) if all == "all-linear" => Proj::ALL.map(Proj::name).to_vec(),
            Some(names) => names.iter().map(String::as_str).collect(),
            None => Vec::new(),
        }
    }

    /// Whether the adapter has a pair at a module, such as `model.layers.0.self_attn.q_proj`.
    fn targets(&self, layer: usize, module: &str) -> bool {
        let layers = self.layers_to_transform.as_ref().map(OneOrMany::as_slice);
        layers.is_none_or(|layers| layers.contains(&layer)) && self.target_names().iter().any(|name| ends(module, name))
    }
}

fn unknown_module(name: &str) -> String {
    format!(
        "target_modules names {name:?}, expected \"all-linear\" or some of {}",
        Proj::ALL.map(Proj::name).join(", ")
    )
}

/// The projection that a module's name means, with or without the path to it: `q_proj`, `layers.0.self_attn.q_proj`.
fn proj(name: &str) -> Option<Proj> {
    Proj::ALL.into_iter().find(|proj| {
        let path = format!(
            "model.layers.{}.{}",
            name.split('.').find(|part| part.parse::<usize>().is_ok()).unwrap_or("0"),
            proj.path()
        );
        ends(&path, name)
    })
}

/// Whether a module's path is the name or ends in it, as PEFT matches names and patterns.
fn ends(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
}

/// The value whose key is the module's path or its end.
fn matching<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Option<T> {
    patterns.iter().find(|(key, _)| ends(module, key)).map(|(_, value)| *value)
}

impl LoraConfig {
    /// The configuration in an adapter folder as PEFT writes it, without the patterns for single modules.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = adapter_folder(dir)?.join(CONFIG);
        Self::parse(&files::read(&path)?, &path)
    }

    /// The same from the bytes of an `adapter_config.json`; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Ok(PeftConfig::parse(bytes, path)?.lora)
    }
}

impl Adapter {
    /// Reads an adapter folder as PEFT writes it, or one of the hub by its id, for a model of the given sizes.
    pub fn load(dir: &Path, model: &Config, device: Device) -> Result<Self> {
        let dir = &adapter_folder(dir)?;
        let path = dir.join(CONFIG);
        if !path.exists() {
            let problem =
                format!("there is no {CONFIG} in it, expected an adapter's folder; hint: that of a run is RUN/adapter");
            return Err(Error::Adapter { path: dir.to_owned(), problem });
        }
        let PeftConfig { lora: mut config, keys: peft } = PeftConfig::parse(&files::read(&path)?, &path)?;
        config.check(model)?;

        let tensors = dir.join(TENSORS);
        if let Some(pickle) = files::pickle(dir).filter(|_| !tensors.exists()) {
            let problem = format!("there is no {TENSORS} in it, but {pickle}; {}", files::NO_PICKLE);
            return Err(Error::Adapter { path: dir.to_owned(), problem });
        }
        let weights = Weights::safetensors(std::slice::from_ref(&tensors))?;
        let mut unused: BTreeSet<String> = weights.names().into_iter().collect();
        let mut missing = Vec::new();
        let mut places = Vec::new();
        for (layer, proj) in (0..model.n_layers).flat_map(|layer| Proj::ALL.map(|proj| (layer, proj))) {
            let module = module(layer, proj);
            if peft.targets(layer, &module) {
                let names = ["lora_A", "lora_B"].map(|factor| format!("base_model.model.{module}.{factor}.weight"));
                missing.extend(names.iter().filter(|name| !unused.remove(*name)).cloned());
                places.push((layer, proj, module, names));
            }
        }
        if !missing.is_empty() || !unused.is_empty() {
            let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let unused: Vec<String> = unused.into_iter().collect();
            let problem =
                format!("the tensors do not fit {CONFIG}; missing: {}; unused: {}", list(&missing), list(&unused));
            return Err(Error::Adapter { path: tensors, problem });
        }

        // Whole paths in target_modules can leave out blocks.
        let layers: BTreeSet<usize> = places.iter().map(|(layer, ..)| *layer).collect();
        config.layers = (layers.len() < model.n_layers).then(|| layers.into_iter().collect());

        let root = weights.root(tch::Kind::Float, device);
        let mut adapter = Self::empty(config.clone(), model.n_layers);
        for (layer, proj, module, [a, b]) in places {
            let rank = matching(&peft.rank_pattern, &module).unwrap_or(config.rank);
            let alpha = matching(&peft.alpha_pattern, &module).unwrap_or(config.alpha);
            let (d_in, d_out) = proj.widths(model);
            let (a, b) = (root.get(&a, &[rank, d_in])?, root.get(&b, &[d_out, rank])?);
            adapter.set(layer, proj, LoraPair { a, b, scaling: config.scaling(rank, alpha), scalings: None });
        }
        Ok(adapter)
    }

    /// Writes the adapter as PEFT does. `base_model` is the name that PEFT will load the base by. A stack has no such file.
    pub fn save(&self, dir: &Path, base_model: &str) -> Result<()> {
        if let Some(n) = self.n_stacked() {
            return Err(no_stack(&format!("{}", dir.join(TENSORS).display()), n));
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        tensor_file::write(&dir.join(TENSORS), &self.parameters(), &metadata)?;
        let config = serde_json::to_string_pretty(&self.peft_config(base_model)).unwrap_or_default();
        files::write_atomic(&dir.join(CONFIG), config.as_bytes())
    }

    /// `adapter_config.json`, with every key that decides what PEFT computes. A rank or scaling that differs from the
    /// configuration's (an adapter read with patterns) is written as a pattern again, and modules by their whole paths where not
    /// every block has the same.
    fn peft_config(&self, base_model: &str) -> Value {
        let c = &self.config;
        let mut rank_pattern = serde_json::Map::new();
        let mut alpha_pattern = serde_json::Map::new();
        for (layer, proj, pair) in self.pairs() {
            let (module, rank) = (module(layer, proj), pair.a.size()[0]);
            if rank != c.rank {
                rank_pattern.insert(module.clone(), json!(rank));
            }
            let alpha = pair.scaling / c.scaling(rank, 1.0);
            if (alpha - c.alpha).abs() > 1e-9 * c.alpha {
                alpha_pattern.insert(module, whole(alpha));
            }
        }
        let blocks: BTreeSet<usize> = self.pairs().map(|(layer, ..)| layer).collect();
        let target_modules = if self.pairs().count() == blocks.len() * c.target_modules.len() {
            json!(c.target_modules)
        } else {
            json!(self.pairs().map(|(layer, proj, _)| module(layer, proj)).collect::<Vec<_>>())
        };
        json!({
            "alpha_pattern": alpha_pattern,
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": c.layers,
            "lora_alpha": whole(c.alpha),
            "lora_bias": false,
            "lora_dropout": c.dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": c.rank,
            "rank_pattern": rank_pattern,
            "revision": null,
            "target_modules": target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": c.use_rslora,
        })
    }
}

/// A projection's path in the model.
fn module(layer: usize, proj: Proj) -> String {
    format!("model.layers.{layer}.{}", proj.path())
}

/// A number as PEFT writes it: an integer where it is one.
fn whole(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<PeftConfig> {
        PeftConfig::parse(text.as_bytes(), Path::new("adapter_config.json"))
    }

    #[test]
    fn what_is_no_plain_lora_is_refused_by_name() {
        for (key, value) in [
            ("use_dora", "true"),
            ("use_qalora", "true"),
            ("lora_bias", "true"),
            ("fan_in_fan_out", "true"),
            ("bias", "\"all\""),
            ("modules_to_save", "[\"lm_head\"]"),
            ("exclude_modules", "[\"q_proj\"]"),
            ("trainable_token_indices", "[3]"),
            ("target_parameters", "[\"x\"]"),
            ("layer_replication", "[[0, 1]]"),
            ("alora_invocation_tokens", "[5]"),
            ("arrow_config", "{}"),
            ("kasa_config", "{}"),
            ("megatron_config", "{}"),
            ("monteclora_config", "{}"),
            ("use_bdlora", "{}"),
            ("velora_config", "{}"),
            ("layers_pattern", "\"h\""),
            ("init_lora_weights", "\"pissa_niter_4\""),
            ("init_lora_weights", "\"olora\""),
        ] {
            let text = format!("{{\"peft_type\":\"LORA\",\"target_modules\":[\"q_proj\"],\"{key}\":{value}}}");
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
        assert!(parse("{\"peft_type\":\"IA3\"}").unwrap_err().to_string().contains("IA3"));
    }

    #[test]
    fn missing_keys_have_pefts_defaults() {
        let config =
            parse("{\"peft_type\":\"LORA\",\"target_modules\":\"all-linear\",\"layers_to_transform\":3}").unwrap().lora;
        assert_eq!((config.rank, config.alpha, config.layers), (8, 8.0, Some(vec![3])));
        assert_eq!(config.target_modules, Proj::ALL);
    }

    #[test]
    fn numbers_that_no_adapter_has_are_refused_by_their_key() {
        for (key, value, expected) in [
            ("r", "0", "the LoRA rank is 0"),
            ("r", "-9223372036854775808", "the LoRA rank is -9223372036854775808"),
            ("lora_alpha", "-1", "the LoRA alpha is -1"),
            ("lora_alpha", "1e999", "number out of range"),
            ("lora_dropout", "1.0", "the LoRA dropout is 1"),
            ("layers_to_transform", "[]", "the layers of the LoRA is none"),
            ("rank_pattern", "{\"q_proj\":0}", "rank_pattern has 0 for q_proj"),
            ("alpha_pattern", "{\"q_proj\":-0.5}", "alpha_pattern has -0.5 for q_proj"),
            ("rank_pattern", "{\".*q_proj\":1}", "the pattern \".*q_proj\" is a regular expression"),
        ] {
            let text = format!("{{\"peft_type\":\"LORA\",\"target_modules\":[\"q_proj\"],\"{key}\":{value}}}");
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.starts_with("adapter_config.json: ") && message.contains(expected), "{message}");
        }
        let empty = parse("{\"peft_type\":\"LORA\",\"target_modules\":[]}").unwrap_err().to_string();
        assert!(empty.contains("target_modules is missing"), "{empty}");
    }

    #[test]
    fn a_folder_of_pickles_is_told_from_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let config = "{\"peft_type\":\"LORA\",\"target_modules\":[\"q_proj\"]}";
        files::write_atomic(&folder.path().join(CONFIG), config.as_bytes()).unwrap();
        let model = crate::tiny_random::config(100);
        let load = || Adapter::load(folder.path(), &model, Device::Cpu).unwrap_err().to_string();
        assert!(load().contains("adapter_model.safetensors: No such file"), "{}", load());
        files::write_atomic(&folder.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
        let message = load();
        assert!(message.contains("but adapter_model.bin; a pickle runs the code that is in it"), "{message}");
    }

    #[test]
    fn a_pattern_matches_whole_parts_of_a_path_only() {
        let patterns = BTreeMap::from([("layers.1.mlp.up_proj".to_owned(), 2)]);
        assert_eq!(matching(&patterns, "model.layers.1.mlp.up_proj"), Some(2));
        assert_eq!(matching(&patterns, "model.layers.11.mlp.up_proj"), None);
        for name in ["up_proj", "mlp.up_proj", "layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"] {
            assert_eq!(proj(name), Some(Proj::Up), "{name}");
        }
        for name in ["p_proj", "self_attn.up_proj", "model.layers.3", "h.3.mlp.up_proj"] {
            assert_eq!(proj(name), None, "{name}");
        }
    }
}
