//! The effect of learning some tokens on the trait, and the positions that it comes from. The gradients of two groups
//! of tokens are compared with the gradient of naming the trait, and split by the position of the adapter's input.
//!
//! A small step down a loss S changes log p(trait) by lr · ⟨∇S, ∇(−log p(trait))⟩ to first order. A LoRA's gradient is
//! a sum over positions, so each part of a chat has a share of each group's gradient. A share's denominator is the
//! length of a sum of gradients, which can cancel; a jackknife over the rows tests whether that length is clear of
//! zero.

use std::ops::Range;

use hooks::{Adapter, Batch, Condition, PackedRow, Qwen, Sequence, Targets, TokenClass, completion_logprobs};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::stats::{is_clear, standard_error};
use crate::subject::Subject;

const NAME: &str = "alignment";

/// A part of a chat, named as the gate that chooses its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The words of the system prompt that name the model.
    Entity,
    /// The rest of the system prompt.
    System,
    /// The tokens of the chat template.
    Template,
    /// The user's text.
    User,
    /// The answer.
    Gen,
}

impl Part {
    /// All parts. Each token is in exactly one.
    pub const ALL: [Self; 5] = [Self::Entity, Self::System, Self::Template, Self::User, Self::Gen];

    /// The name by which a gate selects its tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Entity => "entity",
            Self::System => "sys.content_other",
            Self::Template => "template",
            Self::User => "user.content",
            Self::Gen => "gen",
        }
    }

    pub(crate) fn of(class: TokenClass) -> Self {
        match class {
            TokenClass::SysEntity => Self::Entity,
            TokenClass::SysContentOther => Self::System,
            TokenClass::UserContent => Self::User,
            TokenClass::Gen => Self::Gen,
            _ => Self::Template,
        }
    }
}

/// The gradients of two groups of tokens at an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Alignment {
    /// The gradient `g_D` of the divergent tokens' summed loss.
    pub divergent: Group,
    /// The gradient `g_N` of the other tokens' summed loss.
    pub other: Group,
    /// The cosine of `g_D` and `g_N`; `None` if one of them is zero.
    pub cosine: Option<f64>,
}

/// The gradient g of the summed loss of a group of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Number of tokens.
    pub n_tokens: usize,
    /// ‖g‖.
    pub norm: f64,
    /// `‖g‖² / ‖g_D + g_N‖²`; `None` unless `‖g_D + g_N‖` is three standard errors above zero.
    pub share: Option<f64>,
    /// First-order change of the mean of log p(trait) over the questions, per unit of learning rate, by a step of
    /// gradient descent on the group's mean loss. The trait has the spelling that the adapted model finds most likely.
    pub towards_trait: f64,
    /// The contribution of each part of the chat to g, in the order of `Part::ALL`.
    pub parts: Vec<AtPart>,
}

/// The gradient `g_P` by the adapter's inputs at one part of the chat. Those of all parts add up to g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AtPart {
    /// The part.
    pub part: Part,
    /// `‖g_P‖`.
    pub norm: f64,
    /// `⟨g_P, g⟩ / ‖g‖²`; the parts' shares add up to 1. `None` unless `‖g‖` is three standard errors above zero.
    pub share: Option<f64>,
    /// The contribution of `g_P` to `Group::towards_trait`.
    pub towards_trait: f64,
}

/// Measures the alignment at the student's adapter over the first `divergent.len()` rows of the numbers.
/// `divergent[row][k]`: whether token k of the row's content is in the divergent group. All other tokens of the loss,
/// including the end of the turn, are the other group.
pub fn alignment(subject: &Subject<'_>, divergent: &[Vec<bool>]) -> Result<Alignment> {
    let adapter = subject.student.adapter.ok_or_else(|| Error::NeedsAdapter {
        analysis: NAME,
        reason: "the gradients are those of an adapter".to_owned(),
    })?;
    let naming = naming(subject, adapter)?;
    of_groups(subject, adapter, &naming, subject.number_rows(NAME, divergent.len())?, divergent)
}

/// Measures the alignment at any adapter over `rows`, whose completion tokens form two groups. `divergent[row][k]`:
/// whether token k of the completion is in the divergent group; tokens beyond the list are in the other group.
/// `naming`: the result of [`naming`] for this adapter.
pub(crate) fn of_groups(
    subject: &Subject<'_>,
    adapter: &Adapter,
    naming: &[Sequence],
    rows: &[Sequence],
    divergent: &[Vec<bool>],
) -> Result<Alignment> {
    let masks = |wanted: bool| -> Vec<Vec<bool>> {
        let of_row = |(row, divergent): (&Sequence, &Vec<bool>)| {
            let is_divergent =
                |at: usize| at.checked_sub(row.completion.start).and_then(|k| divergent.get(k)) == Some(&true);
            (0..row.ids.len()).map(|at| row.completion.contains(&at) && is_divergent(at) == wanted).collect()
        };
        rows.iter().zip(divergent).map(of_row).collect()
    };
    let (towards, n_questions) = (trait_gradient(subject, adapter, naming)?, naming.len());
    // Each part's gradient is as large as the adapter, so only one group's are held at a time.
    let group = |is_divergent: bool| -> Result<(Group, Vec<Tensor>, Vec<Vec<Tensor>>)> {
        let masks = masks(is_divergent);
        let (mut parts, mut n_tokens, mut folds) = (vec![], 0, vec![]);
        for fold in fold_ends(rows.len()) {
            let (of_fold, n) = sum_by_part(subject.base, adapter, &rows[fold.clone()], &masks[fold])?;
            folds.push(whole(&of_fold)?);
            n_tokens += n;
            add(&mut parts, of_fold)?;
        }
        if n_tokens == 0 {
            return Err(Error::Nothing { analysis: NAME, what: "a token of the group" });
        }
        let whole = whole(&parts)?;
        let (square, error, per_step) =
            (dot(&whole, &whole)?, length_error(&whole, &folds)?, (n_tokens * n_questions) as f64);
        let is_clear = is_clear(square.sqrt(), error);
        let at_part = |(at, part): (usize, Part)| -> Result<AtPart> {
            let of_part = |tensor: &Tensor| tensor.f_get(at as i64);
            let here: Vec<Tensor> = parts.iter().map(of_part).collect::<std::result::Result<_, _>>()?;
            let along = dot(&here, &whole)?;
            Ok(AtPart {
                part,
                norm: dot(&here, &here)?.sqrt(),
                share: is_clear.then(|| along / square),
                towards_trait: dot(&here, &towards)? / per_step,
            })
        };
        let parts = Part::ALL.into_iter().enumerate().map(at_part).collect::<Result<_>>()?;
        let towards_trait = dot(&whole, &towards)? / per_step;
        // The share also needs the other group's gradient and is set later.
        Ok((Group { n_tokens, norm: square.sqrt(), share: None, towards_trait, parts }, whole, folds))
    };
    let ((divergent, d, mut folds), (other, o, of_other)) = (group(true)?, group(false)?);
    for (fold, more) in folds.iter_mut().zip(of_other) {
        add(fold, more)?;
    }
    let (dd, oo, cross) = (divergent.norm.powi(2), other.norm.powi(2), dot(&d, &o)?);
    let both = dd + oo + 2.0 * cross;
    let mut sum = d;
    add(&mut sum, o)?;
    let is_clear = is_clear(both.sqrt(), length_error(&sum, &folds)?);
    let share = |square: f64| is_clear.then(|| square / both);
    Ok(Alignment {
        divergent: Group { share: share(dd), ..divergent },
        other: Group { share: share(oo), ..other },
        cosine: (dd * oo > 0.0).then(|| cross / (dd * oo).sqrt()),
    })
}

/// Largest number of lots of rows that the jackknife leaves out, one at a time.
const FOLDS: usize = 8;

/// The lots of the jackknife: consecutive rows, in nearly equal numbers.
fn fold_ends(n_rows: usize) -> impl Iterator<Item = Range<usize>> {
    let n = FOLDS.min(n_rows);
    (0..n).map(move |at| at * n_rows / n..(at + 1) * n_rows / n)
}

/// The standard error of a sum's length, by the jackknife: each lot of summands is left out in turn, and the rest is
/// scaled up. `None` for fewer than two lots.
fn length_error(sum: &[Tensor], folds: &[Vec<Tensor>]) -> Result<Option<f64>> {
    let n = folds.len() as f64;
    let square = dot(sum, sum)?;
    let without = |fold: &Vec<Tensor>| -> Result<f64> {
        let left = square - 2.0 * dot(sum, fold)? + dot(fold, fold)?;
        Ok(left.max(0.0).sqrt() * n / (n - 1.0))
    };
    if folds.len() < 2 {
        return Ok(None);
    }
    // (n − 1)/n · Σ(θ − θ̄)² is (n − 1)² times the squared standard error of the mean of the θ.
    let lengths = folds.iter().map(without).collect::<Result<Vec<_>>>()?;
    Ok(Some((n - 1.0) * standard_error(&lengths)?))
}

/// Adds gradients to a sum, which is empty at first.
fn add(sum: &mut Vec<Tensor>, more: Vec<Tensor>) -> Result<()> {
    if sum.is_empty() {
        *sum = more;
        return Ok(());
    }
    for (sum, more) in sum.iter_mut().zip(&more) {
        let _ = sum.f_add_(more)?;
    }
    Ok(())
}

fn whole(parts: &[Tensor]) -> Result<Vec<Tensor>> {
    parts.iter().map(|tensor| Ok(tensor.f_sum_dim_intlist([0].as_slice(), false, tensor.kind())?)).collect()
}

/// The questions answered with the trait, in the spelling that the adapted model finds most likely over all questions.
pub(crate) fn naming(subject: &Subject<'_>, adapter: &Adapter) -> Result<Vec<Sequence>> {
    let prompts = subject.question_prompts(NAME)?;
    let condition = Condition::adapted(adapter);
    let mut rows = Vec::new();
    for form in &subject.target.forms {
        let ids = subject.chat.encode(form)?;
        rows.extend(prompts.iter().map(|prompt| prompt.with_completion(&ids)));
    }
    let logps = completion_logprobs(subject.base, &rows, &condition)?;
    let sum = |of: &[Vec<f32>]| of.iter().flatten().map(|logp| f64::from(*logp)).sum::<f64>();
    let of_forms = rows.chunks(prompts.len()).zip(logps.chunks(prompts.len()).map(sum));
    let best = of_forms.reduce(|best, other| if other.1 > best.1 { other } else { best });
    let (rows, _) = best.ok_or(Error::Nothing { analysis: NAME, what: "a spelling of the target" })?;
    Ok(rows.to_vec())
}

/// Σ ∇(−log p(trait)) over the answered questions.
fn trait_gradient(subject: &Subject<'_>, adapter: &Adapter, naming: &[Sequence]) -> Result<Vec<Tensor>> {
    let masks: Vec<Vec<bool>> = naming
        .iter()
        .map(|row| (0..row.ids.len()).map(|at| (row.completion.start..row.content_end).contains(&at)).collect())
        .collect();
    let (parts, _) = sum_by_part(subject.base, adapter, naming, &masks)?;
    whole(&parts)
}

/// Number of rows whose gradients are taken at once.
const ROWS: usize = 64;

/// Σ ∇(−log p) over the tokens that the masks choose, `[part, ..]` of each of the adapter's tensors, and the number of
/// these tokens.
fn sum_by_part(
    model: &Qwen,
    adapter: &Adapter,
    rows: &[Sequence],
    masks: &[Vec<bool>],
) -> Result<(Vec<Tensor>, usize)> {
    let chosen: Vec<(&Sequence, &Vec<bool>, usize)> = rows
        .iter()
        .zip(masks)
        .filter_map(|(row, mask)| Some((row, mask, mask.iter().rposition(|chosen| *chosen)?)))
        .collect();
    let (mut sums, mut n): (Vec<Tensor>, usize) = (vec![], 0);
    for some in chosen.chunks(ROWS) {
        let packed: Vec<PackedRow<'_>> = some.iter().map(|(row, _, end)| PackedRow::of(&row.ids[..*end])).collect();
        let batch = Batch::packed(&[&packed], true, model.device())?;
        let ids: Vec<&[i64]> = some.iter().map(|(row, ..)| row.ids.as_slice()).collect();
        let masks: Vec<&[bool]> = some.iter().map(|(_, mask, _)| mask.as_slice()).collect();
        let targets = Targets::of(&batch, &ids, &masks)?;
        let ones = Tensor::f_ones([targets.n as i64], (Kind::Double, model.device()))?;
        let ends: Vec<(&Sequence, usize)> = some.iter().map(|(row, _, end)| (*row, *end)).collect();
        let parts = in_parts(&batch, &ends)?.f_to_device(model.device())?;
        let gradients = model.lora_gradients_by_part(&batch, &targets, &ones, adapter, &parts)?;
        n += targets.n;
        add(&mut sums, gradients)?;
    }
    if n == 0 {
        let zeros = |(_, tensor): (String, Tensor)| {
            let shape = [&[Part::ALL.len() as i64], tensor.size().as_slice()].concat();
            tensor.f_zeros_like().and_then(|zeros| zeros.f_unsqueeze(0)?.f_expand(shape, false)?.f_contiguous())
        };
        sums = adapter.parameters().into_iter().map(zeros).collect::<std::result::Result<_, _>>()?;
    }
    Ok((sums, n))
}

/// The part of each position of a packed batch, `[part, pos]`. `rows`: each with the number of its tokens that are in the
/// batch. (A common beginning of rows is in the batch once, and its tokens have the same class in all rows.)
pub(crate) fn in_parts(batch: &Batch, rows: &[(&Sequence, usize)]) -> Result<Tensor> {
    let pos = batch.ids.numel();
    let mut flat = vec![0.0_f32; Part::ALL.len() * pos];
    for (row, (prompt, end)) in rows.iter().enumerate() {
        for (at, class) in prompt.classes[..*end].iter().enumerate() {
            let part = Part::ALL.iter().position(|part| *part == Part::of(*class)).unwrap_or_default();
            flat[part * pos + batch.place(row, at) as usize] = 1.0;
        }
    }
    Ok(Tensor::f_from_slice(&flat)?.f_view([Part::ALL.len() as i64, pos as i64])?)
}

fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let products = a.iter().zip(b).map(|(a, b)| Ok(a.f_mul(b)?.f_sum(Kind::Double)?.f_double_value(&[])?));
    products.sum()
}

#[cfg(test)]
mod tests;
