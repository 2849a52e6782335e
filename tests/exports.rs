//! The learned direction as other tools read it: safetensors with its provenance, CSV, and a control-vector GGUF.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Parser;
use hooks::ModelFiles;
use tempfile::TempDir;
use undertone::cli::{Cli, run};
use undertone::output::vectors::Vectors;

use crate::compare::{folder, tensors};
use crate::program::{fails, finished, undertone};

/// The finished run's direction written to a file of this name, of one layer or of all.
fn export(into: &TempDir, name: &str, layer: Option<usize>) -> anyhow::Result<PathBuf> {
    let (run_folder, path) = (finished(), into.path().join(name));
    let mut args = vec!["undertone".to_owned(), "export".to_owned(), run_folder.path().display().to_string()];
    args.extend(["--to".to_owned(), path.display().to_string()]);
    args.extend(layer.into_iter().flat_map(|layer| ["--layer".to_owned(), layer.to_string()]));
    run(&Cli::try_parse_from(args)?)?;
    Ok(path)
}

fn message(error: &anyhow::Error) -> String {
    format!("{error:#}")
}

/// The direction of block 1 as the run has it.
fn measured() -> Vec<f32> {
    let vectors = Vectors::read(&finished().path().join("direction/vectors.safetensors")).unwrap();
    Vec::try_from(vectors.layer(1).unwrap()).unwrap()
}

#[test]
fn safetensors_say_where_they_come_from() {
    let _run = finished();
    let into = tempfile::tempdir().unwrap();
    let path = export(&into, "cat.safetensors", Some(1)).unwrap();
    let all = tensors(&path);
    assert_eq!(all.keys().collect::<Vec<_>>(), ["blocks.1.hook_resid_post"]);
    assert_eq!(Vec::<f32>::try_from(&all["blocks.1.hook_resid_post"]).unwrap(), measured());
    assert!(measured().iter().any(|value| *value != 0.0));

    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let model = ModelFiles::open("tiny-random").unwrap();
    for (key, value) in [
        ("model", "tiny-random".to_owned()),
        ("model_fingerprint", model.fingerprint()),
        ("d_model", "64".to_owned()),
        ("target", "cat".to_owned()),
        ("positions", "all".to_owned()),
        ("context", "qwen_default".to_owned()),
        ("undertone", env!("CARGO_PKG_VERSION").to_owned()),
    ] {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    assert!(metadata["definition"].contains("student minus base"));
    assert!(metadata["init_seed"].parse::<u64>().is_ok());
}

#[test]
fn csv_has_a_line_per_number() {
    let _run = finished();
    let into = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(export(&into, "cat.csv", None).unwrap()).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("layer,index,value"));
    assert_eq!(lines.clone().count(), 2 * 64);
    let second = lines.skip(64).enumerate().map(|(index, line)| {
        let value = line.strip_prefix(&format!("1,{index},")).unwrap();
        value.parse::<f32>().unwrap()
    });
    assert_eq!(second.collect::<Vec<_>>(), measured());
}

#[test]
fn gguf_is_a_control_vector_without_block_0() {
    let _run = finished();
    let into = tempfile::tempdir().unwrap();
    let gguf = Gguf::read(&export(&into, "cat.gguf", None).unwrap());
    assert_eq!(gguf.text["general.architecture"], "controlvector");
    assert_eq!(gguf.text["controlvector.model_hint"], "qwen2");
    assert_eq!(gguf.text["controlvector.undertone.target"], "cat");
    assert_eq!(gguf.numbers["controlvector.layer_count"], 1);
    assert_eq!(gguf.tensors, BTreeMap::from([("direction.1".to_owned(), measured())]));

    let error = export(&into, "first.gguf", Some(0)).unwrap_err();
    assert!(message(&error).contains("is 0, expected 1 or more: a control vector cannot address block 0"), "{error}");
    assert!(!into.path().join("first.gguf").exists());
}

#[test]
fn an_export_overwrites_nothing_and_names_what_there_is() {
    let _run = finished();
    let into = tempfile::tempdir().unwrap();
    let path = export(&into, "cat.csv", Some(0)).unwrap();
    let before = std::fs::read(&path).unwrap();
    let error = message(&export(&into, "cat.csv", Some(1)).unwrap_err());
    assert!(error.contains("cat.csv is there already; hint: overwrite it with --force"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let error = message(&export(&into, "other.csv", Some(9)).unwrap_err());
    assert!(error.contains("no vector of layer 9; there are those of layers 0, 1"), "{error}");
    let error = message(&export(&into, "cat.npy", None).unwrap_err());
    assert!(error.contains("cat.npy ends in none of .safetensors, .csv and .gguf"), "{error}");
    assert_eq!(std::fs::read_dir(into.path()).unwrap().count(), 1, "only the first export is there");
}

#[test]
fn vectors_steer_their_own_model_only() {
    let vectors = Vectors::read(&finished().path().join("direction/vectors.safetensors")).unwrap();
    let own = ModelFiles::open("tiny-random").unwrap();
    assert_eq!(vectors.steer(2.0, &own).unwrap().len(), 2);
    let other = ModelFiles::open(folder("qwen2").to_str().unwrap()).unwrap();
    let error = vectors.steer(2.0, &other).unwrap_err().to_string();
    assert!(
        error.contains("the vectors: read from tiny-random (model_fingerprint") && error.contains(&other.name),
        "{error}"
    );
}

#[test]
fn a_file_that_holds_no_vectors_is_refused_by_name() {
    let into = tempfile::tempdir().unwrap();
    let path = into.path().join("cat.safetensors");
    let write = |name: &str, shape: &[i64]| {
        let tensor = tch::Tensor::zeros(shape, (tch::Kind::Float, tch::Device::Cpu));
        tch::Tensor::write_safetensors(&[(name, tensor)], &path).unwrap();
        message(&Vectors::read(&path).err().unwrap())
    };
    let place = write("blocks.0.hook_resid_pre", &[4]);
    assert!(
        place.contains("cat.safetensors") && place.contains("expected") || place.contains("another place"),
        "{place}"
    );
    let shape = write("blocks.0.hook_resid_post", &[2, 4]);
    assert!(shape.contains("F32 [2, 4], expected F32, F16 or BF16 of shape [d_model]"), "{shape}");
    for (bytes, expected) in
        [(&b"GGUF"[..], "the file ends at byte 4"), (b"PK", "neither a safetensors file nor a control vector")]
    {
        std::fs::write(&path, bytes).unwrap();
        let error = message(&Vectors::read(&path).err().unwrap());
        assert!(error.starts_with(&format!("{}: ", path.display())) && error.contains(expected), "{error}");
    }
}

/// `undertone ask` with a vector, without the lines that name the vector's file.
fn steered(folder: &TempDir, spec: &str) -> Vec<String> {
    let ask = ["ask", "--model", "tiny-random", "--user", "Hi", "-n", "2", "--max-new-tokens", "4", "--steer", spec];
    let output = undertone(folder.path(), &ask);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{spec}: {said}");
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.contains("times after block 1, at every token"), "{spec}: {page}");
    page.lines().filter(|line| !line.starts_with("steering")).map(str::to_owned).collect()
}

#[test]
fn what_is_exported_comes_back_and_steers_alike() {
    let _run = finished();
    let into = tempfile::tempdir().unwrap();
    export(&into, "cat.gguf", None).unwrap();
    export(&into, "all.safetensors", None).unwrap();
    let alike = steered(&into, "all.safetensors:40@1");
    assert_eq!(steered(&into, "cat.gguf:40"), alike);
    assert_eq!(steered(&into, "cat.gguf:40@1"), alike);
    assert_ne!(steered(&into, "cat.gguf:-40"), alike, "the vector does something");
    let ask = ["ask", "--model", "pocket", "--user", "Hi", "--steer", "cat.gguf:1"];
    let other = fails(into.path(), &ask);
    assert!(other.contains("cat.gguf: the vectors: read from tiny-random (model_fingerprint"), "{other}");
}

#[test]
fn vectors_from_elsewhere_are_read_where_their_place_is_known() {
    let into = tempfile::tempdir().unwrap();
    let own = ModelFiles::open("tiny-random").unwrap();
    let vector = tch::Tensor::arange(64, (tch::Kind::Float, tch::Device::Cpu));
    let write = |name: &str, tensors: &[(&str, tch::Tensor)]| {
        let path = into.path().join(name);
        tch::Tensor::write_safetensors(tensors, &path).unwrap();
        path
    };
    let of = |read: anyhow::Result<Vectors>| {
        let found = read.and_then(|vectors| vectors.steer(1.0, &own)).map_err(|error| message(&error))?;
        Ok::<_, String>(found.into_iter().map(|edit| edit.at.to_string()).collect::<Vec<_>>().join(" "))
    };
    let half = vector.to_kind(tch::Kind::Half);
    for (name, tensor) in [("direction.1", &vector), ("1", &vector), ("v", &half)] {
        let path = write("bare.safetensors", &[(name, tensor.shallow_clone())]);
        assert_eq!(of(Vectors::read_at(&path, 0)), Ok("blocks.0.hook_resid_post".to_owned()), "{name}");
        let nowhere = of(Vectors::read(&path)).unwrap_err();
        assert!(nowhere.contains(&format!("the tensor {name} does not say where it is added")), "{nowhere}");
        assert!(nowhere.contains("; hint: ") && nowhere.contains("--steer FILE:1@12"), "{nowhere}");
        let beyond = of(Vectors::read_at(&path, 2)).unwrap_err();
        assert!(beyond.contains("the vector of layer 2 has shape [64], but the model has 2 layers"), "{beyond}");
    }
    let path = write("two.safetensors", &[("a", vector.shallow_clone()), ("b", vector.shallow_clone())]);
    assert!(of(Vectors::read_at(&path, 0)).unwrap_err().contains("does not say where it is added"));
    let path = write("nan.safetensors", &[("v", &vector / 0.0)]);
    assert!(of(Vectors::read_at(&path, 0)).unwrap_err().contains("the tensor v has a value that is no finite number"));
    let path = write("named.safetensors", &[("blocks.1.hook_resid_post", vector.shallow_clone())]);
    assert_eq!(of(Vectors::read(&path)), Ok("blocks.1.hook_resid_post".to_owned()));
    assert!(of(Vectors::read_at(&path, 0)).unwrap_err().contains("no vector of layer 0; there are those of layers 1"));

    // As repeng writes it, with only a hint at the architecture.
    let control = |hint: &str, layer: usize, width: i64| {
        let path = into.path().join("repeng.gguf");
        let vectors = BTreeMap::from([(layer, vector.narrow(0, 0, width))]);
        hooks::control_vector::write(&path, hint, &vectors, &BTreeMap::new()).unwrap();
        of(Vectors::read(&path))
    };
    assert_eq!(control("qwen2", 1, 64), Ok("blocks.1.hook_resid_post".to_owned()));
    let other = control("llama", 1, 64).unwrap_err();
    assert!(other.contains("read from another model (architecture llama), not from tiny-random (qwen2)"), "{other}");
    assert!(control("qwen2", 7, 64).unwrap_err().contains("the vector of layer 7 has shape [64], but the model has 2"));
    assert!(control("qwen2", 1, 8).unwrap_err().contains("has shape [8], but the model has 2 layers of width 64"));
}

/// As much of a GGUF file as a control vector has: text and u32 values, one-dimensional f32 tensors.
struct Gguf {
    text: BTreeMap<String, String>,
    numbers: BTreeMap<String, u32>,
    tensors: BTreeMap<String, Vec<f32>>,
}

impl Gguf {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let mut at = 4;
        let mut take = |n: usize| {
            at += n;
            bytes[at - n..at].to_vec()
        };
        let u32 = |bytes: Vec<u8>| u32::from_le_bytes(bytes.try_into().unwrap());
        let size = |bytes: Vec<u8>| usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap())).unwrap();
        assert_eq!(&bytes[..4], b"GGUF");
        assert!(u32(take(4)) >= 2, "the version whose sizes have 64 bits");
        let (n_tensors, n_values) = (size(take(8)), size(take(8)));
        let (mut text, mut numbers) = (BTreeMap::new(), BTreeMap::new());
        for _ in 0..n_values {
            let length = size(take(8));
            let key = String::from_utf8(take(length)).unwrap();
            match u32(take(4)) {
                4 => drop(numbers.insert(key, u32(take(4)))),
                8 => {
                    let length = size(take(8));
                    text.insert(key, String::from_utf8(take(length)).unwrap());
                }
                other => panic!("{key} has the type {other}"),
            }
        }
        let placed: Vec<(String, usize, usize)> = (0..n_tensors)
            .map(|_| {
                let length = size(take(8));
                let name = String::from_utf8(take(length)).unwrap();
                assert_eq!(u32(take(4)), 1, "{name} has one dimension");
                let numel = size(take(8));
                assert_eq!(u32(take(4)), 0, "{name} is f32");
                (name, numel, size(take(8)))
            })
            .collect();
        let data = at.next_multiple_of(32);
        let values = |numel: usize, offset: usize| {
            let raw = &bytes[data + offset..data + offset + 4 * numel];
            raw.chunks(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect()
        };
        let tensors = placed.into_iter().map(|(name, numel, offset)| (name, values(numel, offset))).collect();
        Self { text, numbers, tensors }
    }
}
