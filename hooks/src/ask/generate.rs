//! Answers, greedy or sampled from the raw softmax: no top-k, no top-p, no repetition penalty, even if the model's
//! files ask for them.
//!
//! Every answer draws from a separate random stream, so that repeated prompts give distinct samples and an answer does
//! not depend on its neighbours in the batch, except through the order of sums. That changes a token where two are
//! nearly as likely: hardly ever in f32, sometimes on a GPU in bf16. Shared beginnings of prompts are run once. When
//! answers end, the next prompts take their places in the batch.

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

/// The settings of drawing answers.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// 0 takes the most likely token (greedy); 1 is the model's own distribution.
    pub temperature: f64,
    /// The most tokens an answer may have.
    pub max_new_tokens: usize,
    /// Tokens that end an answer.
    pub stop: Vec<i64>,
    /// If set, only tokens that continue a list of numbers are drawn.
    pub constrain: Option<NumberGrammar>,
    /// Number of answers drawn at once.
    pub batch: usize,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens, without the stop token.
    pub ids: Vec<i64>,
    /// log p of each token under the model's distribution (temperature 1, unconstrained), and last that of the stop
    /// token.
    pub logprobs: Vec<f32>,
    /// Whether it ended with a stop token rather than at `max_new_tokens`.
    pub stopped: bool,
}

/// The seed of one sample's random stream, from a run's seed, the name of the sampled set, and the sample's index.
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

/// Draws one answer per prompt; `streams` holds one seed per answer. `progress` is called with the number of answers
/// that are done.
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

/// The log-probability below which repetitions are refused: e⁻³⁰ is 1e-13.
const IMPROBABLE: f64 = -30.0;

/// Refuses answers that repeat more often than independent draws would. An answer of probability p comes k times in n
/// draws with a probability of at most C(n, k) pᵏ. Summed over all answers that are as improbable, that is below C(n,
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
/// first pass, `[1, pos, ..]`, then one pass per new token, `[1, 1, ..]`. `Tap::place` gives their positions.
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

/// Draws answers, and returns each one's log-probability under the distribution it was drawn from. A batch's answers
/// grow together; when an eighth have ended, the next prompts take their places.
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
    let mut cache = KvCache::new(&model.config, slots as i64, capacity, model.activation_kind(), model.device())?;
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

/// One token per row, its log-probability under the model's distribution, and its probability under the distribution
/// that it was drawn from.
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

/// Tokens in a block of the vocabulary. A draw sums the probabilities of each block, then searches token by token in
/// one block only.
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
    // The part of the draw that falls into the block, as a share of the block's probability.
    let left = before.f_div(&there.f_sum_dim_intlist(-1, true, Kind::Float)?)?.f_clamp(0.0, 1.0)?;
    let chosen = fall(&there, &left)?.0.f_add(&first)?;
    let likelihoods = floats(&probabilities.f_gather(1, &chosen, false)?)?;
    let logprobs = likelihoods.iter().map(|p| p.ln()).collect();
    Ok(Drawn { tokens: integers(&chosen)?, logprobs, likelihoods })
}

/// Finds where shares of the sum fall in `probabilities`, `[rows, n]`, of any sum. Returns the first index whose
/// cumulated probability exceeds the share, and the share minus the probability before that index, both `[rows, 1]`.
fn fall(probabilities: &Tensor, shares: &Tensor) -> Result<(Tensor, Tensor)> {
    let cumulated = probabilities.f_cumsum(-1, Kind::Float)?;
    let width = cumulated.size()[1];
    let total = cumulated.f_narrow(1, width - 1, 1)?;
    let threshold = shares.f_mul(&total)?;
    let found = threshold.f_searchsorted::<Tensor>(&cumulated, false, true, "right", None)?;
    // Rounding must not lead past the last token with a probability.
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
    /// The grammar in the tokens of a model. An error if digits or the comma are not one token each.
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

    /// The tokens that may follow those so far.
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
mod tests;
