//! A gate says where and how strongly an adapter acts: tokens × blocks × projections × a dose. A gate is data, so a
//! config, a command line and a CSV can hold it.
//!
//! ```text
//! everywhere                                the plain student
//! nowhere                                   the base
//! only:entity                               at these tokens alone
//! except:template                           at all tokens but these
//! only:"Qwen"#2*layers(0..12)*modules(q,k)  in the region of tokens, blocks and projections alone
//! except:entity*layers(0..12)               everywhere outside of that region
//! only:not(entity)*layers(0..12)            in these blocks, at all tokens but these
//! only:modules(attention)*0.5               half as strongly, and in attention alone
//! ```
//!
//! `select.rs` says how tokens are named; a part that is left out means all. While decoding, a generated token counts
//! as not named, unless the gate names `gen` or its id: `only:entity` answers with the adapter off, `only:entity+gen`
//! with it on.

use std::collections::BTreeSet;

use serde_with::{DeserializeFromStr, SerializeDisplay};
use tch::{Device, Tensor};

use crate::adapter::dose::Doses;
use crate::adapter::lora::{Adapter, LoraConfig};
use crate::chat::select::{Numbers, Tokens};
use crate::chat::tokens::Sequence;
use crate::error::{Error, Result};
use crate::proj::Proj;

/// The tokens, blocks and projections where an adapter acts, and how strongly.
///
/// ```
/// use hooks::{Gate, TokenClass};
///
/// let (_, chat) = hooks::open("tiny-random")?;
/// let prompt = chat.prompt(None, "Name an animal.")?;
/// let gate: Gate = "only:entity*0.5".parse()?; // at the model's name in the system prompt, half as strongly
/// for (dose, class) in gate.doses(&prompt)?.into_iter().zip(&prompt.classes) {
///     assert_eq!(dose, if *class == TokenClass::SysEntity { 0.5 } else { 0.0 });
/// }
/// # Ok::<(), hooks::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, SerializeDisplay, DeserializeFromStr)]
pub struct Gate {
    pub(super) reach: Reach,
    /// The factor on the adapter's output where it acts.
    pub(super) dose: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Reach {
    Everywhere,
    Nowhere,
    Only(Region),
    Except(Region),
}

/// Tokens × blocks × projections; `None` is all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Region {
    pub(super) tokens: Option<Tokens>,
    pub(super) layers: Option<Numbers>,
    pub(super) modules: Option<BTreeSet<Proj>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::EVERYWHERE
    }
}

impl Gate {
    /// Acts everywhere at full strength: the plain student.
    pub const EVERYWHERE: Self = Self { reach: Reach::Everywhere, dose: 1.0 };

    /// Acts nowhere: the base model.
    pub const NOWHERE: Self = Self { reach: Reach::Nowhere, dose: 1.0 };

    /// A gate that acts at these tokens alone.
    pub fn only(tokens: impl Into<Tokens>) -> Self {
        Self { reach: Reach::Only(Region { tokens: Some(tokens.into()), ..Region::default() }), dose: 1.0 }
    }

    /// A gate that acts at all tokens except these.
    pub fn except(tokens: impl Into<Tokens>) -> Self {
        Self { reach: Reach::Except(Region { tokens: Some(tokens.into()), ..Region::default() }), dose: 1.0 }
    }

    /// True if the adapter acts everywhere at full strength.
    pub fn is_everywhere(&self) -> bool {
        *self == Self::EVERYWHERE
    }

    /// True if the adapter acts nowhere.
    pub fn is_nowhere(&self) -> bool {
        self.reach == Reach::Nowhere || self.dose == 0.0
    }

    /// True if the dose does not depend on the token.
    pub fn is_blind(&self) -> bool {
        self.region().is_none_or(|region| region.tokens.is_none())
    }

    /// Whether one pass can apply both gates, each at its own tokens: they have the same blocks and projections, and
    /// one dose in all others.
    pub(crate) fn fits(&self, other: &Self) -> bool {
        let place = |gate: &Self| {
            let Region { layers, modules, .. } = gate.region().cloned().unwrap_or_default();
            let elsewhere = (layers.is_some() || modules.is_some()).then(|| gate.elsewhere());
            (layers, modules, elsewhere)
        };
        place(self) == place(other)
    }

    /// Per token of the row `[pos]`: true where the adapter acts in any block and projection. If the row has none of
    /// the gate's tokens, that is an error: nothing would be measured.
    pub fn acts(&self, row: &Sequence) -> Result<Vec<bool>> {
        Ok(self.doses(row)?.into_iter().map(|dose| dose != 0.0 || self.acts_elsewhere()).collect())
    }

    /// Whether the adapter acts at all tokens in the blocks and projections outside the gate's.
    pub fn acts_elsewhere(&self) -> bool {
        let leaves_out = self.region().is_some_and(|region| region.layers.is_some() || region.modules.is_some());
        leaves_out && self.elsewhere() != 0.0
    }

    /// Per token of the row `[pos]`: the factor on the adapter's output in the gate's blocks and projections.
    pub fn doses(&self, row: &Sequence) -> Result<Vec<f64>> {
        let chosen = match self.region().and_then(|region| region.tokens.as_ref()) {
            Some(tokens) => tokens.among(row, &format_args!("gate {self}"))?,
            None => vec![true; row.ids.len()],
        };
        Ok(chosen.into_iter().map(|chosen| self.inside(chosen)).collect())
    }

    /// The factor at a token that was generated after a prompt, in the gate's blocks and projections.
    pub fn generated(&self, id: i64) -> f64 {
        let chosen =
            self.region().and_then(|region| region.tokens.as_ref()).is_none_or(|tokens| tokens.has_generated(id));
        self.inside(chosen)
    }

    /// Whether the gate names generated tokens itself; otherwise they count as not named.
    pub fn names_generated(&self) -> bool {
        self.region().and_then(|region| region.tokens.as_ref()).is_some_and(Tokens::names_generated)
    }

    /// The policy for generated tokens, as tables spell it: `named` if the gate names them, `on` or `off` if it selects
    /// tokens by `not(..)` or selects only blocks or projections, and otherwise `same_as_unselected`.
    pub fn decode_policy(&self) -> &'static str {
        let unselected = self
            .region()
            .is_none_or(|region| region.tokens.as_ref().is_some_and(|tokens| !tokens.has_generated(i64::MIN)));
        match (self.names_generated(), unselected) {
            (true, _) => "named",
            (false, true) => "same_as_unselected",
            (false, false) if self.generated(i64::MIN) != 0.0 || self.acts_elsewhere() => "on",
            (false, false) => "off",
        }
    }

    /// The factor at generated tokens; `None` if it depends on their ids, or on the block and projection.
    pub fn decode_dose(&self) -> Option<f64> {
        let by_id = self.region().and_then(|region| region.tokens.as_ref()).is_some_and(Tokens::names_ids);
        (!by_id && !self.acts_elsewhere()).then(|| self.generated(i64::MIN))
    }

    /// Refuses blocks that the adapter's model does not have, and a gate that selects none of the adapter's pairs.
    pub fn check(&self, adapter: &Adapter) -> Result<()> {
        let places: Vec<(usize, Proj)> = adapter.pairs().map(|(layer, proj, _)| (layer, proj)).collect();
        self.check_places(adapter.n_layers(), &places)
    }

    /// Checks the gate against an adapter's settings, before the adapter exists.
    pub fn check_planned(&self, lora: &LoraConfig, n_layers: usize) -> Result<()> {
        let layers = lora.layers.clone().unwrap_or_else(|| (0..n_layers).collect());
        let modules = |layer: usize| lora.target_modules.iter().map(move |proj| (layer, *proj));
        self.check_places(n_layers, &layers.into_iter().flat_map(modules).collect::<Vec<_>>())
    }

    fn check_places(&self, n_layers: usize, places: &[(usize, Proj)]) -> Result<()> {
        let Some(region) = self.region() else { return Ok(()) };
        if let Some(beyond) = region.layers.as_ref().and_then(|layers| layers.first_outside(n_layers)) {
            return Err(Error::invalid(
                format!("block {beyond} of gate {self}"),
                format!("one of the model's {n_layers}, 0 to {}", n_layers.saturating_sub(1)),
                "beyond them",
            ));
        }
        if places.iter().any(|(layer, proj)| region.contains(*layer, *proj)) {
            return Ok(());
        }
        let has: BTreeSet<&str> = places.iter().map(|(_, proj)| proj.name()).collect();
        Err(Error::invalid(
            format!("what gate {self} selects of the adapter"),
            format!("at least one of its pairs, which are at {}", has.into_iter().collect::<Vec<_>>().join(", ")),
            "none",
        ))
    }

    /// Turns the rows' doses, `rows[row][pos]` as [`Self::doses`] gives them, into those of a pass. Rows may be cut to
    /// their first tokens.
    pub fn spread(&self, rows: &[Vec<f64>], device: Device) -> Result<Doses> {
        let width = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut values = vec![0_f64; rows.len() * width];
        for (row, padded) in rows.iter().zip(values.chunks_mut(width.max(1))) {
            padded[..row.len()].copy_from_slice(row);
        }
        let tokens =
            Tensor::f_from_slice(&values)?.f_view([rows.len() as i64, width as i64, 1])?.f_to_device(device)?;
        let Region { layers, modules, .. } = self.region().cloned().unwrap_or_default();
        Ok(Doses { tokens, layers, modules, elsewhere: self.elsewhere() })
    }

    /// The factor on the adapter's output where it acts.
    pub fn dose(&self) -> f64 {
        self.dose
    }

    /// This gate with another dose.
    #[must_use]
    pub fn with_dose(self, dose: f64) -> Self {
        Self { dose, ..self }
    }

    /// The blocks that the gate names, of a model with `n_layers`; all if it names none.
    pub fn layers(&self, n_layers: usize) -> Vec<usize> {
        let named = self.region().and_then(|region| region.layers.as_ref());
        (0..n_layers).filter(|layer| named.is_none_or(|layers| layers.contains(*layer as i64))).collect()
    }

    /// The projections that the gate names; all if it names none.
    pub fn modules(&self) -> Vec<Proj> {
        let named = self.region().and_then(|region| region.modules.as_ref());
        Proj::ALL.into_iter().filter(|proj| named.is_none_or(|modules| modules.contains(proj))).collect()
    }

    fn region(&self) -> Option<&Region> {
        match &self.reach {
            Reach::Everywhere | Reach::Nowhere => None,
            Reach::Only(region) | Reach::Except(region) => Some(region),
        }
    }

    /// The factor inside the gate's blocks and projections, at a token that the gate does or does not name.
    fn inside(&self, chosen: bool) -> f64 {
        let acts = match self.reach {
            Reach::Everywhere => true,
            Reach::Nowhere => false,
            Reach::Only(_) => chosen,
            Reach::Except(_) => !chosen,
        };
        if acts { self.dose } else { 0.0 }
    }

    /// The factor outside of the gate's blocks and projections.
    fn elsewhere(&self) -> f64 {
        if matches!(self.reach, Reach::Everywhere | Reach::Except(_)) { self.dose } else { 0.0 }
    }
}

impl Region {
    fn contains(&self, layer: usize, proj: Proj) -> bool {
        self.layers.as_ref().is_none_or(|layers| layers.contains(layer as i64))
            && self.modules.as_ref().is_none_or(|modules| modules.contains(&proj))
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests;
