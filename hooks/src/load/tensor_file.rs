//! Writes tensors as safetensors, whole or not at all, and reads them back in their own kinds.
//!
//! A file is written tensor by tensor, so that a large model is never in memory twice.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, malformed};
use crate::load::files;
use crate::load::weights::finite;

/// The kinds that are written and read, with their names in a file.
const KINDS: [(Kind, Dtype); 4] =
    [(Kind::Float, Dtype::F32), (Kind::Half, Dtype::F16), (Kind::BFloat16, Dtype::BF16), (Kind::Int64, Dtype::I64)];

/// Writes named tensors with some metadata. f32, f16, bf16 and i64 keep their kind.
pub fn write(path: &Path, tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<()> {
    let sorted = tensors.iter().map(|(name, tensor)| Ok((dtype(name, tensor)?, name, tensor)));
    let mut sorted = sorted.collect::<Result<Vec<_>>>()?;
    // Tensors of wide numbers come first, so that each is aligned; then by name. This is the order of Hugging Face's
    // library.
    sorted.sort_by(|(left, a, _), (right, b, _)| right.cmp(left).then(a.cmp(b)));
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!(metadata))]);
    let mut end = 0;
    for (dtype, name, tensor) in &sorted {
        let start = end;
        end += tensor.numel() * tensor.kind().elt_size_in_bytes();
        let entry = json!({ "dtype": dtype.to_string(), "shape": tensor.size(), "data_offsets": [start, end] });
        header.insert((*name).clone(), entry);
    }
    let mut header = serde_json::to_vec(&header).map_err(|error| malformed(path, error.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    files::write_atomic_by(path, |file| {
        let unwritten = |cause| files::unwritten(path, cause);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(unwritten)?;
        file.write_all(&header).map_err(unwritten)?;
        for (_, _, tensor) in sorted {
            file.write_all(&raw_bytes(tensor)?).map_err(unwritten)?;
        }
        Ok(())
    })
}

/// The number of NaN or infinite values of a tensor. In attention scores minus infinity is a masked position and does
/// not count.
pub fn n_broken(name: &str, tensor: &Tensor) -> Result<i64> {
    let finite = tensor.f_isfinite()?;
    let fine =
        if name.contains("attn_scores") { finite.f_logical_or(&tensor.f_eq(f64::NEG_INFINITY)?)? } else { finite };
    Ok(fine.f_logical_not()?.f_sum(Kind::Int64)?.f_int64_value(&[])?)
}

fn dtype(name: &str, tensor: &Tensor) -> Result<Dtype> {
    KINDS.iter().find(|(kind, _)| *kind == tensor.kind()).map(|(_, dtype)| *dtype).ok_or_else(|| {
        Error::invalid(format!("the kind of tensor {name}"), "f32, f16, bf16 or i64", format!("{:?}", tensor.kind()))
    })
}

fn raw_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0_u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}

/// A file of tensors, mapped into memory.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    data: usize, // where the tensors begin
    header: Metadata,
}

impl TensorFile {
    /// Maps a safetensors file and checks its header.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        let (header_length, header) = SafeTensors::read_metadata(&map)
            .map_err(|error| malformed(path, format!("expected a safetensors file: {error}")))?;
        Ok(Self { path: path.to_owned(), map, data: 8 + header_length, header }) // 8 bytes of header length come first
    }

    /// The file's metadata.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().clone().unwrap_or_default().into_iter().collect()
    }

    /// A copy of a tensor, in its own kind, on the CPU.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::MissingTensor { name: name.to_owned(), file: self.path.display().to_string() };
        let info = self.header.info(name).ok_or_else(missing)?;
        let kind = KINDS.iter().find(|(_, dtype)| *dtype == info.dtype).map(|(kind, _)| *kind);
        let kind = kind.ok_or_else(|| {
            malformed(&self.path, format!("tensor {name} is stored as {}, expected F32, F16, BF16 or I64", info.dtype))
        })?;
        let shape: Vec<i64> = info.shape.iter().map(|n| *n as i64).collect();
        let (start, end) = info.data_offsets; // the header was checked against the file's length
        let tensor = Tensor::f_from_data_size(&self.map[self.data + start..self.data + end], &shape, kind)?;
        let n_broken = n_broken(name, &tensor)?;
        finite(tensor, n_broken as usize, name, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn tensors() -> [(String, Tensor); 4] {
        [
            ("b".to_owned(), Tensor::from_slice(&[1.5_f32, -2.0, 0.1]).view([3, 1])),
            ("half".to_owned(), Tensor::from_slice(&[0.25_f32, 3.0, 7.0]).to_kind(Kind::BFloat16)),
            ("a".to_owned(), Tensor::from_slice(&[7_i64])),
            ("c".to_owned(), Tensor::from_slice(&[9.0_f32])),
        ]
    }

    #[test]
    fn equal_tensors_and_metadata_give_equal_bytes_that_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let metadata: BTreeMap<String, String> =
            (0..20).map(|n| (format!("key {n}"), format!("\"{n}\" ↦ \n"))).collect();
        let write_as = |name: &str| {
            let path = folder.path().join(name);
            write(&path, &tensors(), &metadata).unwrap();
            files::read(&path).unwrap()
        };
        let bytes = write_as("one");
        assert!((0..5).all(|n| write_as(&format!("again {n}")) == bytes));

        let read = TensorFile::open(&folder.path().join("one")).unwrap();
        assert_eq!(read.metadata(), metadata);
        for (name, tensor) in tensors() {
            let found = read.tensor(&name).unwrap();
            assert_eq!((found.kind(), found.size()), (tensor.kind(), tensor.size()), "{name}");
            assert!(found.equal(&tensor), "{name}");
        }
        assert!(read.tensor("d").unwrap_err().to_string().contains("tensor d is missing"));
        std::fs::write(folder.path().join("cut"), &bytes[..bytes.len() - 1]).unwrap();
        assert!(TensorFile::open(&folder.path().join("cut")).is_err());
    }

    #[test]
    fn what_is_not_finite_is_refused_but_for_a_mask() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let row = |values: &[f32]| Tensor::from_slice(values);
        let scores = "blocks.0.attn.hook_attn_scores";
        let tensors = [
            ("nan".to_owned(), row(&[1.0, f32::NAN])),
            ("infinite".to_owned(), row(&[f32::NEG_INFINITY, 2.0, f32::INFINITY])),
            (scores.to_owned(), row(&[1.0, f32::NEG_INFINITY])),
        ];
        write(&path, &tensors, &BTreeMap::new()).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.tensor(scores).unwrap(), tensors[2].1);
        for (name, said) in
            [("nan", "tensor nan is NaN or infinite in 1 of its 2 "), ("infinite", "in 2 of its 3 values")]
        {
            let message = file.tensor(name).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
    }

    /// The metadata have one entry, since the library orders several at random.
    #[test]
    fn a_file_is_that_of_hugging_face_s_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write(&path, &tensors(), &metadata).unwrap();
        let raw = tensors().map(|(name, tensor)| {
            let shape = tensor.size().iter().map(|n| *n as usize).collect::<Vec<_>>();
            (dtype(&name, &tensor).unwrap(), shape, raw_bytes(&tensor).unwrap(), name)
        });
        let views = raw
            .iter()
            .map(|(dtype, shape, bytes, name)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        let library = safetensors::serialize(views, Some(metadata.into_iter().collect())).unwrap();
        assert_eq!(files::read(&path).unwrap(), library);
    }
}
