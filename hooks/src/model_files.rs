//! A model by its name: a folder in Hugging Face form, a hub id, a `.gguf` file, or an embedded one: `pocket`, `pocket-other`,
//! `tiny-random`.
//!
//! Whatever the name, the same five things come of it: configuration, weights, tokenizer, chat template, and a report
//! that says in lines what was found where.

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::config::{Config, Family};
use crate::error::{Error, Result};
use crate::files;
use crate::gguf::Gguf;
use crate::hub::Hub;
use crate::init;
use crate::pocket::{POCKETS, Pocket};
use crate::profile::{self, Stage};
use crate::tiny_random;
use crate::tokenizer_file;
use crate::weights::Weights;

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
}

impl ModelFiles {
    /// Opens a model by a folder, a hub id, the path of a `.gguf` file or the name of an embedded one.
    pub fn open(model: &str) -> Result<Self> {
        Self::find(model, &Hub::from_env())
    }

    fn find(model: &str, hub: &Hub) -> Result<Self> {
        let _stage = profile::stage(Stage::Load);
        let path = Path::new(model);
        let files = if model == TINY_RANDOM {
            Self::embedded()?
        } else if let Some(pocket) = POCKETS.iter().find(|pocket| pocket.name == model) {
            Self::pocket(pocket)?
        } else if path.is_dir() {
            Self::folder(model, path)?
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            Self::gguf(model, path)?
        } else if files::is_pickle(path) {
            return Err(Error::NoSuchModel { name: model.to_owned(), reason: files::NO_PICKLE.to_owned() });
        } else if Hub::is_id(model) {
            let (folder, line) = hub.fetch(model)?;
            let mut files = Self::folder(model, &folder)?;
            files.report.insert(0, line);
            files
        } else {
            let reason = "it is no folder, no .gguf file, and not of the form org/name; give one of these, or an embedded one: pocket, pocket-other, tiny-random";
            return Err(Error::NoSuchModel { name: model.to_owned(), reason: reason.to_owned() });
        };
        files.check_vocabulary()?;
        Ok(files)
    }

    /// A model to be trained from scratch: weights drawn by `init`, with Qwen2.5's chat template.
    pub fn fresh(name: &str, config: Config, tokenizer: Tokenizer, rng: ChaCha8Rng) -> Result<Self> {
        let weights = Weights::from_tensors(name, init::weights(&config, rng)?);
        let report = vec![summary(name, &config), format!("{name}: {}, not trained", weights.describe())];
        let chat_template = Some(tiny_random::CHAT_TEMPLATE.to_owned());
        let files = Self { name: name.to_owned(), config, weights, tokenizer: Some(tokenizer), chat_template, report };
        files.check_vocabulary()?;
        Ok(files)
    }

    /// A SHA-256, in hex, of the configuration, of every tensor's name, dtype and shape, and of a sample of its bytes.
    /// It tells checkpoints apart at no cost; it is no proof that every byte is the same.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.config.to_hf_json().to_string());
        self.weights.hash_into(&mut hash);
        format!("{:x}", hash.finalize())
    }

    fn embedded() -> Result<Self> {
        let tokenizer = tokenizer_file::parse(tiny_random::TOKENIZER, Path::new("tokenizer.json"))?;
        let config = tiny_random::config(tokenizer.get_vocab_size(true) as i64);
        let weights = Weights::from_tensors(TINY_RANDOM, tiny_random::weights(&config)?);
        let report = vec![
            format!(
                "{TINY_RANDOM}: embedded; its weights are random (seed {}), so what it says means nothing",
                tiny_random::SEED
            ),
            summary(TINY_RANDOM, &config),
            format!("{TINY_RANDOM}: {}", weights.describe()),
        ];
        let chat_template = Some(tiny_random::CHAT_TEMPLATE.to_owned());
        Ok(Self { name: TINY_RANDOM.to_owned(), config, weights, tokenizer: Some(tokenizer), chat_template, report })
    }

    fn pocket(pocket: &Pocket) -> Result<Self> {
        let (name, config) = (pocket.name, pocket.config()?);
        let tokenizer = tokenizer_file::parse(pocket.tokenizer, Path::new("tokenizer.json"))?;
        let weights = Weights::from_tensors(name, pocket.tensors()?);
        let report = vec![
            format!("{name}: embedded; trained from scratch on a small world of its own"),
            summary(name, &config),
            format!("{name}: {}", weights.describe()),
        ];
        let chat_template = Some(pocket.chat_template.to_owned());
        Ok(Self { name: name.to_owned(), config, weights, tokenizer: Some(tokenizer), chat_template, report })
    }

    fn folder(name: &str, folder: &Path) -> Result<Self> {
        let no_such = |reason: String| Error::NoSuchModel { name: name.to_owned(), reason };
        let path = folder.join("config.json");
        if !path.exists() {
            return Err(no_such(format!(
                "the folder {} has no config.json; give the folder that has it, or a .gguf file by its path",
                folder.display()
            )));
        }
        let config = Config::parse(&files::read(&path)?, &path)?;
        let mut report = vec![summary("config.json", &config)];

        let stored =
            ["model.safetensors", "model.safetensors.index.json"].into_iter().find(|file| folder.join(file).exists());
        let Some(stored) = stored else {
            let lacks = format!("{} has neither model.safetensors nor model.safetensors.index.json", folder.display());
            return Err(no_such(match files::pickle(folder) {
                Some(pickle) => format!("{lacks}, but {pickle}; {}", files::NO_PICKLE),
                None => lacks,
            }));
        };
        let weights = Weights::safetensors(&[folder.join(stored)])?;
        report.push(format!("{stored}: {}", weights.describe()));

        let path = folder.join("tokenizer.json");
        let tokenizer = if path.exists() { Some(tokenizer_file::parse(&files::read(&path)?, &path)?) } else { None };
        report.push(match &tokenizer {
            Some(tokenizer) => format!("tokenizer.json: {} tokens", tokenizer.get_vocab_size(true)),
            None => "no tokenizer.json was found".to_owned(),
        });
        let template = chat_template(folder)?;
        report.push(match &template {
            Some((_, file)) => format!("chat template: from {file}"),
            None => "no chat template was found".to_owned(),
        });
        let chat_template = template.map(|(template, _)| template);
        Ok(Self { name: name.to_owned(), config, weights, tokenizer, chat_template, report })
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
        Ok(Self { name: name.to_owned(), config, weights, tokenizer, chat_template, report })
    }

    /// A token beyond the embedding would be noticed only when it is first used.
    fn check_vocabulary(&self) -> Result<()> {
        let last = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.get_vocab(true).into_values().max());
        match last {
            Some(last) if i64::from(last) >= self.config.d_vocab => {
                let (last, d_vocab) = (last, self.config.d_vocab);
                Err(Error::Tokenizer {
                    problem: format!("it has a token {last}, but the model {} has only {d_vocab}", self.name),
                })
            }
            _ => Ok(()),
        }
    }
}

/// A line such as `config.json: Qwen2, 24 layers, d_model 896`.
fn summary(file: &str, config: &Config) -> String {
    let family = match config.family {
        Family::Qwen2 => "Qwen2",
        Family::Qwen3 => "Qwen3",
    };
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
    let malformed = |problem: String| Error::Malformed { path: path.to_owned(), problem };
    let config: Value = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let template = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(template)) => Some(template.as_str()),
        Some(named) => {
            let named = named.as_array().into_iter().flatten();
            named.filter(|entry| entry["name"] == "default").find_map(|entry| entry["template"].as_str())
        }
    };
    match template {
        Some(template) => Ok(Some(template.to_owned())),
        None => Err(malformed("chat_template is neither a text nor a list with the name default".to_owned())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::fs;

    use safetensors::tensor::{Dtype, TensorView};
    use tch::{Device, Kind, Tensor};

    use super::*;

    fn offline(cache: &Path) -> Hub {
        Hub { cache: cache.to_owned(), offline: true }
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
        assert!(message("Qwen/Tiny-1.5", &hub).contains("it is not in the hub cache"));
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
        fs::write(&path, crate::gguf::tests::tiny()).unwrap();
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
