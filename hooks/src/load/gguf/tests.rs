use std::fs;

use candle_core::quantized::gguf_file;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device as CandleDevice, Tensor as CandleTensor};
use proptest::prelude::*;
use tch::{Device, Kind};

use super::*;
use crate::load::weights::Weights;

type Metadata = Vec<(String, gguf_file::Value)>;

fn texts(list: &[&str]) -> gguf_file::Value {
    gguf_file::Value::Array(list.iter().map(|text| gguf_file::Value::String((*text).to_owned())).collect())
}

fn metadata(architecture: &str) -> Metadata {
    use gguf_file::Value::{Array, F32, I32, String as Text, U32};
    let own = |key: &str| format!("{architecture}.{key}");
    vec![
        ("general.architecture".into(), Text(architecture.into())),
        ("general.name".into(), Text("Tiny".into())),
        (own("block_count"), U32(1)),
        (own("context_length"), U32(512)),
        (own("embedding_length"), U32(256)),
        (own("feed_forward_length"), U32(512)),
        (own("attention.head_count"), U32(4)),
        (own("attention.head_count_kv"), U32(2)),
        (own("attention.layer_norm_rms_epsilon"), F32(1e-6)),
        (own("rope.freq_base"), F32(1e6)),
        ("tokenizer.ggml.model".into(), Text("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Text("qwen2".into())),
        ("tokenizer.ggml.tokens".into(), texts(&["a", "b", "Ġ", "ab", "Ġab", "<|im_end|>", "<tool_call>", "[PAD7]"])),
        ("tokenizer.ggml.token_type".into(), Array([1, 1, 1, 1, 1, 3, 4, 5].map(I32).to_vec())),
        ("tokenizer.ggml.merges".into(), texts(&["a b", "Ġ ab"])),
        ("tokenizer.chat_template".into(), Text("{{ messages }}".into())),
    ]
}

/// The tensors of a model with one block, stored in many different types.
fn tensors() -> Vec<(String, QTensor)> {
    let shapes = [
        ("token_embd.weight", vec![8, 256], GgmlDType::Q5_0),
        ("output_norm.weight", vec![256], GgmlDType::F32),
        ("blk.0.attn_norm.weight", vec![256], GgmlDType::F32),
        ("blk.0.ffn_norm.weight", vec![256], GgmlDType::F32),
        ("blk.0.attn_q.weight", vec![256, 256], GgmlDType::Q4K),
        ("blk.0.attn_q.bias", vec![256], GgmlDType::F16),
        ("blk.0.attn_k.weight", vec![128, 256], GgmlDType::Q5K),
        ("blk.0.attn_v.weight", vec![128, 256], GgmlDType::Q6K),
        ("blk.0.attn_output.weight", vec![256, 256], GgmlDType::Q8_0),
        ("blk.0.ffn_gate.weight", vec![512, 256], GgmlDType::Q4_0),
        ("blk.0.ffn_up.weight", vec![512, 256], GgmlDType::BF16),
        ("blk.0.ffn_down.weight", vec![256, 512], GgmlDType::F16),
    ];
    let quantized = shapes.into_iter().map(|(name, shape, dtype)| {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| ((i * 7919) as f32).sin()).collect();
        let tensor = CandleTensor::from_vec(values, shape, &CandleDevice::Cpu).unwrap();
        (name.to_owned(), QTensor::quantize(&tensor, dtype).unwrap())
    });
    quantized.collect()
}

fn bytes(metadata: &Metadata, tensors: &[(String, QTensor)]) -> Vec<u8> {
    let mut file = std::io::Cursor::new(Vec::new());
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    file.into_inner()
}

/// A whole small model, as bytes of a file.
pub(crate) fn tiny() -> Vec<u8> {
    bytes(&metadata("qwen2"), &tensors())
}

fn open(bytes: &[u8]) -> Result<Gguf> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::parse(map(&path).unwrap(), Path::new("tiny.gguf"))
}

/// The file with another type for one tensor, whose bytes are unchanged.
fn retyped(name: &str, from: u32, to: u32) -> Vec<u8> {
    let mut file = tiny();
    let entry = file.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    let at = entry + name.len() + 4 + 2 * 8; // after the number of dimensions and two dimensions
    assert_eq!(file[at..at + 4], from.to_le_bytes());
    file[at..at + 4].copy_from_slice(&to.to_le_bytes());
    file
}

/// The model in two files, with these values of the split keys.
fn halves(folder: &Path, split: [(u16, u16, i32); 2]) -> PathBuf {
    let tensors = tensors();
    for (at, (no, count, n_tensors)) in split.into_iter().enumerate() {
        let mut keys = if at == 0 { metadata("qwen2") } else { vec![] };
        keys.push((SPLIT_NO.to_owned(), gguf_file::Value::U16(no)));
        keys.push((SPLIT_COUNT.to_owned(), gguf_file::Value::U16(count)));
        keys.push((SPLIT_TENSORS.to_owned(), gguf_file::Value::I32(n_tensors)));
        let here = if at == 0 { &tensors[..5] } else { &tensors[5..] };
        fs::write(folder.join(format!("m-{:05}-of-00002.gguf", at + 1)), bytes(&keys, here)).unwrap();
    }
    folder.join("m-00001-of-00002.gguf")
}

fn changed_in(key: &str, value: Option<gguf_file::Value>) -> Result<Gguf> {
    let mut metadata = metadata("qwen2");
    metadata.retain(|(name, _)| name != key);
    metadata.extend(value.map(|value| (key.to_owned(), value)));
    open(&bytes(&metadata, &tensors()))
}

fn changed(key: &str, value: Option<gguf_file::Value>) -> Gguf {
    changed_in(key, value).unwrap()
}

#[test]
fn every_type_is_dequantised_as_candle_does_it() {
    let file = tiny();
    let mut reader = std::io::Cursor::new(&file);
    let content = gguf_file::Content::read(&mut reader).unwrap();
    let weights = Weights::gguf(open(&file).unwrap());
    assert_eq!(weights.names().len(), tensors().len());
    let root = weights.root(Kind::Float, Device::Cpu);
    for (name, info) in &content.tensor_infos {
        let candle =
            content.tensor(&mut reader, name, &CandleDevice::Cpu).unwrap().dequantize(&CandleDevice::Cpu).unwrap();
        let shape: Vec<i64> = info.shape.dims().iter().map(|dim| *dim as i64).collect();
        let found = root.get(&hf_name(name).unwrap(), &shape).unwrap();
        let found: Vec<f32> = Vec::try_from(found.flatten(0, -1)).unwrap();
        assert_eq!(found, candle.flatten_all().unwrap().to_vec1::<f32>().unwrap(), "{name} {:?}", info.ggml_dtype);
    }
    assert!(weights.describe().contains("2 f16 + 1 bf16"), "{}", weights.describe());
}

#[test]
fn the_configuration_is_read_from_the_keys_and_the_tensors() {
    let config = open(&tiny()).unwrap().config().unwrap();
    assert_eq!((config.family, config.d_model, config.d_head, config.d_vocab), (Family::Qwen2, 256, 64, 8));
    assert_eq!((config.rope_theta, config.tie_embeddings, config.qkv_bias, config.qk_norm), (1e6, true, true, false));
    assert!((config.rms_norm_eps - 1e-6).abs() < 1e-12);

    let mut keys = metadata("qwen3");
    keys.push(("qwen3.attention.key_length".into(), gguf_file::Value::U32(128)));
    let mut untied = tensors();
    untied.retain(|(name, _)| !name.ends_with("bias"));
    untied.push((
        "output.weight".into(),
        QTensor::quantize(
            &CandleTensor::zeros((8, 256), candle_core::DType::F32, &CandleDevice::Cpu).unwrap(),
            GgmlDType::Q8_0,
        )
        .unwrap(),
    ));
    let config = open(&bytes(&keys, &untied)).unwrap().config().unwrap();
    assert_eq!((config.family, config.d_head), (Family::Qwen3, 128));
    assert_eq!((config.tie_embeddings, config.qkv_bias, config.qk_norm), (false, false, true));
}

#[test]
fn types_of_a_table_are_dequantised_and_others_are_named() {
    let values = |file: &[u8], name: &str, shape: &[i64]| -> Vec<f32> {
        let weights = Weights::gguf(open(file).unwrap());
        let tensor = weights.root(Kind::Float, Device::Cpu).get(name, shape).unwrap();
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    };
    for (name, hf, shape, ids, block, dequantize) in [
        ("blk.0.ffn_gate.weight", "mlp.gate_proj", [512, 256], (2, 20), 18, iq4::nl as fn(&[u8]) -> Vec<f32>),
        ("blk.0.attn_q.weight", "self_attn.q_proj", [256, 256], (12, 23), 136, iq4::xs),
    ] {
        let mut file = retyped(name, ids.0, ids.1);
        let hf = format!("model.layers.0.{hf}.weight");
        let stored = open(&file).unwrap().tensors()[&hf].bytes.clone();
        for block in file[stored].chunks_mut(block) {
            block[1] &= 0b1011_1111; // clear the top exponent bit of the f16 scale, so that it is finite
        }
        let gguf = open(&file).unwrap();
        let expected = dequantize(gguf.bytes(&gguf.tensors()[&hf]));
        assert!(expected.iter().any(|value| *value != 0.0));
        assert_eq!(values(&file, &hf, &shape), expected, "{name}: whole, in blocks of many threads");
    }
    for (id, expected) in
        [(21, "is stored as IQ3_S, which is not read"), (99, "is stored as type 99, which is not read")]
    {
        let message = open(&retyped("blk.0.ffn_gate.weight", 2, id)).err().unwrap().to_string();
        assert!(message.contains(&format!("tensor blk.0.ffn_gate.weight {expected}")), "{message}");
        assert!(message.contains("IQ4_NL and IQ4_XS are; hint: take"), "{message}");
    }
}

#[test]
fn a_model_in_several_files_is_named_by_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let first = halves(folder.path(), [(0, 2, 12), (1, 2, 12)]);
    let split = Gguf::open(&first).unwrap();
    let whole = open(&tiny()).unwrap();
    assert_eq!(split.config().unwrap(), whole.config().unwrap());
    assert!(split.tokenizer().unwrap().is_some() && split.len() > whole.len());
    for (name, info) in split.tensors() {
        assert!(split.bytes(info) == whole.bytes(&whole.tensors()[name]), "{name}");
    }
    assert_eq!(split.tensors().len(), whole.tensors().len());

    let refused = |path: &Path| Gguf::open(path).err().expect("an error").to_string();
    let second = folder.path().join("m-00002-of-00002.gguf");
    let message = refused(&second);
    assert!(message.contains("it is part 2 of a model in 2 files; hint: name the first"), "{message}");
    let renamed = folder.path().join("model.gguf");
    fs::copy(&first, &renamed).unwrap();
    let message = refused(&renamed);
    assert!(message.contains("expected a name that ends in -00001-of-00002.gguf"), "{message}");
    let alone = Gguf::parse(fs::read(&first).unwrap(), &first).err().unwrap().to_string();
    assert!(alone.contains("it says that it is part 1 of 2, where part 1 of 1 is expected"), "{alone}");
    for (split, expected) in [
        (
            [(0, 2, 12), (0, 2, 12)],
            "m-00002-of-00002.gguf: it says that it is part 1 of 2, where part 2 of 2 is expected",
        ),
        (
            [(0, 2, 12), (1, 3, 12)],
            "m-00002-of-00002.gguf: it says that it is part 2 of 3, where part 2 of 2 is expected",
        ),
        ([(0, 2, 13), (1, 2, 13)], "m-00001-of-00002.gguf: split.tensors.count is 13, but its 2 parts have 12 tensors"),
    ] {
        let message = refused(&halves(folder.path(), split));
        assert!(message.contains(expected), "{message}");
    }
    let first = halves(folder.path(), [(0, 2, 12), (1, 2, 12)]);
    fs::remove_file(second).unwrap();
    let message = refused(&first);
    assert!(
        message.contains("m-00001-of-00002.gguf: it is part 1 of 2, and part 2, ")
            && message.contains("m-00002-of-00002.gguf, is missing; hint: all parts"),
        "{message}"
    );
}

#[test]
fn what_is_not_computed_is_refused() {
    use gguf_file::Value::{String as Text, U32};
    let cases = [
        ("general.architecture", Some(Text("llama".into())), "general.architecture llama is not supported"),
        ("qwen2.rope.scaling.type", Some(Text("yarn".into())), "rope.scaling.type yarn is not supported"),
        ("qwen2.attention.sliding_window", Some(U32(512)), "qwen2.attention.sliding_window is not supported"),
        ("qwen2.attention.head_count_kv", Some(U32(3)), "expected a multiple of num_key_value_heads 3"),
        ("qwen2.block_count", None, "qwen2.block_count is missing, expected an integer"),
        ("qwen2.rope.freq_base", Some(U32(1)), "qwen2.rope.freq_base is of another type, expected a float"),
    ];
    let vector = changed_in(ARCHITECTURE, Some(Text(CONTROL_VECTOR.to_owned()))).err().unwrap().to_string();
    assert!(
        vector.contains("controlvector as a model is not supported") && vector.contains("--steer FILE:1"),
        "{vector}"
    );
    for (key, value, expected) in cases {
        let message = changed(key, value).config().unwrap_err().to_string();
        assert!(message.starts_with("tiny.gguf: ") && message.contains(expected), "{message}");
    }
    assert!(changed("qwen2.rope.scaling.type", Some(Text("none".into()))).config().is_ok());
    let mut strange = tensors();
    strange[0].0 = "blk.0.ffn_gate_exps.weight".into();
    let message = open(&bytes(&metadata("qwen2"), &strange)).err().unwrap().to_string();
    assert!(message.contains("blk.0.ffn_gate_exps.weight is in no dense Qwen model"), "{message}");
}

#[test]
fn the_tokenizer_merges_splits_and_knows_its_special_tokens() {
    let gguf = open(&tiny()).unwrap();
    let tokenizer = gguf.tokenizer().unwrap().unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert_eq!(ids("ab ab<|im_end|>ba<tool_call>"), [3, 4, 5, 1, 0, 6]);
    assert_eq!(tokenizer.decode(&[3, 4, 5, 6], true).unwrap(), "ab ab<tool_call>"); // 5 is special, 6 is not
    assert_eq!(tokenizer.token_to_id("[PAD7]"), None);
    assert_eq!(gguf.chat_template(), Some("{{ messages }}"));
    assert!(changed("tokenizer.ggml.tokens", None).tokenizer().unwrap().is_none());
}

#[test]
fn a_wrong_tokenizer_is_an_error() {
    use gguf_file::Value::{Array, I32, String as Text};
    let cases = [
        ("tokenizer.ggml.pre", Some(Text("llama-bpe".into())), "tokenizer.ggml.pre llama-bpe is not supported"),
        (
            "tokenizer.ggml.merges",
            Some(texts(&["a b", "Ġab <|im_end|>"])),
            "merges[1] \"Ġab <|im_end|>\" needs \"Ġab<|im_end|>\"",
        ),
        ("tokenizer.ggml.merges", Some(texts(&["ab"])), "merges[0] \"ab\", expected two tokens"),
        ("tokenizer.ggml.merges", None, "expected tokenizer.ggml.tokens and .merges as texts"),
        ("tokenizer.ggml.token_type", Some(Array(vec![I32(1)])), "token_type has 1 entries for 8 tokens"),
        (
            "tokenizer.ggml.tokens",
            Some(texts(&["a", "b", "a", "c", "d", "e", "f", "g"])),
            "tokens[2] \"a\" is there twice",
        ),
    ];
    for (key, value, expected) in cases {
        let message = changed(key, value).tokenizer().expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn hostile_counts_are_refused_before_anything_is_allocated() {
    let file = tiny();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        open(&file).err().expect("an error").to_string()
    };
    assert!(with(0, b"GGML").contains("does not begin with GGUF"));
    assert!(with(4, &[9]).contains("GGUF version is 9, expected 2 or 3"));
    assert!(with(8, &[0xff; 8]).contains("the number of tensors is 18446744073709551615, but the file has room for"));
    assert!(with(16, &[0xff; 8]).contains("the number of metadata keys is 18446744073709551615"));
    assert!(with(24, &[0xff; 8]).contains("a metadata key is 18446744073709551615"));
    let mut keys = metadata("qwen2");
    keys.push(("general.alignment".into(), gguf_file::Value::U32(0))); // candle's own reader divides by it
    let message = open(&bytes(&keys, &tensors())).err().unwrap().to_string();
    assert!(message.contains("general.alignment is Integer(0)"), "{message}");
    let message = open(&file[..file.len() - 1000]).err().unwrap().to_string();
    assert!(message.contains("inside tensor blk.0.ffn_down.weight"), "{message}");
}

#[test]
fn tensors_on_one_another_are_refused() {
    let file = bytes(&Vec::new(), &tensors()[1..4]); // three of [256] in f32, one after another
    let name = b"blk.0.ffn_norm.weight";
    let entry = file.windows(name.len()).position(|window| window == name).unwrap();
    let offset = entry + name.len() + 4 + 8 + 4; // after the number of dimensions, the dimension and the type
    let moved = |to: u64| {
        let mut file = file.clone();
        assert_eq!(file[offset..offset + 8], 2048_u64.to_le_bytes());
        file[offset..offset + 8].copy_from_slice(&to.to_le_bytes());
        open(&file).err().map(|error| error.to_string())
    };
    assert_eq!(moved(2048), None);
    for to in [0, 992, 1024, 2016] {
        let message = moved(to).expect("an error");
        assert!(message.contains("share bytes") && message.contains("blk.0.ffn_norm.weight"), "{to}: {message}");
    }
    assert!(moved(2080).expect("an error").contains("inside tensor blk.0.ffn_norm.weight"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_damaged_header_never_panics(flips in prop::collection::vec((0_usize..2200, any::<u8>()), 0..4), cut in 0_usize..4000) {
        let mut file = bytes(&metadata("qwen2"), &[]);
        file.truncate(cut);
        for (at, byte) in flips {
            if let Some(target) = file.get_mut(at) {
                *target = byte;
            }
        }
        if let Ok(gguf) = open(&file) {
            let _ = (gguf.config().is_ok(), gguf.tokenizer().is_ok(), gguf.chat_template());
        }
    }

    #[test]
    fn a_damaged_tensor_table_never_panics(flips in prop::collection::vec((0_usize..700, any::<u8>()), 1..4)) {
        let tensors = &tensors()[1..4]; // the smallest
        let mut file = bytes(&Vec::new(), tensors);
        for (at, byte) in flips {
            if let Some(target) = file.get_mut(at) {
                *target = byte;
            }
        }
        if let Ok(gguf) = open(&file) {
            for info in gguf.tensors().values() {
                let numel: i64 = info.shape.iter().product();
                prop_assert!(gguf.dequantize(info, &(0..numel as usize)).is_ok());
            }
        }
    }
}
