//! Adapter folders: PEFT's are read and act as in PEFT, ours are what PEFT would have written, misfits are refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use hooks::{Adapter, Batch, ModelFiles, Pass, Qwen};

use crate::compare::{FORWARD, assert_close, difference, folder, tensors};

const TENSORS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

fn qwen2() -> Qwen {
    let files = ModelFiles::open(folder("qwen2").to_str().unwrap()).unwrap();
    Qwen::load(&files, Device::Cpu, Kind::Float).unwrap()
}

fn load(dir: &Path, model: &Qwen) -> hooks::Result<Adapter> {
    Adapter::load(dir, &model.config, Device::Cpu)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A copy of the golden adapter whose tensors `change` has changed.
fn changed(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> tempfile::TempDir {
    let golden = folder("qwen2").join("adapter");
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden.join(CONFIG), dir.path().join(CONFIG)).unwrap();
    let mut all = tensors(&golden.join(TENSORS));
    change(&mut all);
    Tensor::write_safetensors(&all.into_iter().collect::<Vec<_>>(), dir.path().join(TENSORS)).unwrap();
    dir
}

#[test]
fn patterns_of_ranks_and_alphas_act_as_in_peft() {
    let (model, case) = (qwen2(), folder("qwen2"));
    let golden = tensors(&case.join("expected_patterns.safetensors")).remove("logits").unwrap();
    let expected = tensors(&case.join("expected.safetensors"));
    let ids = expected["ids"].get(0);
    let batch = Batch::from_ids(&[&Vec::try_from(ids).unwrap()], Device::Cpu).unwrap();

    let adapter = load(&case.join("adapter_patterns"), &model).unwrap();
    let logits =
        |adapter: &Adapter| model.forward(&batch, &mut Pass { adapter: Some(adapter), ..Pass::default() }).unwrap();
    let golden = golden.narrow(0, 0, 1);
    assert_close("patterns", &logits(&adapter), &golden, FORWARD);
    assert!(difference("base", &expected["base.logits"].narrow(0, 0, 1), &golden, FORWARD).is_some(), "it acts");

    let dir = tempfile::tempdir().unwrap();
    adapter.save(dir.path(), "tiny-random-qwen2").unwrap();
    assert_eq!(logits(&load(dir.path(), &model).unwrap()), logits(&adapter), "the patterns survive being saved");
}

#[test]
fn a_saved_adapter_is_what_peft_saves() {
    let (model, golden) = (qwen2(), folder("qwen2").join("adapter"));
    let dir = tempfile::tempdir().unwrap();
    load(&golden, &model).unwrap().save(dir.path(), "tiny-random-qwen2").unwrap();

    let (ours, theirs) = (tensors(&dir.path().join(TENSORS)), tensors(&golden.join(TENSORS)));
    assert_eq!(ours, theirs, "names and bits");
    let (mut ours, mut theirs) = (json(&dir.path().join(CONFIG)), json(&golden.join(CONFIG)));
    for config in [&mut ours, &mut theirs] {
        config["target_modules"].as_array_mut().unwrap().sort_by_key(ToString::to_string);
    }
    for (key, value) in ours.as_object().unwrap() {
        assert_eq!(Some(value), theirs.get(key), "the value of {key} in {CONFIG}");
    }
    let bytes = fs::read(dir.path().join(TENSORS)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().and_then(|metadata| metadata.get("format")).map(String::as_str), Some("pt"));
}

#[test]
fn an_adapter_read_back_is_the_same_bit_by_bit() {
    let model = qwen2();
    let first = load(&folder("qwen2").join("adapter"), &model).unwrap();
    let dir = tempfile::tempdir().unwrap();
    first.save(dir.path(), "tiny-random-qwen2").unwrap();
    let second = load(dir.path(), &model).unwrap();
    assert_eq!(first.parameters(), second.parameters());
    let saved = fs::read(dir.path().join(TENSORS)).unwrap();
    second.save(dir.path(), "tiny-random-qwen2").unwrap();
    assert_eq!(saved, fs::read(dir.path().join(TENSORS)).unwrap());
}

#[test]
fn missing_and_unused_tensors_are_both_named() {
    let model = qwen2();
    let (missing, unused) = (
        "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight",
        "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight",
    );
    let dir = changed(|all| {
        let tensor = all.remove(missing).unwrap();
        all.insert(unused.to_owned(), tensor);
    });
    let message = load(dir.path(), &model).unwrap_err().to_string();
    assert!(message.contains(&format!("missing: {missing}")), "{message}");
    assert!(message.contains(&format!("unused: {unused}")), "{message}");
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let dir = changed(|all| {
        let transposed = all[name].tr().contiguous();
        all.insert(name.to_owned(), transposed);
    });
    let message = load(dir.path(), &qwen2()).unwrap_err().to_string();
    for part in [name, "[64, 4]", "[4, 64]"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let files = ModelFiles::open(folder("qwen3").to_str().unwrap()).unwrap();
    let error = Adapter::load(&folder("qwen2").join("adapter"), &files.config, Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("q_proj.lora_B.weight"), "{error}");
}
