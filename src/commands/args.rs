//! Options that several commands have. A command has those that it obeys.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use hooks::{Adapter, Edit, EditText, Gate, ModelFiles, Provenance, Qwen};

use crate::claim::Size;
use crate::experiment::{Dtype, Experiment};
use crate::hinted;
use crate::output::progress::print;
use crate::stages::finetune;
use crate::stages::foresight::foreseen;
use crate::stages::run_dir::{RunDir, WhenDone};
use crate::stages::workbench::{Workbench, open_adapter};

/// Which model, in which precision, on which device.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A folder in Hugging Face form, a hub id, a .gguf file, pocket, or tiny-random.
    #[arg(long)]
    pub model: String,
    /// The kind of the weights.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// What the model is run with: an adapter, where it acts, interventions.
#[derive(Args, Debug)]
pub struct ConditionArgs {
    /// A LoRA as PEFT saves it: a folder, or a hub id, `Org/Name[@REVISION][:FOLDER]`.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Where the adapter acts: everywhere, nowhere, only:TOKENS, except:TOKENS, and after it any of *layers(0..12),
    /// *modules(q,k,v) and *0.5; TOKENS are classes, "text", ids(..) and positions(..), joined by +.
    #[arg(long, default_value = "everywhere")]
    pub gate: Gate,
    /// An intervention, `POINT[@TOKENS]: CHANGE`, such as `blocks.1.hook_mlp_out@entity: zero`; CHANGE is one of
    /// add(FILE, 4), replace(FILE), mean(FILE), zero, scale(0.5), `project_out(FILE)`, patch(FILE). Several act in
    /// their order.
    #[arg(long = "edit", value_name = "EDIT")]
    pub edits: Vec<EditText>,
}

impl ConditionArgs {
    /// The adapter, if one is named. A gate without one is refused: nothing would pass through it.
    pub fn open_adapter(&self, model: &Qwen) -> Result<Option<Adapter>> {
        ensure!(
            self.adapter.is_some() || self.gate.is_everywhere(),
            hinted!("the gate is {}, but there is no adapter to gate", self.gate; "name one with --adapter")
        );
        self.adapter.as_deref().map(|folder| open_adapter(folder, model)).transpose()
    }

    /// The interventions with their tensors.
    pub fn load_edits(&self, files: &ModelFiles) -> Result<Vec<Edit>> {
        let load = |edit: &EditText| {
            edit.load(&files.config, &Provenance::of(files)).with_context(|| format!("--edit {edit}"))
        };
        Ok(self.edits.iter().map(load).collect::<Result<Vec<_>>>()?.concat())
    }
}

/// Whether finished files are overwritten.
#[derive(Args, Debug)]
pub struct ForceArg {
    /// Overwrites what is finished.
    #[arg(long)]
    pub force: bool,
}

/// Changes to an experiment.
#[derive(Args, Debug)]
pub struct Overrides {
    /// Sets a key of the experiment, such as student.rank=16; can be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where to compute, instead of the experiment's device: cpu, cuda or cuda:N.
    #[arg(long)]
    device: Option<String>,
    /// The seed that all random streams derive from, instead of the experiment's.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints the resolved experiment and does nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Whether finished stages are done again.
    #[command(flatten)]
    pub force: ForceArg,
}

impl Overrides {
    /// All changes as `KEY=VALUE`.
    pub fn changes(&self) -> Vec<String> {
        let device = self.device.as_ref().map(|device| format!("device={device}"));
        let seed = self.seed.map(|seed| format!("seed={seed}"));
        device.into_iter().chain(seed).chain(self.set.iter().cloned()).collect()
    }
}

/// An experiment and its run's folder.
#[derive(Args, Debug)]
pub struct ExperimentArgs {
    /// The experiment's TOML file.
    pub experiment: PathBuf,
    /// The run's folder; runs/NAME after the experiment's file when left out.
    #[arg(long)]
    pub run: Option<PathBuf>,
    /// Changes to it.
    #[command(flatten)]
    pub overrides: Overrides,
}

impl ExperimentArgs {
    /// Opens the experiment's run and its model, and does a stage of it; with `--dry-run` only prints the experiment.
    pub fn stage(&self, when_done: WhenDone, stage: impl FnOnce(&Workbench, &RunDir) -> Result<()>) -> Result<()> {
        let experiment = Experiment::load(&self.experiment, &self.overrides.changes())?;
        if self.overrides.dry_run {
            return print(&experiment.to_toml()?);
        }
        let stem = self.experiment.file_stem().context("the experiment has no file name")?;
        let folder = self.run.clone().unwrap_or_else(|| Path::new("runs").join(stem));
        let _lock = RunDir::lock(&folder)?;
        let begun = folder.join("run.toml").exists();
        // The folder is proven writable before the model is loaded, which can take long.
        let folder = RunDir::create(&folder, &experiment, when_done.or_redo(self.overrides.force.force))?;
        let bench = Workbench::open(experiment).and_then(finetune::proven).and_then(|bench| foreseen(bench, &folder));
        let bench = bench.inspect_err(|_| {
            if !begun {
                take_back(&folder);
            }
        })?;
        folder.note("model", &[bench.files.report.as_slice(), &bench.files.remarks].concat())?;
        stage(&bench, &folder)
    }
}

/// Removes a run that could not begin, so that the corrected experiment is not refused as another one.
fn take_back(folder: &RunDir) {
    for file in [folder.config(), folder.root().join("meta.json")] {
        // The error to report is the model's.
        let _ = std::fs::remove_file(file);
    }
    let _ = std::fs::remove_dir(folder.root());
}

impl ValueEnum for Dtype {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::F32, Self::Bf16]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }))
    }
}

impl ValueEnum for Size {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Pocket, Self::Small, Self::Paper]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::Pocket => "The embedded pocket model: minutes on two CPU cores",
            Self::Small => "A Qwen of half a billion parameters",
            Self::Paper => "A Qwen of 7 or 14 billion parameters, on CUDA",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}
