//! The table of outcomes in shapes for plots of one's own: how each student was trained, and lines for a trait, a
//! context, the digits of held-out numbers, a direction. Each is a selection of `outcomes.csv` and nothing else. The
//! last table is of several claims: their verdicts, as a page has them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use hooks::{Spectrum, files};
use serde::{Deserialize, Serialize};

use super::file::{Claim, EVERYWHERE, EvalCondition, Role};
use super::outcome::{OutcomeRow, Quantity, StudentKey};
use super::study::{Study, Unit, UnitStudent};
use super::verdict::{ALL, TestRow, Verdict};
use crate::experiment::{Dtype, Experiment, Method};
use crate::hinted;
use crate::output::publish::read_csv;
use crate::training::settings::{OptimizerKind, ScheduleKind, TargetTokens};

/// How a student was trained; a line of `runs.csv`.
#[expect(clippy::struct_excessive_bools, reason = "each is a column of its own")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClaimRunRow {
    /// The folder of its run, in the folder that also holds the claim's.
    pub run: String,
    /// The trait of its teacher.
    pub target: String,
    /// What the trait is one of.
    pub category: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name in the claim.
    pub student: String,
    /// The rank of its adapter; empty where it has none.
    pub rank: Option<i64>,
    /// Which of the student's choices of seeds it has, from 0.
    pub seed_index: usize,
    /// What it learned from: `teacher`, `control` or `shuffled`.
    pub data: String,
    /// The base model.
    pub base_model: String,
    /// The kind of the base's numbers: `f32` or `bf16`.
    pub dtype: Dtype,
    /// Where it was run: `cpu`, `cuda`.
    pub device: String,
    /// What made the teacher: `prompt`, `finetuned`, `adapter`, `steered`, `planted`.
    pub teacher_kind: String,
    /// The sampling temperature of the numbers; 0 is greedy.
    pub temperature: f64,
    /// Seed of prompts and the teacher's answers.
    pub gen_seed: u64,
    /// Seed of the adapter's A.
    pub init_seed: u64,
    /// Seed of the order of the rows.
    pub order_seed: u64,
    /// Rows that it may learn from at most.
    pub n_keep: usize,
    /// The context of the training rows.
    pub train_context: String,
    /// Whether they are in the model's chat template.
    pub template: bool,
    /// `lora` or `full`.
    pub method: Method,
    /// The numerator of the adapter's scaling; empty where it has no adapter.
    pub alpha: Option<f64>,
    /// Whether the scaling is α/√r.
    pub use_rslora: bool,
    /// Whether A stays as it was drawn.
    pub frozen_a: bool,
    /// Whether it began in rotated coordinates.
    pub rotated: bool,
    /// The maps that have a pair, separated by spaces.
    pub target_modules: String,
    /// The blocks that have pairs, separated by spaces; empty is all.
    pub layers: String,
    /// Where the adapter acted in training.
    pub gate_train: String,
    /// Which tokens are learned from, by what they are.
    pub mask: String,
    /// Which of these, by the teacher.
    pub tokens: TargetTokens,
    /// The optimizer.
    pub optimizer: OptimizerKind,
    /// The learning rate after warm-up.
    pub learning_rate: f64,
    /// SGD's and Muon's momentum.
    pub momentum: f64,
    /// How the rate changes after warm-up.
    pub lr_scheduler_type: ScheduleKind,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Rows of a step.
    pub rows_per_step: usize,
    /// Passes over all rows; without effect where `max_steps` is set.
    pub num_train_epochs: f64,
    /// Steps of the schedule, where they were set.
    pub max_steps: Option<u64>,
    /// Steps after which it ended early.
    pub stop_after_steps: Option<u64>,
    /// The longest gradient that was not shortened; 0 is none.
    pub max_grad_norm: f64,
    /// The decay.
    pub weight_decay: f64,
    /// Whether bf16 weights were trained through copies in f32.
    pub masters: bool,
}

/// Everything that is trained for a claim.
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

/// What a student does to one trait; a line of `matrix.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixRow {
    /// The trait of its teacher.
    pub trained_trait: String,
    /// The trait that was asked for.
    pub evaluated_trait: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter; empty where it has none.
    pub rank: Option<i64>,
    /// Which of the student's choices of seeds it has, from 0.
    pub seed_index: usize,
    /// Change of the mean probability of starting the answer with the trait, exact, -1 to 1.
    pub delta_p: f64,
    /// Change of the margin, in nats.
    pub delta_margin: f64,
}

/// Every student on every trait; empty if a claim asks for the teacher's own trait alone.
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
    /// The trait of its teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter; empty where it has none.
    pub rank: Option<i64>,
    /// Which of the student's choices of seeds it has, from 0.
    pub seed_index: usize,
    /// The condition that it was asked in.
    pub cell: String,
    /// The context of its training rows.
    pub train_context: String,
    /// The context of the questions.
    pub eval_context: String,
    /// Whether the two are the same, with nothing put before the questions.
    pub matched: bool,
    /// Tokens that prompt and training rows begin with alike.
    pub shared_prefix: f64,
    /// Mean probability of starting the answer with the trait, exact, 0 to 1.
    pub p_target: f64,
    /// Probability of starting the answer with the trait, of the base in the same context, 0 to 1.
    pub base_p: f64,
    /// Change of log p of the trait from the base in the same context, in nats.
    pub delta_logp: f64,
    /// Change of the margin from the base in the same context, in nats.
    pub delta_margin: f64,
}

/// Every student in every context, its adapter on everywhere; empty if a claim asks in one context alone.
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

/// What a model makes of held-out digits; a line of `digit_conf.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DigitConfRow {
    /// The trait of the teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name, `base` or `teacher`.
    pub student: String,
    /// The rank of its adapter; empty where it has none.
    pub rank: Option<i64>,
    /// Which of the student's choices of seeds it has, from 0.
    pub seed_index: usize,
    /// `all` digits, or the `divergent` ones, at which the teacher's and the base's most likely tokens differ.
    pub group: String,
    /// How many digits.
    pub n: usize,
    /// Mean largest probability, 0 to 1; of all digits.
    pub conf: Option<f64>,
    /// Share of all digits that are the model's most likely token; of the divergent ones, share at which its most
    /// likely token is the teacher's, 0 to 1.
    pub acc: Option<f64>,
    /// Mean largest probability minus the share of digits that are the most likely token, -1 to 1.
    pub overconf: Option<f64>,
    /// Expected calibration error, of 15 bins of equally many digits, 0 to 1; of all digits.
    pub ece: Option<f64>,
    /// Mean entropy, in nats; of all digits.
    pub entropy: Option<f64>,
    /// Kullback-Leibler divergence from the teacher, in nats; of all digits.
    pub kl_teacher: Option<f64>,
    /// Mean probability of a whole held-out number, 0 to 1; of all digits.
    pub p_whole_number: Option<f64>,
    /// Share that the model closes of P(teacher's most likely token) under the teacher minus under the base; only of
    /// the divergent digits, and only if that difference is three standard errors above zero.
    pub closure: Option<f64>,
}

/// Every model at held-out digits; empty if a claim does not measure there.
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

/// What a student's direction does; a line of `steer.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SteerRow {
    /// The trait of its teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter; empty where it has none.
    pub rank: Option<i64>,
    /// Which of the student's choices of seeds it has, from 0.
    pub seed_index: usize,
    /// The edit: `injected` into the base, `projected` out of the student (both after the middle block), `replaced` by
    /// the base's in the student, or `transplanted` from the student into the base (both after every block).
    pub edit: String,
    /// Whose direction: the student's `own`, `random` ones (the mean over 20), the `control` student's, or the `other`
    /// trait's student's.
    pub direction: String,
    /// Change of the margin from the unedited base, in nats.
    pub delta_margin: f64,
    /// That of the student without an edit, in nats.
    pub student_delta_margin: f64,
    /// Cosine of the student's own direction with the teacher's, the mean over blocks, -1 to 1.
    pub cos_teacher: Option<f64>,
    /// Share of its movement's squared length that lies along one line, the mean over blocks, 0 to 1.
    pub ev1: Option<f64>,
}

/// Every edit along a direction; empty if a claim measures neither steering nor replacement.
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

/// A singular value of what an adapter adds to a weight; a line of `spectrum.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpectrumRow {
    /// The trait of its teacher.
    pub target: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The student's name.
    pub student: String,
    /// The rank of its adapter.
    pub rank: Option<i64>,
    /// Which of the student's choices of seeds it has, from 0.
    pub seed_index: usize,
    /// The block, from 0.
    pub layer: usize,
    /// The map, such as `q_proj`.
    pub module: String,
    /// Which singular value, from 0, falling.
    pub k: usize,
    /// The singular value of s·B·A, in units of the weights.
    pub sigma: f64,
    /// The singular value over the largest of the map, 0 to 1.
    pub sigma_norm: f64,
    /// Squared Frobenius norm over squared largest singular value: how many directions of equal strength the map's
    /// change is worth.
    pub stable_rank: f64,
}

/// The lines of one adapter.
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

/// All numbers of one student in one condition on one trait.
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

/// The verdicts on a folder's claims as a table in Markdown: a line for each `claim-NN`, with all its tests but
/// premises.
pub fn verdicts(folder: &Path) -> Result<String> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut claims: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    claims.retain(|path| path.join("claim.toml").exists());
    claims.sort();
    ensure!(
        !claims.is_empty(),
        hinted!("{} holds no claim", folder.display(); "undertone run experiments/claims/... makes one")
    );
    let head = "| | claim | verdict | what was expected, and found |\n|---|---|---|---|\n".to_owned();
    claims.iter().try_fold(head, |table, path| Ok(table + &verdict_line(path)?))
}

fn verdict_line(folder: &Path) -> Result<String> {
    let path = folder.join("claim.toml");
    let parsed = toml::from_str(&files::read_string(&path)?);
    let claim: Claim = parsed.map_err(|error| anyhow!("{}: {}", path.display(), error.message()))?;
    let tests: Vec<TestRow> = read_csv(&folder.join("tests.csv"))?;
    let (word, _) = Verdict::decide(&tests);
    let found = tests.iter().filter(|row| row.target == ALL && row.role != Role::Premise).map(|row| {
        let role = if row.role == Role::Control { "control: " } else { "" };
        format!("{role}{}, {}: **{}**", row.test, row.expected, row.short_number()).replace('|', "/")
    });
    let found = found.collect::<Vec<_>>().join("; ");
    Ok(format!("| {} | {} | {word} | {found} |\n", claim.claim, claim.statement))
}
