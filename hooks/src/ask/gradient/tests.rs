use tch::Device;

use super::*;
use crate::Proj;
use crate::adapter::lora::LoraPair;
use crate::laws::gate_laws::{completion_loss, gate};
use crate::laws::model_laws::{exact, exact_model, world};

/// The squared norms of a loss's gradients, from separate passes over the row and at the adapter's own tensors.
fn plainly(model: &Qwen, row: &Sequence, condition: &Condition<'_>, loss: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let parameters = condition.adapter.map_or_else(Vec::new, Adapter::parameters);
    for (_, tensor) in &parameters {
        let _ = tensor.set_requires_grad(true);
    }
    let doses = condition.gate.spread(&[condition.gate.doses(row).unwrap()], Device::Cpu).unwrap();
    let points: Vec<HookPoint> = (0..model.config.n_layers).map(HookPoint::ResidPost).collect();
    let mut watch = Watch { wanted: points.iter().copied().collect(), cache: Cache::default() };
    let hooks = crate::Hooks::default().on(points.iter().copied().chain([HookPoint::Embed]), &mut watch);
    let mut pass = Pass { adapter: condition.adapter, doses: Some(doses), hooks, ..Pass::default() };
    let logits = model.forward(&Batch::of(&[row], Device::Cpu).unwrap(), &mut pass).unwrap();
    let of_one = |k: &usize| {
        let at = row.completion.start + k;
        completion_loss(&logits, &Sequence { completion: at..at + 1, ..row.clone() })
    };
    let loss = loss.iter().map(of_one).reduce(|sum, loss| sum + loss).unwrap();
    let seen = points.iter().map(|point| watch.cache.get(*point).unwrap().shallow_clone());
    let inputs: Vec<Tensor> = parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).chain(seen).collect();
    let squares = gradients(&loss, &inputs, false).unwrap().into_iter();
    let mut squares: Vec<f64> =
        squares.map(|gradient| gradient.to_kind(Kind::Double).square().sum(None).double_value(&[])).collect();
    for (_, tensor) in &parameters {
        let _ = tensor.set_requires_grad(false);
    }
    let resid_post = squares.split_off(parameters.len());
    (squares, resid_post)
}

#[test]
fn the_gradients_of_losses_are_those_of_each_alone() {
    let (model, chat, adapter) = world();
    let (exact_model, row) =
        (exact_model(), chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap());
    let exact = exact(&adapter);
    let mut losses: Vec<Vec<usize>> = (0..row.completion.len()).map(|k| vec![k]).collect();
    losses.push(vec![3, 0, 1]);
    for (model, adapter, tolerance) in [(&model, &adapter, 1e-4), (&exact_model, &exact, 1e-11)] {
        for condition in [
            Condition::adapted(adapter),
            Condition::adapted(adapter).gated(gate(&chat, "except:entity*0.5")),
            Condition::adapted(adapter).gated(gate(&chat, "only:user+gen*layers(1)*modules(v,down)")),
            Condition::default(),
        ] {
            let twins: Vec<_> = losses.iter().map(|loss| plainly(model, &row, &condition, loss)).collect();
            for at_a_time in [0, 1, 4, 100] {
                let mut seen = 0;
                let mut compare = |found: OfLosses| {
                    let Squares { adapter, resid_post } = found.squares()?;
                    for (at, (of_adapter, of_resid)) in twins[found.losses.clone()].iter().enumerate() {
                        let twin = of_adapter.iter().chain(of_resid);
                        let (n, mut compared) = (adapter.len() + resid_post.len(), 0);
                        for (place, (ours, twin)) in adapter.iter().chain(&resid_post).zip(twin).enumerate() {
                            let apart = (ours[at] - twin).abs();
                            let (text, loss) = (condition.gate.to_string(), &losses[found.losses.start + at]);
                            assert!(
                                apart <= tolerance * twin,
                                "{text}, {at_a_time} at a time, {loss:?}, {place}: {} {twin}",
                                ours[at]
                            );
                            compared += usize::from(*twin > 0.0);
                        }
                        assert!(compared >= 2, "{compared} of {n} are not zero");
                        seen += 1;
                    }
                    Ok(())
                };
                if at_a_time == 0 {
                    recorded(model, &row, &condition, &losses, &mut compare).unwrap();
                } else {
                    manual_backward(model, &row, &condition, &losses, at_a_time, &mut compare).unwrap();
                }
                assert_eq!(seen, losses.len());
            }
        }
    }
    assert!(adapter.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
}

/// The adapter's gradient, position by position, from each map's input and the gradient at its output.
#[test]
fn a_parts_gradient_is_the_sum_over_its_positions() {
    let (model, (_, chat, adapter)) = (exact_model(), world());
    let adapter = exact(&adapter);
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap();
    let n_tokens = row.ids.len();
    // Parts take turns, so that each has positions of the prompt and of the completion.
    let part_of = |t: usize| t % 3;
    let batch = Batch::packed(&[&[PackedRow::of(&row.ids)]], true, Device::Cpu).unwrap();
    let mask: Vec<bool> = (0..n_tokens).map(|t| row.completion.contains(&t)).collect();
    let targets = Targets::of(&batch, &[&row.ids], &[&mask]).unwrap();
    let ones = Tensor::ones([targets.n as i64], (Kind::Double, Device::Cpu));
    let parts = Tensor::zeros([3, n_tokens as i64], (Kind::Double, Device::Cpu));
    for t in 0..n_tokens {
        let _ = parts.get(part_of(t) as i64).get(batch.place(0, t)).fill_(1.0);
    }
    let found = model.lora_gradients_by_part(&batch, &targets, &ones, &adapter, &parts).unwrap();
    let whole = model.lora_gradients(&batch, &targets, &ones, &adapter, None).unwrap().1;

    let layers = 0..model.config.n_layers;
    let given_and_gives = |layer: usize, proj: Proj| match proj {
        Proj::Q => (HookPoint::Ln1Normalized(layer), HookPoint::Q(layer)),
        Proj::K => (HookPoint::Ln1Normalized(layer), HookPoint::K(layer)),
        Proj::V => (HookPoint::Ln1Normalized(layer), HookPoint::V(layer)),
        Proj::O => (HookPoint::Z(layer), HookPoint::AttnOut(layer)),
        Proj::Gate => (HookPoint::Ln2Normalized(layer), HookPoint::MlpPre(layer)),
        Proj::Up => (HookPoint::Ln2Normalized(layer), HookPoint::MlpPreLinear(layer)),
        Proj::Down => (HookPoint::MlpPost(layer), HookPoint::MlpOut(layer)),
    };
    let points: BTreeSet<HookPoint> = layers
        .flat_map(|layer| Proj::ALL.map(|proj| given_and_gives(layer, proj)))
        .flat_map(|(given, gives)| [given, gives])
        .collect();
    let points: Vec<HookPoint> = points.into_iter().collect();
    let seen =
        at_points(&model, &row, &Condition::adapted(&adapter), &points, |logits| Ok(completion_loss(logits, &row)))
            .unwrap();
    let flat = |x: &Tensor| x.squeeze_dim(0).flatten(1, -1);
    for (at, (layer, proj, pair)) in adapter.pairs().enumerate() {
        let (given, gives) = given_and_gives(layer, proj);
        let (x, delta) = (flat(&seen.activations[&given]), flat(&seen.gradients[&gives]));
        let name = match given {
            HookPoint::Ln1Normalized(_) => Some("input_layernorm"),
            HookPoint::Ln2Normalized(_) => Some("post_attention_layernorm"),
            _ => None,
        };
        let x = name.map_or(x.shallow_clone(), |name| {
            let name = format!("model.layers.{layer}.{name}.weight");
            x * model.parameters().into_iter().find(|(known, _)| *known == name).unwrap().1
        });
        for part in 0..3 {
            let here: Vec<i64> = (0..n_tokens as i64).filter(|t| part_of(*t as usize) == part).collect();
            let here = Tensor::from_slice(&here);
            let (x, delta) = (x.index_select(0, &here), delta.index_select(0, &here));
            let of_b = delta.tr().matmul(&x.matmul(&pair.a.tr())) * pair.scaling;
            let of_a = delta.matmul(&pair.b).tr().matmul(&x) * pair.scaling;
            for (tensor, twin) in [(2 * at, of_a), (2 * at + 1, of_b)] {
                let (ours, largest) = (found[tensor].get(part as i64), whole[tensor].abs().max().double_value(&[]));
                let apart = (&ours - &twin).abs().max().double_value(&[]);
                assert!(largest > 0.0 && apart < 1e-10 * largest, "{layer} {proj} part {part}: {apart} of {largest}");
            }
        }
    }
    for (found, whole) in found.iter().zip(&whole) {
        let apart = (found.sum_dim_intlist(0, false, Kind::Double) - whole).abs().max().double_value(&[]);
        assert!(apart < 1e-12 * (1.0 + whole.abs().max().double_value(&[])), "{apart}");
    }
    let short = parts.narrow(1, 0, 2);
    let error = model.lora_gradients_by_part(&batch, &targets, &ones, &adapter, &short).unwrap_err();
    assert!(error.to_string().starts_with("the parts of a gradient is"), "{error}");
}

#[test]
fn log_probabilities_are_those_of_the_losses_tokens_in_order() {
    let (model, chat, adapter) = world();
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap();
    let batch = Batch::of(&[&row], Device::Cpu).unwrap();
    let logits = model.forward(&batch, &mut Pass { adapter: Some(&adapter), ..Pass::default() }).unwrap();
    let whole = logits.squeeze_dim(0).log_softmax(-1, Kind::Float);
    let losses = [vec![2], vec![4, 1], vec![0]];
    for at_a_time in [0, 1, 2] {
        let mut found = vec![];
        let condition = Condition::adapted(&adapter);
        let mut keep = |some: OfLosses| {
            found.push(some.logprobs);
            Ok(())
        };
        if at_a_time == 0 {
            recorded(&model, &row, &condition, &losses, &mut keep).unwrap();
        } else {
            manual_backward(&model, &row, &condition, &losses, at_a_time, &mut keep).unwrap();
        }
        let found = Tensor::cat(&found, 0);
        for (at, k) in [2, 4, 1, 0].into_iter().enumerate() {
            let expected = whole.get((row.completion.start + k) as i64 - 1);
            assert!(
                crate::laws::model_laws::max_diff(&found.get(at as i64), &expected)
                    < crate::laws::model_laws::SUM_ORDER,
                "{at_a_time}, {k}"
            );
        }
    }
}

#[test]
fn tokens_that_there_are_not_are_refused() {
    let (model, chat, adapter) = world();
    let row = chat.row(None, "Go on", &chat.encode("480").unwrap()).unwrap();
    let n = row.completion.len();
    for (losses, found) in
        [(vec![vec![0], vec![n]], format!("loss 1 of a row is [{n}]")), (vec![vec![]], "loss 0 of a row is []".into())]
    {
        let error = of_losses(&model, &row, &Condition::adapted(&adapter), &losses, &mut |_| Ok(())).unwrap_err();
        assert!(error.to_string().starts_with(&found), "{error}");
    }
}

#[test]
fn losses_share_a_pass_as_memory_allows() {
    // 2²⁵ numbers that take no memory; the gradients of two losses are 2²⁶.
    let mut large = Adapter::empty(crate::LoraConfig::default(), 1);
    let half = || Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand([1 << 12, 1 << 12], false);
    large.set(0, Proj::Q, LoraPair { a: half(), b: half(), scaling: 1.0, scalings: None });
    assert_eq!([None, Some(&large)].map(|adapter| losses_at_a_time(100, adapter)), [40, 2]);
    assert_eq!(losses_at_a_time(5000, None), 1);
}
