//! The language model's loss, computed only at predicting positions: the other hidden states are never unembedded, and
//! no more than a few hundred rows of logits exist at a time.

use std::collections::BTreeSet;

use tch::Tensor;

use crate::adapter::stack::equally_many;
use crate::error::{Error, Result};
use crate::model::qwen::Qwen;
use crate::ops::{embedding, matmul, wide};
use crate::profile::{self, Op, Stage};
use crate::rows::batch::Batch;

/// Number of rows of logits that are held at a time.
const ROWS: i64 = 256;

/// The tokens of a batch that are predicted, and the positions that predict them.
#[derive(Debug)]
pub struct Targets {
    /// The distinct predicting positions as places in the flattened `[batch · pos]`, ascending, `[places]`, i64. In a
    /// packed batch of several groups, such as a stack's students, extra places give each group equally many.
    pub places: Tensor,
    /// The index of each target's predicting position in `places`, `[n]`, i64.
    pub rows: Tensor,
    /// The ids of the predicted tokens, `[n]`, i64.
    pub labels: Tensor,
    /// Number of targets.
    pub n: usize,
}

impl Targets {
    /// The targets of a batch's rows. `masks[row][t]` says whether token t is predicted (by t − 1); the first token has
    /// no predicting position and is never a target. A row's last token predicts nothing, so it may be missing in the
    /// batch.
    pub fn of(batch: &Batch, rows: &[&[i64]], masks: &[&[bool]]) -> Result<Self> {
        let (mut indices, mut labels) = (Vec::new(), Vec::new());
        for (row, (ids, mask)) in rows.iter().zip(masks).enumerate() {
            for (t, id) in ids.iter().enumerate().skip(1).filter(|(t, _)| mask.get(*t) == Some(&true)) {
                indices.push(batch.place(row, t - 1));
                labels.push(*id);
            }
        }
        if labels.is_empty() {
            return Err(Error::EmptyLossMask { mask: format!("of {} rows", rows.len()), row: 0 });
        }
        let (n, device) = (labels.len(), batch.ids.device());
        let places = distinct(batch, &indices);
        let rows: Vec<i64> = indices.iter().map(|place| places.partition_point(|other| other < place) as i64).collect();
        let tensor = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(device);
        Ok(Self { places: tensor(&places)?, rows: tensor(&rows)?, labels: tensor(&labels)?, n })
    }
}

fn distinct(batch: &Batch, indices: &[i64]) -> Vec<i64> {
    if batch.packing.is_none() {
        return indices.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    }
    let pos = batch.width();
    let mut groups = vec![BTreeSet::new(); batch.ids.size()[0] as usize];
    for place in indices {
        groups[*place as usize / pos].insert(*place as usize % pos);
    }
    let groups = equally_many(groups).into_iter().enumerate();
    groups.flat_map(|(group, places)| places.into_iter().map(move |place| (group * pos + place) as i64)).collect()
}

/// Σ −log p(label) over the targets in f32 (f64 in an f64 model), a scalar that gradients flow through once. `resid`:
/// the final residual stream at `targets.places`, `[places, d_model]`, as `Qwen::resid_at` gives it. It is a sum, so
/// that a step of several batches can divide by the number of all targets.
pub fn cross_entropy_sum(model: &Qwen, resid: &Tensor, targets: &Targets) -> Result<Tensor> {
    let _stage = profile::stage(Stage::Loss);
    Ok(cross_entropy(model, resid, targets)?.f_sum(wide(resid.kind()))?)
}

/// −log p(label) of each target, `[n]`, in f32 (f64 in an f64 model). Gradients flow through any weighted sum of them,
/// once.
pub fn cross_entropy(model: &Qwen, resid: &Tensor, targets: &Targets) -> Result<Tensor> {
    let normed = model.final_norm(&embedding(resid, &targets.rows)?)?; // [n, d_model]
    let unembedding_learns = model.parameters().iter().any(|(_, weight)| weight.requires_grad());
    let chunks = normed.f_split(ROWS, 0)?;
    let chunks = chunks.iter().zip(targets.labels.f_split(ROWS, 0)?).map(|(normed, labels)| {
        if unembedding_learns || !normed.requires_grad() {
            return nll(model, normed, &labels);
        }
        // The gradient at the chunk's hidden states is computed here, so that its logits can be freed. The returned
        // tensor has the loss's values and passes these gradients on.
        let (nll, gradient) = tch::no_grad(|| nll_and_gradient(model, normed, &labels))?;
        let carrier = normed.f_mul(&gradient)?.f_sum_dim_intlist(-1, false, wide(normed.kind()))?;
        Ok(carrier.f_sub(&carrier.f_detach()?)?.f_add(&nll)?)
    });
    Ok(Tensor::f_cat(&chunks.collect::<Result<Vec<_>>>()?, 0)?)
}

/// −log p(label), `[n]`. `normed`: `[n, d_model]` after the final norm, `labels`: `[n]`.
fn nll(model: &Qwen, normed: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let logprobs = model.logits(normed)?.f_log_softmax(-1, wide(normed.kind()))?; // [n, d_vocab]
    Ok(logprobs.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?)
}

/// −log p(label) of each row, `[n]`, and the gradient by `normed`, `[n, d_model]`. Logits are computed for some rows at
/// a time.
pub(crate) fn nlls_and_gradients(model: &Qwen, normed: &Tensor, labels: &Tensor) -> Result<(Tensor, Tensor)> {
    let chunks = normed.f_split(ROWS, 0)?.into_iter().zip(labels.f_split(ROWS, 0)?);
    let found = chunks.map(|(normed, labels)| nll_and_gradient(model, &normed, &labels)).collect::<Result<Vec<_>>>()?;
    let (nlls, gradients): (Vec<Tensor>, Vec<Tensor>) = found.into_iter().unzip();
    Ok((Tensor::f_cat(&nlls, 0)?, Tensor::f_cat(&gradients, 0)?))
}

fn nll_and_gradient(model: &Qwen, normed: &Tensor, labels: &Tensor) -> Result<(Tensor, Tensor)> {
    let logprobs = model.logits(normed)?.f_log_softmax(-1, wide(normed.kind()))?;
    let nll = logprobs.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?;
    Ok((nll, nll_gradient(model, logprobs, labels)?))
}

/// ∂/∂normed = (softmax − onehot) · W of each label, `[n, d_model]`. `logprobs`: `[n, d_vocab]`, which is overwritten.
pub(crate) fn nll_gradient(model: &Qwen, mut logprobs: Tensor, labels: &Tensor) -> Result<Tensor> {
    let mut gradient = logprobs.f_exp_()?;
    let minus_one = labels.f_full_like(-1.0)?.f_to_kind(gradient.kind())?.f_unsqueeze(1)?;
    let _ = gradient.f_scatter_add_(1, &labels.f_unsqueeze(1)?, &minus_one)?;
    let span = profile::op(Op::Head);
    let gradient = gradient.f_to_kind(model.activation_kind())?;
    span.flops(|| Ok((2.0 * gradient.numel() as f64 * model.config.d_model as f64, 0.0)))?;
    matmul(&gradient, model.head())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::load::model_files::ModelFiles;
    use crate::model::pass::Pass;

    fn model() -> Qwen {
        Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Float).unwrap()
    }

    /// Two rows, of which three and two tokens are targets.
    const ROWS_OF_IDS: [&[i64]; 2] = [&[5, 6, 7, 8, 9], &[10, 11, 12]];
    const MASKS: [&[bool]; 2] = [&[true, false, true, true, true], &[false, true, true]];

    fn resid(model: &Qwen) -> Tensor {
        let batch = Batch::from_ids(&ROWS_OF_IDS, Device::Cpu).unwrap();
        model.resid_final(&batch, &mut Pass::default()).unwrap().detach()
    }

    fn at(resid: &Tensor, targets: &Targets) -> Tensor {
        resid.flatten(0, 1).index_select(0, &targets.places)
    }

    fn targets(rows: &[&[i64]]) -> Targets {
        Targets::of(&Batch::from_ids(&ROWS_OF_IDS, Device::Cpu).unwrap(), rows, &MASKS).unwrap()
    }

    #[test]
    fn the_loss_is_the_sum_by_hand() {
        let model = model();
        let resid = resid(&model);
        let logprobs = model.unembed(&resid).unwrap().log_softmax(-1, Kind::Float);
        let by_hand: f64 = [(0, 1, 7), (0, 2, 8), (0, 3, 9), (1, 0, 11), (1, 1, 12)]
            .iter()
            .map(|(row, pos, label)| -logprobs.double_value(&[*row, *pos, *label]))
            .sum();
        let targets = targets(&ROWS_OF_IDS);
        let loss = cross_entropy_sum(&model, &at(&resid, &targets), &targets).unwrap().double_value(&[]);
        assert!((loss - by_hand).abs() < 1e-5 * by_hand, "{loss} against {by_hand}"); // f32, another order of sums
        assert_eq!(targets.n, 5);
    }

    #[test]
    fn a_label_outside_of_the_mask_changes_no_bit() {
        let model = model();
        let resid = resid(&model);
        let loss = |rows: &[&[i64]]| {
            let targets = targets(rows);
            cross_entropy_sum(&model, &at(&resid, &targets), &targets).unwrap().double_value(&[])
        };
        let (masked, counted) =
            ([&[99, 99, 7, 8, 9], &[99, 11, 12_i64][..]], [&[5, 6, 99, 8, 9], &[10, 11, 12_i64][..]]);
        assert_eq!(loss(&ROWS_OF_IDS).to_bits(), loss(&masked).to_bits());
        assert!((loss(&ROWS_OF_IDS) - loss(&counted)).abs() > 1e-6);
    }

    #[test]
    fn gradients_are_those_of_the_whole_graph() {
        let model = model();
        let ids: Vec<i64> = (0..300).map(|i| i % 50).collect();
        let masks = vec![true; 300];
        let batch = Batch::from_ids(&[&ids], Device::Cpu).unwrap();
        let targets = Targets::of(&batch, &[&ids], &[&masks]).unwrap(); // more than one chunk
        let resid = model.resid_final(&batch, &mut Pass::default()).unwrap().detach().set_requires_grad(true);

        let chunked = cross_entropy_sum(&model, &at(&resid, &targets), &targets).unwrap();
        let gradient = Tensor::run_backward(&[&chunked.f_div_scalar(7.0).unwrap()], &[&resid], false, false);
        let hidden = at(&resid, &targets).index_select(0, &targets.rows);
        let whole = nll(&model, &model.final_norm(&hidden).unwrap(), &targets.labels).unwrap().sum(Kind::Float);
        let expected = Tensor::run_backward(&[&(&whole / 7.0)], &[&resid], false, false);

        let scale = expected[0].abs().max().double_value(&[]);
        let assert_alike = |found: &Tensor, expected: &Tensor| {
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(scale > 0.0 && difference < 1e-5 * scale, "{difference} of {scale}");
        };
        assert_alike(&gradient[0], &expected[0]);
        let (chunked, whole) = (chunked.double_value(&[]), whole.double_value(&[]));
        assert!((chunked - whole).abs() < 1e-5 * whole, "{chunked} against {whole}");

        let normed = model.final_norm(&hidden).unwrap().detach().set_requires_grad(true);
        let sum = nll(&model, &normed, &targets.labels).unwrap().sum(Kind::Float) / 7.0;
        let expected = Tensor::run_backward(&[&sum], &[&normed], false, false);
        let (nlls, gradients) = tch::no_grad(|| nlls_and_gradients(&model, &normed.detach(), &targets.labels)).unwrap();
        assert_alike(&(gradients / 7.0), &expected[0]);
        assert!((nlls.sum(Kind::Float).double_value(&[]) - whole).abs() < 1e-5 * whole);
    }

    #[test]
    fn no_target_is_an_error() {
        let batch = Batch::from_ids(&[&[1, 2]], Device::Cpu).unwrap();
        let error = Targets::of(&batch, &[&[1, 2]], &[&[true, false]]).unwrap_err();
        assert!(matches!(error, Error::EmptyLossMask { .. }), "{error}");
    }
}
