//! The pocket models: two trained Qwen2 models of 42 thousand parameters, embedded in the binary.
//!
//! They differ only in the seed of their weights and of their data's order, so that a student of one can learn from a
//! teacher of the other. `docs/pocket.md` describes their world; `undertone pocket make` makes them.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use tch::{Kind, Tensor};

use crate::config::Config;
use crate::error::{Result, malformed};

/// One embedded model, as the files of its folder.
pub(crate) struct Pocket {
    pub(crate) name: &'static str,
    config: &'static [u8],
    weights: &'static [u8],
    pub(crate) tokenizer: &'static [u8],
    pub(crate) chat_template: &'static str,
}

macro_rules! pocket {
    ($name:literal) => {
        Pocket {
            name: $name,
            config: include_bytes!(concat!("../../../assets/pocket/", $name, "/config.json")),
            weights: include_bytes!(concat!("../../../assets/pocket/", $name, "/model.safetensors")),
            tokenizer: include_bytes!(concat!("../../../assets/pocket/", $name, "/tokenizer.json")),
            chat_template: include_str!(concat!("../../../assets/pocket/", $name, "/chat_template.jinja")),
        }
    };
}

pub(crate) static POCKETS: [Pocket; 2] = [pocket!("pocket"), pocket!("pocket-other")];

impl Pocket {
    pub(crate) fn config(&self) -> Result<Config> {
        Config::parse(self.config, Path::new(self.name))
    }

    pub(crate) fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let path = Path::new(self.name);
        let stored = SafeTensors::deserialize(self.weights).map_err(|error| malformed(path, error.to_string()))?;
        let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
            let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
            if view.dtype() != safetensors::Dtype::F32 {
                return Err(malformed(path, format!("{name} is {:?}, expected F32", view.dtype())));
            }
            Ok((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?))
        };
        stored.iter().map(tensor).collect()
    }
}
