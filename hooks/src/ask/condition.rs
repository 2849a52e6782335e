//! The adapter, gate and edits that a model is run with, as a value: base, student, gated student, steered base. A
//! condition names tokens; for given rows it is turned into the gate's doses and the taps of a pass.

use std::ops::Range;

use tch::Tensor;

use crate::adapter::dose::Doses;
use crate::adapter::gate::Gate;
use crate::adapter::lora::Adapter;
use crate::chat::tokens::Sequence;
use crate::error::Result;
use crate::hook_point::HookPoint;
use crate::model::pass::Pass;
use crate::model::qwen::Qwen;
use crate::rows::batch::Batch;
use crate::rows::kv_cache::KvCache;
use crate::taps::edit::{self, Edit, EditTap};
use crate::taps::tap::{Hooks, Tap, TapAt};

/// The adapter, gate and edits that a model is run with. The default is the bare base model.
///
/// ```
/// use hooks::{Adapter, Condition, LoraConfig, tch::Device};
/// use rand::SeedableRng;
///
/// let (model, chat) = hooks::open("tiny-random")?;
/// let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
/// let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut rng, Device::Cpu)?;
/// let student = Condition::adapted(&adapter);
/// let gated = student.clone().gated("except:template".parse()?);
/// gated.check(&model, &[chat.prompt(None, "Name an animal.")?])?;
/// # Ok::<(), hooks::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Condition<'a> {
    /// The LoRA that acts, if any.
    pub adapter: Option<&'a Adapter>,
    /// Where and how strongly the adapter acts.
    pub gate: Gate,
    /// The edits of activations, in the order in which they are made.
    pub edits: Vec<Edit>,
}

impl<'a> Condition<'a> {
    /// The base with an adapter acting everywhere.
    pub fn adapted(adapter: &'a Adapter) -> Self {
        Self { adapter: Some(adapter), ..Self::default() }
    }

    /// This condition with another gate.
    #[must_use]
    pub fn gated(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Refuses a condition that does not fit the rows, before anything is run: it names tokens that they lack, or has
    /// tensors of another shape.
    pub fn check(&self, model: &Qwen, rows: &[Sequence]) -> Result<()> {
        self.prepare(&rows.iter().collect::<Vec<_>>(), model, None).map(drop)
    }

    /// The adapter's doses at the rows' tokens, `[row][pos]`; `None` if there is no adapter or all doses are 1.
    pub(crate) fn doses(&self, rows: &[&Sequence]) -> Result<Option<Vec<Vec<f64>>>> {
        let Some(adapter) = self.adapter.filter(|_| !self.gate.is_everywhere()) else { return Ok(None) };
        self.gate.check(adapter)?;
        Ok(Some(rows.iter().map(|row| self.gate.doses(row)).collect::<Result<_>>()?))
    }

    /// The adapter that acts, if any, and its doses at a row's tokens, unless all are 1.
    pub(crate) fn acting(&self, row: &Sequence) -> Result<(Option<&'a Adapter>, Option<Vec<f64>>)> {
        let doses = self.doses(&[row])?.map(|rows| rows.concat());
        Ok(if self.gate.is_nowhere() { (None, None) } else { (self.adapter, doses) })
    }

    /// The taps of the edits, for rows that are packed.
    pub(crate) fn taps(&self, rows: &[&Sequence], batch: &Batch, model: &Qwen) -> Result<Vec<EditTap>> {
        let tap =
            |edit| EditTap::new(edit, rows, &model.config, model.device(), model.activation_kind())?.packed(batch);
        self.edits.iter().map(tap).collect()
    }

    /// Prepares the condition for rows that are padded.
    pub(crate) fn prepare<'p>(&self, rows: &[&Sequence], model: &Qwen, tap: Option<TapAt<'p>>) -> Result<Prepared<'p>>
    where
        'a: 'p,
    {
        let (device, gate) = (model.device(), self.gate.clone());
        let doses = self.doses(rows)?;
        let shared = doses.as_deref().map_or(usize::MAX, edit::alike);
        let doses = doses.map(|doses| gate.spread(&doses, device)).transpose()?;
        let adapter = self.adapter.filter(|_| !gate.is_nowhere());
        let edits =
            self.edits.iter().map(|edit| EditTap::new(edit, rows, &model.config, device, model.activation_kind()));
        let edits = edits.collect::<Result<Vec<_>>>()?;
        let shared = edits.iter().map(EditTap::alike).fold(shared, usize::min);
        Ok(Prepared { adapter, gate, doses, edits, tap, shared })
    }
}

/// A condition prepared for the rows of a batch: for passes over all of it, over pieces, or token by token.
pub(crate) struct Prepared<'a> {
    adapter: Option<&'a Adapter>,
    gate: Gate,
    doses: Option<Doses>,
    edits: Vec<EditTap>,
    /// A tap that sees every pass, after the edits.
    tap: Option<TapAt<'a>>,
    /// Number of positions, from the start, that gate and edits treat the same in all rows.
    pub(crate) shared: usize,
}

impl Prepared<'_> {
    /// The residual stream after the last block, `[rows, at.len(), d_model]`, for positions `at` of the first `rows`
    /// rows.
    pub(crate) fn prompt(
        &mut self,
        model: &Qwen,
        batch: &Batch,
        at: Range<usize>,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let gate = self.at(batch.n_rows(), at)?;
        self.pass(model, batch, self.adapter, gate, cache)
    }

    /// The result of `run` on whole rows, with one more tap, which sees the activations after the edits.
    pub(crate) fn run_with_hooks(
        &mut self,
        model: &Qwen,
        batch: &Batch,
        points: &[HookPoint],
        tap: &mut dyn Tap,
        run: impl FnOnce(&Qwen, &Batch, &mut Pass<'_>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let gate = self.at(batch.n_rows(), 0..batch.width())?;
        let hooks = self.edits.iter_mut().fold(Hooks::default(), EditTap::hook).on(points.iter().copied(), tap);
        run(model, batch, &mut Pass { adapter: self.adapter, doses: gate, hooks, ..Pass::default() })
    }

    /// The residual stream for one new token per row, generated after the prompt, `[rows, 1, d_model]`.
    pub(crate) fn generated(&mut self, model: &Qwen, ids: &[i64], cache: &mut KvCache) -> Result<Tensor> {
        for edit in &mut self.edits {
            edit.point_at_generated(ids)?;
        }
        let (mut adapter, mut gate) = (self.adapter, None);
        if self.doses.is_some() {
            let doses: Vec<Vec<f64>> = ids.iter().map(|id| vec![self.gate.generated(*id)]).collect();
            let spread = self.gate.spread(&doses, model.device())?;
            // If the adapter acts at none of these tokens, its part is not computed.
            if spread.elsewhere == 0.0 && doses.iter().flatten().all(|dose| *dose == 0.0) {
                adapter = None;
            } else {
                gate = Some(spread);
            }
        }
        let batch = Batch::from_ids(&ids.chunks(1).collect::<Vec<_>>(), model.device())?;
        self.pass(model, &batch, adapter, gate, Some(cache))
    }

    /// Points the edits at some positions of the first rows, and returns the doses there.
    fn at(&mut self, rows: usize, at: Range<usize>) -> Result<Option<Doses>> {
        for edit in &mut self.edits {
            edit.point(rows, &at)?;
        }
        self.doses.as_ref().map(|doses| doses.narrow(rows, &at)).transpose()
    }

    fn pass(
        &mut self,
        model: &Qwen,
        batch: &Batch,
        adapter: Option<&Adapter>,
        gate: Option<Doses>,
        kv_cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let hooks = self.edits.iter_mut().fold(Hooks::default(), EditTap::hook);
        let hooks = match &mut self.tap {
            Some((points, tap)) => hooks.on(points.iter().copied(), &mut **tap),
            None => hooks,
        };
        model.resid_final(batch, &mut Pass { adapter, doses: gate, hooks, kv_cache, dropout: None })
    }
}

/// Runs one row and lets a tap see (or change) some hook points, after the condition's edits. Returns the logits, `[1,
/// pos, d_vocab]`. Gradients flow unless the caller turned them off.
pub fn run_with_hooks(
    model: &Qwen,
    row: &Sequence,
    condition: &Condition<'_>,
    points: &[HookPoint],
    tap: &mut dyn Tap,
) -> Result<Tensor> {
    run_rows_with_hooks(model, &[row], condition, points, tap, Qwen::forward)
}

/// Runs several rows, padded on the right, while a tap sees some hook points. `run` is `Qwen::forward`,
/// `Qwen::resid_final` or, to stop early, `Qwen::resid_before`.
pub fn run_rows_with_hooks(
    model: &Qwen,
    rows: &[&Sequence],
    condition: &Condition<'_>,
    points: &[HookPoint],
    tap: &mut dyn Tap,
    run: impl FnOnce(&Qwen, &Batch, &mut Pass<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    let batch = Batch::of(rows, model.device())?;
    condition.prepare(rows, model, None)?.run_with_hooks(model, &batch, points, tap, run)
}
