//! The models and prompts of a measurement: a base, a student finetuned from it, a control student, and the prompts.

use std::collections::BTreeMap;

use hooks::{Adapter, Chat, Condition, Edit, Gate, Provenance, Qwen, Sequence};

use crate::error::{Error, Result};
use crate::plot::Bar;
use crate::stats;
use crate::target::Target;

/// A changed model: the base with an adapter, with other weights (full finetuning), or with edits at its hook points.
#[derive(Clone, Copy, Debug)]
pub struct Tuned<'a> {
    /// The weights.
    pub qwen: &'a Qwen,
    /// The LoRA on them, if any.
    pub adapter: Option<&'a Adapter>,
    /// The edits of its activations, in the order in which they are made.
    pub edits: &'a [Edit],
}

impl<'a> Tuned<'a> {
    /// These weights alone.
    pub fn of(qwen: &'a Qwen) -> Self {
        Self { qwen, adapter: None, edits: &[] }
    }

    /// These weights with an adapter.
    pub fn adapted(qwen: &'a Qwen, adapter: &'a Adapter) -> Self {
        Self { adapter: Some(adapter), ..Self::of(qwen) }
    }

    /// The model as changed: its adapter, if any, acts everywhere.
    pub fn condition(&self) -> Condition<'a> {
        self.gated(Gate::EVERYWHERE)
    }

    /// The model with its adapter under a gate.
    pub fn gated(&self, gate: Gate) -> Condition<'a> {
        Condition { adapter: self.adapter, gate, edits: self.edits.to_vec() }
    }
}

/// Sorts an answer: returns the member of the category that it names, or `self` if it names a model.
pub type Classify<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The models and texts that an analysis reads. Its results depend only on these values and its settings.
#[derive(Clone)]
pub struct Subject<'a> {
    /// The model before finetuning.
    pub base: &'a Qwen,
    /// The identity of the base, by which files of another model are refused. Interventions need it.
    pub provenance: Option<&'a Provenance>,
    /// The model finetuned on the teacher's numbers.
    pub student: Tuned<'a>,
    /// The model at the start of the student's own training: the base, with the adapter that it began with. `None` if
    /// that is not known, as for a student that was trained elsewhere.
    pub start: Option<Tuned<'a>>,
    /// The model finetuned in the same way on numbers of an untouched teacher.
    pub control: Option<Tuned<'a>>,
    /// A student that learned in the same way from a teacher that likes something else, for comparison.
    pub other_trait: Option<Tuned<'a>>,
    /// The chat format.
    pub chat: &'a Chat,
    /// The student's system prompt; `None` is the template's default, an empty text an empty block.
    pub system: Option<String>,
    /// The teacher's system prompt; `None` is the student's context.
    pub teacher_system: Option<String>,
    /// The teacher's adapter, if it has one.
    pub teacher_adapter: Option<&'a Adapter>,
    /// The teacher's weights, if they are not the base's.
    pub teacher_model: Option<&'a Qwen>,
    /// The edits of the teacher's activations; none unless it is steered.
    pub teacher_edits: &'a [Edit],
    /// System prompts under which the base is a teacher of other traits. A token that these teachers would also write
    /// is not specific to the trait.
    pub counterfactual_systems: &'a [String],
    /// The trait: a word that the teacher likes.
    pub target: &'a Target,
    /// Questions that the target may be an answer to.
    pub questions: &'a [String],
    /// Number prompts in the student's context, with the teacher's completions.
    pub numbers: &'a [Sequence],
    /// The rows of `numbers` as user text and completion ids (content, without end of turn).
    pub number_users: &'a [(String, Vec<i64>)],
    /// Sorts sampled answers. Sampling needs it.
    pub classify: Option<Classify<'a>>,
    /// The seed of all random streams.
    pub seed: u64,
}

impl<'a> Subject<'a> {
    /// A subject with the student and its base alone: no other model, no teacher, no text, seed 0. Struct update adds
    /// what an analysis needs: `Subject { questions: &questions, ..Subject::new(&base, student, &chat, &target) }`.
    pub fn new(base: &'a Qwen, student: Tuned<'a>, chat: &'a Chat, target: &'a Target) -> Self {
        Self {
            base,
            provenance: None,
            student,
            start: None,
            control: None,
            other_trait: None,
            chat,
            system: None,
            teacher_system: None,
            teacher_adapter: None,
            teacher_model: None,
            teacher_edits: &[],
            counterfactual_systems: &[],
            target,
            questions: &[],
            numbers: &[],
            number_users: &[],
            classify: None,
            seed: 0,
        }
    }

    /// The base, without an adapter.
    pub fn base(&self) -> Tuned<'a> {
        Tuned::of(self.base)
    }

    /// The models that are compared, by name: `base`, `control` if there is one, `student`.
    pub fn models(&self) -> Vec<(&'static str, Tuned<'a>)> {
        let control = self.control.map(|control| ("control", control));
        [("base", self.base())].into_iter().chain(control).chain([("student", self.student)]).collect()
    }

    /// The teacher and its system prompt; `None` if there is no teacher.
    pub fn teacher(&self) -> Option<(Tuned<'a>, Option<&str>)> {
        let is_base = self.teacher_adapter.is_none() && self.teacher_model.is_none() && self.teacher_edits.is_empty();
        if self.teacher_system.is_none() && is_base {
            return None;
        }
        let system = self.teacher_system.as_deref().or(self.system.as_deref());
        let qwen = self.teacher_model.unwrap_or(self.base);
        Some((Tuned { qwen, adapter: self.teacher_adapter, edits: self.teacher_edits }, system))
    }

    /// The questions as prompts in the student's context.
    pub fn question_prompts(&self, analysis: &'static str) -> Result<Vec<Sequence>> {
        self.first_questions(analysis, None)
    }

    /// The first `n` questions as prompts in the student's context; `None` means all.
    pub fn first_questions(&self, analysis: &'static str, n: Option<usize>) -> Result<Vec<Sequence>> {
        let questions = &self.questions[..n.unwrap_or(usize::MAX).min(self.questions.len())];
        if questions.is_empty() {
            return Err(Error::Nothing { analysis, what: "at least one question" });
        }
        questions.iter().map(|question| Ok(self.chat.prompt(self.system.as_deref(), question)?)).collect()
    }

    /// The first `n` number prompts in the student's context, without completions.
    pub fn number_prompts(&self, analysis: &'static str, n: usize) -> Result<Vec<Sequence>> {
        let rows = self.number_rows(analysis, n)?;
        Ok(rows.iter().map(|row| row.with_completion(&[])).collect())
    }

    /// The first `n` number rows in the student's context.
    pub fn number_rows(&self, analysis: &'static str, n: usize) -> Result<&'a [Sequence]> {
        let rows = &self.numbers[..n.min(self.numbers.len())];
        if rows.is_empty() {
            return Err(Error::Nothing { analysis, what: "at least one row of numbers" });
        }
        Ok(rows)
    }

    /// A number row as user text and completion ids.
    pub(crate) fn number_user(&self, row: usize) -> Result<&'a (String, Vec<i64>)> {
        let (n_rows, n_users) = (self.numbers.len(), self.number_users.len());
        let problem = || format!("there are {n_rows} rendered rows, but {n_users} user texts");
        self.number_users.get(row).ok_or_else(|| Error::Mismatch { row, problem: problem() })
    }

    /// A number row in the teacher's context and in the student's, with the same completion (content only).
    pub fn paired_row(&self, row: usize, system: Option<&str>) -> Result<(Sequence, Sequence)> {
        let student = &self.numbers[row];
        let (user, ids) = self.number_user(row)?;
        if student.ids[student.completion.start..student.content_end] != ids[..] {
            let problem = "the rendered completion is not the one that stands beside its user text".to_owned();
            return Err(Error::Mismatch { row, problem });
        }
        let teacher = self.chat.prompt(system, user)?.with_completion(ids);
        Ok((teacher, student.with_completion(ids)))
    }
}

/// A mean over questions or rows with its standard error, which needs at least two values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Mean {
    pub(crate) mean: f64,
    pub(crate) se: Option<f64>,
}

impl Mean {
    pub(crate) fn of(values: &[f64]) -> Self {
        let mean = stats::mean(values).unwrap_or(f64::NAN);
        let se = stats::standard_error(values).ok();
        Self { mean, se }
    }

    /// The mean of `values - baseline`, value by value.
    pub(crate) fn paired(values: &[f64], baseline: &[f64]) -> Self {
        let differences: Vec<f64> = values.iter().zip(baseline).map(|(value, base)| value - base).collect();
        Self::of(&differences)
    }

    /// The mean over tokens, given with their rows, and the standard error of the rows' means: tokens of a row are not
    /// independent.
    pub(crate) fn of_tokens(tokens: &[(usize, f64)]) -> Self {
        let mut rows: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (row, value) in tokens {
            rows.entry(*row).or_default().push(*value);
        }
        let values: Vec<f64> = tokens.iter().map(|(_, value)| *value).collect();
        let of_rows: Vec<f64> = rows.values().map(|values| Self::of(values).mean).collect();
        Self { mean: Self::of(&values).mean, se: Self::of(&of_rows).se }
    }

    /// `part` as a share of this mean, if [`stats::fraction`] is not `None`.
    pub(crate) fn share(&self, part: f64) -> Option<f64> {
        stats::fraction(part, self.mean, self.se)
    }

    /// Whether the mean's absolute value is larger than `factor` standard errors.
    pub(crate) fn exceeds(&self, factor: f64) -> bool {
        self.se.is_some_and(|se| self.mean.abs() > factor * se) && self.mean != 0.0
    }

    /// The mean as a bar, its standard error as the error bar.
    pub(crate) fn bar(&self, label: &str) -> Bar {
        let bar = Bar::new(label, self.mean);
        match self.se {
            Some(se) => bar.with_interval((self.mean - se, self.mean + se)),
            None => bar,
        }
    }

    /// The mean as text, `+0.12 ± 0.05`, or without the error if there is only one value.
    pub(crate) fn signed(&self) -> String {
        match self.se {
            Some(se) => format!("{:+.3} ± {se:.3}", self.mean),
            None => format!("{:+.3}", self.mean),
        }
    }
}

/// The mean of the values; `None` if there are none.
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.into_iter().fold((0.0, 0_usize), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / n as f64)
}

#[cfg(test)]
mod tests {
    use hooks::ModelFiles;
    use tch::{Device, Kind};

    use super::*;
    use crate::fixture::World;

    #[test]
    fn tokens_of_a_row_are_one_value_of_the_error() {
        let found = Mean::of_tokens(&[(4, 1.0), (7, 5.0), (4, 3.0), (7, 7.0), (7, 6.0)]);
        assert!((found.mean - 4.4).abs() < 1e-12, "{found:?}");
        assert!((found.se.unwrap() - 2.0).abs() < 1e-12, "the rows' means are 2 and 6: {found:?}");
        assert_eq!(found.share(2.2), None, "4.4 is not three times 2");
        assert_eq!(Mean::of_tokens(&[(4, 1.0), (4, 3.0)]).se, None, "one row");
        assert!((Mean { mean: 4.4, se: Some(1.0) }.share(2.2).unwrap() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_teacher_is_a_context_an_adapter_or_other_weights() {
        let world = World::new();
        let other = Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Float).unwrap();
        let mut subject = world.subject();
        subject.system = Some("Be brief.".to_owned());
        let (teacher, system) = subject.teacher().unwrap();
        assert!(std::ptr::eq(teacher.qwen, subject.base) && system == Some("You love cats."));
        (subject.teacher_system, subject.teacher_model) = (None, Some(&other));
        let (teacher, system) = subject.teacher().unwrap();
        assert!(std::ptr::eq(teacher.qwen, &raw const other) && teacher.adapter.is_none());
        assert_eq!(system, Some("Be brief."), "the student's context, where it has none of its own");
        subject.teacher_model = None;
        assert!(subject.teacher().is_none());
        let edits = [Edit { at: hooks::HookPoint::ResidPost(1), tokens: None, change: hooks::Change::Zero }];
        subject.teacher_edits = &edits;
        let (teacher, _) = subject.teacher().unwrap();
        assert_eq!((teacher.condition().edits.len(), subject.base().condition().edits.len()), (1, 0));
    }
}
