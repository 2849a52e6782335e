//! What a model is run with, as a value: base, student, gated student, steered base. A condition speaks of tokens by
//! class; here it becomes, for given rows, the gate's numbers and the taps of a pass.

use std::collections::BTreeSet;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::error::Result;
use crate::gate::Gate;
use crate::hook_point::HookPoint;
use crate::kv_cache::KvCache;
use crate::lora::Adapter;
use crate::pass::Pass;
use crate::qwen::Qwen;
use crate::tap::{Hooks, Tap};
use crate::tokens::{Prompt, TokenClass};

/// What a model is run with. The default is the bare base model.
#[derive(Clone, Debug, Default)]
pub struct Condition<'a> {
    /// The LoRA that acts, if any.
    pub adapter: Option<&'a Adapter>,
    /// At which tokens the adapter acts.
    pub gate: Gate,
    /// What is done to the residual stream, in this order.
    pub edits: Vec<Edit>,
}

/// A change of the residual stream at `blocks.{layer}.hook_resid_post`.
#[derive(Debug)]
pub enum Edit {
    /// Adds `coefficient · vector`.
    Add {
        /// The block.
        layer: usize,
        /// The vector, `[d_model]`.
        vector: Tensor,
        /// Its factor.
        coefficient: f64,
        /// The tokens.
        positions: Where,
    },
    /// Takes out the component along a direction: h − (h·v̂) v̂.
    ProjectOut {
        /// The block.
        layer: usize,
        /// The direction, `[d_model]`, of any length but zero.
        direction: Tensor,
        /// The tokens.
        positions: Where,
    },
}

/// The tokens at which an edit acts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Where {
    /// Every token, generated ones included.
    #[default]
    Everywhere,
    /// The prompt's tokens only.
    Prompt,
    /// Tokens of these classes.
    Only(BTreeSet<TokenClass>),
}

impl Clone for Edit {
    fn clone(&self) -> Self {
        match self {
            Self::Add { layer, vector, coefficient, positions } => Self::Add {
                layer: *layer,
                vector: vector.shallow_clone(),
                coefficient: *coefficient,
                positions: positions.clone(),
            },
            Self::ProjectOut { layer, direction, positions } => {
                Self::ProjectOut { layer: *layer, direction: direction.shallow_clone(), positions: positions.clone() }
            }
        }
    }
}

impl<'a> Condition<'a> {
    /// The base with an adapter acting everywhere.
    pub fn adapted(adapter: &'a Adapter) -> Self {
        Self { adapter: Some(adapter), ..Self::default() }
    }

    /// The same condition with another gate.
    #[must_use]
    pub fn gated(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// The condition spelt out for some rows.
    pub(crate) fn prepare(&self, rows: &[&Prompt], device: Device) -> Result<Prepared<'a>> {
        let adapter = self.adapter.filter(|_| !self.gate.is_nowhere());
        let gate = match adapter {
            Some(_) if !self.gate.is_everywhere() => {
                let acts = rows.iter().map(|row| self.gate.acts(row)).collect::<Result<Vec<_>>>()?;
                Some(mask(&acts, device)?)
            }
            _ => None,
        };
        let edits = self.edits.iter().map(|edit| EditTap::new(edit, rows, device)).collect::<Result<_>>()?;
        Ok(Prepared { adapter, gate, on_generated: self.gate.on_generated(), edits })
    }
}

/// Rows of on and off as `[batch, pos, 1]` in f32, off where rows are shorter.
pub fn mask(rows: &[Vec<bool>], device: Device) -> Result<Tensor> {
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut values = vec![0_f32; rows.len() * width];
    for (row, padded) in rows.iter().zip(values.chunks_mut(width.max(1))) {
        for (on, value) in row.iter().zip(padded) {
            *value = f32::from(u8::from(*on));
        }
    }
    Ok(Tensor::f_from_slice(&values)?.f_view([rows.len() as i64, width as i64, 1])?.f_to_device(device)?)
}

/// A condition spelt out for the rows of a batch, ready for passes over all of it, over pieces, or token by token.
pub(crate) struct Prepared<'a> {
    adapter: Option<&'a Adapter>,
    gate: Option<Tensor>, // [batch, pos, 1]
    on_generated: bool,
    edits: Vec<EditTap>,
}

impl Prepared<'_> {
    /// The residual stream after the last block, `[rows, at.len(), d_model]`, for positions `at` of the first `rows` rows.
    pub(crate) fn prompt(
        &mut self,
        model: &Qwen,
        batch: &Batch,
        at: Range<usize>,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let gate = self.at(batch.n_rows(), at)?;
        let on = self.adapter.is_some();
        self.pass(model, batch, on, gate, cache)
    }

    /// What `run` gives for whole rows, with one more tap, which sees what the edits left.
    pub(crate) fn listen(
        &mut self,
        model: &Qwen,
        batch: &Batch,
        points: &[HookPoint],
        tap: &mut dyn Tap,
        run: fn(&Qwen, &Batch, &mut Pass<'_>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let gate = self.at(batch.n_rows(), 0..batch.width())?;
        let adapter = self.adapter;
        let hooks = self.edits.iter_mut().fold(Hooks::default(), EditTap::hook).on(points.iter().copied(), tap);
        run(model, batch, &mut Pass { adapter, gate, hooks, ..Pass::default() })
    }

    /// The residual stream for one new token per row, generated after the prompt, `[rows, 1, d_model]`.
    pub(crate) fn generated(&mut self, model: &Qwen, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        for edit in &mut self.edits {
            edit.now = if edit.on_generated { Now::Everywhere } else { Now::Nowhere };
        }
        self.pass(model, batch, self.on_generated, None, Some(cache))
    }

    /// Points the edits at some positions of the first rows, and returns the gate there.
    fn at(&mut self, rows: usize, at: Range<usize>) -> Result<Option<Tensor>> {
        let piece = |mask: &Tensor| mask.f_narrow(0, 0, rows as i64)?.f_narrow(1, at.start as i64, at.len() as i64);
        for edit in &mut self.edits {
            edit.now = edit.mask.as_ref().map_or(Ok(Now::Everywhere), |mask| piece(mask).map(Now::At))?;
        }
        Ok(self.gate.as_ref().map(piece).transpose()?)
    }

    fn pass(
        &mut self,
        model: &Qwen,
        batch: &Batch,
        on: bool,
        gate: Option<Tensor>,
        kv_cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let hooks = self.edits.iter_mut().fold(Hooks::default(), EditTap::hook);
        let adapter = self.adapter.filter(|_| on);
        model.resid_final(batch, &mut Pass { adapter, gate, hooks, kv_cache, dropout: None })
    }
}

/// An edit with the rows' mask, as a tap.
struct EditTap {
    layer: usize,
    change: Change,
    mask: Option<Tensor>, // [batch, pos, 1]
    on_generated: bool,
    now: Now,
}

enum Change {
    Add(Tensor),        // coefficient · vector, [d_model], f32
    ProjectOut(Tensor), // unit direction, [d_model], f32
}

/// Where an edit acts in the pass that is being run.
enum Now {
    Nowhere,
    Everywhere,
    At(Tensor), // [batch, pos, 1]
}

impl EditTap {
    fn new(edit: &Edit, rows: &[&Prompt], device: Device) -> Result<Self> {
        let float = |tensor: &Tensor| tensor.f_to_device(device)?.f_to_kind(Kind::Float);
        let (layer, change, positions) = match edit {
            Edit::Add { layer, vector, coefficient, positions } => {
                (*layer, Change::Add(float(vector)?.f_mul_scalar(*coefficient)?), positions)
            }
            Edit::ProjectOut { layer, direction, positions } => {
                let direction = float(direction)?;
                let unit = direction.f_div(&direction.f_norm()?)?;
                (*layer, Change::ProjectOut(unit), positions)
            }
        };
        let (mask, on_generated) = match positions {
            Where::Everywhere => (None, true),
            Where::Prompt => {
                let on = |row: &&Prompt| (0..row.ids.len()).map(|pos| pos < row.completion.start).collect();
                (Some(mask(&rows.iter().map(on).collect::<Vec<_>>(), device)?), false)
            }
            Where::Only(classes) => {
                let on = |row: &&Prompt| row.classes.iter().map(|class| classes.contains(class)).collect();
                (Some(mask(&rows.iter().map(on).collect::<Vec<_>>(), device)?), classes.contains(&TokenClass::Gen))
            }
        };
        Ok(Self { layer, change, mask, on_generated, now: Now::Nowhere })
    }

    fn hook<'a>(hooks: Hooks<'a>, edit: &'a mut Self) -> Hooks<'a> {
        hooks.on([HookPoint::ResidPost(edit.layer)], edit)
    }
}

impl Tap for EditTap {
    fn tap(&mut self, _at: HookPoint, x: Tensor) -> Result<Tensor> {
        if matches!(self.now, Now::Nowhere) {
            return Ok(x);
        }
        let wide = x.f_to_kind(Kind::Float)?;
        let change = match &self.change {
            Change::Add(vector) => vector.shallow_clone(),
            Change::ProjectOut(unit) => wide.f_matmul(unit)?.f_unsqueeze(-1)?.f_mul(unit)?.f_neg()?,
        };
        let change = match &self.now {
            Now::At(mask) => change.f_mul(mask)?,
            _ => change,
        };
        Ok(wide.f_add(&change)?.f_to_kind(x.kind())?)
    }
}
