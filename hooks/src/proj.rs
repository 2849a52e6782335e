//! The seven linear maps of a block, under PEFT's and Hugging Face's names.

use std::fmt;
use std::str::FromStr;

use serde_with::{DeserializeFromStr, SerializeDisplay};

use crate::config::Config;
use crate::error::{Error, Result};

/// A linear map of a block that an adapter can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, SerializeDisplay, DeserializeFromStr)]
pub enum Proj {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// The MLP's gate.
    Gate,
    /// The MLP's linear branch.
    Up,
    /// The MLP's output.
    Down,
}

impl Proj {
    /// All seven projections, in the order of the computation.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The Hugging Face name, such as `q_proj`.
    pub fn name(self) -> &'static str {
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"][self as usize]
    }

    /// The module path inside a block, such as `self_attn.q_proj`.
    pub fn path(self) -> String {
        let parent = if matches!(self, Self::Q | Self::K | Self::V | Self::O) { "self_attn" } else { "mlp" };
        format!("{parent}.{}", self.name())
    }

    /// Input and output width in a model.
    pub fn widths(self, model: &Config) -> (i64, i64) {
        let (q, kv) = (model.n_heads * model.d_head, model.n_kv_heads * model.d_head);
        match self {
            Self::Q => (model.d_model, q),
            Self::K | Self::V => (model.d_model, kv),
            Self::O => (q, model.d_model),
            Self::Gate | Self::Up => (model.d_model, model.d_mlp),
            Self::Down => (model.d_mlp, model.d_model),
        }
    }
}

impl fmt::Display for Proj {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Proj {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|proj| proj.name() == name).ok_or_else(|| Error::UnknownName {
            what: "target module",
            found: name.to_owned(),
            choices: Self::ALL.map(Self::name).join(", "),
        })
    }
}
