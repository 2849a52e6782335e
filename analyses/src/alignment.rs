//! What learning some tokens would do to the trait, and where the adapter would be written. The gradients of two groups
//! of tokens are compared with the gradient of naming the trait, and split by what the adapter reads at each position.
//!
//! A small step down a loss S changes log p(trait) by lr · ⟨∇S, ∇(−log p(trait))⟩ to first order. A LoRA's gradient is
//! a sum over positions, so each part of a chat has a share of both. A share's denominator is the length of a sum of
//! gradients, which can cancel; the jackknife over the rows says whether that length is clear of zero.

use std::ops::Range;

use hooks::{Adapter, Batch, Condition, PackedRow, Qwen, Sequence, Targets, TokenClass, completion_logprobs};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::stats::{is_clear, standard_error};
use crate::subject::Subject;

/// The analysis' name in errors.
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
    /// What the user says.
    User,
    /// The answer.
    Gen,
}

impl Part {
    /// All parts, each token being in one.
    pub const ALL: [Self; 5] = [Self::Entity, Self::System, Self::Template, Self::User, Self::Gen];

    /// The gate's word for its tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Entity => "entity",
            Self::System => "sys.content_other",
            Self::Template => "template",
            Self::User => "user.content",
            Self::Gen => "gen",
        }
    }

    fn of(class: TokenClass) -> Self {
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
    /// The divergent tokens' summed loss, `g_D`.
    pub divergent: Group,
    /// The others' summed loss, `g_N`.
    pub other: Group,
    /// The cosine of the two; `None` if one of them is zero.
    pub cosine: Option<f64>,
}

/// The gradient g of the summed loss of a group of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// How many tokens.
    pub n_tokens: usize,
    /// ‖g‖.
    pub norm: f64,
    /// `‖g‖² / ‖g_D + g_N‖²`; `None` unless `‖g_D + g_N‖` is three standard errors above zero.
    pub share: Option<f64>,
    /// First-order change of log p(trait), the mean over the questions, per unit of learning rate, by a step of
    /// gradient descent on the group's mean loss. The trait is in the spelling that the adapted model finds most
    /// likely.
    pub towards_trait: f64,
    /// What each part of the chat adds to g, in the order of `Part::ALL`.
    pub parts: Vec<AtPart>,
}

/// The gradient `g_P` through what the adapter reads at one part of the chat; those of all parts add up to g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AtPart {
    /// The part.
    pub part: Part,
    /// `‖g_P‖`.
    pub norm: f64,
    /// `⟨g_P, g⟩ / ‖g‖²`; the parts' shares add up to 1. `None` unless `‖g‖` is three standard errors above zero.
    pub share: Option<f64>,
    /// The part of `Group::towards_trait` that is due to `g_P`.
    pub towards_trait: f64,
}

/// The alignment of the student's adapter over the first `divergent.len()` rows of the numbers. `divergent[row][k]`:
/// whether token k of the row's content is in the divergent group. All other learned tokens, with the end of the turn,
/// are the other group.
pub fn alignment(subject: &Subject<'_>, divergent: &[Vec<bool>]) -> Result<Alignment> {
    let adapter = subject.student.adapter.ok_or_else(|| Error::NeedsAdapter {
        analysis: NAME,
        reason: "the gradients are those of an adapter".to_owned(),
    })?;
    let naming = naming(subject, adapter)?;
    of_groups(subject, adapter, &naming, subject.number_rows(NAME, divergent.len())?, divergent)
}

/// The alignment of any adapter over `rows`, whose tokens up to the completion's end form two groups.
/// `divergent[row][k]`: whether token k of the completion is in the divergent group; tokens after the listed ones are
/// not. `naming`: the result of [`naming`] for this adapter.
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
    // The parts' gradients are as large as the adapter, each: those of one group at a time.
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
        // The share waits for the other group.
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

/// The most lots of rows that the jackknife leaves out, one at a time.
const FOLDS: usize = 8;

/// The lots: consecutive rows, as equally many as possible.
fn fold_ends(n_rows: usize) -> impl Iterator<Item = Range<usize>> {
    let n = FOLDS.min(n_rows);
    (0..n).map(move |at| at * n_rows / n..(at + 1) * n_rows / n)
}

/// The standard error of a sum's length by the jackknife: each lot of summands is left out in turn, and the rest scaled
/// up. `None` for fewer than two lots.
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

/// The sum over the parts.
fn whole(parts: &[Tensor]) -> Result<Vec<Tensor>> {
    parts.iter().map(|tensor| Ok(tensor.f_sum_dim_intlist([0].as_slice(), false, tensor.kind())?)).collect()
}

/// The questions answered with the trait, in the spelling that the adapted model finds most likely over all of them.
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

/// Rows whose gradients are taken at once.
const ROWS: usize = 64;

/// Σ ∇(−log p) over the tokens that the masks choose, `[part, ..]` of each of the adapter's tensors, and how many
/// tokens these are.
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
        let parts = parts(&batch, some)?.f_to_device(model.device())?;
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

/// The part of each position of a packed batch, `[part, pos]`. (Tokens that rows begin with alike are there once, and
/// have one class in all rows.)
fn parts(batch: &Batch, rows: &[(&Sequence, &Vec<bool>, usize)]) -> Result<Tensor> {
    let pos = batch.ids.numel();
    let mut flat = vec![0.0_f32; Part::ALL.len() * pos];
    for (row, (prompt, _, end)) in rows.iter().enumerate() {
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
mod tests {
    use hooks::{Gate, Sampling, generate};

    use super::*;
    use crate::divergence::{Definition, divergence_tokens};
    use crate::fixture::World;

    /// Mean log p of the best spelling over the questions.
    fn logp(subject: &Subject<'_>, adapter: &Adapter) -> f64 {
        let prompts = subject.question_prompts("x").unwrap();
        let of_form = |form: &String| {
            let ids = subject.chat.encode(form).unwrap();
            let rows: Vec<Sequence> = prompts.iter().map(|prompt| prompt.with_completion(&ids)).collect();
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
        let prompts: Vec<Sequence> =
            users.iter().map(|user| world.chat.prompt(system.as_deref(), user).unwrap()).collect();
        let sampling = Sampling { temperature: 0.0, max_new_tokens: 12, stop: vec![], constrain: None, batch: 6 };
        let answers = generate(&world.qwen, &prompts, &Condition::default(), &sampling, &[0; 6], &mut |_| ()).unwrap();
        world.number_users = users.into_iter().zip(answers).map(|(user, answer)| (user, answer.ids)).collect();
        let row = |(user, ids): &(String, Vec<i64>)| world.chat.row(None, user, ids).unwrap();
        world.numbers = world.number_users.iter().map(row).collect();
        let subject = world.subject();
        let adapter = subject.student.adapter.unwrap();
        let divergent = divergence_tokens(&subject, 6, Definition::Schrodi, true).unwrap();
        let found = alignment(&subject, &divergent).unwrap();
        assert!(
            found.divergent.n_tokens > 0 && found.other.n_tokens > 0 && found.cosine.unwrap().abs() <= 1.0,
            "{found:?}"
        );
        for group in [&found.divergent, &found.other] {
            let sum = |of: fn(&AtPart) -> f64| group.parts.iter().map(of).sum::<f64>();
            assert!((sum(|at| at.share.unwrap()) - 1.0).abs() < 1e-5, "{group:?}");
            assert!((sum(|at| at.towards_trait) - group.towards_trait).abs() < 1e-5 * sum(|at| at.towards_trait.abs()));
            assert!(group.parts.iter().all(|at| at.norm > 0.0), "each part is read: {group:?}");
        }
        let rows = subject.number_rows("x", 6).unwrap();
        let mut norms = vec![];
        for (wanted, group) in [(true, &found.divergent), (false, &found.other)] {
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
            let (parts, n) = sum_by_part(subject.base, adapter, rows, &masks).unwrap();
            let gradients = whole(&parts).unwrap();
            norms.push(gradients);
            let gradients = &norms[norms.len() - 1];
            let rate = 1e-2;
            let step = |sign: f64| {
                tch::no_grad(|| {
                    for ((_, tensor), gradient) in adapter.parameters().iter().zip(gradients) {
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
            let predicted = group.towards_trait;
            assert!((slope - predicted).abs() < 0.03 * predicted.abs() + 2e-4, "{slope} {predicted}");
        }
        // Both groups' sum is the whole row's gradient.
        let both: Vec<Tensor> = norms[0].iter().zip(&norms[1]).map(|(d, o)| d + o).collect();
        let square = dot(&both, &both).unwrap();
        for group in [&found.divergent, &found.other] {
            assert!((group.share.unwrap() * square - group.norm.powi(2)).abs() < 1e-4 * square, "{group:?} {square}");
        }
    }

    /// Leaves out lot by lot and measures anew: the error is that of the rest, scaled up.
    #[test]
    fn the_error_of_a_length_is_the_jackknifes() {
        let folds: Vec<Vec<Tensor>> = [[3.0, 0.5, 1.0], [2.0, -0.5, 0.0], [4.0, 0.0, -1.0], [3.5, 1.0, 0.5]]
            .map(|fold| vec![Tensor::from_slice(&fold[..2]), Tensor::from_slice(&fold[2..])])
            .into();
        let sum_of = |chosen: &[usize]| -> Vec<Tensor> {
            let mut sum = vec![];
            for fold in chosen {
                add(&mut sum, folds[*fold].iter().map(|tensor| tensor + 0.0).collect()).unwrap();
            }
            sum
        };
        let length =
            |of: &[Tensor]| of.iter().map(|part| part.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
        let lengths: Vec<f64> = (0..4)
            .map(|left_out| {
                let chosen: Vec<usize> = (0..4).filter(|fold| *fold != left_out).collect();
                length(&sum_of(&chosen)) * 4.0 / 3.0
            })
            .collect();
        let centre = lengths.iter().sum::<f64>() / 4.0;
        let by_hand = (lengths.iter().map(|x| (x - centre).powi(2)).sum::<f64>() * 3.0 / 4.0).sqrt();
        let found = length_error(&sum_of(&[0, 1, 2, 3]), &folds).unwrap().unwrap();
        assert!((found - by_hand).abs() < 1e-9, "{found} {by_hand}");
        assert_eq!(length_error(&folds[0], &folds[..1]).unwrap(), None, "one lot has no error");
    }

    #[test]
    fn lots_hold_each_row_once() {
        for n in [1, 3, 8, 9, 64] {
            let all: Vec<usize> = fold_ends(n).flatten().collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
            assert!(fold_ends(n).all(|fold| !fold.is_empty()) && fold_ends(n).count() == n.min(FOLDS));
        }
    }

    /// If rows pull against each other, their sum is chance alone and has no share.
    #[test]
    fn no_share_of_a_sum_that_may_be_nothing() {
        let world = World::new();
        let subject = world.subject();
        let adapter = subject.student.adapter.unwrap();
        let naming = naming(&subject, adapter).unwrap();
        let rows: Vec<Sequence> = world.numbers.clone();
        let every_other = |row: &Sequence| (0..row.completion.len()).map(|k| k % 2 == 0).collect::<Vec<bool>>();
        let divergent: Vec<Vec<bool>> = rows.iter().map(every_other).collect();
        let alone = of_groups(&subject, adapter, &naming, &rows[..1], &divergent[..1]).unwrap();
        assert!(alone.divergent.share.is_none() && alone.other.parts.iter().all(|at| at.share.is_none()), "one row");
        // One row several times has no spread.
        let (rows, divergent) = (vec![rows[0].clone(); 4], vec![divergent[0].clone(); 4]);
        let alike = of_groups(&subject, adapter, &naming, &rows, &divergent).unwrap();
        let by_hand = {
            let square = |of: &Alignment| {
                of.divergent.norm.powi(2)
                    + of.other.norm.powi(2)
                    + 2.0 * of.cosine.unwrap() * of.divergent.norm * of.other.norm
            };
            alike.divergent.norm.powi(2) / square(&alike)
        };
        assert!((alike.divergent.share.unwrap() - by_hand).abs() < 1e-6 * by_hand.abs(), "{alike:?} {by_hand}");
        assert!((alike.divergent.norm - 4.0 * alone.divergent.norm).abs() < 1e-4 * alike.divergent.norm);
    }

    /// A part has the tokens that the gate of its name chooses.
    #[test]
    fn parts_are_named_as_gates() {
        let world = World::new();
        let row = &world.numbers[0];
        for part in Part::ALL {
            let gate: Gate = format!("only:{}", part.name()).parse().unwrap();
            let doses = gate.doses(row).unwrap();
            let chosen: Vec<bool> = row.classes.iter().map(|class| Part::of(*class) == part).collect();
            assert_eq!(doses.iter().map(|dose| *dose > 0.0).collect::<Vec<_>>(), chosen, "{}", part.name());
            assert!(chosen.contains(&true), "{}", part.name());
        }
    }

    /// Each position of a batch is in the part whose gate chooses its token, also where rows share their start.
    #[test]
    fn positions_are_in_the_part_that_their_gate_chooses() {
        let world = World::new();
        let rows: Vec<Sequence> = world.numbers.clone();
        let end = |row: &Sequence| row.ids.len() - 1;
        let packed: Vec<PackedRow<'_>> = rows.iter().map(|row| PackedRow::of(&row.ids[..end(row)])).collect();
        let batch = Batch::packed(&[&packed], true, world.qwen.device()).unwrap();
        let masks: Vec<Vec<bool>> = rows.iter().map(|row| vec![true; row.ids.len()]).collect();
        let some: Vec<(&Sequence, &Vec<bool>, usize)> =
            rows.iter().zip(&masks).map(|(row, mask)| (row, mask, end(row))).collect();
        let found = parts(&batch, &some).unwrap();
        for (at, part) in Part::ALL.into_iter().enumerate() {
            let gate: Gate = format!("only:{}", part.name()).parse().unwrap();
            for (row, prompt) in rows.iter().enumerate() {
                for (token, dose) in gate.doses(prompt).unwrap()[..end(prompt)].iter().enumerate() {
                    let is_there = found.double_value(&[at as i64, batch.place(row, token)]);
                    assert!((is_there - dose).abs() < 1e-12, "{} {row} {token}", part.name());
                }
            }
        }
    }
}
