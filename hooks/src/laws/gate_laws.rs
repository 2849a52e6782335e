//! Tests of gates and edits on the embedded random model: a gated pass equals the published ways of switching an
//! adapter by token; gradients through a gate; interventions; positions of tokens while decoding.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::ask::condition::run_with_hooks;
use crate::ask::generate::generate_with_hooks;
use crate::ask::gradient::{at_points, gradients};
use crate::ask::score::{completion_argmax, completion_logprobs, next_token_logprobs, resid_post};
use crate::laws::model_laws::{
    SUM_ORDER, answers, assert_each_is_alone, exact, exact_model, greedy, max_diff, plain, prompts, recomputed, seen,
    with_edit, world,
};
use crate::taps::cache::Cache;
use crate::taps::edit::{Change, Edit};
use crate::{
    Adapter, Batch, Chat, Condition, Doses, Gate, HookPoint, Hooks, KvCache, Pass, Proj, Qwen, Result, Sequence, Tap,
    Tokens,
};

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

/// A pass runs rows with a common beginning as one tree. An edit can act on a token of that beginning in one row only.
#[test]
fn rows_that_begin_alike_are_each_alone_under_edits_of_every_kind() {
    let (model, chat, adapter) = world();
    each_is_alone_under_edits(&model, &chat, &adapter, SUM_ORDER);
    // In f64 the order of sums has no visible effect.
    let exact_model = exact_model();
    each_is_alone_under_edits(&exact_model, &chat, &exact(&exact_model, &adapter), HANDED_ON_AS_F32);
}

/// Half a unit in the last place of an f32, the kind in which an f64 model's results are returned.
const HANDED_ON_AS_F32: f64 = 6e-8;

/// An edit made from its parts. An empty `tokens` means all tokens.
fn edit_at(at: HookPoint, tokens: &str, change: Change) -> Edit {
    Edit { at, tokens: (!tokens.is_empty()).then(|| tokens.parse().unwrap()), change }
}

/// Rows run together give each row's own results. `bound` is relative to the residual stream's largest magnitude, or
/// absolute if that is below 1.
fn each_is_alone_under_edits(model: &Qwen, chat: &Chat, adapter: &Adapter, bound: f64) {
    use HookPoint::{Embed, MlpOut, Pattern, ResidMid, ResidPost, RotK};
    let prompts = prompts(chat);
    let completions = ["owl", "owls", "owl, cat", "a", "7, 8, 9"].map(|text| chat.encode(text).unwrap());
    let rows: Vec<Sequence> = prompts
        .iter()
        .flat_map(|prompt| completions.iter().map(|completion| prompt.with_completion(completion)))
        .collect();
    let longest = prompts.iter().max_by_key(|prompt| prompt.ids.len()).unwrap();
    let source = seen(model, longest, &Condition::adapted(adapter), ResidPost(0));
    let vector = Tensor::arange(model.config.d_model, (model.kind(), Device::Cpu)) / 20.0 - 0.4;
    let add = || Change::Add { vector: vector.shallow_clone(), coefficient: 2.0 };
    let deep = |row: &Sequence| "positions(-12..-1)".parse::<Tokens>().unwrap().among(row, &"the test").unwrap();
    let edited_apart = |a: &Sequence, b: &Sequence| {
        let shared = a.ids.iter().zip(&b.ids).take_while(|(a, b)| a == b).count();
        deep(a)[..shared] != deep(b)[..shared]
    };
    assert!(
        rows.iter().any(|a| edited_apart(a, &rows[0])),
        "some token that rows share is edited in one of them alone"
    );
    let along = || Edit::patch_along(0, &vector, &source);
    let sets = [
        vec![edit_at(ResidMid(1), "", add())],
        vec![edit_at(ResidPost(0), "positions(-12..-1)", add())],
        vec![edit_at(Embed, "gen", Change::Scale(0.5)), edit_at(MlpOut(0), "", Change::Zero)],
        vec![along()],
        vec![along(), edit_at(ResidPost(0), "positions(-3..0)", Change::ProjectOut(vector.shallow_clone()))],
        vec![edit_at(RotK(1), "\"Qwen\"", Change::Scale(0.5)), edit_at(Pattern(0), "", Change::Scale(0.5))],
    ];
    for edits in sets {
        let name = format!("{edits:?}");
        let condition = Condition { edits, ..Condition::adapted(adapter).gated(gate(chat, "except:entity")) };
        let scores = completion_logprobs(model, &rows, &condition).unwrap();
        let resid = resid_post(model, &rows, &condition).unwrap();
        for ((row, scores), resid) in rows.iter().zip(scores).zip(resid) {
            let logits = seen(model, row, &condition, HookPoint::Logits).log_softmax(-1, model.kind());
            for (at, score) in row.completion.clone().zip(scores) {
                let alone = logits.double_value(&[at as i64 - 1, row.ids[at]]);
                let apart = (f64::from(score) - alone).abs();
                assert!(apart < SUM_ORDER * alone.abs().max(1.0), "{name}: {score} is {alone} alone");
            }
            let alone = seen(model, row, &condition, ResidPost(1));
            let (apart, largest) = (max_diff(&resid.get(1), &alone), alone.abs().max().double_value(&[]));
            assert!(apart < bound * largest.max(1.0), "{name}: {apart:e} apart, the largest is {largest}");
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
    let exact = exact(&model, &adapter);
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
    let adapter = exact(&model, &adapter);
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
    let adapter = part(&model, &exact(&model, &adapter), |_, proj| if proj == Proj::V { 0.0 } else { 1.7 });
    let prompt = &prompts(&chat)[0];
    let merged = model.merged(&adapter).unwrap();
    let apart = max_diff(&plain(&merged, prompt, None), &plain(&model, prompt, Some(&adapter)));
    assert!(apart < 1e-12, "in f64, where nothing but the order of sums is left: {apart}");
    assert!(max_diff(&plain(&merged, prompt, None), &plain(&model, prompt, None)) > 1e-2);
    let (ours, theirs) = (merged.parameters(), model.parameters());
    assert!(ours.iter().zip(&theirs).all(|(ours, theirs)| ours.0 == theirs.0));
}

/// The activation after an edit at one token.
type Expected<'a> = Box<dyn Fn(&Tensor) -> Tensor + 'a>;

/// The activation at an edit's hook point without and with the edit, `[pos, ..]`.
fn edited(model: &Qwen, prompt: &Sequence, at: HookPoint, edit: Edit) -> (Tensor, Tensor) {
    (seen(model, prompt, &Condition::default(), at), seen(model, prompt, &with_edit(edit), at))
}

#[test]
fn every_kind_of_edit_does_what_it_says_at_its_tokens_and_nothing_elsewhere() {
    use HookPoint::{AttnOut, Embed, MlpPost, Pattern, Q, ResidMid, Z};
    let (model, chat, _) = world();
    let prompt = &prompts(&chat)[0];
    let tokens = "\"Qwen\"";
    let chosen = format!("only:{tokens}").parse::<Gate>().unwrap().acts(prompt).unwrap();
    assert_eq!(chosen.iter().filter(|chosen| **chosen).count(), 2, "Q and wen");
    for at in [Embed, Q(0), Z(1), AttnOut(0), ResidMid(1), MlpPost(1), Pattern(1)] {
        let before = seen(&model, prompt, &Condition::default(), at);
        let by_token = |x: &Tensor| if at == Pattern(1) { x.transpose(0, 1) } else { x.shallow_clone() };
        let like = by_token(&before).get(0);
        let value = Tensor::arange(like.numel() as i64, (Kind::Float, Device::Cpu)).view_as(&like) / 100.0 - 0.3;
        let unit = &value / value.norm();
        let along = |x: &Tensor| (x * &unit).sum(Kind::Float) * &unit;
        let mut kinds: Vec<(Change, Expected<'_>)> =
            vec![(Change::Zero, Box::new(Tensor::zeros_like)), (Change::Scale(-2.0), Box::new(|x| x * -2.0))];
        if at != Pattern(1) {
            let more: [(Change, Expected<'_>); 3] = [
                (Change::Replace(value.shallow_clone()), Box::new(|_| value.shallow_clone())),
                (Change::Add { vector: value.shallow_clone(), coefficient: 1.5 }, Box::new(|x| x + &value * 1.5)),
                (Change::ProjectOut(&value * 7.0), Box::new(|x| x - along(x))),
            ];
            kinds.extend(more);
        }
        for (change, expected) in kinds {
            let name = format!("{at} {change:?}");
            let edit = Edit { at, tokens: Some(tokens.parse().unwrap()), change };
            let (before, after) = edited(&model, prompt, at, edit);
            let (before, after) = (by_token(&before), by_token(&after));
            for (pos, chosen) in chosen.iter().enumerate() {
                let (before, after) = (before.get(pos as i64), after.get(pos as i64));
                if *chosen {
                    assert!(max_diff(&after, &expected(&before)) < SUM_ORDER, "{name} at {pos}");
                    assert!(max_diff(&after, &before) > 1e-4, "{name} at {pos} changes something");
                } else {
                    assert_eq!(after, before, "{name} at {pos}: untouched, bit for bit");
                }
            }
        }
    }
}

#[test]
fn a_patch_is_what_the_other_run_had() {
    let (model, chat, adapter) = world();
    let (prompt, other) = (&prompts(&chat)[0], chat.prompt(None, "Name an animal!").unwrap());
    assert_eq!(prompt.ids.len(), other.ids.len(), "of equal length");
    let last = HookPoint::ResidPost(model.config.n_layers - 1);
    let source = seen(&model, &other, &Condition::adapted(&adapter), last);
    let logits = |at: HookPoint, tokens: &str, source: &Tensor| {
        let patched = with_edit(edit_at(at, tokens, Change::Patch(source.shallow_clone())));
        seen(&model, prompt, &patched, HookPoint::Logits)
    };
    assert_eq!(logits(last, "", &source), plain(&model, &other, Some(&adapter)), "the whole stream is the other run");
    // One token is patched: the tokens before it keep their activations, that token has the other run's.
    let pos = prompt.ids.len() as i64 - 4;
    let patched = logits(last, "positions(-4)", &source);
    assert_eq!(patched.narrow(0, 0, pos), plain(&model, prompt, None).narrow(0, 0, pos));
    assert_eq!(patched.get(pos), plain(&model, &other, Some(&adapter)).get(pos));
    // A patch from the same run changes nothing.
    let own = seen(&model, prompt, &Condition::default(), HookPoint::Z(0));
    assert_eq!(logits(HookPoint::Z(0), "user", &own), plain(&model, prompt, None));
    let short = with_edit(edit_at(last, "", Change::Patch(source.narrow(0, 0, 3))));
    let message = next_token_logprobs(&model, std::slice::from_ref(prompt), &short).unwrap_err().to_string();
    assert!(message.contains("expected one of 0 to 2, the positions that the other run has"), "{message}");
}

#[test]
fn a_patch_along_a_direction_is_the_other_run_there_and_the_own_elsewhere() {
    let (model, chat, adapter) = world();
    let (prompt, other) = (&prompts(&chat)[0], chat.prompt(None, "Name an animal!").unwrap());
    let at = HookPoint::ResidPost(0);
    let direction = Tensor::arange(model.config.d_model, (Kind::Float, Device::Cpu)) / 20.0 - 0.4;
    let unit = &direction / direction.norm();
    let source = seen(&model, &other, &Condition::adapted(&adapter), at);
    let edit = Edit::patch_along(0, &direction, &source);
    let (before, after) = edited(&model, prompt, at, edit);
    let along = |x: &Tensor| x.matmul(&unit);
    assert!(max_diff(&along(&after), &along(&source)) < SUM_ORDER, "along it, the other run");
    assert!(max_diff(&along(&before), &along(&source)) > 1e-3);
    let rest = |x: &Tensor| x - along(x).unsqueeze(-1) * &unit;
    assert!(max_diff(&rest(&after), &rest(&before)) < SUM_ORDER, "else the own");
    // A patch from zeros takes the direction out.
    let (_, none) = edited(&model, prompt, at, Edit::patch_along(0, &direction, &source.zeros_like()));
    let (_, out) = edited(&model, prompt, at, Edit::project_out(0, &direction));
    assert!(max_diff(&none, &out) < SUM_ORDER);
    let short = with_edit(Edit::patch_along(0, &direction.narrow(0, 0, 3), &source));
    let message = next_token_logprobs(&model, std::slice::from_ref(prompt), &short).unwrap_err().to_string();
    assert!(message.contains("the direction to patch along"), "{message}");
}

#[test]
fn cached_generation_is_full_recomputation_under_edits_of_every_kind() {
    let (model, chat, adapter) = world();
    let prompts = prompts(&chat);
    let width = model.config.d_model;
    let vector = Tensor::arange(width, (Kind::Float, Device::Cpu)) / 20.0 - 0.4;
    let comma = chat.encode(",").unwrap()[0];
    let said = answers(&model, &prompts, &Condition::adapted(&adapter), &greedy(6), &[0; 4]);
    let said: Vec<i64> = said.into_iter().flat_map(|answer| answer.ids).collect();
    let spoken = format!("not(ids({},{},{comma}))", said[0], said[3]);
    let mlp_out = HookPoint::MlpOut(0);
    let edits = [
        edit_at(mlp_out, "", Change::Zero),
        edit_at(mlp_out, "gen", Change::Replace(vector.shallow_clone())),
        edit_at(HookPoint::ResidMid(1), &spoken, Change::Add { vector: vector.shallow_clone(), coefficient: 2.0 }),
        edit_at(HookPoint::ResidPost(0), "not(positions(3..9))", Change::ProjectOut(vector.shallow_clone())),
        edit_at(HookPoint::RotK(1), "\"Qwen\"", Change::Scale(0.5)),
        edit_at(HookPoint::Pattern(0), "gen+asst.nl", Change::Scale(0.5)),
        edit_at(HookPoint::AttnScores(0), "", Change::Zero),
        edit_at(HookPoint::AttnScores(1), "gen+user", Change::Scale(-0.5)),
    ];
    for edit in edits {
        let name = format!("{edit:?}");
        let condition = Condition { edits: vec![edit], ..Condition::adapted(&adapter) };
        for (prompt, answer) in prompts.iter().zip(answers(&model, &prompts, &condition, &greedy(6), &[0; 4])) {
            assert_eq!(answer.ids, recomputed(&model, prompt, &condition, 6), "{name}");
        }
    }
}

#[test]
fn edits_that_fit_nowhere_are_refused() {
    let (model, chat, _) = world();
    let prompt = &prompts(&chat)[..1];
    let refused = |at: HookPoint, tokens: &str, change: Change| {
        let edited = with_edit(edit_at(at, tokens, change));
        next_token_logprobs(&model, prompt, &edited).unwrap_err().to_string()
    };
    let vector = |n: i64| Tensor::ones([n], (Kind::Float, Device::Cpu));
    let add = |n: i64| Change::Add { vector: vector(n), coefficient: 1.0 };
    let (d_model, n_layers) = (model.config.d_model, model.config.n_layers);
    for (message, part) in [
        (refused(HookPoint::ResidPost(0), "", add(d_model + 1)), format!("expected [{d_model}]")),
        (refused(HookPoint::ResidPost(n_layers), "", add(d_model)), format!("the model's {n_layers} blocks")),
        (refused(HookPoint::Pattern(0), "", add(d_model)), "zero or scale".to_owned()),
        (refused(HookPoint::Logits, "", Change::Zero), "up to the last block".to_owned()),
        (refused(HookPoint::QNormed(0), "", Change::Zero), "does not norm queries and keys".to_owned()),
        (refused(HookPoint::MlpOut(0), "not(system+user+assistant)", Change::Zero), "leaves none over".to_owned()),
        (refused(HookPoint::MlpOut(0), "\"Llama\"", Change::Zero), "selects no token".to_owned()),
        (refused(HookPoint::ResidPost(0), "", Change::ProjectOut(vector(d_model) * 0.0)), "is zero".to_owned()),
    ] {
        assert!(message.contains(&part), "{message}");
    }
}

/// If an edit replaces a whole activation, the activations before it have no gradient.
#[test]
fn gradients_begin_anew_behind_an_edit_that_replaces_everything() {
    let (model, chat, _) = world();
    let row = chat.row(None, "Go on: 1, 2", &chat.encode("480").unwrap()).unwrap();
    let condition = with_edit(edit_at(HookPoint::ResidPost(0), "", Change::Zero));
    let points = [HookPoint::Embed, HookPoint::ResidPost(0)];
    let found = at_points(&model, &row, &condition, &points, |logits| Ok(completion_loss(logits, &row))).unwrap();
    let largest = |at: HookPoint| found.gradients[&at].abs().max().double_value(&[]);
    assert_eq!(largest(HookPoint::Embed), 0.0);
    assert!(largest(HookPoint::ResidPost(0)) > 0.0);
}

/// Masked scores stay masked under every edit: no token attends to a later one.
#[test]
fn an_edit_of_scores_lets_nobody_see_the_future() {
    let (model, chat, _) = world();
    let prompt = &prompts(&chat)[0];
    for change in [Change::Zero, Change::Scale(0.0), Change::Scale(-3.0)] {
        let condition = with_edit(edit_at(HookPoint::AttnScores(0), "", change));
        let pattern = seen(&model, prompt, &condition, HookPoint::Pattern(0)); // [n_heads, query, key]
        let future = pattern.triu(1).abs().max().double_value(&[]);
        let sums = pattern.sum_dim_intlist(-1, false, Kind::Float);
        assert_eq!(future, 0.0);
        assert!(max_diff(&sums, &sums.ones_like()) < SUM_ORDER);
        let short = prompt.ids.len() - 3;
        let cut = Sequence::of_ids(prompt.ids[..short].to_vec());
        let logits = |row: &Sequence| seen(&model, row, &condition, HookPoint::Logits).narrow(0, 0, short as i64);
        assert!(max_diff(&logits(prompt), &logits(&cut)) < SUM_ORDER);
    }
}

/// A NaN is an error, from any origin.
#[test]
fn a_score_that_is_not_a_number_is_an_error() {
    let (model, chat, _) = world();
    let vector = Tensor::full([model.config.d_model], f64::NAN, (Kind::Float, Device::Cpu));
    let condition = with_edit(Edit::add(0, &vector, 1.0));
    let error = next_token_logprobs(&model, &prompts(&chat)[..1], &condition).unwrap_err().to_string();
    assert!(error.contains("expected numbers"), "{error}");
    let row = chat.row(None, "Go on", &chat.encode("480").unwrap()).unwrap();
    let error = completion_logprobs(&model, std::slice::from_ref(&row), &condition).unwrap_err().to_string();
    assert!(error.contains("expected numbers"), "{error}");
    let error = completion_argmax(&model, &[row], &condition).unwrap_err().to_string();
    assert!(error.contains("expected numbers"), "{error}");
}

#[test]
fn stopping_at_a_layer_runs_nothing_after_it() {
    let (model, chat, adapter) = world();
    let prompt = &prompts(&chat)[0];
    let batch = Batch::of(&[prompt], Device::Cpu).unwrap();
    let whole = |at: HookPoint| seen(&model, prompt, &Condition::adapted(&adapter), at).unsqueeze(0);
    let n_layers = model.config.n_layers;
    for layer in 0..=n_layers {
        let mut reached = Vec::new();
        let mut note = |at: HookPoint, x: Tensor| -> Result<Tensor> {
            reached.push(at);
            Ok(x)
        };
        let before = HookPoint::all(n_layers).into_iter().filter(|at| at.layer().is_some_and(|l| l < layer));
        let before = before.filter(|at| !matches!(at, HookPoint::QNormed(_) | HookPoint::KNormed(_)));
        let before: Vec<HookPoint> = before.chain([HookPoint::Embed]).collect();
        let hooks = Hooks::default().on(before.iter().copied(), &mut note);
        let pass = &mut Pass { adapter: Some(&adapter), hooks, ..Pass::default() };
        let resid = model.resid_before(layer, &batch, pass).unwrap();
        let bare = model.resid_before(layer, &batch, &mut Pass { adapter: Some(&adapter), ..Pass::default() }).unwrap();
        let expected = if layer == 0 { whole(HookPoint::Embed) } else { whole(HookPoint::ResidPost(layer - 1)) };
        assert_eq!(bare, expected, "layer {layer}");
        assert!(max_diff(&resid, &expected) < SUM_ORDER, "with all hook points of the blocks run");
        assert_eq!(reached.len(), before.len());
        if layer < n_layers {
            let mut cache = Cache::default();
            let hooks = Hooks::default().on([HookPoint::ResidPre(layer)], &mut cache);
            let error = model.resid_before(layer, &batch, &mut Pass { hooks, ..Pass::default() }).unwrap_err();
            assert!(error.to_string().contains("never fired"), "{error}");
        }
    }
    assert!(model.resid_before(n_layers + 1, &batch, &mut Pass::default()).is_err());
}

/// A tap that changes the token at an absolute position, in any pass that has it.
struct AddAt {
    position: i64,
    vector: Tensor,
    here: Vec<i64>,
    seen: Vec<i64>,
}

impl Tap for AddAt {
    fn place(&mut self, positions: &Tensor) -> Result<()> {
        assert_eq!(positions.size()[0], 1);
        self.here = Vec::try_from(positions.get(0)).unwrap();
        self.seen.extend(&self.here);
        Ok(())
    }

    fn tap(&mut self, _at: HookPoint, x: Tensor) -> Result<Tensor> {
        assert_eq!(x.size()[1], self.here.len() as i64);
        let Some(at) = self.here.iter().position(|position| *position == self.position) else { return Ok(x) };
        let change = x.zeros_like();
        change.narrow(1, at as i64, 1).copy_(&self.vector);
        Ok(x + change)
    }
}

#[test]
fn a_taps_positions_hold_in_prefill_and_in_every_decoding_step() {
    let (model, chat, _) = world();
    let prompt = &prompts(&chat)[1];
    let n = prompt.ids.len() as i64;
    let points = [HookPoint::ResidPost(0)];
    let vector = Tensor::arange(model.config.d_model, (Kind::Float, Device::Cpu)).view([1, 1, -1]) / 3.0;
    let tap = |position: i64| AddAt { position, vector: vector.shallow_clone(), here: vec![], seen: vec![] };
    let base = answers(&model, std::slice::from_ref(prompt), &Condition::default(), &greedy(6), &[0]).remove(0);
    let mut differing = 0;
    for position in [0, 9, n - 1, n, n + 2] {
        let mut cached = tap(position);
        let condition = Condition::default();
        let answer = generate_with_hooks(&model, prompt, &condition, &greedy(6), 0, &points, &mut cached).unwrap();
        assert_eq!(cached.seen, (0..n + 5).collect::<Vec<_>>(), "each token's position once, in order");
        let mut ids = Vec::new();
        for _ in 0..6 {
            let row = prompt.with_completion(&ids);
            let logits = run_with_hooks(&model, &row, &condition, &points, &mut tap(position)).unwrap();
            ids.push(logits.squeeze_dim(0).get(-1).argmax(-1, false).int64_value(&[]));
        }
        assert_eq!(answer.ids, ids, "position {position}");
        differing += usize::from(answer.ids != base.ids);
    }
    assert!(differing > 1, "the tap changes what is said");
}
