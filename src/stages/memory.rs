//! Estimates the memory and disk space that a training needs, and finds how much of both is free. A training that
//! cannot fit is refused before anything is made: the kernel kills a process that runs out of memory without a message.

use std::path::Path;

use anyhow::{Result, ensure};
use hooks::{LoraConfig, Qwen};
use sysinfo::System;
use tch::Device;

use crate::hinted;
use crate::output::progress::say;
use crate::training::optim::BUFFER;
use crate::training::settings::{Finetune, OptimizerKind};

/// Number of rows of logits that are held at a time (`hooks::cross_entropy_sum`).
const LOGITS: f64 = 256.0;
/// The share of the free memory above which a training is reported to be close to the limit.
const CLOSE: f64 = 0.8;

/// The bytes that a training needs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Need {
    /// Memory for the trained weights, their gradients, the optimizer's state and its step.
    pub state: f64,
    /// Memory for the activations and the logits of a micro-batch.
    pub activations: f64,
    /// Disk space for a checkpoint, for the one that replaces it, and for the result.
    pub disk: f64,
}

impl Need {
    /// The need of a training of a LoRA, or of all weights where there is none, with micro-batches of so many tokens, some
    /// of which are learned from. The base's own weights are not counted: they are loaded already.
    /// `is_mapped`: whether the weights of a training of all may be a file's pages in place, which take no memory of
    /// their own.
    pub fn of(
        (model, is_mapped): (&Qwen, bool),
        lora: Option<&LoraConfig>,
        config: &Finetune,
        [tokens, targets]: [f64; 2],
    ) -> Self {
        let of_model = &model.config;
        let [stored, computed] = [model.kind(), model.activation_kind()].map(|kind| kind.elt_size_in_bytes() as f64);
        let tensors = || model.parameters().into_iter().map(|(_, tensor)| tensor.numel() as f64);
        let (n, bytes, largest) = match lora {
            Some(lora) => (n_learned(lora, model), 4.0, 0.0),
            None => (tensors().sum(), stored, tensors().fold(0.0, f64::max)),
        };
        let master = if config.masters && bytes < 4.0 { 4.0 } else { 0.0 };
        let averages = match config.optimizer {
            OptimizerKind::SignSgd => 0.0,
            OptimizerKind::Sgd if config.momentum == 0.0 => 0.0,
            OptimizerKind::Sgd | OptimizerKind::RmsProp | OptimizerKind::Muon => 1.0,
            OptimizerKind::AdamW => 2.0,
            OptimizerKind::Preconditioned => 3.0, // its own, and two of the training that finds the scales
        };
        let kept = bytes + master + averages * bytes.max(master);
        // The gradients are kept in f32, and with several micro-batches also their sum.
        let gradients = if config.gradient_accumulation_steps > 1 { 8.0 } else { 4.0 };
        // All weights are loaded anew, then move into the optimizer's buffers; the freed memory is kept.
        let loaded = if lora.is_none() && !is_mapped { bytes } else { 0.0 };
        // A step has four tensors of the size of a buffer: the old values, the divisor, the scaled average, and a product.
        let step = 16.0 * largest.max(BUFFER as f64).min(n);
        let [d, mlp, vocab] = [of_model.d_model, of_model.d_mlp, of_model.d_vocab].map(|n| n as f64);
        let [q, kv] = [of_model.n_heads, of_model.n_kv_heads].map(|n| (n * of_model.d_head) as f64);
        let per_block = match lora {
            // The manual backward pass keeps few tensors (`KeptBlock`), and the inputs of products as these take them.
            Some(lora) if lora.dropout == 0.0 => {
                computed * (2.0 * d + 2.0 * (q + kv) + 7.0 * lora.rank as f64) + stored * (2.0 * d + 3.0 * mlp)
            }
            // The recorded pass keeps the operands of each operation.
            _ => computed * (6.0 * d + 4.0 * (q + kv) + 4.0 * mlp),
        };
        Self {
            state: n * (kept + gradients + loaded) + step,
            activations: tokens * of_model.n_layers as f64 * per_block + 8.0 * vocab * targets.min(LOGITS),
            disk: n * (2.0 * kept + bytes),
        }
    }

    /// All memory.
    pub fn memory(&self) -> f64 {
        self.state + self.activations
    }
}

fn n_learned(lora: &LoraConfig, model: &Qwen) -> f64 {
    let n_layers = lora.layers.as_ref().map_or(model.config.n_layers, Vec::len);
    let widths = lora.target_modules.iter().map(|proj| proj.widths(&model.config));
    n_layers as f64 * lora.rank as f64 * widths.map(|(d_in, d_out)| (d_in + d_out) as f64).sum::<f64>()
}

/// The free memory and disk space of the machine, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Free {
    /// Free memory of the machine, or of the container if that has less; infinite if unknown.
    pub memory: f64,
    /// Free disk space at the run's folder; infinite if unknown.
    pub disk: f64,
}

impl Free {
    /// Asks the system. A GPU's memory is unknown, since libtorch's binding has no query for it.
    pub fn here(folder: &Path, device: Device) -> Self {
        let disk = fs4::available_space(folder).map_or(f64::INFINITY, |bytes| bytes as f64);
        if device != Device::Cpu {
            return Self { memory: f64::INFINITY, disk };
        }
        let mut system = System::new();
        system.refresh_memory();
        let of_machine = Some(system.available_memory()).filter(|bytes| *bytes > 0);
        let of_container = system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
        let memory = of_machine.into_iter().chain(of_container).map(|bytes| bytes as f64).fold(f64::INFINITY, f64::min);
        Self { memory, disk }
    }

    /// Refuses a training that cannot fit, and warns if it will hardly fit. `least` is what it takes for certain,
    /// `most` with the longest answers; `keys` are the settings that would make it fit.
    pub fn check(&self, what: &str, least: &Need, most: &Need, keys: &str) -> Result<()> {
        ensure!(
            least.memory() <= self.memory,
            hinted!("{what} takes at least {} of memory, where {} are free", size(least.memory()), size(self.memory); "{keys}")
        );
        ensure!(
            least.disk <= self.disk,
            hinted!(
                "{what} takes {} of disk space for its checkpoints and its result, where {} are free", size(least.disk), size(self.disk);
                "choose a folder on another disk with --run"
            )
        );
        if most.memory() > CLOSE * self.memory {
            let (most, free) = (size(most.memory()), size(self.memory));
            say(format!("{what} may take {most} of memory, and {free} are free; hint: {keys}"));
        }
        Ok(())
    }
}

/// Bytes as text, in GiB.
pub fn size(bytes: f64) -> String {
    let mib = bytes / f64::from(1_u32 << 20);
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use hooks::{Adapter, ModelFiles, Proj};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use tch::Kind;

    use super::*;

    fn model(kind: Kind) -> Qwen {
        Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, kind).unwrap()
    }

    #[test]
    fn all_weights_under_adamw_take_twenty_bytes_a_number_and_two_checkpoints_on_disk() {
        let config = Finetune { gradient_accumulation_steps: 1, ..Finetune::default() };
        let of = |kind, config: &Finetune| {
            let model = model(kind);
            let n: usize = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
            let need = Need::of((&model, false), None, config, [100.0, 10.0]);
            // All numbers of this model fit into one buffer, and a step has four of them in f32.
            (need.state / n as f64 - 16.0, need.disk / n as f64)
        };
        // Weights, as loaded and in their buffers, gradients and two averages in f32. The checkpoint has no gradients.
        assert_eq!(of(Kind::Float, &config), (20.0, 2.0 * 12.0 + 4.0));
        // Weights in bf16 with masters in f32.
        assert_eq!(of(Kind::BFloat16, &config), (20.0, 2.0 * 14.0 + 2.0));
        assert_eq!(of(Kind::BFloat16, &Finetune { masters: false, ..config.clone() }).0, 2.0 * 2.0 + 4.0 + 4.0);
        let model = model(Kind::Float);
        let [mapped, copied] = [true, false].map(|is| Need::of((&model, is), None, &config, [100.0, 10.0]).state);
        assert_eq!(copied / mapped, 36.0 / 32.0, "pages of a file are not counted");
        assert_eq!(of(Kind::Float, &Finetune { optimizer: OptimizerKind::Sgd, ..config.clone() }).0, 12.0);
        assert_eq!(of(Kind::Float, &Finetune { gradient_accumulation_steps: 3, ..config }).0, 24.0);
    }

    #[test]
    fn an_adapters_state_is_that_of_its_tensors() {
        let model = model(Kind::Float);
        let lora = LoraConfig { rank: 3, target_modules: vec![Proj::Q, Proj::Down], ..LoraConfig::default() };
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let adapter = Adapter::init(&lora, &model.config, &mut rng, Device::Cpu).unwrap();
        let n: usize = adapter.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
        let config = Finetune { gradient_accumulation_steps: 1, ..Finetune::default() };
        let need = Need::of((&model, false), Some(&lora), &config, [10.0, 0.0]);
        assert_eq!(need.state, (16.0 + 16.0) * n as f64);
        assert!(Need::of((&model, false), Some(&lora), &config, [20.0, 0.0]).activations == 2.0 * need.activations);
    }

    #[test]
    fn what_cannot_fit_is_refused_with_both_numbers() {
        let free = Free { memory: 8.0 * f64::from(1_u32 << 30), disk: f64::from(1_u32 << 30) };
        let need = |gib: f64, disk: f64| Need { state: gib * f64::from(1_u32 << 30), activations: 0.0, disk };
        let said =
            |need: Need| free.check("the student", &need, &need, "a smaller student.rank").unwrap_err().to_string();
        assert_eq!(
            said(need(9.5, 0.0)),
            "the student takes at least 9.5 GiB of memory, where 8.0 GiB are free; hint: a smaller student.rank"
        );
        assert!(said(need(1.0, 3e9)).contains("takes 2.8 GiB of disk space"), "{}", said(need(1.0, 3e9)));
        assert!(free.check("the student", &need(7.9, 0.0), &need(9.5, 0.0), "").is_ok(), "it may fit");
        let here = Free::here(Path::new("."), Device::Cpu);
        assert!(here.memory > 1e6 && here.memory < 1e15 && here.disk > 0.0, "{here:?}");
    }
}
