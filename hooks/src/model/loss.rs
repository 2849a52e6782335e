//! The language model's loss, computed only at predicting positions: the other hidden states are never unembedded, and
//! no more than a few hundred rows of logits exist at a time.

use std::collections::BTreeSet;

use tch::{Kind, Tensor};

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
    /// What should be predicted.
    pub labels: Labels,
    /// Number of targets.
    pub n: usize,
}

/// The tokens that targets should be, or the probabilities that they should have.
#[derive(Debug)]
pub struct Labels {
    ids: Tensor,           // [n, k], i64, different in each row
    probs: Option<Tensor>, // [n, k]; None if k is 1 and the token is certain
}

impl Labels {
    /// One token for each target, `[n]`, i64.
    pub fn tokens(ids: &Tensor) -> Result<Self> {
        Ok(Self { ids: ids.f_unsqueeze(1)?, probs: None })
    }

    /// Soft labels: the probabilities q of k tokens for each target; what is missing to 1 is that of all other tokens
    /// together. A token with the probability 0 is one of these others. `ids`: `[n, k]`, i64, different in each row, and
    /// `probs`: `[n, k]`.
    ///
    /// A target's loss is KL(q ‖ p) over the tokens with a probability and all others as one outcome, where p is the model's
    /// prediction (Hinton et al. 2015, at temperature 1). It is 0 where the model predicts q.
    pub fn soft(ids: Tensor, probs: Tensor) -> Result<Self> {
        let are_probabilities = || -> Result<bool> {
            let sums = probs.f_sum_dim_intlist(-1, false, Kind::Double)?;
            let fit = sums.f_le(1.0 + 1e-4)?.f_all()?.f_logical_and(&probs.f_ge(0.0)?.f_all()?)?;
            let sorted = ids.f_sort(-1, false)?.0;
            let (k, twice) = (ids.size()[1], |from| sorted.f_narrow(1, from, ids.size()[1] - 1));
            let differ = k == 1 || !bool::try_from(twice(0)?.f_eq_tensor(&twice(1)?)?.f_any()?)?;
            Ok(bool::try_from(fit)? && differ)
        };
        if ids.dim() != 2 || ids.size() != probs.size() || !are_probabilities()? {
            return Err(Error::invalid(
                "soft labels",
                "different tokens [n, k] with as many probabilities, which add up to at most 1 for each target",
                format!("tokens {:?} and numbers {:?}", ids.size(), probs.size()),
            ));
        }
        Ok(Self { ids, probs: Some(probs) })
    }

    /// The labels of some targets. `targets`: their indices, `[m]`, i64.
    pub(crate) fn select(&self, targets: &Tensor) -> Result<Self> {
        let of = |tensor: &Tensor| tensor.f_index_select(0, targets);
        Ok(Self { ids: of(&self.ids)?, probs: self.probs.as_ref().map(of).transpose()? })
    }

    fn chunks(&self, rows: i64) -> Result<Vec<Self>> {
        let ids = self.ids.f_split(rows, 0)?;
        let probs = self.probs.as_ref().map(|probs| probs.f_split(rows, 0)).transpose()?;
        let mut probs = probs.into_iter().flatten();
        Ok(ids.into_iter().map(|ids| Self { ids, probs: probs.next() }).collect())
    }

    /// The loss of each target, −log p(label) or KL(q ‖ p), `[n]`. `logprobs`: log p, `[n, d_vocab]`.
    pub fn losses(&self, logprobs: &Tensor) -> Result<Tensor> {
        let found = logprobs.f_gather(1, &self.ids, false)?;
        let Some(probs) = &self.probs else { return Ok(found.f_squeeze_dim(1)?.f_neg()?) };
        let probs = probs.f_to_kind(logprobs.kind())?;
        let [q, p] = [rest(&probs)?, rest(&named(&found.f_exp()?, &probs)?)?];
        let each = probs.f_xlogy(&probs)?.f_sub(&probs.f_mul(&found)?)?; // 0 where q is 0
        let of_rest = q.f_xlogy(&q)?.f_sub(&q.f_mul(&p.f_clamp_min(SMALLEST)?.f_log()?)?)?;
        Ok(each.f_sum_dim_intlist(-1, false, logprobs.kind())?.f_add(&of_rest.f_squeeze_dim(1)?)?)
    }

    /// The losses' gradient by the logits, p − q, `[n, d_vocab]` (see [`Self::soft`]). `predicted`: p, `[n, d_vocab]`.
    pub fn gradient(&self, predicted: &Tensor) -> Result<Tensor> {
        let mut gradient = predicted.f_detach_copy()?;
        self.subtract_from(&mut gradient)?;
        Ok(gradient)
    }

    /// Turns the predicted probabilities p, `[n, d_vocab]`, into the losses' gradient by the logits, in place: p − q, where
    /// the tokens without a probability of their own share that of the rest in proportion to p.
    fn subtract_from(&self, predicted: &mut Tensor) -> Result<()> {
        let Some(probs) = &self.probs else {
            let minus_one = self.ids.f_full_like(-1.0)?.f_to_kind(predicted.kind())?;
            let _ = predicted.f_scatter_add_(1, &self.ids, &minus_one)?;
            return Ok(());
        };
        let probs = probs.f_to_kind(predicted.kind())?;
        let found = predicted.f_gather(1, &self.ids, false)?;
        let of_rest = rest(&named(&found, &probs)?)?.f_clamp_min(SMALLEST)?;
        let kept = rest(&probs)?.f_div(&of_rest)?.f_neg()?.f_add_scalar(1.0)?;
        let at_ids = found.f_sub(&probs)?.f_where_self(&probs.f_gt(0.0)?, &found.f_mul(&kept)?)?;
        let _ = predicted.f_mul_(&kept)?.f_scatter_(1, &self.ids, &at_ids)?;
        Ok(())
    }
}

/// The least probability of all other tokens together, below which f32 does not tell it from none.
const SMALLEST: f64 = 1e-7;

/// The predicted probabilities of the tokens to which a label gives one, 0 for the others, `[n, k]`.
fn named(predicted: &Tensor, label: &Tensor) -> Result<Tensor> {
    Ok(predicted.f_mul(&label.f_gt(0.0)?)?)
}

/// What the probabilities `[n, k]` leave to all other tokens, `[n, 1]`.
fn rest(probs: &Tensor) -> Result<Tensor> {
    Ok(probs.f_sum_dim_intlist(-1, true, probs.kind())?.f_neg()?.f_add_scalar(1.0)?.f_clamp_min(0.0)?)
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
        Ok(Self { places: tensor(&places)?, rows: tensor(&rows)?, labels: Labels::tokens(&tensor(&labels)?)?, n })
    }

    /// The same targets with soft labels.
    pub fn labelled(self, labels: Labels) -> Result<Self> {
        let n = labels.ids.size()[0];
        if n != self.n as i64 {
            return Err(Error::invalid("soft labels", format!("one for each of {} targets", self.n), n));
        }
        Ok(Self { labels, ..self })
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

/// Σ −log p(label), or Σ KL(q ‖ p) with soft labels, over the targets in f32 (f64 in an f64 model), a scalar that gradients flow through once. `resid`:
/// the final residual stream at `targets.places`, `[places, d_model]`, as `Qwen::resid_at` gives it. It is a sum, so
/// that a step of several batches can divide by the number of all targets.
pub fn cross_entropy_sum(model: &Qwen, resid: &Tensor, targets: &Targets) -> Result<Tensor> {
    let _stage = profile::stage(Stage::Loss);
    Ok(cross_entropy(model, resid, targets)?.f_sum(wide(resid.kind()))?)
}

/// The loss of each target, `[n]`, in f32 (f64 in an f64 model). Gradients flow through any weighted sum of them, once.
pub fn cross_entropy(model: &Qwen, resid: &Tensor, targets: &Targets) -> Result<Tensor> {
    let normed = model.final_norm(&embedding(resid, &targets.rows)?)?; // [n, d_model]
    let unembedding_learns = model.parameters().iter().any(|(_, weight)| weight.requires_grad());
    let chunks = normed.f_split(ROWS, 0)?;
    let chunks = chunks.iter().zip(targets.labels.chunks(ROWS)?).map(|(normed, labels)| {
        if unembedding_learns || !normed.requires_grad() {
            return losses(model, normed, &labels);
        }
        // The gradient at the chunk's hidden states is computed here, so that its logits can be freed. The returned
        // tensor has the loss's values and passes these gradients on.
        let (losses, gradient) = tch::no_grad(|| loss_and_gradient(model, normed, &labels))?;
        let carrier = normed.f_mul(&gradient)?.f_sum_dim_intlist(-1, false, wide(normed.kind()))?;
        Ok(carrier.f_sub(&carrier.f_detach()?)?.f_add(&losses)?)
    });
    Ok(Tensor::f_cat(&chunks.collect::<Result<Vec<_>>>()?, 0)?)
}

/// The losses, `[n]`. `normed`: `[n, d_model]` after the final norm.
fn losses(model: &Qwen, normed: &Tensor, labels: &Labels) -> Result<Tensor> {
    labels.losses(&model.logits(normed)?.f_log_softmax(-1, wide(normed.kind()))?)
}

/// The losses, `[n]`, and their gradients by `normed`, `[n, d_model]`. Logits are computed for some rows at a time.
pub(crate) fn losses_and_gradients(model: &Qwen, normed: &Tensor, labels: &Labels) -> Result<(Tensor, Tensor)> {
    let chunks = normed.f_split(ROWS, 0)?.into_iter().zip(labels.chunks(ROWS)?);
    let found =
        chunks.map(|(normed, labels)| loss_and_gradient(model, &normed, &labels)).collect::<Result<Vec<_>>>()?;
    let (losses, gradients): (Vec<Tensor>, Vec<Tensor>) = found.into_iter().unzip();
    Ok((Tensor::f_cat(&losses, 0)?, Tensor::f_cat(&gradients, 0)?))
}

fn loss_and_gradient(model: &Qwen, normed: &Tensor, labels: &Labels) -> Result<(Tensor, Tensor)> {
    let logprobs = model.logits(normed)?.f_log_softmax(-1, wide(normed.kind()))?; // [n, d_vocab]
    let losses = labels.losses(&logprobs)?;
    Ok((losses, loss_gradient(model, logprobs, labels)?))
}

/// ∂/∂normed = (softmax − q) · W of each loss, `[n, d_model]`, where q is the label's distribution: for a token, 1 at the
/// token. `logprobs`: `[n, d_vocab]`, which is overwritten.
pub(crate) fn loss_gradient(model: &Qwen, mut logprobs: Tensor, labels: &Labels) -> Result<Tensor> {
    let mut gradient = logprobs.f_exp_()?;
    labels.subtract_from(&mut gradient)?;
    let span = profile::op(Op::Head);
    let gradient = gradient.f_to_kind(model.activation_kind())?;
    span.flops(|| Ok((2.0 * gradient.numel() as f64 * model.config.d_model as f64, 0.0)))?;
    matmul(&gradient, model.head())
}

#[cfg(test)]
mod tests {
    use tch::Device;

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
        let whole = losses(&model, &model.final_norm(&hidden).unwrap(), &targets.labels).unwrap().sum(Kind::Float);
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
        let sum = losses(&model, &normed, &targets.labels).unwrap().sum(Kind::Float) / 7.0;
        let expected = Tensor::run_backward(&[&sum], &[&normed], false, false);
        let (losses, gradients) =
            tch::no_grad(|| losses_and_gradients(&model, &normed.detach(), &targets.labels)).unwrap();
        assert_alike(&(gradients / 7.0), &expected[0]);
        assert!((losses.sum(Kind::Float).double_value(&[]) - whole).abs() < 1e-5 * whole);
    }

    fn ids_of(labels: &Labels) -> Tensor {
        labels.ids.shallow_clone()
    }

    #[test]
    fn a_soft_label_of_one_certain_token_is_that_token() {
        let model = model();
        let resid = resid(&model);
        let hard = targets(&ROWS_OF_IDS);
        let loss = cross_entropy(&model, &at(&resid, &hard), &hard).unwrap();
        let ids = Tensor::from_slice(&[7_i64, 0, 8, 0, 9, 0, 11, 0, 12, 0]).view([5, 2]);
        let certain = Tensor::from_slice(&[1.0_f32, 0.0].repeat(5)).view([5, 2]);
        let soft = targets(&ROWS_OF_IDS).labelled(Labels::soft(ids, certain).unwrap()).unwrap();
        assert_eq!(cross_entropy(&model, &at(&resid, &soft), &soft).unwrap(), loss);
    }

    /// KL(q ‖ p) and its gradient, against the sum over the vocabulary and libtorch's gradients.
    #[test]
    fn the_loss_of_soft_labels_is_the_divergence_from_them() {
        let model = Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Double).unwrap();
        let resid = resid(&model);
        let hard = targets(&ROWS_OF_IDS);
        let normed = model.final_norm(&at(&resid, &hard).index_select(0, &hard.rows)).unwrap().detach();
        let normed = normed.set_requires_grad(true);
        let logprobs = model.logits(&normed).unwrap().log_softmax(-1, Kind::Double);
        let ids = Tensor::from_slice(&[3_i64, 7, 9, 4, 0, 5, 1, 2, 3, 8, 5, 2, 6, 7, 1]).view([5, 3]);
        let shares = [0.5, 0.2, 0.1, 1.0, 0.0, 0.0, 0.25, 0.25, 0.5, 0.1, 0.2, 0.3, 0.6, 0.0, 0.1];
        let probs = Tensor::from_slice(&shares).view([5, 3]);
        // The outcomes are those of the three tokens that have a probability, and all others.
        let predicted = logprobs.gather(1, &ids, false).exp();
        let named = &predicted * probs.gt(0.0);
        let outcomes = |x: &Tensor| Tensor::cat(&[x, &(1.0 - x.sum_dim_intlist(-1, true, Kind::Double))], 1);
        let (q, p) = (outcomes(&probs).clamp_min(0.0), outcomes(&named));
        let by_hand = (q.xlogy(&q) - q.xlogy(&p.clamp_min(1e-300))).sum_dim_intlist(-1, false, Kind::Double);
        let expected = Tensor::run_backward(&[&by_hand.sum(Kind::Double)], &[&normed], false, false);
        let labels = Labels::soft(ids, probs).unwrap();
        let (found, gradients) = tch::no_grad(|| losses_and_gradients(&model, &normed.detach(), &labels)).unwrap();
        let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(found.min().double_value(&[]) > 1e-2, "a divergence is positive: {found}");
        assert!(apart(&found, &by_hand) < 1e-12, "{found} against {by_hand}");
        assert!(apart(&gradients, &expected[0]) < 1e-12);
        let own = Labels::soft(ids_of(&labels), predicted.detach()).unwrap();
        let (none, nowhere) = tch::no_grad(|| losses_and_gradients(&model, &normed.detach(), &own)).unwrap();
        assert!(none.abs().max().double_value(&[]) < 1e-12 && nowhere.abs().max().double_value(&[]) < 1e-12);
        let some = labels.select(&Tensor::from_slice(&[4_i64, 1])).unwrap();
        let of_some = losses(&model, &normed.index_select(0, &Tensor::from_slice(&[4_i64, 1])), &some).unwrap();
        assert!(apart(&of_some, &by_hand.index_select(0, &Tensor::from_slice(&[4_i64, 1]))) < 1e-12);
    }

    #[test]
    fn labels_that_are_no_distribution_are_refused() {
        let ids = || Tensor::from_slice(&[1_i64, 2]).view([1, 2]);
        for probs in [[0.5, 0.6], [1.5, -0.5], [f64::NAN, 0.5]] {
            let error = Labels::soft(ids(), Tensor::from_slice(&probs).view([1, 2])).unwrap_err().to_string();
            assert!(error.contains("add up to at most 1"), "{error}");
        }
        let twice = Tensor::from_slice(&[2_i64, 2]).view([1, 2]);
        assert!(Labels::soft(twice, Tensor::from_slice(&[0.5, 0.4]).view([1, 2])).is_err());
        let labels = Labels::soft(ids(), Tensor::from_slice(&[0.5, 0.5]).view([1, 2])).unwrap();
        let error = targets(&ROWS_OF_IDS).labelled(labels).unwrap_err().to_string();
        assert!(error.contains("is 1, expected one for each of 5 targets"), "{error}");
    }

    #[test]
    fn no_target_is_an_error() {
        let batch = Batch::from_ids(&[&[1, 2]], Device::Cpu).unwrap();
        let error = Targets::of(&batch, &[&[1, 2]], &[&[true, false]]).unwrap_err();
        assert!(matches!(error, Error::EmptyLossMask { .. }), "{error}");
    }
}
