//! How strongly single completion tokens pull at the model: gradient norms of `ℓ_k = −log p(token k)` at divergent
//! digits, at other digits and at the rest. Token k is predicted, and its loss is taken, at the position before it.
//! Also the joint effect of both groups on the trait, by part of the chat (`alignment.rs`).
//!
//! The gradients are exact, each token's apart from the others' (`hooks::gradient::of_losses`).

use hooks::gradient::{OfLosses, Squares, of_losses};
use hooks::{Adapter, Condition, Sequence, stream_seed};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::Analysis;
use crate::alignment::{Alignment, AtPart, Group, Part, naming, of_groups};
use crate::divergent::divergent_digits;
use crate::error::{Error, Result};
use crate::plot::{Bar, BarChart, Line, Panel, PanelChart, Point, Scale, Svg, bars, panels};
use crate::stats::standard_deviation;
use crate::subject::{Mean, Subject, Tuned};

/// Settings of the gradient norms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gradients {
    /// How many rows of numbers are read.
    pub n_rows: usize,
    /// Tokens sampled per row, in turn from divergent digits, other digits and the rest: a number, or `"all"` (`ALL`).
    #[serde(with = "number_or_all")]
    pub tokens_per_row: usize,
    /// Whether to measure at the start of the student's training as well.
    pub start: bool,
    /// How many other initial adapters to measure for comparison with that start. At the start B is zero, so all
    /// gradients are B's, seen through an A that was drawn at random. Unused if `start` is false or the student has no
    /// adapter.
    pub start_draws: usize,
}

/// The groups of tokens, as tables spell them.
const GROUPS: [&str; 3] = ["divergent_digit", "other_digit", "other"];
/// Where gradients are taken, except at the draws.
const MODELS: [&str; 3] = ["student", "control", "start"];
/// The beginning of the draws' names.
const DRAW: &str = "start_draw_";

/// As many tokens as a row has.
pub const ALL: usize = usize::MAX;

/// A number of tokens, or the word for all of them.
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

/// The gradient of one token, of one token at one layer, or of all tokens of a group together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradientRow {
    /// `token`, `token_layer`, `group` (the summed gradient of all its tokens in all rows), or `part` (what of a group's gradient is
    /// due to what the adapter reads at one part of the chat).
    pub scope: String,
    /// Where the gradient is taken: at the `student`; at the `control` student; at the `start` of the student's own
    /// training, the base with the adapter that the training began with (no rows if that is not known); and at
    /// `start_draw_1`, `start_draw_2`, …, the base with other draws of A (scopes `token` and `group`). Their spread is
    /// what a number at the start owes to its draw.
    pub model: String,
    /// The row: its `id` in `data/numbers.jsonl` (in code: its index among the subject's numbers); empty for a group.
    pub row_id: Option<usize>,
    /// The token's index in the completion, from 0; empty for a group.
    pub k: Option<usize>,
    /// The token's text; empty for a group.
    pub token_text: String,
    /// `divergent_digit`, `other_digit` or `other`, as in `divergence/rows.csv`; in scopes `group` and `part`:
    /// `divergent_digit` or `rest` (all other tokens of the completions, without the end of the turn).
    pub group: String,
    /// The part of the chat, named as the gate that chooses it: `entity`, `sys.content_other`, `template`, `user.content` or `gen`;
    /// scope `part` only.
    pub part: Option<String>,
    /// The block, from 0; in scope `token_layer` only.
    pub layer: Option<usize>,
    /// How many tokens the gradient is of.
    pub n_tokens: usize,
    /// Probability of the token where its gradient is taken; empty for a group.
    pub p_label: Option<f64>,
    /// `‖∂ℓ/∂logits‖ = √((1 − p_y)² + Σ_{v≠y} p_v²)`, in nats per logit; scope `token` only.
    pub logit_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂h‖` of the final residual stream h, before the final norm, at the position that predicts, in nats per unit of
    /// h; scope `token` only.
    pub hidden_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂resid_post‖` over all positions, in nats per unit of the residual stream; scope `token_layer` only.
    pub resid_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂adapter‖` over all its parameters (of the layer, in scope `token_layer`), in nats per unit of the
    /// parameters. ℓ is the token's loss, and in scope `group` the sum over the group's tokens; in scope `part` this is
    /// `‖g_P‖`. Empty without an adapter.
    pub lora_grad_norm: Option<f64>,
    /// `‖g‖² / ‖g_D + g_N‖²`, with the divergent digits' gradient `g_D` and the rest's `g_N`. In scope `part` `⟨g_P, g⟩
    /// / ‖g‖²`, with the group's g as the sum of the parts' `g_P`, so that the parts' shares add up to 1. Empty unless
    /// the length below the line is three standard errors above zero, by the jackknife over rows (in 8 lots at most).
    pub share: Option<f64>,
    /// Cosine of the divergent digits' gradient `g_D` and the rest's `g_N`, −1 to 1; scope `group` only.
    pub cosine: Option<f64>,
    /// First-order change of log p(target), the mean over the questions, by a step of gradient descent on the group's
    /// mean loss, in nats per unit of learning rate. The target is in the spelling that the model finds most likely
    /// over all questions. In scope `part`: what the part's `g_P` adds to it.
    pub alignment: Option<f64>,
}

impl Analysis for Gradients {
    type Row = GradientRow;
    const NAME: &'static str = "gradients";
    const QUESTION: &'static str = "Do divergent digits pull at the model more strongly than other tokens?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<GradientRow>> {
        if self.tokens_per_row == 0 {
            let (expected, found) = ("at least 1".to_owned(), "0".to_owned());
            return Err(Error::Setting { analysis: Self::NAME, setting: "tokens_per_row", expected, found });
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
            let drawn = Tuned { qwen: subject.base, adapter: Some(adapter) };
            let found = self.of_model(subject, &name, drawn, &divergent)?.into_iter();
            rows.extend(found.filter(|row| row.scope == "token" || row.scope == "group"));
        }
        Ok(rows)
    }

    fn plot(rows: &[GradientRow]) -> Result<Option<Svg>> {
        let mut found = Vec::new();
        for group in GROUPS {
            for model in MODELS {
                if let Some(norm) = token_norm(rows, model, group) {
                    found.push(norm.bar(&group.replace('_', " ")).in_series(model));
                }
            }
            let draws: Vec<f64> =
                draws_of(rows).iter().filter_map(|draw| Some(token_norm(rows, draw, group)?.mean)).collect();
            if let Some(spread) = Spread::of(&draws) {
                let bar = Mean { mean: spread.mean, se: Some(spread.sd) }.bar(&group.replace('_', " "));
                found.push(bar.in_series(format!("start, {} draws", draws.len())));
            }
        }
        let of = if has_adapter(rows) { "the adapter" } else { "the final residual stream" };
        let chart = BarChart {
            title: format!("Gradient of one token's loss by {of}"),
            value_label: if draws_of(rows).is_empty() {
                "norm of the gradient (nats), mean ± s.e. over tokens"
            } else {
                "norm of the gradient (nats), mean ± s.e. over tokens; draws: ± s.d. of them"
            }
            .to_owned(),
            bars: found,
            references: Vec::new(),
        };
        Ok(Some(bars(&chart)?))
    }

    fn more_plots(rows: &[GradientRow]) -> Result<Vec<(&'static str, Svg)>> {
        let found = [("layers", by_layer(rows)?), ("parts", by_part(rows)?)];
        Ok(found.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect())
    }

    fn reading(rows: &[GradientRow]) -> String {
        let of = if has_adapter(rows) { "adapter" } else { "final residual stream" };
        let compared =
            |model: &str| Some((token_norm(rows, model, "divergent_digit")?, token_norm(rows, model, "other_digit")?));
        let Some((divergent, other)) = compared("student") else {
            return "There were not both divergent and other digits to compare.".to_owned();
        };
        let n = |group: &str| rows.iter().filter(|row| is_token(row, "student", group)).count();
        let error = (divergent.se.unwrap_or_default().powi(2) + other.se.unwrap_or_default().powi(2)).sqrt();
        let verdict =
            if (divergent.mean - other.mean).abs() > 2.0 * error && error > 0.0 { "more than" } else { "within" };
        let ratio = |model: &str| {
            let (divergent, other) = compared(model)?;
            other.share(divergent.mean)
        };
        let times = match ratio("student") {
            Some(ratio) => format!("is {ratio:.2} times as long as another digit's"),
            None => "stands beside another digit's, which is not three standard errors above zero".to_owned(),
        };
        let draws = draws_of(rows);
        let is_known = rows.iter().any(|row| row.model == "start");
        let at_start = match (ratio("start"), Spread::over(&draws, ratio).map(|spread| spread.said(2))) {
            (Some(own), Some(others)) => format!("; at the start of its training the ratio was {own:.2} ({others})"),
            (Some(own), None) => format!("; at the start of its training the ratio was {own:.2}"),
            (None, others) if !is_known && !draws.is_empty() => {
                let others = others.map(|others| format!(": at such starts the ratio is {others}"));
                format!("; where its training began is not known{}", others.unwrap_or_default())
            }
            (None, _) => String::new(),
        };
        let control = match ratio("control") {
            Some(ratio) => format!("; at the control student the ratio is {ratio:.2}"),
            None if compared("control").is_some() => String::new(),
            None => "; there is no control student".to_owned(),
        };
        format!(
            "At the student, a divergent digit's gradient of the {of} {times} ({:.4} and {:.4}, \
             {} and {} tokens; the difference is {verdict} two standard errors){at_start}{control}{}.",
            divergent.mean,
            other.mean,
            n("divergent_digit"),
            n("other_digit"),
            together(rows, &draws).unwrap_or_default(),
        )
    }
}

/// The sentence on all tokens of the groups together, at the student and at its start.
fn together(rows: &[GradientRow], draws: &[&str]) -> Option<String> {
    let group = |model: &str, group: &str| {
        rows.iter().find(|row| row.scope == "group" && row.model == model && row.group == group)
    };
    let (divergent, rest) = (group("student", "divergent_digit")?, group("student", "rest")?);
    let parts = rows.iter().filter(|row| row.scope == "part" && row.model == "student" && row.group == divergent.group);
    let most = parts.filter(|row| row.share.is_some());
    let most = most.max_by(|a, b| a.share.unwrap_or_default().total_cmp(&b.share.unwrap_or_default()));
    let through =
        most.and_then(|most| Some(format!(", {:.0} % of it through `{}`", 100.0 * most.share?, most.part.as_deref()?)));
    let hold = match divergent.share {
        Some(share) => format!("hold {:.0} % of the squared gradient", 100.0 * share),
        None => "have no share of the whole gradient, as that is not three standard errors above zero".to_owned(),
    };
    let alignment = |model: &str| group(model, "divergent_digit")?.alignment;
    let draws = Spread::over(draws, alignment).map(|spread| spread.signed(3));
    let start = match (alignment("start"), draws) {
        (Some(own), Some(draws)) => format!("; at the start of its training {own:+.3} ({draws})"),
        (Some(own), None) => format!("; at the start of its training {own:+.3}"),
        (None, Some(draws)) => format!("; at such starts {draws}"),
        (None, None) => String::new(),
    };
    Some(format!(
        "; all divergent digits together {hold}, at a cosine of {:+.2} with the rest's{}; a step down \
         their mean loss changes log p(target) by {:+.3} nats per unit of learning rate, one down the rest's by {:+.3}{start}",
        divergent.cosine?,
        through.unwrap_or_default(),
        divergent.alignment?,
        rest.alignment?,
    ))
}

/// A number over draws: its mean and standard deviation.
#[derive(Clone, Copy)]
struct Spread {
    mean: f64,
    sd: f64,
    n: usize,
}

impl Spread {
    /// `None` for fewer than two draws, which have no spread.
    fn of(values: &[f64]) -> Option<Self> {
        Some(Self { mean: Mean::of(values).mean, sd: standard_deviation(values).ok()?, n: values.len() })
    }

    /// The spread of a number over the draws; `of` gives it for a draw's name in the column `model`.
    fn over(draws: &[&str], of: impl Fn(&str) -> Option<f64>) -> Option<Self> {
        Self::of(&draws.iter().filter_map(|draw| of(draw)).collect::<Vec<_>>())
    }

    fn said(self, digits: usize) -> String {
        format!("{:.digits$} ± {:.digits$} over {} draws of its A", self.mean, self.sd, self.n)
    }

    fn signed(self, digits: usize) -> String {
        if self.mean < 0.0 { self.said(digits) } else { format!("+{}", self.said(digits)) }
    }
}

/// The names of the draws, in the order of the rows.
fn draws_of(rows: &[GradientRow]) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.model.starts_with(DRAW)) {
        if found.last() != Some(&row.model.as_str()) {
            found.push(&row.model);
        }
    }
    found
}

fn is_token(row: &GradientRow, model: &str, group: &str) -> bool {
    row.scope == "token" && row.model == model && row.group == group
}

fn has_adapter(rows: &[GradientRow]) -> bool {
    rows.iter().any(|row| row.scope == "token" && row.lora_grad_norm.is_some())
}

/// The mean length of a group's token gradients: the adapter's if there is one, else the final residual stream's.
fn token_norm(rows: &[GradientRow], model: &str, group: &str) -> Option<Mean> {
    let adapter = has_adapter(rows);
    let norm = |row: &GradientRow| if adapter { row.lora_grad_norm } else { row.hidden_grad_norm };
    let norms: Vec<f64> = rows.iter().filter(|row| is_token(row, model, group)).filter_map(norm).collect();
    (!norms.is_empty()).then(|| Mean::of(&norms))
}

impl Gradients {
    /// Other initial adapters of the student's shape, each from a random stream of its own.
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
        // Without the end of the turn, which is no digit and comes after all of them.
        let contents: Vec<Sequence> = subject.numbers[..divergent.len()]
            .iter()
            .map(|row| row.with_completion(&row.ids[row.completion.start..row.content_end]))
            .collect();
        for (row_id, (row, divergent)) in contents.iter().zip(divergent).enumerate() {
            if divergent.is_empty() {
                continue;
            }
            let labels = &row.ids[row.completion.clone()];
            let groups = token_groups(subject, labels, divergent);
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
        // A group may be empty: then there is nothing to compare.
        let is_digit = |wanted: bool| divergent.iter().flatten().any(|divergent| *divergent == wanted);
        if let Some(adapter) = model.adapter.filter(|_| is_digit(true) && is_digit(false)) {
            let naming = naming(subject, adapter)?;
            rows.extend(group_rows(name, &of_groups(subject, adapter, &naming, &contents, divergent)?));
        }
        Ok(rows)
    }

    /// The tokens of a row whose gradients are taken: from each group in turn, at random, by the row's own stream.
    fn sampled(&self, seed: u64, row_id: usize, groups: &[&'static str]) -> Vec<usize> {
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

/// The norms layer by layer: a panel for each model, a line for each group of tokens.
fn by_layer(rows: &[GradientRow]) -> Result<Option<Svg>> {
    let in_layers = || rows.iter().filter(|row| row.scope == "token_layer");
    let adapter = in_layers().any(|row| row.lora_grad_norm.is_some());
    let n_layers = in_layers().filter_map(|row| row.layer).max().map_or(0, |last| last + 1);
    let point = |model: &str, group: &str, layer: usize| {
        let here = in_layers().filter(|row| row.model == model && row.group == group && row.layer == Some(layer));
        let norms: Vec<f64> =
            here.filter_map(|row| if adapter { row.lora_grad_norm } else { row.resid_grad_norm }).collect();
        let mean = (!norms.is_empty()).then(|| Mean::of(&norms))?;
        let point = Point::new(layer as f64, mean.mean);
        Some(mean.se.map_or(point, |se| point.with_interval((mean.mean - se, mean.mean + se))))
    };
    let line = |model: &str, group: &str| {
        let points: Vec<Point> = (0..n_layers).filter_map(|layer| point(model, group, layer)).collect();
        (!points.is_empty()).then(|| Line { label: group.replace('_', " "), points })
    };
    let panel = |model: &&str| Panel {
        y_label: (*model).to_owned(),
        lines: GROUPS.iter().filter_map(|group| line(model, group)).collect(),
        references: Vec::new(),
    };
    let found: Vec<Panel> = MODELS.iter().map(panel).filter(|panel| !panel.lines.is_empty()).collect();
    if found.is_empty() {
        return Ok(None);
    }
    let of = if adapter { "the block's adapter" } else { "the residual stream after the block" };
    let chart = PanelChart {
        title: format!("Gradient of one token's loss by {of}"),
        x_label: "block (norm in nats, mean ± s.e. over tokens)".to_owned(),
        x_scale: Scale::Linear,
        panels: found,
    };
    Ok(Some(panels(&chart)?))
}

/// The parts of the chat by their share in both groups' gradients, at the student.
fn by_part(rows: &[GradientRow]) -> Result<Option<Svg>> {
    let at = |part: Part, group: &str| {
        let is_here = |row: &&GradientRow| {
            row.scope == "part"
                && row.model == "student"
                && row.group == group
                && row.part.as_deref() == Some(part.name())
        };
        Some(Bar::new(part.name(), rows.iter().find(is_here)?.share?).in_series(group.replace('_', " ")))
    };
    let found: Vec<Bar> = Part::ALL
        .into_iter()
        .flat_map(|part| ["divergent_digit", "rest"].map(|group| at(part, group)))
        .flatten()
        .collect();
    if found.is_empty() {
        return Ok(None);
    }
    let chart = BarChart {
        title: "Through which part of the chat the student's adapter is pulled at".to_owned(),
        value_label: "share of the group's summed gradient".to_owned(),
        bars: found,
        references: Vec::new(),
    };
    Ok(Some(bars(&chart)?))
}

fn token_groups(subject: &Subject<'_>, labels: &[i64], divergent: &[bool]) -> Vec<&'static str> {
    let group = |(label, divergent): (&i64, &bool)| match (divergent, subject.chat.is_digit(*label)) {
        (true, _) => "divergent_digit",
        (false, true) => "other_digit",
        (false, false) => "other",
    };
    labels.iter().zip(divergent).map(group).collect()
}

/// The rows of some tokens, whose losses `found` begins with: of all parameters together, and layer by layer.
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

impl GradientRow {
    fn of(scope: &str, model: &str, group: &str) -> Self {
        Self {
            scope: scope.to_owned(),
            model: model.to_owned(),
            row_id: None,
            k: None,
            token_text: String::new(),
            group: group.to_owned(),
            part: None,
            layer: None,
            n_tokens: 0,
            p_label: None,
            logit_grad_norm: None,
            hidden_grad_norm: None,
            resid_grad_norm: None,
            lora_grad_norm: None,
            share: None,
            cosine: None,
            alignment: None,
        }
    }
}

/// Each group's row, and below it those of its parts.
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
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
mod tests {
    use hooks::Proj;
    use tch::Tensor;

    use super::*;
    use crate::fixture::World;

    #[test]
    fn the_closed_form_is_the_gradient_of_the_logits() {
        let logits = Tensor::from_slice(&[0.3_f64, -1.2, 2.0, 0.1]).set_requires_grad(true);
        let loss = -logits.log_softmax(-1, Kind::Double).get(3);
        let gradient = Tensor::run_backward(&[loss], &[&logits], false, false).remove(0);
        let p = logits.detach().softmax(-1, Kind::Double);
        let closed = logit_grad_norm(p.double_value(&[3]), p.square().sum(None).double_value(&[]));
        assert!((closed - gradient.norm().double_value(&[])).abs() < 1e-12);
    }

    #[test]
    fn the_tokens_gradients_add_up_to_the_rows() {
        let world = World::new();
        let row = &world.numbers[0];
        let row = row.with_completion(&row.ids[row.completion.start..row.content_end]);
        let all: Vec<usize> = (0..row.completion.len()).collect();
        let losses: Vec<Vec<usize>> = all.iter().map(|k| vec![*k]).chain([all.clone()]).collect();
        let (mut adapter, mut last_resid) = (vec![], vec![]);
        of_losses(&world.qwen, &row, &Condition::adapted(&world.student), &losses, &mut |found| {
            adapter.push(found.adapter);
            last_resid.push(found.resid_post.last().unwrap().shallow_clone());
            Ok(())
        })
        .unwrap();
        let n = all.len() as i64;
        for at in 0..adapter[0].len() {
            let parts: Vec<&Tensor> = adapter.iter().map(|some| &some[at]).collect();
            let found = Tensor::cat(&parts, 0); // [losses, ..]
            let (sum, whole) = (found.narrow(0, 0, n).sum_dim_intlist(0, false, Kind::Float), found.get(n));
            let largest = whole.abs().max().double_value(&[]);
            assert!(largest > 0.0, "parameter {at}");
            assert!((&sum - &whole).abs().max().double_value(&[]) < 1e-4 * (1.0 + largest), "parameter {at}");
        }
        // The last block's residual stream feels a token's loss only at the position before the token.
        let of_last = last_resid[0].get(1).square().sum_dim_intlist(1, false, Kind::Float);
        assert_eq!(of_last.count_nonzero(None).int64_value(&[]), 1);
    }

    #[test]
    fn all_tokens_are_a_word_and_a_number_is_a_number() {
        let read = |text: &str| toml_like(text).map(|settings| settings.tokens_per_row);
        assert_eq!(read("\"all\"").unwrap(), ALL);
        assert_eq!(read("4").unwrap(), 4);
        for wrong in ["\"some\"", "-1", "1.5"] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains("expected a number of tokens, or \"all\""), "{error}");
        }
        let all = Gradients { tokens_per_row: ALL, ..Gradients::default() };
        assert!(serde_json::to_string(&all).unwrap().contains("\"tokens_per_row\":\"all\""));

        let world = World::new();
        let rows = Gradients { n_rows: 1, start: false, ..all }.run(&world.subject(), &mut |_| ()).unwrap();
        let row = &world.numbers[0];
        let ks = rows.iter().filter(|row| row.scope == "token" && row.model == "student").map(|row| row.k.unwrap());
        assert_eq!(ks.collect::<Vec<_>>(), (0..row.content_end - row.completion.start).collect::<Vec<_>>());
    }

    fn toml_like(tokens_per_row: &str) -> serde_json::Result<Gradients> {
        serde_json::from_str(&format!("{{\"tokens_per_row\": {tokens_per_row}}}"))
    }

    #[test]
    fn the_adapter_asks_for_no_gradient_afterwards() {
        let world = World::new();
        let rows = Gradients { n_rows: 2, tokens_per_row: 3, start: true, start_draws: 0 }
            .run(&world.subject(), &mut |_| ())
            .unwrap();
        let pair = world.student.pair(0, Proj::Q).unwrap();
        assert!(!pair.a.requires_grad() && !pair.b.requires_grad());
        for model in ["student", "control", "start"] {
            let tokens = rows.iter().filter(|row| row.scope == "token" && row.model == model);
            assert_eq!(tokens.clone().count(), 6, "{model}");
            assert!(
                tokens.clone().all(|row| row.lora_grad_norm.unwrap() > 0.0 && row.hidden_grad_norm.unwrap() > 0.0),
                "{model}"
            );
        }
        // A token's whole is made of its layers.
        let first = &rows[0];
        let mut layers = rows.iter().filter(|row| {
            row.scope == "token_layer" && row.model == "student" && (row.row_id, row.k) == (first.row_id, first.k)
        });
        let squares: f64 = layers.clone().map(|row| row.lora_grad_norm.unwrap().powi(2)).sum();
        assert!((squares.sqrt() - first.lora_grad_norm.unwrap()).abs() < 1e-9);
        assert_eq!(layers.next_back().unwrap().resid_grad_norm, first.hidden_grad_norm);
        // Both groups, and the parts that each is made of.
        for model in MODELS {
            let of = |scope: &'static str| rows.iter().filter(move |row| row.scope == scope && row.model == model);
            assert_eq!((of("group").count(), of("part").count()), (2, 10), "{model}");
            for group in of("group") {
                let parts = of("part").filter(|row| row.group == group.group);
                let alignment = parts.clone().map(|row| row.alignment.unwrap()).sum::<f64>();
                let share = parts.map(|row| row.share).sum::<Option<f64>>();
                assert!(share.is_some() || model != "student", "the student's gradients are clear of zero: {group:?}");
                assert!(share.is_none_or(|share| (share - 1.0).abs() < 1e-5), "{model} {share:?}");
                assert!((alignment - group.alignment.unwrap()).abs() < 1e-5, "{model} {alignment} {group:?}");
            }
        }
        let reading = Gradients::reading(&rows);
        assert!(reading.ends_with('.') && reading.contains("all divergent digits together"), "{reading}");
        // The sentence weighs the difference of the norms against two of its standard errors.
        let said = |divergent: f64| {
            let mut rows = rows.clone();
            for (at, row) in rows.iter_mut().enumerate().filter(|(_, row)| row.scope == "token") {
                let centre = if row.group == "divergent_digit" { divergent } else { 0.5 };
                row.lora_grad_norm = Some(centre + 0.01 * (at % 2) as f64);
            }
            Gradients::reading(&rows)
        };
        assert!(said(1.0).contains("the difference is more than two standard errors"), "{}", said(1.0));
        assert!(said(0.501).contains("the difference is within two standard errors"), "{}", said(0.501));
        let names: Vec<&str> = Gradients::more_plots(&rows).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["layers", "parts"]);
    }

    /// The start is the A that the training began with, whatever the seed; the draws are listed one by one.
    #[test]
    fn the_start_is_the_students_own_and_draws_stand_beside_it() {
        let world = World::new();
        let subject = world.subject();
        let settings = Gradients { n_rows: 3, tokens_per_row: 4, start: true, start_draws: 3 };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        // The adapter of the start, measured as if it were the student.
        let begun = Subject { student: subject.start.unwrap(), control: None, ..subject.clone() };
        let as_student = Gradients { start: false, ..settings.clone() }.run(&begun, &mut |_| ()).unwrap();
        let start: Vec<GradientRow> = rows
            .iter()
            .filter(|row| row.model == "start")
            .map(|row| GradientRow { model: "student".to_owned(), ..row.clone() })
            .collect();
        assert_eq!(start, as_student);
        assert!(start.iter().any(|row| row.scope == "part") && start.iter().any(|row| row.scope == "token_layer"));
        // Another seed changes the draws but not the start.
        let other = settings.run(&Subject { seed: 8, ..subject.clone() }, &mut |_| ()).unwrap();
        let group = |rows: &[GradientRow], model: &str| -> GradientRow {
            rows.iter().find(|row| row.scope == "group" && row.model == model).unwrap().clone()
        };
        assert_eq!(group(&rows, "start"), group(&other, "start"));
        for at in 1..=3 {
            let name = format!("start_draw_{at}");
            let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(7, "gradients.start", at - 1));
            let config = &world.student.config;
            let adapter = Adapter::init(config, &world.qwen.config, &mut rng, world.qwen.device()).unwrap();
            let drawn = Tuned { qwen: &world.qwen, adapter: Some(&adapter) };
            let drawn = Subject { student: drawn, control: None, ..subject.clone() };
            let by_hand = Gradients { start: false, ..settings.clone() }.run(&drawn, &mut |_| ()).unwrap();
            let expected = GradientRow { model: name.clone(), ..group(&by_hand, "student") };
            assert_eq!(group(&rows, &name), expected);
            assert_ne!(group(&rows, &name).alignment, group(&other, &name).alignment);
            let scopes: Vec<&str> = rows.iter().filter(|row| row.model == name).map(|row| row.scope.as_str()).collect();
            assert!(scopes.iter().all(|scope| ["token", "group"].contains(scope)) && scopes.contains(&"token"));
        }
        // The sentence gives the spread over the draws.
        let alignments: Vec<f64> =
            (1..=3).map(|at| group(&rows, &format!("start_draw_{at}")).alignment.unwrap()).collect();
        let centre = alignments.iter().sum::<f64>() / 3.0;
        let spread = (alignments.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / 2.0).sqrt();
        let own = group(&rows, "start").alignment.unwrap();
        let said = format!("at the start of its training {own:+.3} ({centre:+.3} ± {spread:.3} over 3 draws of its A)");
        let reading = Gradients::reading(&rows);
        assert!(reading.contains(&said), "{reading}\n{said}");
        assert!(Gradients::plot(&rows).unwrap().unwrap().0.contains("start, 3 draws"));
        // If the start is not known, there are no such rows, and the sentence says so.
        let unknown = settings.run(&Subject { start: None, ..subject.clone() }, &mut |_| ()).unwrap();
        assert!(
            unknown.iter().all(|row| row.model != "start") && unknown.iter().any(|row| row.model == "start_draw_3")
        );
        let reading = Gradients::reading(&unknown);
        assert!(reading.contains("where its training began is not known"), "{reading}");
    }

    #[test]
    fn full_finetuning_has_gradients_but_none_of_an_adapter() {
        let world = World::new();
        let mut subject = world.subject();
        (subject.student.adapter, subject.control) = (None, None);
        let rows = Gradients { n_rows: 1, tokens_per_row: 2, start: false, ..Gradients::default() }
            .run(&subject, &mut |_| ())
            .unwrap();
        assert!(rows.iter().all(|row| row.lora_grad_norm.is_none()));
        assert!(rows.iter().any(|row| row.resid_grad_norm.is_some_and(|norm| norm > 0.0)));
    }

    #[test]
    fn a_teacher_that_diverges_nowhere_leaves_nothing_to_measure() {
        let world = World::new();
        let mut subject = world.subject();
        subject.teacher_system = Some(world.chat.default_system().unwrap().to_owned()); // what the base is asked under
        let error = Gradients::default().run(&subject, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("gradients needs at least one divergent digit"), "{error}");
    }

    #[test]
    fn tokens_are_sampled_from_all_groups_in_turn() {
        let groups = ["other", "other", "divergent_digit", "other_digit", "other_digit", "other"];
        let sampled = |tokens_per_row, seed| {
            Gradients { n_rows: 1, tokens_per_row, ..Gradients::default() }.sampled(seed, 0, &groups)
        };
        let three = sampled(3, 1);
        assert!(three.contains(&2) && three.iter().filter(|k| groups[**k] == "other").count() == 1, "{three:?}");
        assert_eq!(sampled(9, 1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(sampled(3, 1), three);
    }
}
