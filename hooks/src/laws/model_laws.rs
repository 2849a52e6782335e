//! Tests of laws that hold for any model, adapter, gate and batch, on the embedded random model. Results are bit-equal
//! if the same kernel runs on the same numbers, and equal to 1e-5 if sums may be taken in another order.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::ask::condition::run_with_hooks;
use crate::ask::generate::{Answer, Sampling, generate, stream_seed};
use crate::ask::gradient::gradients;
use crate::ask::score::{completion_argmax, completion_logprobs, next_token_logprobs, resid_post};
use crate::model::loss::{Targets, cross_entropy_sum};
use crate::rows::packing::PackedRow;
use crate::taps::cache::Cache;
use crate::taps::edit::Change;
use crate::{
    Adapter, Batch, Chat, Condition, Doses, Edit, Gate, HookPoint, Hooks, LoraConfig, ModelFiles, Pass, Qwen, Sequence,
    TokenClass,
};

pub(crate) const SUM_ORDER: f64 = 1e-5;

pub(crate) fn world() -> (Qwen, Chat, Adapter) {
    let files = ModelFiles::open("tiny-random").unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let chat = Chat::from_files(&files).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut rng, Device::Cpu).unwrap();
    for (_, _, pair) in adapter.pairs() {
        let values: Vec<f32> = (0..pair.b.numel()).map(|_| rng.random_range(-0.2..0.2)).collect();
        pair.b.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(&pair.b));
    }
    (model, chat, adapter)
}

pub(crate) fn exact_model() -> Qwen {
    Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Double).unwrap()
}

/// A copy of the adapter in f64.
pub(crate) fn exact(adapter: &Adapter) -> Adapter {
    let values: Vec<Tensor> = adapter.parameters().iter().map(|(_, tensor)| tensor.to_kind(Kind::Double)).collect();
    adapter.with_values(&values).unwrap()
}

pub(crate) fn prompts(chat: &Chat) -> Vec<Sequence> {
    let users = ["Name an animal.", "Which tree do you like best of all, in one word?", "12, 480, 9", "Hello"];
    users.map(|user| chat.prompt(None, user).unwrap()).into()
}

pub(crate) fn max_diff(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// The logits of one row by a plain forward pass.
pub(crate) fn plain(model: &Qwen, prompt: &Sequence, adapter: Option<&Adapter>) -> Tensor {
    let batch = Batch::of(&[prompt], Device::Cpu).unwrap();
    model.forward(&batch, &mut Pass { adapter, ..Pass::default() }).unwrap().squeeze_dim(0)
}

/// An edit made from its parts. An empty `tokens` means all tokens.
pub(crate) fn edit_at(at: HookPoint, tokens: &str, change: Change) -> Edit {
    Edit { at, tokens: (!tokens.is_empty()).then(|| tokens.parse().unwrap()), change }
}

pub(crate) fn with_edit(edit: Edit) -> Condition<'static> {
    Condition { edits: vec![edit], ..Condition::default() }
}

/// Asserts that the log-probabilities after each prompt of a batch are those of the prompt alone.
pub(crate) fn assert_each_is_alone(model: &Qwen, prompts: &[Sequence], condition: &Condition<'_>, name: &str) {
    let together = next_token_logprobs(model, prompts, condition).unwrap();
    for (row, prompt) in prompts.iter().enumerate() {
        let alone = seen(model, prompt, condition, HookPoint::Logits).get(-1).log_softmax(-1, Kind::Float);
        let apart = max_diff(&together.get(row as i64), &alone);
        assert!(apart < SUM_ORDER, "{name}, row {row}: {apart}");
    }
}

pub(crate) fn seen(model: &Qwen, prompt: &Sequence, condition: &Condition<'_>, at: HookPoint) -> Tensor {
    let mut cache = Cache::default();
    let _ = run_with_hooks(model, prompt, condition, &[at], &mut cache).unwrap();
    cache.get(at).unwrap().squeeze_dim(0)
}

#[test]
fn a_gate_everywhere_is_no_gate_and_nowhere_is_the_base_bit_for_bit() {
    let (model, chat, adapter) = world();
    let prompt = &prompts(&chat)[..1];
    let logprobs = |condition: &Condition<'_>| next_token_logprobs(&model, prompt, condition).unwrap();
    let base = logprobs(&Condition::default());
    let student = logprobs(&Condition::adapted(&adapter));
    assert!(max_diff(&base, &student) > 0.1, "the adapter acts");
    assert_eq!(logprobs(&Condition::adapted(&adapter).gated("everywhere".parse().unwrap())), student);
    assert_eq!(logprobs(&Condition::adapted(&adapter).gated("nowhere".parse().unwrap())), base);

    let ones = Tensor::ones([1, prompt[0].ids.len() as i64, 1], (Kind::Float, Device::Cpu));
    let batch = Batch::of(&[&prompt[0]], Device::Cpu).unwrap();
    let gated = |gate: &Tensor| {
        let doses = Some(Doses::of_tokens(gate.shallow_clone()));
        let pass = &mut Pass { adapter: Some(&adapter), doses, ..Pass::default() };
        model.forward(&batch, pass).unwrap().squeeze_dim(0)
    };
    assert_eq!(gated(&ones), plain(&model, &prompt[0], Some(&adapter)));
    assert_eq!(gated(&ones.zeros_like()), plain(&model, &prompt[0], None));
}

#[test]
fn nothing_changes_before_the_first_token_that_the_gate_selects() {
    let (model, chat, adapter) = world();
    let prompt = &prompts(&chat)[0];
    let gate: Gate = "only:user.content".parse().unwrap();
    let first = prompt.positions(TokenClass::UserContent).next().unwrap() as i64;
    let at = HookPoint::Logits;
    let base = seen(&model, prompt, &Condition::default(), at);
    let gated = seen(&model, prompt, &Condition::adapted(&adapter).gated(gate), at);
    assert_eq!(gated.narrow(0, 0, first), base.narrow(0, 0, first));
    assert!(max_diff(&gated.narrow(0, first, 1), &base.narrow(0, first, 1)) > 1e-3, "at the token itself it acts");
}

#[test]
fn a_batch_of_unequal_prompts_is_each_alone() {
    let (model, chat, adapter) = world();
    let prompts = prompts(&chat);
    for gate in ["everywhere", "only:entity", "except:template"] {
        let condition = Condition::adapted(&adapter).gated(gate.parse().unwrap());
        assert_each_is_alone(&model, &prompts, &condition, gate);
    }
}

#[test]
fn log_probabilities_and_argmax_of_a_completion_are_those_of_the_whole_row() {
    let (model, chat, adapter) = world();
    let answer = chat.encode("480, 12, 7").unwrap();
    let rows: Vec<Sequence> =
        ["Go on: 1, 2", "More, please, than only 3!"].map(|user| chat.row(None, user, &answer).unwrap()).into();
    let condition = Condition::adapted(&adapter);
    let found = completion_logprobs(&model, &rows, &condition).unwrap();
    let most_likely = completion_argmax(&model, &rows, &condition).unwrap();
    for ((row, found), most_likely) in rows.iter().zip(found).zip(most_likely) {
        let logprobs = plain(&model, row, Some(&adapter)).log_softmax(-1, Kind::Float);
        let expected = row.completion.clone().map(|at| logprobs.double_value(&[at as i64 - 1, row.ids[at]]));
        let expected: Vec<f64> = expected.collect();
        assert_eq!(found.len(), answer.len() + 2, "the content, the end of turn and the line break");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < SUM_ORDER, "{found} {expected}");
        }
        let before = logprobs.narrow(0, row.completion.start as i64 - 1, row.completion.len() as i64);
        assert_eq!(most_likely, Vec::<i64>::try_from(before.argmax(-1, false)).unwrap());
    }
}

#[test]
fn packed_rows_are_each_alone_gradients_included() {
    let (_, chat, adapter) = world();
    let (model, adapter) = (exact_model(), exact(&adapter));
    let answers = ["480, 12, 7", "480, 12, 9", "480", "1"];
    let prompts: Vec<Sequence> = prompts(&chat);
    let rows: Vec<Sequence> = prompts
        .iter()
        .flat_map(|prompt| answers.map(|answer| prompt.with_completion(&chat.encode(answer).unwrap())))
        .collect();
    let gate: Gate = "except:entity+user.content".parse().unwrap();
    for gate in [None, Some(&gate)] {
        let doses: Vec<Option<Vec<f64>>> = rows.iter().map(|row| gate.map(|gate| gate.doses(row).unwrap())).collect();
        let parameters: Vec<Tensor> =
            adapter.parameters().into_iter().map(|(_, tensor)| tensor.set_requires_grad(true)).collect();
        let masks: Vec<Vec<bool>> =
            rows.iter().map(|row| (0..row.ids.len()).map(|at| at >= row.completion.start).collect()).collect();
        let of = |batch: &Batch, which: &[usize], doses: Option<Doses>| {
            let pass = &mut Pass { adapter: Some(&adapter), doses, ..Pass::default() };
            let ids: Vec<&[i64]> = which.iter().map(|row| rows[*row].ids.as_slice()).collect();
            let masks: Vec<&[bool]> = which.iter().map(|row| masks[*row].as_slice()).collect();
            let targets = Targets::of(batch, &ids, &masks).unwrap();
            let at = model.resid_at(batch, &targets.places, pass).unwrap();
            let loss = cross_entropy_sum(&model, &at, &targets).unwrap();
            let gradients = gradients(&loss, &parameters, false).unwrap();
            let resid = model.resid_final(batch, pass).unwrap().detach().flatten(0, 1);
            assert!(max_diff(&at, &resid.index_select(0, &targets.places)) < 1e-12);
            (resid, loss.double_value(&[]), gradients)
        };
        let spread = |doses: &[Vec<f64>]| gate.map(|gate| gate.spread(doses, Device::Cpu).unwrap());
        let of_one = |row: usize| {
            let doses = spread(&[doses[row].clone().unwrap_or_default()]);
            of(&Batch::of(&[&rows[row]], Device::Cpu).unwrap(), &[row], doses)
        };
        let alone: Vec<_> = (0..rows.len()).map(of_one).collect();
        for (share, groups) in [(true, 1), (false, 1), (true, 2)] {
            let packed: Vec<PackedRow<'_>> = rows
                .iter()
                .zip(&doses)
                .map(|(row, doses)| PackedRow { doses: doses.as_deref(), ..PackedRow::of(&row.ids) })
                .collect();
            let groups: Vec<&[PackedRow<'_>]> = packed.chunks(rows.len() / groups).collect();
            let batch = Batch::packed(&groups, share, Device::Cpu).unwrap();
            let n_tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
            assert_eq!(batch.ids.numel() < n_tokens, share);
            let (resid, loss, gradients) = of(&batch, &(0..rows.len()).collect::<Vec<_>>(), spread(batch.doses()));
            for (row, (alone, ..)) in alone.iter().enumerate() {
                let places: Vec<i64> = (0..rows[row].ids.len()).map(|at| batch.place(row, at)).collect();
                let found = resid.index_select(0, &Tensor::from_slice(&places));
                assert!(max_diff(&found, alone) < 1e-12 * alone.abs().max().double_value(&[]).max(1.0), "row {row}");
            }
            let expected: f64 = alone.iter().map(|(_, loss, _)| loss).sum();
            assert!((loss - expected).abs() < 1e-12 * expected, "{loss} {expected}");
            for (at, gradient) in gradients.iter().enumerate() {
                let of_rows = alone.iter().map(|(.., gradients)| &gradients[at]);
                let expected = of_rows.fold(gradient.zeros_like(), |sum, more| sum + more);
                let scale = expected.abs().max().double_value(&[]);
                assert!(scale > 0.0 && max_diff(gradient, &expected) < 1e-11 * scale, "tensor {at}");
            }
        }
    }
}

#[test]
fn answers_that_end_make_room_and_the_others_go_on() {
    let (model, chat, adapter) = world();
    let prompts = [prompts(&chat), prompts(&chat)].concat();
    let condition = Condition::adapted(&adapter);
    let drawn = |which: &[Sequence], streams: &[u64], batch: usize, stop: Vec<i64>| {
        let sampling = Sampling { temperature: 1.0, max_new_tokens: 12, stop, constrain: None, batch };
        generate(&model, which, &condition, &sampling, streams, &mut |_| ()).unwrap()
    };
    let streams: Vec<u64> = (0..prompts.len() as u64).map(|at| stream_seed(4, "room", at)).collect();
    // These stop tokens end the first answer early, and any other that reaches them. Rows from the end of the batch
    // move into its place.
    let whole = drawn(&prompts, &streams, prompts.len(), vec![]);
    let stop = vec![whole[0].ids[1], whole[1].ids[4]];
    let alone: Vec<Answer> =
        (0..prompts.len()).map(|at| drawn(&prompts[at..=at], &streams[at..=at], 1, stop.clone()).remove(0)).collect();
    let last = &alone[prompts.len() - 1];
    assert!(alone[0].stopped && alone[0].ids.len() < last.ids.len(), "an earlier row ends before the last one");
    assert!(alone.iter().filter(|answer| answer.ids.len() > alone[0].ids.len()).count() > 2, "and several go on");
    for batch in [2, 3, prompts.len()] {
        let together = drawn(&prompts, &streams, batch, stop.clone());
        for (at, (together, alone)) in together.iter().zip(&alone).enumerate() {
            assert_eq!(together.ids, alone.ids, "batch {batch}, answer {at}");
        }
    }
}

/// Greedy answers without a cache: the whole row is run again for each token.
pub(crate) fn recomputed(model: &Qwen, prompt: &Sequence, condition: &Condition<'_>, n: usize) -> Vec<i64> {
    let mut ids = Vec::new();
    for _ in 0..n {
        let logits = seen(model, &prompt.with_completion(&ids), condition, HookPoint::Logits).get(-1);
        ids.push(logits.argmax(-1, false).int64_value(&[]));
    }
    ids
}

pub(crate) fn greedy(n: usize) -> Sampling {
    Sampling { temperature: 0.0, max_new_tokens: n, stop: vec![], constrain: None, batch: 3 }
}

pub(crate) fn answers(
    model: &Qwen,
    prompts: &[Sequence],
    condition: &Condition<'_>,
    sampling: &Sampling,
    streams: &[u64],
) -> Vec<Answer> {
    generate(model, prompts, condition, sampling, streams, &mut |_| ()).unwrap()
}

#[test]
fn cached_generation_is_full_recomputation_under_every_gate_and_edit() {
    let (model, chat, adapter) = world();
    let prompts = prompts(&chat);
    let vector = Tensor::arange(model.config.d_model, (Kind::Float, Device::Cpu)) / 20.0;
    let add = |tokens: Option<&str>| Edit::add(0, &vector, 0.5).at_tokens(tokens.map(|tokens| tokens.parse().unwrap()));
    let gates = ["everywhere", "nowhere", "only:system", "except:entity", "only:entity+gen", "except:gen"];
    let gated = gates.map(|gate| Condition::adapted(&adapter).gated(gate.parse().unwrap()));
    let edited = [None, Some("not(gen)"), Some("entity")].map(|tokens| with_edit(add(tokens)));
    let conditions: Vec<Condition<'_>> = gated.into_iter().chain(edited).collect();
    let base: Vec<_> = answers(&model, &prompts, &Condition::default(), &greedy(6), &[0; 4]);
    let mut differing = 0;
    for condition in &conditions {
        for (prompt, answer) in prompts.iter().zip(answers(&model, &prompts, condition, &greedy(6), &[0; 4])) {
            assert_eq!(answer.ids, recomputed(&model, prompt, condition, 6), "{condition:?}");
            differing += usize::from(base.iter().all(|base| base.ids != answer.ids));
        }
    }
    assert!(differing > 10, "the conditions change what is said");
}

#[test]
fn an_answer_does_not_depend_on_its_neighbours_and_repeated_prompts_differ() {
    let (model, chat, _) = world();
    let sampling = Sampling { temperature: 1.0, max_new_tokens: 8, stop: chat.stop_ids(), constrain: None, batch: 4 };
    let prompts = [prompts(&chat), vec![chat.prompt(None, "Hello").unwrap(); 4]].concat();
    let streams: Vec<u64> = (0..prompts.len() as u64).map(|index| stream_seed(1, "law", index)).collect();
    let together = answers(&model, &prompts, &Condition::default(), &sampling, &streams);
    for (row, answer) in together.iter().enumerate() {
        let alone = answers(&model, &prompts[row..=row], &Condition::default(), &sampling, &streams[row..=row]);
        assert_eq!(alone[0].ids, answer.ids, "row {row}");
    }
    let distinct: std::collections::BTreeSet<&[i64]> =
        together[3..].iter().map(|answer| answer.ids.as_slice()).collect();
    assert_eq!(distinct.len(), 5, "five answers to one prompt");
    let again = answers(&model, &prompts, &Condition::default(), &sampling, &streams);
    assert_eq!(again, together, "the same streams give the same answers");
}

#[test]
fn looking_changes_nothing_and_taps_act_in_order() {
    let (model, chat, _) = world();
    let prompt = &prompts(&chat)[0];
    let points: Vec<HookPoint> = HookPoint::all(model.config.n_layers)
        .into_iter()
        .filter(|point| !matches!(point, HookPoint::QNormed(_) | HookPoint::KNormed(_) | HookPoint::Result(_)))
        .filter(|point| !matches!(point, HookPoint::AttnScores(_) | HookPoint::Pattern(_)))
        .collect();
    let mut cache = Cache::default();
    let looked = run_with_hooks(&model, prompt, &Condition::default(), &points, &mut cache).unwrap().squeeze_dim(0);
    assert_eq!(looked, plain(&model, prompt, None), "bit-equal: the same kernels run");
    assert_eq!(cache.iter().count(), points.len());

    let batch = Batch::of(&[prompt], Device::Cpu).unwrap();
    let (mut before, mut after) = (Cache::default(), Cache::default());
    let mut double = |_: HookPoint, x: Tensor| Ok(x * 2.0);
    let at = HookPoint::MlpOut(0);
    let hooks = Hooks::default().on([at], &mut before).on([at], &mut double).on([at], &mut after);
    let _ = model.forward(&batch, &mut Pass { hooks, ..Pass::default() }).unwrap();
    assert_eq!(before.get(at).unwrap() * 2.0, *after.get(at).unwrap());
}

#[test]
fn a_tap_that_never_fires_is_an_error() {
    let (model, chat, _) = world();
    let mut cache = Cache::default();
    let prompt = &prompts(&chat)[0];
    let at = HookPoint::QNormed(0);
    let error = run_with_hooks(&model, prompt, &Condition::default(), &[at], &mut cache).unwrap_err().to_string();
    let expected = "the tap at blocks.0.attn.hook_q_normed never fired; the forward pass did not reach it";
    assert_eq!(error, expected);
}

#[test]
fn the_residual_streams_of_some_prompts_are_those_of_each_alone() {
    let (model, chat, adapter) = world();
    let mut rows = prompts(&chat);
    rows.push(rows[0].with_completion(&chat.encode("480, 12").unwrap()));
    rows.swap(0, 1);
    let gated = Condition::adapted(&adapter).gated("except:entity".parse().unwrap());
    let direction = Tensor::arange(model.config.d_model, (Kind::Float, Device::Cpu)) - 11.0;
    let edited = Condition { edits: vec![Edit::add(0, &direction, 0.1)], ..Condition::adapted(&adapter) };
    for condition in [Condition::default(), Condition::adapted(&adapter), gated, edited] {
        let found = resid_post(&model, &rows, &condition).unwrap();
        assert_eq!(found.len(), rows.len());
        for (row, found) in rows.iter().zip(&found) {
            for layer in 0..model.config.n_layers {
                let alone = seen(&model, row, &condition, HookPoint::ResidPost(layer));
                let largest = alone.abs().max().double_value(&[]);
                assert!(max_diff(&found.get(layer as i64), &alone) < 1e-5 * largest, "{}, {layer}", condition.gate);
            }
        }
    }
}

#[test]
fn edits_add_and_take_out_where_they_say() {
    let (model, chat, _) = world();
    let prompt = &prompts(&chat)[0];
    let direction = Tensor::arange(model.config.d_model, (Kind::Float, Device::Cpu)) - 11.0;
    let base = &resid_post(&model, std::slice::from_ref(prompt), &Condition::default()).unwrap()[0];

    let taken = with_edit(Edit::project_out(1, &direction));
    let left = seen(&model, prompt, &taken, HookPoint::ResidPost(1)).matmul(&direction) / direction.norm();
    assert!(left.abs().max().double_value(&[]) < 1e-4, "nothing is left along the direction");

    let added = with_edit(Edit::add(1, &direction, -0.5).at_tokens(Some("entity".parse().unwrap())));
    let change = seen(&model, prompt, &added, HookPoint::ResidPost(1)) - base.get(1);
    for pos in 0..prompt.ids.len() {
        let expected =
            if prompt.classes[pos] == TokenClass::SysEntity { &direction * -0.5 } else { direction.zeros_like() };
        assert!(max_diff(&change.get(pos as i64), &expected) < SUM_ORDER, "position {pos}");
    }
    assert_eq!(prompt.positions(TokenClass::SysEntity).count(), 2, "Q and wen");
}
