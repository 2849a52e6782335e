//! Steering vectors in the format of llama.cpp and repeng: a GGUF file with one tensor `direction.{layer}` per block,
//! which is added to that block's output (`blocks.{layer}.hook_resid_post`). llama.cpp ignores `direction.0`, so it is
//! never written. repeng can write it, for block 0, so it is read.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Value as Written, write as write_gguf};
use candle_core::quantized::{GgmlDType, QTensor};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, malformed};
use crate::load::files;
use crate::load::gguf::header::{Header, Value};
use crate::load::gguf::stored::Stored;
use crate::load::gguf::{ARCHITECTURE, CONTROL_VECTOR};

/// The prefix of undertone's own keys, which llama.cpp does not need.
const OWN: &str = "controlvector.undertone.";

const MODEL_HINT: &str = "controlvector.model_hint";

/// The vectors of a file.
#[derive(Debug)]
pub struct ControlVector {
    /// The vectors by the block after which they are added, `[d_model]`, f32 on the CPU.
    pub by_layer: BTreeMap<usize, Tensor>,
    /// The file's description of its model: `architecture`, if the file has a model hint, and undertone's own keys.
    pub provenance: BTreeMap<String, String>,
}

/// Whether these are the bytes of a GGUF file.
pub fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"GGUF")
}

/// Reads the vectors in the bytes of a file. They must have the same width, finite numbers and different blocks. The
/// error says what is wrong with the file.
pub fn parse(bytes: &[u8]) -> std::result::Result<ControlVector, String> {
    let header = Header::read(bytes)?;
    let text = |key: &str| match header.metadata.get(key) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let architecture = text(ARCHITECTURE).unwrap_or_else(|| "missing".to_owned());
    if architecture != CONTROL_VECTOR {
        return Err(format!("{ARCHITECTURE} is {architecture}, expected {CONTROL_VECTOR}"));
    }
    let own = header.metadata.keys().filter_map(|key| Some((key.strip_prefix(OWN)?.to_owned(), text(key)?)));
    let mut provenance: BTreeMap<String, String> = own.collect();
    provenance.extend(text(MODEL_HINT).map(|hint| ("architecture".to_owned(), hint)));
    let mut by_layer = BTreeMap::new();
    let mut width = None;
    for (name, info) in &header.tensors {
        // `direction.03` is refused, so that no two names mean one block.
        let layer = name.strip_prefix("direction.").and_then(|layer| layer.parse::<usize>().ok());
        let layer = layer.filter(|layer| format!("direction.{layer}") == *name);
        let layer =
            layer.ok_or_else(|| format!("it has a tensor {name}, expected direction.N, N being a block's number"))?;
        let n = *width.get_or_insert(info.shape[0]);
        if info.dtype != F32 || info.shape != [n] {
            return Err(format!("{name} is {:?} {:?}, expected F32 of shape [{n}]", info.dtype, info.shape));
        }
        let values = info.dtype.dequantize(&bytes[info.bytes.clone()], n as usize)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(format!("{name} has {} at {at}, expected finite numbers", values[at]));
        }
        by_layer.insert(layer, Tensor::f_from_slice(&values).map_err(|error| error.to_string())?);
    }
    if by_layer.is_empty() {
        return Err("it has no tensor, expected at least one direction.N".to_owned());
    }
    Ok(ControlVector { by_layer, provenance })
}

const F32: Stored = Stored::Candle(GgmlDType::F32);

/// Writes the vectors, `[d_model]` each, by block. `model_hint` is the architecture (`qwen2`); `provenance` is their
/// origin, stored under `controlvector.undertone.`.
pub fn write(
    path: &Path,
    model_hint: &str,
    vectors: &BTreeMap<usize, Tensor>,
    provenance: &BTreeMap<String, String>,
) -> Result<()> {
    if vectors.contains_key(&0) {
        let expected = "1 or more: a control vector cannot address block 0";
        return Err(Error::invalid("the layer of a control vector", expected, 0));
    }
    let Some((last, _)) = vectors.last_key_value() else {
        return Err(Error::invalid("the control vector", "at least one layer", "none"));
    };
    let said = |error: candle_core::Error| malformed(path, error.to_string());
    let mut metadata = vec![
        (ARCHITECTURE.to_owned(), Written::String(CONTROL_VECTOR.to_owned())),
        (MODEL_HINT.to_owned(), Written::String(model_hint.to_owned())),
        ("controlvector.layer_count".to_owned(), Written::U32(*last as u32)),
    ];
    let kept = provenance.iter().map(|(key, value)| (format!("{OWN}{key}"), Written::String(value.clone())));
    metadata.extend(kept);
    let tensors = vectors.iter().map(|(layer, vector)| {
        let vector = vector.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let values = Vec::<f32>::try_from(&vector)?;
        let tensor = candle_core::Tensor::new(values, &candle_core::Device::Cpu).map_err(said)?;
        Ok((format!("direction.{layer}"), QTensor::quantize(&tensor, GgmlDType::F32).map_err(said)?))
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let mut bytes = Cursor::new(Vec::new());
    let metadata: Vec<(&str, &Written)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write_gguf(&mut bytes, &metadata, &tensors).map_err(said)?;
    let mut bytes = bytes.into_inner();
    // The writer sets version 2. In little-endian files version 3, the current one, has the same layout.
    bytes[4..8].copy_from_slice(&3_u32.to_le_bytes());
    files::write_atomic(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_block_0_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("owl.gguf");
        let vector = || Tensor::from_slice(&[1.0_f32, -2.0, 0.5]);
        let vectors = BTreeMap::from([(2, vector()), (3, &vector() * 2.0)]);
        write(&path, "qwen2", &vectors, &BTreeMap::from([("target".to_owned(), "owl".to_owned())])).unwrap();

        let mut file = Cursor::new(files::read(&path).unwrap());
        let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
        assert_eq!(content.metadata["general.architecture"].to_string().unwrap(), "controlvector");
        assert_eq!(content.metadata["controlvector.layer_count"].to_u32().unwrap(), 3);
        assert_eq!(content.metadata["controlvector.undertone.target"].to_string().unwrap(), "owl");
        let tensor = content.tensor(&mut file, "direction.3", &candle_core::Device::Cpu).unwrap();
        let values = tensor.dequantize(&candle_core::Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values, [2.0, -4.0, 1.0]);

        let found = parse(file.get_ref()).unwrap();
        assert_eq!(found.by_layer.keys().copied().collect::<Vec<_>>(), [2, 3]);
        assert!(found.by_layer[&3].equal(&vectors[&3]));
        let said = [("architecture", "qwen2"), ("target", "owl")];
        assert_eq!(found.provenance, BTreeMap::from(said.map(|(key, value)| (key.to_owned(), value.to_owned()))));

        let message =
            write(&path, "qwen2", &BTreeMap::from([(0, vector())]), &BTreeMap::new()).unwrap_err().to_string();
        assert!(message.contains("cannot address block 0"), "{message}");
    }

    fn file(keys: &[(&str, &str)], tensors: &[(&str, &[f32])]) -> Vec<u8> {
        let keys: Vec<(&str, Written)> =
            keys.iter().map(|(key, value)| (*key, Written::String((*value).to_owned()))).collect();
        let keys: Vec<(&str, &Written)> = keys.iter().map(|(key, value)| (*key, value)).collect();
        let quantized = |values: &[f32]| {
            let tensor = candle_core::Tensor::new(values, &candle_core::Device::Cpu).unwrap();
            QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
        };
        let tensors: Vec<(&str, QTensor)> = tensors.iter().map(|(name, values)| (*name, quantized(values))).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let mut bytes = Cursor::new(Vec::new());
        write_gguf(&mut bytes, &keys, &tensors).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn repeng_s_block_0_is_block_0_and_what_is_no_vector_is_refused() {
        let keys = [(ARCHITECTURE, CONTROL_VECTOR), (MODEL_HINT, "qwen2")];
        let found = parse(&file(&keys, &[("direction.0", &[1.0, 2.0]), ("direction.11", &[3.0, 4.0])])).unwrap();
        assert_eq!(found.by_layer.keys().copied().collect::<Vec<_>>(), [0, 11]);
        assert_eq!(Vec::<f32>::try_from(&found.by_layer[&11]).unwrap(), [3.0, 4.0]);

        for (keys, tensors, expected) in [
            (&keys[..], &[][..], "it has no tensor"),
            (
                &keys[1..],
                &[("direction.1", &[1.0_f32][..])][..],
                "general.architecture is missing, expected controlvector",
            ),
            (&[(ARCHITECTURE, "llama")], &[("direction.1", &[1.0])], "general.architecture is llama, expected"),
            (&keys, &[("direction.01", &[1.0])], "it has a tensor direction.01, expected direction.N"),
            (&keys, &[("blk.1", &[1.0])], "it has a tensor blk.1, expected direction.N"),
            (
                &keys,
                &[("direction.1", &[1.0]), ("direction.2", &[1.0, 2.0])],
                "direction.2 is F32 [2], expected F32 of shape [1]",
            ),
            (&keys, &[("direction.1", &[1.0, f32::NAN])], "direction.1 has NaN at 1, expected finite numbers"),
        ] {
            let message = parse(&file(keys, tensors)).unwrap_err();
            assert!(message.contains(expected), "{expected}: {message}");
        }
        assert!(parse(b"GGUF").unwrap_err().contains("the file ends at byte 4"));
    }
}
