//! Is the learned direction enough, and is it needed? Added to the base it should do what the student does; taken out
//! of the student it should undo it. Random vectors of the same length show what chance does; the control student's
//! direction is steered with as well.

mod report;
mod rows;

use hooks::{Condition, Edit, Sequence, Tokens, resid_post, standard_normal, stream_seed};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Analysis;
use crate::direction::geometry::length;
use crate::direction::{Direction, Extraction};
use crate::error::{Error, Result};
use crate::plot::Svg;
use crate::steering::rows::Around;
use crate::subject::{Subject, Tuned};
use crate::target::{Score, TokenForms};

pub use rows::SteeringRow;

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
        report::plot(rows)
    }

    fn reading(rows: &[SteeringRow]) -> String {
        report::reading(rows)
    }
}

/// The column `kind` of the control student's direction.
pub const CONTROL_STUDENT: &str = "control_student";
/// The column `kind` of another trait's student's direction.
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
        let around = Around { extraction: &self.extraction, target: &subject.target.word, base, student };
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
                    rows.push(around.among((layer, kind, Some(*coefficient), norm), scores, &by_chance));
                }
                of_random.extend(around.by_chance((layer, "random", Some(*coefficient), norm), &by_chance)?);
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
                rows.push(around.among((layer, "project_out", None, norm), &scores[0], &by_chance));
                rows.extend(around.by_chance((layer, "project_out_random", None, norm), &by_chance)?);
                let of_base = ask(subject.base(), vec![out(vector)])?;
                rows.push(around.row((layer, "project_out_base", None, norm), &of_base[0]));
            }
        }
        if self.replace {
            progress(&format!("steering: replacing after every block, {n} questions"));
            rows.extend(self.replaced(&around, subject, &forms, &prompts, learned)?);
        }
        Ok(rows)
    }

    /// Patches the residual stream along every block's direction: the base's into the student, and the other way round.
    fn replaced(
        &self,
        around: &Around<'_>,
        subject: &Subject<'_>,
        forms: &TokenForms,
        prompts: &[Sequence],
        learned: &[Tensor],
    ) -> Result<Vec<SteeringRow>> {
        let mut rows = Vec::new();
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
            rows.push(around.among((0, kind, None, norm), &scores[0], &by_chance));
            rows.extend(around.by_chance((0, kind_random, None, norm), &by_chance)?);
        }
        Ok(rows)
    }

    /// The random vectors of a block at a given length.
    fn random_vectors(&self, subject: &Subject<'_>, layer: usize, norm: f64) -> Result<Vec<Tensor>> {
        (0..self.n_random).map(|at| random_vector(subject, layer, at, norm)).collect()
    }

    /// Refuses what a model of so many blocks cannot be steered with, before anything is trained.
    pub fn check(&self, n_layers: usize) -> Result<()> {
        self.checked(n_layers).map(drop)
    }

    /// The blocks to steer after.
    fn checked(&self, n_layers: usize) -> Result<Vec<usize>> {
        if let Some(layer) = self.layers.iter().find(|layer| **layer >= n_layers) {
            let expected = format!("less than the model's {n_layers} blocks");
            return Err(Error::setting(Self::NAME, "layers", &expected, layer));
        }
        if let Some(coefficient) = self.coefficients.iter().find(|coefficient| !coefficient.is_finite()) {
            return Err(Error::setting(Self::NAME, "coefficients", "a finite number", coefficient));
        }
        if self.n_random == 1 {
            let expected = "2 or more random directions, which have a spread, or 0 for none";
            return Err(Error::setting(Self::NAME, "n_random", expected, &1));
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

/// A model's residual stream after every block on one prompt, `[n_layers, pos, d_model]`.
fn stream(model: Tuned<'_>, prompt: &[Sequence]) -> Result<Tensor> {
    Ok(resid_post(model.qwen, prompt, &model.condition())?.swap_remove(0))
}

/// A model on one prompt with its residual stream along a direction replaced by another model's after every block; a
/// direction without length replaces nothing.
fn along<'a>(model: Tuned<'a>, theirs: &Tensor, directions: &[&Tensor]) -> Result<Condition<'a>> {
    let mut edits = Vec::new();
    for (layer, direction) in directions.iter().enumerate() {
        if length(direction)? > 0.0 {
            edits.push(Edit::patch_along(layer, direction, &theirs.f_get(layer as i64)?));
        }
    }
    Ok(Condition { edits, ..model.condition() })
}

/// A vector of normally distributed numbers at a given length, from a random stream of its own.
fn random_vector(subject: &Subject<'_>, layer: usize, at: usize, norm: f64) -> Result<Tensor> {
    let stream = (at * subject.base.config.n_layers + layer) as u64;
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(subject.seed, "steering.random", stream));
    let values: Vec<f32> = (0..subject.base.config.d_model).map(|_| standard_normal(&mut rng) as f32).collect();
    with_length(&Tensor::f_from_slice(&values)?, norm)
}

/// The vector at another length; a zero vector stays zero.
fn with_length(vector: &Tensor, norm: f64) -> Result<Tensor> {
    let own = length(vector)?;
    Ok(vector.f_mul_scalar(if own > 0.0 { norm / own } else { 0.0 })?)
}

#[cfg(test)]
mod tests;
