//! Checks the table `[finetune]` (`training::settings`) against the student.

use anyhow::{Context, Result, bail, ensure};

use super::student::{Method, Student};
use crate::hinted;
use crate::training::settings::{Finetune, OptimizerKind};

/// Refuses values that would have no effect or that full finetuning cannot use.
pub(super) fn check_finetune(finetune: &Finetune, student: &Student) -> Result<()> {
    finetune.check().context("finetune")?;
    let is_trained = student.method == Method::Lora && student.adapter.is_none();
    ensure!(
        !(is_trained && finetune.gate.is_nowhere()),
        hinted!(
            "finetune.gate is {}, at which nothing would be trained, expected tokens at which the adapter acts", finetune.gate;
            "leave it out for all"
        )
    );
    let of_adapters = [
        ("finetune.frozen_a is true", finetune.frozen_a, "has no A"),
        ("finetune.optimizer is muon", finetune.optimizer == OptimizerKind::Muon, "is not of matrices alone"),
        ("student.rotated is true", student.rotated, "has no coordinates of its own"),
    ];
    if let Some((what, _, why)) = of_adapters.iter().find(|(_, is_set, _)| *is_set && student.method == Method::Full) {
        bail!(hinted!("{what}, but student.method is full, which {why}"; "leave one of them out"));
    }
    let has_momentum = matches!(finetune.optimizer, OptimizerKind::Sgd | OptimizerKind::Muon);
    let unused = finetune.momentum != 0.0 && !has_momentum;
    let why = if finetune.optimizer == OptimizerKind::AdamW {
        "adamw, which has betas instead"
    } else {
        "neither sgd nor muon, which alone have it"
    };
    ensure!(!unused, "finetune.momentum is {}, but the optimizer is {why}", finetune.momentum);
    let warmup = finetune.warmup_steps;
    if let Some(steps) = finetune.max_steps.filter(|steps| warmup >= *steps) {
        bail!("finetune.warmup_steps is {warmup}, expected fewer than max_steps, {steps}");
    }
    Ok(())
}
