//! Options of several commands. A command has only the options that affect it.

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

/// The model, its precision and the device.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A folder in Hugging Face form, a hub id, a .gguf file, pocket, or tiny-random.
    #[arg(long)]
    pub model: String,
    /// The dtype of the weights.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// The device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// The adapter, gate and interventions that the model is run with.
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
    /// The adapter, if one is named. A gate without an adapter is refused, since it would have no effect.
    pub fn open_adapter(&self, model: &Qwen) -> Result<Option<Adapter>> {
        ensure!(
            self.adapter.is_some() || self.gate.is_everywhere(),
            hinted!("the gate is {}, but there is no adapter to gate", self.gate; "name one with --adapter")
        );
        self.adapter.as_deref().map(|folder| open_adapter(folder, model)).transpose()
    }

    /// Loads the interventions with their tensors.
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
    /// Overwrites finished files.
    #[arg(long)]
    pub force: bool,
}

/// Changes to an experiment.
#[derive(Args, Debug)]
pub struct Overrides {
    /// Sets a key of the experiment, such as student.rank=16; can be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The device, instead of the experiment's: cpu, cuda or cuda:N.
    #[arg(long)]
    device: Option<String>,
    /// The seed that all random streams derive from, instead of the experiment's.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints the resolved experiment and does nothing else.
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
    /// The run's folder; if left out, runs/NAME, after the experiment's file.
    #[arg(long)]
    pub run: Option<PathBuf>,
    /// Changes to it.
    #[command(flatten)]
    pub overrides: Overrides,
}

impl ExperimentArgs {
    /// The run's folder, which need not exist.
    pub fn folder(&self) -> Result<PathBuf> {
        let stem = self.experiment.file_stem().context("the experiment has no file name")?;
        Ok(self.run.clone().unwrap_or_else(|| Path::new("runs").join(stem)))
    }

    /// Opens the experiment's run and its model, and runs a stage; with `--dry-run`, only prints the experiment.
    pub fn stage(&self, when_done: WhenDone, stage: impl FnOnce(&Workbench, &RunDir) -> Result<()>) -> Result<()> {
        let experiment = Experiment::load(&self.experiment, &self.overrides.changes())?;
        if self.overrides.dry_run {
            return print(&experiment.to_toml()?);
        }
        let folder = self.folder()?;
        let _lock = RunDir::lock(&folder)?;
        let begun = folder.join("run.toml").exists();
        // Fails if the folder is not writable, before the model is loaded, which can take long.
        let folder = RunDir::create(&folder, &experiment, when_done.or_redo(self.overrides.force.force))?;
        let bench = Workbench::open(experiment).and_then(finetune::proven).and_then(|bench| foreseen(bench, &folder));
        let bench = bench.inspect_err(|_| {
            if !begun {
                take_back(&folder);
            }
        })?;
        folder.note("model", &[bench.files.report.as_slice(), &bench.files.remarks].concat())?;
        folder.note("kernels", &[hooks::mkl::described().to_owned()])?;
        folder.note("dtype", &[bench.dtypes()?])?;
        stage(&bench, &folder)
    }
}

/// Removes a run that could not begin, so that the corrected experiment can use the folder.
fn take_back(folder: &RunDir) {
    for file in [folder.config(), folder.root().join("meta.json")] {
        // The model's error is reported instead.
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
            Self::Auto => "auto",
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
