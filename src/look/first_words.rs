//! What a model says first: how likely each word of a list is as the start of its answer, and each token of the
//! vocabulary.

use analyses::target::{MemberLogps, TokenForms};
use anyhow::Result;
use hooks::{Condition, Qwen, Sequence};

/// The words' log-probabilities and those of the first token, `[d_vocab]`, under each condition, from one pass.
pub(crate) fn first_words(
    model: &Qwen,
    forms: &TokenForms,
    prompt: &Sequence,
    conditions: &[Condition<'_>],
) -> Result<Vec<(MemberLogps, Vec<f32>)>> {
    let mut next: Vec<Vec<f32>> = vec![vec![]; conditions.len()];
    let members = forms.members_under(model, std::slice::from_ref(prompt), conditions, &mut |at, logprobs| {
        next[at] = Vec::try_from(logprobs.f_exp()?)?;
        Ok(())
    })?;
    Ok(members.concat().into_iter().zip(next).collect())
}

/// The ids of the `top` largest probabilities, the largest first.
pub(crate) fn likeliest(p: &[f32], top: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..p.len()).collect();
    ids.sort_by(|left, right| p[*right].total_cmp(&p[*left]));
    ids.truncate(top);
    ids
}
