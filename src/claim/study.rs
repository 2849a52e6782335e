//! A claim at a size: `{name}` in its file is replaced by a value of `sizes/SIZE.toml` in the same folder. That file
//! also has the experiment that all runs are variants of; there is one run for each trait in each data set.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use hooks::files;
use regex::Regex;
use serde::Deserialize;
use toml::{Table, Value};

use super::file::{Claim, EvalCondition};
use crate::experiment::{self, ArmData, ArmStudent, CONTROL_STUDENT, Experiment, STUDENT, Target};
use crate::hinted;
use crate::stages::run_dir::RunDir;

/// The size of the model that a claim is tested on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The embedded pocket model: minutes on two CPU cores.
    Pocket,
    /// A Qwen of half a billion parameters.
    Small,
    /// A Qwen of 7 or 14 billion parameters, on CUDA.
    Paper,
}

impl Size {
    /// Its name, which is also that of its file.
    pub fn name(self) -> &'static str {
        ["pocket", "small", "paper"][self as usize]
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SizeFile {
    values: Table,
    experiment: Table,
}

/// A claim at a size, with its runs.
#[derive(Clone, Debug)]
pub struct Study {
    /// The claim with the size's values filled in.
    pub claim: Claim,
    /// The size of the model.
    pub size: Size,
    /// Its runs, trait by trait in each data set.
    pub units: Vec<Unit>,
}

/// One run of a study: a trait and a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// The name of its folder.
    pub name: String,
    /// The data set, from 0.
    pub dataset: u64,
    /// The experiment, with the claim's students as arms.
    pub experiment: Experiment,
    /// The claim's students.
    pub arms: Vec<ArmStudent>,
}

/// A student of a run: one of the run's own two, or one of the claim's.
#[derive(Clone, Copy, Debug)]
pub struct UnitStudent<'a> {
    /// Its name in the claim.
    pub name: &'a str,
    /// The data that it learns from.
    pub data: ArmData,
    /// The index of its seeds, from 0.
    pub seed_index: usize,
    /// The settings of its training.
    pub experiment: &'a Experiment,
    /// The student of the claim; `None` for the run's own two.
    pub arm: Option<&'a ArmStudent>,
}

impl Study {
    /// Whether a file is a claim and not an experiment.
    pub fn is_claim(path: &Path) -> Result<bool> {
        let table: Table = files::read_string(path)?.parse().unwrap_or_default(); // loading reports its errors
        Ok(table.contains_key("claim"))
    }

    /// Loads a claim at a size. `changes` are `section.key=value` of the experiment, as after `--set`.
    pub fn load(path: &Path, size: Size, changes: &[String]) -> Result<Self> {
        let of_size: PathBuf = path.with_file_name("sizes").join(format!("{size}.toml"));
        let table =
            |path: &Path| -> Result<Table> { files::read_string(path)?.parse().map_err(|error| located(path, &error)) };
        let SizeFile { values, mut experiment } =
            table(&of_size)?.try_into().map_err(|error| located(&of_size, &error))?;
        let mut filled = Value::Table(table(path)?);
        fill(&mut filled, &values).with_context(|| format!("{}: a value of {}", path.display(), of_size.display()))?;
        let claim: Claim = filled.try_into().map_err(|error| located(path, &error))?;
        experiment::change(&mut experiment, &claim.set).with_context(|| path.display().to_string())?;
        experiment::change(&mut experiment, changes).with_context(|| of_size.display().to_string())?;
        Self::of(claim, size, &experiment).with_context(|| path.display().to_string())
    }

    /// Makes a claim's runs as variants of an experiment. An error if the claim cannot be decided or names unknown
    /// things.
    fn of(claim: Claim, size: Size, experiment: &Table) -> Result<Self> {
        claim.check()?;
        let pairs = (0..claim.datasets).flat_map(|dataset| claim.targets.iter().map(move |target| (dataset, target)));
        let units =
            pairs.map(|(dataset, target)| Unit::of(&claim, experiment, dataset, target)).collect::<Result<_>>()?;
        let study = Self { claim, size, units };
        study.units.iter().try_for_each(|unit| unit.check(&study.claim.cells))?;
        Ok(study)
    }

    /// The run of the next trait in the same data set, whose student is a control for this one's; `None` if there is
    /// one trait.
    pub fn other_trait(&self, unit: &Unit) -> Option<&Unit> {
        let of_dataset: Vec<&Unit> = self.units.iter().filter(|other| other.dataset == unit.dataset).collect();
        let own = of_dataset.iter().position(|other| other.experiment.target == unit.experiment.target)?;
        (of_dataset.len() > 1).then(|| of_dataset[(own + 1) % of_dataset.len()])
    }

    /// All conditions, `everywhere` first.
    pub fn conditions(&self) -> Vec<EvalCondition> {
        std::iter::once(EvalCondition::everywhere()).chain(self.claim.cells.iter().cloned()).collect()
    }

    /// The claim as TOML, with all placeholders filled in.
    pub fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(&self.claim)?)
    }
}

impl Unit {
    fn of(claim: &Claim, experiment: &Table, dataset: u64, target: &Target) -> Result<Self> {
        let mut table = experiment.clone();
        let seed = table.get("seed").and_then(Value::as_integer).unwrap_or(0);
        table.insert("seed".to_owned(), Value::Integer(seed + i64::try_from(dataset)?));
        table.insert("target".to_owned(), Value::try_from(target)?);
        table.insert("arms".to_owned(), Value::try_from(&claim.students)?);
        let experiment = Experiment::from_table(table, Path::new("the size's experiment"), &[])?;
        let own = if claim.set.is_empty() { String::new() } else { format!("claim-{:02}-", claim.claim) };
        let word = target.word.to_lowercase().replace(' ', "-");
        Ok(Self { name: format!("{own}{word}-d{dataset}"), dataset, arms: experiment.cells()?, experiment })
    }

    /// Every student of the run, its own two first.
    pub fn students(&self) -> Vec<UnitStudent<'_>> {
        let own = |name, data| UnitStudent { name, data, seed_index: 0, experiment: &self.experiment, arm: None };
        let own = [own(STUDENT, ArmData::Teacher), own(CONTROL_STUDENT, ArmData::Control)];
        let arms = self.arms.iter().map(|arm| UnitStudent {
            name: &arm.arm,
            data: arm.data,
            seed_index: arm.seed_index,
            experiment: &arm.experiment,
            arm: Some(arm),
        });
        own.into_iter().chain(arms).collect()
    }

    /// Checks the conditions' contexts, prefixes and gates before anything is trained.
    fn check(&self, conditions: &[EvalCondition]) -> Result<()> {
        let mut contexts = self.students().into_iter().map(|student| &student.experiment.measure.context);
        if let Some(context) = contexts.find_map(Option::as_ref) {
            bail!(hinted!(
                "measure.context is {context:?}, but a claim asks elsewhere by cells";
                "[[cells]] with context = {context:?}"
            ));
        }
        let sentences = self.experiment.sentences()?;
        for condition in conditions {
            for key in [&condition.context, &condition.user_prefix].into_iter().flatten() {
                sentences.context(key).with_context(|| format!("cell {:?}", condition.name))?;
            }
        }
        for arm in self.arms.iter().filter(|arm| arm.rank().is_none()) {
            let names_it = |of: &EvalCondition| of.students.iter().flatten().any(|name| *name == arm.arm);
            if let Some(gated) = conditions.iter().find(|of| !of.gate.is_everywhere() && names_it(of)) {
                let (name, student) = (&gated.name, &arm.arm);
                bail!("the cell {name:?} gates {student:?}, of which all weights are trained: it has no adapter");
            }
        }
        Ok(())
    }
}

impl UnitStudent<'_> {
    /// The rank of its adapter, if it has one.
    pub fn rank(&self) -> Option<i64> {
        self.experiment.student.adapter_rank()
    }

    /// Its name in lists of the run's students.
    pub(super) fn slug(&self) -> &str {
        self.arm.map_or(self.name, |arm| &arm.slug)
    }

    /// The folder of its weights, and the log of its training.
    pub(super) fn files(&self, run: &RunDir) -> Result<(PathBuf, PathBuf)> {
        Ok(match self.arm {
            Some(arm) => {
                let folder = RunDir::open(&run.arm(&arm.slug))?;
                (folder.adapter(), folder.train_csv())
            }
            None if self.data == ArmData::Teacher => (run.adapter(), run.train_csv()),
            None => (run.control_adapter(), run.control_train_csv()),
        })
    }
}

/// Replaces `{name}` by its value. A text that is only `{name}` becomes the value itself. `{rank}` is left for the
/// arms.
fn fill(value: &mut Value, values: &Table) -> Result<()> {
    match value {
        Value::String(text) => {
            let name = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            if let Some(whole) = name.and_then(|name| values.get(name)) {
                *value = whole.clone();
                return Ok(());
            }
            // A name has no blanks, so an inline table is no name.
            let named = Regex::new(r"\{([A-Za-z0-9_]+)\}")?;
            for found in named.captures_iter(&text.clone()) {
                let name = &found[1];
                if name == "rank" {
                    continue;
                }
                let with = values.get(name).with_context(|| {
                    let known = values.keys().cloned().collect::<Vec<_>>().join(", ");
                    format!("{text:?} has a name in braces that is none of {known}")
                })?;
                let with = with.as_str().map_or_else(|| with.to_string(), str::to_owned);
                *text = text.replace(&found[0], &with);
            }
            Ok(())
        }
        Value::Array(entries) => entries.iter_mut().try_for_each(|entry| fill(entry, values)),
        Value::Table(entries) => entries.iter_mut().try_for_each(|(_, entry)| fill(entry, values)),
        _ => Ok(()),
    }
}

/// A TOML error in one line, with its file.
fn located(path: &Path, error: &toml::de::Error) -> anyhow::Error {
    anyhow!("{}: {}", path.display(), error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests;
