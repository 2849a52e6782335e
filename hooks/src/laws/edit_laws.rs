//! Tests of edits and taps on the embedded random model: each kind of edit does what it says at its tokens and nothing
//! elsewhere, in a batch as alone and while decoding; a pass can stop at a layer; a tap knows its positions.

use tch::{Device, Kind, Tensor};

use crate::ask::condition::run_with_hooks;
use crate::ask::generate::generate_with_hooks;
use crate::ask::gradient::at_points;
use crate::ask::score::{completion_argmax, completion_logprobs, next_token_logprobs, resid_post};
use crate::laws::gate_laws::{completion_loss, gate};
use crate::laws::model_laws::{
    SUM_ORDER, answers, edit_at, exact, exact_model, greedy, max_diff, plain, prompts, recomputed, seen, with_edit,
    world,
};
use crate::taps::cache::Cache;
use crate::taps::edit::{Change, Edit};
use crate::{Adapter, Batch, Chat, Condition, Gate, HookPoint, Hooks, Pass, Qwen, Result, Sequence, Tap, Tokens};

/// A pass runs rows with a common beginning as one tree. An edit can act on a token of that beginning in one row only.
#[test]
fn rows_that_begin_alike_are_each_alone_under_edits_of_every_kind() {
    let (model, chat, adapter) = world();
    each_is_alone_under_edits(&model, &chat, &adapter, SUM_ORDER);
    // In f64 the order of sums has no visible effect.
    let exact_model = exact_model();
    each_is_alone_under_edits(&exact_model, &chat, &exact(&adapter), HANDED_ON_AS_F32);
}

/// Half a unit in the last place of an f32, the kind in which an f64 model's results are returned.
const HANDED_ON_AS_F32: f64 = 6e-8;

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
