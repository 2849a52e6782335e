//! Learned directions on disk: one tensor `[d_model]` per hook point, with metadata that says where they come from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use hooks::{Edit, HookPoint, ModelFiles, Provenance, control_vector, files, tensor_file};
use safetensors::SafeTensors;
use tch::Tensor;

/// Directions by layer, with where they come from.
pub struct Vectors {
    /// `[d_model]` each, f32, at `blocks.{layer}.hook_resid_post`.
    pub by_layer: BTreeMap<usize, Tensor>,
    /// The file's metadata.
    pub provenance: BTreeMap<String, String>,
}

impl Vectors {
    /// Reads a safetensors file of vectors.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&files::read(path)?).with_context(|| path.display().to_string())
    }

    /// The vectors in the bytes of a safetensors file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes).context("not a safetensors file")?;
        let provenance = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors = SafeTensors::deserialize(bytes)?;
        let mut by_layer = BTreeMap::new();
        for (name, view) in tensors.iter() {
            let HookPoint::ResidPost(layer) = name.parse::<HookPoint>()? else {
                bail!("the tensor {name} is at another place than blocks.N.hook_resid_post, where vectors are added");
            };
            if view.dtype() != safetensors::Dtype::F32 || view.shape().len() != 1 {
                bail!("the tensor {name} is {:?} {:?}, expected F32 of shape [d_model]", view.dtype(), view.shape());
            }
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            by_layer.insert(layer, Tensor::f_from_slice(&values.collect::<Vec<_>>())?);
        }
        if by_layer.is_empty() {
            bail!("no tensor, expected at least one named blocks.N.hook_resid_post");
        }
        Ok(Self { by_layer, provenance })
    }

    /// The vector of one layer; the error lists those at hand.
    pub fn layer(&self, layer: usize) -> Result<&Tensor> {
        let known = || self.by_layer.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        self.by_layer
            .get(&layer)
            .with_context(|| format!("no vector of layer {layer}; there are those of layers {}", known()))
    }

    /// Adds the vectors, `coefficient` times, at their layers and at every token; refused for another model or chat template than theirs.
    pub fn steer(&self, coefficient: f64, model: &ModelFiles) -> Result<Vec<Edit>> {
        Provenance::of(model).check("the vectors", &self.provenance)?;
        let edit = |(layer, vector): (&usize, &Tensor)| {
            let (width, d_model) = (vector.size(), model.config.d_model);
            if width != [d_model] || *layer >= model.config.n_layers {
                bail!(
                    "the vector of layer {layer} has shape {width:?}, but the model has {} layers of width {d_model}",
                    model.config.n_layers
                );
            }
            Ok(Edit::add(*layer, vector, coefficient))
        };
        self.by_layer.iter().map(edit).collect()
    }

    /// Writes by the file's ending: `.safetensors`, `.csv` (layer, index, value) or `.gguf` (a control vector).
    pub fn write(&self, path: &Path, model_hint: &str) -> Result<()> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("safetensors") => {
                let named = self
                    .by_layer
                    .iter()
                    .map(|(layer, vector)| (HookPoint::ResidPost(*layer).to_string(), vector.shallow_clone()));
                Ok(tensor_file::write(path, &named.collect::<Vec<_>>(), &self.provenance)?)
            }
            Some("gguf") => Ok(control_vector::write(path, model_hint, &self.by_layer, &self.provenance)?),
            Some("csv") => {
                let mut text = String::from("layer,index,value\n");
                for (layer, vector) in &self.by_layer {
                    for (index, value) in Vec::<f32>::try_from(vector)?.iter().enumerate() {
                        writeln!(text, "{layer},{index},{value}")?;
                    }
                }
                Ok(files::write_atomic(path, text.as_bytes())?)
            }
            _ => bail!("{} ends in none of .safetensors, .csv and .gguf, so its format is unknown", path.display()),
        }
    }
}
