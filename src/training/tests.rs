//! Tests of laws that hold for any training.

mod broken_off;

use std::path::Path;

use hooks::{LoraConfig, ModelFiles, TokenClass};
use tch::Device;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use hooks::{Adapter, Batch, LossMask, Pass, Qwen, Sequence};

use crate::output::checkpoint::Checkpoint;
use crate::training::examples::rows_by_step;
use crate::training::settings::{Finetune, OptimizerKind, ScheduleKind, Seeds};
use crate::training::step_log::{Log, StepRow, first_and_last_quarter};
use crate::training::training_loop::{Training, finetune_full, finetune_lora};

fn files() -> ModelFiles {
    ModelFiles::open("tiny-random").unwrap()
}

fn model(kind: Kind) -> Qwen {
    Qwen::load(&files(), Device::Cpu, kind).unwrap()
}

/// Rows of different lengths with a common beginning: user tokens, then a counting answer.
pub(super) fn rows(n: usize) -> Vec<Sequence> {
    let row = |i: usize| {
        let bare = Sequence {
            ids: (0..4 + i as i64 % 3).map(|t| 20 + t).collect(),
            classes: vec![TokenClass::UserContent; 4 + i % 3],
            completion: 4 + i % 3..4 + i % 3,
            content_end: 4 + i % 3,
            ..Sequence::default()
        };
        bare.with_completion(&(0..2 + i as i64 % 4).map(|t| 30 + i as i64 + t).collect::<Vec<_>>())
    };
    (0..n).map(row).collect()
}

fn settings() -> Finetune {
    Finetune {
        learning_rate: 1e-2,
        warmup_steps: 0,
        max_steps: Some(3),
        batch_size: 8,
        gradient_accumulation_steps: 1,
        ..Finetune::default()
    }
}

fn adapter(model: &Qwen, dropout: f64) -> Adapter {
    let config = LoraConfig { rank: 4, alpha: 8.0, dropout, ..LoraConfig::default() };
    Adapter::init(&config, &model.config, &mut ChaCha8Rng::seed_from_u64(1), Device::Cpu).unwrap()
}

fn train(model: &Qwen, adapter: &Adapter, config: &Finetune, seeds: Seeds) -> anyhow::Result<Vec<StepRow>> {
    let mut steps = Vec::new();
    finetune_lora(model, adapter, &rows(8), &|_| false, config, seeds, &mut |row, _| {
        steps.push(row.clone());
        Ok(())
    })?;
    Ok(steps)
}

/// A fresh adapter after training, as one list of numbers, and the rows of the log.
fn trained(config: &Finetune, dropout: f64, seeds: Seeds) -> (Vec<f32>, Vec<StepRow>) {
    let model = model(Kind::Float);
    let adapter = adapter(&model, dropout);
    let steps = train(&model, &adapter, config, seeds).unwrap();
    (numbers(&adapter.parameters()), steps)
}

fn numbers(parameters: &[(String, Tensor)]) -> Vec<f32> {
    let flat = parameters.iter().map(|(_, tensor)| tensor.to_kind(Kind::Float).flatten(0, -1));
    Vec::<f32>::try_from(Tensor::cat(&flat.collect::<Vec<_>>(), 0)).unwrap()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn quarters_are_means_over_targets() {
    let row = |loss: f64, n_targets: usize| StepRow {
        step: 1,
        epoch: 0.0,
        learning_rate: 0.0,
        loss,
        grad_norm: 0.0,
        n_targets,
        delta_w_norm: None,
        changed_fraction: None,
    };
    let rows = [row(1.0, 3), row(5.0, 1), row(9.0, 7), row(9.0, 7), row(9.0, 7), row(2.0, 1), row(4.0, 1)];
    assert_eq!(first_and_last_quarter(&rows), Some((2.0, 3.0)));
    assert_eq!(first_and_last_quarter(&rows[..1]), Some((1.0, 1.0)));
    assert_eq!(first_and_last_quarter(&[]), None);
}

#[test]
fn accumulated_batches_are_one_batch() {
    let (whole, steps) = trained(&settings(), 0.0, Seeds::default());
    let split = Finetune { batch_size: 3, gradient_accumulation_steps: 3, ..settings() };
    let (parts, part_steps) = trained(&split, 0.0, Seeds::default());
    // AdamW divides by the gradient's size, so with steps of 1e-2 rounding in tiny gradients is visible.
    assert!(apart(&whole, &parts) < 2e-4, "{}", apart(&whole, &parts));
    for (whole, parts) in steps.iter().zip(&part_steps) {
        assert!((whole.loss - parts.loss).abs() < 1e-5, "{whole:?} {parts:?}");
        assert!((whole.grad_norm - parts.grad_norm).abs() < 1e-4 * whole.grad_norm, "{whole:?} {parts:?}");
    }
    assert!(steps[2].loss < steps[0].loss, "{steps:?}");
}

#[test]
fn the_loss_is_the_mean_over_all_targets() {
    let (_, steps) = trained(&Finetune { max_steps: Some(1), ..settings() }, 0.0, Seeds::default());
    let model = model(Kind::Float);
    let (mut sum, mut n) = (0.0, 0);
    for row in rows(8) {
        let resid = model.resid_final(&Batch::of(&[&row], Device::Cpu).unwrap(), &mut Pass::default()).unwrap();
        let logprobs = model.unembed(&resid).unwrap().log_softmax(-1, Kind::Double);
        for t in row.completion.clone() {
            sum -= logprobs.double_value(&[0, t as i64 - 1, row.ids[t]]);
            n += 1;
        }
    }
    assert_eq!(steps[0].n_targets, n);
    assert!((steps[0].loss - sum / f64::from(n as u32)).abs() < 1e-5, "{} against {}", steps[0].loss, sum / n as f64);
}

/// The first step of a LoRA (by hand), with dropout (recorded), or of all weights, on weighted tokens.
fn first_weighted_step(weights: Option<&[Vec<f64>]>, rows: &[Sequence], dropout: Option<f64>) -> (StepRow, Vec<f32>) {
    let model = model(Kind::Float);
    let adapter = dropout.map(|dropout| adapter(&model, dropout));
    let config = Finetune { max_steps: Some(1), warmup_steps: 0, optimizer: OptimizerKind::Sgd, ..settings() };
    let mut steps = vec![];
    let training = Training {
        model: &model,
        adapter: adapter.as_ref(),
        rows,
        weights,
        soft: None,
        is_digit: &|_| false,
        config: &config,
        seeds: Seeds::default(),
        until: None,
        checkpoint: None,
    };
    training
        .run(&mut |row, _| {
            steps.push(row.clone());
            Ok(())
        })
        .unwrap();
    let parameters = adapter.as_ref().map_or_else(|| model.parameters(), Adapter::parameters);
    (steps.remove(0), numbers(&parameters))
}

#[test]
fn a_weighted_loss_is_the_weighted_mean_and_its_scale_is_nothing() {
    let rows = rows(8);
    let of = |weight: fn(usize) -> f64| -> Vec<Vec<f64>> {
        rows.iter().map(|row| (0..row.ids.len()).map(weight).collect()).collect()
    };
    let (uneven, scaled) = (of(|at| [0.0, 1.0, 0.25][at % 3]), of(|at| [0.0, 4.0, 1.0][at % 3]));
    let (mut sum, mut total) = (0.0, 0.0);
    let model = model(Kind::Float);
    for (row, weights) in rows.iter().zip(&uneven) {
        let resid = model.resid_final(&Batch::of(&[row], Device::Cpu).unwrap(), &mut Pass::default()).unwrap();
        let logprobs = model.unembed(&resid).unwrap().log_softmax(-1, Kind::Double);
        for t in row.completion.clone() {
            sum -= weights[t] * logprobs.double_value(&[0, t as i64 - 1, row.ids[t]]);
            total += weights[t];
        }
    }
    for dropout in [Some(0.0), None] {
        let (step, parameters) = first_weighted_step(Some(&uneven), &rows, dropout);
        assert!((step.loss - sum / total).abs() < 1e-5, "{dropout:?}: {} against {}", step.loss, sum / total);
        let (other, same) = first_weighted_step(Some(&scaled), &rows, dropout);
        // The same quotients in f32, rounded elsewhere.
        assert!((other.grad_norm - step.grad_norm).abs() < 1e-5 * step.grad_norm && apart(&parameters, &same) < 1e-6);
        let (plain, by_default) = first_weighted_step(None, &rows, dropout);
        assert!((plain.grad_norm - step.grad_norm).abs() > 1e-2 * step.grad_norm, "weights change the gradient");
        let (ones, weighted) = first_weighted_step(Some(&of(|_| 1.0)), &rows, dropout);
        assert_eq!((ones.loss.to_bits(), by_default), (plain.loss.to_bits(), weighted), "weights of 1 are no weights");
    }
    // Dropout of next to nothing takes the recorded pass; its gradients are those by hand.
    let by_hand = first_weighted_step(Some(&uneven), &rows, Some(0.0));
    let recorded = first_weighted_step(Some(&uneven), &rows, Some(1e-9));
    assert!(apart(&by_hand.1, &recorded.1) < 1e-5 && by_hand.0.n_targets == recorded.0.n_targets);
}

#[test]
fn seeds_decide_every_bit() {
    let config = Finetune { batch_size: 3, ..settings() };
    let bits = |dropout, seeds| trained(&config, dropout, seeds).0.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let seeds = Seeds { init: 1, order: 2, dropout: 3 };
    assert_eq!(bits(0.0, seeds), bits(0.0, seeds));
    assert_ne!(bits(0.0, seeds), bits(0.0, Seeds { order: 4, ..seeds }));
    assert_eq!(bits(0.0, seeds), bits(0.0, Seeds { dropout: 5, ..seeds }));
    assert_eq!(bits(0.3, seeds), bits(0.3, seeds));
    assert_ne!(bits(0.3, seeds), bits(0.3, Seeds { dropout: 5, ..seeds }));
}

#[test]
fn every_epoch_has_an_order_of_its_own() {
    let config = Finetune { max_steps: Some(15), ..settings() }; // 7 steps an epoch: six of 8 rows and one of 2
    let steps = rows_by_step(&config, 50, 7);
    assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 8, 8, 8, 8, 2, 8, 8, 8, 8, 8, 8, 2, 8]);
    let (first, second) = (steps[..7].concat(), steps[7..14].concat());
    assert_ne!(first, second);
    for mut epoch in [first, second] {
        epoch.sort_unstable();
        assert_eq!(epoch, (0..50).collect::<Vec<_>>());
    }
    assert_eq!(rows_by_step(&config, 50, 7), steps);
    assert_ne!(rows_by_step(&config, 50, 8), steps);
    assert_eq!(rows_by_step(&Finetune { stop_after_steps: Some(3), ..config }, 50, 7), steps[..3]);
}

#[test]
fn a_run_has_the_steps_of_its_epochs() {
    let config = Finetune {
        batch_size: 2,
        gradient_accumulation_steps: 2,
        max_steps: None,
        num_train_epochs: 1.5,
        warmup_steps: 1,
        ..settings()
    };
    assert_eq!((config.total_steps(8), config.total_steps(9)), (3, 5));
    let (_, steps) = trained(&config, 0.0, Seeds::default());
    assert_eq!(steps.iter().map(|row| row.step).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(steps.iter().map(|row| row.epoch).collect::<Vec<_>>(), [0.5, 1.0, 1.5]);
    assert_eq!(steps.iter().map(|row| row.learning_rate).collect::<Vec<_>>(), [0.0, 1e-2, 5e-3]);
    assert_eq!(steps[0].delta_w_norm, Some(0.0)); // B is zero until a step moves it
}

#[test]
fn a_training_that_stops_early_is_the_beginning_of_the_whole() {
    let whole = trained(&Finetune { max_steps: Some(5), ..settings() }, 0.0, Seeds::default()).1;
    let config = Finetune { max_steps: Some(5), stop_after_steps: Some(2), ..settings() };
    assert_eq!(trained(&config, 0.0, Seeds::default()).1, whole[..2], "with the whole one's learning rates");
}

#[test]
fn the_norm_of_the_change_is_that_of_the_products() {
    let model = model(Kind::Float);
    let adapter = adapter(&model, 0.0);
    let steps = train(&model, &adapter, &settings(), Seeds::default()).unwrap();
    let squares: f64 = adapter
        .pairs()
        .map(|(_, _, pair)| pair.delta_weight().unwrap().square().sum(Kind::Double).double_value(&[]))
        .sum();
    let logged = steps[2].delta_w_norm.unwrap();
    assert!(logged > 0.0 && (logged - squares.sqrt()).abs() < 1e-5 * logged, "{logged} against {}", squares.sqrt());
    assert!(adapter.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
}

#[test]
fn a_gate_in_training_is_obeyed() {
    let gated = |gate: &str| trained(&Finetune { gate: gate.parse().unwrap(), ..settings() }, 0.0, Seeds::default()).0;
    let everywhere = trained(&settings(), 0.0, Seeds::default()).0;
    assert_eq!(apart(&everywhere, &gated("only:user.content+gen")), 0.0); // all classes of these rows
    assert!(apart(&everywhere, &gated("only:user.content")) > 1e-3);
    let model = model(Kind::Float);
    let config = Finetune { gate: "nowhere".parse().unwrap(), ..settings() };
    let error = train(&model, &adapter(&model, 0.0), &config, Seeds::default()).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    // Dose, blocks and projections also matter, and a gate under which nothing can be learned is refused.
    assert!(apart(&everywhere, &gated("everywhere*0.5")) > 1e-3);
    assert!(apart(&gated("only:layers(0)*modules(v)"), &gated("only:layers(0)*modules(q)")) > 1e-3);
    for gate in ["except:user.content+gen", "only:user.content*0"] {
        let config = Finetune { gate: gate.parse().unwrap(), ..settings() };
        let error = format!("{:#}", train(&model, &adapter(&model, 0.0), &config, Seeds::default()).unwrap_err());
        assert!(error.contains("nothing can be learned"), "{gate}: {error}");
    }
}

#[test]
fn a_that_is_frozen_stays_as_it_was_drawn() {
    let model = model(Kind::Float);
    for optimizer in [OptimizerKind::AdamW, OptimizerKind::Muon, OptimizerKind::Preconditioned] {
        let (before, after) = (adapter(&model, 0.0), adapter(&model, 0.0));
        let config = Finetune { frozen_a: true, optimizer, ..settings() };
        train(&model, &after, &config, Seeds::default()).unwrap();
        for ((name, before), (_, after)) in before.parameters().iter().zip(after.parameters()) {
            assert_eq!(before == &after, name.contains("lora_A"), "{optimizer:?}: {name}");
        }
    }
    let message = |config: &Finetune, adapter: Option<&Adapter>| {
        let (rows, is_digit, seeds) = (&rows(2), &|_| false, Seeds::default());
        let training = Training {
            model: &model,
            adapter,
            rows,
            weights: None,
            soft: None,
            is_digit,
            config,
            seeds,
            until: None,
            checkpoint: None,
        };
        training.run(&mut |_, _| Ok(())).unwrap_err().to_string()
    };
    let frozen = Finetune { frozen_a: true, ..settings() };
    assert!(message(&frozen, None).contains("no A"));
    let decaying = Finetune { weight_decay: 0.1, ..frozen };
    assert!(message(&decaying, Some(&adapter(&model, 0.0))).contains("0 where frozen_a is true"));
    let muon = Finetune { optimizer: OptimizerKind::Muon, ..settings() };
    assert!(message(&muon, None).contains("trains matrices"));
}

/// The rotation control of Blank et al. 2026: a rotation does not affect gradient descent, but it affects Adam.
#[test]
fn gradient_descent_does_not_notice_a_rotation_and_adam_does() {
    let model = model(Kind::Float);
    let change = |optimizer: OptimizerKind, rotated: bool| -> Vec<f32> {
        let mut learned = adapter(&model, 0.0);
        if rotated {
            learned = learned.rotated(&mut ChaCha8Rng::seed_from_u64(5)).unwrap();
        }
        let start = numbers(&learned.parameters());
        assert_eq!(apart(&start, &numbers(&adapter(&model, 0.0).parameters())) > 1e-2, rotated);
        let learning_rate = if optimizer == OptimizerKind::AdamW { 1e-2 } else { 0.1 };
        let config = Finetune { optimizer, learning_rate, ..settings() };
        train(&model, &learned, &config, Seeds::default()).unwrap();
        let changes = learned.pairs().map(|(_, _, pair)| (String::new(), pair.delta_weight().unwrap()));
        numbers(&changes.collect::<Vec<_>>())
    };
    let size = |values: &[f32]| values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let (sgd, turned) = (change(OptimizerKind::Sgd, false), change(OptimizerKind::Sgd, true));
    assert!(apart(&sgd, &turned) < 1e-4 * size(&sgd), "{} of {}", apart(&sgd, &turned), size(&sgd));
    let (adam, turned) = (change(OptimizerKind::AdamW, false), change(OptimizerKind::AdamW, true));
    assert!(apart(&adam, &turned) > 0.05 * size(&adam), "{} of {}", apart(&adam, &turned), size(&adam));
}

#[test]
fn full_finetuning_learns_and_counts_what_changed() {
    let run = |kind, masters, learning_rate| {
        let model = model(kind);
        let before = numbers(&model.parameters());
        let config = Finetune { masters, learning_rate, max_steps: Some(4), ..settings() };
        let mut steps = Vec::new();
        finetune_full(&model, &rows(8), &|_| false, &config, Seeds::default(), &mut |row, _| {
            steps.push(row.clone());
            Ok(())
        })
        .unwrap();
        assert!(model.parameters().iter().all(|(_, tensor)| !tensor.requires_grad() && tensor.kind() == kind));
        (before, numbers(&model.parameters()), steps)
    };
    let (before, after, steps) = run(Kind::Float, true, 1e-3);
    assert!(steps[3].loss < steps[0].loss, "{steps:?}");
    let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / before.len() as f64;
    let logged = steps[3].changed_fraction.unwrap();
    assert!(logged > 0.1 && (logged - changed).abs() < 0.1, "{logged} against {changed}");
    assert_eq!(steps[0].delta_w_norm, None);

    let (_, _, f32_steps) = run(Kind::Float, true, 1e-5);
    let (_, _, bf16_steps) = run(Kind::BFloat16, false, 1e-5);
    let (full, rounded) = (f32_steps[3].changed_fraction.unwrap(), bf16_steps[3].changed_fraction.unwrap());
    assert!(rounded < full / 4.0, "{rounded} against {full}"); // steps of 1e-5 on weights of 0.1 are mostly lost
}

#[test]
fn what_cannot_be_trained_says_so() {
    let model = model(Kind::Float);
    let error = |rows: &[Sequence], config: &Finetune| {
        let log: Log<'_> = &mut |_, _| Ok(());
        finetune_lora(&model, &adapter(&model, 0.0), rows, &|_| false, config, Seeds::default(), log)
            .unwrap_err()
            .to_string()
    };
    assert!(error(&[], &settings()).contains("no rows"));
    assert!(error(&rows(8), &Finetune { batch_size: 0, ..settings() }).starts_with("batch_size is 0"));
    let mut some = rows(8);
    some[3] = some[3].with_completion(&[]);
    assert!(error(&some, &settings()).starts_with("the loss mask content_eot selects no token of row 3; hint: "));
    assert!(error(&rows(8), &Finetune { mask: LossMask::Digits, ..settings() }).contains("digits"));
    let diverging = Finetune { optimizer: OptimizerKind::Sgd, learning_rate: 1e30, max_grad_norm: 0.0, ..settings() };
    let message = error(&rows(8), &diverging);
    assert!(message.starts_with("step 2: ") && message.contains("each of its 8 rows ("), "{message}");
    let last = error(&rows(8), &Finetune { max_steps: Some(1), learning_rate: 1e39, ..diverging });
    assert!(last.starts_with("after step 1 the tensor "), "{last}");
}

#[test]
fn a_config_refuses_what_it_does_not_know() {
    let config: Finetune =
        toml::from_str("learning_rate = 1e-4\nlr_scheduler_type = \"cosine\"\nmask = \"digits\"").unwrap();
    assert_eq!(
        (config.lr_scheduler_type, config.mask, config.batch_size),
        (ScheduleKind::Cosine, LossMask::Digits, 22)
    );
    let error = toml::from_str::<Finetune>("lr = 1e-4").unwrap_err().to_string();
    assert!(error.contains("learning_rate"), "{error}");
}

/// A training that ends early is the beginning of the whole one, also after a break.
#[test]
fn a_training_ends_as_soon_as_it_is_told() {
    let config = Finetune { max_steps: Some(6), lr_scheduler_type: ScheduleKind::Constant, ..settings() };
    let config = Finetune { save_steps: Some(1), ..config };
    let folder = tempfile::tempdir().unwrap();
    let train = |end: u64, broken_off: u64| {
        let model = model(Kind::Float);
        let (adapter, rows) = (adapter(&model, 0.0), rows(8));
        let mut checkpoint = Checkpoint::beside(&folder.path().join("train.csv"), "", "student");
        let (mut steps, mut asked) = (vec![], std::cell::RefCell::new(vec![]));
        let until = |step: u64| {
            asked.borrow_mut().push(step);
            Ok(step >= end)
        };
        let training = Training {
            model: &model,
            adapter: Some(&adapter),
            rows: &rows,
            weights: None,
            soft: None,
            is_digit: &|_| false,
            config: &config,
            seeds: Seeds::default(),
            until: Some(&until),
            checkpoint: Some(&mut checkpoint),
        };
        let result = training.run(&mut |row, _| {
            steps.push(row.loss.to_bits());
            anyhow::ensure!(row.step != broken_off, "broken off");
            Ok(())
        });
        if result.is_ok() {
            checkpoint.remove().unwrap();
        }
        (numbers(&adapter.parameters()), steps, std::mem::take(asked.get_mut()))
    };
    let (_, whole, asked) = train(u64::MAX, 0);
    assert_eq!((whole.len(), asked), (6, vec![1, 2, 3, 4, 5, 6]));
    let (adapter, steps, _) = train(3, 0);
    assert_eq!(steps, whole[..3]);
    let _ = train(3, 2);
    let (again, steps, _) = train(3, 0);
    assert_eq!(steps, whole[..3]);
    assert_eq!(again, adapter);
}
