//! The settings in `adapter_config.json`, as PEFT understands them. A key that changes the result is read or refused by
//! its name; an unknown key is ignored with a remark, where PEFT gives a warning.

use std::collections::BTreeSet;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::module;
use super::modules::{Modules, Patterns, Targets, layer_of};
use crate::adapter::lora::LoraConfig;
use crate::config::Config;
use crate::error::{Error, Problem, Result, few, short};
use crate::proj::Proj;

/// The hint on using an unsupported kind of adapter.
pub(super) const MERGE: &str =
    "where PEFT can merge it into the weights (merge_and_unload), the merged folder can be asked as a model";

/// More blocks than any Qwen has. A configuration that is read without its model is tested on this many.
const MOST_BLOCKS: usize = 128;

/// An `adapter_config.json`, checked.
#[derive(Debug)]
pub(super) struct PeftConfig {
    rank: i64,
    alpha: f64,
    dropout: f64,
    use_rslora: bool,
    pub(super) targets: Targets,
    pub(super) ranks: Patterns<i64>,
    pub(super) alphas: Patterns<f64>,
    /// Modules of the base that were trained whole.
    pub(super) modules_to_save: Vec<String>,
    /// Remarks for the user, a sentence each.
    pub(super) remarks: Vec<String>,
}

impl PeftConfig {
    /// Reads the bytes of an `adapter_config.json`; `path` is for messages.
    pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let refused = |problem: String| Error::Adapter { path: path.to_owned(), problem };
        let keys: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
        let config = Keys(&keys).read().map_err(|problem| problem.into_error(refused))?;
        // Checks the numbers, before the adapter's places are known.
        let numbers = config.lora(&[(0, Proj::Q)], None);
        numbers.check_numbers().map_err(|error| refused(error.to_string()))?;
        Ok(config)
    }

    /// The settings of an adapter with pairs at these places; `n_layers` is `None` if the model is not known.
    pub(super) fn lora(&self, places: &[(usize, Proj)], n_layers: Option<usize>) -> LoraConfig {
        let projections: BTreeSet<Proj> = places.iter().map(|(_, proj)| *proj).collect();
        let layers: BTreeSet<usize> = places.iter().map(|(layer, _)| *layer).collect();
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            target_modules: projections.into_iter().collect(),
            layers: (Some(layers.len()) != n_layers).then(|| layers.into_iter().collect()),
        }
    }

    /// The settings if the model is not known. `None` if only Python can tell which modules an expression means.
    pub(super) fn lora_of_any(&self) -> Option<LoraConfig> {
        let layers: BTreeSet<usize> = (0..MOST_BLOCKS).chain(self.targets.layers.iter().flatten().copied()).collect();
        let mut places = Vec::new();
        for (layer, proj) in layers.iter().flat_map(|layer| Proj::ALL.map(|proj| (*layer, proj))) {
            if self.targets.contain(layer, proj)? {
                places.push((layer, proj));
            }
        }
        Some(self.lora(&places, Some(layers.len())))
    }

    /// Refuses settings that no adapter of this model can have, such as blocks none of which it has. If it lacks only
    /// some, returns a remark.
    pub(super) fn check(&self, model: &Config) -> Result<Option<String>> {
        let layers = self.targets.layers.clone().unwrap_or_default();
        let (beyond, there): (Vec<usize>, Vec<usize>) = layers.into_iter().partition(|layer| *layer >= model.n_layers);
        if there.is_empty() {
            let layers = (!beyond.is_empty()).then_some(beyond);
            LoraConfig { layers, ..self.lora(&[(0, Proj::Q)], None) }.check(model)?;
            return Ok(None);
        }
        Ok((!beyond.is_empty()).then(|| {
            format!(
                "layers_to_transform also names {}, but the model has the blocks 0 to {}: nothing acts there",
                few(&beyond.iter().map(ToString::to_string).collect::<Vec<_>>()),
                model.n_layers - 1
            )
        }))
    }
}

struct Keys<'a>(&'a Map<String, Value>);

/// A result whose error names the key, the value found and the value expected.
type Refused<T> = std::result::Result<T, Problem>;

impl Keys<'_> {
    fn read(&self) -> Refused<PeftConfig> {
        self.refuse()?;
        let rank = self.value("r", "a whole number")?.unwrap_or(8);
        let alpha = self.value("lora_alpha", "a number")?.unwrap_or(8.0);
        let dropout = self.value("lora_dropout", "a number")?.unwrap_or(0.0);
        let use_rslora = self.value("use_rslora", "true or false")?.unwrap_or(false);
        let (ranks, alphas) = (self.patterns("rank_pattern")?, self.patterns("alpha_pattern")?);
        ranks.check("at least 1", |rank| *rank >= 1)?;
        alphas.check("a positive number", |alpha: &f64| *alpha > 0.0)?;
        let (targets, mut remarks) = self.targets()?;
        remarks.extend(self.remarks());
        let modules_to_save = self.modules_to_save()?;
        Ok(PeftConfig { rank, alpha, dropout, use_rslora, targets, ranks, alphas, modules_to_save, remarks })
    }

    /// Refuses every key that asks for anything other than a plain LoRA.
    fn refuse(&self) -> Refused<()> {
        match self.0.get("peft_type") {
            Some(Value::String(lora)) if lora == "LORA" => {}
            Some(Value::String(other)) => return Err(merge(format!("peft_type is {other}, expected LORA"))),
            Some(other) => return Err(format!("peft_type is {}, expected \"LORA\"", short(other)).into()),
            None if MLX.iter().any(|key| self.0.contains_key(*key)) => return Err(of_mlx()),
            None => return Err("peft_type is missing, expected \"LORA\", as PEFT writes it".to_owned().into()),
        }
        for (key, why) in NOT_PLAIN {
            if let Some(value) = self.0.get(key).filter(|value| !is_nothing(value)) {
                return Err(merge(format!("{key} is {}, which is not supported: {why}", short(value))));
            }
        }
        if let Some(init) = self.0.get("init_lora_weights").and_then(Value::as_str) {
            let init = init.to_lowercase();
            if CHANGE_THE_BASE.iter().any(|kind| init.starts_with(kind)) {
                return Err(Problem::hinted(
                    format!("init_lora_weights is {init:?}, which changes the base's weights too and is not supported"),
                    "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) writes a plain LoRA",
                ));
            }
            if init.starts_with("loftq") {
                return Err(merge(format!(
                    "init_lora_weights is {init:?}, which is made for a quantised base and is not supported: on the plain \
                     base it acts otherwise"
                )));
            }
        }
        match self.0.get("bias") {
            Some(bias) if bias != "none" && !is_nothing(bias) => Err(merge(format!(
                "bias is {}, expected \"none\": the base's own biases were trained beside the LoRA",
                short(bias)
            ))),
            _ => Ok(()),
        }
    }

    /// The modules and blocks where the adapter acts, with remarks.
    fn targets(&self) -> Refused<(Targets, Vec<String>)> {
        let mut remarks = Vec::new();
        let modules = match self.modules("target_modules")? {
            None => return Err("target_modules is missing, expected a list of projections".to_owned().into()),
            Some(Modules::Expression(all, _)) if all.eq_ignore_ascii_case("all-linear") => {
                Modules::Names(Proj::ALL.map(|proj| proj.name().to_owned()).to_vec())
            }
            // A single name in place of an expression means that module.
            Some(Modules::Expression(name, _)) if is_projection(&name) => Modules::Names(vec![name]),
            Some(Modules::Names(names)) => {
                if let Some(name) = names.iter().find(|name| ["lm_head", "embed_tokens"].contains(&last(name))) {
                    return Err(merge(format!(
                        "target_modules names {name:?}, expected projections of the blocks alone ({}): a LoRA on embeddings \
                         or head is not supported",
                        Proj::ALL.map(Proj::name).join(", ")
                    )));
                }
                let elsewhere: Vec<String> =
                    names.iter().filter(|name| !is_projection(name)).map(|name| format!("{name:?}")).collect();
                if elsewhere.len() == names.len() {
                    return Err(unknown_module(names.first().map_or("", String::as_str)).into());
                }
                if !elsewhere.is_empty() {
                    let elsewhere = elsewhere.join(", ");
                    remarks
                        .push(format!("target_modules also names {elsewhere}, which no Qwen has: nothing acts there"));
                }
                Modules::Names(names)
            }
            Some(expression) => expression,
        };
        let layers = self.one_or_many("layers_to_transform", "a block's number or a list of them")?;
        let mut patterns = self.one_or_many("layers_pattern", "a name or a list of names")?.unwrap_or_default();
        patterns.retain(|pattern: &String| !pattern.is_empty());
        if !patterns.is_empty() && patterns.iter().all(|pattern| layer_of(pattern, &module(7, Proj::Q)) != Some(7)) {
            let all = patterns.join(", ");
            return Err(format!("layers_pattern is {all:?}, expected \"layers\", as a Qwen's blocks are called").into());
        }
        let excluded = self.modules("exclude_modules")?;
        for (key, modules) in [("target_modules", Some(&modules)), ("exclude_modules", excluded.as_ref())] {
            if let Some(Modules::Expression(expression, None)) = modules {
                remarks.push(format!(
                    "{key} is {}, an expression that only Python reads: the modules are those that have tensors",
                    short(&Value::String(expression.clone()))
                ));
            }
        }
        // As in PEFT, an empty list means no restriction.
        Ok((Targets { modules, excluded, layers: layers.filter(|layers| !layers.is_empty()) }, remarks))
    }

    /// Modules that were trained whole. Only embeddings and head are accepted here; their tensors are compared with the
    /// base's later.
    fn modules_to_save(&self) -> Refused<Vec<String>> {
        let names: Vec<String> = self.one_or_many("modules_to_save", "a list of modules")?.unwrap_or_default();
        if names.iter().any(|name| !["lm_head", "embed_tokens"].contains(&last(name))) {
            return Err(saved_whole(&names));
        }
        Ok(names)
    }

    /// Remarks on settings that are accepted but unusual.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        if self.0.get("fan_in_fan_out") == Some(&Value::Bool(true)) {
            remarks
                .push("fan_in_fan_out is true, which is without effect on a Qwen's linear maps, as in PEFT".to_owned());
        }
        let unknown = |(key, value): &(&String, &Value)| !is_nothing(value) && !is_known(key);
        let unknown: Vec<&str> = self.0.iter().filter(unknown).map(|(key, _)| key.as_str()).collect();
        if !unknown.is_empty() {
            remarks.push(format!("it has keys that are not known here and are passed over: {}", few(&unknown)));
        }
        remarks
    }

    /// A key's value; `None` if it is null or missing.
    fn value<T: DeserializeOwned>(&self, key: &str, expected: &str) -> Refused<Option<T>> {
        let value = self.0.get(key).filter(|value| !value.is_null());
        let read = |value: &Value| {
            T::deserialize(value).map_err(|_| format!("{key} is {}, expected {expected}", short(value)).into())
        };
        value.map(read).transpose()
    }

    fn one_or_many<T: DeserializeOwned>(&self, key: &str, expected: &str) -> Refused<Option<Vec<T>>> {
        match self.0.get(key) {
            Some(Value::Array(_)) => self.value(key, expected),
            _ => Ok(self.value(key, expected)?.map(|one| vec![one])),
        }
    }

    fn modules(&self, key: &str) -> Refused<Option<Modules>> {
        if let Some(Value::String(expression)) = self.0.get(key) {
            return Ok((!expression.is_empty()).then(|| Modules::expression(expression)));
        }
        let names: Option<Vec<String>> = self.value(key, "a list of modules or an expression")?;
        Ok(names.filter(|names| !names.is_empty()).map(Modules::Names))
    }

    fn patterns<T: DeserializeOwned>(&self, key: &'static str) -> Refused<Patterns<T>> {
        let by_name: Option<Map<String, Value>> = self.value(key, "an object of numbers by module")?;
        let read = |(pattern, value): (String, Value)| match T::deserialize(&value) {
            Ok(number) => Ok((pattern, number)),
            Err(_) => Err(format!("{key} has {} for {pattern}, expected a number", short(&value))),
        };
        let entries = by_name.unwrap_or_default().into_iter().map(read).collect::<std::result::Result<_, _>>()?;
        Ok(Patterns::new(key, entries)?)
    }
}

/// Keys that, if set, ask for something other than a plain LoRA, each with the reason.
const NOT_PLAIN: [(&str, &str); 13] = [
    ("use_dora", "DoRA also scales the rows of the weights"),
    ("use_qalora", "QALoRA pools what goes into A"),
    ("lora_bias", "B has a bias"),
    ("trainable_token_indices", "embeddings of tokens were trained beside the LoRA"),
    ("target_parameters", "it acts on parameters that a dense Qwen does not have"),
    ("layer_replication", "it runs blocks of the base several times"),
    ("alora_invocation_tokens", "it acts from these tokens on alone"),
    ("arrow_config", "it chooses among several adapters"),
    ("kasa_config", "it cuts the base's weights and has a diagonal between A and B"),
    ("megatron_config", "its maps are split as in Megatron"),
    ("monteclora_config", "it adds random draws to A and B"),
    ("use_bdlora", "its factors are block-diagonal"),
    ("velora_config", "its A was trained on compressed activations, of which it keeps tensors"),
];

/// Prefixes of initialisations that compute A and B from the base's weights and change these.
const CHANGE_THE_BASE: [&str; 4] = ["pissa", "olora", "corda", "lora_ga"];

/// Keys that only MLX writes into an `adapter_config.json`.
const MLX: [&str; 4] = ["fine_tune_type", "lora_parameters", "lora_layers", "adapter_path"];

/// The error for MLX's files, which have another layout.
fn of_mlx() -> Problem {
    Problem::hinted(
        "it is an adapter of MLX, expected one of PEFT".to_owned(),
        "convert it, with lora_A.weight the transposed lora_a and lora_B.weight the transposed lora_b, each under \
         base_model.model. and its module, r the rank, and lora_alpha the scale times r",
    )
}

/// Keys of PEFT up to 0.21 that change nothing by themselves or are read here.
const KNOWN: [&str; 33] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "enable_lora",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "unsloth_version",
    "transformers_version",
];

/// A refusal of an adapter that may still be merged.
fn merge(problem: String) -> Problem {
    Problem::hinted(problem, MERGE)
}

fn is_known(key: &str) -> bool {
    KNOWN.contains(&key) || NOT_PLAIN.iter().any(|(other, _)| *other == key)
}

pub(super) fn saved_whole(names: &[String]) -> Problem {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    merge(format!(
        "modules_to_save is [{}], which is not supported: these modules were trained whole beside the LoRA, a change of the base \
         that no gate can switch",
        quoted.join(", ")
    ))
}

/// Whether a value leaves its setting off.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn unknown_module(name: &str) -> String {
    format!(
        "target_modules names {name:?}, expected \"all-linear\", an expression, or some of {}",
        Proj::ALL.map(Proj::name).join(", ")
    )
}

/// Whether a name is a projection's, with or without its path: `q_proj`, `layers.0.self_attn.q_proj`.
fn is_projection(name: &str) -> bool {
    let layer = name.split('.').find_map(|part| part.parse().ok()).unwrap_or(0);
    Proj::ALL.into_iter().any(|proj| super::modules::ends(&module(layer, proj), name))
}

#[cfg(test)]
mod tests;
