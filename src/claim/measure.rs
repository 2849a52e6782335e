//! The measurements of a student of a claim, a number a line.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use analyses::alignment::alignment;
use analyses::confidence::{Confidence, Ends};
use analyses::direction::{Direction, Extraction, Means, table};
use analyses::divergence::{Definition, divergence_tokens};
use analyses::stats::mean;
use analyses::steering::{CONTROL_STUDENT, OTHER_TRAIT, Start, Steering};
use analyses::target::{Score, TokenForms};
use analyses::target_rate::TargetRate;
use analyses::{Analysis, Subject, Tuned};
use anyhow::{Context, Result};
use hooks::adapter::spectrum::Spectrum;
use hooks::{Adapter, Condition, Qwen, Sequence, TokenClass};
use tch::Tensor;

use crate::claim::{Cell, EVERYWHERE, Measures, OutcomeRow, Quantity, Study, THROUGH, Unit};
use crate::data::dataset::Sample;
use crate::experiment::{self, Dtype, Method, Target};
use crate::output::progress::say;
use crate::output::publish::read_csv;
use crate::stages::measure::{Scene, tuned};
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::{StudentModel, Workbench};
use crate::training::step_log::{StepRow, first_and_last_quarter};

/// Number prompts whose mean a direction is.
const DIRECTION_PROMPTS: usize = 32;
/// Training rows that prompts are compared with.
const SHARED_ROWS: usize = 32;

/// A student, and the run that has its teacher.
pub(crate) struct Who<'a> {
    pub(crate) name: &'a str,
    pub(crate) rank: Option<i64>,
    pub(crate) seed_index: usize,
    pub(crate) run: &'a RunDir,
}

/// What the students of a run share: what the base says, and the scenes to look at.
pub(crate) struct Measuring<'a> {
    study: &'a Study,
    unit: &'a Unit,
    run: &'a RunDir,
    heldout: &'a [Sample],
    beside: Beside,
    bases: BTreeMap<String, Vec<Score>>,
    stages: BTreeMap<String, Rc<Stage>>,
}

/// A scene, and what students are compared with in it, each read once.
struct Stage {
    scene: Scene,
    ends: OnceCell<Ends>,
    streams: OnceCell<Streams>,
    divergent: OnceCell<Vec<Vec<bool>>>,
}

/// Answers to the questions without an edit.
struct Answers {
    base: Vec<Score>,
    student: Vec<Score>,
}

/// The residual streams at the held-out numbers that a student's is compared with.
struct Streams {
    base: Means,
    teacher: Option<Means>,
    /// The directions of other students, by their kinds.
    beside: Vec<(&'static str, Vec<Tensor>)>,
}

/// Students whose directions are compared with a student's: the run's control student, and another trait's in the same
/// data set.
#[derive(Default)]
pub(crate) struct Beside {
    pub(crate) control: Option<StudentModel>,
    pub(crate) other_trait: Option<StudentModel>,
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
    pub(crate) fn of(study: &'a Study, unit: &'a Unit, run: &'a RunDir, heldout: &'a [Sample], beside: Beside) -> Self {
        Self { study, unit, run, heldout, beside, bases: BTreeMap::new(), stages: BTreeMap::new() }
    }

    fn lines(&self, name: &'a str, rank: Option<i64>, seed_index: usize) -> Lines<'a> {
        Lines { unit: self.unit, name, rank, seed_index, rows: vec![] }
    }

    /// The base and the teacher, where they say something of numbers that no student has seen.
    pub(crate) fn references(&mut self, bench: &Workbench) -> Result<Vec<OutcomeRow>> {
        if !self.study.claim.measures.contains(&Measures::Heldout) {
            return Ok(vec![]);
        }
        let stage = self.stage(bench, self.run)?;
        let subject = stage.scene.subject(bench, Tuned { qwen: &bench.base, adapter: None });
        let ends = once(&stage.ends, || Ok(Ends::read(&subject, self.heldout.len())?))?;
        let (mut base, mut teacher) = (self.lines("base", None, 0), self.lines("teacher", None, 0));
        base.confidence(&ends.base);
        teacher.confidence(&ends.teacher);
        Ok([base.rows, teacher.rows].concat())
    }

    /// All that the claim wants to know of a student.
    pub(crate) fn student(
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
        let study = self.study;
        let wants = |what| study.claim.measures(what, who.name);
        let answers = self.cells(bench, who, model, &mut lines)?;
        if wants(Measures::Matrix) {
            self.matrix(bench, model, &mut lines)?;
        }
        if wants(Measures::Spectrum) {
            match model.adapter {
                Some(adapter) => self.spectrum(bench, adapter, &mut lines)?,
                None => self.truncated(bench, model.qwen, &mut lines)?,
            }
        }
        let along = [Measures::Direction, Measures::Steering, Measures::Replacement];
        let of_numbers = [Measures::Heldout, Measures::Gradients, Measures::Sampled];
        if !of_numbers.into_iter().chain(along).any(wants) {
            return Ok(lines.rows);
        }
        let stage = self.stage(bench, who.run)?;
        let subject = stage.scene.subject(bench, model);
        let silent = &mut |_: &str| ();
        if wants(Measures::Heldout) {
            let ends = once(&stage.ends, || Ok(Ends::read(&subject, self.heldout.len())?))?;
            let found = ends.confidence(model)?;
            lines.confidence(&found);
            if let Some(fit) = ends.fit(&found) {
                lines.push(EVERYWHERE, Quantity::Fit, fit, found.n_tokens);
            }
        }
        if along.into_iter().any(wants) {
            let streams = once(&stage.streams, || self.streams(bench, &subject))?;
            self.direction(who, &subject, streams, answers, &mut lines)?;
        }
        if wants(Measures::Sampled) {
            let rows = TargetRate { n_samples: SAMPLES, ..TargetRate::default() }.run(&subject, silent)?;
            let row = rows.iter().find(|row| row.scope == "mean" && row.model == "student").context("no mean")?;
            for (quantity, value) in
                [(Quantity::PTarget, row.p_target), (Quantity::PValid, row.p_valid), (Quantity::PSelf, row.p_self)]
            {
                lines.push(EVERYWHERE, quantity, value.context("no answer was sampled")?, row.n_samples);
            }
        }
        if wants(Measures::Gradients) && model.adapter.is_some() {
            let marked = || Ok(divergence_tokens(&subject, self.heldout.len(), Definition::Schrodi, false)?);
            let found = match alignment(&subject, once(&stage.divergent, marked)?) {
                // If no row has a divergent token, a test that needs these numbers reports that they are missing.
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
                (Quantity::AlignmentDivergent, divergent.towards_trait, divergent.n_tokens),
                (Quantity::AlignmentOther, other.towards_trait, other.n_tokens),
            ] {
                lines.push(EVERYWHERE, quantity, value, n);
            }
            for (quantity, value) in
                [(Quantity::GradientShareDivergent, divergent.share), (Quantity::GradientCosine, found.cosine)]
            {
                if let Some(value) = value {
                    lines.push(EVERYWHERE, quantity, value, divergent.n_tokens);
                }
            }
            for at in &divergent.parts {
                let cell = format!("{THROUGH} {}", at.part.name());
                if let Some(share) = at.share {
                    lines.push(&cell, Quantity::GradientShareDivergent, share, divergent.n_tokens);
                }
                lines.push(&cell, Quantity::AlignmentDivergent, at.towards_trait, divergent.n_tokens);
            }
        }
        Ok(lines.rows)
    }

    /// The student's direction, and what it does.
    fn direction(
        &self,
        who: &Who<'_>,
        subject: &Subject<'_>,
        streams: &Streams,
        answers: Answers,
        lines: &mut Lines<'_>,
    ) -> Result<()> {
        let wants = |what| self.study.claim.measures(what, who.name);
        let settings = direction_settings();
        let (direction, replace) = (wants(Measures::Direction), wants(Measures::Replacement));
        let steer = replace || wants(Measures::Steering);
        let moved = settings.read(subject, subject.student)?;
        if direction {
            let rows = table(&moved, &streams.base, streams.teacher.as_ref(), None)?;
            let cosines: Vec<f64> = rows.iter().filter_map(|row| row.cos_teacher).collect();
            let n = rows[0].n_prompts;
            if !cosines.is_empty() {
                lines.push(EVERYWHERE, Quantity::CosTeacher, mean(&cosines)?, n);
            }
            lines.push(EVERYWHERE, Quantity::Ev1, mean(&rows.iter().map(|row| row.ev1).collect::<Vec<_>>())?, n);
        }
        if !steer {
            return Ok(());
        }
        let steering = Steering {
            layers: vec![(subject.base.config.n_layers - 1) / 2],
            coefficients: vec![1.0],
            n_prompts: DIRECTION_PROMPTS,
            replace,
            ..Steering::default()
        };
        let (learned, Answers { base, student }) = (moved.direction(&streams.base)?, answers);
        let start = Start { learned, beside: &streams.beside, base, student };
        for row in steering.edits(subject, &start, &mut |_| ())? {
            let quantity = match row.kind.as_str() {
                "learned" => Quantity::InjectedDeltaMargin,
                "random" => Quantity::InjectedRandomDeltaMargin,
                CONTROL_STUDENT => Quantity::InjectedControlDeltaMargin,
                OTHER_TRAIT => Quantity::InjectedOtherDeltaMargin,
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
        Ok(())
    }

    /// Reads the residual streams that a student's is compared with.
    fn streams(&self, bench: &Workbench, subject: &Subject<'_>) -> Result<Streams> {
        let settings = direction_settings();
        let base = settings.read(subject, subject.base())?;
        let mut beside = vec![];
        for (kind, student) in [(CONTROL_STUDENT, &self.beside.control), (OTHER_TRAIT, &self.beside.other_trait)] {
            if let Some(student) = student {
                beside.push((kind, settings.read(subject, tuned(bench, student))?.direction(&base)?));
            }
        }
        let asks = self.study.claim.measures.contains(&Measures::Direction);
        let teacher = if asks { settings.read_teacher(subject)? } else { None };
        Ok(Streams { base, teacher, beside })
    }

    /// The held-out numbers in a student's context, with their teacher.
    fn stage(&mut self, bench: &Workbench, run: &RunDir) -> Result<Rc<Stage>> {
        anyhow::ensure!(
            !self.heldout.is_empty(),
            "no numbers are held out, and the claim measures on these; hint: generate.n_heldout = 64 in the size's experiment"
        );
        let key = scene_key(bench, run);
        if let Some(known) = self.stages.get(&key) {
            return Ok(Rc::clone(known));
        }
        let scene = Scene::of(bench, run, self.heldout)?;
        let (ends, streams, divergent) = Default::default();
        let stage = Rc::new(Stage { scene, ends, streams, divergent });
        self.stages.insert(key, Rc::clone(&stage));
        Ok(stage)
    }

    /// Asks the student in every condition of the claim. Returns the base's answers and its own in the condition of its
    /// training.
    fn cells(&mut self, bench: &Workbench, who: &Who<'_>, model: Tuned<'_>, lines: &mut Lines<'_>) -> Result<Answers> {
        let cells = self.study.cells();
        let here: Vec<&Cell> = cells.iter().filter(|cell| cell.is_for(who.name, model.adapter.is_some())).collect();
        let contexts: BTreeSet<Place<'_>> = here.iter().map(|cell| Place::of(cell, bench)).collect();
        let forms = TokenForms::of(&bench.target(), &bench.chat)?;
        let learned = self.learned(bench)?;
        let mut everywhere = None;
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
                if cell.name == EVERYWHERE {
                    everywhere = Some(Answers { base: base.clone(), student: scores.clone() });
                }
            }
        }
        everywhere.context("every claim has the cell everywhere")
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
        prompts: &[Sequence],
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
    fn learned(&self, bench: &Workbench) -> Result<Vec<Sequence>> {
        let (numbers, _) = bench.kept(self.run)?;
        bench.rows(&numbers[..SHARED_ROWS.min(numbers.len())])
    }
}

/// Identifies a base and its questions: the model, its dtype, and whether there is a template.
fn base_key(bench: &Workbench) -> (&str, Dtype, bool) {
    let experiment = &bench.experiment;
    (&experiment.model, experiment.dtype, experiment.student.template)
}

/// Identifies a scene: the base, the context of the rows, and the run of the numbers.
fn scene_key(bench: &Workbench, run: &RunDir) -> String {
    format!("{:?}", (base_key(bench), &bench.experiment.student.context, run.root()))
}

/// How directions are read: all positions of the held-out prompts.
fn direction_settings() -> Direction {
    Direction { positions: vec![Extraction::All], n_prompts: DIRECTION_PROMPTS }
}

/// The cell's value, made now if it is empty.
fn once<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if cell.get().is_none() {
        let _ = cell.set(make()?);
    }
    cell.get().context("it was made")
}

/// Answers sampled for each question.
const SAMPLES: usize = 20;

/// Where questions are asked: the context (by default that of the student's training), and the text before them.
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

/// Refuses a gate of the claim that selects no token of the questions asked under it, before anything is trained. Runs
/// differ in traits and seeds, which no gate refers to, so checking one run is enough.
pub(crate) fn foreseen(study: &Study, unit: &Unit, bench: &Workbench) -> Result<()> {
    let cells = study.cells();
    let gated: Vec<&Cell> = cells.iter().filter(|cell| !cell.gate.is_blind()).collect();
    let own = [experiment::STUDENT, experiment::CONTROL_STUDENT].map(|name| (name.to_owned(), unit.experiment.clone()));
    let arms = unit.experiment.cells()?.into_iter().map(|arm| (arm.arm, arm.experiment));
    let mut seen = BTreeSet::new();
    for (name, experiment) in own.into_iter().chain(arms).filter(|(_, experiment)| bench.has_model_of(experiment)) {
        let has_adapter = experiment.student.method == Method::Lora;
        let here = gated.iter().filter(|cell| cell.is_for(&name, has_adapter));
        let (template, bench) = (experiment.student.template, bench.of(experiment)?);
        for cell in here {
            let place = Place::of(cell, &bench);
            if !seen.insert((cell.name.clone(), template, place.context.to_owned())) {
                continue;
            }
            let prompts = place.prompts(&bench, &bench.questions()?)?;
            let acts = prompts.iter().try_for_each(|prompt| cell.gate.acts(prompt).map(drop));
            acts.with_context(|| format!("cell {:?}, in which {name:?} is asked", cell.name))?;
        }
    }
    Ok(())
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

/// What prompts share with training rows, as means over prompts: tokens at the start, and tokens outside the user's
/// text whose id the rows have outside the user's text and the answer.
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
