//! The positions of a prompt at which the residual stream is read, as text, and the mean over them.

use std::fmt;
use std::str::FromStr;

use hooks::{Selection, Sequence, TokenClass};
use serde_with::{DeserializeFromStr, SerializeDisplay};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// The positions of a prompt at which the residual stream is read: `all`, `last` or `class:CLASS[+CLASS]`.
#[derive(Clone, Debug, PartialEq, Eq, SerializeDisplay, DeserializeFromStr)]
pub enum Extraction {
    /// The mean over all tokens.
    All,
    /// The last token, which predicts the first token of the answer.
    Last,
    /// The mean over the tokens of some classes.
    Class(Selection),
}

impl Extraction {
    /// Whether a prompt has such positions.
    pub(super) fn is_in(&self, prompt: &Sequence) -> bool {
        let Self::Class(selection) = self else { return true };
        prompt.classes.iter().any(|class| selection.contains(*class))
    }

    /// The means over the chosen positions of `resid`, `[n_layers, pos, d_model]`: of the vectors, `[n_layers,
    /// d_model]`, and of their lengths, `[n_layers]`; `None` if the prompt has no such position.
    pub(super) fn mean(&self, resid: &Tensor, prompt: &Sequence) -> Result<Option<(Tensor, Tensor)>> {
        let chosen = |class: &TokenClass| match self {
            Self::Class(selection) => selection.contains(*class),
            _ => true,
        };
        let mut positions =
            prompt.classes.iter().enumerate().filter(|(_, class)| chosen(class)).map(|(at, _)| at as i64);
        let positions: Vec<i64> =
            if *self == Self::Last { positions.next_back().into_iter().collect() } else { positions.collect() };
        if positions.is_empty() {
            return Ok(None);
        }
        let picked = resid.f_index_select(1, &Tensor::f_from_slice(&positions)?.f_to_device(resid.device())?)?;
        let lengths = picked.f_to_kind(Kind::Float)?.f_norm_scalaropt_dim(2.0, [2], false)?;
        Ok(Some((picked.f_mean_dim(1, false, Kind::Float)?, lengths.f_mean_dim(1, false, Kind::Double)?)))
    }
}

impl fmt::Display for Extraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.pad("all"),
            Self::Last => f.pad("last"),
            Self::Class(selection) => f.pad(&format!("class:{selection}")),
        }
    }
}

impl FromStr for Extraction {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.trim() {
            "all" => Ok(Self::All),
            "last" => Ok(Self::Last),
            other => match other.strip_prefix("class:") {
                Some(classes) => Ok(Self::Class(classes.parse()?)),
                None => Err(hooks::Error::UnknownName {
                    what: "extraction position",
                    found: text.to_owned(),
                    choices: "all, last, class:CLASS[+CLASS]".to_owned(),
                }
                .into()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_back() {
        for text in ["all", "last", "class:entity+user.content"] {
            assert_eq!(text.parse::<Extraction>().unwrap().to_string(), text);
        }
        assert!("first".parse::<Extraction>().unwrap_err().to_string().contains("all, last, class:"));
    }
}
