//! Reads and writes directions. undertone writes a tensor `[d_model]` per hook point, with metadata on its origin.
//! Other directions are control vectors or single tensors.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::hinted;

use anyhow::{Context, Result, bail, ensure};
use hooks::{Edit, HookPoint, ModelFiles, Provenance, control_vector, files, tensor_file};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

/// Directions by layer, with their origin.
pub struct Vectors {
    /// The direction at `blocks.{layer}.hook_resid_post`, `[d_model]`, f32, by layer.
    pub by_layer: BTreeMap<usize, Tensor>,
    /// The file's metadata.
    pub provenance: BTreeMap<String, String>,
}

impl Vectors {
    /// Reads a file of vectors, by layer.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&files::read(path)?, None).with_context(|| path.display().to_string())
    }

    /// Reads the vector of one layer, or a single vector without a hook point's name.
    pub fn read_at(path: &Path, layer: usize) -> Result<Self> {
        Self::parse(&files::read(path)?, Some(layer)).with_context(|| path.display().to_string())
    }

    /// Reads the bytes of a safetensors file or of a control vector: all vectors, or one layer's. A single tensor
    /// without a hook point's name needs `layer`.
    pub fn parse(bytes: &[u8], layer: Option<usize>) -> Result<Self> {
        let mut vectors = if control_vector::is_gguf(bytes) {
            let found = control_vector::parse(bytes).map_err(anyhow::Error::msg)?;
            Self { by_layer: found.by_layer, provenance: found.provenance }
        } else {
            Self::of_safetensors(bytes, layer)?
        };
        if let Some(layer) = layer {
            vectors.layer(layer)?;
            vectors.by_layer.retain(|known, _| *known == layer);
        }
        Ok(vectors)
    }

    fn of_safetensors(bytes: &[u8], layer: Option<usize>) -> Result<Self> {
        let (_, header) =
            SafeTensors::read_metadata(bytes).context("neither a safetensors file nor a control vector (.gguf)")?;
        let provenance = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors = SafeTensors::deserialize(bytes)?;
        let mut by_layer = BTreeMap::new();
        for (name, view) in tensors.iter() {
            let layer = match (name.parse::<HookPoint>(), layer) {
                (Ok(HookPoint::ResidPost(layer)), _) => layer,
                (Ok(_), _) => {
                    bail!(
                        "the tensor {name} is at another place than blocks.N.hook_resid_post, where vectors are added"
                    )
                }
                (Err(_), Some(layer)) if tensors.len() == 1 => layer,
                (Err(_), _) => bail!(hinted!(
                    "the tensor {name} does not say where it is added, expected the name \
                     blocks.N.hook_resid_post";
                    "a file with one tensor is added after the block that is given behind the coefficient, \
                     --steer FILE:1@12"
                )),
            };
            by_layer.insert(layer, vector(name, &view)?);
        }
        ensure!(!by_layer.is_empty(), "no tensor, expected at least one named blocks.N.hook_resid_post");
        Ok(Self { by_layer, provenance })
    }

    /// The vector of one layer; the error lists the layers of the file.
    pub fn layer(&self, layer: usize) -> Result<&Tensor> {
        let known = || self.by_layer.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        self.by_layer
            .get(&layer)
            .with_context(|| format!("no vector of layer {layer}; there are those of layers {}", known()))
    }

    /// Remarks on the vectors: names those that are zero.
    pub fn remarks(&self) -> Result<Vec<String>> {
        let mut zero = vec![];
        for (layer, vector) in &self.by_layer {
            if vector.f_count_nonzero(None)?.f_int64_value(&[])? == 0 {
                zero.push(layer.to_string());
            }
        }
        let said = || format!("the vector of layer {} is zero: adding it changes nothing", zero.join(", "));
        Ok((!zero.is_empty()).then(said).into_iter().collect())
    }

    /// The edits that add the vectors, `coefficient` times, at their layers and at every token. Refuses another model
    /// or chat template than that of the file.
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

    /// Writes the vectors by the file's ending: `.safetensors`, `.csv` (layer, index, value) or `.gguf` (a control
    /// vector).
    pub fn write(&self, path: &Path, model_hint: &str) -> Result<()> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("safetensors") => {
                let name = |layer: &usize| HookPoint::ResidPost(*layer).to_string();
                let named = self.by_layer.iter().map(|(layer, vector)| (name(layer), vector.shallow_clone()));
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

/// A tensor of a file, as an f32 vector.
fn vector(name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let kinds = [(Dtype::F32, Kind::Float), (Dtype::F16, Kind::Half), (Dtype::BF16, Kind::BFloat16)];
    let kind = kinds.iter().find(|(dtype, _)| *dtype == view.dtype()).map(|(_, kind)| *kind);
    let (Some(kind), &[width]) = (kind, view.shape()) else {
        bail!(
            "the tensor {name} is {:?} {:?}, expected F32, F16 or BF16 of shape [d_model]",
            view.dtype(),
            view.shape()
        );
    };
    let vector = Tensor::f_from_data_size(view.data(), &[width as i64], kind)?.f_to_kind(Kind::Float)?;
    ensure!(
        vector.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0,
        "the tensor {name} has a value that is no finite number"
    );
    Ok(vector)
}
