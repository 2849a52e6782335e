//! Tables for readers' own plots: how each student was trained, and lines per trait, context, digits of held-out
//! numbers, or direction. Apart from `runs.csv` and `spectrum.csv`, they are selections from `outcomes.csv`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use hooks::Spectrum;
use serde::{Deserialize, Serialize};

use super::file::{EVERYWHERE, EvalCondition};
use super::outcome::{OutcomeRow, Quantity, StudentKey};
use super::study::{Study, Unit, UnitStudent};
use crate::experiment::{Dtype, Experiment, Method};
use crate::training::settings::{OptimizerKind, ScheduleKind, TargetTokens};

/// One student and its training; a line of `runs.csv`.
#[expect(clippy::struct_excessive_bools, reason = "each is a column of its own")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClaimRunRow {
    /// The folder of its run, in the same folder as the claim's.
    pub run: String,
    /// The trait of the student's teacher.
    pub target: String,
    /// The category of the trait.
    pub category: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name in the claim.
    pub student: String,
    /// The rank of its adapter; empty without an adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// The data that it learned from: `teacher`, `control` or `shuffled`.
    pub data: String,
    /// The base model.
    pub base_model: String,
    /// The dtype of the base's weights: `f32` or `bf16`.
    pub dtype: Dtype,
    /// The device: `cpu` or `cuda`.
    pub device: String,
    /// The kind of teacher: `prompt`, `finetuned`, `adapter`, `steered` or `planted`.
    pub teacher_kind: String,
    /// The sampling temperature of the numbers; 0 is greedy.
    pub temperature: f64,
    /// Seed of the number prompts and of the teacher's answers.
    pub gen_seed: u64,
    /// Seed of the adapter's A.
    pub init_seed: u64,
    /// Seed of the order of the rows.
    pub order_seed: u64,
    /// Largest number of rows that it may learn from.
    pub n_keep: usize,
    /// The context of the training rows.
    pub train_context: String,
    /// Whether the training rows are in the model's chat template.
    pub template: bool,
    /// `lora` or `full`.
    pub method: Method,
    /// The numerator α of the adapter's scaling; empty without an adapter.
    pub alpha: Option<f64>,
    /// Whether the scaling is α/√r instead of α/r.
    pub use_rslora: bool,
    /// Whether only B was trained, and A kept its random values.
    pub frozen_a: bool,
    /// Whether the adapter was rotated before training (`student.rotated`).
    pub rotated: bool,
    /// The maps that have a pair of A and B, separated by spaces.
    pub target_modules: String,
    /// The blocks that have pairs, from 0, separated by spaces; empty means all.
    pub layers: String,
    /// The gate in training: where and how strongly the adapter acted.
    pub gate_train: String,
    /// The tokens that the loss is taken over, by class (`finetune.mask`).
    pub mask: String,
    /// Which of the mask's tokens count, by the teacher (`finetune.tokens`).
    pub tokens: TargetTokens,
    /// The optimizer.
    pub optimizer: OptimizerKind,
    /// The learning rate after warm-up.
    pub learning_rate: f64,
    /// The momentum of SGD and Muon.
    pub momentum: f64,
    /// The schedule of the learning rate after warm-up.
    pub lr_scheduler_type: ScheduleKind,
    /// Number of warm-up steps.
    pub warmup_steps: u64,
    /// Number of rows of a step.
    pub rows_per_step: usize,
    /// Number of passes over all rows; without effect if `max_steps` is set.
    pub num_train_epochs: f64,
    /// Number of steps of the schedule; empty if it follows from the epochs.
    pub max_steps: Option<u64>,
    /// Number of steps after which training ended early, if it did.
    pub stop_after_steps: Option<u64>,
    /// The gradient norm above which gradients are clipped; 0 is off.
    pub max_grad_norm: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// Whether bf16 weights were trained through master copies in f32.
    pub masters: bool,
}

/// A row for every student of a claim.
pub fn runs(study: &Study) -> Result<Vec<ClaimRunRow>> {
    let students = study.units.iter().flat_map(|unit| unit.students().into_iter().map(move |student| (unit, student)));
    students.map(|(unit, student)| trained(unit, &student)).collect()
}

fn trained(unit: &Unit, of: &UnitStudent<'_>) -> Result<ClaimRunRow> {
    let experiment = of.experiment;
    let Experiment { student, finetune, generate, seeds, .. } = experiment;
    let teacher = toml::Value::try_from(&experiment.teacher)?;
    Ok(ClaimRunRow {
        run: unit.name.clone(),
        target: experiment.target.word.clone(),
        category: experiment.target.category.clone(),
        dataset: unit.dataset,
        student: of.name.to_owned(),
        rank: of.rank(),
        seed_index: of.seed_index,
        data: of.data.name().to_owned(),
        base_model: experiment.model.clone(),
        dtype: experiment.dtype,
        device: experiment.device.clone(),
        teacher_kind: teacher.get("kind").and_then(toml::Value::as_str).context("a teacher of no kind")?.to_owned(),
        temperature: generate.temperature,
        gen_seed: seeds.gen_seed,
        init_seed: seeds.init_seed,
        order_seed: seeds.order_seed,
        n_keep: generate.n_keep,
        train_context: student.context.clone(),
        template: student.template,
        method: student.method,
        alpha: of.rank().map(|_| student.alpha),
        use_rslora: student.use_rslora,
        frozen_a: finetune.frozen_a,
        rotated: student.rotated,
        target_modules: student.target_modules.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        layers: student.layers.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        gate_train: finetune.gate.to_string(),
        mask: finetune.mask.to_string(),
        tokens: finetune.tokens,
        optimizer: finetune.optimizer,
        learning_rate: finetune.learning_rate,
        momentum: finetune.momentum,
        lr_scheduler_type: finetune.lr_scheduler_type,
        warmup_steps: finetune.warmup_steps,
        rows_per_step: finetune.rows_per_step(),
        num_train_epochs: finetune.num_train_epochs,
        max_steps: finetune.max_steps,
        stop_after_steps: finetune.stop_after_steps,
        max_grad_norm: finetune.max_grad_norm,
        weight_decay: finetune.weight_decay,
        masters: finetune.masters,
    })
}

/// The change of one trait by one student; a line of `matrix.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixRow {
    /// The trait of the student's teacher.
    pub trained_trait: String,
    /// The trait that was evaluated.
    pub evaluated_trait: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter; empty without an adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// Change from the base of the mean probability of starting the answer with the trait, exact, -1 to 1.
    pub delta_p: f64,
    /// Change of the margin from the base, in nats.
    pub delta_margin: f64,
}

/// The rows of every student on every trait; none if the claim evaluates only the teacher's trait.
pub fn matrix(rows: &[OutcomeRow]) -> Vec<MatrixRow> {
    let is_asked = rows.iter().any(|row| row.evaluated != row.target);
    let everywhere = lines(rows).into_iter().filter(|line| is_asked && line.first.cell == EVERYWHERE);
    let row = |line: Line<'_>| {
        Some(MatrixRow {
            trained_trait: line.first.target.clone(),
            evaluated_trait: line.first.evaluated.clone(),
            dataset: line.first.dataset,
            student: line.first.student.clone(),
            rank: line.first.rank,
            seed_index: line.first.seed_index,
            delta_p: line.get(Quantity::PTargetExact)? - line.get(Quantity::BasePTargetExact)?,
            delta_margin: line.get(Quantity::DeltaMargin)?,
        })
    };
    everywhere.filter_map(row).collect()
}

/// A student in one context; a line of `context.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContextRow {
    /// The trait of the student's teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter; empty without an adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// The condition under which it was asked.
    pub cell: String,
    /// The context of its training rows.
    pub train_context: String,
    /// The context of the questions.
    pub eval_context: String,
    /// Whether both contexts are the same, with no text in front of the questions.
    pub matched: bool,
    /// Tokens at the start that a prompt shares with one of the first 32 training rows, the mean over prompts.
    pub shared_prefix: f64,
    /// Mean probability of starting the answer with the trait, exact, 0 to 1.
    pub p_target: f64,
    /// Mean probability of starting the answer with the trait, for the base in the same context, 0 to 1.
    pub base_p: f64,
    /// Change of log p of the trait from the base in the same context, in nats.
    pub delta_logp: f64,
    /// Change of the margin from the base in the same context, in nats.
    pub delta_margin: f64,
}

/// The rows of every student in every context, with its adapter acting everywhere; none if the claim asks in one
/// context only.
pub fn contexts(study: &Study, runs: &[ClaimRunRow], rows: &[OutcomeRow]) -> Vec<ContextRow> {
    let key = |run: &ClaimRunRow| {
        let ClaimRunRow { target, dataset, student, rank, seed_index, .. } = run.clone();
        StudentKey { target, dataset, student, rank, seed_index }
    };
    let known: BTreeMap<StudentKey, &ClaimRunRow> = runs.iter().map(|run| (key(run), run)).collect();
    let conditions = study.conditions().into_iter().filter(|condition| condition.gate.is_everywhere());
    let conditions: BTreeMap<String, EvalCondition> = conditions.map(|of| (of.name.clone(), of)).collect();
    let own = lines(rows).into_iter().filter(|line| conditions.len() > 1 && line.first.evaluated == line.first.target);
    let row = |line: Line<'_>| {
        let (run, condition) = (known.get(&line.first.student_key())?, conditions.get(&line.first.cell)?);
        let eval_context = condition.context.clone().unwrap_or_else(|| run.train_context.clone());
        Some(ContextRow {
            target: line.first.target.clone(),
            dataset: line.first.dataset,
            student: line.first.student.clone(),
            rank: line.first.rank,
            seed_index: line.first.seed_index,
            cell: line.first.cell.clone(),
            matched: eval_context == run.train_context && condition.user_prefix.is_none(),
            train_context: run.train_context.clone(),
            eval_context,
            shared_prefix: line.get(Quantity::SharedPrefix)?,
            p_target: line.get(Quantity::PTargetExact)?,
            base_p: line.get(Quantity::BasePTargetExact)?,
            delta_logp: line.get(Quantity::DeltaLogp)?,
            delta_margin: line.get(Quantity::DeltaMargin)?,
        })
    };
    own.filter_map(row).collect()
}

/// A model's scores at held-out digits; a line of `digit_conf.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DigitConfRow {
    /// The trait of the teacher that wrote the numbers.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name, `base` or `teacher`.
    pub student: String,
    /// The rank of its adapter; empty without an adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// `all` digits, or the `divergent` ones, at which the teacher's and the base's most likely tokens differ.
    pub group: String,
    /// Number of digits.
    pub n: usize,
    /// Mean largest probability, 0 to 1; for group `all` only.
    pub conf: Option<f64>,
    /// For group `all`, the share of digits that are the model's most likely token; for `divergent`, the share at which
    /// its most likely token is the teacher's; 0 to 1.
    pub acc: Option<f64>,
    /// Mean largest probability minus the share of digits that are the most likely token, -1 to 1.
    pub overconf: Option<f64>,
    /// Expected calibration error, with 15 bins of equally many digits, 0 to 1; for group `all` only.
    pub ece: Option<f64>,
    /// Mean entropy, in nats; for group `all` only.
    pub entropy: Option<f64>,
    /// Kullback-Leibler divergence KL(teacher, model), in nats; for group `all` only.
    pub kl_teacher: Option<f64>,
    /// Mean probability of a whole held-out number, 0 to 1; for group `all` only.
    pub p_whole_number: Option<f64>,
    /// P(teacher's most likely token) under the model minus that under the base, over the teacher's minus the base's;
    /// for group `divergent` only, and only if the denominator is three standard errors above zero.
    pub closure: Option<f64>,
}

/// The rows of every model at held-out digits; none if the claim does not measure there.
pub fn digit_conf(rows: &[OutcomeRow]) -> Vec<DigitConfRow> {
    let mut found = vec![];
    for line in lines(rows) {
        let groups = [
            ("all", [Quantity::Confidence, Quantity::Overconfidence]),
            ("divergent", [Quantity::AccuracyDivergent, Quantity::OverconfidenceDivergent]),
        ];
        for (group, [first, overconf]) in groups {
            let Some((value, n)) = line.values.get(&first) else { continue };
            let (of_all, overconf) = (group == "all", line.get(overconf));
            let all = |quantity: Quantity| line.get(quantity).filter(|_| of_all);
            found.push(DigitConfRow {
                target: line.first.target.clone(),
                dataset: line.first.dataset,
                student: line.first.student.clone(),
                rank: line.first.rank,
                seed_index: line.first.seed_index,
                group: group.to_owned(),
                n: *n,
                conf: of_all.then_some(*value),
                acc: if of_all { overconf.map(|overconf| value - overconf) } else { Some(*value) },
                overconf,
                ece: all(Quantity::Ece),
                entropy: all(Quantity::Entropy),
                kl_teacher: all(Quantity::KlTeacher),
                p_whole_number: all(Quantity::PWholeNumber),
                closure: line.get(Quantity::Closure).filter(|_| !of_all),
            });
        }
    }
    found
}

/// One edit with a student's direction; a line of `steer.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SteerRow {
    /// The trait of the student's teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter; empty without an adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// The edit: `injected` (added to the base) and `projected` (taken out of the student), both after the middle
    /// block; `replaced` (the student's residual stream along the direction is the base's) and `transplanted` (the
    /// base's is the student's), both after every block.
    pub edit: String,
    /// The direction: the student's `own`, `random` (the mean over 20), that of the `control` student, or that of
    /// another trait's student (`other`).
    pub direction: String,
    /// Change of the margin from the unedited base, in nats.
    pub delta_margin: f64,
    /// Change of the margin from the base of the unedited student, in nats.
    pub student_delta_margin: f64,
    /// Cosine of the student's own direction with the teacher's, the mean over blocks, -1 to 1; empty if not measured.
    pub cos_teacher: Option<f64>,
    /// Share of the squared length of its changes of the residual stream that is along one line, the mean over blocks,
    /// 0 to 1; empty if not measured.
    pub ev1: Option<f64>,
}

/// The rows of every edit along a direction; none if the claim measures neither steering nor replacement.
pub fn steer(rows: &[OutcomeRow]) -> Vec<SteerRow> {
    const EDITS: [(Quantity, &str, &str); 10] = [
        (Quantity::InjectedDeltaMargin, "injected", "own"),
        (Quantity::InjectedRandomDeltaMargin, "injected", "random"),
        (Quantity::InjectedControlDeltaMargin, "injected", "control"),
        (Quantity::InjectedOtherDeltaMargin, "injected", "other"),
        (Quantity::ProjectedDeltaMargin, "projected", "own"),
        (Quantity::ProjectedRandomDeltaMargin, "projected", "random"),
        (Quantity::ReplacedDeltaMargin, "replaced", "own"),
        (Quantity::ReplacedRandomDeltaMargin, "replaced", "random"),
        (Quantity::TransplantedDeltaMargin, "transplanted", "own"),
        (Quantity::TransplantedRandomDeltaMargin, "transplanted", "random"),
    ];
    let mut found = vec![];
    for line in lines(rows) {
        let Some(student_delta_margin) = line.get(Quantity::DeltaMargin) else { continue };
        for (quantity, edit, direction) in EDITS {
            let Some(delta_margin) = line.get(quantity) else { continue };
            found.push(SteerRow {
                target: line.first.target.clone(),
                dataset: line.first.dataset,
                student: line.first.student.clone(),
                rank: line.first.rank,
                seed_index: line.first.seed_index,
                edit: edit.to_owned(),
                direction: direction.to_owned(),
                delta_margin,
                student_delta_margin,
                cos_teacher: line.get(Quantity::CosTeacher),
                ev1: line.get(Quantity::Ev1),
            });
        }
    }
    found
}

/// A singular value of an adapter's change of a weight; a line of `spectrum.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpectrumRow {
    /// The trait of the student's teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// The block, from 0.
    pub layer: usize,
    /// The map, such as `q_proj`.
    pub module: String,
    /// Index of the singular value, from 0, in falling order.
    pub k: usize,
    /// The singular value of s·B·A, in units of the weights.
    pub sigma: f64,
    /// The singular value over the largest of the map, 0 to 1.
    pub sigma_norm: f64,
    /// Squared Frobenius norm over squared largest singular value: the number of equally strong directions that the
    /// map's change amounts to.
    pub stable_rank: f64,
}

/// The rows of one adapter.
pub fn spectrum(unit: &Unit, of: &UnitStudent<'_>, spectra: &[Spectrum]) -> Vec<SpectrumRow> {
    let of_map = |spectrum: &Spectrum| {
        let largest = spectrum.sigma.first().copied().unwrap_or(0.0);
        let row = |(k, sigma): (usize, &f64)| SpectrumRow {
            target: unit.experiment.target.word.clone(),
            dataset: unit.dataset,
            student: of.name.to_owned(),
            rank: of.rank(),
            seed_index: of.seed_index,
            layer: spectrum.layer,
            module: spectrum.proj.to_string(),
            k,
            sigma: *sigma,
            sigma_norm: if largest > 0.0 { sigma / largest } else { 0.0 },
            stable_rank: spectrum.stable_rank(),
        };
        spectrum.sigma.iter().enumerate().map(row).collect::<Vec<_>>()
    };
    spectra.iter().flat_map(of_map).collect()
}

/// The numbers of one student in one condition on one trait.
struct Line<'r> {
    first: &'r OutcomeRow,
    values: BTreeMap<Quantity, (f64, usize)>,
}

impl Line<'_> {
    fn get(&self, quantity: Quantity) -> Option<f64> {
        self.values.get(&quantity).map(|(value, _)| *value)
    }
}

fn lines(rows: &[OutcomeRow]) -> Vec<Line<'_>> {
    let mut at: BTreeMap<(StudentKey, &str, &str), usize> = BTreeMap::new();
    let mut lines: Vec<Line<'_>> = vec![];
    for row in rows {
        let index = *at.entry((row.student_key(), &row.cell, &row.evaluated)).or_insert(lines.len());
        if index == lines.len() {
            lines.push(Line { first: row, values: BTreeMap::new() });
        }
        lines[index].values.insert(row.quantity, (row.value, row.n));
    }
    lines
}
