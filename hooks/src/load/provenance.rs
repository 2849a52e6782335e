//! The origin of tensors: a file of vectors or activations describes its model, and is refused for any other. A
//! direction means nothing in another model, and little under another chat template.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::error::{Error, Result, malformed};
use crate::hook_point::HookPoint;
use crate::load::control_vector::{self, ControlVector};
use crate::load::files;
use crate::load::model_files::ModelFiles;

/// The identity of a model. A file's metadata hold these values under the same names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provenance {
    /// Its name.
    pub model: String,
    /// The model's architecture as files spell it, `qwen2` or `qwen3`.
    pub architecture: String,
    /// The SHA-256 of its configuration and of its weights' names, shapes, and first and last bytes.
    pub model_fingerprint: String,
    /// The width of its residual stream.
    pub d_model: i64,
    /// The SHA-256 of its chat template, if it has one.
    pub chat_template: Option<String>,
}

impl Provenance {
    /// The identity of a model, from its files.
    pub fn of(files: &ModelFiles) -> Self {
        Self {
            model: files.name.clone(),
            architecture: files.config.to_hf_json()["model_type"].as_str().unwrap_or_default().to_owned(),
            model_fingerprint: files.fingerprint(),
            d_model: files.config.d_model,
            chat_template: files.chat_template.as_ref().map(|text| format!("{:x}", Sha256::digest(text))),
        }
    }

    /// The values as metadata for a file.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let template = self.chat_template.clone().map(|hash| ("chat_template", hash));
        let known = [
            ("format", "pt".to_owned()),
            ("model", self.model.clone()),
            ("model_fingerprint", self.model_fingerprint.clone()),
            ("d_model", self.d_model.to_string()),
        ];
        known.into_iter().chain(template).map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// Refuses a file from another model, width or chat template. Keys that the file lacks are not compared. `what`
    /// names the file in messages.
    pub fn check(&self, what: &str, theirs: &BTreeMap<String, String>) -> Result<()> {
        let name = theirs.get("model").map_or("another model", String::as_str);
        let compared = [
            ("architecture", Some(&self.architecture)),
            ("model_fingerprint", Some(&self.model_fingerprint)),
            ("d_model", Some(&self.d_model.to_string())),
            ("chat_template", self.chat_template.as_ref()),
        ];
        for (key, ours) in compared {
            if let Some((theirs, ours)) = theirs.get(key).zip(ours).filter(|(theirs, ours)| theirs != ours) {
                return Err(Error::OtherModel {
                    what: what.to_owned(),
                    found: format!("{name} ({key} {theirs})"),
                    here: format!("{} ({ours})", self.model),
                });
            }
        }
        Ok(())
    }
}

/// A file of vectors or activations (safetensors, or a control vector) of this model, with its tensors by hook point.
#[derive(Debug)]
pub struct VectorFile {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    lengths: Option<Vec<i64>>, // the tokens of each row without padding, if rows were padded
}

impl VectorFile {
    /// Reads a file and checks that it is of this model.
    pub fn read(path: &Path, here: &Provenance) -> Result<Self> {
        Self::parse(&files::read(path)?, path, here)
    }

    /// Reads the bytes of a file and checks that it is of this model; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path, here: &Provenance) -> Result<Self> {
        let refused = |problem: String| malformed(path, problem);
        if control_vector::is_gguf(bytes) {
            let ControlVector { by_layer, provenance } = control_vector::parse(bytes).map_err(refused)?;
            here.check(&path.display().to_string(), &provenance)?;
            let named = by_layer.into_iter().map(|(layer, vector)| (HookPoint::ResidPost(layer).to_string(), vector));
            return Ok(Self { path: path.to_owned(), tensors: named.collect(), lengths: None });
        }
        let no_safetensors = |error| refused(format!("expected a safetensors file: {error}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(no_safetensors)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        here.check(&path.display().to_string(), &metadata)?;
        let lengths = metadata.get("lengths").map(|text| {
            text.split(',').map(str::parse).collect::<std::result::Result<_, _>>().map_err(|_| {
                refused(format!("its lengths are {text:?}, expected numbers of tokens separated by commas"))
            })
        });
        let tensors = SafeTensors::deserialize(bytes).map_err(no_safetensors)?;
        let tensors = tensors.iter().map(|(name, view)| {
            let tensor = floats(&view).map_err(|found| refused(format!("{name} is {found}, expected F32")))?;
            Ok((name.to_owned(), tensor))
        });
        Ok(Self { path: path.to_owned(), tensors: tensors.collect::<Result<_>>()?, lengths: lengths.transpose()? })
    }

    /// The tensor of a hook point.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        self.tensors.get(name).map(Tensor::shallow_clone).ok_or_else(|| {
            let known: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            malformed(&self.path, format!("it has no tensor {name}; it has {}", known.join(", ")))
        })
    }

    /// The only tensor of a file, if its name is not a hook point. The caller must know the hook point of such a
    /// vector.
    pub(crate) fn bare(&self) -> Option<Tensor> {
        let mut tensors = self.tensors.iter();
        match (tensors.next(), tensors.next()) {
            (Some((name, tensor)), None) if name.parse::<HookPoint>().is_err() => Some(tensor.shallow_clone()),
            _ => None,
        }
    }

    /// The mean of the activations at a hook point, `[row, pos, ..]`, over all rows and tokens without padding.
    pub fn mean(&self, name: &str) -> Result<Tensor> {
        let captured = self.get(name)?;
        let size = captured.size();
        let [rows, width, ..] = size[..] else {
            let problem = format!("{name} has shape {size:?}, expected rows and tokens, [row, pos, ..]");
            return Err(malformed(&self.path, problem));
        };
        let lengths = self.lengths.clone().unwrap_or_else(|| vec![width; rows as usize]);
        if lengths.len() as i64 != rows || lengths.iter().any(|length| !(1..=width).contains(length)) {
            let problem = format!("its lengths are {lengths:?}, but {name} has shape {size:?}");
            return Err(malformed(&self.path, problem));
        }
        let real = lengths.iter().enumerate().map(|(row, length)| captured.f_get(row as i64)?.f_narrow(0, 0, *length));
        let real = real.collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Tensor::f_cat(&real, 0)?.f_mean_dim(0, false, Kind::Float)?)
    }
}

/// Reads an F32 tensor; the error is the tensor's dtype.
fn floats(view: &TensorView<'_>) -> std::result::Result<Tensor, String> {
    if view.dtype() != Dtype::F32 {
        return Err(format!("{:?}", view.dtype()));
    }
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let shape: Vec<i64> = view.shape().iter().map(|width| *width as i64).collect();
    let tensor = Tensor::f_from_slice(&values.collect::<Vec<_>>()).and_then(|flat| flat.f_view(shape.as_slice()));
    tensor.map_err(|error| error.to_string())
}
