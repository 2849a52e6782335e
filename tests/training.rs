//! Ten optimizer steps are torch.optim's: `golden/training`, on the tiny Qwen2 with its LoRA.

use std::collections::BTreeMap;

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use hooks::{Adapter, LossMask, ModelFiles, Qwen, Sequence, TokenClass};
use undertone::training::optim::{Optimizer, Rule};
use undertone::training::settings::{Finetune, OptimizerKind, ScheduleKind, Seeds};
use undertone::training::step_log::StepRow;
use undertone::training::training_loop::finetune_lora;

use crate::compare::{Tolerance, assert_close, folder, tensors};

/// For ten losses and gradient norms in a row, of order 1 to 10. Each step feeds its rounding into the next; transformers in
/// f32 and in f64 end at most 1e-6 apart in the losses, and the norms, which are steeper, follow.
const LOSS_TOLERANCE: f64 = 2e-5;
const NORM_TOLERANCE: f64 = 2e-4;

/// For the trained weights after ten steps of 1e-2: f32 and f64 end 2e-6 apart.
const WEIGHTS: Tolerance = Tolerance(5e-5);

/// The completion that the losses are taken over: the last tokens of each row.
const N_COMPLETION: usize = 5;

#[derive(Deserialize)]
struct Expected {
    n_steps: u64,
    max_norm: f64,
    adamw: Run,
    sgd: Run,
    sgd_momentum: Run,
    rmsprop: Run,
    muon: Muon,
    preconditioned: Run,
}

#[derive(Deserialize)]
struct Muon {
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    start: Vec<Vec<f32>>,
    gradients: Vec<Vec<Vec<f32>>>,
    end: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Run {
    lr: f64,
    #[serde(default)]
    betas: (f64, f64),
    #[serde(default)]
    eps: f64,
    #[serde(default)]
    weight_decay: f64,
    #[serde(default)]
    momentum: f64,
    #[serde(default)]
    alpha: f64,
    losses: Vec<f64>,
    norms: Vec<f64>,
}

impl Run {
    fn settings(&self, expected: &Expected, optimizer: OptimizerKind) -> Finetune {
        let defaults = Finetune::default();
        let adam = matches!(optimizer, OptimizerKind::AdamW | OptimizerKind::Preconditioned);
        Finetune {
            optimizer,
            learning_rate: self.lr,
            weight_decay: self.weight_decay,
            adam_beta1: if adam { self.betas.0 } else { defaults.adam_beta1 },
            adam_beta2: if adam { self.betas.1 } else { self.alpha },
            adam_epsilon: if self.eps > 0.0 { self.eps } else { defaults.adam_epsilon },
            momentum: self.momentum,
            lr_scheduler_type: ScheduleKind::Constant,
            warmup_steps: 0,
            max_steps: Some(expected.n_steps),
            batch_size: 2,
            gradient_accumulation_steps: 1,
            max_grad_norm: expected.max_norm,
            mask: LossMask::Content,
            ..defaults
        }
    }

    fn assert_like(&self, name: &str, steps: &[StepRow]) {
        assert_eq!(steps.len(), self.losses.len());
        let table = |what: &str, ours: Vec<f64>, golden: &[f64], tolerance: f64| {
            let apart: Vec<f64> = ours.iter().zip(golden).map(|(ours, golden)| (ours - golden).abs()).collect();
            let line = |at: usize| format!("{:>5} {:>12.7} {:>12.7}", at + 1, ours[at], golden[at]);
            let lines = (0..golden.len()).map(line).collect::<Vec<_>>().join("\n");
            let within = apart.iter().all(|apart| *apart <= tolerance);
            assert!(within, "{name}: {what} by step, ours and golden, allowed {tolerance:e}\n{lines}");
        };
        table("losses", steps.iter().map(|step| step.loss).collect(), &self.losses, LOSS_TOLERANCE);
        table("norms", steps.iter().map(|step| step.grad_norm).collect(), &self.norms, NORM_TOLERANCE);
    }
}

fn expected() -> Expected {
    serde_json::from_slice(&std::fs::read(folder("training").join("expected.json")).unwrap()).unwrap()
}

/// The golden rows, whose last tokens are the answer.
fn rows() -> Vec<Sequence> {
    let golden = tensors(&folder("qwen2").join("expected.safetensors"));
    let lengths = Vec::<i64>::try_from(&golden["lengths"]).unwrap();
    let row = |(row, length): (usize, i64)| {
        let ids = Vec::<i64>::try_from(golden["ids"].get(row as i64).narrow(0, 0, length)).unwrap();
        let (prompt, answer) = ids.split_at(ids.len() - N_COMPLETION);
        let (ids, at) = (prompt.to_vec(), prompt.len());
        let bare = Sequence {
            classes: vec![TokenClass::UserContent; at],
            ids,
            completion: at..at,
            content_end: at,
            ..Sequence::default()
        };
        bare.with_completion(answer)
    };
    lengths.into_iter().enumerate().map(row).collect()
}

/// The steps of a run from the golden adapter, and the tensors that it ends with.
fn train(settings: &Finetune) -> (Vec<StepRow>, BTreeMap<String, Tensor>) {
    let files = ModelFiles::open(folder("qwen2").to_str().unwrap()).unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let adapter = Adapter::load(&folder("qwen2").join("adapter"), &model.config, Device::Cpu).unwrap();
    let mut steps = Vec::new();
    finetune_lora(&model, &adapter, &rows(), &|_| false, settings, Seeds::default(), &mut |step, _| {
        steps.push(step.clone());
        Ok(())
    })
    .unwrap();
    (steps, adapter.parameters().into_iter().collect())
}

#[test]
fn ten_steps_of_adamw() {
    let expected = expected();
    let (steps, weights) = train(&expected.adamw.settings(&expected, OptimizerKind::AdamW));
    expected.adamw.assert_like("AdamW", &steps);
    let clipped = expected.adamw.norms.iter().filter(|norm| **norm > expected.max_norm).count();
    assert_eq!(clipped, 6, "the golden steps are of both kinds, clipped and not");
    let golden = tensors(&folder("training").join("adamw.safetensors"));
    assert_eq!(weights.keys().collect::<Vec<_>>(), golden.keys().collect::<Vec<_>>());
    for (name, golden) in &golden {
        assert_close(name, &weights[name], golden, WEIGHTS);
    }
}

#[test]
fn ten_steps_of_sgd() {
    let expected = expected();
    for (name, run) in [("SGD", &expected.sgd), ("SGD with momentum", &expected.sgd_momentum)] {
        // Adam hardly feels a gradient's length; these feel nothing else than what clipping leaves of it.
        assert!(run.norms.iter().all(|norm| *norm > expected.max_norm), "every golden step is clipped");
        let (steps, _) = train(&run.settings(&expected, OptimizerKind::Sgd));
        run.assert_like(name, &steps);
    }
}

#[test]
fn ten_steps_of_rmsprop() {
    let expected = expected();
    let (steps, _) = train(&expected.rmsprop.settings(&expected, OptimizerKind::RmsProp));
    expected.rmsprop.assert_like("RMSprop", &steps);
}

/// On two matrices along given gradients: Muon makes directions as long as others that a gradient has by rounding alone, so that two
/// trainings of a model drift apart.
#[test]
fn ten_steps_of_muon() {
    let Muon { lr, momentum, weight_decay, start, gradients, end } = expected().muon;
    let matrices = |values: &[Vec<f32>]| -> Vec<Tensor> {
        let shapes = [[3, 5], [6, 2]];
        values.iter().zip(shapes).map(|(values, shape)| Tensor::from_slice(values).view(shape)).collect()
    };
    let trained: Vec<(String, Tensor)> = ["a", "b"].map(str::to_owned).into_iter().zip(matrices(&start)).collect();
    let mut optimizer = Optimizer::new(Rule::Muon { momentum, weight_decay }, &trained, true).unwrap();
    for step in &gradients {
        let gradients = optimizer.gather(matrices(step), None).unwrap();
        optimizer.step(&gradients, lr, false).unwrap();
    }
    for ((name, ours), golden) in trained.iter().zip(matrices(&end)) {
        assert_close(name, ours, &golden, Tolerance(1e-6));
    }
}

#[test]
fn ten_steps_with_scales_that_stay() {
    let expected = expected();
    let (steps, _) = train(&expected.preconditioned.settings(&expected, OptimizerKind::Preconditioned));
    expected.preconditioned.assert_like("preconditioned SGD", &steps);
}

#[test]
fn rows_in_two_batches_are_the_same_steps() {
    let expected = expected();
    let settings = expected.adamw.settings(&expected, OptimizerKind::AdamW);
    let (steps, _) = train(&Finetune { batch_size: 1, gradient_accumulation_steps: 2, ..settings });
    expected.adamw.assert_like("AdamW, accumulated", &steps);
}
