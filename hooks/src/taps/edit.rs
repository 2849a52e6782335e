//! Interventions: changes of an activation at a hook point, at some tokens. An activation h becomes h + c·v, another
//! value, zero, its mean, c·h, h without a direction, or another run's activation, wholly or along a direction. As text
//! it is a [`EditText`](crate::taps::edit_text::EditText) edit.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::chat::select::Tokens;
use crate::chat::tokens::Sequence;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::hook_point::HookPoint as P;
use crate::ops::wide;
use crate::rows::batch::Batch;
use crate::taps::tap::{Hooks, Tap};

/// A change of an activation at a hook point and at some tokens.
///
/// ```
/// use hooks::{Change, Condition, Edit, HookPoint, next_token_logprobs};
///
/// let (model, chat) = hooks::open("tiny-random")?;
/// let prompts = [chat.prompt(None, "Name an animal.")?];
/// let edit = Edit { at: HookPoint::MlpOut(0), tokens: Some("user".parse()?), change: Change::Zero };
/// let ablated = Condition { edits: vec![edit], ..Condition::default() };
/// let base = next_token_logprobs(&model, &prompts, &Condition::default())?;
/// assert_ne!(next_token_logprobs(&model, &prompts, &ablated)?, base);
/// # Ok::<(), hooks::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Edit {
    /// The hook point.
    pub at: P,
    /// The tokens (for scores and pattern: queries); `None` means all, including generated ones.
    pub tokens: Option<Tokens>,
    /// The change.
    pub change: Change,
}

/// A change of an activation h at a token. Tensors have the shape that the activation has at one token.
#[derive(Debug)]
pub enum Change {
    /// h + coefficient · vector.
    Add {
        /// The vector.
        vector: Tensor,
        /// Its factor.
        coefficient: f64,
    },
    /// Another value, such as a mean, for mean ablation.
    Replace(Tensor),
    /// Zero ablation.
    Zero,
    /// c · h.
    Scale(f64),
    /// h − (h·v̂) v̂. The direction v may have any length except zero.
    ProjectOut(Tensor),
    /// The activation of another run at the same positions, `[pos, ..]`. It does not act at generated tokens.
    Patch(Tensor),
    /// h − (h·v̂) v̂ + (s·v̂) v̂: the activation s `[pos, ..]` of another run at the same positions along a direction
    /// v, and h otherwise (Blank et al. 2026). It does not act at generated tokens.
    PatchAlong {
        /// v, of any length except zero.
        direction: Tensor,
        /// s.
        source: Tensor,
    },
}

impl Clone for Change {
    fn clone(&self) -> Self {
        match self {
            Self::Add { vector, coefficient } => {
                Self::Add { vector: vector.shallow_clone(), coefficient: *coefficient }
            }
            Self::Replace(value) => Self::Replace(value.shallow_clone()),
            Self::Zero => Self::Zero,
            Self::Scale(factor) => Self::Scale(*factor),
            Self::ProjectOut(direction) => Self::ProjectOut(direction.shallow_clone()),
            Self::Patch(source) => Self::Patch(source.shallow_clone()),
            Self::PatchAlong { direction, source } => {
                Self::PatchAlong { direction: direction.shallow_clone(), source: source.shallow_clone() }
            }
        }
    }
}

impl Edit {
    /// Adds `coefficient · vector` to the residual stream after a block, at every token.
    pub fn add(layer: usize, vector: &Tensor, coefficient: f64) -> Self {
        let change = Change::Add { vector: vector.shallow_clone(), coefficient };
        Self { at: P::ResidPost(layer), tokens: None, change }
    }

    /// Takes a direction out of the residual stream after a block, at every token.
    pub fn project_out(layer: usize, direction: &Tensor) -> Self {
        Self { at: P::ResidPost(layer), tokens: None, change: Change::ProjectOut(direction.shallow_clone()) }
    }

    /// Sets the residual stream after a block, along a direction, to another run's `source`, `[pos, d_model]`, at the
    /// prompt's tokens.
    pub fn patch_along(layer: usize, direction: &Tensor, source: &Tensor) -> Self {
        let change = Change::PatchAlong { direction: direction.shallow_clone(), source: source.shallow_clone() };
        Self { at: P::ResidPost(layer), tokens: None, change }
    }

    /// Limits the edit to some tokens; `None` means all.
    #[must_use]
    pub fn at_tokens(self, tokens: Option<Tokens>) -> Self {
        Self { tokens, ..self }
    }

    /// Whether it can be made in a packed batch, where attention computes no scores and no pattern.
    pub(crate) fn is_packable(&self) -> bool {
        !matches!(self.at, P::AttnScores(_) | P::Pattern(_))
    }

    /// Per token of a row, whether the edit acts; `None` means at all.
    pub(crate) fn chosen(&self, row: &Sequence) -> Result<Option<Vec<bool>>> {
        let Some(tokens) = self.tokens_of_prompts() else { return Ok(None) };
        tokens.among(row, &format!("the edit at {}@{tokens}", self.at)).map(Some)
    }

    /// The edit's tokens; `None` means all. Patches act only at the prompt's tokens, which the other run has.
    fn tokens_of_prompts(&self) -> Option<Tokens> {
        match (&self.tokens, &self.change) {
            (None, Change::Patch(_) | Change::PatchAlong { .. }) => Some(Tokens::prompt()),
            (tokens, _) => tokens.clone(),
        }
    }

    /// Refuses hook points that the model does not have, and tensors of another shape.
    pub(crate) fn check(&self, model: &Config) -> Result<()> {
        let at = self.at;
        if matches!(at, P::LnFinalScale | P::LnFinalNormalized | P::Logits) {
            return Err(Error::invalid("the place of an edit", "a hook point up to the last block", at));
        }
        if at.layer().is_some_and(|layer| layer >= model.n_layers) {
            let expected = format!("one of the model's {} blocks, from 0", model.n_layers);
            return Err(Error::invalid("the place of an edit", expected, at));
        }
        if matches!(at, P::QNormed(_) | P::KNormed(_)) && !model.qk_norm {
            let expected = "a hook point of this model, which does not norm queries and keys";
            return Err(Error::invalid("the place of an edit", expected, at));
        }
        let (tensor, leading) = match &self.change {
            Change::Add { vector: tensor, .. } | Change::Replace(tensor) | Change::ProjectOut(tensor) => (tensor, 0),
            Change::Patch(tensor) | Change::PatchAlong { source: tensor, .. } => (tensor, 1),
            Change::Zero | Change::Scale(_) => return Ok(()),
        };
        let Some(expected) = at.token_shape(model) else {
            let expected = "zero or scale: what is there has a row for every query, not a vector for every token";
            return Err(Error::invalid(format!("the edit at {at}"), expected, "a tensor"));
        };
        let as_there = format!("{expected:?}, as the model has it there");
        let found = tensor.size();
        if found.len() < leading || found[leading..] != expected {
            let of_tokens = if leading == 1 { "[pos] and then " } else { "" };
            let what = format!("the shape of the tensor for the edit at {at}");
            return Err(Error::invalid(what, format!("{of_tokens}{as_there}"), format!("{found:?}")));
        }
        if let Change::PatchAlong { direction, .. } = &self.change
            && direction.size() != expected
        {
            let what = format!("the shape of the direction to patch along at {at}");
            return Err(Error::invalid(what, as_there, format!("{:?}", direction.size())));
        }
        if let Change::ProjectOut(direction) | Change::PatchAlong { direction, .. } = &self.change
            && direction.f_norm()?.f_double_value(&[])? == 0.0
        {
            let what = format!("the direction of the edit at {at}");
            return Err(Error::invalid(what, "a vector of some length", "zero"));
        }
        Ok(())
    }
}

/// An edit as a tap, prepared for the rows of a batch.
pub(crate) struct EditTap {
    at: P,
    change: Change,
    tokens: Option<Tokens>,
    /// Whether each token is edited, `[row][pos]`; `None` means all.
    chosen: Option<Vec<Vec<bool>>>,
    /// Each place's position in its row, if the rows are packed, `[places]`, i64.
    positions: Option<Tensor>,
    device: Device,
    now: Now,
}

/// The tokens at which an edit acts in the current pass.
enum Now {
    Nowhere,
    Everywhere,
    At { chosen: Tensor, from: usize }, // [batch, pos, 1], bool; the position of the pass's first token
}

impl EditTap {
    pub(crate) fn new(edit: &Edit, rows: &[&Sequence], model: &Config, device: Device, kind: Kind) -> Result<Self> {
        edit.check(model)?;
        let kind = wide(kind);
        let tokens = edit.tokens_of_prompts();
        let chosen = rows.iter().map(|row| edit.chosen(row)).collect::<Result<Option<Vec<Vec<bool>>>>>()?;
        let flat = |tensor: &Tensor| tensor.f_to_device(device)?.f_to_kind(kind)?.f_flatten(0, -1);
        let change = match &edit.change {
            Change::Add { vector, coefficient } => {
                Change::Add { vector: flat(vector)?.f_mul_scalar(*coefficient)?, coefficient: 1.0 }
            }
            Change::Replace(value) => Change::Replace(flat(value)?),
            Change::ProjectOut(direction) => Change::ProjectOut(unit(&flat(direction)?)?),
            Change::Patch(source) | Change::PatchAlong { source, .. } => {
                let n = source.size()[0];
                let last = chosen.iter().flatten().filter_map(|row| row.iter().rposition(|chosen| *chosen)).max();
                if let Some(last) = last.filter(|last| *last as i64 >= n) {
                    return Err(Error::invalid(
                        format!("position {last} of the edit at {}", edit.at),
                        format!("one of 0 to {}, the positions that the other run has", n - 1),
                        "beyond the other run",
                    ));
                }
                let width = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0) as i64;
                let source = source.f_to_device(device)?.f_to_kind(kind)?.f_reshape([n, -1])?;
                let padded = Tensor::f_zeros([width.max(n), source.size()[1]], (kind, device))?;
                padded.f_narrow(0, 0, n)?.f_copy_(&source)?;
                match &edit.change {
                    Change::PatchAlong { direction, .. } => {
                        Change::PatchAlong { direction: unit(&flat(direction)?)?, source: padded }
                    }
                    _ => Change::Patch(padded),
                }
            }
            Change::Zero => Change::Zero,
            Change::Scale(factor) => Change::Scale(*factor),
        };
        Ok(Self { at: edit.at, change, tokens, chosen, positions: None, device, now: Now::Nowhere })
    }

    /// Adapts the edit to a packed batch, at all of its tokens.
    pub(crate) fn packed(mut self, batch: &Batch) -> Result<Self> {
        let width = batch.width();
        if let Some(rows) = self.chosen.take() {
            let mut places = vec![false; width];
            for (row, chosen) in rows.into_iter().enumerate() {
                for (token, chosen) in chosen.into_iter().enumerate() {
                    places[batch.place(row, token) as usize] = chosen;
                }
            }
            self.chosen = Some(vec![places]);
        }
        self.positions = Some(batch.positions()?);
        self.point(1, &(0..width))?;
        Ok(self)
    }

    pub(crate) fn hook<'a>(hooks: Hooks<'a>, edit: &'a mut Self) -> Hooks<'a> {
        hooks.on([edit.at], edit)
    }

    /// Whether the change is a patch: another run's activations, which exist only at positions of the prompt.
    fn is_of_positions(&self) -> bool {
        matches!(self.change, Change::Patch(_) | Change::PatchAlong { .. })
    }

    /// Number of positions, from the start, that are edited in all rows or in none.
    pub(crate) fn alike(&self) -> usize {
        self.chosen.as_deref().map_or(usize::MAX, alike)
    }

    /// Points the edit at some positions of the first rows.
    pub(crate) fn point(&mut self, rows: usize, at: &Range<usize>) -> Result<()> {
        self.now = match &self.chosen {
            None => Now::Everywhere,
            Some(chosen) => {
                let flat = chosen[..rows].iter().flat_map(|row| at.clone().map(|pos| row.get(pos) == Some(&true)));
                let flat = Tensor::f_from_slice(&flat.collect::<Vec<bool>>())?;
                let chosen = flat.f_view([rows as i64, at.len() as i64, 1])?.f_to_device(self.device)?;
                Now::At { chosen, from: at.start }
            }
        };
        Ok(())
    }

    /// Points the edit at one generated token per row.
    pub(crate) fn point_at_generated(&mut self, ids: &[i64]) -> Result<()> {
        let has = |id: &i64| self.tokens.as_ref().is_none_or(|tokens| tokens.has_generated(*id));
        let chosen: Vec<bool> = ids.iter().map(|id| has(id) && !self.is_of_positions()).collect();
        self.now = if chosen.iter().all(|chosen| *chosen) {
            Now::Everywhere
        } else if chosen.iter().all(|chosen| !*chosen) {
            Now::Nowhere
        } else {
            let chosen = Tensor::f_from_slice(&chosen)?.f_view([-1, 1, 1])?.f_to_device(self.device)?;
            Now::At { chosen, from: 0 }
        };
        Ok(())
    }
}

fn unit(direction: &Tensor) -> Result<Tensor> {
    Ok(direction.f_div(&direction.f_norm()?)?)
}

/// Number of positions, from the start, at which all rows have the same value.
pub(crate) fn alike<T: PartialEq>(rows: &[Vec<T>]) -> usize {
    let [first, others @ ..] = rows else { return usize::MAX };
    if others.is_empty() {
        return usize::MAX;
    }
    (0..first.len()).take_while(|at| others.iter().all(|row| row.get(*at) == first.get(*at))).count()
}

impl Tap for EditTap {
    fn tap(&mut self, at: P, x: Tensor) -> Result<Tensor> {
        let (chosen, from) = match &self.now {
            Now::Nowhere => return Ok(x),
            Now::Everywhere => (None, 0),
            Now::At { chosen, from } => (Some(chosen), *from),
        };
        // Scores and pattern are [batch, n_heads, query, key]: their tokens are the queries.
        let by_query = matches!(at, P::AttnScores(_) | P::Pattern(_));
        let by_token = if by_query { x.f_transpose(1, 2)? } else { x.shallow_clone() };
        let shape = by_token.size();
        let h = by_token.f_reshape([shape[0], shape[1], -1])?.f_to_kind(wide(x.kind()))?; // [batch, pos, width]
        let there = |source: &Tensor| -> Result<Tensor> {
            let rows = match &self.positions {
                Some(positions) => source.f_index_select(0, positions)?,
                None => source.f_narrow(0, from as i64, shape[1])?,
            };
            Ok(rows.f_unsqueeze(0)?)
        };
        let changed = match &self.change {
            Change::Add { vector, .. } => h.f_add(vector)?,
            Change::Replace(value) => value.f_expand_as(&h)?,
            Change::Zero => h.f_zeros_like()?,
            Change::Scale(factor) => h.f_mul_scalar(*factor)?,
            Change::ProjectOut(unit) => h.f_add(&h.f_matmul(unit)?.f_unsqueeze(-1)?.f_mul(unit)?.f_neg()?)?,
            Change::Patch(source) => there(source)?.f_expand_as(&h)?,
            Change::PatchAlong { direction, source } => {
                let apart = there(source)?.f_sub(&h)?;
                h.f_add(&apart.f_matmul(direction)?.f_unsqueeze(-1)?.f_mul(direction)?)?
            }
        };
        let changed = match chosen {
            Some(chosen) => changed.f_where_self(chosen, &h)?,
            None => changed,
        };
        // Masked positions stay masked: only other scores are changed.
        let changed = match at {
            P::AttnScores(_) => changed.f_masked_fill(&h.f_isneginf()?, f64::NEG_INFINITY)?,
            _ => changed,
        };
        let changed = changed.f_reshape(shape.as_slice())?.f_to_kind(x.kind())?;
        Ok(if by_query { changed.f_transpose(1, 2)? } else { changed })
    }
}
