use std::collections::BTreeSet;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Device;

use super::*;
use crate::adapter::lora::LoraConfig;
use crate::ask::gradient::gradients;
use crate::chat::select::Numbers;
use crate::config::{Config, Family};
use crate::laws::model_laws::exact;
use crate::load::tiny_random;
use crate::load::weights::Weights;
use crate::model::loss::{Labels, cross_entropy};
use crate::rows::packing::PackedRow;

/// A model of either architecture with three blocks: Qwen2 with a tied head, Qwen3 without.
pub(super) fn model(family: Family, kind: Kind) -> Qwen {
    let (qwen3, config) = (family == Family::Qwen3, tiny_random::config(300));
    let config = Config { family, n_layers: 3, qkv_bias: !qwen3, qk_norm: qwen3, tie_embeddings: !qwen3, ..config };
    let mut weights = tiny_random::weights(&config).unwrap();
    for (layer, name) in (0..3).flat_map(|layer| [(layer, "q_norm"), (layer, "k_norm")]).filter(|_| qwen3) {
        let weight = (Tensor::arange(config.d_head, (Kind::Float, Device::Cpu)) * 0.7 + layer).sin() + 1.5;
        weights.insert(format!("model.layers.{layer}.self_attn.{name}.weight"), weight);
    }
    let embedding = weights["model.embed_tokens.weight"].shallow_clone();
    weights.insert("lm_head.weight".to_owned(), embedding.cos());
    Qwen::of_weights(&config, &Weights::from_tensors("drawn", weights), Device::Cpu, kind).unwrap()
}

/// An adapter with a random B, in f64 for an f64 model, else in f32.
pub(super) fn adapter(model: &Qwen, config: &LoraConfig, seed: u64) -> Adapter {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let adapter = Adapter::init(config, &model.config, &mut rng, Device::Cpu).unwrap();
    for (_, _, pair) in adapter.pairs() {
        let values: Vec<f32> = (0..pair.b.numel()).map(|_| rng.random_range(-0.2..0.2)).collect();
        pair.b.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(&pair.b));
    }
    if model.kind() == Kind::Double { exact(&adapter) } else { adapter }
}

/// Rows with common beginnings and different lengths, and the first token that each row's loss counts.
const ROWS: [&[i64]; 4] =
    [&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[1, 2, 3, 40, 50], &[1, 2, 3, 4, 55, 60, 70], &[1, 2, 33, 44, 55, 66, 77, 8]];
const FROM: [usize; 4] = [6, 3, 4, 5];

fn losses_of(rows: usize) -> Vec<Vec<bool>> {
    (0..rows).map(|row| (0..ROWS[row].len()).map(|t| t >= FROM[row] && (row != 0 || t != 7)).collect()).collect()
}

pub(super) struct Case {
    pub(super) batch: Batch,
    pub(super) targets: Targets,
    pub(super) weights: Tensor,
    pub(super) doses: Option<Doses>,
}

/// The rows in groups; with a gate, tokens have different doses.
pub(super) fn case(model: &Qwen, groups: usize, gate: Option<&dyn Fn(Tensor) -> Doses>) -> Case {
    let doses: Vec<Vec<f64>> =
        ROWS.iter().map(|ids| (0..ids.len()).map(|t| [1.0, 0.0, -0.5, 1.0, 2.0][t % 5]).collect()).collect();
    let rows = ROWS.iter().zip(&doses).map(|(ids, doses)| {
        let n = ids.len() - 1; // the last token predicts nothing
        PackedRow { doses: gate.is_some().then(|| &doses[..n]), ..PackedRow::of(&ids[..n]) }
    });
    let rows: Vec<PackedRow<'_>> = rows.collect();
    let lines: Vec<&[PackedRow<'_>]> = rows.chunks(ROWS.len() / groups).collect();
    let batch = Batch::packed(&lines, true, Device::Cpu).unwrap();
    let masks = losses_of(ROWS.len());
    let targets = Targets::of(&batch, &ROWS, &masks.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    let weights = (0..targets.n).map(|at| 0.1 + at as f64 % 3.0).collect::<Vec<_>>();
    let doses = gate.map(|gate| {
        let flat: Vec<f64> = batch.doses().concat();
        gate(Tensor::from_slice(&flat).view([groups as i64, -1, 1]).to_kind(wide(model.kind())))
    });
    Case { batch, targets, weights: Tensor::from_slice(&weights).to_kind(wide(model.kind())), doses }
}

/// The losses and gradients by libtorch's own backward pass.
fn recorded(model: &Qwen, case: Case, adapter: &Adapter) -> (Tensor, Vec<Tensor>) {
    let tensors: Vec<Tensor> =
        adapter.parameters().into_iter().map(|(_, tensor)| tensor.set_requires_grad(true)).collect();
    let mut pass = Pass { adapter: Some(adapter), doses: case.doses, ..Pass::default() };
    let resid = model.resid_at(&case.batch, &case.targets.places, &mut pass).unwrap();
    let losses = cross_entropy(model, &resid, &case.targets).unwrap();
    let found = gradients(&(&losses * &case.weights).sum(losses.kind()), &tensors, false).unwrap();
    for tensor in tensors {
        let _ = tensor.set_requires_grad(false);
    }
    (losses.detach(), found)
}

fn assert_alike(
    model: &Qwen,
    adapter: &Adapter,
    groups: usize,
    gate: Option<&dyn Fn(Tensor) -> Doses>,
    tolerance: f64,
) {
    let Case { batch, targets, weights, doses } = case(model, groups, gate);
    let (losses, found) = model.lora_gradients(&batch, &targets, &weights, adapter, doses.as_ref()).unwrap();
    let (twin_losses, twin) = recorded(model, case(model, groups, gate), adapter);
    let apart = |a: &Tensor, b: &Tensor| {
        assert_eq!((a.size(), a.kind()), (b.size(), b.kind()));
        f64::try_from((a - b).abs().max()).unwrap()
    };
    assert!(apart(&losses, &twin_losses) < tolerance * f64::try_from(twin_losses.abs().max()).unwrap());
    let largest = twin.iter().map(|tensor| f64::try_from(tensor.abs().max()).unwrap()).fold(0.0, f64::max);
    assert!(largest > 1e-3, "something is learned: {largest}");
    assert_eq!(found.len(), twin.len());
    for ((name, _), (found, twin)) in adapter.parameters().iter().zip(found.iter().zip(&twin)) {
        let scale = f64::try_from(twin.abs().max()).unwrap().max(1e-3 * largest);
        assert!(apart(found, twin) < tolerance * scale, "{name}: {} of {scale}", apart(found, twin));
        assert!(!found.requires_grad());
    }
}

pub(super) fn gates() -> Vec<Box<dyn Fn(Tensor) -> Doses>> {
    let cell = |layers: &'static str, modules: &'static [Proj], elsewhere: f64| {
        move |tokens: Tensor| Doses {
            layers: Some(Numbers::parse(layers, "the layers").unwrap()),
            modules: Some(modules.iter().copied().collect::<BTreeSet<_>>()),
            elsewhere,
            ..Doses::of_tokens(tokens)
        }
    };
    vec![
        Box::new(Doses::of_tokens),
        Box::new(cell("1..3", &[Proj::V, Proj::Down, Proj::Q], 0.0)),
        Box::new(cell("0", &[Proj::O, Proj::Gate], 0.5)),
        Box::new(cell("2", &[Proj::Up, Proj::K], 0.0)),
    ]
}

/// Adapters at all maps, and at some maps of some blocks.
pub(super) fn configs() -> [LoraConfig; 6] {
    let some = |modules: &[Proj], layers: Option<Vec<usize>>| LoraConfig {
        rank: 3,
        alpha: 5.0,
        target_modules: modules.to_vec(),
        layers,
        ..LoraConfig::default()
    };
    [
        some(&Proj::ALL, None),
        some(&[Proj::V, Proj::Down], Some(vec![1])),
        some(&[Proj::O], Some(vec![2])),
        some(&[Proj::Gate, Proj::Up], Some(vec![0])),
        some(&[Proj::Q, Proj::K], Some(vec![0, 2])),
        some(&[Proj::Down], Some(vec![2])),
    ]
}

#[test]
fn manual_gradients_are_the_recorded_ones() {
    let configs = configs();
    for (family, kind, tolerance) in
        [(Family::Qwen2, Kind::Double, 1e-11), (Family::Qwen3, Kind::Double, 1e-11), (Family::Qwen2, Kind::Float, 1e-4)]
    {
        let model = model(family, kind);
        for (at, config) in configs.iter().enumerate() {
            let adapter = adapter(&model, config, at as u64);
            assert_alike(&model, &adapter, 1, None, tolerance);
            for gate in gates().iter().filter(|_| at == 0) {
                assert_alike(&model, &adapter, 1, Some(gate), tolerance);
            }
        }
    }
}

#[test]
fn a_stacks_manual_gradients_are_the_recorded_ones() {
    for (kind, tolerance) in [(Kind::Double, 1e-11), (Kind::Float, 1e-4)] {
        let model = model(Family::Qwen2, kind);
        for alphas in [[8.0, 8.0], [2.0, 8.0]] {
            let of = |rank: i64, alpha: f64| LoraConfig { rank, alpha, ..LoraConfig::default() };
            let students = [adapter(&model, &of(2, alphas[0] / 4.0), 1), adapter(&model, &of(8, alphas[1]), 2)];
            let stack = Adapter::stacked(&students.iter().collect::<Vec<_>>()).unwrap();
            assert_eq!(stack.pairs().next().unwrap().2.scalings.is_some(), alphas[0] < 8.0);
            assert_alike(&model, &stack, 2, None, tolerance);
            for gate in gates() {
                assert_alike(&model, &stack, 2, Some(&gate), tolerance);
            }
        }
    }
}

/// In bf16 both passes round, at different places. The manual pass must be about as close to f32 as the recorded
/// one.
#[test]
fn in_bf16_both_are_as_far_from_f32() {
    let (rounded, wide) = (model(Family::Qwen2, Kind::BFloat16), model(Family::Qwen2, Kind::Float));
    let adapter = adapter(&wide, &LoraConfig::default(), 3);
    let manual = |model: &Qwen| {
        let Case { batch, targets, weights, .. } = case(model, 1, None);
        model.lora_gradients(&batch, &targets, &weights, &adapter, None).unwrap().1
    };
    let (truth, found, twin) =
        (manual(&wide), manual(&rounded), recorded(&rounded, case(&rounded, 1, None), &adapter).1);
    let apart = |some: &[Tensor]| {
        let squares = some.iter().zip(&truth).map(|(a, b)| f64::try_from((a - b).square().sum(Kind::Double)).unwrap());
        squares.sum::<f64>().sqrt()
    };
    let (of_hand, of_twin) = (apart(&found), apart(&twin));
    assert!(found.iter().all(|gradient| gradient.kind() == Kind::Float));
    assert!(of_twin > 0.0 && of_hand < 1.2 * of_twin, "{of_hand} and {of_twin}");
}

#[test]
fn in_bf16_a_weight_is_not_rounded() {
    let rows = (Tensor::arange(4000, (Kind::Float, Device::Cpu)).sin() + 1.5).view([1000, 4]);
    let rows = rows.to_kind(Kind::BFloat16);
    let thirds = Tensor::full([1000], 1.0 / 3.0, (Kind::Double, Device::Cpu)); // in bf16 too large by 0.2 %
    let sum = |tensor: &Tensor| tensor.sum(Kind::Double).double_value(&[]);
    let ratio = 3.0 * sum(&weighted(&rows, &thirds).unwrap()) / sum(&rows);
    assert!((ratio - 1.0).abs() < 3e-4, "{ratio}");
}

/// Both passes count the FLOPs that the mathematics needs, in different places of the code. Attention is left out, since
/// the pass by hand has other buckets, and in the last block only queries at the places.
#[test]
fn a_profile_counts_what_the_recorded_pass_counts() {
    let model = model(Family::Qwen2, Kind::Float);
    let some = LoraConfig { target_modules: vec![Proj::V, Proj::O, Proj::Up], ..LoraConfig::default() };
    for config in [LoraConfig::default(), some] {
        let adapter = adapter(&model, &config, 1);
        // All FLOPs, and those of attention in the forward and the backward pass.
        let flops = |run: &dyn Fn()| {
            profile::start();
            run();
            let costs = profile::finish().costs;
            let of = |stage| costs.get(&(stage, Op::Attention)).map_or(0.0, |cost| cost.flops);
            (costs.values().map(|cost| cost.flops).sum::<f64>(), of(Stage::Forward), of(Stage::Backward))
        };
        let (all, forward, backward) = flops(&|| {
            let Case { batch, targets, weights, .. } = case(&model, 1, None);
            let _ = model.lora_gradients(&batch, &targets, &weights, &adapter, None).unwrap();
        });
        assert!(forward > 0.0 && (backward / forward - 2.0).abs() < 1e-12, "{forward} and {backward}");
        let (recorded, attention, _) = flops(&|| drop(recorded(&model, case(&model, 1, None), &adapter)));
        let (manual, twin) = (all - forward - backward, recorded - 3.0 * attention);
        assert!(twin > 0.0 && (manual / twin - 1.0).abs() < 1e-12, "{manual} and {twin}");
    }
}

#[test]
fn padding_is_refused() {
    let model = model(Family::Qwen2, Kind::Float);
    let adapter = adapter(&model, &LoraConfig::default(), 1);
    let batch = Batch::from_ids(&ROWS, Device::Cpu).unwrap();
    let Case { targets, weights, .. } = case(&model, 1, None);
    let error = model.lora_gradients(&batch, &targets, &weights, &adapter, None).unwrap_err();
    assert!(error.to_string().contains("expected a packed one"), "{error}");
}

/// Soft labels of three tokens for each target, of which one has no probability.
#[test]
fn the_gradients_of_soft_labels_are_the_recorded_ones() {
    let model = model(Family::Qwen2, Kind::Double);
    let adapter = adapter(&model, &LoraConfig::default(), 1);
    let soft = |case: Case| {
        let (n, d_vocab) = (case.targets.n as i64, model.config.d_vocab);
        let ids = Tensor::arange(3 * n, (Kind::Int64, Device::Cpu)).remainder(d_vocab).view([n, 3]);
        let probs = Tensor::from_slice(&[0.6, 0.3, 0.0].repeat(n as usize)).view([n, 3]);
        Case { targets: case.targets.labelled(Labels::soft(ids, probs).unwrap()).unwrap(), ..case }
    };
    let Case { batch, targets, weights, .. } = soft(case(&model, 1, None));
    let (losses, found) = model.lora_gradients(&batch, &targets, &weights, &adapter, None).unwrap();
    let (twin_losses, twin) = recorded(&model, soft(case(&model, 1, None)), &adapter);
    let apart = |a: &Tensor, b: &Tensor| f64::try_from((a - b).abs().max()).unwrap();
    assert!(apart(&losses, &twin_losses) < 1e-11);
    let hard = case(&model, 1, None);
    let (hard_losses, _) = model.lora_gradients(&hard.batch, &hard.targets, &weights, &adapter, None).unwrap();
    assert!(apart(&losses, &hard_losses) > 1e-2, "they are no tokens");
    for (found, twin) in found.iter().zip(&twin) {
        assert!(apart(found, twin) < 1e-11);
    }
}
