//! Adapter folders: PEFT's are read and act as in PEFT, ours are what PEFT would have written, misfits are refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use hooks::{Adapter, Batch, ModelFiles, Pass, Qwen};
use undertone::training::learner::delta_w_norm;

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

/// The kinds of LoRA in `golden/adapters`, all on the same base.
const KINDS: [&str; 11] = [
    "rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers",
    "layer_by_pattern",
    "all_linear",
    "all_at_once",
    "first_pattern",
    "expression",
    "excluded",
    "lookahead",
];

fn base_of_kinds() -> Qwen {
    let files = ModelFiles::open(folder("variants/qwen2_untied").to_str().unwrap()).unwrap();
    Qwen::load(&files, Device::Cpu, Kind::Float).unwrap()
}

fn logits(model: &Qwen, adapter: Option<&Adapter>, ids: &Tensor) -> Tensor {
    let batch = Batch::from_ids(&[&Vec::try_from(ids.get(0)).unwrap()], Device::Cpu).unwrap();
    model.forward(&batch, &mut Pass { adapter, ..Pass::default() }).unwrap()
}

#[test]
fn each_kind_that_peft_saves_acts_as_there() {
    let (model, golden) = (base_of_kinds(), tensors(&folder("adapters").join("expected.safetensors")));
    assert_eq!(golden.len(), KINDS.len() + 2);
    assert_close("base", &logits(&model, None, &golden["ids"]), &golden["base"], FORWARD);
    for kind in KINDS {
        let adapter = load(&folder("adapters").join(kind), &model).unwrap();
        assert_close(kind, &logits(&model, Some(&adapter), &golden["ids"]), &golden[kind], FORWARD);
        assert!(difference("base", &golden["base"], &golden[kind], FORWARD).is_some(), "{kind} acts");
    }
}

/// The maker of `golden/adapters` has loaded each `saved.json` with PEFT: the same logits as from PEFT's own.
/// Also where pairs of one shape have scalings of their own.
#[test]
fn the_norm_of_the_change_is_that_of_the_products_whatever_the_kind() {
    let model = base_of_kinds();
    for kind in KINDS {
        let adapter = load(&folder("adapters").join(kind), &model).unwrap();
        let square = |pair: &hooks::LoraPair| pair.delta_weight().unwrap().square().sum(Kind::Double).double_value(&[]);
        let plain = adapter.pairs().map(|(_, _, pair)| square(pair)).sum::<f64>().sqrt();
        let found = delta_w_norm(&adapter).unwrap();
        assert!(plain > 0.0 && (found - plain).abs() < 1e-5 * plain, "{kind}: {found} against {plain}");
    }
}

#[test]
fn each_kind_that_we_save_is_what_peft_has_loaded() {
    let (model, golden) = (base_of_kinds(), tensors(&folder("adapters").join("expected.safetensors")));
    for kind in KINDS {
        let theirs = folder("adapters").join(kind);
        let (adapter, dir) = (load(&theirs, &model).unwrap(), tempfile::tempdir().unwrap());
        adapter.save(dir.path(), "tiny-random-qwen2").unwrap();
        assert_eq!(tensors(&dir.path().join(TENSORS)), tensors(&theirs.join(TENSORS)), "{kind}: names and bits");

        let saved = theirs.join("saved.json");
        if std::env::var_os("UNDERTONE_WRITE").is_some() {
            fs::copy(dir.path().join(CONFIG), &saved).unwrap();
        }
        let hint = "where it should be, run this test with UNDERTONE_WRITE=1, then tests/golden/adapters/make.py, which loads it with PEFT";
        assert_eq!(json(&dir.path().join(CONFIG)), json(&saved), "{kind}: what is saved is not saved.json; {hint}");

        let again = load(dir.path(), &model).unwrap();
        assert_eq!(again.config, adapter.config, "{kind}");
        let ids = &golden["ids"];
        assert_eq!(
            logits(&model, Some(&again), ids),
            logits(&model, Some(&adapter), ids),
            "{kind} survives being saved"
        );
    }
}

#[test]
fn all_linear_by_name_is_every_projection() {
    let (model, theirs) = (base_of_kinds(), folder("adapters").join("all_linear"));
    let dir = tempfile::tempdir().unwrap();
    fs::copy(theirs.join(TENSORS), dir.path().join(TENSORS)).unwrap();
    let mut config = json(&theirs.join(CONFIG));
    assert_eq!(config["target_modules"][0], "model.layers.0.mlp.down_proj", "PEFT writes it out as whole paths");
    config["target_modules"] = "all-linear".into();
    fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
    let (named, written_out) = (load(dir.path(), &model).unwrap(), load(&theirs, &model).unwrap());
    assert_eq!((named.parameters(), named.config), (written_out.parameters(), written_out.config));
}

#[test]
fn modules_that_not_every_block_has_survive_being_saved() {
    let (model, theirs) = (base_of_kinds(), folder("adapters").join("all_linear"));
    let (dir, saved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let left_out = "model.layers.1.self_attn.q_proj";
    let mut all = tensors(&theirs.join(TENSORS));
    all.retain(|name, _| !name.contains(left_out));
    Tensor::write_safetensors(&all.into_iter().collect::<Vec<_>>(), dir.path().join(TENSORS)).unwrap();
    let mut config = json(&theirs.join(CONFIG));
    config["target_modules"].as_array_mut().unwrap().retain(|name| name != left_out);
    fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();

    let adapter = load(dir.path(), &model).unwrap();
    adapter.save(saved.path(), "tiny-random-qwen2").unwrap();
    assert_eq!(json(&saved.path().join(CONFIG))["target_modules"].as_array().unwrap().len(), 13);
    assert_eq!(load(saved.path(), &model).unwrap().parameters(), adapter.parameters());
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

/// Remarks on the kinds: two patterns for one module, a pattern for none, an expression that only Python reads.
#[test]
fn what_there_is_to_say_of_a_kind_is_said() {
    let model = base_of_kinds();
    for kind in KINDS {
        let remarks = load(&folder("adapters").join(kind), &model).unwrap().remarks;
        let expected: &[&str] = match kind {
            "rank_pattern" => &["\"v_proj\" (2) for model.layers.1.self_attn.v_proj: the first in the file acts"],
            "first_pattern" => &[
                "\"model.layers.1.mlp.up_proj\" (5) for model.layers.1.mlp.up_proj: the first in the file acts",
                "\"layers.1.self_attn.q_proj\" (5) for model.layers.1.self_attn.q_proj: the first in the file acts",
                "alpha_pattern has \"p_proj\", which matches no module of the adapter",
            ],
            "excluded" => &["target_modules also names \"query_key_value\", which no Qwen has"],
            "lookahead" => &["an expression that only Python reads: the modules are those that have tensors"],
            _ => &[],
        };
        assert_eq!(remarks.len(), expected.len(), "{kind}: {remarks:?}");
        for (remark, expected) in remarks.iter().zip(expected) {
            assert!(remark.contains(expected), "{kind}: {remark}");
        }
    }
}

#[test]
fn what_is_not_finite_is_refused_by_its_tensor() {
    let name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let dir = changed(|all| {
            let _ = all.get_mut(name).unwrap().get(0).get(1).fill_(broken);
        });
        let message = load(dir.path(), &qwen2()).unwrap_err().to_string();
        assert!(message.contains(TENSORS) && message.contains(name), "{message}");
        assert!(message.contains("is NaN or infinite in 1 of its "), "{message}");
    }
}

#[test]
fn an_adapter_that_changes_nothing_says_so() {
    let (model, ids) = (qwen2(), Tensor::from_slice(&[1_i64, 5, 9, 3]).unsqueeze(0));
    let zeroed = |factor: &str| {
        changed(|all| {
            all.iter_mut().filter(|(name, _)| name.contains(factor)).for_each(|(_, tensor)| drop(tensor.zero_()));
        })
    };
    for factor in ["lora_A", "lora_B"] {
        let adapter = load(zeroed(factor).path(), &model).unwrap();
        assert!(adapter.is_zero().unwrap(), "{factor}");
        assert!(
            adapter.remarks.len() == 1 && adapter.remarks[0].contains("it changes nothing"),
            "{:?}",
            adapter.remarks
        );
        assert_eq!(logits(&model, Some(&adapter), &ids), logits(&model, None, &ids), "{factor}");
    }
    let one_is_left = changed(|all| {
        let but = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
        all.iter_mut()
            .filter(|(name, _)| *name != but && name.contains("lora_B"))
            .for_each(|(_, tensor)| drop(tensor.zero_()));
    });
    let adapter = load(one_is_left.path(), &model).unwrap();
    assert!(!adapter.is_zero().unwrap() && adapter.remarks.is_empty(), "{:?}", adapter.remarks);
}

/// A copy of the golden adapter whose tensors have other names.
fn renamed(rename: impl Fn(&str) -> String) -> tempfile::TempDir {
    changed(|all| *all = std::mem::take(all).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect())
}

#[test]
fn names_with_a_wrapper_in_them_are_told_and_other_names_of_the_same_are_read() {
    let model = qwen2();
    let plain = load(&folder("qwen2").join("adapter"), &model).unwrap();
    assert!(plain.remarks.is_empty(), "{:?}", plain.remarks);
    for (wrapped, said) in [
        (
            renamed(|name| format!("_orig_mod.{name}")),
            "tensors have _orig_mod in their names, which is torch.compile's",
        ),
        (renamed(|name| format!("module.{name}")), "tensors have module in their names, which is data parallelism's"),
    ] {
        let message = load(wrapped.path(), &model).unwrap_err().to_string();
        assert!(message.contains(said) && message.contains("hint: take it out of every name"), "{message}");
        assert!(message.len() < 500, "{message}");
    }
    for wrapped in [
        renamed(|name| name.replace(".weight", ".default.weight")),
        renamed(|name| name.replace("base_model.model.", "")),
    ] {
        let adapter = load(wrapped.path(), &model).unwrap();
        assert_eq!(adapter.parameters(), plain.parameters());
        let [remark] = adapter.remarks.as_slice() else { panic!("{:?}", adapter.remarks) };
        assert!(
            remark.starts_with("its tensors are named like ") && remark.contains(" and read as what PEFT names base")
        );
    }
    let twice = changed(|all| {
        let name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight";
        let copy = all[name].copy();
        all.insert(name.replace(".weight", ".default.weight"), copy);
    });
    let message = load(twice.path(), &model).unwrap_err().to_string();
    assert!(message.contains("are the same tensor, expected one of them"), "{message}");
}

#[test]
fn names_of_something_else_are_told_in_a_few_lines() {
    let model = qwen2();
    for (other, beginning, meaning) in [
        (
            renamed(|name| format!("base_model.model.{name}")),
            "base_model.model.base_model.model.model.layers.",
            "around another one",
        ),
        (
            renamed(|name| name.replace(".layers.", ".language_model.layers.")),
            "base_model.model.model.language_model.layers.",
            "a model of images and text",
        ),
    ] {
        let message = load(other.path(), &model).unwrap_err().to_string();
        assert!(message.matches("… (28 in all)").count() == 2 && message.len() < 2500, "{}: {message}", message.len());
        assert!(message.contains(&format!("; all begin with {beginning}; ")) && message.contains(meaning), "{message}");
    }
    let dora = changed(|all| {
        let name = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector";
        all.insert(name.to_owned(), Tensor::from_slice(&[1_f32]));
    });
    let message = load(dora.path(), &model).unwrap_err().to_string();
    assert!(
        message.ends_with("lora_magnitude_vector; lora_magnitude_vector is of DoRA, which is not supported"),
        "{message}"
    );
}

/// The golden adapter with a saved head, and more keys in its configuration.
fn with_head(head: &Tensor, to_save: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let theirs = folder("adapters").join("rslora");
    let mut all = tensors(&theirs.join(TENSORS));
    all.insert("base_model.model.lm_head.weight".to_owned(), head.contiguous());
    Tensor::write_safetensors(&all.into_iter().collect::<Vec<_>>(), dir.path().join(TENSORS)).unwrap();
    let mut config = json(&theirs.join(CONFIG));
    config["modules_to_save"] = serde_json::from_str(to_save).unwrap();
    fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
    dir
}

#[test]
fn a_head_beside_the_lora_must_be_the_base_s() {
    let model = base_of_kinds();
    let head = model.parameters().into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
    let rows = head.size()[0];
    let plain = load(&folder("adapters").join("rslora"), &model).unwrap();
    for (head, to_save) in [(&head, "null"), (&head, "[\"lm_head\"]"), (&head.narrow(0, 0, rows - 3), "null")] {
        let dir = with_head(head, to_save);
        let adapter = Adapter::load_on(dir.path(), &model).unwrap();
        assert_eq!(adapter.parameters(), plain.parameters());
        let said = "base_model.model.lm_head.weight lies beside the LoRA and is the base's own, so it is passed over";
        assert_eq!(adapter.remarks, [said]);
        let message = load(dir.path(), &model).unwrap_err().to_string();
        assert!(message.contains("is not compared with the base's"), "{message}");
    }
    let trained = head.copy();
    let _ = trained.get(2).get(1).fill_(9.0);
    let more = Tensor::cat(&[&head, &head.narrow(0, 0, 1)], 0);
    for (head, to_save, expected) in [
        (
            &trained,
            "null",
            format!("lies beside the LoRA and differs from the base's in 1 of {rows} rows: a change of the base"),
        ),
        (&more, "null", format!("has the shape [{}, 32], where the base's is [{rows}, 32]", rows + 1)),
        (&head, "[\"lm_head\", \"embed_tokens\"]", "modules_to_save is [\"lm_head\", \"embed_tokens\"]".to_owned()),
    ] {
        let message = Adapter::load_on(with_head(head, to_save).path(), &model).unwrap_err().to_string();
        assert!(message.contains(&expected), "{expected}: {message}");
    }
}
