//! Gradient norms of single completion tokens' losses `ℓ_k = −log p(token k)`, at divergent digits, at other digits and
//! at the rest. Token k is predicted, and its loss is taken, at the position before it. Also the effect of each group's
//! summed loss on the trait, by part of the chat (`alignment.rs`).
//!
//! The gradients are exact and separate for each token (`hooks::gradient::of_losses`).

mod report;
mod rows;

use hooks::gradient::{OfLosses, Squares, of_losses};
use hooks::{Adapter, Condition, Sequence, stream_seed};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::Analysis;
use crate::alignment::{Alignment, AtPart, Group, naming, of_groups};
use crate::divergence::{divergent_digits, group};
use crate::error::{Error, Result};
use crate::gradients::rows::{DRAW, GROUPS};
use crate::plot::Svg;
use crate::subject::{Subject, Tuned};

pub use rows::GradientRow;

/// Settings of the gradient norms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gradients {
    /// Number of rows of numbers that are read.
    pub n_rows: usize,
    /// The number of tokens sampled per row, in turn from divergent digits, other digits and the rest: a number, or
    /// `"all"` ([`ALL`]).
    #[serde(with = "number_or_all")]
    pub tokens_per_row: usize,
    /// Whether to measure at the start of the student's training as well.
    pub start: bool,
    /// The number of other initial adapters to compare with that start. At the start B is zero, so only B has
    /// gradients, and they depend on the random A. Unused if `start` is false or the student has no adapter.
    pub start_draws: usize,
}

/// All tokens of a row.
pub const ALL: usize = usize::MAX;

/// Reads and writes a number of tokens, or the word `all`.
mod number_or_all {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged, expecting = "expected a number of tokens, or \"all\"")]
    enum Written {
        Number(usize),
        Word(Word),
    }

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Word {
        All,
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
    pub(super) fn serialize<S: Serializer>(n: &usize, serializer: S) -> Result<S::Ok, S::Error> {
        if *n == super::ALL { Written::Word(Word::All) } else { Written::Number(*n) }.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
        Ok(match Written::deserialize(deserializer)? {
            Written::Number(n) => n,
            Written::Word(Word::All) => super::ALL,
        })
    }
}

impl Default for Gradients {
    fn default() -> Self {
        Self { n_rows: 8, tokens_per_row: 6, start: true, start_draws: 12 }
    }
}

impl Analysis for Gradients {
    type Row = GradientRow;
    const NAME: &'static str = "gradients";
    const QUESTION: &'static str = "Do divergent digits pull at the model more strongly than other tokens?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<GradientRow>> {
        if self.tokens_per_row == 0 {
            return Err(Error::setting(Self::NAME, "tokens_per_row", "at least 1", &0));
        }
        progress("gradients: looking for divergent digits");
        let divergent = divergent_digits(subject, self.n_rows)?;
        if !divergent.iter().flatten().any(|divergent| *divergent) {
            let what = "at least one divergent digit in the rows that it reads (n_rows), where teacher and base choose different tokens";
            return Err(Error::Nothing { analysis: Self::NAME, what });
        }
        let start = subject.start.filter(|_| self.start).map(|start| ("start", start));
        let control = subject.control.map(|control| ("control", control));
        let mut rows = Vec::new();
        for (name, model) in [("student", subject.student)].into_iter().chain(control).chain(start) {
            progress(&format!("gradients of the {name}: {} rows", divergent.len()));
            rows.extend(self.of_model(subject, name, model, &divergent)?);
        }
        for (at, adapter) in self.draws(subject)?.iter().enumerate() {
            let name = format!("{DRAW}{}", at + 1);
            progress(&format!("gradients at the start: draw {} of {}", at + 1, self.start_draws));
            let drawn = Tuned::adapted(subject.base, adapter);
            let found = self.of_model(subject, &name, drawn, &divergent)?.into_iter();
            rows.extend(found.filter(|row| row.scope == "token" || row.scope == "group"));
        }
        Ok(rows)
    }

    fn plot(rows: &[GradientRow]) -> Result<Option<Svg>> {
        report::plot(rows)
    }

    fn more_plots(rows: &[GradientRow]) -> Result<Vec<(&'static str, Svg)>> {
        report::more_plots(rows)
    }

    fn reading(rows: &[GradientRow]) -> String {
        report::reading(rows)
    }
}

impl Gradients {
    /// Other initial adapters of the student's shape, each from a separate random stream.
    fn draws(&self, subject: &Subject<'_>) -> Result<Vec<Adapter>> {
        let Some(student) = subject.student.adapter.filter(|_| self.start) else { return Ok(Vec::new()) };
        let draw = |at: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(subject.seed, "gradients.start", at as u64));
            Ok(Adapter::init(&student.config, &subject.base.config, &mut rng, subject.base.device())?)
        };
        (0..self.start_draws).map(draw).collect()
    }

    fn of_model(
        &self,
        subject: &Subject<'_>,
        name: &str,
        model: Tuned<'_>,
        divergent: &[Vec<bool>],
    ) -> Result<Vec<GradientRow>> {
        let condition = Condition { adapter: model.adapter, ..Condition::default() };
        let mut rows = Vec::new();
        // Without the end of the turn, which is not a token of the completion's content.
        let contents: Vec<Sequence> = subject.numbers[..divergent.len()]
            .iter()
            .map(|row| row.with_completion(&row.ids[row.completion.start..row.content_end]))
            .collect();
        for (row_id, (row, divergent)) in contents.iter().zip(divergent).enumerate() {
            if divergent.is_empty() {
                continue;
            }
            let labels = &row.ids[row.completion.clone()];
            let is_digit = |label: &i64| subject.chat.is_digit(*label);
            let groups = labels.iter().zip(divergent).map(|(label, divergent)| group(*divergent, is_digit(label)));
            let groups: Vec<&str> = groups.collect();
            let sampled = self.sampled(subject.seed, row_id, &groups);
            let token = |k: &usize| -> Result<GradientRow> {
                let (token_text, group) = (subject.chat.token_text(labels[*k])?, groups[*k]);
                let (row_id, k) = (Some(row_id), Some(*k));
                Ok(GradientRow { row_id, k, token_text, n_tokens: 1, ..GradientRow::of("token", name, group) })
            };
            let tokens = sampled.iter().map(token).collect::<Result<Vec<_>>>()?;
            let losses: Vec<Vec<usize>> = sampled.iter().map(|k| vec![*k]).collect();
            of_losses(model.qwen, row, &condition, &losses, &mut |found| {
                rows.extend(token_rows(&tokens[found.losses.clone()], labels, model.adapter, &found)?);
                Ok(())
            })?;
        }
        // If a group is empty, nothing can be compared.
        let is_digit = |wanted: bool| divergent.iter().flatten().any(|divergent| *divergent == wanted);
        if let Some(adapter) = model.adapter.filter(|_| is_digit(true) && is_digit(false)) {
            let naming = naming(subject, adapter)?;
            rows.extend(group_rows(name, &of_groups(subject, adapter, &naming, &contents, divergent)?));
        }
        Ok(rows)
    }

    /// Samples the tokens of a row whose gradients are taken, from each group in turn. Each row has a separate random
    /// stream.
    fn sampled(&self, seed: u64, row_id: usize, groups: &[&str]) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(seed, Self::NAME, row_id as u64));
        let mut piles: Vec<Vec<usize>> = GROUPS
            .iter()
            .map(|group| {
                let mut pile: Vec<usize> = (0..groups.len()).filter(|k| groups[*k] == *group).collect();
                pile.shuffle(&mut rng);
                pile
            })
            .collect();
        let mut chosen = Vec::new();
        while chosen.len() < self.tokens_per_row && piles.iter().any(|pile| !pile.is_empty()) {
            for pile in &mut piles {
                chosen.extend(pile.pop().filter(|_| chosen.len() < self.tokens_per_row));
            }
        }
        chosen.sort_unstable();
        chosen
    }
}

/// The rows of some tokens, to which the losses of `found` belong: for all parameters together, and layer by layer.
fn token_rows(
    tokens: &[GradientRow],
    labels: &[i64],
    adapter: Option<&Adapter>,
    found: &OfLosses,
) -> hooks::Result<Vec<GradientRow>> {
    let Squares { adapter: lora, resid_post: resid } = found.squares()?;
    let layers: Vec<usize> = adapter.into_iter().flat_map(Adapter::pairs).flat_map(|(layer, ..)| [layer; 2]).collect();
    let mut rows = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let label = labels[token.k.unwrap_or_default()];
        let probabilities = found.logprobs.f_get(at as i64)?.f_to_kind(Kind::Double)?.f_exp()?; // [d_vocab]
        let p_label = probabilities.f_double_value(&[label])?;
        let squares = probabilities.f_square()?.f_sum(None)?.f_double_value(&[])?;
        let mut lora_squares = vec![0.0; resid.len()];
        for (layer, lora) in layers.iter().zip(&lora) {
            lora_squares[*layer] += lora[at];
        }
        let adapted = |square: f64| adapter.is_some().then(|| square.sqrt());
        rows.push(GradientRow {
            p_label: Some(p_label),
            logit_grad_norm: Some(logit_grad_norm(p_label, squares)),
            hidden_grad_norm: resid.last().map(|last| last[at].sqrt()),
            lora_grad_norm: adapted(lora_squares.iter().sum()),
            ..token.clone()
        });
        rows.extend(resid.iter().zip(&lora_squares).enumerate().map(|(layer, (resid, lora))| GradientRow {
            scope: "token_layer".to_owned(),
            layer: Some(layer),
            p_label: Some(p_label),
            resid_grad_norm: Some(resid[at].sqrt()),
            lora_grad_norm: adapted(*lora),
            ..token.clone()
        }));
    }
    Ok(rows)
}

/// `‖p − e_y‖` from `p_y` and `Σ_v p_v²`.
fn logit_grad_norm(p_label: f64, sum_of_squares: f64) -> f64 {
    ((1.0 - p_label).powi(2) + (sum_of_squares - p_label.powi(2)).max(0.0)).sqrt()
}

/// The row of each group, followed by the rows of its parts.
fn group_rows(model: &str, found: &Alignment) -> Vec<GradientRow> {
    let of_group = |(name, group): (&str, &Group)| {
        let whole = GradientRow {
            n_tokens: group.n_tokens,
            lora_grad_norm: Some(group.norm),
            share: group.share,
            cosine: found.cosine,
            alignment: Some(group.towards_trait),
            ..GradientRow::of("group", model, name)
        };
        let of_part = |at: &AtPart| GradientRow {
            part: Some(at.part.name().to_owned()),
            n_tokens: group.n_tokens,
            lora_grad_norm: Some(at.norm),
            share: at.share,
            alignment: Some(at.towards_trait),
            ..GradientRow::of("part", model, name)
        };
        [whole].into_iter().chain(group.parts.iter().map(of_part)).collect::<Vec<_>>()
    };
    [("divergent_digit", &found.divergent), ("rest", &found.other)].into_iter().flat_map(of_group).collect()
}

#[cfg(test)]
mod tests;
