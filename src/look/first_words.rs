//! What a model says first: how likely each word of a list is as the start of its answer, and each token of the
//! vocabulary.

use analyses::target::{MemberLogps, TokenForms};
use anyhow::Result;
use hooks::{Condition, Qwen, Sequence};

/// The words' log-probabilities and those of the first token, `[d_vocab]`, under each condition. Each has a pass of its own:
/// so a condition gives the same bits on any machine, whichever others it is compared with.
pub(crate) fn first_words(
    model: &Qwen,
    forms: &TokenForms,
    prompt: &Sequence,
    conditions: &[Condition<'_>],
) -> Result<Vec<(MemberLogps, Vec<f32>)>> {
    let mut found = vec![];
    for condition in conditions {
        let (prompts, condition, mut next) = (std::slice::from_ref(prompt), std::slice::from_ref(condition), vec![]);
        let members = forms.members_under(model, prompts, condition, &mut |_, logprobs| {
            next = Vec::try_from(logprobs.f_exp()?)?;
            Ok(())
        })?;
        found.extend(members.concat().into_iter().map(|members| (members, std::mem::take(&mut next))));
    }
    Ok(found)
}

/// The ids of the `top` largest probabilities, the largest first.
pub(crate) fn likeliest(p: &[f32], top: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..p.len()).collect();
    ids.sort_by(|left, right| p[*right].total_cmp(&p[*left]));
    ids.truncate(top);
    ids
}
