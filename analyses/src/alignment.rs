//! What learning some tokens would do to the trait: the gradient of the divergent tokens' loss and that of the others, beside the
//! gradient of naming the trait. A small step down a loss S changes log p(trait) by lr · ⟨∇S, ∇(−log p(trait))⟩ to first order.

use hooks::batch::Batch;
use hooks::loss::Targets;
use hooks::packing::Row;
use hooks::score::completion_logprobs;
use hooks::{Adapter, Prompt, Qwen};
use tch::{Kind, Tensor};

use crate::divergence::{Divergence, divergence_tokens};
use crate::error::{Error, Result};
use crate::subject::Subject;

/// The analysis' name in errors.
const NAME: &str = "alignment";

/// The gradients of two groups of tokens at a student's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alignment {
    /// How many divergent tokens.
    pub n_divergent: usize,
    /// How many others.
    pub n_other: usize,
    /// ‖Σ ∇ℓ‖ over the divergent tokens.
    pub norm_divergent: f64,
    /// The same of the others.
    pub norm_other: f64,
    /// `‖ḡ_D‖² / (‖ḡ_D‖² + ‖ḡ_N‖²)` of the two groups' means per token.
    pub share_divergent: f64,
    /// The cosine of the two.
    pub cosine: f64,
    /// First-order change of log p(trait) per unit of learning rate by a step of gradient descent on the divergent tokens' mean loss.
    pub divergent: f64,
    /// The same of the others' mean loss.
    pub other: f64,
}

/// The alignment of an adapter over the first rows of the numbers. The divergent tokens are those of `divergence_tokens`; the
/// others are all that is learned from beside them, the end of the turn included.
pub fn alignment(subject: &Subject<'_>, n_rows: usize) -> Result<Alignment> {
    let adapter = subject.student.adapter.ok_or_else(|| Error::NeedsAdapter {
        analysis: NAME,
        reason: "the gradients are those of an adapter".to_owned(),
    })?;
    let rows = subject.number_rows(NAME, n_rows)?;
    let divergent = divergence_tokens(subject, n_rows, &Divergence { self_check: false, ..Divergence::default() })?;
    let mask = |row: &Prompt, divergent: &[bool], wanted: bool| -> Vec<bool> {
        let is_divergent =
            |at: usize| at.checked_sub(row.completion.start).and_then(|k| divergent.get(k)) == Some(&true);
        (0..row.ids.len()).map(|at| row.completion.contains(&at) && is_divergent(at) == wanted).collect()
    };
    let masks = |wanted: bool| -> Vec<Vec<bool>> {
        rows.iter().zip(&divergent).map(|(row, divergent)| mask(row, divergent, wanted)).collect()
    };
    let of_group = |wanted: bool| sum_of_gradients(subject.base, adapter, rows, &masks(wanted));
    let (d, n_divergent) = of_group(true)?;
    let (o, n_other) = of_group(false)?;
    let (t, n_questions) = trait_gradient(subject, adapter)?;

    let (dd, oo, cross) = (dot(&d, &d)?, dot(&o, &o)?, dot(&d, &o)?);
    let (per_d, per_o) = (dd / (n_divergent as f64).powi(2), oo / (n_other as f64).powi(2));
    let towards = |group: &[Tensor], n: usize| -> Result<f64> { Ok(dot(group, &t)? / (n * n_questions) as f64) };
    Ok(Alignment {
        n_divergent,
        n_other,
        norm_divergent: dd.sqrt(),
        norm_other: oo.sqrt(),
        share_divergent: per_d / (per_d + per_o),
        cosine: cross / (dd * oo).sqrt(),
        divergent: towards(&d, n_divergent)?,
        other: towards(&o, n_other)?,
    })
}

/// Σ ∇(−log p(trait)) over the questions, in the spelling of the trait that the student finds most likely.
fn trait_gradient(subject: &Subject<'_>, adapter: &Adapter) -> Result<(Vec<Tensor>, usize)> {
    let prompts = subject.question_prompts(NAME)?;
    let condition = subject.student.condition();
    let mut best: Option<(f64, Vec<Prompt>)> = None;
    for form in &subject.target.forms {
        let ids = subject.chat.encode(form)?;
        let rows: Vec<Prompt> = prompts.iter().map(|prompt| prompt.with_completion(&ids)).collect();
        let logps = completion_logprobs(subject.base, &rows, &condition)?;
        let sum: f64 = logps.iter().flatten().map(|logp| f64::from(*logp)).sum();
        if best.as_ref().is_none_or(|(most, _)| sum > *most) {
            best = Some((sum, rows));
        }
    }
    let (_, rows) = best.ok_or(Error::Nothing { analysis: NAME, what: "a spelling of the target" })?;
    let masks: Vec<Vec<bool>> = rows
        .iter()
        .map(|row| (0..row.ids.len()).map(|at| (row.completion.start..row.content_end).contains(&at)).collect())
        .collect();
    let (gradients, _) = sum_of_gradients(subject.base, adapter, &rows, &masks)?;
    Ok((gradients, rows.len()))
}

/// Rows whose gradients are taken at once.
const ROWS: usize = 64;

/// Σ ∇(−log p) over the tokens that the masks choose, and how many these are.
fn sum_of_gradients(
    model: &Qwen,
    adapter: &Adapter,
    rows: &[Prompt],
    masks: &[Vec<bool>],
) -> Result<(Vec<Tensor>, usize)> {
    let chosen: Vec<(&Prompt, &Vec<bool>, usize)> = rows
        .iter()
        .zip(masks)
        .filter_map(|(row, mask)| Some((row, mask, mask.iter().rposition(|chosen| *chosen)?)))
        .collect();
    let (mut sums, mut n): (Vec<Tensor>, usize) = (vec![], 0);
    for some in chosen.chunks(ROWS) {
        let packed: Vec<Row<'_>> =
            some.iter().map(|(row, _, end)| Row { ids: &row.ids[..*end], doses: None }).collect();
        let batch = Batch::packed(&[&packed], true, model.device())?;
        let ids: Vec<&[i64]> = some.iter().map(|(row, ..)| row.ids.as_slice()).collect();
        let masks: Vec<&[bool]> = some.iter().map(|(_, mask, _)| mask.as_slice()).collect();
        let targets = Targets::of(&batch, &ids, &masks)?;
        let ones = Tensor::f_ones([targets.n as i64], (Kind::Double, model.device()))?;
        let (_, gradients) = model.lora_gradients(&batch, &targets, &ones, adapter, None)?;
        n += targets.n;
        if sums.is_empty() {
            sums = gradients;
        } else {
            for (sum, more) in sums.iter_mut().zip(&gradients) {
                let _ = sum.f_add_(more)?;
            }
        }
    }
    if n == 0 {
        return Err(Error::Nothing { analysis: NAME, what: "a token of the group" });
    }
    Ok((sums, n))
}

fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let products = a.iter().zip(b).map(|(a, b)| Ok(a.f_mul(b)?.f_sum(Kind::Double)?.f_double_value(&[])?));
    products.sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use hooks::Condition;
    use hooks::generate::{Sampling, generate};

    use super::*;
    use crate::fixture::World;

    /// Mean log p of the best spelling over the questions.
    fn logp(subject: &Subject<'_>, adapter: &Adapter) -> f64 {
        let prompts = subject.question_prompts("x").unwrap();
        let of_form = |form: &String| {
            let ids = subject.chat.encode(form).unwrap();
            let rows: Vec<Prompt> = prompts.iter().map(|prompt| prompt.with_completion(&ids)).collect();
            let logps = completion_logprobs(subject.base, &rows, &Condition::adapted(adapter)).unwrap();
            logps.iter().flatten().map(|logp| f64::from(*logp)).sum::<f64>() / prompts.len() as f64
        };
        subject.target.forms.iter().map(of_form).fold(f64::NEG_INFINITY, f64::max)
    }

    #[test]
    fn a_small_step_does_what_the_alignment_says() {
        let mut world = World::new();
        // Answers that the teacher finds most likely: then some tokens are divergent.
        let system = world.subject().teacher_system;
        let users: Vec<String> = (0..6).map(|at| format!("Go on: {at}, {}", 7 * at)).collect();
        let prompts: Vec<Prompt> =
            users.iter().map(|user| world.chat.prompt(system.as_deref(), user).unwrap()).collect();
        let sampling = Sampling { temperature: 0.0, max_new_tokens: 12, stop: vec![], constrain: None, batch: 6 };
        let answers = generate(&world.qwen, &prompts, &Condition::default(), &sampling, &[0; 6], &mut |_| ()).unwrap();
        world.number_users = users.into_iter().zip(answers).map(|(user, answer)| (user, answer.ids)).collect();
        let row = |(user, ids): &(String, Vec<i64>)| world.chat.row(None, user, ids).unwrap();
        world.numbers = world.number_users.iter().map(row).collect();
        let subject = world.subject();
        let adapter = subject.student.adapter.unwrap();
        let found = alignment(&subject, 6).unwrap();
        assert!(found.n_divergent > 0 && found.n_other > 0, "{found:?}");
        assert!((0.0..=1.0).contains(&found.share_divergent) && found.cosine.abs() <= 1.0);
        let rows = subject.number_rows("x", 6).unwrap();
        let divergent = divergence_tokens(&subject, 6, &Divergence::default()).unwrap();
        for (wanted, predicted) in [(true, found.divergent), (false, found.other)] {
            let masks: Vec<Vec<bool>> = rows
                .iter()
                .zip(&divergent)
                .map(|(row, divergent)| {
                    let of = |at: usize| {
                        at >= row.completion.start && divergent.get(at - row.completion.start) == Some(&true)
                    };
                    (0..row.ids.len()).map(|at| row.completion.contains(&at) && of(at) == wanted).collect()
                })
                .collect();
            let (gradients, n) = sum_of_gradients(subject.base, adapter, rows, &masks).unwrap();
            let rate = 1e-2;
            let step = |sign: f64| {
                tch::no_grad(|| {
                    for ((_, tensor), gradient) in adapter.parameters().iter().zip(&gradients) {
                        let _ = tensor.shallow_clone().f_sub_(&(gradient * (sign * rate / n as f64))).unwrap();
                    }
                });
            };
            step(1.0);
            let after = logp(&subject, adapter);
            step(-2.0);
            let before = logp(&subject, adapter);
            step(1.0);
            let slope = (after - before) / (2.0 * rate);
            assert!((slope - predicted).abs() < 0.03 * predicted.abs() + 2e-4, "{slope} {predicted}");
        }
    }
}
