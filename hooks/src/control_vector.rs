//! Steering vectors as llama.cpp and repeng know them: a GGUF file with one tensor `direction.{layer}` per block, which
//! the reader adds to that block's output (`blocks.{layer}.hook_resid_post`). Block 0 cannot be addressed.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Value, write as write_gguf};
use candle_core::quantized::{GgmlDType, QTensor};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;

/// Writes the vectors, `[d_model]` each, by block. `model_hint` is the architecture (`qwen2`); `provenance` says where
/// they come from and is kept under `controlvector.undertone.`.
pub fn write(
    path: &Path,
    model_hint: &str,
    vectors: &BTreeMap<usize, Tensor>,
    provenance: &BTreeMap<String, String>,
) -> Result<()> {
    if vectors.contains_key(&0) {
        return Err(Error::Invalid {
            what: "the layer of a control vector".to_owned(),
            expected: "1 or more: a control vector cannot address block 0".to_owned(),
            found: "0".to_owned(),
        });
    }
    let Some((last, _)) = vectors.last_key_value() else {
        return Err(Error::Invalid {
            what: "the control vector".to_owned(),
            expected: "at least one layer".to_owned(),
            found: "none".to_owned(),
        });
    };
    let malformed = |error: candle_core::Error| Error::Malformed { path: path.to_owned(), problem: error.to_string() };
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::String("controlvector".to_owned())),
        ("controlvector.model_hint".to_owned(), Value::String(model_hint.to_owned())),
        ("controlvector.layer_count".to_owned(), Value::U32(*last as u32)),
    ];
    let kept =
        provenance.iter().map(|(key, value)| (format!("controlvector.undertone.{key}"), Value::String(value.clone())));
    metadata.extend(kept);
    let tensors = vectors.iter().map(|(layer, vector)| {
        let values = Vec::<f32>::try_from(
            &vector.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?,
        )?;
        let tensor = candle_core::Tensor::new(values, &candle_core::Device::Cpu).map_err(malformed)?;
        Ok((format!("direction.{layer}"), QTensor::quantize(&tensor, GgmlDType::F32).map_err(malformed)?))
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let mut bytes = Cursor::new(Vec::new());
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write_gguf(&mut bytes, &metadata, &tensors).map_err(malformed)?;
    let mut bytes = bytes.into_inner();
    // The writer says version 2, whose little-endian files are laid out as those of version 3, the one in use.
    bytes[4..8].copy_from_slice(&3_u32.to_le_bytes());
    files::write_atomic(path, &bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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

        let message =
            write(&path, "qwen2", &BTreeMap::from([(0, vector())]), &BTreeMap::new()).unwrap_err().to_string();
        assert!(message.contains("cannot address block 0"), "{message}");
    }
}
