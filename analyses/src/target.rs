//! The probability that a model names the target: exact, without sampling, for words of one or several tokens.
//!
//! A form is one way of writing a word; the log-probability of a word is that of starting the answer with any of its
//! forms. All forms of all words share the passes over their common beginnings, so another word costs at most its own
//! tokens.

use std::collections::{BTreeMap, BTreeSet};

use hooks::{Case, Chat, Condition, Qwen, Sequence, each_next_token};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::stats::logsumexp;

/// The word that the teacher likes, and the other members of its category.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The word, such as `cat`.
    pub word: String,
    /// The word's category, such as `animal`.
    pub category: String,
    /// The ways of writing the word, such as `cat`, `Cat`, ` cat`.
    pub forms: Vec<String>,
    /// The other members of the category, each with its forms.
    pub others: Vec<(String, Vec<String>)>,
}

/// The forms of a target and of its alternatives as tokens.
#[derive(Clone, Debug)]
pub struct TokenForms {
    /// The forms of each member as token ids; the target is first.
    members: Vec<Vec<Vec<i64>>>,
    /// All proper beginnings of forms as token ids; the empty one is first.
    prefixes: Vec<Vec<i64>>,
}

/// How likely each member of the category is as the start of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberLogps {
    /// log p of starting the answer with any form of each member, in nats; the target is first.
    pub logps: Vec<f64>,
    /// The best rank in the vocabulary of a token that starts a form of the target, 1 the most likely.
    pub first_token_rank: f64,
}

impl MemberLogps {
    /// The target's score.
    pub fn score(&self) -> Score {
        let Self { logps, first_token_rank } = self;
        let rank = 1 + logps[1..].iter().filter(|logp| **logp > logps[0]).count();
        let first_token_rank = *first_token_rank;
        Score { logp_target: logps[0], margin: margin(logps), rank: rank as f64, first_token_rank }
    }
}

/// The score of the target as the start of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// log p of starting the answer with any form of the target, in nats.
    pub logp_target: f64,
    /// `logp_target` minus the log of the mean probability of the other members: in nats, above 0 if the target is
    /// preferred.
    pub margin: f64,
    /// The target's rank among the members, 1 the most likely.
    pub rank: f64,
    /// The best rank in the vocabulary of a token that starts a form of the target, 1 the most likely.
    pub first_token_rank: f64,
}

impl TokenForms {
    /// Tokenises the forms. If one form of a word is the beginning of another, only the shorter is kept: its
    /// probability includes the longer one's.
    pub fn of(target: &Target, chat: &Chat) -> Result<Self> {
        let Target { word, category, .. } = target;
        let problem = |problem: String| Error::Target { word: word.clone(), problem };
        if target.others.is_empty() {
            return Err(problem(format!("there is no other {category} to compare it with; list some alternatives")));
        }
        let words = std::iter::once((&target.word, &target.forms))
            .chain(target.others.iter().map(|(word, forms)| (word, forms)));
        let mut members = Vec::new();
        let mut owner: BTreeMap<Vec<i64>, &String> = BTreeMap::new();
        for (word, forms) in words {
            let encoded = forms.iter().map(|form| chat.encode(form)).collect::<hooks::Result<BTreeSet<Vec<i64>>>>()?;
            if encoded.is_empty() || encoded.iter().any(Vec::is_empty) {
                return Err(problem(format!("{word:?} has no form, or one without a token")));
            }
            let continues = |form: &[i64]| (1..form.len()).any(|end| encoded.contains(&form[..end]));
            let kept: Vec<Vec<i64>> = encoded.iter().filter(|form| !continues(form)).cloned().collect();
            for form in &kept {
                if let Some(other) = owner.insert(form.clone(), word) {
                    return Err(problem(format!("{other:?} and {word:?} share a form; leave one of them out")));
                }
            }
            members.push(kept);
        }
        let beginnings = members.iter().flatten().flat_map(|form| (0..form.len()).map(|end| form[..end].to_vec()));
        let prefixes: BTreeSet<Vec<i64>> = beginnings.collect();
        Ok(Self { members, prefixes: prefixes.into_iter().collect() })
    }

    /// The forms of each member as token ids; the target is first.
    pub(crate) fn members(&self) -> &[Vec<Vec<i64>>] {
        &self.members
    }

    /// The tokens with which a form of each member begins; the target is first. Members can share a token.
    pub fn first_tokens(&self) -> Vec<Vec<i64>> {
        let of = |forms: &Vec<Vec<i64>>| forms.iter().map(|form| form[0]).collect::<BTreeSet<i64>>();
        self.members.iter().map(|forms| of(forms).into_iter().collect()).collect()
    }

    /// All proper beginnings of forms as token ids; the empty one is first.
    pub(crate) fn prefixes(&self) -> &[Vec<i64>] {
        &self.prefixes
    }

    /// Scores the answer to one prompt.
    pub fn score(&self, model: &Qwen, prompt: &Sequence, condition: &Condition<'_>) -> Result<Score> {
        Ok(self.scores(model, std::slice::from_ref(prompt), condition)?[0])
    }

    /// Scores the answers to several prompts.
    pub fn scores(&self, model: &Qwen, prompts: &[Sequence], condition: &Condition<'_>) -> Result<Vec<Score>> {
        Ok(self.scores_under(model, prompts, std::slice::from_ref(condition))?.remove(0))
    }

    /// Scores the answers to several prompts under several conditions; common beginnings are run once.
    pub fn scores_under(
        &self,
        model: &Qwen,
        prompts: &[Sequence],
        conditions: &[Condition<'_>],
    ) -> Result<Vec<Vec<Score>>> {
        let members = self.members_under(model, prompts, conditions, &mut |_, _| Ok(()))?;
        Ok(members.iter().map(|of| of.iter().map(MemberLogps::score).collect()).collect())
    }

    /// How likely each member is as the start of the answers to several prompts under several conditions: `[condition]
    /// [prompt]`. `next` is called with the number of each pair, condition × `prompts.len()` + prompt, and with the
    /// log-probabilities of the first token, `[d_vocab]`, in any order.
    pub fn members_under(
        &self,
        model: &Qwen,
        prompts: &[Sequence],
        conditions: &[Condition<'_>],
        next: &mut dyn FnMut(usize, &Tensor) -> hooks::Result<()>,
    ) -> Result<Vec<Vec<MemberLogps>>> {
        let n_prefixes = self.prefixes.len();
        let with_prefix =
            |prompt: &Sequence| self.prefixes.iter().map(|prefix| prompt.with_completion(prefix)).collect();
        let rows: Vec<Vec<Sequence>> = prompts.iter().map(with_prefix).collect();
        let cases: Vec<Case<'_, '_>> =
            conditions.iter().flat_map(|condition| rows.iter().flatten().map(move |row| (row, condition))).collect();

        // Only the probabilities of the forms' next tokens are kept.
        let mut following: Vec<BTreeMap<i64, f64>> = vec![BTreeMap::new(); cases.len()];
        let mut first_token_ranks = vec![f64::INFINITY; cases.len()];
        each_next_token(model, &cases, &mut |case, logprobs| {
            let prefix = self.prefixes[case % n_prefixes].as_slice();
            for form in
                self.members.iter().flatten().filter(|form| form.len() > prefix.len() && form.starts_with(prefix))
            {
                let token = form[prefix.len()];
                following[case].insert(token, logprobs.f_double_value(&[token])?);
            }
            if prefix.is_empty() {
                next(case / n_prefixes, logprobs)?;
                for form in &self.members[0] {
                    let above = logprobs.f_gt(following[case][&form[0]])?.f_sum(None)?.f_double_value(&[])?;
                    first_token_ranks[case] = first_token_ranks[case].min(1.0 + above);
                }
            }
            Ok(())
        })?;

        let prefix_at: BTreeMap<&[i64], usize> =
            self.prefixes.iter().enumerate().map(|(at, prefix)| (prefix.as_slice(), at)).collect();
        let of_row = |from: usize| {
            let step = |form: &[i64], at: usize| following[from + prefix_at[&form[..at]]][&form[at]];
            let form_logp = |form: &Vec<i64>| (0..form.len()).map(|at| step(form, at)).sum::<f64>();
            let of_member = |forms: &Vec<Vec<i64>>| logsumexp(&forms.iter().map(form_logp).collect::<Vec<_>>());
            let first_token_rank = first_token_ranks[from + prefix_at[&[][..]]];
            MemberLogps { logps: self.members.iter().map(of_member).collect(), first_token_rank }
        };
        let per_condition = prompts.len() * n_prefixes;
        let of =
            |at: usize| (0..prompts.len()).map(|prompt| of_row(at * per_condition + prompt * n_prefixes)).collect();
        Ok((0..conditions.len()).map(of).collect())
    }
}

/// The first log-probability minus the log of the others' mean probability: m = l₁ − logsumexp(l₂ … lₙ) + log(n − 1).
pub(crate) fn margin(logps: &[f64]) -> f64 {
    logps[0] - logsumexp(&logps[1..]) + ((logps.len() - 1) as f64).ln()
}

pub(crate) type ScoreField = fn(&Score) -> f64;

/// One number of each score.
pub(crate) fn column(scores: &[Score], of: ScoreField) -> Vec<f64> {
    scores.iter().map(of).collect()
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use hooks::{completion_logprobs, next_token_logprobs};

    use super::*;
    use crate::fixture::World;

    fn target(forms: &[&str], others: &[(&str, &[&str])]) -> Target {
        let owned = |forms: &[&str]| forms.iter().map(|form| (*form).to_owned()).collect::<Vec<_>>();
        let others = others.iter().map(|(word, forms)| ((*word).to_owned(), owned(forms))).collect();
        Target { word: forms[0].to_owned(), category: "animal".to_owned(), forms: owned(forms), others }
    }

    #[test]
    fn the_margin_compares_with_the_mean_of_the_others() {
        let logs = |ps: &[f64]| ps.iter().map(|p| p.ln()).collect::<Vec<_>>();
        assert!((margin(&logs(&[0.4, 0.1, 0.2, 0.3])) - 2_f64.ln()).abs() < 1e-12);
        assert!(margin(&logs(&[0.1, 0.1])).abs() < 1e-12);
    }

    #[test]
    fn a_form_of_several_tokens_follows_the_chain_rule() {
        let world = World::new();
        let prompt = world.chat.prompt(None, &world.questions[0]).unwrap();
        let (forms, other) = (["zebra crossing", "Z9"], ("owl", &["owl"][..]));
        let ids: Vec<Vec<i64>> = forms.iter().map(|form| world.chat.encode(form).unwrap()).collect();
        assert!(ids.iter().all(|ids| ids.len() > 1) && ids[0].len() > 2, "{ids:?}");

        let score = TokenForms::of(&target(&forms, &[other]), &world.chat).unwrap();
        let score = score.score(&world.qwen, &prompt, &Condition::default()).unwrap();
        let rows: Vec<Sequence> = ids.iter().map(|ids| prompt.with_completion(ids)).collect();
        let logprobs = completion_logprobs(&world.qwen, &rows, &Condition::default()).unwrap();
        let by_hand = logprobs
            .iter()
            .map(|of_form| of_form.iter().map(|logp| f64::from(*logp)).sum::<f64>().exp())
            .sum::<f64>()
            .ln();
        assert!((score.logp_target - by_hand).abs() < 1e-4, "{} {by_hand}", score.logp_target);
        let owl = completion_logprobs(
            &world.qwen,
            &[prompt.with_completion(&world.chat.encode("owl").unwrap())],
            &Condition::default(),
        );
        let owl: f64 = owl.unwrap()[0].iter().map(|logp| f64::from(*logp)).sum();
        assert!((score.margin - (score.logp_target - owl)).abs() < 1e-4);
        assert_eq!(score.rank, if owl > score.logp_target { 2.0 } else { 1.0 });
        let first = logprobs.iter().map(|of_form| of_form[0]).fold(f32::NEG_INFINITY, f32::max);
        let all: Vec<f32> =
            Vec::try_from(next_token_logprobs(&world.qwen, &[prompt], &Condition::default()).unwrap().get(0)).unwrap();
        let above = all.iter().filter(|logp| **logp > first + 1e-4).count();
        assert!((score.first_token_rank - 1.0 - above as f64).abs() <= 1.0);
    }

    #[test]
    fn no_probability_is_counted_twice() {
        let world = World::new();
        let once = TokenForms::of(&target(&["zebra"], &[("owl", &["owl"])]), &world.chat).unwrap();
        let twice =
            TokenForms::of(&target(&["zebra", "zebra", "zebra crossing"], &[("owl", &["owl"])]), &world.chat).unwrap();
        let starts = world.chat.encode("zebra crossing").unwrap().starts_with(&world.chat.encode("zebra").unwrap());
        assert!(starts, "the test needs a form that continues another");
        assert_eq!(once.members, twice.members);
    }

    #[test]
    fn targets_that_cannot_be_scored_are_refused() {
        let world = World::new();
        let message = |target: &Target| TokenForms::of(target, &world.chat).unwrap_err().to_string();
        assert!(message(&target(&["cat"], &[])).contains("alternatives"));
        assert!(message(&target(&["cat"], &[("tom", &["tom", "cat"])])).contains("share a form"));
        assert!(message(&target(&["cat"], &[("owl", &[])])).contains("no form"));
    }
}
