//! Tests of gates on the embedded random model: a gated pass equals the published ways of switching an adapter by
//! token; gradients through a gate; an adapter merged into the weights.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::ask::gradient::{at_points, gradients};
use crate::ask::score::next_token_logprobs;
use crate::laws::model_laws::{
    SUM_ORDER, answers, assert_each_is_alone, edit_at, exact, exact_model, greedy, max_diff, plain, prompts,
    recomputed, seen, world,
};
use crate::taps::edit::{Change, Edit};
use crate::{Adapter, Batch, Chat, Condition, Doses, Gate, HookPoint, KvCache, Pass, Proj, Qwen, Sequence};

/// Gates of every kind. Each acts at some tokens of the prompts and not at others.
const GATES: [&str; 12] = [
    "only:system",
    "except:entity",
    "only:\"Qwen\"#1+user.content",
    "except:\"<|im_start|>\"",
    "only:positions(0..6,-1)",
    "only:ids(151644,32)+gen",
    "only:entity*layers(0)*modules(q,k,v)",
    "except:template*layers(1)",
    "except:user*modules(mlp)*0.5",
    "only:not(asst.header)*layers(0..2)*modules(attention)*-1.5",
    "everywhere*0.25",
    "only:modules(o,down)",
];

/// The blocks and projections in which these gates depend on the token, and the dose in all others, written by hand.
fn by_hand(text: &str) -> (fn(usize, Proj) -> bool, f64) {
    match text {
        "only:entity*layers(0)*modules(q,k,v)" => (|layer, proj| layer == 0 && (proj as usize) < 3, 0.0),
        "except:template*layers(1)" => (|layer, _| layer == 1, 1.0),
        "except:user*modules(mlp)*0.5" => (|_, proj| (proj as usize) > 3, 0.5),
        "only:not(asst.header)*layers(0..2)*modules(attention)*-1.5" => {
            (|layer, proj| layer < 2 && (proj as usize) < 4, 0.0)
        }
        "only:modules(o,down)" => (|_, proj| matches!(proj, Proj::O | Proj::Down), 0.0),
        _ => (|_, _| true, 0.0),
    }
}

/// Parses a gate, with its ids replaced by ids of this model's vocabulary.
pub(crate) fn gate(chat: &Chat, text: &str) -> Gate {
    let im_start = chat.encode("<|im_start|>").unwrap()[0];
    let animal = chat.encode("a").unwrap()[0];
    text.replace("151644", &im_start.to_string()).replace("32", &animal.to_string()).parse().unwrap()
}

/// A copy of the adapter with each pair multiplied by `keep` of its block and projection.
fn part(model: &Qwen, adapter: &Adapter, keep: impl Fn(usize, Proj) -> f64) -> Adapter {
    let mut part = Adapter::empty(adapter.config.clone(), model.config.n_layers);
    for (layer, proj, pair) in adapter.pairs() {
        let factor = keep(layer, proj);
        if factor != 0.0 {
            let (a, b) = (pair.a.shallow_clone(), pair.b.shallow_clone());
            part.set(layer, proj, crate::LoraPair { a, b, scaling: pair.scaling * factor, scalings: None });
        }
    }
    part
}

/// Logits by chunked prefill without a gate: runs of tokens with the same dose are run one after another over a cache,
/// each with an adapter multiplied by that dose.
fn chunked(model: &Qwen, row: &Sequence, adapter: &Adapter, gate: &Gate, text: &str) -> Tensor {
    let states = gate.doses(row).unwrap();
    let (inside, elsewhere) = by_hand(text);
    let with = |state: f64| part(model, adapter, |layer, proj| if inside(layer, proj) { state } else { elsewhere });
    let n = row.ids.len();
    let mut cache = KvCache::new(&model.config, 1, n as i64, Kind::Float, Device::Cpu).unwrap();
    let mut chunks = Vec::new();
    let mut from = 0;
    for run in states.chunk_by(|left, right| left == right) {
        let batch = Batch::from_ids(&[&row.ids[from..from + run.len()]], Device::Cpu).unwrap();
        let adapter = with(run[0]);
        let mut pass = Pass { adapter: Some(&adapter), kv_cache: Some(&mut cache), ..Pass::default() };
        chunks.push(model.forward(&batch, &mut pass).unwrap());
        from += run.len();
    }
    assert!(chunks.len() > 1 || states.iter().all(|state| *state == states[0]));
    Tensor::cat(&chunks, 1).squeeze_dim(0)
}

#[test]
fn one_gated_pass_is_the_chunked_prefill() {
    let (model, chat, adapter) = world();
    let base = plain(&model, &prompts(&chat)[0], None);
    for text in GATES {
        let gate = gate(&chat, text);
        for prompt in &prompts(&chat)[..2] {
            let gated = seen(&model, prompt, &Condition::adapted(&adapter).gated(gate.clone()), HookPoint::Logits);
            let reference = chunked(&model, prompt, &adapter, &gate, text);
            assert!(max_diff(&gated, &reference) < SUM_ORDER, "{text}: {}", max_diff(&gated, &reference));
        }
        let gated = chunked(&model, &prompts(&chat)[0], &adapter, &gate, text);
        assert!(max_diff(&gated, &base) > 1e-3, "{text} does something");
    }
}

#[test]
fn cached_generation_is_full_recomputation_under_gates_of_every_kind() {
    let (model, chat, adapter) = world();
    let prompts = prompts(&chat);
    for text in GATES {
        let condition = Condition::adapted(&adapter).gated(gate(&chat, text));
        let answered = answers(&model, &prompts, &condition, &greedy(6), &[0; 4]);
        for (prompt, answer) in prompts.iter().zip(answered) {
            assert_eq!(answer.ids, recomputed(&model, prompt, &condition, 6), "{text}");
            let row = prompt.with_completion(&answer.ids);
            let logits = seen(&model, &row, &condition, HookPoint::Logits).log_softmax(-1, Kind::Float);
            for (k, logprob) in answer.logprobs.iter().enumerate().take(answer.ids.len()) {
                let whole = logits.double_value(&[(row.completion.start + k) as i64 - 1, answer.ids[k]]);
                assert!((whole - f64::from(*logprob)).abs() < SUM_ORDER, "{text}, token {k}: {whole} {logprob}");
            }
        }
    }
}

/// Positions from the end mean different tokens in rows of different lengths, even if the rows begin with the same
/// tokens.
#[test]
fn a_batch_of_unequal_prompts_is_each_alone_under_gates_of_every_kind() {
    let (model, chat, adapter) = world();
    let prompts = prompts(&chat);
    let shortest = prompts.iter().map(|prompt| prompt.ids.len()).min().unwrap();
    let deep = format!("only:positions(-{})", shortest - 2);
    let longest = prompts.iter().max_by_key(|prompt| prompt.ids.len()).unwrap();
    let source = seen(&model, longest, &Condition::adapted(&adapter), HookPoint::ResidPost(0));
    for text in GATES.iter().copied().chain([deep.as_str(), "except:positions(-20..-1)"]) {
        let condition = Condition::adapted(&adapter).gated(gate(&chat, text));
        let edit = Edit::add(0, &Tensor::ones([model.config.d_model], (Kind::Float, Device::Cpu)), 1.0)
            .at_tokens(Some("positions(-20..-10)".parse().unwrap()));
        let patch = Change::Patch(source.shallow_clone());
        let patch = edit_at(HookPoint::ResidPost(0), "sys.content+positions(-9..0)", patch);
        let level = edit_at(HookPoint::AttnScores(1), "", Change::Zero);
        // A condition with an edit of attention scores is run padded, with all its edits.
        let padded = vec![edit.clone(), patch.clone(), level];
        let edits = [vec![edit, patch], padded].map(|edits| Condition { edits, ..condition.clone() });
        for condition in [condition].into_iter().chain(edits) {
            assert_each_is_alone(&model, &prompts, &condition, text);
        }
    }
}

/// The summed −log p of a row's completion and the gradients of an adapter's tensors under a gate.
fn lora_gradients(model: &Qwen, row: &Sequence, adapter: &Adapter, gate: &Gate) -> Vec<(String, Tensor)> {
    let asking = |(name, tensor): (String, Tensor)| (name, tensor.set_requires_grad(true));
    let (names, tensors): (Vec<String>, Vec<Tensor>) = adapter.parameters().into_iter().map(asking).unzip();
    let doses = gate.spread(&[gate.doses(row).unwrap()], Device::Cpu).unwrap();
    let found = gradients(&loss_under(model, row, adapter, doses), &tensors, false).unwrap();
    for tensor in &tensors {
        let _ = tensor.set_requires_grad(false);
    }
    names.into_iter().zip(found).collect()
}

/// The summed −log p of a row's completion under an adapter with some doses.
fn loss_under(model: &Qwen, row: &Sequence, adapter: &Adapter, doses: Doses) -> Tensor {
    let batch = Batch::of(&[row], Device::Cpu).unwrap();
    let pass = &mut Pass { adapter: Some(adapter), doses: Some(doses), ..Pass::default() };
    completion_loss(&model.forward(&batch, pass).unwrap(), row)
}

pub(crate) fn completion_loss(logits: &Tensor, row: &Sequence) -> Tensor {
    let (start, n) = (row.completion.start as i64, row.completion.len() as i64);
    let logprobs = logits.squeeze_dim(0).log_softmax(-1, logits.kind()).narrow(0, start - 1, n);
    let labels = Tensor::from_slice(&row.ids[row.completion.clone()]);
    -logprobs.gather(1, &labels.unsqueeze(1), false).sum(logits.kind())
}

#[test]
fn gradients_are_zero_where_the_gate_is_and_whole_where_it_is_one() {
    let (model, chat, adapter) = world();
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap();
    let of = |text: &str| lora_gradients(&model, &row, &adapter, &gate(&chat, text));
    let (whole, ones) = (of("everywhere"), of("only:system+user+assistant"));
    assert!(whole.iter().all(|(_, gradient)| gradient.abs().max().double_value(&[]) > 0.0));
    for ((name, whole), (_, ones)) in whole.iter().zip(&ones) {
        assert_eq!(whole, ones, "{name}: a gate of ones is no gate, bit for bit");
    }
    // The gradient is exactly zero outside the gate's block and projections, and not zero inside.
    for (name, gradient) in of("only:user.content*layers(0)*modules(q,down)") {
        let inside = name.contains("layers.0.") && (name.contains("q_proj") || name.contains("down_proj"));
        assert_eq!(gradient.abs().max().double_value(&[]) > 0.0, inside, "{name}");
    }
    for (name, gradient) in of("everywhere*0") {
        assert_eq!(gradient.abs().max().double_value(&[]), 0.0, "{name}");
    }
    // If the gate acts only after the tokens of the loss, the adapter has no gradient.
    let last = row.with_completion(&row.ids[row.completion.start..=row.completion.start]);
    for (name, gradient) in lora_gradients(&model, &last, &adapter, &gate(&chat, "only:gen")) {
        assert_eq!(gradient.abs().max().double_value(&[]), 0.0, "{name}");
    }
}

/// The gradient of a LoRA is a sum over tokens: ∇B = s Σ g δ (A x)ᵀ, ∇A = s Σ g (Bᵀ δ) xᵀ, with x the input and δ the
/// gradient at the output of its projection (4.12 of Nief et al. 2026 takes norms of such sums).
#[test]
fn the_gradients_of_single_tokens_add_up_to_the_whole() {
    use HookPoint::{Ln1Normalized, MlpOut, MlpPost, Q};
    let (model, chat, adapter) = world();
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480, 12, 7").unwrap()).unwrap();
    let weights: BTreeMap<String, Tensor> = model.parameters().into_iter().collect();
    for text in ["everywhere", "except:entity*0.5", "only:user.content+gen"] {
        let gate = gate(&chat, text);
        let whole: BTreeMap<String, Tensor> = lora_gradients(&model, &row, &adapter, &gate).into_iter().collect();
        let doses = Tensor::from_slice(&gate.doses(&row).unwrap()).unsqueeze(1); // [pos, 1]
        for layer in 0..model.config.n_layers {
            let points = [Ln1Normalized(layer), Q(layer), MlpPost(layer), MlpOut(layer)];
            let condition = Condition::adapted(&adapter).gated(gate.clone());
            let found =
                at_points(&model, &row, &condition, &points, |logits| Ok(completion_loss(logits, &row))).unwrap();
            let of = |map: &BTreeMap<HookPoint, Tensor>, at: HookPoint| map[&at].flatten(2, -1).squeeze_dim(0); // [pos, width]
            let norm = &weights[&format!("model.layers.{layer}.input_layernorm.weight")];
            let places = [
                (Proj::Q, of(&found.activations, points[0]).flatten(1, -1) * norm, of(&found.gradients, points[1])),
                (Proj::Down, of(&found.activations, points[2]), of(&found.gradients, points[3])),
            ];
            for (proj, x, delta) in places {
                let pair = adapter.pair(layer, proj).unwrap();
                let (mut of_a, mut of_b) = (pair.a.zeros_like(), pair.b.zeros_like());
                for pos in 0..row.ids.len() as i64 {
                    let (x, delta) = (x.get(pos), delta.get(pos));
                    let factor = pair.scaling * doses.double_value(&[pos, 0]);
                    of_b += delta.outer(&pair.a.mv(&x)) * factor;
                    of_a += pair.b.tr().mv(&delta).outer(&x) * factor;
                }
                let stem = format!("base_model.model.model.layers.{layer}.{}", proj.path());
                for (side, sum) in [("lora_A", of_a), ("lora_B", of_b)] {
                    let whole = &whole[&format!("{stem}.{side}.weight")];
                    let scale = whole.abs().max().double_value(&[]);
                    assert!(scale > 0.0 && max_diff(&sum, whole) < SUM_ORDER * scale, "{text} {stem} {side}");
                }
            }
        }
    }
}

/// Central differences in f64, where rounding leaves 1e-10 of them.
#[test]
fn the_gradients_of_a_gated_lora_are_finite_differences() {
    let (_, chat, adapter) = world();
    let model = exact_model();
    let exact = exact(&adapter);
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480").unwrap()).unwrap();
    for text in ["everywhere", "except:entity*0.5", "only:user+gen*layers(0)*modules(v,down)*-2"] {
        let gate = gate(&chat, text);
        let doses = gate.doses(&row).unwrap();
        let loss = || {
            let doses = gate.spread(std::slice::from_ref(&doses), Device::Cpu).unwrap();
            loss_under(&model, &row, &exact, doses).double_value(&[])
        };
        let mut compared = 0;
        for (name, gradient) in lora_gradients(&model, &row, &exact, &gate) {
            if !(name.contains("layers.0") && (name.contains("v_proj") || name.contains("down_proj"))) {
                continue;
            }
            let parameter = exact.parameters().into_iter().find(|(known, _)| *known == name).unwrap().1;
            let flat = parameter.view([-1]);
            for at in [0, flat.size()[0] / 2, flat.size()[0] - 1] {
                let entry = flat.narrow(0, at, 1);
                let (value, step) = (entry.double_value(&[0]), 1e-5);
                let at_value = |value: f64| {
                    let _ = entry.shallow_clone().fill_(value);
                    loss()
                };
                let slope = (at_value(value + step) - at_value(value - step)) / (2.0 * step);
                let _ = entry.shallow_clone().fill_(value);
                let ours = gradient.view([-1]).double_value(&[at]);
                assert!((ours - slope).abs() < 1e-7 * slope.abs().max(1e-2), "{text} {name} {at}: {ours} {slope}");
                compared += usize::from(slope.abs() > 1e-6);
            }
        }
        assert!(compared > 6, "{text}: {compared} slopes are not zero");
    }
}

/// The gate is a factor in the graph, so the loss has a derivative by the dose. This uses f64: on some processors a
/// difference of losses in f32 is only rounding.
#[test]
fn the_dose_has_a_gradient() {
    let (_, chat, adapter) = world();
    let model = exact_model();
    let adapter = exact(&adapter);
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480").unwrap()).unwrap();
    let loss = |doses: Tensor| loss_under(&model, &row, &adapter, Doses::of_tokens(doses));
    let doses = Tensor::full([1, row.ids.len() as i64, 1], 0.5, (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let gradient = gradients(&loss(doses.shallow_clone()), &[&doses], false).unwrap().remove(0);
    for pos in [0, 7, row.ids.len() as i64 - 3] {
        let step = doses.detach().zeros_like();
        let _ = step.narrow(1, pos, 1).fill_(1e-4);
        let moved = |sign: f64| loss(doses.detach() + &step * sign).double_value(&[]);
        let (slope, by_hand) = (gradient.double_value(&[0, pos, 0]), (moved(1.0) - moved(-1.0)) / 2e-4);
        assert!((slope - by_hand).abs() < 1e-6 * (1e-2 + slope.abs()), "position {pos}: {slope} {by_hand}");
    }
}

#[test]
fn a_gate_that_hits_nothing_of_the_adapter_is_an_error() {
    let (model, chat, adapter) = world();
    let prompt = &prompts(&chat)[..1];
    let refused = |adapter: &Adapter, text: &str| {
        let condition = Condition::adapted(adapter).gated(text.parse().unwrap());
        next_token_logprobs(&model, prompt, &condition).unwrap_err().to_string()
    };
    let n = model.config.n_layers;
    let message = refused(&adapter, &format!("only:entity*layers(0..{})", n + 1));
    assert!(message.starts_with(&format!("block {n} of gate only:entity*layers(0..{})", n + 1)), "{message}");
    let only_q = part(&model, &adapter, |_, proj| f64::from(u8::from(proj == Proj::Q)));
    let message = refused(&only_q, "except:entity*modules(v,mlp)");
    assert!(message.ends_with("is none, expected at least one of its pairs, which are at q_proj"), "{message}");
}

#[test]
fn merged_weights_are_the_adapter() {
    let (_, chat, adapter) = world();
    let model = exact_model();
    let adapter = part(&model, &exact(&adapter), |_, proj| if proj == Proj::V { 0.0 } else { 1.7 });
    let prompt = &prompts(&chat)[0];
    let merged = model.merged(&adapter).unwrap();
    let apart = max_diff(&plain(&merged, prompt, None), &plain(&model, prompt, Some(&adapter)));
    assert!(apart < 1e-12, "in f64, where nothing but the order of sums is left: {apart}");
    assert!(max_diff(&plain(&merged, prompt, None), &plain(&model, prompt, None)) > 1e-2);
    let (ours, theirs) = (merged.parameters(), model.parameters());
    assert!(ours.iter().zip(&theirs).all(|(ours, theirs)| ours.0 == theirs.0));
}
