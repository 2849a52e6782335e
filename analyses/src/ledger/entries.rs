//! The books of a step: the derivative of each token's log-probability along the adjoint, for the token that was written,
//! and expected under the teacher and the base; and the same changes by matrix and part of the chat.

use std::collections::BTreeMap;

use hooks::{Adapter, Gate, Qwen};
use tch::{Kind, Tensor};

use super::adjoint::whole;
use super::passes::{Lot, mask, probabilities, rows_at_once, softmax, teacher_probabilities};
use super::path::LearnedRow;
use crate::error::Result;
use crate::subject::Tuned;

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
    pub(super) loss: f64,             // times its share of the step's
    pub(super) changes: Vec<Changes>, // of each measure
}

/// What is booked to a target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changes {
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

/// The books of a step: its entries, and for each measure and each of the adapter's tensors the sums of entries by the part
/// of the rows at which they were written and the part of the questions at which they are read, `[written, read]`.
///
/// `adapter`: that before the step; `along`: for each measure the adjoint a, `[read, ..]` of each tensor.
pub(super) fn of_step(
    models: Models<'_>,
    (adapter, along): (&Adapter, &[Vec<Tensor>]),
    rows: &[(usize, &LearnedRow)],
    (gate, clip): (&Gate, f64),
    known: &mut Known,
) -> Result<(Vec<Entry>, Vec<Vec<Tensor>>)> {
    let directions = along.iter().map(|along| whole(along)).collect::<Result<Vec<_>>>()?;
    let total: f64 = rows.iter().flat_map(|(_, row)| &row.weights).sum();
    let most = rows.iter().map(|(_, row)| mask(row).into_iter().filter(|counts| *counts).count()).max();
    let (mut entries, mut parts): (Vec<Entry>, Vec<Vec<Tensor>>) = (vec![], along.iter().map(|_| vec![]).collect());
    for rows in rows.chunks(rows_at_once(models.base, most.unwrap_or(1))) {
        let learned: Vec<&LearnedRow> = rows.iter().map(|(_, row)| *row).collect();
        let lot = Lot::learned(models.base, &learned, gate)?;
        let (base, teacher) = known.of(models, rows, &lot)?;
        let at = models.base.linearized(&lot.batch, &lot.targets, adapter, lot.doses.as_ref(), Some(&lot.parts))?;
        let logits = at.logits()?;
        let student = softmax(&logits)?;
        let losses = lot.targets.labels.losses(&logits.f_log_softmax(-1, student.kind())?)?;
        let losses = Vec::<f64>::try_from(&losses.f_to_kind(Kind::Double)?)?;
        let at_loss = lot.targets.labels.gradient(&student)?; // p − q

        let places: Vec<(usize, usize, i64, f64)> = rows
            .iter()
            .flat_map(|(index, row)| {
                let chosen = (0..row.weights.len()).filter(|at| row.weights[*at] > 0.0);
                chosen.map(|at| (*index, at, row.row.ids[at], row.weights[at] / total))
            })
            .collect();
        let on_device = |tensor: Tensor| tensor.f_to_device(models.base.device());
        let labels = on_device(Tensor::f_from_slice(&places.iter().map(|place| place.2).collect::<Vec<_>>())?)?;
        let of_student = said(&student, &labels)?;
        let of_place = |(n, (row, at, _, share)): (usize, &(usize, usize, i64, f64))| Entry {
            row: *row,
            at: *at,
            teacher: teacher.as_ref().map(|teacher| teacher.said[n]),
            base: base.said[n],
            student: of_student[n],
            loss: share * losses[n],
            changes: vec![],
        };
        let mut here: Vec<Entry> = places.iter().enumerate().map(of_place).collect();
        for direction in &directions {
            // d log p(y) = d logit(y) − Σ p d logit, for each token y of the vocabulary.
            let mut slopes = at.tangent(direction)?.f_to_kind(student.kind())?; // [n, d_vocab]
            let mean = student.f_mul(&slopes)?.f_sum_dim_intlist(-1, true, slopes.kind())?;
            let slopes = slopes.f_sub_(&mean)?;
            let expected = |probs: &Tensor| -> Result<Vec<f64>> {
                let terms = probs.f_to_kind(slopes.kind())?.f_mul(&slopes)?;
                let sums = terms.f_sum_dim_intlist(-1, false, slopes.kind())?;
                Ok(Vec::try_from(&sums.f_to_kind(Kind::Double)?)?)
            };
            let written = expected(&at_loss)?; // of p − q; p's own expectation is 0
            let by_base = expected(&base.probs)?;
            let by_teacher = teacher.as_ref().map(|teacher| expected(&teacher.probs)).transpose()?;
            for (n, entry) in here.iter_mut().enumerate() {
                let factor = clip * places[n].3;
                entry.changes.push(Changes {
                    written: -factor * written[n],
                    by_teacher: by_teacher.as_ref().map(|expected| factor * expected[n]),
                    by_base: factor * by_base[n],
                });
            }
        }
        entries.extend(here);

        let factors: Vec<f64> = places.iter().map(|place| -clip * place.3).collect();
        let factors = on_device(Tensor::f_from_slice(&factors)?)?.f_to_kind(student.kind())?.f_unsqueeze(1)?;
        let gradients = at.gradients(&at_loss.f_mul(&factors)?)?;
        for (along, parts) in along.iter().zip(&mut parts) {
            for (tensor, (gradient, along)) in gradients.iter().zip(along).enumerate() {
                let flat = |tensor: &Tensor| tensor.f_to_kind(Kind::Double)?.f_flatten(1, -1);
                let here = flat(gradient)?.f_matmul(&flat(along)?.f_transpose(0, 1)?)?; // [written, read]
                match parts.get_mut(tensor) {
                    Some(sum) => drop(sum.f_add_(&here)?),
                    None => parts.push(here),
                }
            }
        }
    }
    Ok((entries, parts))
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

/// What a model predicts at the targets of some rows.
struct Predicted {
    probs: Tensor, // [n, d_vocab]
    said: Vec<Said>,
}

impl Predicted {
    fn of(probs: Tensor, labels: &Tensor) -> Result<Self> {
        Ok(Self { said: said(&probs, labels)?, probs })
    }

    /// The predictions at the targets from `from` on.
    fn some(&self, from: usize, n: usize) -> Result<Self> {
        let probs = self.probs.f_narrow(0, from as i64, n as i64)?;
        let probs = probs.f_detach_copy()?; // not the whole pass's
        Ok(Self { probs, said: self.said[from..from + n].to_vec() })
    }

    fn joined(all: &[&Self]) -> Result<Self> {
        let probs = Tensor::f_cat(&all.iter().map(|one| &one.probs).collect::<Vec<_>>(), 0)?;
        Ok(Self { probs, said: all.iter().flat_map(|one| one.said.iter().copied()).collect() })
    }
}

/// What base and teacher predict at the targets of rows. It does not change in a training, so it is kept as far as there
/// is room.
pub(super) struct Known {
    by_row: BTreeMap<usize, (Predicted, Option<Predicted>)>,
    room: usize, // numbers
}

impl Default for Known {
    fn default() -> Self {
        Self { by_row: BTreeMap::new(), room: 1 << 26 }
    }
}

impl Known {
    fn of(
        &mut self,
        models: Models<'_>,
        rows: &[(usize, &LearnedRow)],
        lot: &Lot,
    ) -> Result<(Predicted, Option<Predicted>)> {
        let known: Option<Vec<_>> = rows.iter().map(|(index, _)| self.by_row.get(index)).collect();
        if let Some(known) = known {
            let base: Vec<&Predicted> = known.iter().map(|(base, _)| base).collect();
            let teacher: Option<Vec<&Predicted>> = known.iter().map(|(_, teacher)| teacher.as_ref()).collect();
            return Ok((Predicted::joined(&base)?, teacher.map(|teacher| Predicted::joined(&teacher)).transpose()?));
        }
        let learned: Vec<&LearnedRow> = rows.iter().map(|(_, row)| *row).collect();
        let labels: Vec<i64> = rows
            .iter()
            .flat_map(|(_, row)| row.row.ids.iter().zip(mask(row)).filter(|(_, counts)| *counts).map(|(id, _)| *id))
            .collect();
        let labels = Tensor::f_from_slice(&labels)?.f_to_device(models.base.device())?;
        let base = Predicted::of(probabilities(models.base, None, lot)?, &labels)?;
        let teacher = models.teacher.map(|teacher| teacher_probabilities(teacher, &learned)).transpose()?.flatten();
        let teacher = teacher.map(|probs| Predicted::of(probs, &labels)).transpose()?;
        let mut from = 0;
        for (index, row) in rows {
            let n = row.weights.iter().filter(|weight| **weight > 0.0).count();
            let size = n * base.probs.size()[1] as usize * if teacher.is_some() { 2 } else { 1 };
            if size <= self.room && !self.by_row.contains_key(index) {
                self.room -= size;
                let of_teacher = teacher.as_ref().map(|teacher| teacher.some(from, n)).transpose()?;
                self.by_row.insert(*index, (base.some(from, n)?, of_teacher));
            }
            from += n;
        }
        Ok((base, teacher))
    }
}
