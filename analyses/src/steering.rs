//! Is the learned direction enough, and is it needed? Added to the base it should do what the student does; taken out of
//! the student it should undo it. Beside both stand a random vector of the same length and the control student's direction.

use hooks::generate::stream_seed;
use hooks::score::resid_post;
use hooks::{Condition, Edit, Prompt, Tokens};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Analysis;
use crate::direction::{Direction, Extraction, length};
use crate::error::{Error, Result};
use crate::plot::{BarChart, Reference, Svg, bars};
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
    /// Whether the student is also run with its residual stream along the direction replaced by the base's, after every block (the
    /// movement along the direction undone, and nothing else), and the base with its stream replaced by the student's there.
    pub replace: bool,
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
            n_questions: None,
        }
    }
}

/// One edit of the residual stream, as a mean over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SteeringRow {
    /// The block, from 0, after which the residual stream is edited.
    pub layer: usize,
    /// What is done. To the base: `learned` (the student's direction added), `random` (a random vector of its length),
    /// `control_student` (the control student's direction at its length), `other_trait` (that of a student of another
    /// trait's teacher, at its length). To the student: `project_out` (the learned
    /// direction taken out), `project_out_random` (a random one). And `project_out_base`: the learned direction taken out of
    /// the base, for what the removal does by itself. With the setting `replace`, of layer 0 and on, at the prompt's tokens: `replace`
    /// (the student, its stream along each block's learned direction that of the base on the same prompt), `transplant` (the base, with
    /// that of the student), and both along random directions, `replace_random` and `transplant_random`.
    pub kind: String,
    /// Factor of the vector; empty where a direction is taken out.
    pub coefficient: Option<f64>,
    /// Where in the number prompts the direction was read: `all`, `last` or `class:CLASS[+CLASS]`.
    pub extraction: String,
    /// The target's word.
    pub target: String,
    /// How many questions the means are over.
    pub n_questions: usize,
    /// Length of the vector before its factor, in units of the residual stream.
    pub vector_norm: f64,
    /// log p of the target minus that of the unedited base, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired), in nats.
    pub delta_logp_se: Option<f64>,
    /// Margin minus that of the unedited base, in nats.
    pub delta_margin: f64,
    /// Standard error of `delta_margin` over questions (paired), in nats.
    pub delta_margin_se: Option<f64>,
    /// The unedited student's `delta_logp`, in nats.
    pub student_delta_logp: f64,
    /// The unedited student's `delta_margin`, in nats.
    pub student_delta_margin: f64,
    /// `delta_logp` over `student_delta_logp`; empty where that is not above 3 standard errors.
    pub fraction_logp: Option<f64>,
    /// `delta_margin` over `student_delta_margin`; empty where that is not above 3 standard errors.
    pub fraction_margin: Option<f64>,
}

impl Analysis for Steering {
    type Row = SteeringRow;
    const NAME: &'static str = "steering";
    const QUESTION: &'static str = "Is the learned direction enough for the effect, and is it needed?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<SteeringRow>> {
        self.layers(subject.base.config.n_layers)?; // what cannot be done is told before anything is read
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
            Mean { mean: row.delta_logp, se: row.delta_logp_se }.bar(&label).in_series(kind.replace('_', " "))
        };
        // Bars of one label stand together.
        let mut ordered: Vec<&SteeringRow> = rows.iter().collect();
        let place = |row: &SteeringRow| (of_all_blocks(row), row.kind.starts_with("transplant"), row.layer);
        let size = |row: &SteeringRow| row.coefficient.unwrap_or(f64::INFINITY);
        ordered.sort_by(|a, b| place(a).cmp(&place(b)).then(size(a).total_cmp(&size(b))));
        let chart = BarChart {
            title: format!("Change in log p({}) by a direction: added to the base, or taken out", first.target),
            value_label: "change against the base (nats), mean ± s.e. over questions".to_owned(),
            bars: ordered.into_iter().map(bar).collect(),
            references: vec![Reference::new("base", 0.0), Reference::new("student", first.student_delta_logp)],
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[SteeringRow]) -> String {
        let of = |kind: &'static str| rows.iter().filter(move |row| row.kind == kind);
        let by_size = |a: &&SteeringRow, b: &&SteeringRow| a.delta_logp.abs().total_cmp(&b.delta_logp.abs());
        let Some(best) = of("learned").max_by(by_size) else { return "Nothing was measured.".to_owned() };
        let same =
            |kind: &'static str| of(kind).find(|row| row.layer == best.layer && row.coefficient == best.coefficient);
        let change = |row: &SteeringRow| Mean { mean: row.delta_logp, se: row.delta_logp_se }.signed();
        let beside = |kind, name: &str| same(kind).map(|row| format!(", {name} by {}", change(row)));
        let added = format!(
            "Added to the base, the learned vector changes log p({}) most after block {} at {} times its length: by {} nats{}{}; \
             the student's own change is {:+.3}",
            best.target,
            best.layer,
            best.coefficient.unwrap_or(1.0),
            change(best),
            beside("random", "a random vector of that length").unwrap_or_default(),
            beside("control_student", "the control student's")
                .unwrap_or(", and there is no control student's".to_owned())
                + &beside("other_trait", "another trait's").unwrap_or_default(),
            best.student_delta_logp,
        );
        // Needed is what lowers the effect when it is taken out, not what moves it either way.
        let removed = |row: &SteeringRow| row.student_delta_logp - row.delta_logp;
        let Some(most) = of("project_out").max_by(|a, b| removed(a).total_cmp(&removed(b))) else { return added + "." };
        let beside =
            |kind| of(kind).find(|row| row.layer == most.layer).map_or_else(|| "not measured".to_owned(), change);
        let lowers = if removed(most) > 0.0 { "" } else { "; taking it out lowers the change after no block" };
        format!(
            "{added}, and {} with the direction taken out of it after block {} (with a random one taken out {}, and with the \
             learned one taken out of the base {}: necessary is only what goes beyond that){lowers}.",
            change(most),
            most.layer,
            beside("project_out_random"),
            beside("project_out_base"),
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
    /// Those of the students beside it, by their kinds.
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
        let layers = self.layers(subject.base.config.n_layers)?;
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
            let random = random_vector(subject, layer, norm)?;
            let mut vectors = vec![("learned", vector.shallow_clone()), ("random", random.shallow_clone())];
            for (kind, directions) in *beside {
                vectors.push((*kind, with_length(&directions[layer], norm)?));
            }
            for (kind, vector) in vectors {
                for coefficient in &self.coefficients {
                    let edit = Edit::add(layer, &vector, *coefficient).at_tokens(self.tokens());
                    let scores = forms.scores(subject.base, &prompts, &edited(subject.base(), edit))?;
                    rows.push(around.row(layer, kind, Some(*coefficient), norm, &scores));
                }
            }
            // A zero vector has no direction to take out.
            let (student, base) = (subject.student, subject.base());
            let directions = [
                ("project_out", student, vector),
                ("project_out_random", student, &random),
                ("project_out_base", base, vector),
            ];
            for (kind, model, direction) in directions.into_iter().filter(|_| norm > 0.0) {
                let edit = Edit::project_out(layer, direction).at_tokens(self.tokens());
                let scores = forms.scores(model.qwen, &prompts, &edited(model, edit))?;
                rows.push(around.row(layer, kind, None, norm, &scores));
            }
        }
        if self.replace {
            progress(&format!("steering: replacing after every block, {} questions", prompts.len()));
            let random = |(layer, learned): (usize, &Tensor)| random_vector(subject, layer, length(learned)?);
            let random = learned.iter().enumerate().map(random).collect::<Result<Vec<_>>>()?;
            let norm = length(&learned[0])?;
            let (student, base) = (subject.student, subject.base());
            for (kind, model, other, directions) in [
                ("replace", student, base, learned),
                ("replace_random", student, base, &random),
                ("transplant", base, student, learned),
                ("transplant_random", base, student, &random),
            ] {
                let mut scores = Vec::with_capacity(prompts.len());
                for prompt in prompts.chunks(1) {
                    let condition = along(model, other, directions, prompt)?;
                    scores.extend(forms.scores(model.qwen, prompt, &condition)?);
                }
                rows.push(around.row(0, kind, None, norm, &scores));
            }
        }
        Ok(rows)
    }

    fn layers(&self, n_layers: usize) -> Result<Vec<usize>> {
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

/// A model on one prompt with its residual stream along a direction replaced by another model's after every block; a direction
/// without length replaces nothing.
fn along<'a>(model: Tuned<'a>, other: Tuned<'_>, directions: &[Tensor], prompt: &[Prompt]) -> Result<Condition<'a>> {
    let theirs = resid_post(other.qwen, prompt, &other.condition())?.swap_remove(0); // [n_layers, pos, d_model]
    let mut edits = Vec::new();
    for (layer, direction) in directions.iter().enumerate() {
        if length(direction)? > 0.0 {
            edits.push(Edit::patch_along(layer, direction, &theirs.f_get(layer as i64)?));
        }
    }
    Ok(Condition { edits, ..model.condition() })
}

/// A vector of normally distributed numbers at a given length, from a random stream of its layer's own.
fn random_vector(subject: &Subject<'_>, layer: usize, norm: f64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(subject.seed, "steering.random", layer as u64));
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

/// What an edit's scores are set against.
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
        let delta = |scores: &[Score], of: Measure| Mean::paired(&column(scores, of), &column(self.base, of));
        let logp: Measure = |score| score.logp_target;
        let margin: Measure = |score| score.margin;
        let fraction = |of| {
            let student = delta(self.student, of);
            student.exceeds(3.0).then(|| delta(scores, of).mean / student.mean)
        };
        SteeringRow {
            layer,
            kind: kind.to_owned(),
            coefficient,
            extraction: self.steering.extraction.to_string(),
            target: self.subject.target.word.clone(),
            n_questions: scores.len(),
            vector_norm,
            delta_logp: delta(scores, logp).mean,
            delta_logp_se: delta(scores, logp).se,
            delta_margin: delta(scores, margin).mean,
            delta_margin_se: delta(scores, margin).se,
            student_delta_logp: delta(self.student, logp).mean,
            student_delta_margin: delta(self.student, margin).mean,
            fraction_logp: fraction(logp),
            fraction_margin: fraction(margin),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::direction::directions;
    use crate::fixture::World;

    #[test]
    fn the_controls_have_the_learned_vectors_length() {
        let world = World::new();
        let random = random_vector(&world.subject(), 1, 2.5).unwrap();
        assert!((length(&random).unwrap() - 2.5).abs() < 1e-5);
        let cosine = crate::direction::cosine(&random, &random_vector(&world.subject(), 0, 1.0).unwrap()).unwrap();
        assert!(cosine.abs() < 0.6, "layers have random vectors of their own");
        assert_eq!(length(&with_length(&Tensor::from_slice(&[0_f32, 0.0]), 1.0).unwrap()).unwrap(), 0.0);
    }

    #[test]
    fn an_edit_acts_with_its_coefficient() {
        let world = World::new();
        let settings = Steering {
            layers: vec![0],
            coefficients: vec![0.0, 2.0],
            n_prompts: 2,
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
        assert_eq!(settings.run(&world.subject(), &mut |_| ()).unwrap(), rows);
        assert!(Steering::plot(&rows).unwrap().is_some() && Steering::reading(&rows).ends_with('.'));
    }

    #[test]
    fn the_students_difference_at_the_end_is_the_student() {
        // One question that is also the number prompt: what is added after the last block at its last token is all there is.
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
        let next =
            |model: Tuned<'_>, condition| hooks::score::next_token_logprobs(model.qwen, prompt, &condition).unwrap();
        let steered = next(subject.base(), edited(subject.base(), edit));
        let student = next(subject.student, subject.student.condition());
        assert!((steered - student).abs().max().double_value(&[]) < 1e-4);
    }

    #[test]
    fn what_moved_along_the_direction_is_undone_and_nothing_else() {
        let world = World::new();
        let subject = world.subject();
        let settings = Steering { layers: vec![0], n_prompts: 2, replace: true, ..Steering::default() };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        let of = |kind: &str| rows.iter().find(|row| row.kind == kind).unwrap();
        let student = of("replace").student_delta_logp;
        assert!(
            (of("replace").delta_logp - student).abs() > 1e-4
                && of("replace").delta_logp != of("replace_random").delta_logp
        );
        // Where the student's whole difference at a prompt's end lies along the direction, the base is what is left.
        let question = [world.number_users[0].0.clone()];
        let subject = Subject { questions: &question, ..world.subject() };
        let mut ends = directions(&subject, &Direction { positions: vec![Extraction::Last], n_prompts: 1 }).unwrap();
        let last = ends.len() - 1;
        ends[..last].iter_mut().for_each(|direction| *direction = direction.zeros_like()); // they replace nothing
        let prompt = &subject.question_prompts("test").unwrap()[..1];
        let next = |model: Tuned<'_>, condition: &Condition<'_>| {
            hooks::score::next_token_logprobs(model.qwen, prompt, condition).unwrap()
        };
        let (student, base) = (subject.student, subject.base());
        let plain = |model: Tuned<'_>| next(model, &model.condition());
        let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(apart(&plain(student), &plain(base)) > 1e-3);
        for (model, other) in [(student, base), (base, student)] {
            let found = next(model, &along(model, other, &ends, prompt).unwrap());
            assert!(apart(&found, &plain(other)) < 1e-4, "{}", apart(&found, &plain(other)));
        }
    }

    #[test]
    fn layers_are_spread_or_checked() {
        let layers = |settings: &Steering, n| settings.layers(n);
        assert_eq!(layers(&Steering::default(), 24).unwrap(), [6, 12, 18]);
        assert_eq!(layers(&Steering::default(), 2).unwrap(), [0, 1]);
        assert_eq!(layers(&Steering::default(), 1).unwrap(), [0]);
        let message = layers(&Steering { layers: vec![2], ..Steering::default() }, 2).unwrap_err().to_string();
        assert!(message.contains("steering.layers is 2"), "{message}");
    }
}
