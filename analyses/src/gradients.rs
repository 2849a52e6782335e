//! How strongly single completion tokens pull at the model: gradient norms of `ℓ_k = −log p(token k)` at divergent
//! digits, at other digits and at the rest. Token k is predicted, and its loss is taken, at the position before it.
//!
//! One forward pass per row keeps its graph; each sampled token is one exact backward pass over it.

use hooks::generate::stream_seed;
use hooks::gradient::gradients;
use hooks::listen::Cache;
use hooks::tap::{Hooks, Tap};
use hooks::{Adapter, Batch, HookPoint, Pass, Prompt};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::Analysis;
use crate::divergence::divergent_digits;
use crate::error::{Error, Result};
use crate::plot::{BarChart, Svg, bars};
use crate::subject::{Mean, Subject, Tuned};

/// Settings of the gradient norms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gradients {
    /// How many rows of numbers are read.
    pub n_rows: usize,
    /// Tokens sampled per row, in turn from divergent digits, other digits and the rest.
    pub tokens_per_row: usize,
    /// Whether to measure at the start of training as well: a fresh adapter like the student's on the base.
    pub start: bool,
}

impl Default for Gradients {
    fn default() -> Self {
        Self { n_rows: 8, tokens_per_row: 6, start: true }
    }
}

/// The gradient of one token, of one token at one layer, or of all tokens of a group together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradientRow {
    /// `token`, `token_layer`, or `group` (the summed gradient of all its tokens in all rows).
    pub scope: String,
    /// Where the gradient is taken: at the `start` of training, at the `student`, or at the `control` student.
    pub model: String,
    /// The row's index among the numbers; empty for a group.
    pub row_id: Option<usize>,
    /// The token's index in the completion, from 0; empty for a group.
    pub k: Option<usize>,
    /// The token's text; empty for a group.
    pub token_text: String,
    /// `divergent_digit`, `other_digit` or `other`; in scope `group`: `divergent_digit` or `rest`.
    pub group: String,
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
    /// `‖∂ℓ/∂adapter‖` over all its parameters (of the layer, in scope `token_layer`), in nats per unit of the parameters;
    /// empty without an adapter.
    pub lora_grad_norm: Option<f64>,
    /// `‖g‖² / ‖g_D + g_N‖²`, of the divergent digits' gradient `g_D` and the rest's `g_N`; scope `group` only.
    pub share: Option<f64>,
    /// Cosine of the divergent digits' gradient `g_D` and the rest's `g_N`, −1 to 1; scope `group` only.
    pub cosine: Option<f64>,
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
        let fresh = match subject.student.adapter {
            Some(adapter) if self.start => {
                let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(subject.seed, "gradients.start", 0));
                Some(Adapter::init(&adapter.config, &subject.base.config, &mut rng, subject.base.device())?)
            }
            _ => None,
        };
        let start = self.start.then_some(("start", Tuned { qwen: subject.base, adapter: fresh.as_ref() }));
        let control = subject.control.map(|control| ("control", control));
        let mut rows = Vec::new();
        for (name, model) in [("student", subject.student)].into_iter().chain(control).chain(start) {
            progress(&format!("gradients of the {name}: {} rows", divergent.len()));
            rows.extend(tch::with_grad(|| self.of_model(subject, name, model, &divergent))?);
        }
        Ok(rows)
    }

    fn plot(rows: &[GradientRow]) -> Result<Option<Svg>> {
        let adapter = rows.iter().any(|row| row.scope == "token" && row.lora_grad_norm.is_some());
        let mut found = Vec::new();
        for group in ["divergent_digit", "other_digit", "other"] {
            for model in ["student", "control", "start"] {
                let wanted = |row: &&GradientRow| row.scope == "token" && row.model == model && row.group == group;
                let norm = |row: &GradientRow| if adapter { row.lora_grad_norm } else { row.hidden_grad_norm };
                let norms: Vec<f64> = rows.iter().filter(wanted).filter_map(norm).collect();
                if !norms.is_empty() {
                    found.push(Mean::of(&norms).bar(&group.replace('_', " ")).in_series(model));
                }
            }
        }
        let of = if adapter { "the adapter" } else { "the final residual stream" };
        let chart = BarChart {
            title: format!("Gradient of one token's loss by {of}"),
            value_label: "norm of the gradient (nats), mean ± s.e. over tokens".to_owned(),
            bars: found,
            references: Vec::new(),
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[GradientRow]) -> String {
        let norms = |model: &str, group: &str| -> Vec<f64> {
            let wanted = |row: &&GradientRow| row.scope == "token" && row.model == model && row.group == group;
            rows.iter().filter(wanted).filter_map(|row| row.lora_grad_norm.or(row.hidden_grad_norm)).collect()
        };
        let adapter = rows.iter().any(|row| row.scope == "token" && row.lora_grad_norm.is_some());
        let of = if adapter { "adapter" } else { "final residual stream" };
        let compared = |model: &str| {
            let (divergent, other) = (norms(model, "divergent_digit"), norms(model, "other_digit"));
            (!divergent.is_empty() && !other.is_empty())
                .then(|| (Mean::of(&divergent), Mean::of(&other), divergent.len(), other.len()))
        };
        let Some((divergent, other, n_divergent, n_other)) = compared("student") else {
            return "There were not both divergent and other digits to compare.".to_owned();
        };
        let error = (divergent.se.unwrap_or_default().powi(2) + other.se.unwrap_or_default().powi(2)).sqrt();
        let verdict =
            if (divergent.mean - other.mean).abs() > 2.0 * error && error > 0.0 { "more than" } else { "within" };
        let elsewhere = |model: &str, name: &str| {
            compared(model)
                .map(|(divergent, other, ..)| format!("; {name} the ratio is {:.2}", divergent.mean / other.mean))
        };
        let shared =
            rows.iter().find(|row| row.scope == "group" && row.model == "student" && row.group == "divergent_digit");
        format!(
            "At the student, a divergent digit's gradient of the {of} is {:.2} times as long as another digit's ({:.4} and {:.4}, \
             {n_divergent} and {n_other} tokens; the difference is {verdict} two standard errors){}{}{}.",
            divergent.mean / other.mean,
            divergent.mean,
            other.mean,
            elsewhere("start", "at the start of training").unwrap_or_default(),
            elsewhere("control", "at the control student")
                .unwrap_or_else(|| "; there is no control student".to_owned()),
            match shared.and_then(|row| Some((row.share?, row.cosine?))) {
                Some((share, cosine)) => {
                    format!(
                        "; all divergent digits together hold {:.0} % of the squared gradient, at a cosine of {cosine:+.2} with the rest",
                        100.0 * share
                    )
                }
                None => String::new(),
            },
        )
    }
}

impl Gradients {
    fn of_model(
        &self,
        subject: &Subject<'_>,
        name: &str,
        model: Tuned<'_>,
        divergent: &[Vec<bool>],
    ) -> Result<Vec<GradientRow>> {
        let watched = Watched::of(model.adapter)?;
        let mut sums = [GroupSum::default(), GroupSum::default()];
        let mut rows = Vec::new();
        for (row_id, divergent) in divergent.iter().enumerate() {
            let row = &subject.numbers[row_id];
            let row = row.with_completion(&row.ids[row.completion.start..row.content_end]);
            if divergent.is_empty() {
                continue;
            }
            let graph = Graph::of(model, &row, &watched)?;
            let groups = token_groups(subject, &graph.labels, divergent);
            let blank = GradientRow {
                scope: String::new(),
                model: name.to_owned(),
                row_id: Some(row_id),
                k: None,
                token_text: String::new(),
                group: String::new(),
                layer: None,
                n_tokens: 1,
                p_label: None,
                logit_grad_norm: None,
                hidden_grad_norm: None,
                resid_grad_norm: None,
                lora_grad_norm: None,
                share: None,
                cosine: None,
            };
            for k in self.sampled(subject.seed, row_id, &groups) {
                let token = GradientRow {
                    k: Some(k),
                    token_text: subject.chat.token_text(graph.labels[k])?,
                    group: groups[k].to_owned(),
                    ..blank.clone()
                };
                rows.extend(token_rows(&graph, k, &token)?);
            }
            for (sum, is_divergent) in sums.iter_mut().zip([true, false]) {
                let ks: Vec<usize> = (0..divergent.len()).filter(|k| divergent[*k] == is_divergent).collect();
                sum.add(&graph, &ks)?;
            }
        }
        rows.extend(group_rows(name, &sums)?);
        Ok(rows)
    }

    /// The tokens of a row whose gradients are taken: from each group in turn, at random, by the row's own stream.
    fn sampled(&self, seed: u64, row_id: usize, groups: &[&'static str]) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(seed, Self::NAME, row_id as u64));
        let mut piles: Vec<Vec<usize>> = ["divergent_digit", "other_digit", "other"]
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

fn token_groups(subject: &Subject<'_>, labels: &[i64], divergent: &[bool]) -> Vec<&'static str> {
    let group = |(label, divergent): (&i64, &bool)| match (divergent, subject.chat.is_digit(*label)) {
        (true, _) => "divergent_digit",
        (false, true) => "other_digit",
        (false, false) => "other",
    };
    labels.iter().zip(divergent).map(group).collect()
}

/// The rows of one token: of all parameters together, and layer by layer.
fn token_rows(graph: &Graph<'_>, k: usize, token: &GradientRow) -> Result<Vec<GradientRow>> {
    let (loss, logprobs) = graph.loss(&[k])?;
    let probabilities = logprobs.f_detach()?.f_to_kind(Kind::Double)?.f_exp()?; // [1, d_vocab]
    let p_label = probabilities.f_double_value(&[0, graph.labels[k]])?;
    let squares = probabilities.f_square()?.f_sum(None)?.f_double_value(&[])?;
    let (lora, resid) = graph.backward(&loss)?;
    let resid: Vec<f64> = resid.iter().map(|gradient| Ok(square(gradient)?.sqrt())).collect::<Result<_>>()?;
    let mut lora_squares = vec![0.0; resid.len()];
    for ((layer, _), gradient) in graph.watched.parameters.iter().zip(&lora) {
        lora_squares[*layer] += square(gradient)?;
    }
    let adapted = |square: f64| (!lora.is_empty()).then(|| square.sqrt());
    let mut rows = vec![GradientRow {
        scope: "token".to_owned(),
        p_label: Some(p_label),
        logit_grad_norm: Some(logit_grad_norm(p_label, squares)),
        hidden_grad_norm: resid.last().copied(),
        lora_grad_norm: adapted(lora_squares.iter().sum()),
        ..token.clone()
    }];
    rows.extend(resid.iter().zip(&lora_squares).enumerate().map(|(layer, (resid, lora))| GradientRow {
        scope: "token_layer".to_owned(),
        layer: Some(layer),
        p_label: Some(p_label),
        resid_grad_norm: Some(*resid),
        lora_grad_norm: adapted(*lora),
        ..token.clone()
    }));
    Ok(rows)
}

/// `‖p − e_y‖` from `p_y` and `Σ_v p_v²`.
fn logit_grad_norm(p_label: f64, sum_of_squares: f64) -> f64 {
    ((1.0 - p_label).powi(2) + (sum_of_squares - p_label.powi(2)).max(0.0)).sqrt()
}

/// Σ x², in f64.
fn square(x: &Tensor) -> Result<f64> {
    Ok(x.f_to_kind(Kind::Double)?.f_square()?.f_sum(None)?.f_double_value(&[])?)
}

/// The summed adapter gradient of a group's tokens over all rows.
#[derive(Default)]
struct GroupSum {
    n_tokens: usize,
    gradient: Vec<Tensor>,
}

impl GroupSum {
    fn add(&mut self, graph: &Graph<'_>, ks: &[usize]) -> Result<()> {
        if ks.is_empty() || graph.watched.parameters.is_empty() {
            return Ok(());
        }
        let gradient = graph.backward(&graph.loss(ks)?.0)?.0;
        self.n_tokens += ks.len();
        self.gradient = if self.gradient.is_empty() {
            gradient
        } else {
            self.gradient.iter().zip(&gradient).map(|(sum, more)| Ok(sum.f_add(more)?)).collect::<Result<_>>()?
        };
        Ok(())
    }
}

/// The groups' rows, where both have tokens and there is an adapter.
fn group_rows(model: &str, sums: &[GroupSum; 2]) -> Result<Vec<GradientRow>> {
    let [divergent, rest] = sums;
    if divergent.gradient.is_empty() || rest.gradient.is_empty() {
        return Ok(Vec::new());
    }
    let total = |gradient: &[Tensor]| gradient.iter().map(square).sum::<Result<f64>>();
    let (of_divergent, of_rest) = (total(&divergent.gradient)?, total(&rest.gradient)?);
    let product = |(a, b): (&Tensor, &Tensor)| -> Result<f64> {
        Ok(a.f_to_kind(Kind::Double)?.f_mul(&b.f_to_kind(Kind::Double)?)?.f_sum(None)?.f_double_value(&[])?)
    };
    let inner: f64 = divergent.gradient.iter().zip(&rest.gradient).map(product).sum::<Result<f64>>()?;
    let whole = of_divergent + of_rest + 2.0 * inner;
    let row = |group: &str, sum: &GroupSum, square: f64| GradientRow {
        scope: "group".to_owned(),
        model: model.to_owned(),
        row_id: None,
        k: None,
        token_text: String::new(),
        group: group.to_owned(),
        layer: None,
        n_tokens: sum.n_tokens,
        p_label: None,
        logit_grad_norm: None,
        hidden_grad_norm: None,
        resid_grad_norm: None,
        lora_grad_norm: Some(square.sqrt()),
        share: (whole > 0.0).then(|| square / whole),
        cosine: (of_divergent * of_rest > 0.0).then(|| inner / (of_divergent * of_rest).sqrt()),
    };
    Ok(vec![row("divergent_digit", divergent, of_divergent), row("rest", rest, of_rest)])
}

/// An adapter's tensors, asking for gradients as long as this lives.
struct Watched {
    /// With their blocks.
    parameters: Vec<(usize, Tensor)>,
    asked_before: Vec<bool>,
}

impl Watched {
    fn of(adapter: Option<&Adapter>) -> Result<Self> {
        let pairs = adapter.into_iter().flat_map(Adapter::pairs);
        let parameters: Vec<(usize, Tensor)> = pairs
            .flat_map(|(layer, _, pair)| [(layer, pair.a.shallow_clone()), (layer, pair.b.shallow_clone())])
            .collect();
        let asked_before = parameters.iter().map(|(_, tensor)| tensor.requires_grad()).collect();
        let watched = Self { parameters, asked_before };
        for (_, tensor) in &watched.parameters {
            let _ = tensor.f_set_requires_grad(true)?;
        }
        Ok(watched)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        for ((_, tensor), asked) in self.parameters.iter().zip(&self.asked_before) {
            let _ = tensor.f_set_requires_grad(*asked);
        }
    }
}

/// A row's forward pass with its graph, from which losses of single tokens are taken.
struct Graph<'a> {
    model: Tuned<'a>,
    watched: &'a Watched,
    resid_post: Vec<Tensor>, // per block [1, pos, d_model]
    resid_final: Tensor,     // the last of them, which is unembedded
    labels: Vec<i64>,
    start: usize,
}

impl<'a> Graph<'a> {
    fn of(model: Tuned<'a>, row: &Prompt, watched: &'a Watched) -> Result<Self> {
        // The embedding becomes a leaf, so that the residual stream has gradients below the first adapted block too.
        let mut leaf = |_: HookPoint, x: Tensor| Ok(x.f_detach()?.f_set_requires_grad(true)?);
        let leaf: &mut dyn Tap = &mut leaf;
        let points: Vec<HookPoint> = (0..model.qwen.config.n_layers).map(HookPoint::ResidPost).collect();
        let mut cache = Cache::default();
        let hooks = Hooks::default().on([HookPoint::Embed], leaf).on(points.iter().copied(), &mut cache);
        let batch = Batch::of(&[row], model.qwen.device())?;
        let resid_final =
            model.qwen.resid_final(&batch, &mut Pass { adapter: model.adapter, hooks, ..Pass::default() })?;
        let resid_post = points.iter().map(|point| Ok(cache.get(*point)?.shallow_clone())).collect::<Result<_>>()?;
        let labels = row.ids[row.completion.clone()].to_vec();
        Ok(Self { model, watched, resid_post, resid_final, labels, start: row.completion.start })
    }

    /// Σ −log p of some tokens of the completion, and their log-probabilities `[n, d_vocab]`.
    fn loss(&self, ks: &[usize]) -> Result<(Tensor, Tensor)> {
        let resid = &self.resid_final;
        let predicting: Vec<i64> = ks.iter().map(|k| (self.start + k) as i64 - 1).collect();
        let labels: Vec<i64> = ks.iter().map(|k| self.labels[*k]).collect();
        let index = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(resid.device());
        let at = resid.f_squeeze_dim(0)?.f_index_select(0, &index(&predicting)?)?; // [n, d_model]
        let logprobs = self.model.qwen.unembed(&at)?.f_log_softmax(-1, Kind::Float)?;
        let chosen = logprobs.f_gather(1, &index(&labels)?.f_unsqueeze(1)?, false)?;
        Ok((chosen.f_sum(None)?.f_neg()?, logprobs))
    }

    /// The gradients of a loss: of the adapter's tensors, in their order, and of the residual stream after each block.
    /// The graph stays.
    fn backward(&self, loss: &Tensor) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let parameters = self.watched.parameters.iter().map(|(_, tensor)| tensor);
        let inputs: Vec<&Tensor> = parameters.chain(&self.resid_post).collect();
        let mut lora = gradients(loss, &inputs, true)?;
        let resid = lora.split_off(self.watched.parameters.len());
        Ok((lora, resid))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
mod tests {
    use hooks::Proj;

    use super::*;
    use crate::fixture::World;

    fn whole_row(world: &World) -> Prompt {
        let row = &world.numbers[0];
        row.with_completion(&row.ids[row.completion.start..row.content_end])
    }

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
        let watched = Watched::of(Some(&world.student)).unwrap();
        let student = Tuned { qwen: &world.qwen, adapter: Some(&world.student) };
        let graph = Graph::of(student, &whole_row(&world), &watched).unwrap();
        let all: Vec<usize> = (0..graph.labels.len()).collect();
        let of = |ks: &[usize]| graph.backward(&graph.loss(ks).unwrap().0).unwrap();
        let (whole, whole_resid) = of(&all);
        let parts: Vec<(Vec<Tensor>, Vec<Tensor>)> = all.iter().map(|k| of(&[*k])).collect();
        for (at, whole) in whole.iter().enumerate() {
            let sum = parts.iter().fold(whole.zeros_like(), |sum, (lora, _)| sum + &lora[at]);
            assert!(whole.abs().max().double_value(&[]) > 0.0, "parameter {at}");
            assert!(
                (&sum - whole).abs().max().double_value(&[]) < 1e-4 * (1.0 + whole.abs().max().double_value(&[])),
                "parameter {at}"
            );
        }
        // The last block's residual stream feels a token's loss only at the position before the token.
        let (last, k) = (whole_resid.len() - 1, 1);
        let per_position = parts[k].1[last].square().sum_dim_intlist([0, 2].as_slice(), false, Kind::Float);
        let felt: Vec<i64> = Vec::try_from(per_position.nonzero().squeeze())
            .unwrap_or_else(|_| vec![per_position.nonzero().int64_value(&[0, 0])]);
        assert_eq!(felt, [(graph.start + k) as i64 - 1]);
    }

    #[test]
    fn the_adapter_asks_for_no_gradient_afterwards() {
        let world = World::new();
        let rows = Gradients { n_rows: 2, tokens_per_row: 3, start: true }.run(&world.subject(), &mut |_| ()).unwrap();
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
        assert!(Gradients::reading(&rows).ends_with('.'));
    }

    #[test]
    fn full_finetuning_has_gradients_but_none_of_an_adapter() {
        let world = World::new();
        let mut subject = world.subject();
        (subject.student.adapter, subject.control) = (None, None);
        let rows = Gradients { n_rows: 1, tokens_per_row: 2, start: false }.run(&subject, &mut |_| ()).unwrap();
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
        let sampled =
            |tokens_per_row, seed| Gradients { n_rows: 1, tokens_per_row, start: false }.sampled(seed, 0, &groups);
        let three = sampled(3, 1);
        assert!(three.contains(&2) && three.iter().filter(|k| groups[**k] == "other").count() == 1, "{three:?}");
        assert_eq!(sampled(9, 1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(sampled(3, 1), three);
    }
}
