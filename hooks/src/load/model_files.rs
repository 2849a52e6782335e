//! A model by its name: a folder in Hugging Face form, a hub id, a `.gguf` file, or an embedded one: `pocket`,
//! `pocket-other`, `tiny-random`.
//!
//! Each gives five things: configuration, weights, tokenizer, chat template, and a report of the files that were found.

use std::collections::BTreeMap;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::Tensor;
use tokenizers::Tokenizer;

use crate::config::{self, Config, Family};
use crate::error::{Error, Problem, Result, few, malformed, unsupported};
use crate::load::files;
use crate::load::gguf::Gguf;
use crate::load::hub::{Hub, HubId, Wanted};
use crate::load::init;
use crate::load::pocket::{POCKETS, Pocket};
use crate::load::tiny_random;
use crate::load::tokenizer_file;
use crate::load::weights::Weights;
use crate::profile::{self, Stage};
use crate::proj::Proj;

const ADAPTER_CONFIG: &str = "adapter_config.json";
const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The name of the embedded model.
pub const TINY_RANDOM: &str = "tiny-random";

/// The content of a model's files.
pub struct ModelFiles {
    /// The model as the user named it.
    pub name: String,
    /// Its numbers.
    pub config: Config,
    /// Its tensors. Those of files stay on disk until they are used.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Option<Tokenizer>,
    /// Its chat template, in Jinja's language.
    pub chat_template: Option<String>,
    /// The files that were found, in lines for the user.
    pub report: Vec<String>,
    /// Remarks on unexpected things, a sentence each: a head that is not the embedding although the configuration ties
    /// them, unused tensors. Empty for most models.
    pub remarks: Vec<String>,
}

impl ModelFiles {
    /// Opens a model by a folder, a hub id, the path of a `.gguf` file or the name of an embedded one.
    pub fn open(model: &str) -> Result<Self> {
        Self::find(model, &Hub::from_env())
    }

    fn find(model: &str, hub: &Hub) -> Result<Self> {
        let _stage = profile::stage(Stage::Load);
        let path = Path::new(model);
        let mut files = if model == TINY_RANDOM {
            Self::embedded()?
        } else if let Some(pocket) = POCKETS.iter().find(|pocket| pocket.name == model) {
            Self::pocket(pocket)?
        } else if path.is_dir() {
            Self::folder(model, path)?
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            Self::gguf(model, path)?
        } else if files::is_pickle(path) {
            let error = Error::NoSuchModel { name: model.to_owned(), reason: files::NO_PICKLE.to_owned() };
            return Err(error.with_hint(files::PICKLE_HINT));
        } else if path.is_file() {
            return Err(of_a_file(path).into_error(|reason| Error::NoSuchModel { name: model.to_owned(), reason }));
        } else if let Some(id) = HubId::parse(model) {
            let (folder, line) = hub.fetch(&id, Wanted::Model)?;
            let mut files = Self::folder(model, &folder)?;
            files.report.insert(0, line);
            files
        } else {
            let reason = "it is no folder, no .gguf file, and not of the form org/name; give one of these, or an embedded one: pocket, pocket-other, tiny-random";
            return Err(Error::NoSuchModel { name: model.to_owned(), reason: reason.to_owned() });
        };
        files.check_vocabulary()?;
        files.remarks.extend(strangers(&files.config, &files.weights));
        Ok(files)
    }

    /// A model to be trained from scratch: weights drawn by `init`, with Qwen2.5's chat template.
    pub fn fresh(name: &str, config: Config, tokenizer: Tokenizer, rng: ChaCha8Rng) -> Result<Self> {
        let weights = init::weights(&config, rng)?;
        let mut files = Self::in_memory(name, config, weights, tokenizer, tiny_random::CHAT_TEMPLATE);
        files.report[1] += ", not trained";
        files.check_vocabulary()?;
        Ok(files)
    }

    /// A SHA-256, in hex, of the configuration, of every tensor's name, dtype and shape, and of a sample of its bytes.
    /// It distinguishes checkpoints without reading them whole, but does not prove that every byte is the same.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.config.to_hf_json().to_string());
        self.weights.hash_into(&mut hash);
        format!("{:x}", hash.finalize())
    }

    fn embedded() -> Result<Self> {
        let tokenizer = tokenizer_file::parse(tiny_random::TOKENIZER, Path::new("tokenizer.json"))?;
        let config = tiny_random::config(tokenizer.get_vocab_size(true) as i64);
        let (name, weights, seed) = (TINY_RANDOM, tiny_random::weights(&config)?, tiny_random::SEED);
        let mut files = Self::in_memory(name, config, weights, tokenizer, tiny_random::CHAT_TEMPLATE);
        let line = format!("{name}: embedded; its weights are random (seed {seed}), so what it says means nothing");
        files.report.insert(0, line);
        Ok(files)
    }

    fn pocket(pocket: &Pocket) -> Result<Self> {
        let (name, config) = (pocket.name, pocket.config()?);
        let tokenizer = tokenizer_file::parse(pocket.tokenizer, Path::new("tokenizer.json"))?;
        let mut files = Self::in_memory(name, config, pocket.tensors()?, tokenizer, pocket.chat_template);
        files.report.insert(0, format!("{name}: embedded; trained from scratch on a small world of its own"));
        Ok(files)
    }

    fn in_memory(
        name: &str,
        config: Config,
        tensors: BTreeMap<String, Tensor>,
        tokenizer: Tokenizer,
        chat_template: &str,
    ) -> Self {
        let weights = Weights::from_tensors(name, tensors);
        let report = vec![summary(name, &config), format!("{name}: {}", weights.describe())];
        let (name, tokenizer, chat_template) = (name.to_owned(), Some(tokenizer), Some(chat_template.to_owned()));
        Self { name, config, weights, tokenizer, chat_template, report, remarks: vec![] }
    }

    fn folder(name: &str, folder: &Path) -> Result<Self> {
        let no_such = |reason: String| Error::NoSuchModel { name: name.to_owned(), reason };
        let has = |file: &str| folder.join(file).exists();
        let stored = ["model.safetensors", "model.safetensors.index.json"].into_iter().find(|file| has(file));
        if has(ADAPTER_CONFIG) && !(has("config.json") && stored.is_some()) {
            return Err(of_an_adapter(name, folder).into_error(no_such));
        }
        let path = folder.join("config.json");
        if !path.exists() {
            return Err(no_such(format!(
                "the folder {} has no config.json; give the folder that has it, or a .gguf file by its path",
                folder.display()
            )));
        }
        let bytes = files::read(&path)?;
        let mut config = Config::parse(&bytes, &path)?;
        let Some(stored) = stored else {
            let lacks = format!("{} has neither model.safetensors nor model.safetensors.index.json", folder.display());
            return Err(match files::pickle(folder) {
                Some(pickle) => {
                    no_such(format!("{lacks}, but {pickle}; {}", files::NO_PICKLE)).with_hint(files::PICKLE_HINT)
                }
                None => no_such(lacks),
            });
        };
        let weights = Weights::safetensors(&[folder.join(stored)])?;
        let mut remarks: Vec<String> = left_over_quantization(&bytes, &config, &weights, &path)?.into_iter().collect();
        remarks.extend(settle_head(&mut config, &weights, &path)?);
        let mut report = vec![summary("config.json", &config), format!("{stored}: {}", weights.describe())];

        let path = folder.join("tokenizer.json");
        let tokenizer = if path.exists() { Some(tokenizer_file::parse(&files::read(&path)?, &path)?) } else { None };
        report.push(match &tokenizer {
            Some(tokenizer) => format!("tokenizer.json: {} tokens", tokenizer.get_vocab_size(true)),
            None => "no tokenizer.json was found".to_owned(),
        });
        if let Some(tokenizer) = &tokenizer {
            for path in tokenizer_file::BESIDE.map(|file| folder.join(file)).iter().filter(|path| path.exists()) {
                tokenizer_file::check_beside(&files::read(path)?, path, tokenizer)?;
            }
        }
        let template = chat_template(folder)?;
        report.push(match &template {
            Some((_, file)) => format!("chat template: from {file}"),
            None => "no chat template was found".to_owned(),
        });
        let chat_template = template.map(|(template, _)| template);
        Ok(Self { name: name.to_owned(), config, weights, tokenizer, chat_template, report, remarks })
    }

    fn gguf(name: &str, path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::NoSuchModel { name: name.to_owned(), reason: "there is no such file".to_owned() });
        }
        let gguf = Gguf::open(path)?;
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let (config, tokenizer) = (gguf.config()?, gguf.tokenizer()?);
        let chat_template = gguf.chat_template().map(str::to_owned);
        let mut report = vec![summary(&file, &config)];
        report.extend(gguf.name().map(|own| format!("{file}: calls itself {own}")));
        report.push(match &tokenizer {
            Some(tokenizer) => format!("{file}: a tokenizer of {} tokens", tokenizer.get_vocab_size(true)),
            None => format!("{file}: no tokenizer was found"),
        });
        report.push(format!("{file}: {}chat template was found", if chat_template.is_some() { "a " } else { "no " }));
        let weights = Weights::gguf(gguf);
        report.push(format!("{file}: {}", weights.describe()));
        Ok(Self { name: name.to_owned(), config, weights, tokenizer, chat_template, report, remarks: vec![] })
    }

    /// Refuses a token beyond the embedding, which would fail only when it is first used.
    fn check_vocabulary(&self) -> Result<()> {
        let last = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.get_vocab(true).into_values().max());
        let d_vocab = self.config.d_vocab;
        let Some(last) = last.filter(|last| i64::from(*last) >= d_vocab) else { return Ok(()) };
        let problem = format!("it has a token {last}, but the model {} has only {d_vocab}", self.name);
        Err(Error::Tokenizer { problem })
    }
}

/// The problem that a file is not a model, with the folder to give instead.
fn of_a_file(path: &Path) -> Problem {
    let folder = files::folder_of(path);
    let name = folder.to_string_lossy();
    if folder.join("config.json").exists() {
        return Problem::hinted("it is a file of a model".to_owned(), format!("give its folder, {name}"));
    }
    if folder.join(ADAPTER_CONFIG).exists() {
        return of_an_adapter(&name, folder);
    }
    "it is a file, expected a folder with config.json and model.safetensors, or a .gguf file".to_owned().into()
}

/// The problem that an adapter's folder is not a model, with the way to give it.
fn of_an_adapter(name: &str, folder: &Path) -> Problem {
    let config = files::read(&folder.join(ADAPTER_CONFIG)).ok();
    let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let base = config.as_ref().and_then(|config| config.get("base_model_name_or_path")?.as_str());
    let of_base = base.map_or_else(String::new, |base| format!(" of the base model {base}"));
    let base = base.unwrap_or("BASE");
    Problem::hinted(format!("it is an adapter{of_base}, not a model"), format!("--model {base} --adapter {name}"))
}

/// The remark on a `quantization_config` that a merge or a dequantisation left in `config.json`. It is an error if the
/// weights are quantised or contain a tensor that no Qwen has.
fn left_over_quantization(bytes: &[u8], config: &Config, weights: &Weights, path: &Path) -> Result<Option<String>> {
    let Some((quantization, instead)) = config::quantization(bytes, path)? else { return Ok(None) };
    let names = weights.names();
    if names.iter().all(|name| weights.is_float(name) && belongs(name, config)) {
        return Ok(Some(format!(
            "config.json has a {quantization}, but all {} tensors are plain {}; it was left over and is passed over",
            names.len(),
            weights.dtypes()
        )));
    }
    Err(unsupported(path, quantization, instead))
}

/// Decides whether the head is the embedding: as the configuration says, unless the files contain a different head.
/// transformers 5 does the same; transformers 4 ties the two without a warning. If only the head is stored, it is used
/// as the embedding too.
fn settle_head(config: &mut Config, weights: &Weights, path: &Path) -> Result<Option<String>> {
    if !config.tie_embeddings {
        if weights.shape(HEAD).is_none() {
            let problem = format!("tie_word_embeddings is false, but there is no {HEAD} in {}", weights.files());
            let hint = "set it to true where the model was trained so, or fetch the file that holds its head";
            return Err(malformed(path, problem).with_hint(hint));
        }
        return Ok(None);
    }
    if weights.shape(HEAD).is_none() || weights.are_equal(HEAD, EMBED)? {
        return Ok(None);
    }
    if weights.shape(EMBED).is_none() {
        return Ok(Some(format!(
            "config.json has tie_word_embeddings true, but there is no {EMBED}; {HEAD} is taken as both, as transformers 5 does"
        )));
    }
    config.tie_embeddings = false;
    Ok(Some(format!(
        "config.json has tie_word_embeddings true, but {HEAD} is not {EMBED}; the head is taken as it is stored, untied"
    )))
}

/// The remark on tensors that a Qwen of this configuration does not have; they are not used.
fn strangers(config: &Config, weights: &Weights) -> Option<String> {
    let names: Vec<String> = weights.names().into_iter().filter(|name| !belongs(name, config)).collect();
    (!names.is_empty()).then(|| {
        format!(
            "{} of the {} tensors in {} are in no {} of {} layers and are not used: {}",
            names.len(),
            weights.names().len(),
            weights.files(),
            family(config),
            config.n_layers,
            few(&names)
        )
    })
}

/// Whether a Qwen with this configuration has the tensor. Tables of the rotary embedding also count: older versions
/// saved them.
fn belongs(name: &str, config: &Config) -> bool {
    if name.ends_with("rotary_emb.inv_freq") {
        return true;
    }
    let Some(inside) = name.strip_prefix("model.layers.") else {
        return [EMBED, "model.norm.weight", HEAD].contains(&name);
    };
    let Some((layer, part)) = inside.split_once('.') else { return false };
    let is_norm = ["input_layernorm.weight", "post_attention_layernorm.weight"].contains(&part)
        || config.qk_norm && ["self_attn.q_norm.weight", "self_attn.k_norm.weight"].contains(&part);
    let is_at = |proj: &Proj, what: &str| part == format!("{}.{what}", proj.path());
    let is_bias = config.qkv_bias && [Proj::Q, Proj::K, Proj::V].iter().any(|proj| is_at(proj, "bias"));
    let is_weight = Proj::ALL.iter().any(|proj| is_at(proj, "weight"));
    let is_layer = layer.parse::<usize>().is_ok_and(|n| n < config.n_layers && n.to_string() == layer);
    is_layer && (is_norm || is_bias || is_weight)
}

fn family(config: &Config) -> &'static str {
    match config.family {
        Family::Qwen2 => "Qwen2",
        Family::Qwen3 => "Qwen3",
    }
}

/// A line such as `config.json: Qwen2, 24 layers, d_model 896`.
fn summary(file: &str, config: &Config) -> String {
    let family = family(config);
    let tied = if config.tie_embeddings { "tied" } else { "untied" };
    let Config { n_layers, d_model, n_heads, n_kv_heads, d_vocab, .. } = config;
    format!(
        "{file}: {family}, {n_layers} layers, d_model {d_model}, {n_heads} heads, {n_kv_heads} kv heads, {d_vocab} tokens, {tied} embeddings"
    )
}

/// The chat template and the file that it was found in. `chat_template.jinja` is the newer place and has precedence.
fn chat_template(folder: &Path) -> Result<Option<(String, &'static str)>> {
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        return Ok(Some((files::read_string(&path)?, "chat_template.jinja")));
    }
    let path = folder.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(None);
    }
    let template = parse_tokenizer_config(&files::read(&path)?, &path)?;
    Ok(template.map(|template| (template, "tokenizer_config.json")))
}

/// The chat template in the bytes of a `tokenizer_config.json`, if it has one; `path` is for messages.
pub fn parse_tokenizer_config(bytes: &[u8], path: &Path) -> Result<Option<String>> {
    let config: Value = serde_json::from_slice(bytes).map_err(|error| malformed(path, error.to_string()))?;
    let template = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(template)) => Some(template.as_str()),
        Some(named) => {
            let named = named.as_array().into_iter().flatten();
            named.filter(|entry| entry["name"] == "default").find_map(|entry| entry["template"].as_str())
        }
    };
    let neither = || malformed(path, "chat_template is neither a text nor a list with the name default".to_owned());
    Ok(Some(template.ok_or_else(neither)?.to_owned()))
}

#[cfg(test)]
mod tests;
