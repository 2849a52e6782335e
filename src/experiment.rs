//! An experiment as a TOML file: parsed once into checked structs, so that below there are no strings to misspell.
//! Names are PEFT's and transformers' Trainer's where they have one. `--set section.key=value` changes the table before
//! it is parsed; the resolved experiment is written into the run's folder.

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
use crate::training::settings::Finetune;

pub(crate) use overrides::change;

pub use arms::{Arm, ArmData, ArmStudent, CONTROL_STUDENT, STUDENT};
pub use generate::{Constrain, Generate};
pub use measure::{AnalysisName, Measure};
pub use seeds::Seeds;
pub use student::{Method, Student};
pub use teacher::Teacher;

/// All that an experiment is run with.
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

fn default_seed() -> u64 {
    42
}

fn default_device() -> String {
    "cpu".to_owned()
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
        let planted = matches!(self.teacher, Teacher::Planted { .. }) && self.generate.numbers.is_some();
        ensure!(
            !planted,
            hinted!("teacher.kind is planted, but generate.numbers gives the rows"; "leave one of them out")
        );
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
