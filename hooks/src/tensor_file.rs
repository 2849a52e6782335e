//! Tensors written as safetensors, whole or not at all.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;

/// Writes named tensors with some metadata. f32, f16, bf16 and i64 keep their kind.
pub fn write(path: &Path, tensors: &[(String, Tensor)], metadata: HashMap<String, String>) -> Result<()> {
    let raw = tensors.iter().map(|(name, tensor)| Ok((name, raw_bytes(name, tensor)?))).collect::<Result<Vec<_>>>()?;
    let views = raw.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| malformed(path, &error))?;
        Ok((name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| malformed(path, &error))?;
    files::write_atomic(path, &bytes)
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
