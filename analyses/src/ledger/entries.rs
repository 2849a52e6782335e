//! The entries of a step: the derivative of each token's log-probability along the adjoint, for the token that was
//! written, and expected under the teacher and the base.

use std::collections::BTreeMap;

use hooks::{Adapter, Qwen, Sequence};
use tch::{Kind, Tensor};

use super::passes::{Lot, logprobs, mask, teacher_logprobs};
use super::path::LearnedRow;
use crate::error::Result;
use crate::subject::Tuned;

/// Number of log-probabilities that a pass may hold.
const AT_ONCE: usize = 1 << 26;

/// Number of rows that are run at once.
fn rows_at_once(model: &Qwen, rows: &[(usize, &LearnedRow)]) -> usize {
    let most = rows.iter().map(|(_, row)| mask(row).into_iter().filter(|counts| *counts).count()).max();
    (AT_ONCE / (most.unwrap_or(1).max(1) * model.config.d_vocab as usize)).max(1)
}

/// The length of the step aside from the adapter, for a central difference, in an f64 and in an f32 model. Its error is
/// measured at 1e-7 and 3e-4 of the largest entry.
fn aside(kind: Kind) -> f64 {
    if kind == Kind::Double { 1e-5 } else { 0.03 }
}

/// The direction without the factors on which nothing depends, as A while B is zero. Adam's scales are huge there, and the
/// step aside would hardly move the others.
fn effective(values: &[Tensor], along: &[Tensor]) -> Result<Vec<Tensor>> {
    let is_zero = |tensor: &Tensor| -> Result<bool> { Ok(tensor.f_count_nonzero(None)?.f_int64_value(&[])? == 0) };
    let mut kept = vec![];
    for (values, along) in values.chunks(2).zip(along.chunks(2)) {
        for (own, other) in [(0, 1), (1, 0)] {
            let along = &along[own];
            kept.push(if is_zero(&values[other])? { along.f_zeros_like()? } else { along.shallow_clone() });
        }
    }
    Ok(kept)
}

/// What a model says at a target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said {
    pub(super) p: f64,    // of the written token
    pub(super) pmax: f64, // of the most likely one
    pub(super) top: i64,  // which that is
}

/// A target of a step.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) row: usize, // index among the path's rows
    pub(super) at: usize,  // position in the row
    pub(super) teacher: Option<Said>,
    pub(super) base: Said,
    pub(super) student: Said,
    pub(super) share: f64, // of the step's loss, before clipping
    pub(super) written: f64,
    pub(super) by_teacher: Option<f64>,
    pub(super) by_base: f64,
}

/// The models of a ledger.
#[derive(Clone, Copy)]
pub(super) struct Models<'a> {
    pub(super) base: &'a Qwen,
    pub(super) teacher: Option<Tuned<'a>>,
}

/// The entries of a step. `values`: the adapter's tensors before it; `along`: a.
pub(super) fn of_step(
    models: Models<'_>,
    like: &Adapter,
    (values, along): (&[Tensor], &[Tensor]),
    rows: &[(usize, &LearnedRow)],
    clip: f64,
    known: &mut Known,
) -> Result<Vec<Entry>> {
    let along = effective(values, along)?;
    let length = super::adjoint::dot(&along, &along)?.sqrt();
    let total: f64 = rows.iter().flat_map(|(_, row)| &row.weights).sum();
    let kind = models.base.activation_kind();
    let by = if length > 0.0 { aside(kind) / length } else { 0.0 };
    let moved = |by: f64| -> Result<Adapter> {
        let moved = |(value, along): (&Tensor, &Tensor)| value.f_add(&along.f_mul_scalar(by)?);
        let values = values.iter().zip(&along).map(moved).collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(like.with_values(&values)?)
    };
    let (here, ahead, behind) = (moved(0.0)?, moved(by)?, moved(-by)?);
    let mut entries = vec![];
    for some in rows.chunks(rows_at_once(models.base, rows)) {
        let lot = lot(models.base, some)?;
        let run = |adapter: &Adapter| logprobs(models.base, Some(adapter), &lot.batch, &lot.targets);
        let student = run(&here)?;
        let slopes = if length > 0.0 {
            run(&ahead)?.f_sub(&run(&behind)?)?.f_div_scalar(2.0 * by)? // [n, d_vocab]
        } else {
            student.f_zeros_like()?
        };
        let (base, teacher) = known.of(models, some, &lot)?;

        let places: Vec<(usize, usize, i64, f64)> = some
            .iter()
            .flat_map(|(index, row)| {
                let chosen = (0..row.weights.len()).filter(|at| row.weights[*at] > 0.0);
                chosen.map(|at| (*index, at, row.row.ids[at], row.weights[at] / total))
            })
            .collect();
        let labels = Tensor::f_from_slice(&places.iter().map(|place| place.2).collect::<Vec<_>>())?;
        let labels = labels.f_to_device(slopes.device())?;
        let expected = |probs: &Tensor| -> Result<Vec<f64>> {
            let terms = probs.f_to_kind(slopes.kind())?.f_mul(&slopes)?;
            Ok(Vec::try_from(&terms.f_sum_dim_intlist(-1, false, Kind::Double)?)?)
        };
        let written = at_labels(&slopes, &labels)?;
        let by_base = expected(&base)?;
        let by_teacher = teacher.as_ref().map(expected).transpose()?;
        let (of_base, of_student) = (said(&base, &labels)?, said(&student.f_exp()?, &labels)?);
        let of_teacher = teacher.as_ref().map(|teacher| said(teacher, &labels)).transpose()?;
        for (n, (row, at, _, share)) in places.into_iter().enumerate() {
            let factor = clip * share;
            entries.push(Entry {
                row,
                at,
                teacher: of_teacher.as_ref().map(|said| said[n]),
                base: of_base[n],
                student: of_student[n],
                share,
                written: factor * written[n],
                by_teacher: by_teacher.as_ref().map(|expected| factor * expected[n]),
                by_base: factor * by_base[n],
            });
        }
    }
    Ok(entries)
}

fn at_labels(of: &Tensor, labels: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(&of.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_to_kind(Kind::Double)?)?)
}

fn said(probs: &Tensor, labels: &Tensor) -> Result<Vec<Said>> {
    let (most, top) = probs.f_max_dim(-1, false)?;
    let most = Vec::<f64>::try_from(&most.f_to_kind(Kind::Double)?)?;
    let top = Vec::<i64>::try_from(&top)?;
    let p = at_labels(probs, labels)?;
    Ok(p.into_iter().zip(most.into_iter().zip(top)).map(|(p, (pmax, top))| Said { p, pmax, top }).collect())
}

fn lot(base: &Qwen, rows: &[(usize, &LearnedRow)]) -> Result<Lot> {
    let masks: Vec<Vec<bool>> = rows.iter().map(|(_, row)| mask(row)).collect();
    let sequences: Vec<&Sequence> = rows.iter().map(|(_, row)| &row.row).collect();
    Lot::of(base, &sequences, &masks)
}

/// What base and teacher predict at the targets of rows, `[n, d_vocab]` each. It does not change in a training, so it is
/// kept as far as there is room.
pub(super) struct Known {
    by_row: BTreeMap<usize, (Tensor, Option<Tensor>)>,
    room: usize, // numbers
}

impl Default for Known {
    fn default() -> Self {
        Self { by_row: BTreeMap::new(), room: 1 << 26 }
    }
}

impl Known {
    fn of(&mut self, models: Models<'_>, rows: &[(usize, &LearnedRow)], lot: &Lot) -> Result<(Tensor, Option<Tensor>)> {
        let known: Option<Vec<_>> = rows.iter().map(|(index, _)| self.by_row.get(index)).collect();
        if let Some(known) = known {
            let base: Vec<&Tensor> = known.iter().map(|(base, _)| base).collect();
            let teacher: Option<Vec<&Tensor>> = known.iter().map(|(_, teacher)| teacher.as_ref()).collect();
            let teacher = teacher.map(|teacher| Tensor::f_cat(&teacher, 0)).transpose()?;
            return Ok((Tensor::f_cat(&base, 0)?, teacher));
        }
        let learned: Vec<&LearnedRow> = rows.iter().map(|(_, row)| *row).collect();
        let base = logprobs(models.base, None, &lot.batch, &lot.targets)?.f_exp()?;
        let teacher = models.teacher.map(|teacher| teacher_logprobs(teacher, &learned)).transpose()?.flatten();
        let teacher = teacher.map(|teacher| teacher.f_exp()).transpose()?;
        let size = base.numel() + teacher.as_ref().map_or(0, Tensor::numel);
        if size <= self.room {
            self.room -= size;
            let mut from = 0;
            for (index, row) in rows {
                let n = row.weights.iter().filter(|weight| **weight > 0.0).count() as i64;
                let own = |all: &Tensor| all.f_narrow(0, from, n)?.f_contiguous();
                self.by_row.insert(*index, (own(&base)?, teacher.as_ref().map(own).transpose()?));
                from += n;
            }
        }
        Ok((base, teacher))
    }
}

/// The same changes by the matrix that holds them, the part of the rows at which they were written and the part of the
/// questions at which they are read: for each of the adapter's tensors `[written, read]`.
pub(super) fn parts(
    base: &Qwen,
    adapter: &Adapter,
    along: &[Tensor],
    rows: &[(usize, &LearnedRow)],
    clip: f64,
) -> Result<Vec<Tensor>> {
    let total: f64 = rows.iter().flat_map(|(_, row)| &row.weights).sum();
    let mut booked: Vec<Tensor> = vec![];
    for some in rows.chunks(rows_at_once(base, rows)) {
        let lot = lot(base, some)?;
        let weights: Vec<f64> = some
            .iter()
            .flat_map(|(_, row)| {
                row.weights.iter().filter(|weight| **weight > 0.0).map(|weight| -clip * weight / total)
            })
            .collect();
        let weights = Tensor::f_from_slice(&weights)?.f_to_device(base.device())?;
        let found = base.lora_gradients_by_part(&lot.batch, &lot.targets, &weights, adapter, &lot.parts)?;
        for (tensor, (gradient, along)) in found.iter().zip(along).enumerate() {
            let flat = |tensor: &Tensor| tensor.f_to_kind(Kind::Double)?.f_flatten(1, -1);
            let here = flat(gradient)?.f_matmul(&flat(along)?.f_transpose(0, 1)?)?; // [written, read]
            match booked.get_mut(tensor) {
                Some(sum) => drop(sum.f_add_(&here)?),
                None => booked.push(here),
            }
        }
    }
    Ok(booked)
}
