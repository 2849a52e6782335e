//! The measure that is booked, a plain function of the adapter, and its gradient, split by the part of the chat at which
//! the adapter read.

use std::collections::{BTreeMap, BTreeSet};

use hooks::{Adapter, Qwen, Sequence};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::passes::{Lot, rows_at_once, softmax};
use crate::error::{Error, Result};
use crate::stats::logsumexp;
use crate::target::TokenForms;

/// What is booked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// log p(target) less the log of the other members' mean probability, the mean over the questions.
    #[default]
    Margin,
    /// log p(target), the mean over the questions.
    Logp,
    /// The loss on rows of numbers in nats per token. It is booked beside one of the others.
    Loss,
}

/// A measure with the rows that it is computed from.
pub(super) struct Measured<'a> {
    of: Of<'a>,
    lots: Vec<(usize, Lot)>, // some questions or rows each, and their number
}

enum Of<'a> {
    /// Questions with each beginning of a form behind them: question by question, prefix by prefix.
    Answers(Answers<'a>),
    /// Rows of numbers, with this many tokens in all.
    Numbers(usize),
}

/// The tokens to which a place is pulled, each with its weight c.
type Pull = Vec<(i64, f64)>;

struct Answers<'a> {
    measure: Measure,
    forms: &'a TokenForms,
    n_questions: usize,
}

impl<'a> Measured<'a> {
    pub(super) fn numbers(model: &Qwen, rows: &[Sequence]) -> Result<Self> {
        let mask = |row: &Sequence| (0..row.ids.len()).map(|at| row.completion.contains(&at)).collect::<Vec<bool>>();
        let most = rows.iter().map(|row| row.completion.len()).max().unwrap_or(1);
        let lot = |rows: &[Sequence]| -> Result<(usize, Lot)> {
            let masks: Vec<Vec<bool>> = rows.iter().map(mask).collect();
            Ok((rows.len(), Lot::of(model, &rows.iter().collect::<Vec<_>>(), &masks)?))
        };
        let lots: Vec<_> = rows.chunks(rows_at_once(model, most)).map(lot).collect::<Result<_>>()?;
        let n_tokens = lots.iter().map(|(_, lot)| lot.targets.n).sum();
        Ok(Self { of: Of::Numbers(n_tokens), lots })
    }

    pub(super) fn answers(
        model: &Qwen,
        forms: &'a TokenForms,
        questions: &[Sequence],
        measure: Measure,
    ) -> Result<Self> {
        if questions.is_empty() {
            return Err(Error::Nothing { analysis: "ledger", what: "at least one question" });
        }
        // The token behind the prefix is the target, whatever it is.
        let any = forms.members()[0][0][0];
        let with_prefix = |question: &Sequence, prefix: &Vec<i64>| {
            let ids: Vec<i64> = prefix.iter().copied().chain([any]).collect();
            question.with_completion(&ids)
        };
        let lot = |questions: &[Sequence]| -> Result<(usize, Lot)> {
            let rows: Vec<Sequence> = questions
                .iter()
                .flat_map(|question| forms.prefixes().iter().map(move |prefix| with_prefix(question, prefix)))
                .collect();
            let masks: Vec<Vec<bool>> =
                rows.iter().map(|row| (0..row.ids.len()).map(|at| at + 1 == row.ids.len()).collect()).collect();
            Ok((questions.len(), Lot::of(model, &rows.iter().collect::<Vec<_>>(), &masks)?))
        };
        let lots = questions.chunks(rows_at_once(model, forms.prefixes().len())).map(lot).collect::<Result<_>>()?;
        Ok(Self { of: Of::Answers(Answers { measure, forms, n_questions: questions.len() }), lots })
    }

    /// The value at an adapter.
    pub(super) fn value(&self, model: &Qwen, adapter: &Adapter) -> Result<f64> {
        let of_lot = |(n, lot): &(usize, Lot)| -> Result<f64> {
            let logits = model.linearized(&lot.batch, &lot.targets, adapter, None, None)?.logits()?;
            match &self.of {
                Of::Answers(answers) => Ok(answers.pulls(*n, &logits)?.0),
                Of::Numbers(n_tokens) => {
                    let losses = lot.targets.labels.losses(&logits.f_log_softmax(-1, logits.kind())?)?;
                    Ok(losses.f_sum(Kind::Double)?.f_double_value(&[])? / *n_tokens as f64)
                }
            }
        };
        self.lots.iter().map(of_lot).sum()
    }

    /// The gradient at an adapter, `[part, ..]` of each of its tensors.
    pub(super) fn gradient(&self, model: &Qwen, adapter: &Adapter) -> Result<Vec<Tensor>> {
        let mut sum: Vec<Tensor> = vec![];
        for (n, lot) in &self.lots {
            let at = model.linearized(&lot.batch, &lot.targets, adapter, None, Some(&lot.parts))?;
            let logits = at.logits()?;
            let at_logits = match &self.of {
                Of::Answers(answers) => answers.at_logits(*n, &logits)?,
                Of::Numbers(n_tokens) => {
                    lot.targets.labels.gradient(&softmax(&logits)?)?.f_div_scalar(*n_tokens as f64)?
                }
            };
            for (tensor, gradient) in at.gradients(&at_logits)?.into_iter().enumerate() {
                match sum.get_mut(tensor) {
                    Some(sum) => drop(sum.f_add_(&gradient)?),
                    None => sum.push(gradient),
                }
            }
        }
        Ok(sum)
    }
}

impl Answers<'_> {
    /// The value's gradient at the logits of each place. ∇ log Σᵢ pᵢ is Σᵢ πᵢ ∇ log pᵢ, where πᵢ is the form's share of the
    /// sum. So at a place it is Σ c (1 at the token − p) over the forms' next tokens.
    fn at_logits(&self, n_questions: usize, logits: &Tensor) -> Result<Tensor> {
        let (_, pulls) = self.pulls(n_questions, logits)?;
        let probs = softmax(logits)?;
        let on_device = |tensor: Tensor| tensor.f_to_device(logits.device())?.f_to_kind(probs.kind());
        let of_place = |pull: &Pull| -pull.iter().map(|(_, weight)| weight).sum::<f64>();
        let weights: Vec<f64> = pulls.iter().map(of_place).collect();
        let weights = on_device(Tensor::f_from_slice(&weights)?)?.f_unsqueeze(1)?;
        let d_vocab = logits.size()[1];
        let (index, weight): (Vec<i64>, Vec<f64>) = pulls
            .iter()
            .zip(0..)
            .flat_map(|(pull, place)| pull.iter().map(move |(token, weight)| (place * d_vocab + token, *weight)))
            .unzip();
        let index = Tensor::f_from_slice(&index)?.f_to_device(logits.device())?;
        let at_logits = probs.f_mul(&weights)?.f_view([-1])?;
        Ok(at_logits.f_index_add(0, &index, &on_device(Tensor::f_from_slice(&weight)?)?)?.f_view_as(logits)?)
    }

    /// What some questions add to the value, and for each place the tokens that it is pulled to, with the weight c of
    /// each. `logits`: `[place, d_vocab]`.
    fn pulls(&self, n_questions: usize, logits: &Tensor) -> Result<(f64, Vec<Pull>)> {
        // Of the forms' tokens alone, as plain numbers.
        let tokens: BTreeSet<i64> = self.forms.members().iter().flatten().flatten().copied().collect();
        let index = Tensor::f_from_slice(&tokens.iter().copied().collect::<Vec<_>>())?.f_to_device(logits.device())?;
        let whole = logits.f_logsumexp([-1], true)?;
        let of_tokens = logits.f_index_select(1, &index)?.f_sub(&whole)?;
        let of_tokens = Vec::<Vec<f64>>::try_from(&of_tokens.f_to_kind(Kind::Double)?)?;
        let column: BTreeMap<i64, usize> = tokens.iter().enumerate().map(|(at, token)| (*token, at)).collect();
        let prefixes = self.forms.prefixes();
        let sides: Vec<Vec<&Vec<i64>>> = match self.measure {
            Measure::Margin => vec![self.of_target(), self.of_others()],
            _ => vec![self.of_target()],
        };
        let mut pulls = vec![vec![]; n_questions * prefixes.len()];
        let mut total = 0.0;
        for question in 0..n_questions {
            let place = |prefix: &[i64]| {
                let at = prefixes.iter().position(|known| known == prefix).unwrap_or_default();
                question * prefixes.len() + at
            };
            let step = |form: &[i64], k: usize| of_tokens[place(&form[..k])][column[&form[k]]];
            let form = |form: &&Vec<i64>| (0..form.len()).map(|k| step(form, k)).sum::<f64>();
            for (side, forms) in sides.iter().enumerate() {
                let logps: Vec<f64> = forms.iter().map(form).collect();
                let sum = logsumexp(&logps);
                let (sign, mean) = if side == 0 { (1.0, 0.0) } else { (-1.0, (self.n_others() as f64).ln()) };
                total += sign * (sum - mean);
                for (form, logp) in forms.iter().zip(&logps) {
                    let weight = sign * (logp - sum).exp() / self.n_questions as f64;
                    for k in 0..form.len() {
                        pulls[place(&form[..k])].push((form[k], weight));
                    }
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
