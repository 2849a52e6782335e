//! The ledger: every nat by which a measure of the trait moved in a training, booked to the token that moved it, to the
//! position at which it was written and read, to the matrix that holds it, and to the step.
//!
//! Along the path `θ_0 … θ_T` of a training a measure f changes by `Σ_t G_t · Δθ_t`, with `G_t` the gradient of f averaged
//! over the step by a Gauss rule. An optimizer's step is linear in the gradients, once its scales are given. So the
//! change is also `−Σ_s a_s · g_s` over the gradients `g_s` of the training loss (`adjoint`), each a weighted mean over
//! tokens. The entry of a token is the derivative of its log-probability along `a_s`, times its share of the loss
//! (`entries`). Summed over tokens, parts or matrices, entries give the whole change, but for the rule's error, which is
//! shown as the residual.
//!
//! A ledger accounts for the path that was taken, with the scales that it had. It does not say what would have happened
//! without a token.

mod adjoint;
mod entries;
mod measure;
mod passes;
pub mod path;
pub mod report;
mod rows;
mod summary;

use hooks::{Adapter, Qwen, Sequence};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use measure::Measure;
pub use path::{Average, LearnedRow, Path, SoftTargets, Step};
pub use rows::{EntryRow, LedgerRow, PartRow};

use self::adjoint::{Adjoint, dot, whole};
use self::entries::{Entry, Known, Models};
use self::measure::Measured;
use crate::alignment::Part;
use crate::divergence::tokens::number_places;
use crate::error::{Error, Result};
use crate::subject::Subject;
use crate::target::{Target, TokenForms};

/// The name of the analysis, which is its folder's.
pub const NAME: &str = "ledger";

/// The settings of a ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ledger {
    /// What is booked of the trait: `margin` or `logp`.
    pub measure: Measure,
    /// The words whose measure is booked; if there are none, the target. The margin of another word leaves the subject's
    /// target out, since it would fall if the target alone rose.
    pub targets: Vec<String>,
    /// Number of rows of numbers whose loss is booked as well, beside the trait; the held-out ones if there are some.
    pub numbers: usize,
    /// Number of points of the Gauss rule on each step, 1 to 3.
    pub points: usize,
}

/// The target of the books of the loss on numbers.
pub const NUMBERS: &str = "numbers";

impl Default for Ledger {
    fn default() -> Self {
        Self { measure: Measure::Margin, targets: vec![], numbers: 0, points: 1 }
    }
}

/// The books of a training.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Books {
    /// By token and step.
    pub entries: Vec<EntryRow>,
    /// By step, part written, part read, block and map.
    pub parts: Vec<PartRow>,
    /// By group of tokens, with the residual.
    pub rows: Vec<LedgerRow>,
}

impl Ledger {
    /// Books a training of the subject's base. `name`: `student` or `control`. `like`: an adapter of the training's kind.
    pub fn books(
        &self,
        subject: &Subject<'_>,
        name: &str,
        (like, path): (&Adapter, &Path),
        progress: &mut dyn FnMut(&str),
    ) -> Result<Books> {
        path.check()?;
        if self.measure == Measure::Loss {
            return Err(Error::setting(NAME, "measure", "margin or logp, with numbers above 0 beside it", &"loss"));
        }
        let rule = gauss(self.points)?;
        let (base, targets) = (subject.base, self.chosen(subject.target)?);
        let forms: Vec<TokenForms> =
            targets.iter().map(|target| TokenForms::of(target, subject.chat)).collect::<Result<_>>()?;
        let questions = subject.question_prompts(NAME)?;
        let mut measured = vec![];
        for (target, forms) in targets.iter().zip(&forms) {
            let of = Measured::answers(base, forms, &questions, self.measure)?;
            measured.push((target.word.as_str(), self.measure, of));
        }
        if self.numbers > 0 {
            let rows = subject.number_rows(NAME, self.numbers)?;
            measured.push((NUMBERS, Measure::Loss, Measured::numbers(base, rows)?));
        }
        Booking { subject, name, like, path }.book(&measured, &rule, progress)
    }

    /// The targets: the subject's, or other members of its category, each against all the rest but the subject's.
    fn chosen(&self, own: &Target) -> Result<Vec<Target>> {
        if self.targets.is_empty() {
            return Ok(vec![own.clone()]);
        }
        let of = |word: &String| -> Result<Target> {
            if *word == own.word {
                return Ok(own.clone());
            }
            let mut members = own.others.clone();
            let at = members.iter().position(|(member, _)| member == word).ok_or_else(|| {
                Error::setting(NAME, "targets", &format!("members of the category {}", own.category), word)
            })?;
            let (word, forms) = members.remove(at);
            Ok(Target { word, forms, others: members, category: own.category.clone() })
        };
        self.targets.iter().map(of).collect()
    }
}

/// The points and weights of the Gauss rule on [0, 1].
fn gauss(points: usize) -> Result<Vec<(f64, f64)>> {
    let (two, three) = (0.5 / 3.0_f64.sqrt(), 0.5 * 0.6_f64.sqrt());
    match points {
        1 => Ok(vec![(0.5, 1.0)]),
        2 => Ok(vec![(0.5 - two, 0.5), (0.5 + two, 0.5)]),
        3 => Ok(vec![(0.5 - three, 5.0 / 18.0), (0.5, 4.0 / 9.0), (0.5 + three, 5.0 / 18.0)]),
        _ => Err(Error::setting(NAME, "points", "1 to 3", &points)),
    }
}

/// The precision of an adapter on its path: never bf16, in which a step is lost.
fn precision(base: &Qwen) -> Kind {
    if base.activation_kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

/// A measure with what it is a measure of.
type Named<'a> = (&'a str, Measure, Measured<'a>);

/// One training.
struct Booking<'a> {
    subject: &'a Subject<'a>,
    name: &'a str,
    like: &'a Adapter,
    path: &'a Path,
}

/// The book of one measure while it is made.
#[derive(Default)]
struct Open {
    adjoint: Adjoint,
    change: f64,
    decay: f64,
    entries: Vec<EntryRow>,
    parts: Vec<PartRow>,
}

impl Booking<'_> {
    fn book(&self, measured: &[Named<'_>], rule: &[(f64, f64)], progress: &mut dyn FnMut(&str)) -> Result<Books> {
        let (base, path) = (self.subject.base, self.path);
        let models = Models { base, teacher: self.subject.teacher().map(|(teacher, _)| teacher) };
        let at = |step: usize| path.adapter(self.like, step, 0.0, precision(base));
        let (first, last) = (at(0)?, at(path.steps.len())?);
        let change = |(_, _, of): &Named<'_>| -> Result<Open> {
            Ok(Open { change: of.value(base, &last)? - of.value(base, &first)?, ..Open::default() })
        };
        let mut open = measured.iter().map(change).collect::<Result<Vec<_>>>()?;
        let (mut known, labelled) = (Known::default(), self.labelled()?);
        for (index, step) in path.steps.iter().enumerate().rev() {
            progress(&format!("{NAME}: {}, step {} of {}", self.name, index + 1, path.steps.len()));
            let adapter = at(index)?;
            let here: Vec<Tensor> = adapter.parameters().into_iter().map(|(_, tensor)| tensor).collect();
            let mut along = vec![];
            for ((_, _, of), open) in measured.iter().zip(&mut open) {
                let moves = step.learning_rate > 0.0;
                let gradient = if moves { Some(self.mean_gradient(of, rule, index)?) } else { None };
                if let Some(gradient) = gradient.as_ref().filter(|_| path.decay != 0.0) {
                    open.decay -= step.learning_rate * path.decay * dot(&whole(gradient)?, &here)?;
                }
                let a = open.adjoint.back(gradient.as_deref(), step, index, path.average)?;
                if path.decay_in_gradient != 0.0 && !a.is_empty() {
                    open.decay -= path.decay_in_gradient * dot(&whole(&a)?, &here)?;
                }
                along.push(a);
            }
            if along.iter().all(Vec::is_empty) {
                continue; // no later step moves anything
            }
            let rows: Vec<(usize, &LearnedRow)> = step.rows.iter().map(|row| (*row, &path.rows[*row])).collect();
            let (entries, parts) =
                entries::of_step(models, (&adapter, &along), &rows, (&path.gate, step.clip), &mut known)?;
            for (at, (named, open)) in measured.iter().zip(&mut open).enumerate() {
                open.entries.extend(entries.iter().map(|entry| self.row(index + 1, named, (entry, at), &labelled)));
                open.parts.extend(self.part_rows(index + 1, named, &parts[at])?);
            }
        }
        let mut books = Books::default();
        for ((target, measure, _), open) in measured.iter().zip(open) {
            let label = (self.name, *target, *measure);
            books.rows.extend(summary::rows(label, path.by_teacher, &open.entries, (open.decay, open.change)));
            books.entries.extend(open.entries);
            books.parts.extend(open.parts);
        }
        Ok(books)
    }

    /// The gradient of the measure, averaged over a step.
    fn mean_gradient(&self, measured: &Measured<'_>, rule: &[(f64, f64)], step: usize) -> Result<Vec<Tensor>> {
        let base = self.subject.base;
        let mut mean: Vec<Tensor> = vec![];
        for (part, weight) in rule {
            let adapter = self.path.adapter(self.like, step, *part, precision(base))?;
            for (tensor, gradient) in measured.gradient(base, &adapter)?.into_iter().enumerate() {
                let gradient = gradient.f_mul_scalar(*weight)?;
                match mean.get_mut(tensor) {
                    Some(mean) => drop(mean.f_add_(&gradient)?),
                    None => mean.push(gradient),
                }
            }
        }
        Ok(mean)
    }

    /// The text and group of each token of each row.
    fn labelled(&self) -> Result<Vec<Vec<(String, &'static str)>>> {
        let chat = self.subject.chat;
        let of_row = |learned: &LearnedRow| -> Result<Vec<(String, &'static str)>> {
            let Sequence { ids, completion, .. } = &learned.row;
            let places = number_places(&ids[completion.clone()], chat)?;
            let label = |(at, id): (usize, &i64)| {
                let place = at.checked_sub(completion.start).and_then(|k| places.get(k).copied().flatten());
                let group = match place.filter(|_| chat.is_digit(*id)) {
                    Some((_, 0)) => "first_digit",
                    Some(_) => "later_digit",
                    None => "other",
                };
                Ok((chat.token_text(*id)?, group))
            };
            ids.iter().enumerate().map(label).collect()
        };
        self.path.rows.iter().map(of_row).collect()
    }

    /// The line of a token in the book of the measure `at`.
    fn row(
        &self,
        step: usize,
        (target, measure, _): &Named<'_>,
        (entry, at): (&Entry, usize),
        labelled: &[Vec<(String, &'static str)>],
    ) -> EntryRow {
        let changes = &entry.changes[at];
        let row = &self.path.rows[entry.row];
        let (text, group) = &labelled[entry.row][entry.at];
        let id = row.row.ids[entry.at];
        let tops = entry.teacher.map(|teacher| (teacher.top, entry.base.top));
        EntryRow {
            model: self.name.to_owned(),
            target: (*target).to_owned(),
            measure: *measure,
            step,
            row_id: row.id,
            k: entry.at as i64 - row.row.completion.start as i64,
            token_id: id,
            token_text: text.clone(),
            group: (*group).to_owned(),
            nief: tops.map(|(teacher, base)| teacher != base),
            schrodi: tops.map(|(teacher, base)| teacher == id && base != id),
            p_teacher: entry.teacher.map(|said| said.p as f32),
            p_base: entry.base.p as f32,
            p_student: entry.student.p as f32,
            pmax_teacher: entry.teacher.map(|said| said.pmax as f32),
            pmax_base: entry.base.pmax as f32,
            pmax_student: entry.student.pmax as f32,
            loss: entry.loss,
            entry: changes.written,
            entry_teacher: changes.by_teacher,
            entry_base: changes.by_base,
        }
    }

    fn part_rows(&self, step: usize, (target, measure, _): &Named<'_>, parts: &[Tensor]) -> Result<Vec<PartRow>> {
        let mut rows = vec![];
        for ((layer, proj, _), two) in self.like.pairs().zip(parts.chunks(2)) {
            let booked = Vec::<Vec<f64>>::try_from(&two[0].f_add(&two[1])?)?; // of A and B
            for (written, booked) in Part::ALL.iter().zip(booked) {
                for (read, booked) in Part::ALL.iter().zip(booked) {
                    rows.push(PartRow {
                        model: self.name.to_owned(),
                        target: (*target).to_owned(),
                        measure: *measure,
                        step,
                        written: written.name().to_owned(),
                        read: read.name().to_owned(),
                        layer,
                        proj,
                        booked,
                    });
                }
            }
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests;
