//! Every format that is read from outside, as a function of bytes that says whether they are accepted. It calls what
//! loading calls; the fuzz targets and `tests/robustness.rs` share it.

use std::path::Path;
use std::sync::LazyLock;

use hooks::TINY_RANDOM;
use hooks::load::gguf::Gguf;
use hooks::load::model_files::parse_tokenizer_config;
use hooks::load::tokenizer_file;
use hooks::load::weights::parse_index;
use hooks::{Chat, Config, LoraConfig, ModelFiles, Weights};
use tch::{Device, Kind};
use tokenizers::Tokenizer;
use undertone::data::dataset;
use undertone::data::protocol::Protocol;
use undertone::experiment::Experiment;
use undertone::output::vectors::Vectors;
use undertone::stages::given_rows;

/// A reader: whether it accepts the bytes.
pub type Reader = fn(&[u8]) -> bool;

/// The readers by the names of their fuzz targets.
pub const READERS: [(&str, Reader); 8] = [
    ("safetensors", safetensors),
    ("gguf", gguf),
    ("config", config),
    ("adapter_config", adapter_config),
    ("tokenizer", tokenizer),
    ("chat_template", chat_template),
    ("dataset", dataset),
    ("experiment", experiment),
];

/// A `.safetensors` file of weights or of directions, or the index of several files.
pub fn safetensors(bytes: &[u8]) -> bool {
    let index = parse_index(bytes, Path::new("model.safetensors.index.json")).is_ok();
    let vectors = Vectors::parse(bytes, Some(0)).is_ok();
    let weights = Weights::parse(bytes.to_vec(), Path::new("model.safetensors"));
    index | vectors | weights.map(|weights| load(&weights)).is_ok()
}

/// A `.gguf` file: a control vector, or a model's configuration, tokenizer, chat template and tensors.
pub fn gguf(bytes: &[u8]) -> bool {
    if Vectors::parse(bytes, None).is_ok() {
        return true;
    }
    let Ok(gguf) = Gguf::parse(bytes.to_vec(), Path::new("model.gguf")) else { return false };
    let config = gguf.config().is_ok();
    let tokenizer = gguf.tokenizer();
    if let Ok(Some(tokenizer)) = &tokenizer {
        tokenise(tokenizer);
    }
    let _ = (gguf.chat_template(), gguf.name());
    load(&Weights::gguf(gguf));
    config && tokenizer.is_ok()
}

/// A model's `config.json`.
///
/// # Panics
///
/// Where what is written of a configuration is not read again.
pub fn config(bytes: &[u8]) -> bool {
    let path = Path::new("config.json");
    let Ok(config) = Config::parse(bytes, path) else { return false };
    assert!(
        Config::parse(config.to_hf_json().to_string().as_bytes(), path).is_ok(),
        "written, but not read: {config:?}"
    );
    true
}

/// An `adapter_config.json`.
pub fn adapter_config(bytes: &[u8]) -> bool {
    LoraConfig::parse(bytes, Path::new("adapter_config.json")).is_ok()
}

/// A `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) -> bool {
    tokenizer_file::parse(bytes, Path::new("tokenizer.json")).map(|tokenizer| tokenise(&tokenizer)).is_ok()
}

/// A chat template, by itself or in a `tokenizer_config.json`, and the tokens named in this file or in an
/// `added_tokens.json`.
pub fn chat_template(bytes: &[u8]) -> bool {
    static TOKENIZER: LazyLock<Option<Tokenizer>> =
        LazyLock::new(|| ModelFiles::open(TINY_RANDOM).ok().and_then(|files| files.tokenizer));
    let (Some(tokenizer), Ok(text)) = (&*TOKENIZER, std::str::from_utf8(bytes)) else { return false };
    for file in ["tokenizer_config.json", "added_tokens.json"] {
        let _ = tokenizer_file::check_beside(bytes, Path::new(file), tokenizer);
    }
    let inside = parse_tokenizer_config(bytes, Path::new("tokenizer_config.json"));
    let template = inside.ok().flatten().unwrap_or_else(|| text.to_owned());
    Chat::new(tokenizer.clone(), &template).is_ok()
}

/// JSON lines: a run's own samples, or rows from elsewhere.
pub fn dataset(bytes: &[u8]) -> bool {
    let path = Path::new("numbers.jsonl");
    let samples = dataset::parse_jsonl(bytes, path).unwrap_or_default();
    let rows = given_rows::parse(bytes, path).unwrap_or_default();
    let completions = samples.iter().map(|sample| &sample.completion).chain(rows.iter().map(|row| &row.answer));
    completions.fold(false, |_, completion| {
        let _ = dataset::rejections(completion, true, &[]);
        true
    })
}

/// An experiment's TOML, or a JSON file of sentences.
///
/// # Panics
///
/// Where what is written of an experiment is not the same when it is read again.
pub fn experiment(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let path = Path::new("experiment.toml");
    let protocol = Protocol::parse(text).is_ok();
    let Ok(experiment) = Experiment::parse(text, path, &[]) else { return protocol };
    let again = experiment.to_toml().and_then(|text| Experiment::parse(&text, path, &[]));
    assert_eq!(again.ok(), Some(experiment), "what is written is not read back");
    true
}

/// Every tensor, converted; a shape from the file itself must be one that is accepted.
fn load(weights: &Weights) {
    let root = weights.root(Kind::Float, Device::Cpu);
    let _ = weights.describe();
    for name in weights.names() {
        let _ = weights.shape(&name).map(|shape| root.get(&name, &shape).is_ok());
    }
}

fn tokenise(tokenizer: &Tokenizer) {
    let text = "<|im_start|>system\nYou're Qwen.<|im_end|>\n 12, 345 \u{e9}\u{301}\u{4f60}\u{1f989}\t\0";
    if let Ok(encoding) = tokenizer.encode(text, false) {
        let _ = tokenizer.decode(encoding.get_ids(), false);
    }
}
