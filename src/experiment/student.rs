//! The table `[student]`: the adapter or the weights that are trained.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use hooks::{LoraConfig, Proj};
use serde::{Deserialize, Serialize};

use super::range::positive;
use crate::hinted;

pub(super) fn default_context() -> String {
    "qwen_default".to_owned()
}

/// The adapter or the weights that are trained, and their context.
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Student {
    /// The context of the training rows: a key of the protocol or a system prompt.
    pub context: String,
    /// Whether the training rows and the questions use the model's chat template. Otherwise each turn is a line of
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
    /// Whether the adapter is rotated before training: A becomes R A, with a random orthogonal R for each pair. This
    /// does not affect gradient descent, but it affects an optimizer that scales each coordinate.
    pub rotated: bool,
    /// The linear maps that have a pair.
    pub target_modules: Vec<Proj>,
    /// The blocks that have pairs; all if left out.
    pub layers: Option<Vec<usize>>,
    /// Whether a second student is trained on the control set, for comparison. If the student was trained elsewhere:
    /// whether there is a control student.
    pub control: bool,
    /// A LoRA trained elsewhere: a folder as PEFT saves it, or its hub id. The student is then this LoRA and is not
    /// trained.
    pub adapter: Option<PathBuf>,
    /// The control student's LoRA, if it was trained elsewhere too.
    pub control_adapter: Option<PathBuf>,
}

impl Default for Student {
    fn default() -> Self {
        let LoraConfig { rank, alpha, use_rslora, dropout, target_modules, layers } = LoraConfig::default();
        Self {
            context: default_context(),
            template: true,
            method: Method::Lora,
            rank,
            alpha,
            use_rslora,
            dropout,
            rotated: false,
            target_modules,
            layers,
            control: true,
            adapter: None,
            control_adapter: None,
        }
    }
}

impl Student {
    /// The rank of its adapter, if it has one.
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

impl Student {
    /// Replaces the file's settings by those of an adapter that was trained elsewhere.
    pub(super) fn take_over(&mut self) -> Result<()> {
        let Some(folder) = &self.adapter else { return Ok(()) };
        let LoraConfig { rank, alpha, use_rslora, dropout, target_modules, layers } =
            LoraConfig::read(folder).context("student.adapter")?;
        *self = Self { rank, alpha, use_rslora, dropout, target_modules, layers, ..self.clone() };
        Ok(())
    }

    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            self.adapter.is_none() || self.method == Method::Lora,
            hinted!(
                "student.adapter is given, but student.method is full, which has no adapter";
                "leave one of them out"
            )
        );
        ensure!(
            self.adapter.is_some() || self.control_adapter.is_none(),
            hinted!(
                "student.control_adapter is given, but student.adapter is not";
                "give both, or leave the control to be trained here"
            )
        );
        ensure!(self.rank >= 1, "student.rank is {}, expected at least 1", self.rank);
        positive("student.alpha", self.alpha)?;
        let dropout = self.dropout;
        ensure!((0.0..1.0).contains(&dropout), "student.dropout is {dropout}, expected at least 0 and less than 1");
        let known = Proj::ALL.map(Proj::name).join(", ");
        ensure!(!self.target_modules.is_empty(), "student.target_modules is empty, expected at least one of {known}");
        let mut seen = std::collections::BTreeSet::new();
        let twice = self.target_modules.iter().find(|module| !seen.insert(**module));
        ensure!(twice.is_none(), "student.target_modules has {} twice", twice.map_or("", |module| module.name()));
        let Some(layers) = &self.layers else { return Ok(()) };
        ensure!(!layers.is_empty(), "student.layers is empty, expected block numbers, or no such key for all blocks");
        let rising = layers.windows(2).all(|pair| pair[0] < pair[1]);
        ensure!(rising, "student.layers is {layers:?}, expected rising block numbers");
        Ok(())
    }
}
