//! Scores that a model gives to tokens, without sampling. `prefill.rs` runs the rows in batches. Everything here runs
//! without gradients; results are f32 on the CPU.

use tch::{Device, Kind, Tensor};

use crate::ask::condition::{Condition, run_rows_with_hooks};
use crate::ask::prefill::{Case, LAST, PREDICTING, Prefilled, batch_groups, is_packable, prefill, token_budget};
use crate::chat::tokens::Sequence;
use crate::error::{Error, Result};
use crate::hook_point::HookPoint;
use crate::model::pass::Pass;
use crate::model::qwen::Qwen;
use crate::profile::{self, Stage};
use crate::taps::cache::Cache;
use crate::taps::edit::EditTap;
use crate::taps::tap::Hooks;

/// Number of rows of logits that are computed at a time.
const LOGIT_ROWS: i64 = 256;

/// Calls `read` with every case's index and the log-probabilities of the token after its prompt, `[d_vocab]`, in any
/// order.
pub fn each_next_token(
    model: &Qwen,
    cases: &[Case<'_, '_>],
    read: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
) -> Result<()> {
    let mut read_batch = |prefilled: Prefilled| -> Result<()> {
        let _stage = profile::stage(Stage::Loss);
        let last = prefilled.read()?.f_split(LOGIT_ROWS, 0)?;
        for (resid, cases) in last.iter().zip(prefilled.cases.chunks(LOGIT_ROWS as usize)) {
            let logprobs = model.unembed(resid)?.f_log_softmax(-1, Kind::Float)?.f_to_device(Device::Cpu)?;
            are_numbers(&logprobs)?;
            for (row, case) in cases.iter().enumerate() {
                read(*case, &logprobs.f_get(row as i64)?)?;
            }
        }
        Ok(())
    };
    tch::no_grad(|| prefill(model, cases, LAST, false, &mut read_batch))
}

/// The log-probabilities of the token after each prompt, `[n, d_vocab]`.
pub fn next_token_logprobs(model: &Qwen, prompts: &[Sequence], condition: &Condition<'_>) -> Result<Tensor> {
    let cases: Vec<Case<'_, '_>> = prompts.iter().map(|prompt| (prompt, condition)).collect();
    let found = Tensor::f_zeros([prompts.len() as i64, model.config.d_vocab], (Kind::Float, Device::Cpu))?;
    each_next_token(model, &cases, &mut |case, logprobs| Ok(found.f_get(case as i64)?.f_copy_(logprobs)?))?;
    Ok(found)
}

/// Refuses log-probabilities that are not numbers, before they are averaged into a table.
fn are_numbers(logprobs: &Tensor) -> Result<()> {
    if bool::try_from(logprobs.f_isnan()?.f_any()?)? { Err(not_a_number()) } else { Ok(()) }
}

pub(crate) fn not_a_number() -> Error {
    Error::invalid(
        "a log-probability",
        "numbers: look for values that overflow or are not finite in the model, the adapter, the edits and their files",
        "NaN",
    )
}

/// The log-probability of every token of each row's completion, given all tokens before it.
///
/// ```
/// use hooks::{Condition, completion_logprobs};
///
/// let (model, chat) = hooks::open("tiny-random")?;
/// let rows = [chat.row_text(None, "Name an animal.", "Owl")?];
/// let logprobs = completion_logprobs(&model, &rows, &Condition::default())?;
/// assert_eq!(logprobs[0].len(), rows[0].completion.len());
/// # Ok::<(), hooks::Error>(())
/// ```
pub fn completion_logprobs(model: &Qwen, rows: &[Sequence], condition: &Condition<'_>) -> Result<Vec<Vec<f32>>> {
    of_completions(model, rows, condition, &label_logprobs)
}

/// The most likely token in the place of every token of each row's completion, given all tokens before it.
pub fn completion_argmax(model: &Qwen, rows: &[Sequence], condition: &Condition<'_>) -> Result<Vec<Vec<i64>>> {
    of_completions(model, rows, condition, &|logits, _| {
        let (largest, at) = logits.f_max_dim(-1, false)?;
        are_numbers(&largest)?;
        Ok(Vec::try_from(&at.f_to_device(Device::Cpu)?)?)
    })
}

/// What a model predicts in the place of a token.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// log p of the token that is there, in nats.
    pub logprob: f32,
    /// The entropy over the vocabulary, in nats.
    pub entropy: f32,
    /// The most likely tokens, in falling order.
    pub top: Vec<i64>,
    /// log p of each of them, in nats.
    pub top_logprobs: Vec<f32>,
}

/// The prediction in the place of every token of each row's completion, with its `k` most likely tokens.
pub fn completion_predictions(
    model: &Qwen,
    rows: &[Sequence],
    condition: &Condition<'_>,
    k: usize,
) -> Result<Vec<Vec<Prediction>>> {
    of_completions(model, rows, condition, &|logits, labels| {
        let logprobs = logits.f_log_softmax(-1, Kind::Float)?;
        let index = Tensor::f_from_slice(labels)?.f_to_device(logits.device())?;
        let of_labels = logprobs.f_gather(1, &index.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
        are_numbers(&of_labels)?;
        let entropy = logprobs.f_exp()?.f_mul(&logprobs)?.f_nan_to_num_(0.0, None, None)?; // 0 · −∞ is 0 here
        let entropy = entropy.f_sum_dim_intlist(-1, false, Kind::Float)?.f_neg()?;
        let (top_logprobs, top) = logprobs.f_topk(k as i64, -1, true, true)?;
        let floats = |tensor: &Tensor| -> Result<Vec<f32>> { Ok(Vec::try_from(tensor.f_to_device(Device::Cpu)?)?) };
        let (of_labels, entropy) = (floats(&of_labels)?, floats(&entropy)?);
        let top_logprobs = floats(&top_logprobs.f_flatten(0, -1)?)?;
        let top = Vec::<i64>::try_from(top.f_flatten(0, -1)?.f_to_device(Device::Cpu)?)?;
        let tops = top.chunks(k).zip(top_logprobs.chunks(k));
        let each = of_labels.into_iter().zip(entropy).zip(tops);
        Ok(each
            .map(|((logprob, entropy), (top, top_logprobs))| Prediction {
                logprob,
                entropy,
                top: top.to_vec(),
                top_logprobs: top_logprobs.to_vec(),
            })
            .collect())
    })
}

/// Reads logits `[n, d_vocab]` in the places of some tokens.
type Read<'r, T> = &'r dyn Fn(&Tensor, &[i64]) -> Result<Vec<T>>;

/// What `read` gives for each token of each row's completion. `read` gets logits `[n, d_vocab]`, in f32 and on the model's
/// device, and the tokens in whose places they are.
fn of_completions<T: Clone>(
    model: &Qwen,
    rows: &[Sequence],
    condition: &Condition<'_>,
    read: Read<'_, T>,
) -> Result<Vec<Vec<T>>> {
    let asked: Vec<usize> = (0..rows.len()).filter(|row| !rows[*row].completion.is_empty()).collect();
    let cases: Vec<Case<'_, '_>> = asked.iter().map(|row| (&rows[*row], condition)).collect();
    let mut found = vec![Vec::new(); rows.len()];
    let mut read_batch = |prefilled: Prefilled| -> Result<()> {
        let _stage = profile::stage(Stage::Loss);
        let of = |case: &usize| &rows[asked[*case]].ids[rows[asked[*case]].completion.clone()];
        let labels: Vec<i64> = prefilled.cases.iter().flat_map(|case| of(case).to_vec()).collect();
        let mut all = Vec::with_capacity(labels.len());
        let resid = prefilled.read()?.f_split(LOGIT_ROWS, 0)?;
        for (resid, labels) in resid.iter().zip(labels.chunks(LOGIT_ROWS as usize)) {
            all.extend(read(&model.unembed(resid)?.f_to_kind(Kind::Float)?, labels)?);
        }
        let mut all = all.into_iter();
        for case in &prefilled.cases {
            found[asked[*case]] = all.by_ref().take(of(case).len()).collect();
        }
        Ok(())
    };
    tch::no_grad(|| prefill(model, &cases, PREDICTING, false, &mut read_batch))?;
    Ok(found)
}

/// log p(label), from logits `[n, d_vocab]`.
fn label_logprobs(logits: &Tensor, labels: &[i64]) -> Result<Vec<f32>> {
    let index = Tensor::f_from_slice(labels)?.f_to_device(logits.device())?;
    let chosen = logits.f_gather(1, &index.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
    let logprobs = chosen.f_sub(&logits.f_logsumexp([1], false)?)?.f_to_device(Device::Cpu)?;
    are_numbers(&logprobs)?;
    Ok(Vec::try_from(&logprobs)?)
}

/// The logits that predict each token of a row's completion, `[n_completion, d_vocab]`; row k predicts its token k.
pub fn completion_logits(model: &Qwen, row: &Sequence, condition: &Condition<'_>) -> Result<Tensor> {
    if row.completion.is_empty() {
        return Err(Error::invalid("the row's completion", "at least one token", "none"));
    }
    let mut found = None;
    let mut read_row = |prefilled: Prefilled| -> Result<()> {
        found = Some(model.unembed(&prefilled.read()?)?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?);
        Ok(())
    };
    tch::no_grad(|| prefill(model, &[(row, condition)], PREDICTING, false, &mut read_row))?;
    found.ok_or_else(|| Error::invalid("the row's logits", "one pass", "none"))
}

/// Per prompt, the residual stream after every block, `[n_layers, pos, d_model]`.
pub fn resid_post(model: &Qwen, prompts: &[Sequence], condition: &Condition<'_>) -> Result<Vec<Tensor>> {
    let points: Vec<HookPoint> = (0..model.config.n_layers).map(HookPoint::ResidPost).collect();
    let stack = |cache: &Cache| -> Result<Tensor> {
        let layers = points.iter().map(|point| Ok(cache.get(*point)?.f_squeeze_dim(0)?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&layers, 0)?.f_to_kind(Kind::Float)?)
    };
    let of_one = |prompt: &Sequence| {
        let mut cache = Cache::default();
        let _ = run_rows_with_hooks(model, &[prompt], condition, &points, &mut cache, Qwen::resid_final)?;
        Ok(stack(&cache)?.f_to_device(Device::Cpu)?)
    };
    tch::no_grad(|| {
        if !is_packable(condition) {
            return prompts.iter().map(of_one).collect();
        }
        let cases: Vec<Case<'_, '_>> = prompts.iter().map(|prompt| (prompt, condition)).collect();
        let mut found: Vec<Option<Tensor>> = prompts.iter().map(|_| None).collect();
        for group in batch_groups(&cases, &(0..prompts.len()).collect::<Vec<_>>())? {
            // All positions of all blocks take much memory, so a GPU takes no more of them at once than a CPU.
            for members in group.batches(&cases, token_budget(Device::Cpu)) {
                let (batch, gate, mut taps) = group.batch(model, &cases, members)?;
                let mut cache = Cache::default();
                let hooks =
                    taps.iter_mut().fold(Hooks::default(), EditTap::hook).on(points.iter().copied(), &mut cache);
                let mut pass = Pass { adapter: group.adapter, doses: gate, hooks, ..Pass::default() };
                let _ = model.resid_final(&batch, &mut pass)?;
                drop(pass);
                let all = stack(&cache)?; // [n_layers, places, d_model]
                for (row, member) in members.iter().enumerate() {
                    let places = (0..prompts[member.case].ids.len()).map(|token| batch.place(row, token));
                    let places = Tensor::f_from_slice(&places.collect::<Vec<_>>())?.f_to_device(model.device())?;
                    found[member.case] = Some(all.f_index_select(1, &places)?.f_to_device(Device::Cpu)?);
                }
            }
        }
        Ok(found.into_iter().flatten().collect())
    })
}
