//! Is the learned direction enough, and is it needed? Added to the base it should do what the student does; taken out
//! of the student it should undo it. Random vectors of the same length show what chance does; the control student's
//! direction is steered with as well.

use hooks::{Condition, Edit, Sequence, Tokens, resid_post, stream_seed};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Analysis;
use crate::direction::{Direction, Extraction, length};
use crate::error::{Error, Result};
use crate::plot::{BarChart, Reference, Svg, bars};
use crate::stats::standard_deviation;
use crate::subject::{Mean, Subject, Tuned};
use crate::target::{Measure, Score, TokenForms, column};

/// Settings of steering.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Steering {
    /// The blocks to steer after, one at a time; none means a few, spread over the depth.
    pub layers: Vec<usize>,
    /// Factors of the learned vector; 1 is its own length.
    pub coefficients: Vec<f64>,
    /// Where in the number prompts the direction is read: `all`, `last` or `class:CLASS[+CLASS]`.
    pub extraction: Extraction,
    /// How many number prompts the direction is the mean over.
    pub n_prompts: usize,
    /// Whether to act at the prompt's tokens only, and not at generated ones.
    pub prompt_only: bool,
    /// Whether to replace, after every block, the student's residual stream along the direction by the base's (which
    /// undoes the movement along the direction and nothing else), and the base's by the student's.
    pub replace: bool,
    /// How many random directions each edit is made with, for comparison: their mean and spread are what chance does.
    pub n_random: usize,
    /// How many of the questions are asked, from the first; absent for all.
    pub n_questions: Option<usize>,
}

impl Default for Steering {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            coefficients: vec![1.0, 2.0, 4.0],
            extraction: Extraction::All,
            n_prompts: 32,
            prompt_only: false,
            replace: false,
            n_random: 20,
            n_questions: None,
        }
    }
}

/// One edit of the residual stream, as a mean over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SteeringRow {
    /// The block, from 0, after which the residual stream is edited.
    pub layer: usize,
    /// The edit. Of the base: `learned` (the student's direction added), `random` (random vectors of its length, each
    /// by itself: the row is the mean over `n_random` of them), `control_student` (the control student's direction at
    /// its length), `other_trait` (the direction of a student of another trait's teacher, at its length),
    /// `project_out_base` (the learned direction taken out, which shows what the removal does by itself). Of the
    /// student: `project_out` (the learned direction taken out), `project_out_random` (random ones). With the setting
    /// `replace`, after every block from `layer` 0 on, at the prompt's tokens: `replace` (the student, with its stream
    /// along each block's learned direction set to the base's on the same prompt), `transplant` (the base, with its
    /// stream set to the student's), and both along random directions, `replace_random` and `transplant_random`.
    pub kind: String,
    /// Factor of the vector; empty where a direction is taken out.
    pub coefficient: Option<f64>,
    /// Where in the number prompts the direction was read: `all`, `last` or `class:CLASS[+CLASS]`.
    pub extraction: String,
    /// The target's word.
    pub target: String,
    /// How many questions the means are over.
    pub n_questions: usize,
    /// How many random directions the row is the mean over, or its rank is among; empty for other rows.
    pub n_random: Option<usize>,
    /// Length of the vector before its factor, in units of the residual stream: the learned one's after `layer`, which
    /// all others have too (`replace` and `transplant` use each block's own; the column has the first block's).
    pub vector_norm: f64,
    /// log p of the target minus the unedited base's, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired; for random directions, of the questions' means over
    /// them), in nats.
    pub delta_logp_se: Option<f64>,
    /// Standard deviation of `delta_logp` over the random directions, in nats; only for rows of random directions.
    pub delta_logp_sd: Option<f64>,
    /// Rank of `delta_logp` among the `n_random` random directions in the same edit, 1 to `n_random` + 1: 1 if none of
    /// them raises the target as much (for `project_out` and `replace`: lowers it as much). Empty for random directions
    /// and `project_out_base`.
    pub rank_logp: Option<usize>,
    /// Margin minus the unedited base's, in nats.
    pub delta_margin: f64,
    /// Standard error of `delta_margin` over questions (paired, as `delta_logp_se`), in nats.
    pub delta_margin_se: Option<f64>,
    /// Standard deviation of `delta_margin` over the random directions, in nats; only for rows of random directions.
    pub delta_margin_sd: Option<f64>,
    /// Rank of `delta_margin` among the random directions, as `rank_logp`.
    pub rank_margin: Option<usize>,
    /// The unedited student's `delta_logp`, in nats.
    pub student_delta_logp: f64,
    /// The unedited student's `delta_margin`, in nats.
    pub student_delta_margin: f64,
    /// `delta_logp` over `student_delta_logp`; empty unless the latter is three of its standard errors clear of zero.
    pub fraction_logp: Option<f64>,
    /// `delta_margin` over `student_delta_margin`; empty unless the latter is three of its standard errors clear of
    /// zero.
    pub fraction_margin: Option<f64>,
}

impl Analysis for Steering {
    type Row = SteeringRow;
    const NAME: &'static str = "steering";
    const QUESTION: &'static str = "Is the learned direction enough for the effect, and is it needed?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<SteeringRow>> {
        self.checked(subject.base.config.n_layers)?; // refuses impossible settings before anything is read
        let prompts = subject.first_questions(Self::NAME, self.n_questions)?;
        let forms = TokenForms::of(subject.target, subject.chat)?;
        progress("steering: reading the directions");
        let settings = Direction { positions: vec![self.extraction.clone()], n_prompts: self.n_prompts };
        let base = settings.read(subject, subject.base())?;
        let direction = |model: Tuned<'_>| settings.read(subject, model)?.direction(&base);
        let mut beside = Vec::new();
        for (kind, model) in [(CONTROL_STUDENT, subject.control), (OTHER_TRAIT, subject.other_trait)] {
            beside.extend(model.map(|model| Ok::<_, Error>((kind, direction(model)?))).transpose()?);
        }
        let start = Start {
            learned: direction(subject.student)?,
            beside: &beside,
            base: forms.scores(subject.base, &prompts, &Condition::default())?,
            student: forms.scores(subject.student.qwen, &prompts, &subject.student.condition())?,
        };
        self.edits(subject, &start, progress)
    }

    fn plot(rows: &[SteeringRow]) -> Result<Option<Svg>> {
        let Some(first) = rows.first() else { return Ok(None) };
        let bar = |row: &SteeringRow| {
            let what = row.coefficient.map_or("taken out".to_owned(), |coefficient| format!("× {coefficient}"));
            let label = if of_all_blocks(row) {
                let who = if row.kind.starts_with("replace") { "student as the base" } else { "base as the student" };
                format!("all blocks, {who}")
            } else {
                format!("block {} {what}", row.layer)
            };
            let kind = match row.kind.as_str() {
                "learned" | "project_out" | "replace" | "transplant" => "learned",
                "project_out_base" => "learned, out of the base",
                "control_student" => "control",
                "random" | "project_out_random" | "replace_random" | "transplant_random" => "random",
                other => other,
            };
            let spread = row.delta_logp_sd.or(row.delta_logp_se);
            Mean { mean: row.delta_logp, se: spread }.bar(&label).in_series(kind.replace('_', " "))
        };
        // Bars of one label are neighbours.
        let mut ordered: Vec<&SteeringRow> = rows.iter().collect();
        let place = |row: &SteeringRow| (of_all_blocks(row), row.kind.starts_with("transplant"), row.layer);
        let size = |row: &SteeringRow| row.coefficient.unwrap_or(f64::INFINITY);
        ordered.sort_by(|a, b| place(a).cmp(&place(b)).then(size(a).total_cmp(&size(b))));
        let chart = BarChart {
            title: format!("Change in log p({}) by a direction: added to the base, or taken out", first.target),
            value_label: match rows.iter().find(|row| row.delta_logp_sd.is_some()).and_then(|row| row.n_random) {
                Some(n) => format!("change against the base (nats), mean ± s.e. over questions; random: ± s.d. of {n}"),
                None => "change against the base (nats), mean ± s.e. over questions".to_owned(),
            },
            bars: ordered.into_iter().map(bar).collect(),
            references: vec![Reference::new("base", 0.0), Reference::new("student", first.student_delta_logp)],
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[SteeringRow]) -> String {
        let of = |kind: &'static str| rows.iter().filter(move |row| row.kind == kind);
        let by_size = |a: &&SteeringRow, b: &&SteeringRow| a.delta_logp.abs().total_cmp(&b.delta_logp.abs());
        let Some(first) = of("learned").next() else { return "Nothing was measured.".to_owned() };
        // A vector without length has no direction and moves nothing.
        let Some(best) = of("learned").filter(|row| row.vector_norm > 0.0).max_by(by_size) else {
            let mut blocks: Vec<usize> = of("learned").map(|row| row.layer).collect();
            blocks.dedup();
            return format!(
                "The learned direction is zero after block {}: nothing was added or taken out; the student's own change of log p({}) \
                 is {:+.3}.",
                blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                first.target,
                first.student_delta_logp
            );
        };
        let same =
            |kind: &'static str| of(kind).find(|row| row.layer == best.layer && row.coefficient == best.coefficient);
        let change = |row: &SteeringRow| Mean { mean: row.delta_logp, se: row.delta_logp_se }.signed();
        let by_chance =
            |row: &SteeringRow| Mean { mean: row.delta_logp, se: row.delta_logp_sd }.signed() + " (mean and spread)";
        let among = |row: &SteeringRow| -> Option<String> {
            Some(format!(", which makes it number {} among {} with them", row.rank_logp?, row.n_random? + 1))
        };
        let random = same("random").filter(|row| row.n_random.is_some()).map(|row| {
            let rank = among(best).unwrap_or_default();
            format!(", {} random vectors of that length by {}{rank}", row.n_random.unwrap_or_default(), by_chance(row))
        });
        let beside = |kind, name: &str| same(kind).map(|row| format!(", {name} by {}", change(row)));
        let added = format!(
            "Added to the base, the learned vector changes log p({}) most after block {} at {} times its length: by {} nats{}{}; \
             the student's own change is {:+.3}",
            best.target,
            best.layer,
            best.coefficient.unwrap_or(1.0),
            change(best),
            random.unwrap_or(", and no random vector stands beside it".to_owned()),
            beside("control_student", "the control student's")
                .unwrap_or(", and there is no control student's".to_owned())
                + &beside("other_trait", "another trait's").unwrap_or_default(),
            best.student_delta_logp,
        );
        // Needed is what lowers the effect when it is taken out, not what moves it either way.
        let removed = |row: &SteeringRow| row.student_delta_logp - row.delta_logp;
        let Some(most) = of("project_out").max_by(|a, b| removed(a).total_cmp(&removed(b))) else { return added + "." };
        let beside = |kind, change: &dyn Fn(&SteeringRow) -> String| {
            of(kind).find(|row| row.layer == most.layer).map_or_else(|| "not measured".to_owned(), change)
        };
        let lowers = if removed(most) > 0.0 { "" } else { "; taking it out lowers the change after no block" };
        format!(
            "{added}, and {} with the direction taken out of it after block {} (with random ones taken out {}, and with the \
             learned one taken out of the base {}: necessary is only what goes beyond that){lowers}.",
            change(most),
            most.layer,
            beside("project_out_random", &by_chance),
            beside("project_out_base", &change),
        )
    }
}

/// The direction of the control student, as a kind of the table.
pub const CONTROL_STUDENT: &str = "control_student";
/// That of another trait's student.
pub const OTHER_TRAIT: &str = "other_trait";

/// What steering begins with.
#[derive(Debug)]
pub struct Start<'a> {
    /// The student's direction of every layer, each `[d_model]`.
    pub learned: Vec<Tensor>,
    /// The directions of other students, by their kinds.
    pub beside: &'a [(&'static str, Vec<Tensor>)],
    /// The base's answers to the questions, without an edit.
    pub base: Vec<Score>,
    /// The student's.
    pub student: Vec<Score>,
}

impl Steering {
    /// The table, from what was read and asked before.
    pub fn edits(
        &self,
        subject: &Subject<'_>,
        start: &Start<'_>,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<SteeringRow>> {
        let layers = self.checked(subject.base.config.n_layers)?;
        let prompts = subject.first_questions(Self::NAME, self.n_questions)?;
        let forms = TokenForms::of(subject.target, subject.chat)?;
        let Start { learned, beside, base, student } = start;
        let n = prompts.len();
        if base.len() != n || student.len() != n {
            let problem =
                format!("there are answers to {} and {} questions, but {n} questions", base.len(), student.len());
            return Err(Error::Mismatch { row: n.min(base.len()).min(student.len()), problem });
        }
        let around = Around { steering: self, subject, base, student };
        let mut rows = Vec::new();
        for layer in layers {
            progress(&format!("steering after block {layer}: {} questions per edit", prompts.len()));
            let vector = &learned[layer];
            let norm = length(vector)?;
            let random = self.random_vectors(subject, layer, norm)?;
            let ask = |model: Tuned<'_>, edits: Vec<Edit>| -> Result<Vec<Vec<Score>>> {
                let edited = |edit: Edit| edited(model, edit.at_tokens(self.tokens()));
                forms.scores_under(model.qwen, &prompts, &edits.into_iter().map(edited).collect::<Vec<_>>())
            };
            let mut named = vec![("learned", vector.shallow_clone())];
            for (kind, directions) in *beside {
                named.push((*kind, with_length(&directions[layer], norm)?));
            }
            // Every vector at every length, the random ones last.
            let all: Vec<&Tensor> = named.iter().map(|(_, vector)| vector).chain(&random).collect();
            let mut of_kinds: Vec<Vec<SteeringRow>> = vec![vec![]; named.len()];
            let mut of_random = vec![];
            for coefficient in &self.coefficients {
                let edits = all.iter().map(|vector| Edit::add(layer, vector, *coefficient)).collect();
                let mut scores = ask(subject.base(), edits)?;
                let by_chance = scores.split_off(named.len());
                for (((kind, _), rows), scores) in named.iter().zip(&mut of_kinds).zip(&scores) {
                    rows.push(around.among(layer, kind, Some(*coefficient), norm, scores, &by_chance));
                }
                of_random.extend(around.by_chance(layer, "random", Some(*coefficient), norm, &by_chance)?);
            }
            let mut of_kinds = of_kinds.into_iter();
            rows.extend(of_kinds.next().unwrap_or_default());
            rows.extend(of_random);
            rows.extend(of_kinds.flatten());
            // A zero vector has no direction to take out.
            if norm > 0.0 {
                let out = |direction: &Tensor| Edit::project_out(layer, direction);
                let mut scores = ask(subject.student, [vector].into_iter().chain(&random).map(out).collect())?;
                let by_chance = scores.split_off(1);
                rows.push(around.among(layer, "project_out", None, norm, &scores[0], &by_chance));
                rows.extend(around.by_chance(layer, "project_out_random", None, norm, &by_chance)?);
                let of_base = ask(subject.base(), vec![out(vector)])?;
                rows.push(around.row(layer, "project_out_base", None, norm, &of_base[0]));
            }
        }
        if self.replace {
            progress(&format!("steering: replacing after every block, {} questions", prompts.len()));
            let by_block = |(layer, learned): (usize, &Tensor)| self.random_vectors(subject, layer, length(learned)?);
            let by_block = learned.iter().enumerate().map(by_block).collect::<Result<Vec<_>>>()?;
            let random = (0..self.n_random).map(|at| by_block.iter().map(|block| &block[at]).collect::<Vec<_>>());
            let all: Vec<Vec<&Tensor>> = [learned.iter().collect()].into_iter().chain(random).collect();
            let norm = length(&learned[0])?;
            let (student, base) = (subject.student, subject.base());
            for (kind, kind_random, model, other) in
                [("replace", "replace_random", student, base), ("transplant", "transplant_random", base, student)]
            {
                let mut scores: Vec<Vec<Score>> = vec![vec![]; all.len()];
                for prompt in prompts.chunks(1) {
                    let theirs = stream(other, prompt)?;
                    let conditions = all.iter().map(|directions| along(model, &theirs, directions));
                    let found = forms.scores_under(model.qwen, prompt, &conditions.collect::<Result<Vec<_>>>()?)?;
                    for (scores, found) in scores.iter_mut().zip(found) {
                        scores.extend(found);
                    }
                }
                let by_chance = scores.split_off(1);
                rows.push(around.among(0, kind, None, norm, &scores[0], &by_chance));
                rows.extend(around.by_chance(0, kind_random, None, norm, &by_chance)?);
            }
        }
        Ok(rows)
    }

    /// Refuses what a model of so many blocks cannot be steered with, before anything is trained.
    pub fn check(&self, n_layers: usize) -> Result<()> {
        self.checked(n_layers).map(drop)
    }

    /// The blocks to steer after.
    fn checked(&self, n_layers: usize) -> Result<Vec<usize>> {
        if let Some(layer) = self.layers.iter().find(|layer| **layer >= n_layers) {
            let expected = format!("less than the model's {n_layers} blocks");
            return Err(Error::Setting { analysis: Self::NAME, setting: "layers", expected, found: layer.to_string() });
        }
        if let Some(coefficient) = self.coefficients.iter().find(|coefficient| !coefficient.is_finite()) {
            let expected = "a finite number".to_owned();
            return Err(Error::Setting {
                analysis: Self::NAME,
                setting: "coefficients",
                expected,
                found: coefficient.to_string(),
            });
        }
        if self.n_random == 1 {
            let expected = "2 or more random directions, which have a spread, or 0 for none".to_owned();
            return Err(Error::Setting { analysis: Self::NAME, setting: "n_random", expected, found: "1".to_owned() });
        }
        if !self.layers.is_empty() {
            return Ok(self.layers.clone());
        }
        let mut spread: Vec<usize> = (1..4).map(|quarter| (quarter * n_layers / 4).min(n_layers - 1)).collect();
        spread.dedup();
        Ok(spread)
    }

    fn tokens(&self) -> Option<Tokens> {
        self.prompt_only.then(Tokens::prompt)
    }
}

fn edited(model: Tuned<'_>, edit: Edit) -> Condition<'_> {
    Condition { edits: vec![edit], ..model.condition() }
}

/// Whether an edit is made after every block.
fn of_all_blocks(row: &SteeringRow) -> bool {
    row.kind.starts_with("replace") || row.kind.starts_with("transplant")
}

/// A model's residual stream after every block on one prompt, `[n_layers, pos, d_model]`.
fn stream(model: Tuned<'_>, prompt: &[Sequence]) -> Result<Tensor> {
    Ok(resid_post(model.qwen, prompt, &model.condition())?.swap_remove(0))
}

/// A model on one prompt with its residual stream along a direction replaced by another model's after every block; a direction
/// without length replaces nothing.
fn along<'a>(model: Tuned<'a>, theirs: &Tensor, directions: &[&Tensor]) -> Result<Condition<'a>> {
    let mut edits = Vec::new();
    for (layer, direction) in directions.iter().enumerate() {
        if length(direction)? > 0.0 {
            edits.push(Edit::patch_along(layer, direction, &theirs.f_get(layer as i64)?));
        }
    }
    Ok(Condition { edits, ..model.condition() })
}

impl Steering {
    /// The random vectors of a block at a given length.
    fn random_vectors(&self, subject: &Subject<'_>, layer: usize, norm: f64) -> Result<Vec<Tensor>> {
        (0..self.n_random).map(|at| random_vector(subject, layer, at, norm)).collect()
    }
}

/// A vector of normally distributed numbers at a given length, from a random stream of its own.
fn random_vector(subject: &Subject<'_>, layer: usize, at: usize, norm: f64) -> Result<Tensor> {
    let stream = (at * subject.base.config.n_layers + layer) as u64;
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(subject.seed, "steering.random", stream));
    let values: Vec<f32> = (0..subject.base.config.d_model)
        .map(|_| {
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt(); // Box and Muller; 1 - u is never zero
            (radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()) as f32
        })
        .collect();
    with_length(&Tensor::f_from_slice(&values)?, norm)
}

/// The vector at another length; a zero vector stays zero.
fn with_length(vector: &Tensor, norm: f64) -> Result<Tensor> {
    let own = length(vector)?;
    Ok(vector.f_mul_scalar(if own > 0.0 { norm / own } else { 0.0 })?)
}

/// The scores that an edit's are compared with.
struct Around<'a> {
    steering: &'a Steering,
    subject: &'a Subject<'a>,
    base: &'a [Score],
    student: &'a [Score],
}

impl Around<'_> {
    fn row(
        &self,
        layer: usize,
        kind: &str,
        coefficient: Option<f64>,
        vector_norm: f64,
        scores: &[Score],
    ) -> SteeringRow {
        let (logp, margin) = (self.change(scores, LOGP), self.change(scores, MARGIN));
        let (student_logp, student_margin) = (self.change(self.student, LOGP), self.change(self.student, MARGIN));
        SteeringRow {
            layer,
            kind: kind.to_owned(),
            coefficient,
            extraction: self.steering.extraction.to_string(),
            target: self.subject.target.word.clone(),
            n_questions: scores.len(),
            n_random: None,
            vector_norm,
            delta_logp: logp.mean,
            delta_logp_se: logp.se,
            delta_logp_sd: None,
            rank_logp: None,
            delta_margin: margin.mean,
            delta_margin_se: margin.se,
            delta_margin_sd: None,
            rank_margin: None,
            student_delta_logp: student_logp.mean,
            student_delta_margin: student_margin.mean,
            fraction_logp: student_logp.share(logp.mean),
            fraction_margin: student_margin.share(margin.mean),
        }
    }

    /// The row of a direction, with its rank among random ones in the same edit.
    fn among(
        &self,
        layer: usize,
        kind: &str,
        coefficient: Option<f64>,
        vector_norm: f64,
        scores: &[Score],
        random: &[Vec<Score>],
    ) -> SteeringRow {
        // A removal should lower the target, an addition should raise it.
        let sign = if kind == "project_out" || kind == "replace" { -1.0 } else { 1.0 };
        let rank = |of: Measure| {
            let own = sign * self.change(scores, of).mean;
            1 + random.iter().filter(|scores| sign * self.change(scores, of).mean >= own).count()
        };
        let given = |rank: usize| (!random.is_empty()).then_some(rank);
        SteeringRow {
            n_random: given(random.len()),
            rank_logp: given(rank(LOGP)),
            rank_margin: given(rank(MARGIN)),
            ..self.row(layer, kind, coefficient, vector_norm, scores)
        }
    }

    /// The row of random directions: the mean over them, and their spread. `None` without any.
    fn by_chance(
        &self,
        layer: usize,
        kind: &str,
        coefficient: Option<f64>,
        vector_norm: f64,
        random: &[Vec<Score>],
    ) -> Result<Option<SteeringRow>> {
        if random.is_empty() {
            return Ok(None);
        }
        let mean = |question: usize| {
            let of = |of: Measure| random.iter().map(|scores| of(&scores[question])).sum::<f64>() / random.len() as f64;
            Score { logp_target: of(LOGP), margin: of(MARGIN), ..random[0][question] }
        };
        let means: Vec<Score> = (0..random[0].len()).map(mean).collect();
        let spread = |of: Measure| {
            standard_deviation(&random.iter().map(|scores| self.change(scores, of).mean).collect::<Vec<_>>())
        };
        Ok(Some(SteeringRow {
            n_random: Some(random.len()),
            delta_logp_sd: Some(spread(LOGP)?),
            delta_margin_sd: Some(spread(MARGIN)?),
            ..self.row(layer, kind, coefficient, vector_norm, &means)
        }))
    }

    /// The change from the base, question by question.
    fn change(&self, scores: &[Score], of: Measure) -> Mean {
        Mean::paired(&column(scores, of), &column(self.base, of))
    }
}

const LOGP: Measure = |score| score.logp_target;
const MARGIN: Measure = |score| score.margin;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::direction::directions;
    use crate::fixture::World;

    #[test]
    fn the_controls_have_the_learned_vectors_length() {
        let world = World::new();
        let random = random_vector(&world.subject(), 1, 0, 2.5).unwrap();
        assert!((length(&random).unwrap() - 2.5).abs() < 1e-5);
        for (layer, at) in [(0, 0), (1, 1), (0, 1)] {
            let other = random_vector(&world.subject(), layer, at, 1.0).unwrap();
            let cosine = crate::direction::cosine(&random, &other).unwrap();
            assert!(cosine.abs() < 0.6, "layers and draws have random vectors of their own");
        }
        assert_eq!(length(&with_length(&Tensor::from_slice(&[0_f32, 0.0]), 1.0).unwrap()).unwrap(), 0.0);
    }

    #[test]
    fn an_edit_acts_with_its_coefficient() {
        let world = World::new();
        let settings = Steering {
            layers: vec![0],
            coefficients: vec![0.0, 2.0],
            n_prompts: 2,
            n_random: 3,
            n_questions: Some(2),
            ..Steering::default()
        };
        let rows = settings.run(&world.subject(), &mut |_| ()).unwrap();
        assert!(rows.iter().all(|row| row.n_questions == 2));
        let kinds: Vec<&str> = rows.iter().map(|row| row.kind.as_str()).collect();
        let added = ["learned", "learned", "random", "random", "control_student", "control_student"];
        assert_eq!(kinds, [&added[..], &["project_out", "project_out_random", "project_out_base"]].concat());
        for row in &rows {
            let unchanged = row.coefficient == Some(0.0);
            assert_eq!(row.delta_logp.abs() < 1e-6, unchanged, "{row:?}");
        }
        assert!(rows[6].delta_logp != rows[6].student_delta_logp);
        assert!(Steering::reading(&rows).contains("3 random vectors"), "{}", Steering::reading(&rows));
        let none = Steering { n_random: 0, ..settings.clone() }.run(&world.subject(), &mut |_| ()).unwrap();
        assert!(
            none.iter().all(|row| !row.kind.contains("random") && row.n_random.is_none() && row.rank_logp.is_none())
        );
        assert_eq!(none.len(), rows.len() - 3);
        assert!(Steering::reading(&none).contains("no random vector stands beside it"));
        let one =
            Steering { n_random: 1, ..settings.clone() }.run(&world.subject(), &mut |_| ()).unwrap_err().to_string();
        assert!(one.contains("steering.n_random is 1") && one.contains("2 or more"), "{one}");
        assert_eq!(settings.run(&world.subject(), &mut |_| ()).unwrap(), rows);
        let zero: Vec<SteeringRow> = rows.iter().cloned().map(|row| SteeringRow { vector_norm: 0.0, ..row }).collect();
        let said = Steering::reading(&zero);
        assert!(said.starts_with("The learned direction is zero after block 0: nothing was added"), "{said}");
        assert!(Steering::plot(&rows).unwrap().is_some() && Steering::reading(&rows).ends_with('.'));
    }

    /// One direction at a time, each edit by itself: the mean, the spread and the learned direction's rank.
    #[test]
    fn random_directions_are_a_mean_a_spread_and_a_place() {
        let world = World::new();
        let subject = world.subject();
        let settings = Steering {
            layers: vec![1],
            coefficients: vec![4.0],
            n_prompts: 2,
            n_random: 5,
            replace: true,
            ..Steering::default()
        };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        let learned = directions(&subject, &Direction { positions: vec![Extraction::All], n_prompts: 2 }).unwrap();
        let prompts = subject.question_prompts("test").unwrap();
        let forms = TokenForms::of(subject.target, subject.chat).unwrap();
        let base = forms.scores(subject.base, &prompts, &Condition::default()).unwrap();
        let change = |model: Tuned<'_>, prompt: usize, condition: &Condition<'_>| {
            let found = forms.score(model.qwen, &prompts[prompt], condition).unwrap();
            found.logp_target - base[prompt].logp_target
        };
        let mean = |of: &dyn Fn(usize) -> f64| (0..prompts.len()).map(of).sum::<f64>() / prompts.len() as f64;
        let random =
            |layer: usize, at: usize| random_vector(&subject, layer, at, length(&learned[layer]).unwrap()).unwrap();
        let (student, base_model) = (subject.student, subject.base());
        let with = |model, edit| -> Condition<'_> { edited(model, edit) };
        let replaced = |model, other, at: usize| {
            mean(&|prompt| {
                let theirs = stream(other, &prompts[prompt..=prompt]).unwrap();
                let all: Vec<Tensor> = (0..learned.len()).map(|layer| random(layer, at)).collect();
                let all: Vec<&Tensor> = all.iter().collect();
                change(model, prompt, &along(model, &theirs, &all).unwrap())
            })
        };
        let each: [(&str, &str, f64, Vec<f64>); 4] = [
            (
                "learned",
                "random",
                1.0,
                (0..5)
                    .map(|at| {
                        mean(&|prompt| change(base_model, prompt, &with(base_model, Edit::add(1, &random(1, at), 4.0))))
                    })
                    .collect(),
            ),
            (
                "project_out",
                "project_out_random",
                -1.0,
                (0..5)
                    .map(|at| {
                        mean(&|prompt| change(student, prompt, &with(student, Edit::project_out(1, &random(1, at)))))
                    })
                    .collect(),
            ),
            ("replace", "replace_random", -1.0, (0..5).map(|at| replaced(student, base_model, at)).collect()),
            ("transplant", "transplant_random", 1.0, (0..5).map(|at| replaced(base_model, student, at)).collect()),
        ];
        for (kind, kind_random, sign, by_hand) in each {
            let of = |kind: &str| rows.iter().find(|row| row.kind == kind).unwrap();
            let (own, by_chance) = (of(kind), of(kind_random));
            let centre = by_hand.iter().sum::<f64>() / 5.0;
            let spread = (by_hand.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / 4.0).sqrt();
            assert!((by_chance.delta_logp - centre).abs() < 1e-4, "{kind_random}: {by_chance:?} {centre}");
            assert!(
                (by_chance.delta_logp_sd.unwrap() - spread).abs() < 1e-4 && spread > 1e-4,
                "{kind_random}: {spread}"
            );
            let above = by_hand.iter().filter(|x| sign * **x >= sign * own.delta_logp).count();
            assert_eq!((own.rank_logp, own.n_random), (Some(1 + above), Some(5)), "{kind}");
            assert!(own.delta_logp_sd.is_none() && by_chance.rank_logp.is_none());
        }
    }

    #[test]
    fn the_students_difference_at_the_end_is_the_student() {
        // The question is the number prompt itself: the addition after the last block at its last token is the whole
        // difference.
        let world = World::new();
        let mut subject = world.subject();
        let questions = [world.number_users[0].0.clone()];
        subject.questions = &questions;
        let layer = world.qwen.config.n_layers - 1;
        let settings = Steering {
            layers: vec![layer],
            coefficients: vec![1.0],
            extraction: Extraction::Last,
            n_prompts: 1,
            prompt_only: true,
            ..Steering::default()
        };
        let vector =
            directions(&subject, &Direction { positions: vec![Extraction::Last], n_prompts: 1 }).unwrap().remove(layer);
        let prompt = &subject.question_prompts("test").unwrap()[..1];
        let edit = Edit::add(layer, &vector, 1.0).at_tokens(settings.tokens());
        let next = |model: Tuned<'_>, condition| hooks::next_token_logprobs(model.qwen, prompt, &condition).unwrap();
        let steered = next(subject.base(), edited(subject.base(), edit));
        let student = next(subject.student, subject.student.condition());
        assert!((steered - student).abs().max().double_value(&[]) < 1e-4);
    }

    #[test]
    fn what_moved_along_the_direction_is_undone_and_nothing_else() {
        let world = World::new();
        let subject = world.subject();
        let settings = Steering { layers: vec![0], n_prompts: 2, n_random: 2, replace: true, ..Steering::default() };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        let of = |kind: &str| rows.iter().find(|row| row.kind == kind).unwrap();
        let student = of("replace").student_delta_logp;
        assert!(
            (of("replace").delta_logp - student).abs() > 1e-4
                && of("replace").delta_logp != of("replace_random").delta_logp
        );
        // If the direction is the student's whole difference at a prompt's end, removing it leaves the base.
        let question = [world.number_users[0].0.clone()];
        let subject = Subject { questions: &question, ..world.subject() };
        let mut ends = directions(&subject, &Direction { positions: vec![Extraction::Last], n_prompts: 1 }).unwrap();
        let last = ends.len() - 1;
        ends[..last].iter_mut().for_each(|direction| *direction = direction.zeros_like()); // they replace nothing
        let prompt = &subject.question_prompts("test").unwrap()[..1];
        let next = |model: Tuned<'_>, condition: &Condition<'_>| {
            hooks::next_token_logprobs(model.qwen, prompt, condition).unwrap()
        };
        let (student, base) = (subject.student, subject.base());
        let plain = |model: Tuned<'_>| next(model, &model.condition());
        let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(apart(&plain(student), &plain(base)) > 1e-3);
        for (model, other) in [(student, base), (base, student)] {
            let along = along(model, &stream(other, prompt).unwrap(), &ends.iter().collect::<Vec<_>>());
            let found = next(model, &along.unwrap());
            assert!(apart(&found, &plain(other)) < 1e-4, "{}", apart(&found, &plain(other)));
        }
    }

    #[test]
    fn layers_are_spread_or_checked() {
        let layers = |settings: &Steering, n| settings.checked(n);
        assert_eq!(layers(&Steering::default(), 24).unwrap(), [6, 12, 18]);
        assert_eq!(layers(&Steering::default(), 2).unwrap(), [0, 1]);
        assert_eq!(layers(&Steering::default(), 1).unwrap(), [0]);
        let message = layers(&Steering { layers: vec![2], ..Steering::default() }, 2).unwrap_err().to_string();
        assert!(message.contains("steering.layers is 2"), "{message}");
    }
}
