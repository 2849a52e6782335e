//! Tests whether the learned direction is sufficient and necessary for the effect: it is added to the base, and taken
//! out of the student. Random vectors of the same length, and the control student's direction, are steered with for
//! comparison.

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
    /// The blocks to steer after, one at a time; if empty, a few that are spread over the depth.
    pub layers: Vec<usize>,
    /// Factors of the learned vector; 1 leaves its length.
    pub coefficients: Vec<f64>,
    /// The positions of the number prompts at which the direction is read: `all`, `last` or `class:CLASS[+CLASS]`.
    pub extraction: Extraction,
    /// Number of number prompts that the direction is the mean over.
    pub n_prompts: usize,
    /// Whether to edit only the prompt's tokens, not generated ones.
    pub prompt_only: bool,
    /// Whether to replace, after every block, the student's residual stream along the direction by the base's (which
    /// undoes only the movement along the direction), and the base's by the student's.
    pub replace: bool,
    /// Number of random directions that each edit is made with, for comparison: their mean and spread show chance.
    pub n_random: usize,
    /// Number of questions that are asked, from the first; `None` means all.
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

/// The value of the column `kind` for the control student's direction.
pub const CONTROL_STUDENT: &str = "control_student";
/// The value of the column `kind` for the direction of another trait's student.
pub const OTHER_TRAIT: &str = "other_trait";

/// The directions and unedited scores that steering starts from.
#[derive(Debug)]
pub struct Start<'a> {
    /// The student's direction of every layer, each `[d_model]`.
    pub learned: Vec<Tensor>,
    /// The directions of other students, each with its `kind` and of every layer.
    pub beside: &'a [(&'static str, Vec<Tensor>)],
    /// The base's scores on the questions, without an edit.
    pub base: Vec<Score>,
    /// The student's scores on the questions, without an edit.
    pub student: Vec<Score>,
}

impl Steering {
    /// Makes the edits; directions and unedited scores are given by `start`.
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
            // All vectors, the random ones last, for every coefficient.
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

    /// Patches the residual stream along every block's direction: the base's into the student, and the student's into
    /// the base.
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

    /// The random vectors of a block, with length `norm`.
    fn random_vectors(&self, subject: &Subject<'_>, layer: usize, norm: f64) -> Result<Vec<Tensor>> {
        (0..self.n_random).map(|at| random_vector(subject, layer, at, norm)).collect()
    }

    /// Refuses settings that are impossible for a model of `n_layers` blocks, before anything is trained.
    pub fn check(&self, n_layers: usize) -> Result<()> {
        self.checked(n_layers).map(drop)
    }

    /// The blocks to steer after. Refuses impossible settings.
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

/// A model whose residual stream along each block's direction is replaced by another model's on the same prompt. A zero
/// direction replaces nothing.
fn along<'a>(model: Tuned<'a>, theirs: &Tensor, directions: &[&Tensor]) -> Result<Condition<'a>> {
    let mut edits = Vec::new();
    for (layer, direction) in directions.iter().enumerate() {
        if length(direction)? > 0.0 {
            edits.push(Edit::patch_along(layer, direction, &theirs.f_get(layer as i64)?));
        }
    }
    Ok(Condition { edits, ..model.condition() })
}

/// A vector of normally distributed numbers, scaled to length `norm`, from a separate random stream.
fn random_vector(subject: &Subject<'_>, layer: usize, at: usize, norm: f64) -> Result<Tensor> {
    let stream = (at * subject.base.config.n_layers + layer) as u64;
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(subject.seed, "steering.random", stream));
    let values: Vec<f32> = (0..subject.base.config.d_model).map(|_| standard_normal(&mut rng) as f32).collect();
    with_length(&Tensor::f_from_slice(&values)?, norm)
}

/// The vector scaled to length `norm`; a zero vector stays zero.
fn with_length(vector: &Tensor, norm: f64) -> Result<Tensor> {
    let own = length(vector)?;
    Ok(vector.f_mul_scalar(if own > 0.0 { norm / own } else { 0.0 })?)
}

#[cfg(test)]
mod tests;
