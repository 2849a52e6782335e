//! What the residual stream would say after each block, if the model ended there: the logit lens (final norm and
//! unembedding on `hook_resid_post`; nostalgebraist 2020), of base, student and control student, at each token that the
//! questions share.

use std::collections::BTreeMap;

use hooks::{Condition, Qwen, Sequence, resid_post};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use crate::Analysis;
use crate::error::Result;
use crate::plot::{HeatMap, Line, LineChart, Point, Scale, Svg, heatmap, lines, visible};
use crate::position_scan::{ScannedPlace, places};
use crate::subject::{Mean, Subject};
use crate::target::{TokenForms, margin};

/// Settings of the lens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lens {
    /// Number of questions that are asked, from the first; `None` means all.
    pub n_questions: Option<usize>,
}

/// One model after one block at one place of the prompt, as means over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LensRow {
    /// The model: `base`, `control` (finetuned on an untouched teacher's numbers), or `student`.
    pub model: String,
    /// The block whose output is read, from 0.
    pub layer: usize,
    /// The position in the prompts, from 0; negative ones count from the end, where the answer begins; empty for
    /// `(user content)`.
    pub position: Option<i64>,
    /// The token's text; `(user content)` for all tokens of the user's text.
    pub token: String,
    /// The class of the token, as `undertone tokens` prints it.
    pub class: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the means are over.
    pub n_questions: usize,
    /// log of the probability, by the lens, that the next token is one that begins a form of the target, in nats.
    pub logp_first: f64,
    /// Standard error of `logp_first` over questions, in nats; empty with one question.
    pub logp_first_se: Option<f64>,
    /// `logp_first` minus the base's, in nats.
    pub delta_logp_first: f64,
    /// Standard error of `delta_logp_first` over questions (paired), in nats; empty with one question.
    pub delta_logp_first_se: Option<f64>,
    /// `logp_first` minus the log of the other members' mean probability of theirs, in nats.
    pub margin_first: f64,
    /// `margin_first` minus the base's, in nats.
    pub delta_margin_first: f64,
    /// Standard error of `delta_margin_first` over questions (paired), in nats; empty with one question.
    pub delta_margin_first_se: Option<f64>,
    /// The best rank in the vocabulary, by the lens, of a token that begins a form of the target; 1 is the most likely.
    pub rank_first: f64,
    /// The token that is the most likely, by the lens, for most questions.
    pub top_token: String,
    /// Length of the difference of the residual stream from the base's, over the length of the base's.
    pub relative_difference: f64,
}

/// What the lens reads in the residual stream of one prompt: `[layer][pos]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// log p of the tokens that begin a form of the target, in nats.
    pub logp_first: Vec<Vec<f64>>,
    /// `logp_first` minus the log of the other members' mean probability of theirs, in nats.
    pub margin_first: Vec<Vec<f64>>,
    /// The best rank of such a token in the vocabulary.
    pub rank_first: Vec<Vec<f64>>,
    /// The most likely token.
    pub top: Vec<Vec<i64>>,
}

impl Reading {
    /// Reads a residual stream, `[n_layers, pos, d_model]`, with the model's own final norm and unembedding.
    pub fn of(model: &Qwen, forms: &TokenForms, resid: &Tensor) -> Result<Self> {
        let mut found = Self { logp_first: vec![], margin_first: vec![], rank_first: vec![], top: vec![] };
        let firsts = forms.first_tokens();
        for layer in 0..resid.size()[0] {
            let resid = resid.f_get(layer)?.f_to_device(model.device())?.f_to_kind(model.activation_kind())?;
            let logprobs = no_grad(|| model.unembed(&resid))?.f_log_softmax(-1, Kind::Float)?;
            let of_member = |ids: &Vec<i64>| -> Result<Vec<f64>> {
                let ids = Tensor::f_from_slice(ids)?.f_to_device(logprobs.device())?;
                let p = logprobs.f_index_select(-1, &ids)?.f_to_kind(Kind::Double)?;
                Ok(Vec::try_from(p.f_logsumexp([-1].as_slice(), false)?)?)
            };
            let members = firsts.iter().map(of_member).collect::<Result<Vec<_>>>()?;
            let at = |pos: usize| members.iter().map(|logps| logps[pos]).collect::<Vec<f64>>();
            let n = members[0].len();
            let target = Tensor::f_from_slice(&firsts[0])?.f_to_device(logprobs.device())?;
            let best = logprobs.f_index_select(-1, &target)?.f_amax([-1].as_slice(), true)?;
            let above = logprobs.f_gt_tensor(&best)?.f_sum_dim_intlist([-1].as_slice(), false, Kind::Double)?;
            found.rank_first.push(Vec::<f64>::try_from(above)?.into_iter().map(|above| above + 1.0).collect());
            found.margin_first.push((0..n).map(|pos| margin(&at(pos))).collect());
            found.logp_first.push(members.into_iter().next().unwrap_or_default());
            found.top.push(Vec::try_from(logprobs.f_argmax(-1, false)?)?);
        }
        Ok(found)
    }
}

/// What a model's residual stream of one prompt says, and its distance from the base's, `[layer][pos]`.
struct OfModel {
    reading: Reading,
    difference: Vec<Vec<f64>>,
}

/// A prompt's residual stream under a condition, `[n_layers, pos, d_model]`, and what the lens reads in it.
pub fn read(
    model: &Qwen,
    forms: &TokenForms,
    prompt: &Sequence,
    condition: &Condition<'_>,
) -> Result<(Tensor, Reading)> {
    let resid = resid_post(model, std::slice::from_ref(prompt), condition)?.remove(0);
    let reading = Reading::of(model, forms, &resid)?;
    Ok((resid, reading))
}

/// ‖h − base‖ / ‖base‖ at each block and position, `[layer][pos]`.
pub fn relative_difference(resid: &Tensor, base: &Tensor) -> Result<Vec<Vec<f64>>> {
    let length = |of: &Tensor| of.f_to_kind(Kind::Double)?.f_norm_scalaropt_dim(2.0, [-1].as_slice(), false);
    let share = length(&resid.f_sub(base)?)?.f_div(&length(base)?)?;
    Ok(Vec::try_from(share)?)
}

impl Analysis for Lens {
    type Row = LensRow;
    const NAME: &'static str = "lens";
    const QUESTION: &'static str = "After which block does the student's residual stream say the target?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<LensRow>> {
        let prompts = subject.first_questions(Self::NAME, self.n_questions)?;
        let forms = TokenForms::of(subject.target, subject.chat)?;
        let mut places = places(subject, &prompts)?;
        places.pop(); // the whole prompt
        let models = subject.models();
        // [prompt][model]
        let mut found: Vec<Vec<OfModel>> = vec![];
        for (at, prompt) in prompts.iter().enumerate() {
            progress(&format!("lens: question {} of {}", at + 1, prompts.len()));
            let base = resid_post(subject.base, std::slice::from_ref(prompt), &Condition::default())?.remove(0);
            let of_model = |(_, model): &(&str, crate::Tuned<'_>)| -> Result<OfModel> {
                let (resid, reading) = read(model.qwen, &forms, prompt, &model.condition())?;
                Ok(OfModel { reading, difference: relative_difference(&resid, &base)? })
            };
            found.push(models.iter().map(of_model).collect::<Result<_>>()?);
        }
        let mut rows = vec![];
        for (model, (name, _)) in models.iter().enumerate() {
            for layer in 0..subject.base.config.n_layers {
                for place in &places {
                    rows.push(row(subject, &prompts, &found, (model, name), layer, place)?);
                }
            }
        }
        Ok(rows)
    }

    fn plot(rows: &[LensRow]) -> Result<Option<Svg>> {
        let Some(first) = rows.first() else { return Ok(None) };
        let line = |model: &str| {
            let of_model = rows.iter().filter(|row| row.model == model && row.position == Some(-1));
            let point = |row: &LensRow| {
                let point = Point::new(row.layer as f64, row.logp_first);
                match row.logp_first_se {
                    Some(se) => point.with_interval((row.logp_first - se, row.logp_first + se)),
                    None => point,
                }
            };
            Line { label: model.to_owned(), points: of_model.map(point).collect() }
        };
        let all = ["base", "control", "student"].map(line).into_iter().filter(|line| !line.points.is_empty());
        Ok(Some(lines(&LineChart {
            title: format!("log p of {}'s first token, read after each block at the last token", first.target),
            x_label: "block".to_owned(),
            y_label: "nats, mean ± s.e. over questions".to_owned(),
            x_scale: Scale::Linear,
            lines: all.collect(),
            references: vec![],
        })?))
    }

    fn more_plots(rows: &[LensRow]) -> Result<Vec<(&'static str, Svg)>> {
        let student = || rows.iter().filter(|row| row.model == "student");
        let Some(first) = student().next() else { return Ok(vec![]) };
        let columns = student().filter(|row| row.layer == 0).map(|row| visible(&row.token)).collect::<Vec<_>>();
        let n_layers = student().map(|row| row.layer + 1).max().unwrap_or(0);
        let map = |title: String, value_label: &str, of: fn(&LensRow) -> f64| {
            heatmap(&HeatMap {
                title,
                x_label: "token of the prompt".to_owned(),
                y_label: "block".to_owned(),
                value_label: value_label.to_owned(),
                columns: columns.clone(),
                rows: (0..n_layers).map(|layer| layer.to_string()).collect(),
                values: (0..n_layers)
                    .map(|layer| student().filter(|row| row.layer == layer).map(of).collect())
                    .collect(),
            })
        };
        let target = &first.target;
        Ok(vec![
            (
                "tokens",
                map(format!("Change of log p({target}) by the lens, student minus base"), "nats", |row| {
                    row.delta_logp_first
                })?,
            ),
            (
                "difference",
                map(
                    "How far the student's residual stream is from the base's".to_owned(),
                    "length of the difference / length of the base's",
                    |row| row.relative_difference,
                )?,
            ),
        ])
    }

    fn reading(rows: &[LensRow]) -> String {
        let last = |model: &'static str| {
            rows.iter().filter(move |row| row.model == model && row.position == Some(-1)).collect::<Vec<_>>()
        };
        let student = last("student");
        let Some(end) = student.last() else { return "Nothing was measured.".to_owned() };
        let change = |row: &LensRow| Mean { mean: row.delta_logp_first, se: row.delta_logp_first_se };
        let control = match last("control").last() {
            Some(control) => format!("the control student's by {}", change(control).signed()),
            None => "there is no control student".to_owned(),
        };
        let whole = format!(
            "Read by the logit lens at the last token, log p of {}'s first token is changed by {} nats after the last block \
             ({control})",
            end.target,
            change(end).signed()
        );
        if !change(end).exceeds(3.0) {
            return format!("{whole}; that is not three standard errors clear of zero, so no block is named.");
        }
        let is_half = |row: &&&LensRow| row.delta_logp_first / end.delta_logp_first >= 0.5;
        match student.iter().find(is_half) {
            Some(half) => {
                format!("{whole}; half of it is first there after block {} ({}).", half.layer, change(half).signed())
            }
            None => format!("{whole}."),
        }
    }
}

/// The means of one model after one block at one place; a question is one value.
fn row(
    subject: &Subject<'_>,
    prompts: &[Sequence],
    found: &[Vec<OfModel>],
    (model, name): (usize, &str),
    layer: usize,
    place: &ScannedPlace,
) -> Result<LensRow> {
    let positions = |prompt: &Sequence| -> Vec<usize> {
        match place.position {
            Some(at) if at >= 0 => vec![at as usize],
            Some(at) => vec![prompt.ids.len() - at.unsigned_abs() as usize],
            None => prompt.positions(hooks::TokenClass::UserContent).collect(),
        }
    };
    let of = |model: usize, value: &dyn Fn(&OfModel, usize) -> f64| -> Vec<f64> {
        let mean = |(prompt, found): (&Sequence, &Vec<OfModel>)| {
            let values: Vec<f64> = positions(prompt).into_iter().map(|at| value(&found[model], at)).collect();
            values.iter().sum::<f64>() / values.len() as f64
        };
        prompts.iter().zip(found).map(mean).collect()
    };
    let logp = |of: &OfModel, at: usize| of.reading.logp_first[layer][at];
    let margin = |of: &OfModel, at: usize| of.reading.margin_first[layer][at];
    let (logps, margins) = (of(model, &logp), of(model, &margin));
    let (delta_logp, delta_margin) = (Mean::paired(&logps, &of(0, &logp)), Mean::paired(&margins, &of(0, &margin)));
    let mut tops: BTreeMap<i64, usize> = BTreeMap::new();
    for (prompt, found) in prompts.iter().zip(found) {
        for at in positions(prompt) {
            *tops.entry(found[model].reading.top[layer][at]).or_default() += 1;
        }
    }
    let top = tops.into_iter().max_by_key(|(id, count)| (*count, std::cmp::Reverse(*id))).map_or(0, |(id, _)| id);
    let logp_first = Mean::of(&logps);
    Ok(LensRow {
        model: name.to_owned(),
        layer,
        position: place.position,
        token: place.token.clone(),
        class: place.class.clone(),
        target: subject.target.word.clone(),
        n_questions: prompts.len(),
        logp_first: logp_first.mean,
        logp_first_se: logp_first.se,
        delta_logp_first: delta_logp.mean,
        delta_logp_first_se: delta_logp.se,
        margin_first: Mean::of(&margins).mean,
        delta_margin_first: delta_margin.mean,
        delta_margin_first_se: delta_margin.se,
        rank_first: Mean::of(&of(model, &|of, at| of.reading.rank_first[layer][at])).mean,
        top_token: subject.chat.token_text(top)?,
        relative_difference: Mean::of(&of(model, &|of, at| of.difference[layer][at])).mean,
    })
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use hooks::{HookPoint, next_token_logprobs, run_with_hooks};

    use super::*;
    use crate::fixture::World;
    use crate::stats::logsumexp;

    #[test]
    fn after_the_last_block_the_lens_is_the_model() {
        let world = World::new();
        let subject = world.subject();
        let forms = TokenForms::of(subject.target, subject.chat).unwrap();
        let rows = Lens::default().run(&subject, &mut |_| ()).unwrap();
        let prompts = subject.question_prompts("test").unwrap();
        let last = world.qwen.config.n_layers - 1;
        let firsts = forms.first_tokens();
        let mut moved = 0;
        for (name, model) in subject.models() {
            let end =
                rows.iter().find(|row| row.model == name && row.layer == last && row.position == Some(-1)).unwrap();
            let logprobs = next_token_logprobs(model.qwen, &prompts, &model.condition()).unwrap();
            let of_question = |at: usize| {
                let of = |ids: &Vec<i64>| {
                    logsumexp(&ids.iter().map(|id| logprobs.double_value(&[at as i64, *id])).collect::<Vec<_>>())
                };
                (of(&firsts[0]), margin(&firsts.iter().map(of).collect::<Vec<_>>()))
            };
            let (logps, margins): (Vec<f64>, Vec<f64>) = (0..prompts.len()).map(of_question).unzip();
            assert!((end.logp_first - Mean::of(&logps).mean).abs() < 1e-5, "{name}");
            assert!((end.margin_first - Mean::of(&margins).mean).abs() < 1e-5, "{name}");
            assert_eq!(end.delta_logp_first == 0.0, name == "base");
            moved += usize::from(end.delta_logp_first.abs() > 1e-4);
        }
        assert!(moved > 0, "the student differs from the base");
        assert!(Lens::plot(&rows).unwrap().is_some() && Lens::more_plots(&rows).unwrap().len() == 2);
        assert!(Lens::reading(&rows).starts_with("Read by the logit lens"), "{}", Lens::reading(&rows));
    }

    /// Before that, it is the final norm and the unembedding on the block's output, at that token of each prompt.
    #[test]
    fn after_a_block_it_is_norm_and_unembedding_of_that_block_s_output() {
        let world = World::new();
        let subject = world.subject();
        let rows = Lens { n_questions: Some(1) }.run(&subject, &mut |_| ()).unwrap();
        let prompt = &subject.question_prompts("test").unwrap()[0];
        let condition = subject.student.condition();
        let at = HookPoint::ResidPost(0);
        let reads = |condition: &Condition<'_>| {
            let mut cache = hooks::Cache::default();
            let _ = no_grad(|| run_with_hooks(&world.qwen, prompt, condition, &[at], &mut cache)).unwrap();
            cache.get(at).unwrap().squeeze_dim(0)
        };
        let (resid, base) = (reads(&condition), reads(&Condition::default()));
        let parameters: BTreeMap<String, Tensor> = world.qwen.parameters().into_iter().collect();
        let weight = |name: &str| {
            let found = parameters.iter().find(|(known, _)| known.ends_with(name));
            found.unwrap_or_else(|| panic!("{name}: {:?}", parameters.keys())).1.to_kind(Kind::Double)
        };
        let wide = resid.to_kind(Kind::Double);
        let scale =
            (wide.square().mean_dim([-1].as_slice(), true, Kind::Double) + world.qwen.config.rms_norm_eps).rsqrt();
        let head = parameters.keys().find(|name| name.contains("lm_head")).map_or("embed_tokens.weight", |name| name);
        let logits = (wide * scale * weight("model.norm.weight")).matmul(&weight(head).transpose(0, 1));
        let logprobs = logits.log_softmax(-1, Kind::Double);
        let firsts = TokenForms::of(subject.target, subject.chat).unwrap().first_tokens().remove(0);
        for row in rows.iter().filter(|row| row.model == "student" && row.layer == 0) {
            let Some(position) = row.position else { continue };
            let pos = if position < 0 { prompt.ids.len() as i64 + position } else { position };
            let logps: Vec<f64> = firsts.iter().map(|id| logprobs.double_value(&[pos, *id])).collect();
            assert!((row.logp_first - logsumexp(&logps)).abs() < 1e-4, "position {position}");
            let best = logps.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let above = logprobs.get(pos).gt(best + 1e-6).sum(Kind::Int64).int64_value(&[]);
            assert!((row.rank_first - 1.0 - above as f64).abs() <= 1.0, "position {position}");
            let (h, b) = (resid.get(pos), base.get(pos));
            let expected = (&h - &b).norm().double_value(&[]) / b.norm().double_value(&[]);
            assert!((row.relative_difference - expected).abs() < 1e-5, "position {position}");
        }
        assert!(rows.iter().filter(|row| row.model == "base").all(|row| row.relative_difference < 1e-6));
    }
}
