//! Asks the students of a claim: under each condition, about other traits, and with parts of an adapter alone. Answers
//! are always compared with the base's in the same context.

use std::collections::{BTreeMap, BTreeSet};

use analyses::Tuned;
use analyses::stats::mean;
use analyses::target::{Score, TokenForms};
use anyhow::{Context, Result};
use hooks::{Adapter, Condition, Sequence, TokenClass};

use super::file::{EVERYWHERE, EvalCondition};
use super::outcome::{Quantity, StudentLines};
use super::study::{Study, Unit};
use crate::experiment::{Dtype, Target};
use crate::stages::kept_rows;
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;

/// Number of training rows that prompts are compared with.
const SHARED_ROWS: usize = 32;

/// Refuses a gate of the claim that selects no token of the questions asked under it, before anything is trained. Runs
/// differ in traits and seeds, which no gate refers to, so checking one run is enough.
pub(super) fn foreseen(study: &Study, unit: &Unit, bench: &Workbench) -> Result<()> {
    let mut gated = study.conditions();
    gated.retain(|condition| !condition.gate.is_blind());
    let mut seen = BTreeSet::new();
    for student in unit.students().into_iter().filter(|student| bench.has_model_of(student.experiment)) {
        let bench = bench.of(student.experiment.clone())?;
        for condition in gated.iter().filter(|condition| condition.is_for(student.name, student.rank().is_some())) {
            let context = PromptContext::of(condition, &bench);
            let template = student.experiment.student.template;
            if !seen.insert((&condition.name, template, context.context.to_owned())) {
                continue;
            }
            let prompts = context.prompts(&bench, &bench.questions()?)?;
            let acts = prompts.iter().try_for_each(|prompt| condition.gate.acts(prompt).map(drop));
            acts.with_context(|| format!("cell {:?}, in which {:?} is asked", condition.name, student.name))?;
        }
    }
    Ok(())
}

pub(super) struct Asking<'a> {
    study: &'a Study,
    run: &'a RunDir,
    bases: BTreeMap<String, Vec<Score>>,
}

/// The scores of base and student on the questions, without an edit.
pub(super) struct Answers {
    pub(super) base: Vec<Score>,
    pub(super) student: Vec<Score>,
}

impl<'a> Asking<'a> {
    pub(super) fn of(study: &'a Study, run: &'a RunDir) -> Self {
        Self { study, run, bases: BTreeMap::new() }
    }

    /// Asks the student in every condition of the claim. Returns the scores of base and student in the condition of its
    /// training.
    pub(super) fn under_conditions(
        &mut self,
        bench: &Workbench,
        student: &str,
        model: Tuned<'_>,
        lines: &mut StudentLines,
    ) -> Result<Answers> {
        let mut here = self.study.conditions();
        here.retain(|condition| condition.is_for(student, model.adapter.is_some()));
        let contexts: BTreeSet<PromptContext<'_>> = here.iter().map(|of| PromptContext::of(of, bench)).collect();
        let forms = TokenForms::of(&bench.target(), &bench.chat)?;
        let (numbers, _) = kept_rows::learned(bench, self.run)?;
        let learned = bench.rows(&numbers[..SHARED_ROWS.min(numbers.len())])?; // as the student saw them in training
        let mut everywhere = None;
        for context in contexts {
            let of_context: Vec<&EvalCondition> =
                here.iter().filter(|of| PromptContext::of(of, bench) == context).collect();
            let prompts = context.prompts(bench, &bench.questions()?)?;
            let base = self.base(bench, context, &bench.experiment.target, &forms, &prompts)?;
            let conditions: Vec<Condition<'_>> = of_context.iter().map(|of| model.gated(of.gate.clone())).collect();
            let scores = forms
                .scores_under(model.qwen, &prompts, &conditions)
                .with_context(|| format!("in the context {:?}", context.context))?;
            let shared = shared(&prompts, &learned);
            for (condition, scores) in of_context.iter().zip(&scores) {
                for (quantity, value) in changes(scores, &base)? {
                    lines.push(&condition.name, quantity, value, prompts.len());
                }
                lines.push(&condition.name, Quantity::SharedPrefix, shared.0, prompts.len());
                lines.push(&condition.name, Quantity::SharedTokens, shared.1, prompts.len());
                if condition.name == EVERYWHERE {
                    everywhere = Some(Answers { base: base.clone(), student: scores.clone() });
                }
            }
        }
        everywhere.context("every claim has the cell everywhere")
    }

    pub(super) fn about_other_traits(
        &mut self,
        bench: &Workbench,
        model: Tuned<'_>,
        lines: &mut StudentLines,
    ) -> Result<()> {
        let context = PromptContext::of_training(bench);
        let others = self.study.claim.targets.iter().filter(|target| target.word != bench.experiment.target.word);
        for other in others.cloned().collect::<Vec<_>>() {
            let forms = TokenForms::of(&bench.protocol.target(&other.word, &other.category), &bench.chat)?;
            let prompts = bench.protocol.questions(&other.category, bench.experiment.measure.n_questions)?;
            let prompts = context.prompts(bench, &prompts)?;
            let base = self.base(bench, context, &other, &forms, &prompts)?;
            let scores = forms.scores(model.qwen, &prompts, &model.condition())?;
            for (quantity, value) in changes(&scores, &base)? {
                lines.push_of_trait(other.word.clone(), EVERYWHERE, quantity, value, prompts.len());
            }
        }
        Ok(())
    }

    /// Measures the effect of parts of a student's change, each alone.
    pub(super) fn with_parts(
        &mut self,
        bench: &Workbench,
        parts: &[(Quantity, Adapter)],
        lines: &mut StudentLines,
    ) -> Result<()> {
        let context = PromptContext::of_training(bench);
        let forms = TokenForms::of(&bench.target(), &bench.chat)?;
        let prompts = context.prompts(bench, &bench.questions()?)?;
        let base = self.base(bench, context, &bench.experiment.target, &forms, &prompts)?;
        for (quantity, part) in parts {
            let scores = forms.scores(&bench.base, &prompts, &Condition::adapted(part))?;
            let [(_, value), ..] = changes(&scores, &base)?;
            lines.push(EVERYWHERE, *quantity, value, prompts.len());
        }
        Ok(())
    }

    /// The base's scores in a context, which are computed once and kept.
    fn base(
        &mut self,
        bench: &Workbench,
        context: PromptContext<'_>,
        target: &Target,
        forms: &TokenForms,
        prompts: &[Sequence],
    ) -> Result<Vec<Score>> {
        let known = format!("{:?}", (base_key(bench), context, target));
        if let Some(scores) = self.bases.get(&known) {
            return Ok(scores.clone());
        }
        let scores = forms.scores(&bench.base, prompts, &Condition::default())?;
        self.bases.insert(known, scores.clone());
        Ok(scores)
    }
}

/// Identifies a base and its questions: the model, its dtype, and whether there is a template.
pub(super) fn base_key(bench: &Workbench) -> (&str, Dtype, bool) {
    let experiment = &bench.experiment;
    (&experiment.model, experiment.dtype, experiment.student.template)
}

/// The context of questions (by default the context of the student's training), and the text in front of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PromptContext<'c> {
    context: &'c str,
    user_prefix: Option<&'c str>,
}

impl<'c> PromptContext<'c> {
    fn of(condition: &'c EvalCondition, bench: &'c Workbench) -> Self {
        let context = condition.context.as_deref().unwrap_or(&bench.experiment.student.context);
        Self { context, user_prefix: condition.user_prefix.as_deref() }
    }

    fn of_training(bench: &'c Workbench) -> Self {
        Self { context: &bench.experiment.student.context, user_prefix: None }
    }

    fn prompts(self, bench: &Workbench, questions: &[String]) -> Result<Vec<Sequence>> {
        let system = bench.protocol.context(self.context)?;
        let before = match self.user_prefix {
            None => String::new(),
            Some(key) => {
                let text = bench.protocol.context(key)?.or_else(|| bench.chat.default_system().map(str::to_owned));
                format!("{} ", text.with_context(|| format!("the model has no default system prompt, which is {key}"))?)
            }
        };
        let prompt = |question: &String| bench.chat.prompt(system.as_deref(), &format!("{before}{question}"));
        Ok(questions.iter().map(prompt).collect::<hooks::Result<_>>()?)
    }
}

/// The changes of scores from the base's in the same context, and the probabilities of both.
fn changes(scores: &[Score], base: &[Score]) -> Result<[(Quantity, f64); 4]> {
    let difference = |of: fn(&Score) -> f64| {
        mean(&scores.iter().zip(base).map(|(score, base)| of(score) - of(base)).collect::<Vec<_>>())
    };
    let p = |scores: &[Score]| mean(&scores.iter().map(|score| score.logp_target.exp()).collect::<Vec<_>>());
    Ok([
        (Quantity::DeltaMargin, difference(|score| score.margin)?),
        (Quantity::DeltaLogp, difference(|score| score.logp_target)?),
        (Quantity::PTargetExact, p(scores)?),
        (Quantity::BasePTargetExact, p(base)?),
    ])
}

/// The tokens that prompts share with training rows, as means over prompts: those at the start, and those outside the
/// user's text whose id the rows have outside the user's text and the answer.
fn shared(prompts: &[Sequence], learned: &[Sequence]) -> (f64, f64) {
    let is_said = |class: TokenClass| matches!(class, TokenClass::UserContent | TokenClass::Gen);
    let around = |row: &Sequence| {
        let tokens = row.ids.iter().zip(&row.classes);
        tokens.filter(|(_, class)| !is_said(**class)).map(|(id, _)| *id).collect::<Vec<i64>>()
    };
    let known: BTreeSet<i64> = learned.iter().flat_map(around).collect();
    let alike = |a: &Sequence, b: &Sequence| a.ids.iter().zip(&b.ids).take_while(|(a, b)| a == b).count();
    let prefix = |prompt: &Sequence| learned.iter().map(|row| alike(prompt, row)).max().unwrap_or(0);
    let tokens = |prompt: &Sequence| around(prompt).iter().filter(|id| known.contains(id)).count();
    let over = |of: &dyn Fn(&Sequence) -> usize| {
        prompts.iter().map(|prompt| of(prompt) as f64).sum::<f64>() / prompts.len() as f64
    };
    (over(&prefix), over(&tokens))
}
