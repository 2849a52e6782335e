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
    fs::write(folder.join("model.safetensors"), safetensors::serialize([("model.norm.weight", norm)], None).unwrap())
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
    // A head with the embedding's numbers in another dtype counts as the embedding.
    let in_bf16 = |tensors: &mut BTreeMap<String, Tensor>| {
        let embed = tensors[EMBED].to_kind(Kind::BFloat16);
        tensors.insert(EMBED.to_owned(), embed.to_kind(Kind::Float));
        tensors.insert(HEAD.to_owned(), embed);
    };
    write_whole(&at("bf16"), |_| (), in_bf16);

    // A tied model may store its one tensor under either name.
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

    // With a smaller number of layers a whole block is unused. The message names ten of its tensors.
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
    // Float tensors count as quantised if there are also tensors of scales.
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
    assert!(message(&at("lora"), &nowhere()).contains("it is an adapter, not a model; hint: --model BASE --adapter "));
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
        assert!(refused.contains("/tokenizer_config.json: it has the token \"<|owl|>\" with the id 1008"), "{refused}");
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
            "config.json: Qwen2, 2 layers, d_model 64, 4 heads, 2 kv heads, 2000 tokens, tied embeddings".to_owned(),
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

    fs::write(repo.join("refs/main"), "../snapshots/beef").unwrap(); // a commit must not lead out of the folder
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
    assert!(adapter.contains("it is an adapter, not a model") && adapter.ends_with("--adapter Qwen/Tiny"), "{adapter}");
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
