//! The measure that is booked, a plain function of the adapter, and its gradient, split by the part of the chat at which
//! the adapter read.

use std::collections::{BTreeMap, BTreeSet};

use hooks::{Adapter, Batch, Labels, PackedRow, Qwen, Sequence, Targets};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::passes::logprobs;
use crate::alignment::in_parts;
use crate::error::{Error, Result};
use crate::stats::logsumexp;
use crate::target::TokenForms;

/// What is booked: a mean over the questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// log p(target) less the log of the other members' mean probability.
    #[default]
    Margin,
    /// log p(target).
    Logp,
}

/// The questions of a measure, with each beginning of a form behind them, twice: once for the target, and once for the
/// other members.
pub(super) struct Asked<'a> {
    measure: Measure,
    forms: &'a TokenForms,
    n_questions: usize,
    batch: Batch,
    targets: Targets, // question by question, prefix by prefix, the target's side before the others'
    parts: Tensor,    // [part, pos]
}

impl<'a> Asked<'a> {
    pub(super) fn of(model: &Qwen, forms: &'a TokenForms, questions: &[Sequence], measure: Measure) -> Result<Self> {
        if questions.is_empty() {
            return Err(Error::Nothing { analysis: "ledger", what: "at least one question" });
        }
        // The token behind the prefix is the target, whatever it is.
        let any = forms.members()[0][0][0];
        let with_prefix = |question: &Sequence, prefix: &Vec<i64>| {
            let ids: Vec<i64> = prefix.iter().copied().chain([any]).collect();
            question.with_completion(&ids)
        };
        let prompts: Vec<Sequence> = questions
            .iter()
            .flat_map(|question| forms.prefixes().iter().map(move |prefix| with_prefix(question, prefix)))
            .collect();
        let n_sides = if measure == Measure::Margin { 2 } else { 1 };
        let rows: Vec<&Sequence> = prompts.iter().flat_map(|row| std::iter::repeat_n(row, n_sides)).collect();
        let packed: Vec<PackedRow<'_>> = rows.iter().map(|row| PackedRow::of(&row.ids[..row.ids.len() - 1])).collect();
        let batch = Batch::packed(&[&packed], true, model.device())?;
        let masks: Vec<Vec<bool>> =
            rows.iter().map(|row| (0..row.ids.len()).map(|at| at + 1 == row.ids.len()).collect()).collect();
        let ids: Vec<&[i64]> = rows.iter().map(|row| row.ids.as_slice()).collect();
        let targets = Targets::of(&batch, &ids, &masks.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let ends: Vec<(&Sequence, usize)> = rows.iter().map(|row| (*row, row.ids.len() - 1)).collect();
        let parts = in_parts(&batch, &ends)?.f_to_device(model.device())?;
        Ok(Self { measure, forms, n_questions: questions.len(), batch, targets, parts })
    }

    /// The value at an adapter.
    pub(super) fn value(&self, model: &Qwen, adapter: &Adapter) -> Result<f64> {
        Ok(self.pulls(model, adapter)?.0)
    }

    /// The gradient at an adapter, `[part, ..]` of each of its tensors. ∇ log Σᵢ pᵢ is Σᵢ πᵢ ∇ log pᵢ, where πᵢ is the form's share of the sum.
    /// So at each place it is the gradient of −KL(q ‖ p), where q has the shares of the forms' next tokens.
    pub(super) fn gradient(&self, model: &Qwen, adapter: &Adapter) -> Result<Vec<Tensor>> {
        let (_, pulls) = self.pulls(model, adapter)?;
        let k = pulls.iter().map(|pull| pull.tokens.len()).max().unwrap_or(1);
        let (mut ids, mut probs, mut weights) = (vec![], vec![], vec![]);
        for pull in &pulls {
            let fill = (0..).filter(|id| pull.tokens.iter().all(|(token, _)| token != id)).map(|id| (id, 0.0));
            for (token, share) in pull.tokens.iter().copied().chain(fill).take(k) {
                ids.push(token);
                probs.push(share);
            }
            weights.push(-pull.weight); // a gradient of losses
        }
        let device = model.device();
        let shaped = |tensor: Tensor| tensor.f_view([-1, k as i64]).and_then(|tensor| tensor.f_to_device(device));
        let labels = Labels::soft(shaped(Tensor::f_from_slice(&ids)?)?, shaped(Tensor::f_from_slice(&probs)?)?)?;
        let Targets { places, rows, n, .. } = &self.targets;
        let targets = Targets { places: places.shallow_clone(), rows: rows.shallow_clone(), labels, n: *n };
        let weights = Tensor::f_from_slice(&weights)?.f_to_device(device)?;
        Ok(model.lora_gradients_by_part(&self.batch, &targets, &weights, adapter, &self.parts)?)
    }

    /// The value, and for each target the tokens that it is pulled to.
    fn pulls(&self, model: &Qwen, adapter: &Adapter) -> Result<(f64, Vec<Pull>)> {
        let logprobs = logprobs(model, Some(adapter), &self.batch, &self.targets)?;
        // Of the forms' tokens alone, as plain numbers.
        let tokens: BTreeSet<i64> = self.forms.members().iter().flatten().flatten().copied().collect();
        let index = Tensor::f_from_slice(&tokens.iter().copied().collect::<Vec<_>>())?.f_to_device(model.device())?;
        let of_tokens = Vec::<Vec<f64>>::try_from(&logprobs.f_index_select(1, &index)?.f_to_kind(Kind::Double)?)?;
        let column: BTreeMap<i64, usize> = tokens.iter().enumerate().map(|(at, token)| (*token, at)).collect();
        let prefixes = self.forms.prefixes();
        let sides: Vec<Vec<&Vec<i64>>> = match self.measure {
            Measure::Margin => vec![self.of_target(), self.of_others()],
            Measure::Logp => vec![self.of_target()],
        };
        let mut pulls = vec![];
        let mut total = 0.0;
        for question in 0..self.n_questions {
            // The target's and the others' forms have the same places.
            let at = |prefix: &[i64]| prefixes.iter().position(|known| known == prefix).unwrap_or_default();
            let place = |prefix: &[i64]| (question * prefixes.len() + at(prefix)) * sides.len();
            let step = |form: &[i64], k: usize| of_tokens[place(&form[..k])][column[&form[k]]];
            let form = |form: &&Vec<i64>| (0..form.len()).map(|k| step(form, k)).sum::<f64>();
            let mut of_sides = vec![];
            for (side, forms) in sides.iter().enumerate() {
                let logps: Vec<f64> = forms.iter().map(form).collect();
                let sum = logsumexp(&logps);
                let (sign, mean) = if side == 0 { (1.0, 0.0) } else { (-1.0, (self.n_others() as f64).ln()) };
                total += sign * (sum - mean);
                of_sides.push((sign, logps.iter().map(|logp| (logp - sum).exp()).collect::<Vec<f64>>()));
            }
            for prefix in prefixes {
                for (forms, (sign, shares)) in sides.iter().zip(&of_sides) {
                    let mut pull = Pull { tokens: vec![], weight: 0.0 };
                    for (form, share) in forms.iter().zip(shares) {
                        if form.len() > prefix.len() && form.starts_with(prefix) {
                            pull.add(form[prefix.len()], *share);
                        }
                    }
                    pulls.push(pull.finished(sign / self.n_questions as f64));
                }
            }
        }
        Ok((total / self.n_questions as f64, pulls))
    }

    fn of_target(&self) -> Vec<&Vec<i64>> {
        self.forms.members()[0].iter().collect()
    }

    fn of_others(&self) -> Vec<&Vec<i64>> {
        self.forms.members()[1..].iter().flatten().collect()
    }

    fn n_others(&self) -> usize {
        self.forms.members().len() - 1
    }
}

/// The tokens to which a place is pulled, with their shares of the probability, and the weight of the pull.
struct Pull {
    tokens: Vec<(i64, f64)>,
    weight: f64,
}

impl Pull {
    fn add(&mut self, token: i64, share: f64) {
        self.weight += share;
        match self.tokens.iter_mut().find(|(known, _)| *known == token) {
            Some((_, known)) => *known += share,
            None => self.tokens.push((token, share)),
        }
    }

    /// The shares add up to 1, or there are none.
    fn finished(mut self, sign: f64) -> Self {
        let sum = self.weight;
        for (_, share) in self.tokens.iter_mut().filter(|_| sum > 0.0) {
            *share /= sum;
        }
        self.weight *= sign;
        self
    }
}
