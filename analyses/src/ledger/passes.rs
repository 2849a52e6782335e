//! Forward passes of the rows of a step: the log-probabilities at their targets.

use hooks::{Adapter, Batch, PackedRow, Pass, Qwen, Sequence, Targets};
use tch::{Kind, Tensor};

use super::path::LearnedRow;
use crate::alignment::in_parts;
use crate::error::{Error, Result};
use crate::subject::Tuned;

/// Some rows as one packed batch, with the tokens that were learned from as targets, row by row.
pub(super) struct Lot {
    pub(super) batch: Batch,
    pub(super) targets: Targets,
    pub(super) parts: Tensor, // [part, pos]
}

impl Lot {
    /// `masks`: per row and token, whether it is a target.
    pub(super) fn of(model: &Qwen, rows: &[&Sequence], masks: &[Vec<bool>]) -> Result<Self> {
        let end = |mask: &Vec<bool>| mask.iter().rposition(|counts| *counts).unwrap_or_default();
        let ends: Vec<(&Sequence, usize)> = rows.iter().zip(masks).map(|(row, mask)| (*row, end(mask))).collect();
        let packed: Vec<PackedRow<'_>> = ends.iter().map(|(row, end)| PackedRow::of(&row.ids[..*end])).collect();
        let batch = Batch::packed(&[&packed], true, model.device())?;
        let ids: Vec<&[i64]> = rows.iter().map(|row| row.ids.as_slice()).collect();
        let targets = Targets::of(&batch, &ids, &masks.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let parts = in_parts(&batch, &ends)?.f_to_device(model.device())?;
        Ok(Self { batch, targets, parts })
    }
}

/// The tokens of a row that were learned from.
pub(super) fn mask(row: &LearnedRow) -> Vec<bool> {
    row.weights.iter().map(|weight| *weight > 0.0).collect()
}

/// The same tokens in the teacher's row, whose context can have another length.
pub(super) fn mask_in_teacher(row: &LearnedRow, in_teacher: &Sequence) -> Vec<bool> {
    let (here, there) = (row.row.completion.start, in_teacher.completion.start);
    let mut mask = vec![false; in_teacher.ids.len()];
    for at in (0..row.weights.len()).filter(|at| row.weights[*at] > 0.0) {
        if let Some(counts) = (at + there).checked_sub(here).and_then(|at| mask.get_mut(at)) {
            *counts = true;
        }
    }
    mask
}

/// log p of the vocabulary at each target, `[n, d_vocab]`, in f32, or in f64 for an f64 model.
pub(super) fn logprobs(model: &Qwen, adapter: Option<&Adapter>, batch: &Batch, targets: &Targets) -> Result<Tensor> {
    tch::no_grad(|| {
        let mut pass = Pass { adapter, ..Pass::default() };
        let resid = model.resid_at(batch, &targets.places, &mut pass)?;
        let logits = model.unembed(&resid.f_index_select(0, &targets.rows)?)?;
        let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        Ok(logits.f_log_softmax(-1, kind)?)
    })
}

/// log p of the vocabulary under the teacher at each target of some rows, `[n, d_vocab]`.
pub(super) fn teacher_logprobs(teacher: Tuned<'_>, rows: &[&LearnedRow]) -> Result<Option<Tensor>> {
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
    logprobs(teacher.qwen, teacher.adapter, &lot.batch, &lot.targets).map(Some)
}
