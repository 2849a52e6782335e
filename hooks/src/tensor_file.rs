//! Tensors written as safetensors, whole or not at all.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;

/// Writes named tensors with some metadata. f32, f16, bf16 and i64 keep their kind.
pub fn write(path: &Path, tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<()> {
    let raw = tensors.iter().map(|(name, tensor)| Ok((name, raw_bytes(name, tensor)?))).collect::<Result<Vec<_>>>()?;
    let views = raw.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| malformed(path, &error))?;
        Ok((name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let unordered = Some(metadata.clone().into_iter().collect());
    let mut bytes = safetensors::serialize(views, unordered).map_err(|error| malformed(path, &error))?;
    order_metadata(&mut bytes, metadata).ok_or_else(|| Error::Malformed {
        path: path.to_owned(),
        problem: "the header cannot be put in order".to_owned(),
    })?;
    files::write_atomic(path, &bytes)
}

/// Puts the header's metadata in the order of its keys: the library writes them in the order of a hash map, which differs
/// from run to run, and equal runs are to give equal bytes. The order changes no length.
fn order_metadata(bytes: &mut [u8], metadata: &BTreeMap<String, String>) -> Option<()> {
    let (length, rest) = bytes.split_first_chunk_mut::<8>()?;
    let header = rest.get_mut(..u64::from_le_bytes(*length) as usize)?;
    let mut parsed: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    *parsed.get_mut("__metadata__")? = serde_json::to_value(metadata).ok()?;
    let ordered = serde_json::to_vec(&parsed).ok()?;
    let (text, padding) = header.split_at_mut_checked(ordered.len())?;
    text.copy_from_slice(&ordered);
    padding.iter().all(|byte| *byte == b' ').then_some(())
}

fn malformed(path: &Path, error: &safetensors::SafeTensorError) -> Error {
    Error::Malformed { path: path.to_owned(), problem: error.to_string() }
}

fn raw_bytes(name: &str, tensor: &Tensor) -> Result<(Dtype, Vec<usize>, Vec<u8>)> {
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        other => {
            return Err(Error::Invalid {
                what: format!("the kind of tensor {name}"),
                expected: "f32, f16, bf16 or i64".to_owned(),
                found: format!("{other:?}"),
            });
        }
    };
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0_u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    let numel = tensor.numel();
    tensor.f_copy_data_u8(&mut bytes, numel)?;
    Ok((dtype, tensor.size().iter().map(|n| *n as usize).collect(), bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn equal_tensors_and_metadata_give_equal_bytes_that_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let metadata: BTreeMap<String, String> =
            (0..20).map(|n| (format!("key {n}"), format!("\"{n}\" ↦ \n"))).collect();
        let write_as = |name: &str| {
            let tensors = [
                ("b".to_owned(), Tensor::from_slice(&[1.5_f32, -2.0])),
                ("a".to_owned(), Tensor::from_slice(&[7_i64])),
            ];
            let path = folder.path().join(name);
            write(&path, &tensors, &metadata).unwrap();
            files::read(&path).unwrap()
        };
        let bytes = write_as("one");
        assert!((0..5).all(|n| write_as(&format!("again {n}")) == bytes));

        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().clone().unwrap().into_iter().collect::<BTreeMap<_, _>>(), metadata);
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("b").unwrap().data(), [1.5_f32.to_le_bytes(), (-2.0_f32).to_le_bytes()].concat());
        assert_eq!(read.tensor("a").unwrap().data(), 7_i64.to_le_bytes());
    }
}
