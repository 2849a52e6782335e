use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const ADAMW: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_slice(values)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

fn named(tensors: &[&Tensor]) -> Vec<(String, Tensor)> {
    tensors.iter().enumerate().map(|(i, tensor)| (format!("w{i}"), tensor.shallow_clone())).collect()
}

#[test]
fn adamw_is_the_published_formula() {
    let (weights, lr) = (vector(&[0.5, -2.0, 3.0]), 0.01);
    let gradients = [[0.1_f32, -0.2, 0.3], [-0.4, 0.5, 0.0], [0.2, 0.2, 0.2]];
    let mut optimizer = Optimizer::new(ADAMW, &named(&[&weights]), true).unwrap();
    let mut expected = [0.5_f64, -2.0, 3.0];
    let (mut m, mut v) = ([0.0_f64; 3], [0.0_f64; 3]);
    for (t, gradient) in (1..).zip(gradients) {
        let _ = optimizer.step(&optimizer.gather(vec![vector(&gradient)], None).unwrap(), lr, false).unwrap();
        for i in 0..3 {
            let g = f64::from(gradient[i]);
            expected[i] -= lr * 0.1 * expected[i];
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            expected[i] -= lr * (m[i] / (1.0 - 0.9_f64.powi(t))) / ((v[i] / (1.0 - 0.999_f64.powi(t))).sqrt() + 1e-8);
        }
    }
    for (found, expected) in values(&weights).into_iter().zip(expected) {
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} against {expected}"); // f32 at 3.0
    }
    let state = optimizer.state().unwrap();
    assert_eq!(state.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["w0.exp_avg", "w0.exp_avg_sq"]);
    assert!((state[1].1.double_value(&[0]) - v[0]).abs() < 1e-8);
}

#[test]
fn sgd_remembers_with_momentum_only() {
    for (momentum, expected) in [(0.0, 1.0 - 0.1 - 0.2), (0.5, 1.0 - 0.1 - (0.05 + 0.2))] {
        let weights = vector(&[1.0]);
        let mut optimizer =
            Optimizer::new(Rule::Sgd { momentum, weight_decay: 0.0 }, &named(&[&weights]), true).unwrap();
        for gradient in [1.0, 2.0] {
            let _ = optimizer.step(&optimizer.gather(vec![vector(&[gradient])], None).unwrap(), 0.1, false).unwrap();
        }
        assert!((weights.double_value(&[0]) - expected).abs() < 1e-6, "momentum {momentum}: {weights}");
        assert_eq!(optimizer.state().unwrap().is_empty(), momentum == 0.0);
    }
}

#[test]
fn signs_move_all_weights_alike() {
    let weights = vector(&[1.0, 1.0, 1.0]);
    let rule = Rule::SignSgd { weight_decay: 0.5 };
    let mut optimizer = Optimizer::new(rule, &named(&[&weights]), true).unwrap();
    let gradient = vector(&[1e-6, -300.0, -0.5]); // the last is zero with the decay
    let _ = optimizer.step(&optimizer.gather(vec![gradient], None).unwrap(), 0.25, false).unwrap();
    assert_eq!(values(&weights), [0.75, 1.25, 1.0]);
    assert!(optimizer.state().unwrap().is_empty());
}

#[test]
fn rmsprop_remembers_squares_alone() {
    let weights = vector(&[1.0]);
    let rule = Rule::RmsProp { alpha: 0.9, epsilon: 1e-8, weight_decay: 0.0 };
    let mut optimizer = Optimizer::new(rule, &named(&[&weights]), true).unwrap();
    for gradient in [2.0, -1.0] {
        let _ = optimizer.step(&optimizer.gather(vec![vector(&[gradient])], None).unwrap(), 0.1, false).unwrap();
    }
    let (first, second) = (0.1 * 4.0_f64, 0.9 * 0.4 + 0.1_f64);
    let expected = 1.0 - 0.1 * 2.0 / first.sqrt() + 0.1 / second.sqrt();
    assert!((weights.double_value(&[0]) - expected).abs() < 1e-6, "{weights} {expected}");
    assert_eq!(optimizer.state().unwrap()[0].0, "w0.exp_avg_sq");
}

#[test]
fn tensors_of_different_kinds_keep_their_places() {
    let (a, b, c) =
        (vector(&[1.0, 2.0, 3.0, 4.0]).view([2, 2]), vector(&[5.0]).to_kind(Kind::BFloat16), vector(&[6.0, 7.0]));
    let mut optimizer =
        Optimizer::new(Rule::Sgd { momentum: 0.0, weight_decay: 0.0 }, &named(&[&a, &b, &c]), true).unwrap();
    assert_eq!((values(&a), values(&b), values(&c)), (vec![1.0, 2.0, 3.0, 4.0], vec![5.0], vec![6.0, 7.0]));
    let two = vector(&[2.0]).to_kind(Kind::BFloat16);
    let gradients = vec![vector(&[1.0, 0.0, 0.0, 0.0]).view([2, 2]), two, vector(&[0.0, 3.0])];
    let changed = optimizer.step(&optimizer.gather(gradients, None).unwrap(), 1.0, true).unwrap().unwrap();
    assert_eq!((values(&a), values(&b), values(&c)), (vec![0.0, 2.0, 3.0, 4.0], vec![3.0], vec![6.0, 4.0]));
    assert_eq!((a.size(), b.kind(), changed.int64_value(&[])), (vec![2, 2], Kind::BFloat16, 3));
}

#[test]
fn small_steps_are_lost_in_bf16_without_masters() {
    let after = |masters| {
        let weights = vector(&[1.0]).to_kind(Kind::BFloat16); // its neighbours are 0.4 % away
        let mut optimizer = Optimizer::new(ADAMW, &named(&[&weights]), masters).unwrap();
        let changed: i64 = (0..20)
            .map(|_| {
                optimizer
                    .step(&optimizer.gather(vec![vector(&[1.0])], None).unwrap(), 1e-3, true)
                    .unwrap()
                    .unwrap()
                    .int64_value(&[])
            })
            .sum();
        (values(&weights)[0], changed)
    };
    assert_eq!(after(false), (1.0, 0));
    let (weight, changed) = after(true);
    assert!((weight - 0.98).abs() < 0.004, "{weight}"); // twenty steps of 1e-3 and a little decay
    assert!((4..=6).contains(&changed), "{changed}");
}

#[test]
fn long_gradients_are_shortened_and_short_ones_are_not() {
    let (a, b) = (vector(&[0.0]), vector(&[0.0]).to_kind(Kind::BFloat16));
    let optimizer = Optimizer::new(ADAMW, &named(&[&a, &b]), true).unwrap();
    let mut gradients = optimizer.gather(vec![vector(&[3.0]), vector(&[4.0])], None).unwrap();
    let norm = gradients.norm().unwrap();
    assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
    gradients.clip(10.0, norm.double_value(&[]) as f32).unwrap();
    assert!((gradients.norm().unwrap().double_value(&[]) - 5.0).abs() < 1e-6);
    gradients.clip(1.0, norm.double_value(&[]) as f32).unwrap();
    assert!((gradients.norm().unwrap().double_value(&[]) - 5.0 / (5.0 + 1e-6)).abs() < 1e-7);
}

#[test]
fn schedules_are_those_of_hugging_face() {
    let factors = |kind, warmup_steps| {
        let schedule = Schedule { kind, warmup_steps, total_steps: 10 };
        [0, 1, 2, 6, 10].map(|step| (schedule.factor(step) * 1e4).round() / 1e4)
    };
    assert_eq!(factors(ScheduleKind::Linear, 2), [0.0, 0.5, 1.0, 0.5, 0.0]);
    assert_eq!(factors(ScheduleKind::Linear, 0), [1.0, 0.9, 0.8, 0.4, 0.0]);
    assert_eq!(factors(ScheduleKind::Cosine, 2), [0.0, 0.5, 1.0, 0.5, 0.0]);
    assert_eq!(factors(ScheduleKind::Cosine, 0), [1.0, 0.9755, 0.9045, 0.3455, 0.0]);
    assert_eq!(factors(ScheduleKind::Constant, 2), [0.0, 0.5, 1.0, 1.0, 1.0]);
}

/// libtorch adds up millions of squares in one f32, whose last digits are then lost.
#[test]
fn the_norm_of_millions_of_gradients_is_that_in_f64() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let numbers: Vec<f32> = (0..4_400_000).map(|_| rng.random_range(0.0..1.0)).collect();
    let exact = numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let flat = Tensor::from_slice(&numbers);
    let norm = |flat: Vec<Tensor>| Gradients { flat }.norm().unwrap().double_value(&[]) / exact - 1.0;
    assert!(norm(vec![flat.shallow_clone()]).abs() < 2e-6, "one buffer: {}", norm(vec![flat.shallow_clone()]));
    assert!(norm(flat.split(3_000_001, 0)).abs() < 2e-6, "two buffers");
    let few = Tensor::from_slice(&[3.0_f32, 4.0]);
    assert!((Gradients { flat: vec![few] }.norm().unwrap().double_value(&[]) - 5.0).abs() < 1e-6);
}
