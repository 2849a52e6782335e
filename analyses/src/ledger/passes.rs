//! Forward passes of the rows of a step: the log-probabilities at their targets.

use hooks::{Adapter, Batch, Doses, Gate, Labels, PackedRow, Pass, Qwen, Sequence, Targets};
use tch::{Device, Kind, Tensor};

use super::path::{LearnedRow, SoftTargets};
use crate::alignment::in_parts;
use crate::error::{Error, Result};
use crate::subject::Tuned;

/// Number of logits that a pass may hold.
const AT_ONCE: usize = 1 << 26;

/// Number of rows that are run at once, if none has more targets than `most`.
pub(super) fn rows_at_once(model: &Qwen, most: usize) -> usize {
    (AT_ONCE / (most.max(1) * model.config.d_vocab as usize)).max(1)
}

/// Some rows as one packed batch, with their targets row by row.
pub(super) struct Lot {
    pub(super) batch: Batch,
    pub(super) targets: Targets,
    pub(super) parts: Tensor, // [part, pos]
    pub(super) doses: Option<Doses>,
}

impl Lot {
    /// `masks`: per row and token, whether it is a target.
    pub(super) fn of(model: &Qwen, rows: &[&Sequence], masks: &[Vec<bool>]) -> Result<Self> {
        Self::packed(model, rows, masks, &vec![None; rows.len()])
    }

    /// Rows that were learned from, with the doses and the labels of their training.
    pub(super) fn learned(model: &Qwen, rows: &[&LearnedRow], gate: &Gate) -> Result<Self> {
        let masks: Vec<Vec<bool>> = rows.iter().map(|row| mask(row)).collect();
        let sequences: Vec<&Sequence> = rows.iter().map(|row| &row.row).collect();
        let doses: Vec<Option<&[f64]>> = rows.iter().map(|row| row.doses.as_deref()).collect();
        let mut lot = Self::packed(model, &sequences, &masks, &doses)?;
        if doses.iter().any(Option::is_some) {
            lot.doses = Some(gate.spread(lot.batch.doses(), model.device())?);
        }
        if let Some(labels) = soft_labels(rows, model.device())? {
            lot.targets = lot.targets.labelled(labels)?;
        }
        Ok(lot)
    }

    fn packed(model: &Qwen, rows: &[&Sequence], masks: &[Vec<bool>], doses: &[Option<&[f64]>]) -> Result<Self> {
        let end = |mask: &Vec<bool>| mask.iter().rposition(|counts| *counts).unwrap_or_default();
        let ends: Vec<(&Sequence, usize)> = rows.iter().zip(masks).map(|(row, mask)| (*row, end(mask))).collect();
        let packed: Vec<PackedRow<'_>> = ends
            .iter()
            .zip(doses)
            .map(|((row, end), doses)| PackedRow {
                doses: doses.map(|doses| &doses[..*end]),
                ..PackedRow::of(&row.ids[..*end])
            })
            .collect();
        let batch = Batch::packed(&[&packed], true, model.device())?;
        let ids: Vec<&[i64]> = rows.iter().map(|row| row.ids.as_slice()).collect();
        let targets = Targets::of(&batch, &ids, &masks.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let parts = in_parts(&batch, &ends)?.f_to_device(model.device())?;
        Ok(Self { batch, targets, parts, doses: None })
    }
}

/// The soft labels of some rows' targets, if they have such.
fn soft_labels(rows: &[&LearnedRow], device: Device) -> Result<Option<Labels>> {
    let soft: Vec<&SoftTargets> = rows.iter().filter_map(|row| row.soft.as_ref()).collect();
    let Some(k) = soft.first().map(|row| row.k as i64) else { return Ok(None) };
    let ids: Vec<i64> = soft.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let probs: Vec<f32> = soft.iter().flat_map(|row| row.probs.iter().copied()).collect();
    let of_shape = |tensor: Tensor| tensor.f_view([-1, k])?.f_to_device(device);
    Ok(Some(Labels::soft(of_shape(Tensor::f_from_slice(&ids)?)?, of_shape(Tensor::f_from_slice(&probs)?)?)?))
}

/// The tokens of a row that were learned from.
pub(super) fn mask(row: &LearnedRow) -> Vec<bool> {
    row.weights.iter().map(|weight| *weight > 0.0).collect()
}

/// The same tokens in the teacher's row, whose context can have another length.
fn mask_in_teacher(row: &LearnedRow, in_teacher: &Sequence) -> Vec<bool> {
    let (here, there) = (row.row.completion.start, in_teacher.completion.start);
    let mut mask = vec![false; in_teacher.ids.len()];
    for at in (0..row.weights.len()).filter(|at| row.weights[*at] > 0.0) {
        if let Some(counts) = (at + there).checked_sub(here).and_then(|at| mask.get_mut(at)) {
            *counts = true;
        }
    }
    mask
}

/// The probabilities of the vocabulary at each target, `[n, d_vocab]`.
pub(super) fn probabilities(model: &Qwen, adapter: Option<&Adapter>, lot: &Lot) -> Result<Tensor> {
    tch::no_grad(|| {
        let mut pass = Pass { adapter, ..Pass::default() };
        let resid = model.resid_at(&lot.batch, &lot.targets.places, &mut pass)?;
        softmax(&model.unembed(&resid.f_index_select(0, &lot.targets.rows)?)?)
    })
}

/// softmax over the vocabulary, in f32, or in f64 of an f64 model's logits.
pub(super) fn softmax(logits: &Tensor) -> Result<Tensor> {
    let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    Ok(logits.f_softmax(-1, kind)?)
}

/// The probabilities of the vocabulary under the teacher at each target of some rows, `[n, d_vocab]`; `None` without a
/// teacher.
pub(super) fn teacher_probabilities(teacher: Tuned<'_>, rows: &[&LearnedRow]) -> Result<Option<Tensor>> {
    let in_teacher: Option<Vec<(&LearnedRow, &Sequence)>> =
        rows.iter().map(|row| Some((*row, row.in_teacher.as_ref()?))).collect();
    let Some(in_teacher) = in_teacher else { return Ok(None) };
    if !teacher.edits.is_empty() {
        return Err(Error::setting(
            "ledger",
            "teacher",
            "a teacher without edits of its activations",
            &"a steered one",
        ));
    }
    let masks: Vec<Vec<bool>> = in_teacher.iter().map(|(row, there)| mask_in_teacher(row, there)).collect();
    let sequences: Vec<&Sequence> = in_teacher.iter().map(|(_, there)| *there).collect();
    let lot = Lot::of(teacher.qwen, &sequences, &masks)?;
    probabilities(teacher.qwen, teacher.adapter, &lot).map(Some)
}
