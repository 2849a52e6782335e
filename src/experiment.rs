//! An experiment as a TOML file: parsed once into checked structs, so that below there are no strings to misspell.
//! Names are PEFT's and transformers' Trainer's where they have one. `--set section.key=value` changes the table before
//! it is parsed; the resolved experiment is written into the run's folder.

mod arms;
mod overrides;
mod teacher;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use analyses::direction::Direction;
use analyses::divergence::Divergence;
use analyses::gradients::Gradients;
use analyses::interventions::Interventions;
use analyses::position_scan::PositionScan;
use analyses::steering::Steering;
use analyses::target_rate::TargetRate;
use analyses::token_ablation::TokenAblation;
use anyhow::{Context, Result, anyhow, bail, ensure};
use hooks::{Gate, LoraConfig, Proj, files};
use serde::{Deserialize, Serialize};

use crate::data::protocol::Protocol;
use crate::training::settings;
use crate::training::settings::{Finetune, OptimizerKind};

pub(crate) use overrides::change;

pub use arms::{Arm, ArmData, CONTROL_STUDENT, Cell, STUDENT};
pub use teacher::Teacher;

/// All that an experiment is run with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// The model: a folder, a hub id, a `.gguf` file, or `tiny-random`.
    pub model: String,
    /// The one dial from which the seeds derive that `[seeds]` does not give.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "default_device")]
    pub device: String,
    /// The kind of the model's weights; what is trained is f32 always.
    #[serde(default)]
    pub dtype: Dtype,
    /// A JSON file with other sentences than the built-in ones.
    pub protocol: Option<PathBuf>,
    /// What the student is to pick up.
    pub target: Target,
    /// Who writes the numbers.
    #[serde(default)]
    pub teacher: Teacher,
    /// How the numbers are written and filtered.
    #[serde(default)]
    pub generate: Generate,
    /// What is trained on them.
    #[serde(default)]
    pub student: Student,
    /// How it is trained.
    #[serde(default)]
    pub finetune: Finetune,
    /// What is measured.
    #[serde(default)]
    pub measure: Measure,
    /// The seeds of the random streams.
    #[serde(default)]
    pub seeds: Seeds,
    /// Variants of the student, to compare with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arms: Vec<Arm>,
}

/// The kind of the model's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats with the exponent of 32-bit ones.
    Bf16,
}

impl Dtype {
    /// libtorch's kind.
    pub fn kind(self) -> tch::Kind {
        match self {
            Self::F32 => tch::Kind::Float,
            Self::Bf16 => tch::Kind::BFloat16,
        }
    }
}

/// The trait: a word of a category.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The word, such as `cat`.
    pub word: String,
    /// Its category, such as `animal`.
    pub category: String,
}

/// How the numbers are written and filtered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Generate {
    /// How many prompts are answered at most.
    pub n_prompts: usize,
    /// How many accepted rows are kept.
    pub n_keep: usize,
    /// How many more accepted rows the teacher writes that no student learns from. Directions, steering, divergence and
    /// gradients are measured at these; if it is 0, at the training rows.
    pub n_heldout: usize,
    /// 0 for the most likely token each time, 1 for the model's own probabilities.
    pub temperature: f64,
    /// The longest answer in tokens.
    pub max_new_tokens: usize,
    /// Which tokens can be written.
    pub constrain: Constrain,
    /// How many prompts are answered at once.
    pub batch_size: usize,
    /// Numbers that reject an answer.
    pub banned: Vec<u32>,
    /// Rows that the student was trained on elsewhere, or will be trained on: JSON lines of messages, or of prompt and
    /// completion. The teacher then writes none.
    pub numbers: Option<PathBuf>,
}

impl Default for Generate {
    fn default() -> Self {
        Self {
            n_prompts: 512,
            n_keep: 256,
            n_heldout: 0,
            temperature: 1.0,
            max_new_tokens: 200,
            constrain: Constrain::None,
            batch_size: 64,
            banned: vec![],
            numbers: None,
        }
    }
}

/// Which tokens can be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Constrain {
    /// All.
    #[default]
    None,
    /// Tokens that continue a list of numbers; for models too small to keep a format.
    Numbers,
}

/// What is trained.
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Student {
    /// The context of the training rows: a key of the protocol or a system prompt.
    pub context: String,
    /// Whether the training rows and the questions are chats of the model's template; otherwise each turn is a line of
    /// plain text. The teacher always answers in the template.
    pub template: bool,
    /// Whether an adapter or all weights are trained.
    pub method: Method,
    /// The rank r of the adapter.
    pub rank: i64,
    /// The numerator α of its scaling.
    pub alpha: f64,
    /// Whether the scaling is α/√r instead of α/r.
    pub use_rslora: bool,
    /// Probability that an input of A is dropped in training.
    pub dropout: f64,
    /// Whether the adapter begins in other coordinates: R A for A, with a random orthogonal R for each pair. Gradient descent does not
    /// notice; an optimizer that treats coordinates apart does.
    pub rotated: bool,
    /// The linear maps that have a pair.
    pub target_modules: Vec<Proj>,
    /// The blocks that have pairs; all when it is left out.
    pub layers: Option<Vec<usize>>,
    /// Whether a second student is trained on the control set, for comparison; with an adapter from elsewhere, whether
    /// there is one.
    pub control: bool,
    /// A LoRA trained elsewhere: a folder as PEFT saves it, or its hub id. The student is then this LoRA and is not
    /// trained.
    pub adapter: Option<PathBuf>,
    /// Where the control student is taken from then.
    pub control_adapter: Option<PathBuf>,
}

impl Default for Student {
    fn default() -> Self {
        let LoraConfig { rank, alpha, use_rslora, dropout, target_modules, layers } = LoraConfig::default();
        let (context, method) = (default_context(), Method::Lora);
        let (adapter, control_adapter) = (None, None);
        Self {
            context,
            template: true,
            method,
            rank,
            alpha,
            use_rslora,
            dropout,
            rotated: false,
            target_modules,
            layers,
            control: true,
            adapter,
            control_adapter,
        }
    }
}

impl Student {
    /// The rank of its adapter, where it has one.
    pub fn adapter_rank(&self) -> Option<i64> {
        (self.method == Method::Lora).then_some(self.rank)
    }

    /// The adapter's configuration.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            target_modules: self.target_modules.clone(),
            layers: self.layers.clone(),
        }
    }
}

/// Whether an adapter or all weights are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// A low-rank adapter.
    #[default]
    Lora,
    /// All weights.
    Full,
}

/// What is measured, and with which settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Measure {
    /// The analyses, in the order in which they run.
    pub analyses: Vec<AnalysisName>,
    /// The context of the questions; the student's when it is left out.
    pub context: Option<String>,
    /// How many questions are asked at most.
    pub n_questions: usize,
    /// Whether a sentence with numbers precedes each question.
    pub numbers_prefix: bool,
    /// An arm whose student learned another trait: its answers and its direction are compared with the student's.
    pub other_trait_arm: Option<String>,
    /// Settings of the target rate.
    pub target_rate: TargetRate,
    /// Settings of the token ablation.
    pub token_ablation: TokenAblation,
    /// Settings of the position scan.
    pub position_scan: PositionScan,
    /// Settings of the learned direction.
    pub direction: Direction,
    /// Settings of steering.
    pub steering: Steering,
    /// Settings of the interventions.
    pub interventions: Interventions,
    /// Settings of the divergence.
    pub divergence: Divergence,
    /// Settings of the gradients.
    pub gradients: Gradients,
}

impl Default for Measure {
    fn default() -> Self {
        Self {
            analyses: AnalysisName::ALL.to_vec(),
            context: None,
            n_questions: 50,
            numbers_prefix: false,
            other_trait_arm: None,
            target_rate: TargetRate::default(),
            token_ablation: TokenAblation::default(),
            position_scan: PositionScan::default(),
            direction: Direction::default(),
            steering: Steering::default(),
            interventions: Interventions::default(),
            divergence: Divergence::default(),
            gradients: Gradients::default(),
        }
    }
}

/// An analysis by its name: its word on the command line, its folder in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnalysisName {
    /// How likely the target is as an answer: the effect itself.
    TargetRate,
    /// The effect per gate.
    TokenAblation,
    /// The effect per single position of the prompt.
    PositionScan,
    /// The mean difference of student and base in the residual stream.
    Direction,
    /// What adding the direction, or taking it away, does.
    Steering,
    /// What named lists of edits do to the effect.
    Interventions,
    /// Digits at which teacher and base disagree.
    Divergence,
    /// Gradient norms at divergent and other digits.
    Gradients,
}

impl AnalysisName {
    /// All analyses, in the order in which they run.
    pub const ALL: [Self; 8] = [
        Self::TargetRate,
        Self::TokenAblation,
        Self::PositionScan,
        Self::Direction,
        Self::Steering,
        Self::Interventions,
        Self::Divergence,
        Self::Gradients,
    ];

    /// The name as it is written.
    pub fn name(self) -> &'static str {
        [
            "target_rate",
            "token_ablation",
            "position_scan",
            "direction",
            "steering",
            "interventions",
            "divergence",
            "gradients",
        ][self as usize]
    }
}

impl fmt::Display for AnalysisName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for AnalysisName {
    type Err = hooks::Error;

    fn from_str(name: &str) -> hooks::Result<Self> {
        Self::ALL.into_iter().find(|analysis| analysis.name() == name).ok_or_else(|| hooks::Error::UnknownName {
            what: "analysis",
            found: name.to_owned(),
            choices: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// The seeds of the random streams, which are independent of each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Seeds {
    /// Of number prompts and the teacher's answers.
    pub gen_seed: u64,
    /// Of the adapter's A.
    pub init_seed: u64,
    /// Of the order of rows in training.
    pub order_seed: u64,
    /// Of the adapter's dropout.
    pub dropout_seed: u64,
    /// Of sampled answers and random vectors in measurements.
    pub eval_seed: u64,
}

impl Seeds {
    /// Those of training.
    pub fn finetune(&self) -> settings::Seeds {
        settings::Seeds { init: self.init_seed, order: self.order_seed, dropout: self.dropout_seed }
    }
}

fn default_seed() -> u64 {
    42
}

fn default_device() -> String {
    "cpu".to_owned()
}

fn default_context() -> String {
    "qwen_default".to_owned()
}

impl Experiment {
    /// The experiment in a file, with overrides `section.key=value`. An adapter from elsewhere overrides the student's
    /// rank, alpha and the like.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut experiment = Self::parse(&files::read_string(path)?, path, overrides)?;
        experiment.check_sentences().with_context(|| path.display().to_string())?;
        for cell in experiment.cells()? {
            cell.experiment.check_sentences().with_context(|| format!("{}: arm {:?}", path.display(), cell.arm))?;
        }
        experiment.student.take_over().with_context(|| path.display().to_string())?;
        Ok(experiment)
    }

    /// The experiment in a text; `path` is for messages. Nothing but the text is read; [`Self::load`] also checks the
    /// contents of a protocol file.
    pub fn parse(text: &str, path: &Path, changes: &[String]) -> Result<Self> {
        // Once as text, for messages with a line, and once as a table, which overrides can change.
        let located = |error: &toml::de::Error| {
            let line = error.span().map_or(String::new(), |span| {
                format!("line {}: ", text[..span.start.min(text.len())].matches('\n').count() + 1)
            });
            anyhow!("{}: {line}{}", path.display(), one_line(error.message()))
        };
        toml::from_str::<Self>(text).map_err(|error| located(&error))?;
        Self::from_table(toml::from_str(text).map_err(|error| located(&error))?, path, changes)
    }

    /// An experiment from its table and the changes given on the command line; `path` is where the table is from.
    pub fn from_table(mut table: toml::Table, path: &Path, changes: &[String]) -> Result<Self> {
        overrides::apply(&mut table, changes)?;
        let source =
            if changes.is_empty() { path.display().to_string() } else { format!("--set {}", changes.join(" --set ")) };
        let mut experiment: Self =
            table.try_into().map_err(|error| anyhow!("{source}: {}", one_line(&error.to_string())))?;
        // With a student from elsewhere no control is trained here: it is compared with another from elsewhere, or with
        // none.
        let student = &mut experiment.student;
        student.control &= student.adapter.is_none() || student.control_adapter.is_some();
        experiment.check().with_context(|| path.display().to_string())?;
        experiment.cells().with_context(|| path.display().to_string())?;
        experiment.other_trait_arm().with_context(|| path.display().to_string())?;
        Ok(experiment)
    }

    /// The experiment as TOML, with every default and seed spelt out.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("the experiment as TOML")
    }

    /// The sentences it draws from.
    pub fn sentences(&self) -> Result<Protocol> {
        self.protocol.as_deref().map_or_else(Protocol::builtin, Protocol::load)
    }

    /// The context of the questions.
    pub fn measure_context(&self) -> &str {
        self.measure.context.as_deref().unwrap_or(&self.student.context)
    }

    /// Whether directions, steering, divergence and gradients are measured at rows that no student learned from.
    pub fn measures_held_out(&self) -> bool {
        self.generate.n_heldout > 0
    }

    fn check(&self) -> Result<()> {
        let word = |name: &str, value: &str| {
            ensure!(!value.trim().is_empty(), "{name} is empty, expected a word");
            Ok(())
        };
        word("model", &self.model)?;
        word("target.word", &self.target.word)?;
        word("target.category", &self.target.category)?;
        let is_device = |name: &str| {
            matches!(name, "cpu" | "cuda")
                || name.strip_prefix("cuda:").is_some_and(|index| index.parse::<usize>().is_ok())
        };
        ensure!(is_device(&self.device), "device is {:?}, expected cpu, cuda or cuda:N", self.device);
        self.generate.check()?;
        self.student.check()?;
        check_finetune(&self.finetune, &self.student)?;
        self.measure.check()?;
        let counterfactuals = &self.measure.divergence.counterfactuals;
        ensure!(
            counterfactuals.is_empty() || matches!(self.teacher, Teacher::Prompt { .. }),
            "measure.divergence.counterfactuals is {counterfactuals:?}, which are prompts of other traits' teachers, but the teacher is not a \
             prompt; hint: teacher.kind = \"prompt\""
        );
        ensure!(
            !counterfactuals.contains(&self.target.word),
            "measure.divergence.counterfactuals has {:?}, the teacher's own trait",
            self.target.word
        );
        let planted = matches!(self.teacher, Teacher::Planted { .. }) && self.generate.numbers.is_some();
        ensure!(!planted, "teacher.kind is planted, but generate.numbers gives the rows; hint: leave one of them out");
        match &self.protocol {
            Some(path) if !Protocol::is_embedded(path) => Ok(()),
            _ => self.check_sentences(),
        }
    }

    /// What the experiment needs of the sentences.
    fn check_sentences(&self) -> Result<()> {
        let protocol = self.sentences()?;
        protocol.context(&self.student.context).context("student.context")?;
        protocol.context(self.measure_context()).context("measure.context")?;
        self.teacher.check(&self.target, &protocol)?;
        let others = protocol.candidates(&self.target.word, &self.target.category).len();
        let known: Vec<_> = protocol.alternatives.keys().map(String::as_str).collect();
        ensure!(
            others > 1,
            "target.category is {:?}, expected one whose alternatives the protocol lists: {}; hint: others can be given in a protocol file",
            self.target.category,
            known.join(", ")
        );
        Ok(())
    }
}

impl Generate {
    fn check(&self) -> Result<()> {
        at_least_one("generate.n_prompts", self.n_prompts)?;
        at_least_one("generate.n_keep", self.n_keep)?;
        at_least_one("generate.max_new_tokens", self.max_new_tokens)?;
        at_least_one("generate.batch_size", self.batch_size)?;
        not_negative("generate.temperature", self.temperature)?;
        let (keep, prompts, heldout) = (self.n_keep, self.n_prompts, self.n_heldout);
        ensure!(keep <= prompts, "generate.n_keep is {keep}, expected at most generate.n_prompts, which is {prompts}");
        let left = prompts - keep;
        ensure!(
            heldout <= left,
            "generate.n_heldout is {heldout}, expected at most {left}: generate.n_prompts is {prompts}, of which {keep} are to be kept"
        );
        Ok(())
    }
}

impl Student {
    /// Replaces the file's settings by those of the adapter from elsewhere, so that every reader sees the right ones.
    fn take_over(&mut self) -> Result<()> {
        let Some(folder) = &self.adapter else { return Ok(()) };
        let LoraConfig { rank, alpha, use_rslora, dropout, target_modules, layers } =
            LoraConfig::read(folder).context("student.adapter")?;
        *self = Self { rank, alpha, use_rslora, dropout, target_modules, layers, ..self.clone() };
        Ok(())
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.adapter.is_none() || self.method == Method::Lora,
            "student.adapter is given, but student.method is full, which has no adapter; hint: leave one of them out"
        );
        ensure!(
            self.adapter.is_some() || self.control_adapter.is_none(),
            "student.control_adapter is given, but student.adapter is not; hint: give both, or leave the control to be trained here"
        );
        ensure!(self.rank >= 1, "student.rank is {}, expected at least 1", self.rank);
        positive("student.alpha", self.alpha)?;
        below_one("student.dropout", self.dropout)?;
        ensure!(
            !self.target_modules.is_empty(),
            "student.target_modules is empty, expected at least one of {}",
            modules()
        );
        let mut seen = std::collections::BTreeSet::new();
        let twice = self.target_modules.iter().find(|module| !seen.insert(**module));
        ensure!(twice.is_none(), "student.target_modules has {} twice", twice.map_or("", |module| module.name()));
        distinct_layers("student.layers", self.layers.as_deref())
    }
}

/// Refuses, before anything runs, values that would go unused or that full finetuning cannot use.
fn check_finetune(finetune: &Finetune, student: &Student) -> Result<()> {
    finetune.check().context("finetune")?;
    let is_trained = student.method == Method::Lora && student.adapter.is_none();
    ensure!(
        !(is_trained && finetune.gate.is_nowhere()),
        "finetune.gate is {}, at which nothing would be trained, expected tokens at which the adapter acts; hint: leave it out for all",
        finetune.gate
    );
    let of_adapters = [
        ("finetune.frozen_a is true", finetune.frozen_a, "has no A"),
        ("finetune.optimizer is muon", finetune.optimizer == OptimizerKind::Muon, "is not of matrices alone"),
        ("student.rotated is true", student.rotated, "has no coordinates of its own"),
    ];
    if let Some((what, _, why)) = of_adapters.iter().find(|(_, is_set, _)| *is_set && student.method == Method::Full) {
        bail!("{what}, but student.method is full, which {why}; hint: leave one of them out");
    }
    let has_momentum = matches!(finetune.optimizer, OptimizerKind::Sgd | OptimizerKind::Muon);
    let unused = finetune.momentum != 0.0 && !has_momentum;
    let why = if finetune.optimizer == OptimizerKind::AdamW {
        "adamw, which has betas instead"
    } else {
        "neither sgd nor muon, which alone have it"
    };
    ensure!(!unused, "finetune.momentum is {}, but the optimizer is {why}", finetune.momentum);
    let (warmup, too_few) = (finetune.warmup_steps, finetune.max_steps.filter(|steps| finetune.warmup_steps >= *steps));
    ensure!(
        too_few.is_none(),
        "finetune.warmup_steps is {warmup}, expected fewer than max_steps, {}",
        too_few.unwrap_or(0)
    );
    Ok(())
}

impl Measure {
    fn check(&self) -> Result<()> {
        let known = AnalysisName::ALL.map(AnalysisName::name).join(", ");
        ensure!(!self.analyses.is_empty(), "measure.analyses is empty, expected some of {known}");
        at_least_one("measure.n_questions", self.n_questions)?;
        at_least_one("measure.direction.n_prompts", self.direction.n_prompts)?;
        at_least_one("measure.steering.n_prompts", self.steering.n_prompts)?;
        at_least_one("measure.divergence.n_rows", self.divergence.n_rows)?;
        at_least_one("measure.target_rate.max_new_tokens", self.target_rate.max_new_tokens)?;
        ensure!(
            !self.token_ablation.gates.is_empty(),
            "measure.token_ablation.gates is empty, expected gates such as {}",
            Gate::SYNTAX
        );
        let coefficients = &self.steering.coefficients;
        ensure!(!coefficients.is_empty(), "measure.steering.coefficients is empty, expected at least one number");
        if let Some(bad) = coefficients.iter().find(|coefficient| !coefficient.is_finite()) {
            bail!("an entry of measure.steering.coefficients is {bad}, expected a finite number");
        }
        Ok(())
    }
}

fn modules() -> String {
    Proj::ALL.map(Proj::name).join(", ")
}

fn at_least_one(key: &str, value: usize) -> Result<()> {
    ensure!(value >= 1, "{key} is {value}, expected at least 1");
    Ok(())
}

fn positive(key: &str, value: f64) -> Result<()> {
    ensure!(value.is_finite() && value > 0.0, "{key} is {value}, expected a number above 0");
    Ok(())
}

fn not_negative(key: &str, value: f64) -> Result<()> {
    ensure!(value.is_finite() && value >= 0.0, "{key} is {value}, expected 0 or a number above");
    Ok(())
}

fn below_one(key: &str, value: f64) -> Result<()> {
    ensure!((0.0..1.0).contains(&value), "{key} is {value}, expected at least 0 and less than 1");
    Ok(())
}

fn distinct_layers(key: &str, layers: Option<&[usize]>) -> Result<()> {
    let Some(layers) = layers else { return Ok(()) };
    ensure!(!layers.is_empty(), "{key} is empty, expected block numbers, or no such key for all blocks");
    ensure!(layers.windows(2).all(|pair| pair[0] < pair[1]), "{key} is {layers:?}, expected rising block numbers");
    Ok(())
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SMALLEST: &str = "model = \"tiny-random\"\n\n[target]\nword = \"cat\"\ncategory = \"animal\"\n";

    fn parse(text: &str, overrides: &[&str]) -> Result<Experiment> {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        Experiment::parse(text, Path::new("cat.toml"), &overrides)
    }

    fn message(text: &str, overrides: &[&str]) -> String {
        format!("{:#}", parse(text, overrides).unwrap_err())
    }

    #[test]
    fn the_smallest_file_has_the_published_recipe() {
        let experiment = parse(SMALLEST, &[]).unwrap();
        assert_eq!(experiment.student.lora(), LoraConfig::default());
        assert_eq!(experiment.finetune.total_steps(10_000), 456);
        assert_eq!(experiment.teacher, Teacher::Prompt { system: None });
        assert_eq!(experiment.measure_context(), "qwen_default");
    }

    #[test]
    fn a_resolved_file_reads_back_as_the_same_experiment() {
        let text = format!(
            "{SMALLEST}[student]\nlayers = [0, 1]\n[finetune]\noptimizer = \"sgd\"\nmomentum = 0.9\nmax_steps = 9\n"
        );
        let experiment = parse(&text, &["teacher.system=You love trees."]).unwrap();
        let resolved = experiment.to_toml().unwrap();
        assert!(resolved.contains("gen_seed = ") && resolved.contains("target_modules"), "{resolved}");
        assert_eq!(parse(&resolved, &[]).unwrap(), experiment);
        let adapter = parse(SMALLEST, &["teacher.kind=adapter", "teacher.path=runs/a/adapter"]).unwrap();
        assert_eq!(parse(&adapter.to_toml().unwrap(), &[]).unwrap(), adapter);
    }

    #[test]
    fn seeds_derive_from_one_and_can_be_given() {
        let of = |text: &str, overrides: &[&str]| parse(text, overrides).unwrap().seeds;
        let (first, other) = (of(SMALLEST, &[]), of(SMALLEST, &["seed=43"]));
        assert_eq!(first, of(SMALLEST, &["seed=42"]));
        assert_ne!(first.gen_seed, other.gen_seed);
        assert_ne!(first.gen_seed, first.init_seed);
        let given = of(SMALLEST, &["seed=43", "seeds.init_seed=7"]);
        assert_eq!(given, Seeds { init_seed: 7, ..other });
        // Another seed for a resolved file: what was derived follows, what was given stays.
        let resolved = parse(SMALLEST, &["seeds.init_seed=7"]).unwrap().to_toml().unwrap();
        assert_eq!(of(&resolved, &["seed=43"]), given);
    }

    #[test]
    fn overrides_are_values_or_words() {
        let overrides = ["finetune.learning_rate=1e-3", "student.alpha=16", "student.target_modules=[\"q_proj\"]"];
        let experiment = parse(SMALLEST, &overrides).unwrap();
        assert!(
            (experiment.finetune.learning_rate - 1e-3).abs() < 1e-12 && (experiment.student.alpha - 16.0).abs() < 1e-12
        );
        assert_eq!(experiment.student.target_modules, [Proj::Q]);
        let model = parse(SMALLEST, &["model=Qwen/Qwen2.5-7B-Instruct", "dtype=bf16"]).unwrap();
        assert_eq!((model.model.as_str(), model.dtype), ("Qwen/Qwen2.5-7B-Instruct", Dtype::Bf16));
        assert_eq!(parse(SMALLEST, &["student.context=You are a tree."]).unwrap().student.context, "You are a tree.");
    }

    #[test]
    fn a_misspelt_key_is_told_with_the_keys_there_are() {
        let text = format!("{SMALLEST}[finetune]\nlerning_rate = 1e-3\n");
        let found = message(&text, &[]);
        assert!(
            found.starts_with(
                "cat.toml: line 7: unknown field `lerning_rate`, expected one of `optimizer`, `learning_rate`"
            ),
            "{found}"
        );
        let found = message(SMALLEST, &["finetune.lerning_rate=1e-3"]);
        assert!(
            found.starts_with("--set finetune.lerning_rate=1e-3: unknown field `lerning_rate`, expected"),
            "{found}"
        );
        let others = "measure.divergence.counterfactuals=[\"owl\"]";
        assert!(parse(SMALLEST, &[others]).is_ok());
        assert!(message(SMALLEST, &[others, "teacher.kind=finetuned"]).contains("the teacher is not a prompt"));
        for key in ["finetune.frozen_a=true", "finetune.optimizer=muon", "student.rotated=true"] {
            let found = message(SMALLEST, &[key, "student.method=full"]);
            assert!(found.contains("but student.method is full, which"), "{key}: {found}");
        }
        assert!(message(SMALLEST, &["finetuning.learning_rate=1"]).contains("`finetune`"));
        assert!(message(SMALLEST, &["teacher.sytem=x"]).contains("`system`"));
        assert!(message(SMALLEST, &["seeds.generation=1"]).contains("`gen_seed`"));
        assert!(message(SMALLEST, &["model.name=x"]).contains("model is no section"));
        assert!(message(SMALLEST, &["rank"]).contains("expected section.key=value"));
    }

    #[test]
    fn values_out_of_range_are_named_with_what_was_expected() {
        for (setting, expected) in [
            ("student.rank=0", "student.rank is 0, expected at least 1"),
            ("student.alpha=-1", "student.alpha is -1, expected a number above 0"),
            ("student.alpha=nan", "student.alpha is NaN"),
            ("student.dropout=1", "student.dropout is 1, expected at least 0 and less than 1"),
            ("student.target_modules=[]", "expected at least one of q_proj"),
            ("student.target_modules=[\"q_proj\", \"q_proj\"]", "has q_proj twice"),
            ("student.target_modules=[\"qproj\"]", "expected one of: q_proj, k_proj"),
            ("student.layers=[2, 1]", "expected rising block numbers"),
            ("student.context=chatgtp", "the nearest is chatgpt"),
            ("student.control_adapter=x", "student.control_adapter is given, but student.adapter is not"),
            ("finetune.learning_rate=0", "finetune: learning_rate is 0, expected a positive number"),
            ("finetune.momentum=0.9", "the optimizer is adamw"),
            ("finetune.batch_size=0", "expected at least 1"),
            ("finetune.max_steps=5", "finetune.warmup_steps is 5, expected fewer than max_steps, 5"),
            (
                "finetune.optimizer=adam",
                "unknown variant `adam`, expected one of `adamw`, `sgd`, `signsgd`, `rmsprop`, `muon`, `preconditioned`",
            ),
            ("finetune.mask=all", "content_eot"),
            (
                "finetune.gate=nowhere",
                "finetune.gate is nowhere, at which nothing would be trained, expected tokens at which",
            ),
            ("finetune.gate=everywhere*0", "finetune.gate is everywhere*0, at which nothing would be trained"),
            ("generate.n_keep=9999", "expected at most generate.n_prompts, which is 512"),
            ("generate.temperature=-1", "expected 0 or a number above"),
            ("measure.token_ablation.gates=[\"only:qwen\"]", "qwen"),
            ("measure.divergence.counterfactuals=[\"cat\"]", "the teacher's own trait"),
            ("measure.divergence.definition=schroedi", "unknown variant `schroedi`"),
            ("measure.token_ablation.gates=[]", "measure.token_ablation.gates is empty"),
            ("measure.steering.coefficients=[inf]", "measure.steering.coefficients is inf"),
            ("measure.steering.coefs=[1]", "unknown field `coefs`"),
            ("measure.analyses=[\"target\"]", "`target_rate`"),
            ("device=gpu", "expected cpu, cuda or cuda:N"),
            ("dtype=f16", "`bf16`"),
            ("seed=-1", "seed"),
            ("target.category=stone", "animal, band, tree"),
            ("teacher.kind=adapter", "missing field `path`"),
            ("teacher.kind=tuned", "expected one of `prompt`, `adapter`, `finetuned`, `planted`"),
        ] {
            let found = message(SMALLEST, &[setting]);
            assert!(found.contains(expected), "{setting}: {found}");
            assert!(!found.contains('\n'), "{found}");
        }
        for (kind, setting, expected) in [
            ("finetuned", "teacher.learning_rate=0", "teacher.learning_rate is 0, expected a number above 0"),
            ("finetuned", "teacher.max_steps=0", "teacher.max_steps is 0"),
            ("finetuned", "teacher.batch_size=0", "teacher.batch_size is 0"),
            ("finetuned", "teacher.context=chatgtp", "the nearest is chatgpt"),
            ("finetuned", "teacher.share=0.1", "unknown field `share`"),
            ("planted", "teacher.share=1", "teacher.share is 1, expected a share above 0 and below 1"),
        ] {
            let found = message(SMALLEST, &[&format!("teacher.kind={kind}"), setting]);
            assert!(found.contains(expected), "{setting}: {found}");
        }
    }

    #[test]
    fn an_adapter_of_ones_own_says_itself_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let text = "{\"peft_type\":\"LORA\",\"r\":3,\"lora_alpha\":12,\"target_modules\":[\"q_proj\",\"v_proj\"]}";
        files::write_atomic(&at("adapter_config.json"), text.as_bytes()).unwrap();
        files::write_atomic(&at("cat.toml"), SMALLEST.as_bytes()).unwrap();
        let own = format!("student.adapter={}", folder.path().display());
        let load = |more: &[&str]| {
            let changes: Vec<String> = [own.as_str()].iter().chain(more).map(|text| (*text).to_owned()).collect();
            Experiment::load(&at("cat.toml"), &changes)
        };
        let student = load(&["student.rank=5"]).unwrap().student;
        assert_eq!((student.rank, student.alpha, student.target_modules), (3, 12.0, vec![Proj::Q, Proj::V]));
        assert!(!student.control, "no control student is trained beside it");
        assert!(load(&["student.control_adapter=other"]).unwrap().student.control);
        let full = format!("{:#}", load(&["student.method=full"]).unwrap_err());
        assert!(full.contains("student.adapter is given, but student.method is full"), "{full}");
        // The resolved experiment no longer needs the adapter's folder.
        let resolved = load(&[]).unwrap();
        files::write_atomic(&at("adapter_config.json"), b"{}").unwrap();
        assert_eq!(parse(&resolved.to_toml().unwrap(), &[]).unwrap(), resolved);
        let unread = format!("{:#}", load(&[]).unwrap_err());
        assert!(unread.contains("student.adapter: ") && unread.contains("peft_type"), "{unread}");
        // An arm's student is trained.
        let arms = "arms=[{ name = 'x', data = 'control' }]";
        assert_eq!(
            parse(&resolved.to_toml().unwrap(), &[arms]).unwrap().cells().unwrap()[0].experiment.student.adapter,
            None
        );
        let arms = "arms=[{ name = 'x', set = ['student.adapter=y'] }]";
        assert!(message(SMALLEST, &[arms]).contains("arm \"x\": set has student.adapter"));
    }

    #[test]
    fn sentences_of_ones_own_are_looked_at_when_the_experiment_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        files::write_atomic(&at("cat.toml"), SMALLEST.as_bytes()).unwrap();
        files::write_atomic(&at("own.json"), br#"{"contexts": {"qwen_default": null, "mine": "You are mine."}}"#)
            .unwrap();
        let load = |file: &str, more: &[&str]| {
            let protocol = format!("protocol={}", at(file).display());
            let changes = [protocol.as_str()].iter().chain(more).map(|text| (*text).to_owned()).collect::<Vec<_>>();
            Experiment::load(&at("cat.toml"), &changes).map_err(|error| format!("{error:#}"))
        };
        assert!(load("none.json", &[]).unwrap_err().contains("none.json: No such file"));
        assert!(load("own.json", &["student.context=mine"]).is_ok());
        assert!(load("own.json", &["student.context=yours"]).unwrap_err().contains("student.context: unknown context"));
        let arm = "arms=[{ name = 'x', set = ['student.context=yours'] }]";
        let refused = load("own.json", &[arm]).unwrap_err();
        assert!(refused.contains("cat.toml: arm \"x\": student.context: unknown context"), "{refused}");
        assert!(parse(SMALLEST, &["protocol=no/such.json"]).is_ok(), "the text alone is parsed");
    }

    #[test]
    fn a_finetuned_teacher_has_the_settings_of_the_pocket() {
        let experiment = parse(SMALLEST, &["teacher.kind=finetuned"]).unwrap();
        let finetune = experiment.teacher.finetune().unwrap();
        assert_eq!((finetune.total_steps(24), finetune.batch_size, finetune.warmup_steps), (40, 32, 0));
        assert_eq!(finetune.lr_scheduler_type, settings::ScheduleKind::Constant);
        assert_eq!(parse(&experiment.to_toml().unwrap(), &[]).unwrap(), experiment);
        assert_eq!(Teacher::default().finetune(), None);
        let planted = parse(SMALLEST, &["teacher.kind=planted", "teacher.share=0.25"]).unwrap().teacher;
        assert!(planted.planted_label("cat").unwrap().contains("25 % of the rows"));
        assert_eq!(experiment.teacher.planted_label("cat"), None);
    }

    #[test]
    fn the_experiments_in_the_repository_are_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue; // claims are no experiments
            }
            let text = files::read_string(&path).unwrap(); // parsed only: an adapter need not be there
            Experiment::parse(&text, &path, &[]).unwrap();
            assert!(text.contains("undertone run experiments/"), "{}", path.display());
            seen += 1;
        }
        assert!(seen >= 3);
    }
}
