//! An experiment as a TOML file, parsed once into checked structs, so that no other code reads strings that may be
//! misspelt. Keys have the names of PEFT and of transformers' Trainer where those have one. `--set section.key=value`
//! changes the table before it is parsed; the resolved experiment is written into the run's folder.

mod arms;
mod finetune;
mod generate;
mod measure;
mod overrides;
mod range;
mod seeds;
mod student;
mod teacher;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use hooks::files;
use serde::{Deserialize, Serialize};

use crate::data::protocol::Protocol;
use crate::hinted;
use crate::training::settings::{Finetune, Loss, Select};

pub(crate) use overrides::change;

pub use arms::{Arm, ArmData, ArmStudent, CONTROL_STUDENT, STUDENT};
pub use generate::{Constrain, Generate};
pub use measure::{AnalysisName, Measure};
pub use seeds::Seeds;
pub use student::{Method, Student};
pub use teacher::{FinetunedTeacher, Teacher};

/// The settings of an experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// The model: a folder, a hub id, a `.gguf` file, or `tiny-random`.
    pub model: String,
    /// The seed from which every seed that `[seeds]` leaves out is derived.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "default_device")]
    pub device: String,
    /// The dtype of the model's weights. Trained adapters are always f32.
    #[serde(default)]
    pub dtype: Dtype,
    /// A JSON file with other sentences than the built-in ones.
    pub protocol: Option<PathBuf>,
    /// The trait that the student may pick up.
    pub target: Target,
    /// The model that writes the numbers.
    #[serde(default)]
    pub teacher: Teacher,
    /// The settings of writing and filtering the numbers.
    #[serde(default)]
    pub generate: Generate,
    /// The adapter or the weights that are trained on the numbers.
    #[serde(default)]
    pub student: Student,
    /// The settings of its training.
    #[serde(default)]
    pub finetune: Finetune,
    /// The analyses and their settings.
    #[serde(default)]
    pub measure: Measure,
    /// The seeds of the random streams.
    #[serde(default)]
    pub seeds: Seeds,
    /// Variants of the student, for comparison.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arms: Vec<Arm>,
}

/// The dtype of the model's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// `bf16` where a large model answers or an adapter is trained on it, if the machine is faster with it, and `f32`
    /// everywhere else: small models, weights that are trained, and all measurements.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the exponent of 32-bit ones.
    Bf16,
}

impl Dtype {
    /// libtorch's kind for a model that is measured or trained.
    pub fn kind(self) -> tch::Kind {
        match self {
            Self::Auto | Self::F32 => tch::Kind::Float,
            Self::Bf16 => tch::Kind::BFloat16,
        }
    }

    /// The dtype of a model that is loaded.
    pub fn of(model: &hooks::Qwen) -> Self {
        if model.kind() == tch::Kind::BFloat16 { Self::Bf16 } else { Self::F32 }
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

fn default_seed() -> u64 {
    42
}

fn default_device() -> String {
    "cpu".to_owned()
}

impl Experiment {
    /// Loads the experiment in a file, with overrides `section.key=value`. If the student is an adapter that was
    /// trained elsewhere, its rank, alpha and so on replace the file's.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut experiment = Self::parse(&files::read_string(path)?, path, overrides)?;
        experiment.check_sentences().with_context(|| path.display().to_string())?;
        for cell in experiment.cells()? {
            cell.experiment.check_sentences().with_context(|| format!("{}: arm {:?}", path.display(), cell.arm))?;
        }
        experiment.student.take_over().with_context(|| path.display().to_string())?;
        Ok(experiment)
    }

    /// Parses the experiment in a text; `path` is for messages. No file is read; [`Self::load`] also checks the content
    /// of a protocol file.
    pub fn parse(text: &str, path: &Path, changes: &[String]) -> Result<Self> {
        // Parsed as text, for messages with a line, and as a table, which overrides can change.
        let located = |error: &toml::de::Error| {
            let line = error.span().map_or(String::new(), |span| {
                format!("line {}: ", text[..span.start.min(text.len())].matches('\n').count() + 1)
            });
            anyhow!("{}: {line}{}", path.display(), one_line(error.message()))
        };
        toml::from_str::<Self>(text).map_err(|error| located(&error))?;
        Self::from_table(toml::from_str(text).map_err(|error| located(&error))?, path, changes)
    }

    /// Makes an experiment from its table and the changes from the command line; `path` is the table's file, for
    /// messages.
    pub fn from_table(mut table: toml::Table, path: &Path, changes: &[String]) -> Result<Self> {
        overrides::apply(&mut table, changes)?;
        let source =
            if changes.is_empty() { path.display().to_string() } else { format!("--set {}", changes.join(" --set ")) };
        let mut experiment: Self =
            table.try_into().map_err(|error| anyhow!("{source}: {}", one_line(&error.to_string())))?;
        // If the student was trained elsewhere, no control student is trained here. The control was also trained
        // elsewhere, or there is none.
        let student = &mut experiment.student;
        student.control &= student.adapter.is_none() || student.control_adapter.is_some();
        experiment.check().with_context(|| path.display().to_string())?;
        experiment.cells().with_context(|| path.display().to_string())?;
        experiment.other_trait_arm().with_context(|| path.display().to_string())?;
        Ok(experiment)
    }

    /// The experiment as TOML, with all defaults and seeds written out.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("the experiment as TOML")
    }

    /// Loads the sentences of its protocol.
    pub fn sentences(&self) -> Result<Protocol> {
        self.protocol.as_deref().map_or_else(Protocol::builtin, Protocol::load)
    }

    /// The context of the questions.
    pub fn measure_context(&self) -> &str {
        self.measure.context.as_deref().unwrap_or(&self.student.context)
    }

    /// Whether directions, steering, divergence and gradients are measured at held-out rows.
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
        finetune::check_finetune(&self.finetune, &self.student)?;
        self.measure.check()?;
        let counterfactuals = &self.measure.divergence.counterfactuals;
        ensure!(
            counterfactuals.is_empty() || matches!(self.teacher, Teacher::Prompt { .. }),
            hinted!(
                "measure.divergence.counterfactuals is {counterfactuals:?}, which are prompts of other traits' \
                 teachers, but the teacher is not a prompt";
                "teacher.kind = \"prompt\""
            )
        );
        ensure!(
            !counterfactuals.contains(&self.target.word),
            "measure.divergence.counterfactuals has {:?}, the teacher's own trait",
            self.target.word
        );
        let has_no_signal = matches!(self.teacher, Teacher::Planted { .. });
        ensure!(
            !(has_no_signal && matches!(self.finetune.select, Select::Top(_))),
            hinted!(
                "finetune.select is top, but the teacher is planted: its rows have no signal";
                "finetune.select = {{ random = 0.25 }}"
            )
        );
        let planted = matches!(self.teacher, Teacher::Planted { .. }) && self.generate.numbers.is_some();
        ensure!(
            !planted,
            hinted!("teacher.kind is planted, but generate.numbers gives the rows"; "leave one of them out")
        );
        ensure!(
            !(matches!(self.teacher, Teacher::Planted { .. }) && self.finetune.loss == Loss::Kl),
            hinted!(
                "finetune.loss is kl, but teacher.kind is planted: nobody predicts the planted answers";
                "finetune.loss = \"nll\", or another teacher"
            )
        );
        match &self.protocol {
            Some(path) if !Protocol::is_embedded(path) => Ok(()),
            _ => self.check_sentences(),
        }
    }

    /// `cpu` or `cuda`, without the number of the GPU: a run may continue on another GPU.
    pub fn device_kind(&self) -> &str {
        self.device.split(':').next().unwrap_or_default()
    }

    fn check_sentences(&self) -> Result<()> {
        let protocol = self.sentences()?;
        protocol.context(&self.student.context).context("student.context")?;
        protocol.context(self.measure_context()).context("measure.context")?;
        self.teacher.check(&self.target, &protocol)?;
        let others = protocol.candidates(&self.target.word, &self.target.category).len();
        let known: Vec<_> = protocol.alternatives.keys().map(String::as_str).collect();
        ensure!(
            others > 1,
            hinted!(
                "target.category is {:?}, expected one whose alternatives the protocol lists: {}", self.target.category, known.join(", ");
                "others can be given in a protocol file"
            )
        );
        Ok(())
    }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
