//! A model by its name: a folder in Hugging Face form, a hub id, a `.gguf` file, or an embedded one: `pocket`,
//! `pocket-other`, `tiny-random`.
//!
//! Each gives the same five things: configuration, weights, tokenizer, chat template, and a report that says in lines
//! what was found where.

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

/// Everything that a model's files hold.
pub struct ModelFiles {
    /// The model as the user named it.
    pub name: String,
    /// Its numbers.
    pub config: Config,
    /// Its tensors, still on disk where they are large.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Option<Tokenizer>,
    /// Its chat template, in Jinja's language.
    pub chat_template: Option<String>,
    /// What was found where, in lines for the user.
    pub report: Vec<String>,
    /// Remarks that a user may not expect, a sentence each: a head that is not the embedding although the configuration
    /// ties them, unused tensors. Empty for most models.
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
    /// It tells checkpoints apart at no cost, but does not prove that every byte is the same.
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

    /// A model whose tensors are in memory.
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

    /// A token beyond the embedding would be noticed only when it is first used.
    fn check_vocabulary(&self) -> Result<()> {
        let last = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.get_vocab(true).into_values().max());
        let d_vocab = self.config.d_vocab;
        let Some(last) = last.filter(|last| i64::from(*last) >= d_vocab) else { return Ok(()) };
        let problem = format!("it has a token {last}, but the model {} has only {d_vocab}", self.name);
        Err(Error::Tokenizer { problem })
    }
}

/// Says why a file is not a model, and which folder to give instead.
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

/// Says why an adapter's folder is not a model, and how to give it.
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

/// Decides whether the head is the embedding: as the configuration says, unless the files store another head.
/// transformers 5 does the same; transformers 4 ties the two without a warning. If only the head is
/// stored, it is the embedding too.
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

/// Whether a Qwen with this configuration has the tensor, or it is a table of the rotary embedding, which older
/// versions saved too.
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

/// The chat template and the file that it was found in. `chat_template.jinja` is the newer place and goes first.
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
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use safetensors::tensor::{Dtype, TensorView};
    use tch::{Device, Kind, Tensor};

    use super::*;

    fn offline(cache: &Path) -> Hub {
        Hub { cache: cache.to_owned(), offline: Some("HF_HUB_OFFLINE") }
    }

    fn nowhere() -> Hub {
        offline(Path::new("no/such/cache"))
    }

    /// A folder as `save_pretrained` makes it, with the embedded tokenizer and one tensor.
    fn write_model(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        let config = tiny_random::config(2000).to_hf_json();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        fs::write(folder.join("tokenizer.json"), tiny_random::TOKENIZER).unwrap();
        let norm = TensorView::new(Dtype::F16, vec![64], &[0; 128]).unwrap();
        fs::write(
            folder.join("model.safetensors"),
            safetensors::serialize([("model.norm.weight", norm)], None).unwrap(),
        )
        .unwrap();
    }

    /// Writes the embedded model into a folder, with its configuration and tensors changed.
    fn write_whole(
        folder: &Path,
        change_config: impl FnOnce(&mut Value),
        change_tensors: impl FnOnce(&mut BTreeMap<String, Tensor>),
    ) {
        let config = tiny_random::config(1100);
        let mut tensors = tiny_random::weights(&config).unwrap();
        let mut json = config.to_hf_json();
        change_config(&mut json);
        change_tensors(&mut tensors);
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), json.to_string()).unwrap();
        fs::write(folder.join("tokenizer.json"), tiny_random::TOKENIZER).unwrap();
        let tensors: Vec<_> = tensors.into_iter().collect();
        crate::load::tensor_file::write(&folder.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    }

    fn opened(folder: &Path) -> ModelFiles {
        ModelFiles::find(folder.to_str().unwrap(), &nowhere()).unwrap()
    }

    #[test]
    fn a_stored_head_is_used_unless_it_is_the_embedding() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let head = |change: fn(Tensor) -> Tensor| {
            move |tensors: &mut BTreeMap<String, Tensor>| {
                let embed = tensors[EMBED].copy();
                tensors.insert(HEAD.to_owned(), change(embed));
            }
        };
        let untied = |json: &mut Value| json["tie_word_embeddings"] = false.into();
        let one_other = |embed: Tensor| {
            let _ = embed.get(7).get(3).fill_(0.5);
            embed
        };
        write_whole(&at("same"), |_| (), head(|embed| embed));
        write_whole(&at("other"), |_| (), head(one_other));
        write_whole(&at("untied"), untied, head(one_other));
        write_whole(&at("none"), |_| (), |_| ());
        write_whole(&at("no-head"), untied, |_| ());
        // A head with the embedding's numbers in another dtype is the embedding.
        let in_bf16 = |tensors: &mut BTreeMap<String, Tensor>| {
            let embed = tensors[EMBED].to_kind(Kind::BFloat16);
            tensors.insert(EMBED.to_owned(), embed.to_kind(Kind::Float));
            tensors.insert(HEAD.to_owned(), embed);
        };
        write_whole(&at("bf16"), |_| (), in_bf16);

        // Both are one tensor, under whichever of the two names it is stored.
        let head_alone = |tensors: &mut BTreeMap<String, Tensor>| {
            let embed = tensors.remove(EMBED).unwrap();
            tensors.insert(HEAD.to_owned(), embed);
        };
        write_whole(&at("head-alone"), |_| (), head_alone);

        for tied in ["same", "none", "bf16"] {
            let files = opened(&at(tied));
            assert!(files.config.tie_embeddings && files.remarks.is_empty(), "{tied}: {:?}", files.remarks);
        }
        let (other, untied) = (opened(&at("other")), opened(&at("untied")));
        assert_eq!(
            other.remarks,
            [
                "config.json has tie_word_embeddings true, but lm_head.weight is not model.embed_tokens.weight; the head is taken as it is stored, untied"
            ]
        );
        assert_eq!((other.config.clone(), untied.remarks.len()), (untied.config.clone(), 0));
        assert!(other.report[0].ends_with("untied embeddings"), "{}", other.report[0]);
        let logits = |files: &ModelFiles| {
            let model = crate::Qwen::load(files, Device::Cpu, Kind::Double).unwrap();
            let batch = crate::Batch::from_ids(&[&[1, 2, 3]], Device::Cpu).unwrap();
            model.forward(&batch, &mut crate::Pass::default()).unwrap()
        };
        assert!(logits(&other).equal(&logits(&untied)) && !logits(&other).equal(&logits(&opened(&at("same")))));
        let head_alone = opened(&at("head-alone"));
        assert_eq!(
            head_alone.remarks,
            [
                "config.json has tie_word_embeddings true, but there is no model.embed_tokens.weight; lm_head.weight is taken as both, as transformers 5 does"
            ]
        );
        assert_eq!(head_alone.config, opened(&at("none")).config);
        let apart = (logits(&head_alone) - logits(&opened(&at("none")))).abs().max().double_value(&[]);
        assert!(apart < 1e-10, "{apart}");

        let refused = message(at("no-head").to_str().unwrap(), &nowhere());
        assert!(
            refused.contains("no-head/config.json: tie_word_embeddings is false, but there is no lm_head.weight in "),
            "{refused}"
        );
    }

    #[test]
    fn tensors_that_are_not_used_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let number = || Tensor::from_slice(&[1_f32]);
        let add = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            move |tensors: &mut BTreeMap<String, Tensor>| tensors.extend(names.into_iter().map(|name| (name, number())))
        };
        write_whole(
            folder.path(),
            |_| (),
            add(&["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        );
        assert_eq!(opened(folder.path()).remarks, [""; 0]);
        let strange = [
            "model.layers.0.self_attn.o_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.01.mlp.up_proj.weight",
            "score.weight",
        ];
        write_whole(folder.path(), |_| (), add(&strange));
        let [remark] = &opened(folder.path()).remarks[..] else { panic!("one remark") };
        assert!(remark.starts_with("4 of the 30 tensors in "), "{remark}");
        assert!(
            remark.ends_with(&format!(" are in no Qwen2 of 2 layers and are not used: {}", strange.join(", "))),
            "{remark}"
        );

        // A smaller number of layers leaves out a whole block. The message names ten of its tensors.
        write_whole(folder.path(), |json| json["num_hidden_layers"] = 1.into(), |_| ());
        let [remark] = &opened(folder.path()).remarks[..] else { panic!("one remark") };
        assert!(remark.starts_with("12 of the 26 tensors") && remark.ends_with(", … (12 in all)"), "{remark}");
        assert_eq!(remark.matches("model.layers.1.").count(), 10, "{remark}");
        let fresh = ModelFiles::find(TINY_RANDOM, &nowhere()).unwrap();
        assert!(fresh.remarks.is_empty(), "{:?}", fresh.remarks);
    }

    #[test]
    fn a_quantisation_is_refused_and_one_that_is_over_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let config = |key: &'static str, value: Value| move |json: &mut Value| json[key] = value;
        let bnb = serde_json::json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
        write_whole(folder.path(), config("quantization_config", bnb.clone()), |_| ());
        assert_eq!(
            opened(folder.path()).remarks,
            [
                "config.json has a quantization_config (bitsandbytes), but all 26 tensors are plain f32; it was left over and is passed over"
            ]
        );
        let refused = |key: &'static str, value: Value, name: &str, tensor: Tensor| {
            write_whole(folder.path(), config(key, value), |tensors| drop(tensors.insert(name.to_owned(), tensor)));
            message(folder.path().to_str().unwrap(), &nowhere())
        };
        let up = "model.layers.0.mlp.up_proj.weight";
        let packed = || Tensor::from_slice(&[1_i64, 2]);
        let message = refused("quantization_config", bnb.clone(), up, packed());
        assert!(
            message.contains("config.json: quantization_config (bitsandbytes) is not supported; use the unq"),
            "{message}"
        );
        let mlx = serde_json::json!({"group_size": 64, "bits": 4});
        let message = refused("quantization", mlx, up, packed());
        assert!(message.contains("quantization (MLX, 4 bits in groups of 64) is not supported; use the unquantized checkpoint, or what mlx_lm"), "{message}");
        // Tensors of floats are quantised if some of them are scales.
        let scale = "model.layers.0.mlp.up_proj.weight_scale";
        let message = refused("quantization_config", bnb, scale, Tensor::from_slice(&[1_f32]));
        assert!(message.contains("quantization_config (bitsandbytes) is not supported"), "{message}");
    }

    #[test]
    fn what_is_an_adapter_or_a_file_says_what_to_give() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        write_model(Path::new(&at("model")));
        for file in ["model/model.safetensors", "model/config.json", "model/tokenizer.json"] {
            let expected = format!("it is a file of a model; hint: give its folder, {}", at("model"));
            assert!(message(&at(file), &nowhere()).ends_with(&expected), "{file}");
        }
        fs::create_dir(at("lora")).unwrap();
        fs::write(at("lora/adapter_model.safetensors"), "").unwrap();
        fs::write(at("lora/adapter_config.json"), r#"{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}"#).unwrap();
        let expected = format!(
            "it is an adapter of the base model Qwen/Qwen2.5-0.5B, not a model; hint: --model Qwen/Qwen2.5-0.5B --adapter {}",
            at("lora")
        );
        for name in ["lora", "lora/adapter_model.safetensors", "lora/adapter_config.json"] {
            assert!(message(&at(name), &nowhere()).ends_with(&expected), "{}", message(&at(name), &nowhere()));
        }
        // A base's configuration in an adapter's folder does not make it a model, and an adapter in a model's folder
        // leaves it one.
        fs::copy(at("model/config.json"), at("lora/config.json")).unwrap();
        assert!(message(&at("lora"), &nowhere()).ends_with(&expected));
        fs::copy(at("lora/adapter_config.json"), at("model/adapter_config.json")).unwrap();
        assert!(ModelFiles::find(&at("model"), &nowhere()).is_ok());
        fs::write(at("lora/adapter_config.json"), "{").unwrap();
        assert!(
            message(&at("lora"), &nowhere()).contains("it is an adapter, not a model; hint: --model BASE --adapter ")
        );
        fs::write(at("notes.txt"), "").unwrap();
        assert!(message(&at("notes.txt"), &nowhere()).contains("it is a file, expected a folder with config.json"));
    }

    #[test]
    fn a_token_that_only_another_file_names_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        let name = folder.path().to_str().unwrap();
        fs::write(folder.path().join("added_tokens.json"), r#"{"<|im_start|>": 1006}"#).unwrap();
        assert!(ModelFiles::find(name, &nowhere()).is_ok());
        fs::write(folder.path().join("added_tokens.json"), r#"{"<|im_start|>": 1006, "<|owl|>": 1008}"#).unwrap();
        let refused = message(name, &nowhere());
        assert!(refused.contains("/added_tokens.json: it has the token \"<|owl|>\" with the id 1008"), "{refused}");
        fs::remove_file(folder.path().join("added_tokens.json")).unwrap();
        // tokenizer_config.json is read for tokens whether or not a newer file holds the template.
        let config = r#"{"added_tokens_decoder": {"1008": {"content": "<|owl|>"}}, "chat_template": "t"}"#;
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        for _ in 0..2 {
            let refused = message(name, &nowhere());
            assert!(
                refused.contains("/tokenizer_config.json: it has the token \"<|owl|>\" with the id 1008"),
                "{refused}"
            );
            fs::write(folder.path().join("chat_template.jinja"), "t").unwrap();
        }
    }

    fn message(model: &str, hub: &Hub) -> String {
        ModelFiles::find(model, hub).err().expect("an error").to_string()
    }

    #[test]
    fn a_folder_is_opened_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        write_model(&path);
        let files = ModelFiles::find(path.to_str().unwrap(), &nowhere()).unwrap();
        assert_eq!(files.config, tiny_random::config(2000));
        assert_eq!(files.chat_template, None);
        assert!(files.tokenizer.is_some());
        assert_eq!(
            files.report,
            [
                "config.json: Qwen2, 2 layers, d_model 64, 4 heads, 2 kv heads, 2000 tokens, tied embeddings"
                    .to_owned(),
                "model.safetensors: 1 tensors, f16, 1 kB, memory-mapped".to_owned(),
                format!("tokenizer.json: {} tokens", files.tokenizer.as_ref().unwrap().get_vocab_size(true)),
                "no chat template was found".to_owned(),
            ]
        );
    }

    #[test]
    fn the_chat_template_is_found_in_three_places() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        write_model(path);
        let found = || ModelFiles::find(path.to_str().unwrap(), &nowhere()).map(|files| files.chat_template);
        let config = path.join("tokenizer_config.json");
        fs::write(&config, r#"{"chat_template": "plain"}"#).unwrap();
        assert_eq!(found().unwrap().as_deref(), Some("plain"));
        fs::write(
            &config,
            r#"{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}"#,
        )
        .unwrap();
        assert_eq!(found().unwrap().as_deref(), Some("d"));
        fs::write(&config, r#"{"chat_template": [{"name": "tools", "template": "t"}]}"#).unwrap();
        assert!(found().unwrap_err().to_string().contains("tokenizer_config.json: chat_template is neither"));
        fs::write(path.join("chat_template.jinja"), "jinja").unwrap();
        assert_eq!(found().unwrap().as_deref(), Some("jinja"));
    }

    #[test]
    fn what_a_folder_lacks_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let name = path.to_str().unwrap();
        assert!(message(name, &nowhere()).contains("has no config.json"));
        write_model(path);
        let mut small = tiny_random::config(100).to_hf_json();
        fs::write(path.join("config.json"), small.to_string()).unwrap();
        assert!(message(name, &nowhere()).contains("has only 100"));
        small["hidden_act"] = "gelu".into();
        fs::write(path.join("config.json"), small.to_string()).unwrap();
        assert!(message(name, &nowhere()).contains("hidden_act gelu is not supported"));
        write_model(path);
        fs::write(path.join("tokenizer.json"), "{").unwrap();
        assert!(message(name, &nowhere()).starts_with("tokenizer: tokenizer.json: "));
        fs::remove_file(path.join("model.safetensors")).unwrap();
        assert!(message(name, &nowhere()).ends_with("has neither model.safetensors nor model.safetensors.index.json"));
        fs::write(path.join("pytorch_model.bin"), "").unwrap();
        let pickled = message(name, &nowhere());
        assert!(
            pickled.contains("but pytorch_model.bin; a pickle runs the code") && pickled.contains("save_pretrained"),
            "{pickled}"
        );
        let pickled = message("some/model.pt", &nowhere());
        assert!(pickled.starts_with("no model some/model.pt: a pickle runs the code that is in it"), "{pickled}");
    }

    #[test]
    fn a_hub_id_is_found_through_refs_main() {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("models--Qwen--Tiny-1.5");
        write_model(&repo.join("snapshots/beef"));
        fs::create_dir_all(repo.join("snapshots/abad")).unwrap(); // an older commit without files
        fs::create_dir_all(repo.join("refs")).unwrap();
        let hub = offline(cache.path());

        fs::write(repo.join("refs/main"), "beef\n").unwrap();
        let files = ModelFiles::find("Qwen/Tiny-1.5", &hub).unwrap();
        assert_eq!(files.name, "Qwen/Tiny-1.5");
        assert!(files.report[0].starts_with("Qwen/Tiny-1.5: found in the hub cache, "), "{}", files.report[0]);

        fs::write(repo.join("refs/main"), "abad").unwrap();
        let lacks = message("Qwen/Tiny-1.5", &hub);
        assert!(lacks.contains("lacks config.json, tokenizer.json, model.safetensors, and HF_HUB_OFFLINE"), "{lacks}");

        fs::write(
            repo.join("snapshots/abad/model.safetensors.index.json"),
            r#"{"weight_map": {"a": "model-1.safetensors"}}"#,
        )
        .unwrap();
        assert!(message("Qwen/Tiny-1.5", &hub).contains("tokenizer.json, model-1.safetensors"));

        fs::write(repo.join("refs/main"), "../snapshots/beef").unwrap(); // a commit leads nowhere else
        let refused = message("Qwen/Tiny-1.5", &hub);
        assert!(refused.ends_with("refs/main: it holds \"../snapshots/beef\", expected a commit"), "{refused}");
        fs::write(repo.join("refs/main"), "0ff").unwrap();
        assert!(message("Qwen/Tiny-1.5", &hub).contains("which has other commits of it (abad, beef)"));
    }

    #[test]
    fn a_snapshot_is_found_by_its_commit_by_a_branch_or_because_it_is_the_only_one() {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("models--Qwen--Tiny");
        let hub = offline(cache.path());
        write_model(&repo.join("snapshots/beef"));
        write_model(&repo.join("snapshots/cafe/deep/er"));
        let found = |name: &str| ModelFiles::find(name, &hub).map(|files| files.report[0].clone());
        assert!(found("Qwen/Tiny@beef").unwrap().ends_with("snapshots/beef"));
        assert!(found("Qwen/Tiny@cafe:deep/er").unwrap().ends_with("snapshots/cafe/deep/er"));
        let several = found("Qwen/Tiny").unwrap_err().to_string();
        assert!(
            several.contains("has 2 snapshots of it and no refs/main that says which is meant: beef, cafe"),
            "{several}"
        );
        assert!(several.ends_with("hint: give Qwen/Tiny@COMMIT"), "{several}");

        fs::create_dir_all(repo.join("refs/pr")).unwrap();
        fs::write(repo.join("refs/pr/1"), "beef").unwrap();
        assert!(found("Qwen/Tiny@pr/1").unwrap().ends_with("snapshots/beef"));
        let missing = found("Qwen/Tiny@dev").unwrap_err().to_string();
        assert!(missing.starts_with("no model Qwen/Tiny@dev: it is not in the hub cache"), "{missing}");
        fs::remove_dir_all(repo.join("snapshots/cafe")).unwrap();
        assert!(found("Qwen/Tiny").unwrap().ends_with("snapshots/beef"));
        assert!(found("Qwen/Tiny:deep").unwrap_err().to_string().contains("lacks config.json"));

        // An adapter's id given as a model.
        fs::remove_file(repo.join("snapshots/beef/config.json")).unwrap();
        fs::write(repo.join("snapshots/beef/adapter_config.json"), "{}").unwrap();
        let adapter = found("Qwen/Tiny").unwrap_err().to_string();
        assert!(
            adapter.contains("it is an adapter, not a model") && adapter.ends_with("--adapter Qwen/Tiny"),
            "{adapter}"
        );
    }

    #[test]
    fn a_name_that_is_nothing_says_what_could_be_given() {
        assert!(
            message("Qwen/Qwen9", &nowhere())
                .starts_with("no model Qwen/Qwen9: it is not in the hub cache no/such/cache, and HF_HUB_OFFLINE")
        );
        assert_eq!(message("no/such.gguf", &nowhere()), "no model no/such.gguf: there is no such file");
        for name in ["", "qwen", "../models/qwen", "a/b/c", "/no/such/folder", "a/.."] {
            assert!(
                message(name, &nowhere()).contains("it is no folder, no .gguf file, and not of the form org/name"),
                "{name}"
            );
        }
    }

    #[test]
    fn a_gguf_file_is_opened_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("Tiny.GGUF");
        fs::write(&path, crate::load::gguf::tests::tiny()).unwrap();
        let files = ModelFiles::find(path.to_str().unwrap(), &nowhere()).unwrap();
        assert_eq!(files.chat_template.as_deref(), Some("{{ messages }}"));
        assert_eq!(
            files.report[..4],
            [
                "Tiny.GGUF: Qwen2, 1 layers, d_model 256, 4 heads, 2 kv heads, 8 tokens, tied embeddings",
                "Tiny.GGUF: calls itself Tiny",
                "Tiny.GGUF: a tokenizer of 7 tokens",
                "Tiny.GGUF: a chat template was found",
            ]
        );
    }

    #[test]
    fn the_embedded_model_is_whole_and_always_the_same() {
        let files = ModelFiles::find(TINY_RANDOM, &nowhere()).unwrap();
        assert!(files.report[0].contains("weights are random (seed 0)"), "{}", files.report[0]);
        let root = files.weights.root(Kind::Float, Device::Cpu);
        let embed = root.get("model.embed_tokens.weight", &[files.config.d_vocab, 64]).unwrap();
        assert!((embed.std(false).double_value(&[]) - 0.2).abs() < 0.01);
        assert!(embed.mean(Kind::Float).double_value(&[]).abs() < 0.01);
        let down = root.at("model.layers").at(1).at("mlp.down_proj").get("weight", &[64, 192]).unwrap();
        assert!((down.std(false).double_value(&[]) - 0.15).abs() < 0.01);
        assert_eq!(files.fingerprint(), ModelFiles::open(TINY_RANDOM).unwrap().fingerprint());
    }

    #[test]
    fn the_fingerprint_tells_checkpoints_of_one_shape_apart() {
        let with = |value: f64| {
            let mut files = ModelFiles::find(TINY_RANDOM, &nowhere()).unwrap();
            let norm = Tensor::full([64], value, (Kind::Float, Device::Cpu));
            files.weights = Weights::from_tensors("test", [("model.norm.weight".to_owned(), norm)].into());
            files.fingerprint()
        };
        assert_eq!(with(1.0), with(1.0));
        assert_ne!(with(1.0), with(1.5));
        assert_eq!(with(1.0).len(), 64);
    }
}
