//! What a model gives to tokens, without sampling. Rows are batched by a budget of tokens, and what all rows of a batch
//! begin with (the system prompt, mostly) is run once. Everything here runs without gradients; results are f32 on the CPU.

use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::condition::{Condition, Prepared};
use crate::error::{Error, Result};
use crate::hook_point::HookPoint;
use crate::kv_cache::KvCache;
use crate::listen::Cache;
use crate::pass::Pass;
use crate::qwen::Qwen;
use crate::tap::{Listener, Tap};
use crate::tokens::Prompt;

/// Tokens per batch: enough to keep two cores busy, little enough for their memory. A GPU takes more.
fn token_budget(device: Device) -> usize {
    if device == Device::Cpu { 1024 } else { 16_384 }
}

/// Rows of logits computed at once.
const LOGIT_ROWS: i64 = 256;

/// Rows of some prompts after a first pass, ready to be read or continued.
pub(crate) struct Prefilled<'a> {
    /// The residual stream after the last block, `[batch, pos - offset, d_model]`.
    pub(crate) resid: Tensor,
    /// How many positions at the start are not in `resid`, because all rows share them.
    pub(crate) offset: usize,
    /// Keys and values of all positions.
    pub(crate) cache: KvCache,
    /// The condition, for what follows.
    pub(crate) prepared: Prepared<'a>,
}

/// Runs the rows, what they share at the start once, and leaves room for `room` further tokens each.
pub(crate) fn prefill<'p, 'a: 'p>(
    model: &Qwen,
    rows: &[&Prompt],
    condition: &Condition<'a>,
    room: usize,
    listener: Option<Listener<'p>>,
) -> Result<Prefilled<'p>> {
    let device = model.device();
    let batch = Batch::of(rows, device)?;
    let mut prepared = condition.prepare(rows, model, listener)?;
    let capacity = (batch.width() + room) as i64;
    let new_cache = |n: i64| KvCache::new(&model.config, n, capacity, model.kind(), device);
    let offset = worth_it(shared_start(rows).min(prepared.shared));
    let (resid, cache) = if offset == 0 {
        let mut cache = new_cache(rows.len() as i64)?;
        (prepared.prompt(model, &batch, 0..batch.width(), Some(&mut cache))?, cache)
    } else {
        let first = Batch::from_ids(&[&rows[0].ids[..offset]], device)?;
        let mut cache = new_cache(1)?;
        let _ = prepared.prompt(model, &first, 0..offset, Some(&mut cache))?;
        let mut cache = cache.select(&vec![0; rows.len()])?;
        let rest = batch.narrow(offset, batch.width())?;
        (prepared.prompt(model, &rest, offset..batch.width(), Some(&mut cache))?, cache)
    };
    Ok(Prefilled { resid, offset, cache, prepared })
}

/// How many tokens all rows begin with, ids and classes alike, short of what any row's answer is read from.
fn shared_start(rows: &[&Prompt]) -> usize {
    let [first, others @ ..] = rows else { return 0 };
    if others.is_empty() {
        return 0;
    }
    let limit = rows.iter().map(|row| row.completion.start.min(row.ids.len()).saturating_sub(1)).min().unwrap_or(0);
    let same =
        |at: &usize| others.iter().all(|row| row.ids[*at] == first.ids[*at] && row.classes[*at] == first.classes[*at]);
    (0..limit).take_while(same).count()
}

/// A shared start, where it is long enough to be run apart.
fn worth_it(shared: usize) -> usize {
    if shared < 8 { 0 } else { shared }
}

/// The rows' indices in batches of similar lengths, each of `budget` tokens at most. What all rows begin with is not
/// counted: a batch runs it once.
fn batches(rows: &[Prompt], budget: usize) -> Vec<Vec<usize>> {
    let shared = worth_it(shared_start(&rows.iter().collect::<Vec<_>>()));
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|row| rows[*row].ids.len());
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for row in order {
        let width = rows[row].ids.len() - shared;
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * width <= budget => batch.push(row),
            _ => batches.push(vec![row]),
        }
    }
    batches
}

/// The log-probabilities of the token after each prompt, `[n, d_vocab]`.
pub fn next_token_logprobs(model: &Qwen, prompts: &[Prompt], condition: &Condition<'_>) -> Result<Tensor> {
    let mut found: Vec<Option<Tensor>> = (0..prompts.len()).map(|_| None).collect();
    tch::no_grad(|| -> Result<()> {
        for batch in batches(prompts, token_budget(model.device())) {
            let rows: Vec<&Prompt> = batch.iter().map(|row| &prompts[*row]).collect();
            let prefilled = prefill(model, &rows, condition, 0, None)?;
            let last = last_positions(&prefilled, &rows)?;
            let logprobs = model.unembed(&last)?.f_log_softmax(-1, Kind::Float)?.f_to_device(Device::Cpu)?;
            are_numbers(&logprobs)?;
            for (at, row) in batch.iter().enumerate() {
                found[*row] = Some(logprobs.f_get(at as i64)?);
            }
        }
        Ok(())
    })?;
    let found: Vec<Tensor> = found.into_iter().flatten().collect();
    if found.is_empty() {
        Ok(Tensor::f_zeros([0, model.config.d_vocab], (Kind::Float, Device::Cpu))?)
    } else {
        Ok(Tensor::f_stack(&found, 0)?)
    }
}

/// Refuses log-probabilities that are not numbers, before they are averaged into a table.
fn are_numbers(logprobs: &Tensor) -> Result<()> {
    if bool::try_from(logprobs.f_isnan()?.f_any()?)? {
        return Err(Error::Invalid {
            what: "a log-probability".to_owned(),
            expected: "numbers: look for values that are not finite in the adapter, the edits and their files"
                .to_owned(),
            found: "NaN".to_owned(),
        });
    }
    Ok(())
}

/// The residual stream at each row's last token, `[batch, d_model]`.
pub(crate) fn last_positions(prefilled: &Prefilled<'_>, rows: &[&Prompt]) -> Result<Tensor> {
    let last: Vec<(usize, usize)> =
        rows.iter().enumerate().map(|(row, prompt)| (row, prompt.ids.len() - 1 - prefilled.offset)).collect();
    pick(&prefilled.resid, &last)
}

/// The rows of `resid` (`[batch, pos, d_model]`) at some (row, position) pairs, `[n, d_model]`.
fn pick(resid: &Tensor, places: &[(usize, usize)]) -> Result<Tensor> {
    let (_, pos, d_model) = resid.size3()?;
    let flat: Vec<i64> = places.iter().map(|(row, at)| *row as i64 * pos + *at as i64).collect();
    let flat = Tensor::f_from_slice(&flat)?.f_to_device(resid.device())?;
    Ok(resid.f_reshape([-1, d_model])?.f_index_select(0, &flat)?)
}

/// The log-probability of every token of each row's completion, given all tokens before it.
pub fn completion_logprobs(model: &Qwen, rows: &[Prompt], condition: &Condition<'_>) -> Result<Vec<Vec<f32>>> {
    let mut found: Vec<Vec<f32>> = vec![Vec::new(); rows.len()];
    tch::no_grad(|| -> Result<()> {
        for batch in batches(rows, token_budget(model.device())) {
            let batch_rows: Vec<&Prompt> = batch.iter().map(|row| &rows[*row]).collect();
            let prefilled = prefill(model, &batch_rows, condition, 0, None)?;
            let places = |(at, row): (usize, &&Prompt)| -> Vec<(usize, usize)> {
                row.completion.clone().map(|token| (at, token - 1 - prefilled.offset)).collect()
            };
            let places: Vec<(usize, usize)> = batch_rows.iter().enumerate().flat_map(places).collect();
            if places.is_empty() {
                continue;
            }
            let labels: Vec<i64> =
                batch_rows.iter().flat_map(|row| row.ids[row.completion.clone()].iter().copied()).collect();
            let logprobs = label_logprobs(model, &pick(&prefilled.resid, &places)?, &labels)?;
            let mut logprobs = logprobs.into_iter();
            for row in batch {
                found[row] = logprobs.by_ref().take(rows[row].completion.len()).collect();
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// log p(label) from residual rows `[n, d_model]`, a few rows of logits at a time.
fn label_logprobs(model: &Qwen, resid: &Tensor, labels: &[i64]) -> Result<Vec<f32>> {
    let mut found = Vec::with_capacity(labels.len());
    let n = labels.len() as i64;
    for from in (0..n).step_by(LOGIT_ROWS as usize) {
        let count = LOGIT_ROWS.min(n - from);
        let logits = model.unembed(&resid.f_narrow(0, from, count)?)?.f_to_kind(Kind::Float)?;
        let index =
            Tensor::f_from_slice(&labels[from as usize..(from + count) as usize])?.f_to_device(logits.device())?;
        let chosen = logits.f_gather(1, &index.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
        let logprobs = chosen.f_sub(&logits.f_logsumexp([1], false)?)?.f_to_device(Device::Cpu)?;
        are_numbers(&logprobs)?;
        found.extend(Vec::<f32>::try_from(&logprobs)?);
    }
    Ok(found)
}

/// The logits that predict each token of a row's completion, `[n_completion, d_vocab]`; row k predicts its token k.
pub fn completion_logits(model: &Qwen, row: &Prompt, condition: &Condition<'_>) -> Result<Tensor> {
    if row.completion.is_empty() {
        return Err(Error::Invalid {
            what: "the row's completion".to_owned(),
            expected: "at least one token".to_owned(),
            found: "none".to_owned(),
        });
    }
    tch::no_grad(|| {
        let prefilled = prefill(model, &[row], condition, 0, None)?;
        let places: Vec<(usize, usize)> =
            row.completion.clone().map(|token| (0, token - 1 - prefilled.offset)).collect();
        let logits = model.unembed(&pick(&prefilled.resid, &places)?)?;
        Ok(logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?)
    })
}

/// Per prompt, the residual stream after every block, `[n_layers, pos, d_model]`.
pub fn resid_post(model: &Qwen, prompts: &[Prompt], condition: &Condition<'_>) -> Result<Vec<Tensor>> {
    let points: Vec<HookPoint> = (0..model.config.n_layers).map(HookPoint::ResidPost).collect();
    let capture = |prompt: &Prompt| {
        let mut cache = Cache::default();
        let _ = listen_rows(model, &[prompt], condition, &points, &mut cache, Qwen::resid_final)?;
        let layers = points.iter().map(|point| Ok(cache.get(*point)?.f_squeeze_dim(0)?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&layers, 0)?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?)
    };
    tch::no_grad(|| prompts.iter().map(capture).collect())
}

/// Runs one row and lets a tap see (or change) some hook points, after the condition's edits. Returns the logits,
/// `[1, pos, d_vocab]`. Gradients flow where the caller lets them.
pub fn listen(
    model: &Qwen,
    row: &Prompt,
    condition: &Condition<'_>,
    points: &[HookPoint],
    tap: &mut dyn Tap,
) -> Result<Tensor> {
    listen_rows(model, &[row], condition, points, tap, Qwen::forward)
}

/// The same of several rows, padded on the right, and by `run`: `Qwen::forward`, `Qwen::resid_final` or, to stop early,
/// `Qwen::resid_before`.
pub fn listen_rows(
    model: &Qwen,
    rows: &[&Prompt],
    condition: &Condition<'_>,
    points: &[HookPoint],
    tap: &mut dyn Tap,
    run: impl FnOnce(&Qwen, &Batch, &mut Pass<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    let batch = Batch::of(rows, model.device())?;
    condition.prepare(rows, model, None)?.listen(model, &batch, points, tap, run)
}
