use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::adapter::lora::{Adapter, LoraConfig};
use crate::ask::condition::Condition;
use crate::ask::generate::{Sampling, generate};
use crate::ask::gradient::gradients;
use crate::chat::tokens::Sequence;
use crate::load::model_files::ModelFiles;
use crate::model::loss::{Targets, cross_entropy_sum};
use crate::model::pass::Pass;
use crate::model::qwen::Qwen;
use crate::proj::Proj;
use crate::rows::batch::Batch;

const ROWS: [&[i64]; 2] = [&[5, 6, 7, 8, 9], &[10, 11, 12, 13, 14]];

fn model() -> Qwen {
    Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Float).unwrap()
}

/// The loss of one step of a LoRA of rank 4 and its gradients, as bits.
fn step(model: &Qwen) -> Vec<f32> {
    let config = LoraConfig { rank: 4, ..LoraConfig::default() };
    let adapter = Adapter::init(&config, &model.config, &mut ChaCha8Rng::seed_from_u64(1), Device::Cpu).unwrap();
    let tensors: Vec<Tensor> =
        adapter.parameters().into_iter().map(|(_, tensor)| tensor.set_requires_grad(true)).collect();
    let batch = Batch::from_ids(&ROWS, Device::Cpu).unwrap();
    let mut pass = Pass { adapter: Some(&adapter), ..Pass::default() };
    let masks: [&[bool]; 2] = [&[false, false, false, true, true], &[false, false, false, false, true]];
    let targets = Targets::of(&batch, &ROWS, &masks).unwrap();
    let resid = model.resid_at(&batch, &targets.places, &mut pass).unwrap();
    let loss = cross_entropy_sum(model, &resid, &targets).unwrap();
    let mut found = vec![f32::try_from(&loss.detach()).unwrap()];
    for gradient in gradients(&loss, &tensors, false).unwrap() {
        found.extend(Vec::<f32>::try_from(gradient.flatten(0, -1)).unwrap());
    }
    found
}

fn answer(model: &Qwen) -> Vec<i64> {
    let sampling = Sampling { temperature: 1.0, max_new_tokens: 4, stop: vec![], constrain: None, batch: 2 };
    let prompt = Sequence::of_ids(vec![5, 6, 7, 8]);
    let answers = generate(model, &[prompt], &Condition::default(), &sampling, &[3], &mut |_| ()).unwrap();
    answers[0].ids.clone()
}

#[test]
fn the_flops_of_a_training_step_are_those_by_hand() {
    let model = model();
    let config = &model.config;
    start();
    step(&model);
    let recorded = finish();

    let (tokens, targets, rank) = (10.0, 3.0, 4.0);
    let widths = || Proj::ALL.map(|proj| (proj, proj.widths(config)));
    let weights: f64 = widths().iter().map(|(_, (d_in, d_out))| (d_in * d_out) as f64).sum();
    let layers = config.n_layers as f64;
    let projections = layers * 2.0 * tokens * weights;
    let lora =
        layers * widths().iter().map(|(_, (d_in, d_out))| 2.0 * tokens * rank * (d_in + d_out) as f64).sum::<f64>();
    // Each row's five queries see 1 + 2 + 3 + 4 + 5 keys, with one product for the score and one for the mean.
    let attention = layers * 2.0 * 15.0 * (config.n_heads * config.d_head) as f64 * 4.0;
    let head = 2.0 * targets * (config.d_model * config.d_vocab) as f64;
    // The first block's input, the embedding, has no gradient, so its q, k and v compute none for their input, through
    // W or A.
    let first: Vec<(i64, i64)> = [Proj::Q, Proj::K, Proj::V].map(|proj| proj.widths(config)).to_vec();
    let first_weights: f64 = first.iter().map(|(d_in, d_out)| 2.0 * tokens * (d_in * d_out) as f64).sum();
    let first_a: f64 = first.iter().map(|(d_in, _)| 2.0 * tokens * rank * *d_in as f64).sum();
    let backward = projections - first_weights + 2.0 * lora - first_a + 2.0 * attention;

    let flops = |cell: (Stage, Op)| recorded.costs[&cell].flops;
    assert_eq!(flops((Stage::Forward, Op::Projections)), projections);
    assert_eq!(flops((Stage::Forward, Op::Lora)), lora);
    assert_eq!(flops((Stage::Forward, Op::Attention)), attention);
    assert_eq!(flops((Stage::Loss, Op::Head)), 2.0 * head, "the gradient at the hidden states is taken with the loss");
    assert_eq!(flops((Stage::Backward, Op::Gradients)), backward);
    let all: f64 = recorded.costs.values().map(|cost| cost.flops).sum();
    assert_eq!(all, projections + lora + attention + 2.0 * head + backward);
    assert_eq!(recorded.costs[&(Stage::Forward, Op::Projections)].calls, 7 * config.n_layers as u64);
    assert_eq!(recorded.costs[&(Stage::Forward, Op::Attention)].calls, config.n_layers as u64);
}

#[test]
fn the_flops_of_an_answer_are_those_by_hand() {
    let model = model();
    let config = &model.config;
    start();
    assert_eq!(answer(&model).len(), 4);
    let recorded = finish();
    let weights: f64 = Proj::ALL.iter().map(|proj| proj.widths(config)).map(|(i, o)| (i * o) as f64).sum();
    let (layers, head) = (config.n_layers as f64, (config.d_model * config.d_vocab) as f64);
    let flops = |cell: (Stage, Op)| recorded.costs[&cell].flops;
    // Four tokens of the prompt, and three of the answer. For all prompt tokens except the last, the last block
    // computes only keys and values. The head runs four times per answer.
    let kv: f64 = [Proj::K, Proj::V].iter().map(|proj| proj.widths(config)).map(|(i, o)| (i * o) as f64).sum();
    let last_block = 4.0 * kv + weights - kv;
    assert_eq!(flops((Stage::Forward, Op::Projections)), 2.0 * ((layers - 1.0) * 4.0 * weights + last_block));
    assert_eq!(flops((Stage::Decode, Op::Projections)), layers * 2.0 * 3.0 * weights);
    assert_eq!(flops((Stage::Decode, Op::Head)), 2.0 * 4.0 * head);
    // The three decoding steps see five, six and seven keys.
    let heads = (config.n_heads * config.d_head) as f64;
    assert_eq!(flops((Stage::Decode, Op::Attention)), layers * 4.0 * 18.0 * heads);
    assert_eq!(recorded.costs[&(Stage::Sampling, Op::Rest)].calls, 4);
}

#[test]
fn every_moment_counts_once() {
    let before = Instant::now();
    start();
    let inner = Instant::now();
    step(&model());
    {
        let _outer = stage(Stage::Writing);
        let _inner = op(Op::Taps);
    }
    let inner = inner.elapsed().as_secs_f64();
    let recorded = finish();
    let outer = before.elapsed().as_secs_f64();
    let seconds = recorded.seconds();
    assert!(inner <= seconds && seconds <= outer, "{inner} {seconds} {outer}");
    let of = |costs: &[Cost]| costs.iter().map(|cost| cost.seconds / seconds).sum::<f64>();
    let by_stage: Vec<Cost> = recorded.by_stage().into_iter().map(|(_, cost)| cost).collect();
    let by_op: Vec<Cost> = recorded.by_op().into_iter().map(|(_, cost)| cost).collect();
    for shares in [of(&by_stage), of(&by_op)] {
        assert!((shares - 1.0).abs() < 1e-12, "the shares add up to {shares}");
    }
    assert_eq!(recorded.costs[&(Stage::Writing, Op::Taps)].calls, 1);
    assert_eq!(recorded.model, Some((Device::Cpu, Kind::Float)));
    assert!(recorded.costs.contains_key(&(Stage::Load, Op::Rest)));
}

#[test]
fn off_nothing_is_recorded_and_on_nothing_is_changed() {
    let model = model();
    let bare = (step(&model), answer(&model));
    assert!(!is_on());
    assert_eq!(finish(), Profile::default());
    start();
    let recorded = (step(&model), answer(&model));
    assert!(is_on());
    assert_ne!(finish(), Profile::default());
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&bare.0), bits(&recorded.0));
    assert_eq!(bare.1, recorded.1);
}
