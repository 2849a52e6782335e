//! Runs rows in batches, each with a budget of tokens: packed into trees where their edits allow it, else padded. A
//! common beginning of a batch's rows (the system prompt, a question under several gates or one edit) is run once.

use std::ops::Range;

use tch::{Device, Tensor};

use crate::adapter::dose::Doses;
use crate::adapter::lora::Adapter;
use crate::ask::condition::{Condition, Prepared};
use crate::chat::tokens::Sequence;
use crate::error::Result;
use crate::model::pass::Pass;
use crate::model::qwen::Qwen;
use crate::ops::embedding;
use crate::rows::batch::Batch;
use crate::rows::kv_cache::KvCache;
use crate::rows::packing::PackedRow;
use crate::taps::edit::{Edit, EditTap};
use crate::taps::tap::{Hooks, TapAt};

/// Tokens per batch: enough to keep two cores busy, little enough for their memory. A GPU takes more.
pub(super) fn token_budget(device: Device) -> usize {
    if device == Device::Cpu { 1024 } else { 16_384 }
}

/// A prompt and the condition that the model is run under.
pub type Case<'c, 'a> = (&'c Sequence, &'c Condition<'a>);

/// The result of a pass over some cases' tokens, to be read or continued.
pub(crate) struct Prefilled {
    /// The indices of the cases in the call, in the order of the cache's rows.
    pub(crate) cases: Vec<usize>,
    /// The residual stream after the last block, at tokens that are read, `[tokens, d_model]`.
    resid: Tensor,
    /// Per case, the places in `resid` that are read.
    read: Vec<Vec<i64>>,
    /// Keys and values of all positions, if they are kept.
    pub(crate) cache: Option<KvCache>,
}

impl Prefilled {
    /// The residual stream at the tokens that are read, case by case, `[tokens, d_model]`.
    pub(crate) fn read(&self) -> Result<Tensor> {
        let places = self.read.concat();
        embedding(&self.resid, &Tensor::f_from_slice(&places)?.f_to_device(self.resid.device())?)
    }
}

/// Selects the tokens of a row that are read.
type Read = fn(&Sequence) -> Range<usize>;

/// Reads the last token, which predicts the token after the prompt.
pub(crate) const LAST: Read = |prompt| prompt.ids.len() - 1..prompt.ids.len();

/// Reads the tokens that predict the completion.
pub(crate) const PREDICTING: Read = |row| row.completion.start.saturating_sub(1)..row.completion.end.saturating_sub(1);

/// Runs the cases batch by batch and passes each result to `done`; with `keep`, including its keys and values.
pub(crate) fn prefill(
    model: &Qwen,
    cases: &[Case<'_, '_>],
    read: Read,
    keep: bool,
    done: &mut dyn FnMut(Prefilled) -> Result<()>,
) -> Result<()> {
    model.config.check_context("row", cases.iter().map(|(prompt, _)| prompt.ids.len()), 0)?;
    let budget = token_budget(model.device());
    let (packed, padded): (Vec<usize>, Vec<usize>) = (0..cases.len()).partition(|case| is_packable(cases[*case].1));
    for group in batch_groups(cases, &packed)? {
        for members in group.batches(cases, budget) {
            done(group.run(model, cases, members, read, keep)?)?;
        }
    }
    let of_conditions = padded.chunk_by(|one, next| std::ptr::eq(cases[*one].1, cases[*next].1));
    for members in of_conditions.flat_map(|members| by_prompt(cases, members)) {
        let prompts: Vec<&Sequence> = members.iter().map(|case| cases[*case].0).collect();
        for batch in padded_batches(&prompts, budget) {
            let rows: Vec<&Sequence> = batch.iter().map(|row| prompts[*row]).collect();
            let (mut prefilled, _) = prefill_padded(model, &rows, cases[members[0]].1, read, None)?;
            prefilled.cases = batch.into_iter().map(|row| members[row]).collect();
            done(prefilled)?;
        }
    }
    Ok(())
}

/// Groups cases of one condition by prompt, for prompts with many completions (the spellings of an answer): padded rows
/// of a batch share only a beginning that all of them have.
fn by_prompt<'s>(cases: &[Case<'_, '_>], members: &'s [usize]) -> Vec<&'s [usize]> {
    let start = |case: &usize| &cases[*case].0.ids[..cases[*case].0.completion.start];
    let of_prompts: Vec<&[usize]> = members.chunk_by(|one, next| start(one) == start(next)).collect();
    if of_prompts.len() * 4 <= members.len() { of_prompts } else { vec![members] }
}

pub(super) fn is_packable(condition: &Condition<'_>) -> bool {
    condition.edits.iter().all(Edit::is_packable)
}

/// Cases that can share a pass: they have the same adapter, gates on the same blocks and projections, and the same
/// edits. Their gates may select different tokens.
pub(super) struct BatchGroup<'c, 'a> {
    pub(super) adapter: Option<&'a Adapter>,
    /// The condition of the first member; all members have its edits.
    condition: &'c Condition<'a>,
    /// Sorted by their tokens, so that neighbours share the longest beginnings.
    members: Vec<Member>,
}

/// A case by its index, with the doses and edits at its tokens, as a packed row holds them.
pub(super) struct Member {
    pub(super) case: usize,
    doses: Option<Vec<f64>>,
    edits: Option<Vec<usize>>,
}

impl Member {
    fn row<'r>(&'r self, cases: &'r [Case<'_, '_>]) -> PackedRow<'r> {
        PackedRow { ids: &cases[self.case].0.ids, doses: self.doses.as_deref(), edits: self.edits.as_deref() }
    }
}

pub(super) fn batch_groups<'c, 'a>(cases: &[Case<'c, 'a>], which: &[usize]) -> Result<Vec<BatchGroup<'c, 'a>>> {
    let (mut found, mut sets): (Vec<BatchGroup<'c, 'a>>, _) = (Vec::new(), Vec::new());
    for case in which {
        let (prompt, condition) = cases[*case];
        let (adapter, doses) = condition.acting(prompt)?;
        let is_alike = |group: &&mut BatchGroup<'c, 'a>| {
            let other = group.condition;
            let with_adapter = match (group.adapter, adapter) {
                (Some(theirs), Some(own)) => std::ptr::eq(theirs, own) && other.gate.fits(&condition.gate),
                (theirs, own) => theirs.is_none() && own.is_none(),
            };
            with_adapter && (std::ptr::eq(other, condition) || other.edits.is_empty() && condition.edits.is_empty())
        };
        let member = Member { case: *case, doses, edits: acting(&condition.edits, prompt, &mut sets)? };
        match found.iter_mut().find(is_alike) {
            Some(group) => group.members.push(member),
            None => found.push(BatchGroup { adapter, condition, members: vec![member] }),
        }
    }
    for group in &mut found {
        group.members.sort_by(|one, other| one.row(cases).tokens().cmp(other.row(cases).tokens()));
    }
    Ok(found)
}

/// Per token of a row, the set of edits that act at it, as an index into `sets`; `None` if all edits act everywhere.
fn acting(edits: &[Edit], row: &Sequence, sets: &mut Vec<Vec<bool>>) -> Result<Option<Vec<usize>>> {
    let chosen = edits.iter().filter_map(|edit| edit.chosen(row).transpose()).collect::<Result<Vec<_>>>()?;
    if chosen.is_empty() {
        return Ok(None);
    }
    let number = |token: usize| {
        let set: Vec<bool> = chosen.iter().map(|chosen| chosen[token]).collect();
        sets.iter().position(|known| *known == set).unwrap_or_else(|| {
            sets.push(set);
            sets.len() - 1
        })
    };
    Ok(Some((0..row.ids.len()).map(number).collect()))
}

impl BatchGroup<'_, '_> {
    /// Splits the members into batches of at most `budget` distinct tokens.
    pub(super) fn batches(&self, cases: &[Case<'_, '_>], budget: usize) -> Vec<&[Member]> {
        let (mut batches, mut from, mut size) = (Vec::new(), 0, 0);
        for (at, member) in self.members.iter().enumerate() {
            let row = member.row(cases);
            let shared = if at > from { row.shared(&self.members[at - 1].row(cases)) } else { 0 };
            if at > from && size + row.ids.len() - shared > budget {
                batches.push(&self.members[from..at]);
                (from, size) = (at, row.ids.len());
            } else {
                size += row.ids.len() - shared;
            }
        }
        batches.push(&self.members[from..]);
        batches
    }

    /// Some members as one batch, with its doses if they are gated, and the taps of the edits.
    pub(super) fn batch(
        &self,
        model: &Qwen,
        cases: &[Case<'_, '_>],
        members: &[Member],
    ) -> Result<(Batch, Option<Doses>, Vec<EditTap>)> {
        let rows: Vec<PackedRow<'_>> = members.iter().map(|member| member.row(cases)).collect();
        let batch = Batch::packed(&[&rows], true, model.device())?;
        let gated = rows.iter().any(|row| row.doses.is_some());
        let gate = gated.then(|| self.condition.gate.spread(batch.doses(), model.device())).transpose()?;
        let prompts: Vec<&Sequence> = members.iter().map(|member| cases[member.case].0).collect();
        let taps = self.condition.taps(&prompts, &batch, model)?;
        Ok((batch, gate, taps))
    }

    fn run(
        &self,
        model: &Qwen,
        cases: &[Case<'_, '_>],
        members: &[Member],
        read: Read,
        keep: bool,
    ) -> Result<Prefilled> {
        let (batch, gate, mut taps) = self.batch(model, cases, members)?;
        let capacity = members.iter().map(|member| cases[member.case].0.ids.len()).max().unwrap_or(0);
        let rows = members.len() as i64;
        let cache = || KvCache::new(&model.config, rows, capacity as i64, model.activation_kind(), model.device());
        let mut cache = keep.then(cache).transpose()?;
        let hooks = taps.iter_mut().fold(Hooks::default(), EditTap::hook);
        let mut pass = Pass { adapter: self.adapter, doses: gate, hooks, kv_cache: cache.as_mut(), dropout: None };
        let prompts = members.iter().map(|member| cases[member.case].0).enumerate();
        let read = prompts.map(|(row, prompt)| read(prompt).map(|token| batch.place(row, token)).collect());
        let mut read: Vec<Vec<i64>> = read.collect();
        let mut places = read.concat();
        places.sort_unstable();
        places.dedup();
        for place in read.iter_mut().flatten() {
            *place = places.partition_point(|other| *other < *place) as i64;
        }
        let places = Tensor::f_from_slice(&places)?.f_to_device(model.device())?;
        let resid = model.resid_at(&batch, &places, &mut pass)?;
        drop(pass);
        Ok(Prefilled { cases: members.iter().map(|member| member.case).collect(), resid, read, cache })
    }
}

/// Runs padded rows under one condition, their common beginning once. This is needed if edits change attention scores,
/// if a tap looks at rows, and for answers under edits. Packed passes are tested against it.
pub(crate) fn prefill_padded<'p, 'a: 'p>(
    model: &Qwen,
    rows: &[&Sequence],
    condition: &Condition<'a>,
    read: Read,
    tap: Option<TapAt<'p>>,
) -> Result<(Prefilled, Prepared<'p>)> {
    let device = model.device();
    let batch = Batch::of(rows, device)?;
    let mut prepared = condition.prepare(rows, model, tap)?;
    let width = batch.width();
    let new_cache = |n: usize| KvCache::new(&model.config, n as i64, width as i64, model.activation_kind(), device);
    let offset = worth_it(shared_start(rows).min(prepared.shared));
    let (mut cache, rest) = if offset == 0 {
        (new_cache(rows.len())?, batch)
    } else {
        let first = Batch::from_ids(&[&rows[0].ids[..offset]], device)?;
        let mut cache = new_cache(1)?;
        let _ = prepared.prompt(model, &first, 0..offset, Some(&mut cache))?;
        (cache.select(&vec![0; rows.len()])?, batch.narrow(offset, width)?)
    };
    let resid = prepared.prompt(model, &rest, offset..width, Some(&mut cache))?;
    let (_, pos, d_model) = resid.size3()?;
    let place = |row: usize, token: usize| row as i64 * pos + token as i64 - offset as i64;
    let read = rows.iter().enumerate().map(|(row, prompt)| read(prompt).map(|token| place(row, token)).collect());
    let (cases, read) = ((0..rows.len()).collect(), read.collect());
    Ok((Prefilled { cases, resid: resid.f_reshape([-1, d_model])?, read, cache: Some(cache) }, prepared))
}

/// The length of the common beginning of all rows, in ids and classes. It ends before the token that predicts any row's
/// answer.
fn shared_start(rows: &[&Sequence]) -> usize {
    let [first, others @ ..] = rows else { return 0 };
    if others.is_empty() {
        return 0;
    }
    let limit = rows.iter().map(|row| row.completion.start.min(row.ids.len()).saturating_sub(1)).min().unwrap_or(0);
    let same =
        |at: &usize| others.iter().all(|row| row.ids[*at] == first.ids[*at] && row.classes[*at] == first.classes[*at]);
    (0..limit).take_while(same).count()
}

/// The length of a shared start, or 0 if it is too short to be worth a separate pass.
fn worth_it(shared: usize) -> usize {
    if shared < 8 { 0 } else { shared }
}

/// The rows' indices in batches of similar lengths, each of `budget` tokens at most. The common beginning is not
/// counted, since a batch runs it once.
fn padded_batches(rows: &[&Sequence], budget: usize) -> Vec<Vec<usize>> {
    let shared = worth_it(shared_start(rows));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hook_point::HookPoint;
    use crate::taps::edit::Change;

    #[test]
    fn a_batch_holds_as_many_distinct_tokens_as_its_budget_allows() {
        // Ten rows of 8 tokens, of which any two have the first 4 in common: 8 + 4 + 4 + 4 tokens fit into 20.
        let row = |row: i64| Sequence {
            ids: (0..8).map(|at| if at < 4 { at } else { 10 * row + at }).collect(),
            ..Sequence::default()
        };
        let (prompts, condition) = ((0..10).map(row).collect::<Vec<_>>(), Condition::default());
        let cases: Vec<Case<'_, '_>> = prompts.iter().map(|prompt| (prompt, &condition)).collect();
        let sizes = |budget: usize| -> Vec<usize> {
            let found = batch_groups(&cases, &(0..10).collect::<Vec<_>>()).unwrap();
            assert_eq!(found.len(), 1, "rows of one condition share a pass");
            found[0].batches(&cases, budget).iter().map(|members| members.len()).collect()
        };
        assert_eq!(sizes(20), [4, 4, 2]);
        assert_eq!(sizes(43), [9, 1]);
        assert_eq!(sizes(44), [10]);
        assert_eq!(sizes(1), [1; 10], "a row that is longer than the budget is run alone");
    }

    #[test]
    fn conditions_share_a_pass_if_neither_has_edits() {
        let prompt = Sequence { ids: vec![1, 2, 3], ..Sequence::default() };
        let edit = Edit { at: HookPoint::ResidPost(0), tokens: None, change: Change::Scale(0.5) };
        let (plain, other) = (Condition::default(), Condition::default());
        let edited = Condition { edits: vec![edit], ..Condition::default() };
        let n_groups = |conditions: [&Condition<'_>; 2]| {
            let cases: Vec<Case<'_, '_>> = conditions.iter().map(|condition| (&prompt, *condition)).collect();
            batch_groups(&cases, &[0, 1]).unwrap().len()
        };
        assert_eq!(
            [[&plain, &other], [&plain, &edited], [&edited, &plain], [&edited, &edited]].map(n_groups),
            [1, 2, 2, 1]
        );
    }

    #[test]
    fn short_prompts_share_a_pass() {
        let (model, chat) = crate::open("tiny-random").unwrap();
        let prompts = ["One?", "Two?", "Three?"].map(|user| chat.prompt(None, user).unwrap());
        let condition = Condition::default();
        let cases: Vec<Case<'_, '_>> = prompts.iter().map(|prompt| (prompt, &condition)).collect();
        let mut passes = vec![];
        let mut done = |prefilled: Prefilled| {
            passes.push(prefilled.cases.len());
            Ok(())
        };
        tch::no_grad(|| prefill(&model, &cases, LAST, false, &mut done)).unwrap();
        assert_eq!(passes, [3]);
    }
}
