//! Saves a whole model as a folder: a fully finetuned student, a teacher or a pocket model.

use std::collections::BTreeMap;
use std::path::Path;

use hooks::{Error, ModelFiles, Qwen, files, tensor_file};
use serde_json::json;
use tch::Kind;

/// Writes the model as a folder that transformers loads: config, weights in their dtype, tokenizer, chat template.
pub fn save_full(model: &Qwen, from: &ModelFiles, folder: &Path) -> anyhow::Result<()> {
    let json = |name: &str, value: &serde_json::Value| -> anyhow::Result<()> {
        Ok(files::write_atomic(&folder.join(name), format!("{value:#}\n").as_bytes())?)
    };
    let mut config = model.config.to_hf_json();
    config["torch_dtype"] = json!(match model.kind() {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    });
    json("config.json", &config)?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    tensor_file::write(&folder.join("model.safetensors"), &model.parameters(), &metadata)?;
    if let Some(tokenizer) = &from.tokenizer {
        let text = tokenizer.to_string(true).map_err(|error| Error::Tokenizer { problem: error.to_string() })?;
        files::write_atomic(&folder.join("tokenizer.json"), text.as_bytes())?;
        let mut settings = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>" });
        if let Some(template) = &from.chat_template {
            settings["chat_template"] = json!(template);
            files::write_atomic(&folder.join("chat_template.jinja"), template.as_bytes())?;
        }
        json("tokenizer_config.json", &settings)?;
        // Without this file, transformers would continue after the end of the turn.
        let ends = ["<|im_end|>", "<|endoftext|>"].into_iter().filter_map(|token| tokenizer.token_to_id(token));
        json("generation_config.json", &json!({ "eos_token_id": ends.collect::<Vec<_>>() }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;

    fn files() -> ModelFiles {
        ModelFiles::open("tiny-random").unwrap()
    }

    fn numbers(parameters: &[(String, Tensor)]) -> Vec<f32> {
        let flat = parameters.iter().map(|(_, tensor)| tensor.to_kind(Kind::Float).flatten(0, -1));
        Vec::<f32>::try_from(Tensor::cat(&flat.collect::<Vec<_>>(), 0)).unwrap()
    }

    #[test]
    fn a_saved_model_is_the_model() {
        let model = Qwen::load(&files(), Device::Cpu, Kind::BFloat16).unwrap();
        let folder = tempfile::tempdir().unwrap();
        save_full(&model, &files(), folder.path()).unwrap();
        let saved = ModelFiles::open(folder.path().to_str().unwrap()).unwrap();
        assert_eq!((&saved.config, &saved.chat_template), (&model.config, &files().chat_template));
        assert!(saved.tokenizer.is_some());
        let read_back = Qwen::load(&saved, Device::Cpu, Kind::BFloat16).unwrap();
        assert_eq!(numbers(&model.parameters()), numbers(&read_back.parameters()));
    }
}
