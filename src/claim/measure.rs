//! Measures the students of a claim: one line of the table of outcomes per number.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use analyses::alignment::alignment;
use analyses::confidence::{Confidence, Ends};
use analyses::direction::{Direction, Extraction, Means, table};
use analyses::divergence::{Definition, divergence_tokens};
use analyses::stats::mean;
use analyses::steering::{CONTROL_STUDENT, OTHER_TRAIT, Start, Steering};
use analyses::target_rate::TargetRate;
use analyses::{Analysis, Subject, Tuned};
use anyhow::{Context, Result, ensure};
use hooks::{Adapter, Qwen, Spectrum};
use tch::Tensor;

use super::ask::{Answers, Asking, base_key};
use super::booked;
use super::file::{EVERYWHERE, THROUGH};
use super::outcome::{Measurement, OutcomeRow, Quantity, StudentKey, StudentLines};
use super::study::{Study, Unit, UnitStudent};
use crate::data::dataset::Sample;
use crate::hinted;
use crate::output::progress::say;
use crate::output::publish::read_csv;
use crate::stages::measure::tuned;
use crate::stages::run_dir::RunDir;
use crate::stages::subject_data::SubjectData;
use crate::stages::workbench::{StudentModel, Workbench};
use crate::training::step_log::{StepRow, first_and_last_quarter};

/// Number of number prompts that a direction is the mean over.
const DIRECTION_PROMPTS: usize = 32;
const SAMPLES: usize = 20;

/// The measurements that the students of a run share: the base's answers, and the scenes.
pub(super) struct Measuring<'a> {
    study: &'a Study,
    unit: &'a Unit,
    run: &'a RunDir,
    heldout: &'a [Sample],
    beside: Beside,
    asking: Asking<'a>,
    scenes: BTreeMap<String, Rc<MeasuredScene>>,
}

/// The held-out numbers in one context, and the measurements for comparison there, each made once.
struct MeasuredScene {
    scene: SubjectData,
    ends: OnceCell<Ends>,
    streams: OnceCell<Streams>,
    divergent: OnceCell<Vec<Vec<bool>>>,
}

/// The residual streams at the held-out numbers, for comparison with a student's.
struct Streams {
    base: Means,
    teacher: Option<Means>,
    /// The directions of other students, each with its kind.
    beside: Vec<(&'static str, Vec<Tensor>)>,
}

/// Other students whose directions are steered with: the run's control student, and that of another trait in the same
/// data set.
#[derive(Default)]
pub(super) struct Beside {
    pub(super) control: Option<StudentModel>,
    pub(super) other_trait: Option<StudentModel>,
}

impl<'a> Measuring<'a> {
    pub(super) fn of(study: &'a Study, unit: &'a Unit, run: &'a RunDir, heldout: &'a [Sample], beside: Beside) -> Self {
        Self { study, unit, run, heldout, beside, asking: Asking::of(study, run), scenes: BTreeMap::new() }
    }

    fn lines(&self, student: &str, rank: Option<i64>, seed_index: usize) -> StudentLines {
        let (target, dataset) = (self.unit.experiment.target.word.clone(), self.unit.dataset);
        StudentLines::of(StudentKey { target, dataset, student: student.to_owned(), rank, seed_index })
    }

    /// Measures base and teacher on the held-out numbers, if the claim asks for it.
    pub(super) fn references(&mut self, bench: &Workbench) -> Result<Vec<OutcomeRow>> {
        if !self.study.claim.measures.contains(&Measurement::Heldout) {
            return Ok(vec![]);
        }
        let scene = self.scene(bench)?;
        let subject = scene.scene.subject(bench, Tuned::of(&bench.base));
        let ends = once(&scene.ends, || Ok(Ends::read(&subject, self.heldout.len())?))?;
        let (mut base, mut teacher) = (self.lines("base", None, 0), self.lines("teacher", None, 0));
        confidence(&mut base, &ends.base);
        confidence(&mut teacher, &ends.teacher);
        Ok([base.rows, teacher.rows].concat())
    }

    /// Makes all measurements of the claim on a student. The workbench is that of the student's experiment.
    pub(super) fn student(&mut self, bench: &Workbench, student: &UnitStudent<'_>) -> Result<Vec<OutcomeRow>> {
        let mut lines = self.lines(student.name, student.rank(), student.seed_index);
        let (folder, log) = student.files(self.run)?;
        training(&mut lines, &log)?;
        let model = bench.student(&folder)?;
        let model = tuned(bench, &model);
        let study = self.study;
        let wants = |what| study.claim.measures(what, student.name);
        let answers = self.asking.under_conditions(bench, student.name, model, &mut lines)?;
        if wants(Measurement::Matrix) {
            self.asking.about_other_traits(bench, model, &mut lines)?;
        }
        if wants(Measurement::Spectrum) {
            match model.adapter {
                Some(adapter) => self.spectrum(bench, adapter, &mut lines)?,
                None => self.truncated(bench, model.qwen, &mut lines)?,
            }
        }
        if wants(Measurement::Ledger) && model.adapter.is_some() {
            booked::measure(self.study, bench, self.run, (student, &folder), self.heldout, &mut lines)?;
        }
        let along = [Measurement::Direction, Measurement::Steering, Measurement::Replacement];
        let of_numbers = [Measurement::Heldout, Measurement::Gradients, Measurement::Sampled];
        if !of_numbers.into_iter().chain(along).any(wants) {
            return Ok(lines.rows);
        }
        let scene = self.scene(bench)?;
        let subject = scene.scene.subject(bench, model);
        if wants(Measurement::Heldout) {
            let ends = once(&scene.ends, || Ok(Ends::read(&subject, self.heldout.len())?))?;
            let found = ends.confidence(model)?;
            confidence(&mut lines, &found);
            lines.push(EVERYWHERE, Quantity::Fit, ends.fit(&found), found.n_tokens);
        }
        if along.into_iter().any(wants) {
            let streams = once(&scene.streams, || self.streams(bench, &subject))?;
            self.direction(student, &subject, streams, answers, &mut lines)?;
        }
        if wants(Measurement::Sampled) {
            let rows = TargetRate { n_samples: SAMPLES, ..TargetRate::default() }.run(&subject, &mut |_| ())?;
            let row = rows.iter().find(|row| row.scope == "mean" && row.model == "student").context("no mean")?;
            for (quantity, value) in
                [(Quantity::PTarget, row.p_target), (Quantity::PValid, row.p_valid), (Quantity::PSelf, row.p_self)]
            {
                lines.push(EVERYWHERE, quantity, value.context("no answer was sampled")?, row.n_samples);
            }
        }
        if wants(Measurement::Gradients) && model.adapter.is_some() {
            let marked = || Ok(divergence_tokens(&subject, self.heldout.len(), Definition::Schrodi, false)?);
            let found = match alignment(&subject, once(&scene.divergent, marked)?) {
                // If no row has a divergent token, a test that needs these numbers reports that they are missing.
                Err(error @ analyses::Error::Nothing { .. }) => {
                    say(format!("claim: {}: no gradients: {error}", student.name));
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
            lines.push(EVERYWHERE, Quantity::GradientShareDivergent, divergent.share, divergent.n_tokens);
            lines.push(EVERYWHERE, Quantity::GradientCosine, found.cosine, divergent.n_tokens);
            for at in &divergent.parts {
                let cell = format!("{THROUGH} {}", at.part.name());
                lines.push(&cell, Quantity::GradientShareDivergent, at.share, divergent.n_tokens);
                lines.push(&cell, Quantity::AlignmentDivergent, at.towards_trait, divergent.n_tokens);
            }
        }
        Ok(lines.rows)
    }

    fn direction(
        &self,
        student: &UnitStudent<'_>,
        subject: &Subject<'_>,
        streams: &Streams,
        answers: Answers,
        lines: &mut StudentLines,
    ) -> Result<()> {
        let wants = |what| self.study.claim.measures(what, student.name);
        let moved = direction_settings().read(subject, subject.student)?;
        if wants(Measurement::Direction) {
            let rows = table(&moved, &streams.base, streams.teacher.as_ref(), None)?;
            let cosines: Vec<f64> = rows.iter().filter_map(|row| row.cos_teacher).collect();
            let n = rows[0].n_prompts;
            if !cosines.is_empty() {
                lines.push(EVERYWHERE, Quantity::CosTeacher, mean(&cosines)?, n);
            }
            lines.push(EVERYWHERE, Quantity::Ev1, mean(&rows.iter().map(|row| row.ev1).collect::<Vec<_>>())?, n);
        }
        let replace = wants(Measurement::Replacement);
        if !replace && !wants(Measurement::Steering) {
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

    /// Reads the residual streams for comparison with a student's.
    fn streams(&self, bench: &Workbench, subject: &Subject<'_>) -> Result<Streams> {
        let settings = direction_settings();
        let base = settings.read(subject, subject.base())?;
        let mut beside = vec![];
        for (kind, student) in [(CONTROL_STUDENT, &self.beside.control), (OTHER_TRAIT, &self.beside.other_trait)] {
            if let Some(student) = student {
                beside.push((kind, settings.read(subject, tuned(bench, student))?.direction(&base)?));
            }
        }
        let asks = self.study.claim.measures.contains(&Measurement::Direction);
        let teacher = if asks { settings.read_teacher(subject)? } else { None };
        Ok(Streams { base, teacher, beside })
    }

    /// The held-out numbers in a student's context, with their teacher.
    fn scene(&mut self, bench: &Workbench) -> Result<Rc<MeasuredScene>> {
        ensure!(
            !self.heldout.is_empty(),
            hinted!(
                "no numbers are held out, and the claim measures on these";
                "generate.n_heldout = 64 in the size's experiment"
            )
        );
        let key = format!("{:?}", (base_key(bench), &bench.experiment.student.context));
        if let Some(known) = self.scenes.get(&key) {
            return Ok(Rc::clone(known));
        }
        let scene = SubjectData::of(bench, self.run, self.heldout)?;
        let (ends, streams, divergent) = Default::default();
        let scene = Rc::new(MeasuredScene { scene, ends, streams, divergent });
        self.scenes.insert(key, Rc::clone(&scene));
        Ok(scene)
    }

    /// Measures the adapter's stable rank, and the effect of its strongest singular directions alone and of all others.
    fn spectrum(&mut self, bench: &Workbench, adapter: &Adapter, lines: &mut StudentLines) -> Result<()> {
        let spectra = adapter.spectra()?;
        let ranks: Vec<f64> = spectra.iter().map(Spectrum::stable_rank).collect();
        lines.push(EVERYWHERE, Quantity::StableRank, mean(&ranks)?, ranks.len());
        let mut parts = vec![(Quantity::Top1DeltaMargin, adapter.of_directions(0..1)?)];
        if spectra.iter().any(|spectrum| spectrum.sigma.len() > 1) {
            parts.push((Quantity::Rest1DeltaMargin, adapter.of_directions(1..usize::MAX)?));
        }
        self.asking.with_parts(bench, &parts, lines)
    }

    /// Measures the effect of full finetuning, cut to the rank of the run's LoRA, and to rank 1.
    fn truncated(&mut self, bench: &Workbench, tuned: &Qwen, lines: &mut StudentLines) -> Result<()> {
        let cut = Adapter::of_difference(tuned, &bench.base, bench.experiment.student.rank)?;
        let top = cut.of_directions(0..1)?;
        self.asking.with_parts(bench, &[(Quantity::TruncatedDeltaMargin, cut), (Quantity::Top1DeltaMargin, top)], lines)
    }
}

/// The settings of directions: the mean over all positions of the held-out prompts.
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

fn confidence(lines: &mut StudentLines, found: &Confidence) {
    lines.push(EVERYWHERE, Quantity::HeldoutNll, found.nll, found.n_tokens);
    for (quantity, value) in [
        (Quantity::Confidence, found.confidence),
        (Quantity::Overconfidence, found.overconfidence),
        (Quantity::Ece, found.ece),
        (Quantity::Entropy, found.entropy),
        (Quantity::KlTeacher, found.kl_teacher),
        (Quantity::PWholeNumber, found.p_whole_number),
    ] {
        lines.push(EVERYWHERE, quantity, value, found.n_digits);
    }
    for (quantity, value) in [
        (Quantity::OverconfidenceDivergent, found.overconfidence_divergent),
        (Quantity::AccuracyDivergent, found.accuracy_divergent),
        (Quantity::Closure, found.closure),
    ] {
        lines.push(EVERYWHERE, quantity, value, found.n_divergent);
    }
}

fn training(lines: &mut StudentLines, log: &Path) -> Result<()> {
    let steps: Vec<StepRow> = read_csv(log)?;
    let (_, last) = first_and_last_quarter(&steps).context("a training without steps")?;
    lines.push(EVERYWHERE, Quantity::LossLast, last, steps.len());
    let n_targets: usize = steps.iter().map(|step| step.n_targets).sum();
    lines.push(EVERYWHERE, Quantity::NTargets, n_targets as f64, steps.len());
    let norm = steps.last().and_then(|step| step.delta_w_norm);
    lines.push(EVERYWHERE, Quantity::DeltaWNorm, norm, steps.len());
    let changed: Vec<f64> = steps.iter().filter_map(|step| step.changed_fraction).collect();
    if !changed.is_empty() {
        lines.push(EVERYWHERE, Quantity::ChangedFraction, mean(&changed)?, changed.len());
    }
    Ok(())
}
