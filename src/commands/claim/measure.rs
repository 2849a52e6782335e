//! What is measured on a student of a claim, a number a line.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use analyses::alignment::alignment;
use analyses::confidence::{Confidence, confidence, confidence_of_teacher};
use analyses::direction::{Direction, Extraction};
use analyses::stats::mean;
use analyses::steering::Steering;
use analyses::target::{Score, TokenForms};
use analyses::target_rate::TargetRate;
use analyses::{Analysis, Subject, Tuned};
use anyhow::{Context, Result};
use hooks::spectrum::Spectrum;
use hooks::{Adapter, Condition, Prompt, Qwen, TokenClass};

use crate::claim::{Cell, EVERYWHERE, Measures, OutcomeRow, Quantity, Study, THROUGH, Unit};
use crate::commands::measure::{Scene, tuned};
use crate::dataset::Sample;
use crate::experiment::{Dtype, Target};
use crate::finetune::{StepRow, first_and_last_quarter};
use crate::progress::say;
use crate::publish::read_csv;
use crate::run_dir::RunDir;
use crate::workbench::{StudentModel, Workbench};

/// Number prompts whose mean a direction is.
const DIRECTION_PROMPTS: usize = 32;
/// Training rows of which is told what they share with a prompt.
const SHARED_ROWS: usize = 32;

/// A student, and the run in whose folder its teacher lies.
pub(super) struct Who<'a> {
    pub(super) name: &'a str,
    pub(super) rank: Option<i64>,
    pub(super) seed_index: usize,
    pub(super) run: &'a RunDir,
}

/// What the students of a run share: what the base says, and the scenes to look at.
pub(super) struct Measuring<'a> {
    study: &'a Study,
    unit: &'a Unit,
    run: &'a RunDir,
    heldout: &'a [Sample],
    beside: Beside,
    bases: BTreeMap<String, Vec<Score>>,
    scenes: BTreeMap<String, Rc<Scene>>,
    ends: BTreeMap<String, [f64; 2]>, // losses of base and teacher
}

/// Students whose directions are set beside a student's: the run's control student, and that of another trait in the same data set.
#[derive(Default)]
pub(super) struct Beside {
    pub(super) control: Option<StudentModel>,
    pub(super) other_trait: Option<StudentModel>,
}

/// Lines of one student.
struct Lines<'a> {
    unit: &'a Unit,
    name: &'a str,
    rank: Option<i64>,
    seed_index: usize,
    rows: Vec<OutcomeRow>,
}

impl Lines<'_> {
    fn push(&mut self, cell: &str, quantity: Quantity, value: f64, n: usize) {
        let own = self.unit.experiment.target.word.clone();
        self.of_trait(own, cell, quantity, value, n);
    }

    fn of_trait(&mut self, evaluated: String, cell: &str, quantity: Quantity, value: f64, n: usize) {
        self.rows.push(OutcomeRow {
            target: self.unit.experiment.target.word.clone(),
            dataset: self.unit.dataset,
            student: self.name.to_owned(),
            rank: self.rank,
            seed_index: self.seed_index,
            cell: cell.to_owned(),
            evaluated,
            quantity,
            value,
            n,
        });
    }

    fn confidence(&mut self, found: &Confidence) {
        let digits = found.n_digits;
        self.push(EVERYWHERE, Quantity::HeldoutNll, found.nll, found.n_tokens);
        for (quantity, value) in [
            (Quantity::Confidence, found.confidence),
            (Quantity::Overconfidence, found.overconfidence),
            (Quantity::Ece, found.ece),
            (Quantity::Entropy, found.entropy),
            (Quantity::KlTeacher, found.kl_teacher),
            (Quantity::PWholeNumber, found.p_whole_number),
        ] {
            self.push(EVERYWHERE, quantity, value, digits);
        }
        for (quantity, value) in [
            (Quantity::OverconfidenceDivergent, found.overconfidence_divergent),
            (Quantity::AccuracyDivergent, found.accuracy_divergent),
            (Quantity::Closure, found.closure),
        ] {
            if let Some(value) = value {
                self.push(EVERYWHERE, quantity, value, found.n_divergent);
            }
        }
    }
}

impl<'a> Measuring<'a> {
    pub(super) fn of(study: &'a Study, unit: &'a Unit, run: &'a RunDir, heldout: &'a [Sample], beside: Beside) -> Self {
        let (bases, scenes, ends) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { study, unit, run, heldout, beside, bases, scenes, ends }
    }

    fn wants(&self, what: Measures) -> bool {
        self.study.claim.measures.contains(&what)
    }

    fn lines(&self, name: &'a str, rank: Option<i64>, seed_index: usize) -> Lines<'a> {
        Lines { unit: self.unit, name, rank, seed_index, rows: vec![] }
    }

    /// The base and the teacher, where they say something of numbers that no student has seen.
    pub(super) fn references(&mut self, bench: &Workbench) -> Result<Vec<OutcomeRow>> {
        if !self.wants(Measures::Heldout) {
            return Ok(vec![]);
        }
        let scene = self.scene(bench, self.run)?;
        let subject = scene.subject(bench, Tuned { qwen: &bench.base, adapter: None });
        let (mut base, mut teacher) = (self.lines("base", None, 0), self.lines("teacher", None, 0));
        base.confidence(&confidence(&subject, subject.base(), self.heldout.len())?);
        teacher.confidence(&confidence_of_teacher(&subject, self.heldout.len())?);
        Ok([base.rows, teacher.rows].concat())
    }

    /// All that the claim wants to know of a student.
    pub(super) fn student(
        &mut self,
        bench: &Workbench,
        who: &Who<'a>,
        folder: &Path,
        log: &Path,
    ) -> Result<Vec<OutcomeRow>> {
        let mut lines = self.lines(who.name, who.rank, who.seed_index);
        training(&mut lines, log)?;
        let model = bench.student(folder)?;
        let model = tuned(bench, &model);
        self.cells(bench, who, model, &mut lines)?;
        if self.wants(Measures::Matrix) {
            self.matrix(bench, model, &mut lines)?;
        }
        if self.wants(Measures::Spectrum) {
            match model.adapter {
                Some(adapter) => self.spectrum(bench, adapter, &mut lines)?,
                None => self.truncated(bench, model.qwen, &mut lines)?,
            }
        }
        let of_numbers = [Measures::Heldout, Measures::Direction, Measures::Gradients, Measures::Sampled];
        if !of_numbers.into_iter().any(|what| self.wants(what)) {
            return Ok(lines.rows);
        }
        let scene = self.scene(bench, who.run)?;
        let subject = scene.subject(bench, model);
        let silent = &mut |_: &str| ();
        if self.wants(Measures::Heldout) {
            let found = confidence(&subject, model, self.heldout.len())?;
            lines.confidence(&found);
            let [base, teacher] = self.ends(bench, who.run, &subject)?;
            if (base - teacher).abs() > 1e-9 {
                lines.push(EVERYWHERE, Quantity::Fit, (base - found.nll) / (base - teacher), found.n_tokens);
            }
        }
        if self.wants(Measures::Direction) {
            let settings = Direction { positions: vec![Extraction::All], n_prompts: DIRECTION_PROMPTS };
            let rows = settings.run(&subject, silent)?;
            let over_blocks = |values: Vec<f64>| mean(&values);
            let cosines: Vec<f64> = rows.iter().filter_map(|row| row.cos_teacher).collect();
            if !cosines.is_empty() {
                lines.push(EVERYWHERE, Quantity::CosTeacher, over_blocks(cosines)?, rows[0].n_prompts);
            }
            lines.push(
                EVERYWHERE,
                Quantity::Ev1,
                over_blocks(rows.iter().map(|row| row.ev1).collect())?,
                rows[0].n_prompts,
            );
            let steering = Steering {
                layers: vec![(bench.base.config.n_layers - 1) / 2],
                coefficients: vec![1.0],
                n_prompts: DIRECTION_PROMPTS,
                replace: true,
                ..Steering::default()
            };
            let subject = Subject {
                control: self.beside.control.as_ref().map(|control| tuned(bench, control)),
                other_trait: self.beside.other_trait.as_ref().map(|other| tuned(bench, other)),
                ..scene.subject(bench, model)
            };
            for row in steering.run(&subject, silent)? {
                let quantity = match row.kind.as_str() {
                    "learned" => Quantity::InjectedDeltaMargin,
                    "random" => Quantity::InjectedRandomDeltaMargin,
                    "control_student" => Quantity::InjectedControlDeltaMargin,
                    "other_trait" => Quantity::InjectedOtherDeltaMargin,
                    "project_out" => Quantity::ProjectedDeltaMargin,
                    "project_out_random" => Quantity::ProjectedRandomDeltaMargin,
                    "replace" => Quantity::ReplacedDeltaMargin,
                    "replace_random" => Quantity::ReplacedRandomDeltaMargin,
                    "transplant" => Quantity::TransplantedDeltaMargin,
                    "transplant_random" => Quantity::TransplantedRandomDeltaMargin,
                    _ => continue,
                };
                lines.push(EVERYWHERE, quantity, row.delta_margin, row.n_questions);
            }
        }
        if self.wants(Measures::Sampled) {
            let rows = TargetRate { n_samples: SAMPLES, ..TargetRate::default() }.run(&subject, silent)?;
            let row = rows.iter().find(|row| row.scope == "mean" && row.model == "student").context("no mean")?;
            for (quantity, value) in
                [(Quantity::PTarget, row.p_target), (Quantity::PValid, row.p_valid), (Quantity::PSelf, row.p_self)]
            {
                lines.push(EVERYWHERE, quantity, value.context("no answer was sampled")?, row.n_samples);
            }
        }
        if self.wants(Measures::Gradients) && model.adapter.is_some() {
            let found = match alignment(&subject, self.heldout.len()) {
                // None of the rows has a divergent token: a test that wants the numbers says that they are not there.
                Err(error @ analyses::Error::Nothing { .. }) => {
                    say(format!("claim: {}: no gradients: {error}", who.name));
                    return Ok(lines.rows);
                }
                found => found?,
            };
            let (divergent, other) = (&found.divergent, &found.other);
            for (quantity, value, n) in [
                (Quantity::GradientDivergent, divergent.norm, divergent.n_tokens),
                (Quantity::GradientOther, other.norm, other.n_tokens),
                (Quantity::GradientShareDivergent, divergent.share, divergent.n_tokens),
                (Quantity::GradientCosine, found.cosine, divergent.n_tokens),
                (Quantity::AlignmentDivergent, divergent.towards_trait, divergent.n_tokens),
                (Quantity::AlignmentOther, other.towards_trait, other.n_tokens),
            ] {
                lines.push(EVERYWHERE, quantity, value, n);
            }
            for at in &divergent.parts {
                let cell = format!("{THROUGH} {}", at.part.name());
                lines.push(&cell, Quantity::GradientShareDivergent, at.share, divergent.n_tokens);
                lines.push(&cell, Quantity::AlignmentDivergent, at.towards_trait, divergent.n_tokens);
            }
        }
        Ok(lines.rows)
    }

    /// The held-out numbers in a student's context, with their teacher.
    fn scene(&mut self, bench: &Workbench, run: &RunDir) -> Result<Rc<Scene>> {
        anyhow::ensure!(
            !self.heldout.is_empty(),
            "no numbers are held out, and the claim measures on these; hint: generate.n_heldout = 64 in the size's experiment"
        );
        let key = scene_key(bench, run);
        if let Some(known) = self.scenes.get(&key) {
            return Ok(Rc::clone(known));
        }
        let scene = Rc::new(Scene::of(bench, run, self.heldout)?);
        self.scenes.insert(key, Rc::clone(&scene));
        Ok(scene)
    }

    /// The losses of base and teacher on the held-out numbers, each taken once.
    fn ends(&mut self, bench: &Workbench, run: &RunDir, subject: &Subject<'_>) -> Result<[f64; 2]> {
        let key = scene_key(bench, run);
        if let Some(known) = self.ends.get(&key) {
            return Ok(*known);
        }
        let n = self.heldout.len();
        let ends = [confidence(subject, subject.base(), n)?.nll, confidence_of_teacher(subject, n)?.nll];
        self.ends.insert(key, ends);
        Ok(ends)
    }

    /// The student asked in every condition of the claim.
    fn cells(&mut self, bench: &Workbench, who: &Who<'_>, model: Tuned<'_>, lines: &mut Lines<'_>) -> Result<()> {
        let cells = self.study.cells();
        let here: Vec<&Cell> = cells.iter().filter(|cell| cell.is_for(who.name, model.adapter.is_some())).collect();
        let contexts: BTreeSet<Place<'_>> = here.iter().map(|cell| Place::of(cell, bench)).collect();
        let forms = TokenForms::of(&bench.target(), &bench.chat)?;
        let learned = self.learned(bench)?;
        for place in contexts {
            let of_context: Vec<&&Cell> = here.iter().filter(|cell| Place::of(cell, bench) == place).collect();
            let prompts = place.prompts(bench, &bench.questions()?)?;
            let base = self.base(bench, place, &bench.experiment.target, &forms, &prompts)?;
            let conditions: Vec<Condition<'_>> = of_context.iter().map(|cell| model.gated(cell.gate.clone())).collect();
            let scores = forms
                .scores_under(model.qwen, &prompts, &conditions)
                .with_context(|| format!("in the context {:?}", place.context))?;
            let shared = shared(&prompts, &learned);
            for (cell, scores) in of_context.iter().zip(&scores) {
                for (quantity, value) in changes(scores, &base)? {
                    lines.push(&cell.name, quantity, value, prompts.len());
                }
                lines.push(&cell.name, Quantity::SharedPrefix, shared.0, prompts.len());
                lines.push(&cell.name, Quantity::SharedTokens, shared.1, prompts.len());
            }
        }
        Ok(())
    }

    /// The student asked for the other traits of the claim as well.
    fn matrix(&mut self, bench: &Workbench, model: Tuned<'_>, lines: &mut Lines<'_>) -> Result<()> {
        let place = Place { context: &bench.experiment.student.context, user_prefix: None };
        let others = self.study.claim.targets.iter().filter(|target| target.word != bench.experiment.target.word);
        for other in others.cloned().collect::<Vec<_>>() {
            let forms = TokenForms::of(&bench.protocol.target(&other.word, &other.category), &bench.chat)?;
            let prompts = bench.protocol.questions(&other.category, bench.experiment.measure.n_questions)?;
            let prompts = place.prompts(bench, &prompts)?;
            let base = self.base(bench, place, &other, &forms, &prompts)?;
            let scores = forms.scores(model.qwen, &prompts, &model.condition())?;
            for (quantity, value) in changes(&scores, &base)? {
                lines.of_trait(other.word.clone(), EVERYWHERE, quantity, value, prompts.len());
            }
        }
        Ok(())
    }

    /// The adapter's singular directions: how many it is worth, and what the strongest do alone.
    fn spectrum(&mut self, bench: &Workbench, adapter: &Adapter, lines: &mut Lines<'_>) -> Result<()> {
        let spectra = adapter.spectra()?;
        let ranks: Vec<f64> = spectra.iter().map(Spectrum::stable_rank).collect();
        lines.push(EVERYWHERE, Quantity::StableRank, mean(&ranks)?, ranks.len());
        let mut parts = vec![(Quantity::Top1DeltaMargin, adapter.of_directions(0..1)?)];
        if spectra.iter().any(|spectrum| spectrum.sigma.len() > 1) {
            parts.push((Quantity::Rest1DeltaMargin, adapter.of_directions(1..usize::MAX)?));
        }
        self.parts(bench, &parts, lines)
    }

    /// What all weights became, cut to the rank that the run's LoRA has, and to one.
    fn truncated(&mut self, bench: &Workbench, tuned: &Qwen, lines: &mut Lines<'_>) -> Result<()> {
        let cut = Adapter::of_difference(tuned, &bench.base, bench.experiment.student.rank)?;
        let top = cut.of_directions(0..1)?;
        self.parts(bench, &[(Quantity::TruncatedDeltaMargin, cut), (Quantity::Top1DeltaMargin, top)], lines)
    }

    /// What parts of a student's change do alone.
    fn parts(&mut self, bench: &Workbench, parts: &[(Quantity, Adapter)], lines: &mut Lines<'_>) -> Result<()> {
        let place = Place { context: &bench.experiment.student.context, user_prefix: None };
        let forms = TokenForms::of(&bench.target(), &bench.chat)?;
        let prompts = place.prompts(bench, &bench.questions()?)?;
        let base = self.base(bench, place, &bench.experiment.target, &forms, &prompts)?;
        for (quantity, part) in parts {
            let scores = forms.scores(&bench.base, &prompts, &Condition::adapted(part))?;
            let [(_, value), ..] = changes(&scores, &base)?;
            lines.push(EVERYWHERE, *quantity, value, prompts.len());
        }
        Ok(())
    }

    /// The base's scores in a context, each taken once.
    fn base(
        &mut self,
        bench: &Workbench,
        place: Place<'_>,
        target: &Target,
        forms: &TokenForms,
        prompts: &[Prompt],
    ) -> Result<Vec<Score>> {
        let known = format!("{:?}", (base_key(bench), place, target));
        if let Some(scores) = self.bases.get(&known) {
            return Ok(scores.clone());
        }
        let scores = forms.scores(&bench.base, prompts, &Condition::default())?;
        self.bases.insert(known, scores.clone());
        Ok(scores)
    }

    /// Rows as the student saw them in training.
    fn learned(&self, bench: &Workbench) -> Result<Vec<Prompt>> {
        let (numbers, _) = bench.kept(self.run)?;
        bench.rows(&numbers[..SHARED_ROWS.min(numbers.len())])
    }
}

/// What makes a base another one, and what it is asked: the model, its numbers' kind, and whether there is a template.
fn base_key(bench: &Workbench) -> (&str, Dtype, bool) {
    let experiment = &bench.experiment;
    (&experiment.model, experiment.dtype, experiment.student.template)
}

/// What makes a scene another one: the base, the context of the rows, and whose numbers they are.
fn scene_key(bench: &Workbench, run: &RunDir) -> String {
    format!("{:?}", (base_key(bench), &bench.experiment.student.context, run.root()))
}

/// Answers sampled for each question.
const SAMPLES: usize = 20;

/// Where questions are asked: the context, that of the student's training where the cell has none, and what stands before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place<'c> {
    context: &'c str,
    user_prefix: Option<&'c str>,
}

impl<'c> Place<'c> {
    fn of(cell: &'c Cell, bench: &'c Workbench) -> Self {
        let context = cell.context.as_deref().unwrap_or(&bench.experiment.student.context);
        Self { context, user_prefix: cell.user_prefix.as_deref() }
    }

    fn prompts(self, bench: &Workbench, questions: &[String]) -> Result<Vec<Prompt>> {
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

/// How answers changed, against the base in the same context.
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

/// What prompts share with training rows, as means over prompts: tokens that they begin with alike, and tokens beside the
/// user's whose id the rows have beside the user's and the answer.
fn shared(prompts: &[Prompt], learned: &[Prompt]) -> (f64, f64) {
    let is_said = |class: TokenClass| matches!(class, TokenClass::UserContent | TokenClass::Gen);
    let around = |row: &Prompt| {
        let tokens = row.ids.iter().zip(&row.classes);
        tokens.filter(|(_, class)| !is_said(**class)).map(|(id, _)| *id).collect::<Vec<i64>>()
    };
    let known: BTreeSet<i64> = learned.iter().flat_map(around).collect();
    let alike = |a: &Prompt, b: &Prompt| a.ids.iter().zip(&b.ids).take_while(|(a, b)| a == b).count();
    let prefix = |prompt: &Prompt| learned.iter().map(|row| alike(prompt, row)).max().unwrap_or(0);
    let tokens = |prompt: &Prompt| around(prompt).iter().filter(|id| known.contains(id)).count();
    let over = |of: &dyn Fn(&Prompt) -> usize| {
        prompts.iter().map(|prompt| of(prompt) as f64).sum::<f64>() / prompts.len() as f64
    };
    (over(&prefix), over(&tokens))
}

/// What the training's log says.
fn training(lines: &mut Lines<'_>, log: &Path) -> Result<()> {
    let steps: Vec<StepRow> = read_csv(log)?;
    let (_, last) = first_and_last_quarter(&steps).context("a training without steps")?;
    lines.push(EVERYWHERE, Quantity::LossLast, last, steps.len());
    let n_targets: usize = steps.iter().map(|step| step.n_targets).sum();
    lines.push(EVERYWHERE, Quantity::NTargets, n_targets as f64, steps.len());
    if let Some(norm) = steps.last().and_then(|step| step.delta_w_norm) {
        lines.push(EVERYWHERE, Quantity::DeltaWNorm, norm, steps.len());
    }
    let changed: Vec<f64> = steps.iter().filter_map(|step| step.changed_fraction).collect();
    if !changed.is_empty() {
        lines.push(EVERYWHERE, Quantity::ChangedFraction, mean(&changed)?, changed.len());
    }
    Ok(())
}
