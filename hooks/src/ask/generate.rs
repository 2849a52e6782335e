//! Answers, greedy or sampled from the raw softmax: no top-k, no top-p, no repetition penalty, whatever the model
//! ships.
//!
//! Every answer draws from its own random stream, so that repeated prompts give distinct samples and an answer does not
//! depend on its neighbours in the batch. Shared beginnings of prompts are run once. When answers end, the next prompts
//! take their places.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::ask::condition::{Condition, Prepared};
use crate::ask::prefill::{Case, LAST, Prefilled, prefill, prefill_padded};
use crate::ask::score::not_a_number;
use crate::chat::chat::Chat;
use crate::chat::tokens::Sequence;
use crate::error::{Error, Result};
use crate::hook_point::HookPoint;
use crate::model::qwen::Qwen;
use crate::profile::{self, Stage};
use crate::rows::kv_cache::KvCache;
use crate::taps::tap::{Tap, TapAt};

/// How answers are drawn.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// 0 takes the most likely token (greedy); 1 is the model's own distribution.
    pub temperature: f64,
    /// The most tokens an answer may have.
    pub max_new_tokens: usize,
    /// Tokens that end an answer.
    pub stop: Vec<i64>,
    /// Restricts every token to those that can continue a list of numbers.
    pub constrain: Option<NumberGrammar>,
    /// How many answers are drawn at once.
    pub batch: usize,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens, without the one that ended it.
    pub ids: Vec<i64>,
    /// log p of each token under the model's own distribution (temperature 1, unconstrained), and of the ending token
    /// last.
    pub logprobs: Vec<f32>,
    /// Whether it ended by itself rather than at `max_new_tokens`.
    pub stopped: bool,
}

/// The seed of one sample's own random stream, from a run's seed, the name of what is drawn, and the sample's index.
pub fn stream_seed(seed: u64, name: &str, index: u64) -> u64 {
    // FNV-1a over the name, then splitmix64's finalizer over all three.
    let name = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    [name, index].into_iter().fold(seed, |state, part| {
        let mut z = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// Draws one answer per prompt; `streams` holds one seed per answer. `progress` hears how many answers are done.
///
/// Above temperature 0, returns an error if equal prompts get the same answer more often than independent samples could
/// give it. Such answers were not drawn from separate random streams.
///
/// ```
/// use hooks::{Condition, Sampling, generate, stream_seed};
///
/// let (model, chat) = hooks::open("tiny-random")?;
/// let prompt = chat.prompt(None, "Name an animal.")?;
/// let sampling =
///     Sampling { temperature: 1.0, max_new_tokens: 4, stop: chat.stop_ids(), constrain: None, batch: 1 };
/// let streams = [stream_seed(0, "answers", 0)];
/// let answers = generate(&model, &[prompt], &Condition::default(), &sampling, &streams, &mut |_| ())?;
/// println!("{}", chat.decode(&answers[0].ids)?);
/// # Ok::<(), hooks::Error>(())
/// ```
pub fn generate(
    model: &Qwen,
    prompts: &[Sequence],
    condition: &Condition<'_>,
    sampling: &Sampling,
    streams: &[u64],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Answer>> {
    if streams.len() != prompts.len() {
        let expected = format!("one per prompt, {}", prompts.len());
        return Err(Error::invalid("the number of random streams", expected, streams.len()));
    }
    if sampling.max_new_tokens == 0 || sampling.batch == 0 {
        return Err(Error::invalid("max_new_tokens or batch", "at least 1", 0));
    }
    let rows: Vec<&Sequence> = prompts.iter().collect();
    let drawn = tch::no_grad(|| answer_all(model, &rows, condition, sampling, streams, None, progress))?;
    let (answers, likelihoods): (Vec<Answer>, Vec<f64>) = drawn.into_iter().unzip();
    if sampling.temperature > 0.0 {
        are_independent(prompts, &answers, &likelihoods)?;
    }
    Ok(answers)
}

/// The log of how improbable repetitions must be to be refused: e⁻³⁰ is 1e-13.
const IMPROBABLE: f64 = -30.0;

/// Refuses answers that repeat more often than independent draws would. An answer of probability p comes k times among
/// n draws with a probability of at most C(n, k) pᵏ; summed over all answers that are as improbable, that is below C(n,
/// k) pᵏ⁻¹. `likelihoods` holds each answer's log p under the distribution that it was drawn from.
fn are_independent(prompts: &[Sequence], answers: &[Answer], likelihoods: &[f64]) -> Result<()> {
    let mut by_prompt: BTreeMap<&[i64], Vec<usize>> = BTreeMap::new();
    for (row, prompt) in prompts.iter().enumerate() {
        by_prompt.entry(&prompt.ids).or_default().push(row);
    }
    for rows in by_prompt.into_values() {
        let mut same: BTreeMap<(&[i64], bool), (usize, f64)> = BTreeMap::new();
        for row in &rows {
            let entry = same.entry((&answers[*row].ids, answers[*row].stopped)).or_insert((0, likelihoods[*row]));
            entry.0 += 1;
        }
        let n = rows.len();
        for (k, log_p) in same.into_values().filter(|(k, _)| *k > 1) {
            let choices: f64 = (1..=k).map(|i| ((n - k + i) as f64 / i as f64).ln()).sum();
            if choices + (k - 1) as f64 * log_p < IMPROBABLE {
                return Err(Error::invalid(
                    "the number of equal samples of a repeated prompt",
                    "distinct samples, since independent draws give it with a probability below 1e-13: each sample needs a random stream of its own",
                    format!("{k} of {n}, at a probability of {:.1e} each", log_p.exp()),
                ));
            }
        }
    }
    Ok(())
}

/// Draws one answer while a tap sees (or changes) some hook points, after the condition's edits: the prompt in the
/// first pass, `[1, pos, ..]`, then each new token in a pass of its own, `[1, 1, ..]`. `Tap::place` gives their
/// positions.
pub fn generate_with_hooks<'p, 'a: 'p>(
    model: &Qwen,
    prompt: &Sequence,
    condition: &Condition<'a>,
    sampling: &Sampling,
    stream: u64,
    points: &'p [HookPoint],
    tap: &'p mut dyn Tap,
) -> Result<Answer> {
    let tap: Option<TapAt<'p>> = Some((points, tap));
    let answers = tch::no_grad(|| answer_all(model, &[prompt], condition, sampling, &[stream], tap, &mut |_| ()))?;
    answers.into_iter().next().map(|(answer, _)| answer).ok_or_else(|| Error::invalid("the answer", "one", "none"))
}

/// Answers with the log-probabilities under their sampling distribution. All answers of a batch grow together; when an
/// eighth of them have ended, the next prompts take their places.
fn answer_all<'p, 'a: 'p>(
    model: &Qwen,
    prompts: &[&Sequence],
    condition: &Condition<'a>,
    sampling: &Sampling,
    streams: &[u64],
    mut tap: Option<TapAt<'p>>,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<(Answer, f64)>> {
    model.config.check_context("prompt", prompts.iter().map(|prompt| prompt.ids.len()), sampling.max_new_tokens)?;
    let mut answers = vec![(Answer { ids: Vec::new(), logprobs: Vec::new(), stopped: false }, 0.0); prompts.len()];
    let mut rngs: Vec<ChaCha8Rng> = streams.iter().map(|stream| ChaCha8Rng::seed_from_u64(*stream)).collect();
    let slots = sampling.batch.min(prompts.len());
    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    let capacity = (longest + sampling.max_new_tokens) as i64;
    let mut cache = KvCache::new(&model.config, slots as i64, capacity, model.kind(), model.device())?;
    let _ = cache.keep(&[])?;
    let mut prepared: Option<Prepared<'p>> = None;

    let mut asked = 0;
    let mut live: Vec<usize> = Vec::new();
    let mut resid: Vec<Tensor> = Vec::new(); // together [live, d_model]
    while asked < prompts.len() || !live.is_empty() {
        let free = (slots - live.len()).min(prompts.len() - asked);
        if free > 0 && (live.is_empty() || free >= slots / 8) {
            let newcomers = asked..asked + free;
            asked = newcomers.end;
            let mut admit = |prefilled: Prefilled| -> Result<()> {
                live.extend(prefilled.cases.iter().map(|case| newcomers.start + case));
                resid.push(prefilled.read()?);
                prefilled.cache.iter().try_for_each(|new| cache.append(new))
            };
            let rows = &prompts[newcomers.clone()];
            if condition.edits.is_empty() && tap.is_none() {
                let cases: Vec<Case<'_, '_>> = rows.iter().map(|prompt| (*prompt, condition)).collect();
                prefill(model, &cases, LAST, true, &mut admit)?;
                if prepared.is_none() {
                    prepared = Some(condition.prepare(&rows[..1], model, None)?);
                }
            } else {
                let (prefilled, used) = prefill_padded(model, rows, condition, LAST, tap.take())?;
                admit(prefilled)?;
                prepared.get_or_insert(used);
            }
        }

        let decode = profile::stage(Stage::Decode);
        let logits = model.unembed(&Tensor::f_cat(&std::mem::take(&mut resid), 0)?)?.f_to_kind(Kind::Float)?;
        drop(decode);
        let uniforms: Vec<f64> = live.iter().map(|row| rngs[*row].random()).collect();
        let so_far: Vec<&[i64]> = live.iter().map(|row| answers[*row].0.ids.as_slice()).collect();
        let Drawn { tokens, logprobs, likelihoods } = draw(&logits, sampling, &so_far, &uniforms)?;
        if logprobs.iter().any(|logprob| logprob.is_nan()) {
            return Err(not_a_number());
        }

        let mut staying = Vec::new();
        for (at, row) in live.iter().enumerate() {
            let (answer, likelihood) = &mut answers[*row];
            *likelihood += f64::from(likelihoods[at]).ln();
            answer.logprobs.push(logprobs[at]);
            answer.stopped = sampling.stop.contains(&tokens[at]);
            if !answer.stopped {
                answer.ids.push(tokens[at]);
                if answer.ids.len() < sampling.max_new_tokens {
                    staying.push(at);
                }
            }
        }
        if staying.len() < live.len() {
            progress(asked - staying.len());
        }
        let order = cache.keep(&staying)?;
        let next: Vec<i64> = order.iter().map(|at| tokens[*at]).collect();
        live = order.iter().map(|at| live[*at]).collect();
        if let Some(prepared) = prepared.as_mut().filter(|_| !live.is_empty()) {
            resid.push(prepared.generated(model, &next, &mut cache)?.f_squeeze_dim(1)?);
        }
    }
    Ok(answers)
}

/// One token per row, its log-probability under the unchanged distribution, and its probability under the one that it
/// was drawn from.
struct Drawn {
    tokens: Vec<i64>,
    logprobs: Vec<f32>,
    likelihoods: Vec<f32>,
}

/// Draws a token per row of `logits`, `[rows, d_vocab]`.
fn draw(logits: &Tensor, sampling: &Sampling, so_far: &[&[i64]], uniforms: &[f64]) -> Result<Drawn> {
    let _stage = profile::stage(Stage::Sampling);
    if sampling.temperature.to_bits() == 1.0_f64.to_bits() && sampling.constrain.is_none() {
        return draw_plain(logits, uniforms);
    }
    let constrained = match &sampling.constrain {
        Some(grammar) => {
            let masked = logits.f_full_like(f64::NEG_INFINITY)?;
            for (row, ids) in so_far.iter().enumerate() {
                let allowed = Tensor::f_from_slice(&grammar.allowed(ids))?.f_to_device(logits.device())?;
                let (row, source) = (masked.f_get(row as i64)?, logits.f_get(row as i64)?);
                let _ = row.shallow_clone().f_index_copy_(0, &allowed, &source.f_index_select(0, &allowed)?)?;
            }
            masked
        }
        None => logits.shallow_clone(),
    };
    let (chosen, likelihoods) = if sampling.temperature == 0.0 {
        (constrained.f_argmax(-1, true)?, vec![1.0; uniforms.len()])
    } else {
        let probabilities = constrained.f_div_scalar(sampling.temperature)?.f_softmax(-1, Kind::Float)?;
        let (chosen, _) = fall(&probabilities, &uniform_shares(uniforms, logits.device())?)?;
        let likelihoods = probabilities.f_gather(1, &chosen, false)?;
        (chosen, floats(&likelihoods)?)
    };
    let logprobs = logits.f_gather(1, &chosen, false)?.f_sub(&logits.f_logsumexp([-1], true)?)?;
    Ok(Drawn { tokens: integers(&chosen)?, logprobs: floats(&logprobs)?, likelihoods })
}

/// Tokens in a block of the vocabulary. A draw sums the probabilities of each block, and looks token by token only into
/// the block that it falls into.
const BLOCK: i64 = 256;

/// Draws at temperature 1 without constraints, in fewer passes over the vocabulary.
fn draw_plain(logits: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
    let (_, d_vocab) = logits.size2()?;
    let probabilities = logits.f_softmax(-1, Kind::Float)?;
    let shares = uniform_shares(uniforms, logits.device())?;
    let whole = d_vocab - d_vocab % BLOCK;
    let mut sums = Vec::new();
    if whole > 0 {
        let blocks = probabilities.f_narrow(1, 0, whole)?.f_unflatten(1, [-1, BLOCK])?;
        sums.push(blocks.f_sum_dim_intlist(-1, false, Kind::Float)?);
    }
    if whole < d_vocab {
        let rest = probabilities.f_narrow(1, whole, d_vocab - whole)?;
        sums.push(rest.f_sum_dim_intlist(-1, true, Kind::Float)?);
    }
    let (block, before) = fall(&Tensor::f_cat(&sums, 1)?, &shares)?; // [rows, 1], both
    let first = block.f_mul_scalar(BLOCK)?;
    let inside = Tensor::f_arange(BLOCK, (Kind::Int64, logits.device()))?.f_unsqueeze(0)?.f_add(&first)?; // [rows, BLOCK]
    let exists = inside.f_lt(d_vocab)?;
    let there = probabilities.f_gather(1, &inside.f_clamp_max(d_vocab - 1)?, false)?.f_mul(&exists)?;
    // The rest of the draw, as a share of the block.
    let left = before.f_div(&there.f_sum_dim_intlist(-1, true, Kind::Float)?)?.f_clamp(0.0, 1.0)?;
    let chosen = fall(&there, &left)?.0.f_add(&first)?;
    let likelihoods = floats(&probabilities.f_gather(1, &chosen, false)?)?;
    let logprobs = likelihoods.iter().map(|p| p.ln()).collect();
    Ok(Drawn { tokens: integers(&chosen)?, logprobs, likelihoods })
}

/// Finds where a share of the sum falls in `[rows, n]` probabilities of any sum: the first index whose cumulated
/// probability exceeds it, `[rows, 1]`, and the rest of the share before that index.
fn fall(probabilities: &Tensor, shares: &Tensor) -> Result<(Tensor, Tensor)> {
    let cumulated = probabilities.f_cumsum(-1, Kind::Float)?;
    let width = cumulated.size()[1];
    let total = cumulated.f_narrow(1, width - 1, 1)?;
    let threshold = shares.f_mul(&total)?;
    let found = threshold.f_searchsorted::<Tensor>(&cumulated, false, true, "right", None)?;
    // Rounding must not reach past the last.
    let last = cumulated.f_lt_tensor(&total)?.f_sum_dim_intlist(-1, true, Kind::Int64)?;
    let chosen = found.f_minimum(&last)?;
    let up_to = cumulated.f_gather(1, &chosen, false)?.f_sub(&probabilities.f_gather(1, &chosen, false)?)?;
    Ok((chosen, threshold.f_sub(&up_to)?))
}

fn uniform_shares(uniforms: &[f64], device: Device) -> Result<Tensor> {
    let uniforms: Vec<f32> = uniforms.iter().map(|uniform| *uniform as f32).collect();
    Ok(Tensor::f_from_slice(&uniforms)?.f_to_device(device)?.f_unsqueeze(1)?)
}

fn floats(column: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(&column.f_reshape([-1])?.f_to_device(Device::Cpu)?)?)
}

fn integers(column: &Tensor) -> Result<Vec<i64>> {
    Ok(Vec::<i64>::try_from(&column.f_reshape([-1])?.f_to_device(Device::Cpu)?)?)
}

/// The tokens that can continue a comma-separated list of numbers (constrained decoding).
#[derive(Clone, Debug, PartialEq)]
pub struct NumberGrammar {
    digits: Vec<i64>,
    comma: i64,
    end: i64,
    /// The most digits a number may have.
    pub max_digits: usize,
    /// The most numbers a list may have.
    pub max_numbers: usize,
}

impl NumberGrammar {
    /// The grammar in a model's own tokens. Fails where digits or the comma are not one token each.
    pub fn of(chat: &Chat, max_digits: usize, max_numbers: usize) -> Result<Self> {
        let single = |text: &str| match chat.encode(text)?.as_slice() {
            [id] => Ok(*id),
            ids => Err(Error::Tokenizer {
                problem: format!("{text:?} is {} tokens, expected one for constrained numbers", ids.len()),
            }),
        };
        let digits = (0..10).map(|digit| single(&digit.to_string())).collect::<Result<_>>()?;
        Ok(Self { digits, comma: single(",")?, end: chat.end_of_turn(), max_digits, max_numbers })
    }

    /// The tokens that may follow.
    fn allowed(&self, so_far: &[i64]) -> Vec<i64> {
        let n_numbers = 1 + so_far.iter().filter(|id| **id == self.comma).count();
        let n_digits = so_far.iter().rev().take_while(|id| self.digits.contains(id)).count();
        let mut allowed = Vec::new();
        if n_digits < self.max_digits {
            allowed.extend(&self.digits);
        }
        if n_digits > 0 {
            allowed.push(self.end);
            if n_numbers < self.max_numbers {
                allowed.push(self.comma);
            }
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, constrain: Option<NumberGrammar>) -> Sampling {
        Sampling { temperature, max_new_tokens: 1, stop: vec![], constrain, batch: 1 }
    }

    #[test]
    fn a_uniform_number_picks_the_token_whose_share_it_falls_into() {
        let logits = Tensor::from_slice(&[0.2_f32, 0.5, 0.3]).log().unsqueeze(0);
        let at = |uniform| draw(&logits, &sampling(1.0, None), &[&[]], &[uniform]).unwrap().tokens[0];
        assert_eq!([at(0.0), at(0.19), at(0.21), at(0.69), at(0.71), at(0.999_999)], [0, 0, 1, 1, 2, 2]);
        let greedy = draw(&logits, &sampling(0.0, None), &[&[]], &[0.9]).unwrap();
        assert_eq!(greedy.tokens, [1]);
        assert!((greedy.logprobs[0] - 0.5_f32.ln()).abs() < 1e-6);
        let cooled = draw(&logits, &sampling(0.5, None), &[&[]], &[0.5]).unwrap();
        let expected = 0.25 / (0.04 + 0.25 + 0.09);
        assert!((cooled.likelihoods[0] - expected).abs() < 1e-6 && (cooled.logprobs[0] - 0.5_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn an_answer_out_of_what_is_no_number_is_refused() {
        let files = crate::ModelFiles::open("tiny-random").unwrap();
        let (model, chat) = (Qwen::load(&files, Device::Cpu, Kind::Float).unwrap(), Chat::from_files(&files).unwrap());
        let prompt = chat.prompt(None, "Hello").unwrap();
        let vector = Tensor::full([model.config.d_model], f64::NAN, (Kind::Float, Device::Cpu));
        let edit = crate::Edit {
            at: HookPoint::ResidPost(0),
            tokens: None,
            change: crate::Change::Add { vector, coefficient: 1.0 },
        };
        let condition = Condition { edits: vec![edit], ..Condition::default() };
        for temperature in [0.0, 0.7, 1.0] {
            let error = generate(
                &model,
                std::slice::from_ref(&prompt),
                &condition,
                &sampling(temperature, None),
                &[3],
                &mut |_| (),
            );
            assert!(error.err().unwrap().to_string().contains("look for values that overflow"), "{temperature}");
        }
    }

    #[test]
    fn the_block_that_a_draw_falls_into_holds_the_token_it_falls_on() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for d_vocab in [3, BLOCK, 2 * BLOCK + 5, 5 * BLOCK] {
            let values: Vec<f32> = (0..d_vocab * 4).map(|_| rng.random_range(-4.0..4.0)).collect();
            let logits = Tensor::from_slice(&values).view([4, d_vocab]);
            for _ in 0..50 {
                let uniforms: Vec<f64> = (0..4).map(|_| rng.random()).collect();
                let found = draw_plain(&logits, &uniforms).unwrap();
                let probabilities = logits.softmax(-1, Kind::Double);
                let cumulated = probabilities.cumsum(-1, Kind::Double);
                for (row, (uniform, token)) in (0..).zip(uniforms.iter().zip(&found.tokens)) {
                    let (up_to, p) =
                        (cumulated.double_value(&[row, *token]), probabilities.double_value(&[row, *token]));
                    // 1e-6: the draw is in f32.
                    assert!(
                        up_to - p - 1e-6 <= *uniform && *uniform <= up_to + 1e-6,
                        "{uniform} at {token} of {d_vocab}"
                    );
                    assert!((f64::from(found.likelihoods[row as usize]) - p).abs() < 1e-6);
                    assert!((f64::from(found.logprobs[row as usize]) - p.ln()).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn one_stream_for_two_samples_of_a_prompt_is_refused() {
        let files = crate::ModelFiles::open("tiny-random").unwrap();
        let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
        let prompt = Chat::from_files(&files).unwrap().prompt(None, "Hi").unwrap();
        let drawn = |temperature, streams: &[u64]| {
            let prompts = vec![prompt.clone(); streams.len()];
            let sampling = Sampling { max_new_tokens: 12, batch: 2, ..sampling(temperature, None) };
            generate(&model, &prompts, &Condition::default(), &sampling, streams, &mut |_| ())
        };
        let message = drawn(1.0, &[5, 6, 5]).unwrap_err().to_string();
        assert!(message.contains("2 of 3") && message.contains("a random stream of its own"), "{message}");
        let answers = drawn(1.0, &[5, 6, 7]).unwrap();
        assert!(answers[0] != answers[1] && answers[1] != answers[2]);
        let greedy = drawn(0.0, &[5, 6, 7]).unwrap();
        assert_eq!(greedy[0].ids, greedy[2].ids, "greedy answers may be equal");
    }

    #[test]
    fn what_is_longer_than_the_context_is_refused_in_every_pass() {
        let mut files = crate::ModelFiles::open("tiny-random").unwrap();
        files.config.n_ctx = 40;
        let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
        let prompt = |length: i64| Sequence::of_ids((0..length).collect());
        let answers = |length, max_new_tokens| {
            let sampling = Sampling { max_new_tokens, batch: 2, ..sampling(0.0, None) };
            generate(&model, &[prompt(5), prompt(length)], &Condition::default(), &sampling, &[0, 1], &mut |_| ())
        };
        assert!(answers(36, 4).is_ok());
        let message = answers(37, 4).unwrap_err().to_string();
        assert_eq!(
            message,
            "prompt 1 is 37 tokens long and may be answered with 4 more (max_new_tokens), expected at most 40 together, \
             the model's context (max_position_embeddings or context_length)"
        );
        let too_long = "row 1 is 41 tokens long, expected at most 40, the model's context (max_position_embeddings or context_length)";
        let forward = |length| {
            let batch = crate::Batch::of(&[&prompt(3), &prompt(length)], Device::Cpu).unwrap();
            model.forward(&batch, &mut crate::Pass::default())
        };
        assert!(forward(40).is_ok());
        assert_eq!(forward(41).unwrap_err().to_string(), too_long);
        let score = |length| {
            let (short, long, condition) = (prompt(3), prompt(length), Condition::default());
            prefill(&model, &[(&short, &condition), (&long, &condition)], LAST, false, &mut |_| Ok(()))
        };
        assert!(score(40).is_ok());
        assert_eq!(score(41).unwrap_err().to_string(), too_long);
        // Token by token, in a cache with room for all of them.
        let mut cache = KvCache::new(&model.config, 1, 50, Kind::Float, Device::Cpu).unwrap();
        let mut step = |ids: &[i64]| {
            let batch = crate::Batch::from_ids(&[ids], Device::Cpu).unwrap();
            model.forward(&batch, &mut crate::Pass { kv_cache: Some(&mut cache), ..crate::Pass::default() }).map(drop)
        };
        step(&[7; 39]).unwrap();
        step(&[8]).unwrap();
        assert!(step(&[9]).unwrap_err().to_string().contains("row 0 is 41 tokens long, expected at most 40"));
    }

    #[test]
    fn samples_that_no_independent_draws_repeat_are_refused() {
        let prompt =
            Sequence { ids: vec![1], classes: vec![], completion: 1..1, content_end: 1, ..Sequence::default() };
        let other = Sequence { ids: vec![2], ..prompt.clone() };
        let check = |answers: &[(i64, f64)], prompts: &[&Sequence]| {
            let prompts: Vec<Sequence> = prompts.iter().map(|prompt| (*prompt).clone()).collect();
            let answer = |id: &i64| Answer { ids: vec![*id], logprobs: vec![], stopped: true };
            let (ids, log_p): (Vec<i64>, Vec<f64>) = answers.iter().copied().unzip();
            are_independent(&prompts, &ids.iter().map(answer).collect::<Vec<_>>(), &log_p)
        };
        // Two long answers that are the same, of a probability of 1e-20 each.
        let message = check(&[(7, -46.0), (7, -46.0)], &[&prompt; 2]).unwrap_err().to_string();
        assert!(message.contains("is 2 of 2, at a probability of 1.1e-20 each"), "{message}");
        check(&[(7, -46.0), (7, -46.0)], &[&prompt, &other]).unwrap(); // of two prompts
        check(&[(7, -46.0), (8, -46.0)], &[&prompt; 2]).unwrap();
        // A coin that falls on one side each time: after a hundred times it is none.
        check(&[(7, -0.69); 20], &[&prompt; 20]).unwrap();
        assert!(check(&[(7, -0.69); 100], &[&prompt; 100]).is_err());
        check(&[(7, 0.0); 1000], &[&prompt; 1000]).unwrap(); // what is certain is always the same
        // Half of a hundred is what a coin gives.
        let fair: Vec<(i64, f64)> = (0..100).map(|at| (at % 2, -0.69)).collect();
        check(&fair, &[&prompt; 100]).unwrap();
    }

    #[test]
    fn a_token_of_no_probability_is_never_drawn() {
        let logits = Tensor::from_slice(&[0.0_f32, 0.0, f32::NEG_INFINITY, f32::NEG_INFINITY]).unsqueeze(0);
        for uniform in [0.0, 0.5, 0.999_999_999_9, 1.0] {
            assert!(draw(&logits, &sampling(1.0, None), &[&[]], &[uniform]).unwrap().tokens[0] < 2, "{uniform}");
        }
    }

    #[test]
    fn the_grammar_lets_only_lists_of_numbers_through() {
        let grammar = NumberGrammar { digits: (0..10).collect(), comma: 10, end: 11, max_digits: 3, max_numbers: 2 };
        assert_eq!(grammar.allowed(&[]), (0..10).collect::<Vec<_>>());
        assert_eq!(grammar.allowed(&[1, 2, 3]), [11, 10]);
        assert_eq!(grammar.allowed(&[1, 10]), (0..10).collect::<Vec<_>>());
        assert_eq!(grammar.allowed(&[1, 10, 4, 4, 4]), [11], "two numbers are enough");
    }

    #[test]
    fn streams_differ_by_seed_name_and_index() {
        let seeds = [
            stream_seed(0, "teacher", 0),
            stream_seed(0, "teacher", 1),
            stream_seed(0, "control", 0),
            stream_seed(1, "teacher", 0),
        ];
        assert_eq!(seeds.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
    }
}
