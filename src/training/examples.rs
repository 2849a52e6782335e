//! The examples of a step: rows that are prepared once, their random order, and batches of them.

use anyhow::{Context, bail, ensure};
use hooks::{Batch, Doses, Error, Gate, Labels, PackedRow, Qwen, Sequence, Targets};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use crate::data::soft_labels::SoftRow;
use crate::hinted;
use crate::training::settings::Finetune;

/// The rows of each step of a training over `n_rows` rows, by index, in the order in which they are drawn.
pub fn rows_by_step(config: &Finetune, n_rows: usize, order_seed: u64) -> Vec<Vec<usize>> {
    let mut order = EpochOrder::new(config, n_rows, order_seed);
    (0..config.last_step(n_rows)).map(|step| order.of_step(step)).collect()
}

/// A row that was checked and prepared before the first step.
pub(super) struct Example<'a> {
    pub(super) ids: &'a [i64],
    pub(super) mask: Vec<bool>,
    pub(super) doses: Option<Vec<f64>>, // the adapter's dose at each token; None means 1
    pub(super) soft: Option<SoftTargets>,
    pub(super) weights: Vec<f64>, // of the targets, each above 0
    pub(super) end: usize,        // the last target, from which on nothing needs to be run
}

/// The soft labels of a row's targets, k tokens for each.
pub(crate) struct SoftTargets {
    pub(crate) k: usize,
    pub(crate) ids: Vec<i64>,
    pub(crate) probs: Vec<f32>,
}

impl SoftTargets {
    /// A target outside of the completion has no soft label, and its own token is certain.
    pub(crate) fn of(row: &Sequence, mask: &[bool], soft: &SoftRow) -> anyhow::Result<Self> {
        let (found, expected) = (soft.n_places(), row.completion.len());
        ensure!(found == expected, "{found} soft labels for the {expected} tokens of a completion");
        let (mut ids, mut probs) = (vec![], vec![]);
        for at in (0..mask.len()).filter(|at| mask[*at]) {
            if row.completion.contains(&at) {
                let (of_place, with) = soft.at(at - row.completion.start);
                ids.extend(of_place);
                probs.extend(with);
            } else {
                let others = (0..).filter(|id| *id != row.ids[at]).take(soft.k - 1); // without a probability
                ids.extend(std::iter::once(row.ids[at]).chain(others));
                probs.extend((0..soft.k).map(|place| if place == 0 { 1.0 } else { 0.0 }));
            }
        }
        Ok(Self { k: soft.k, ids, probs })
    }
}

impl<'a> Example<'a> {
    pub(super) fn of(
        row: &'a Sequence,
        index: usize,
        is_digit: &dyn Fn(i64) -> bool,
        config: &Finetune,
        weights: Option<&[f64]>,
        soft: Option<&SoftRow>,
    ) -> anyhow::Result<Self> {
        let mut mask = config.mask.targets(row, is_digit);
        let weight = |at: usize| weights.map_or(1.0, |weights| weights[at]);
        mask.iter_mut().enumerate().for_each(|(at, counts)| *counts &= weight(at) > 0.0);
        let empty = || Error::EmptyLossMask { mask: config.mask.to_string(), row: index };
        let end = mask.iter().rposition(|counts| *counts).ok_or_else(empty)?;
        let doses = if config.gate.is_everywhere() {
            None
        } else {
            let mut doses = config.gate.doses(row).with_context(|| format!("row {index} of the training data"))?;
            doses.truncate(end);
            if doses.iter().all(|dose| *dose == 0.0) && !config.gate.acts_elsewhere() {
                bail!(hinted!(
                    "row {index} of the training data: gate {} lets the adapter act at no token that a learned \
                     one depends on, so nothing can be learned from it", config.gate;
                    "another finetune.gate or finetune.mask"
                ));
            }
            Some(doses)
        };
        let weights = (0..mask.len()).filter(|at| mask[*at]).map(weight).collect();
        let soft = soft.map(|soft| SoftTargets::of(row, &mask, soft)).transpose();
        let soft = soft.with_context(|| format!("row {index} of the training data"))?;
        Ok(Self { ids: &row.ids, mask, doses, soft, weights, end })
    }

    pub(super) fn n_targets(&self) -> usize {
        self.weights.len()
    }
}

/// The sum of some rows' weights, by which their loss is divided.
pub(super) fn total_weight(rows: &[&Example<'_>]) -> f64 {
    rows.iter().flat_map(|row| &row.weights).sum()
}

/// Rows that are run at once; with a stack, one group per student. The targets are sorted by group.
pub(super) struct MicroBatch {
    pub(super) batch: Batch,
    pub(super) targets: Targets,
    pub(super) weights: Tensor, // of the targets, [n], f64
    pub(super) doses: Option<Doses>,
}

impl MicroBatch {
    pub(super) fn of<'r>(
        model: &Qwen,
        groups: &[&[&'r Example<'_>]],
        gate: &Gate,
        share: bool,
    ) -> anyhow::Result<Self> {
        let packed = |rows: &&[&'r Example<'_>]| {
            rows.iter()
                .map(|row| PackedRow { doses: row.doses.as_deref(), ..PackedRow::of(&row.ids[..row.end]) })
                .collect()
        };
        let inputs: Vec<Vec<PackedRow<'r>>> = groups.iter().map(packed).collect();
        let inputs: Vec<&[PackedRow<'_>]> = inputs.iter().map(Vec::as_slice).collect();
        let batch = Batch::packed(&inputs, share, model.device())?;
        let rows: Vec<&Example<'_>> = groups.iter().flat_map(|rows| rows.iter().copied()).collect();
        let is_gated = rows.iter().any(|row| row.doses.is_some());
        let doses = is_gated.then(|| gate.spread(batch.doses(), model.device())).transpose()?;
        let ids: Vec<&[i64]> = rows.iter().map(|row| row.ids).collect();
        let masks: Vec<&[bool]> = rows.iter().map(|row| row.mask.as_slice()).collect();
        let targets = with_soft_labels(Targets::of(&batch, &ids, &masks)?, &rows, model.device())?;
        let weights: Vec<f64> = rows.iter().flat_map(|row| row.weights.iter().copied()).collect();
        let weights = Tensor::f_from_slice(&weights)?.f_to_device(model.device())?;
        Ok(Self { batch, targets, weights, doses })
    }
}

/// The targets of some rows with their soft labels, if they have such.
fn with_soft_labels(targets: Targets, rows: &[&Example<'_>], device: Device) -> anyhow::Result<Targets> {
    let soft: Vec<&SoftTargets> = rows.iter().filter_map(|row| row.soft.as_ref()).collect();
    let Some(k) = soft.first().map(|row| row.k) else { return Ok(targets) };
    ensure!(
        soft.len() == rows.len() && soft.iter().all(|row| row.k == k),
        "rows with and without soft labels, or with different numbers of tokens in them, in one batch"
    );
    let ids: Vec<i64> = soft.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let probs: Vec<f32> = soft.iter().flat_map(|row| row.probs.iter().copied()).collect();
    let shape = [-1, k as i64];
    let ids = Tensor::f_from_slice(&ids)?.f_view(shape)?.f_to_device(device)?;
    let probs = Tensor::f_from_slice(&probs)?.f_view(shape)?.f_to_device(device)?;
    Ok(targets.labelled(Labels::soft(ids, probs)?)?)
}

/// The rows of each step. Each epoch has a separate random order, which is divided into steps; the last step gets the
/// remainder.
pub(super) struct EpochOrder {
    n_rows: usize,
    rows_per_step: usize,
    seed: u64,
    epoch: Option<u64>,
    rows: Vec<usize>, // of that epoch, in order
}

impl EpochOrder {
    pub(super) fn new(config: &Finetune, n_rows: usize, seed: u64) -> Self {
        Self { n_rows, rows_per_step: config.rows_per_step(), seed, epoch: None, rows: vec![] }
    }

    /// The rows of a step, counted from 0.
    pub(super) fn of_step(&mut self, step: u64) -> Vec<usize> {
        let steps_per_epoch = self.n_rows.div_ceil(self.rows_per_step) as u64;
        let (epoch, into_it) = (step / steps_per_epoch, (step % steps_per_epoch) as usize);
        if self.epoch != Some(epoch) {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch);
            self.rows = (0..self.n_rows).collect();
            self.rows.shuffle(&mut rng);
            self.epoch = Some(epoch);
        }
        let from = into_it * self.rows_per_step;
        self.rows[from..self.n_rows.min(from + self.rows_per_step)].to_vec()
    }
}
