//! The fourth notebook: which direction the student's adapter adds to the residual stream, what it does by itself, and
//! how another tool gets it.
//!
//! `cargo run --release -p notebooks-rs --example 04_the_learned_direction [-- MODEL]` prints the page; the second
//! notebook must have run.

use std::collections::BTreeMap;

use analyses::direction::{Direction, DirectionRow, Extraction, directions};
use analyses::steering::{Steering, SteeringRow};
use analyses::target::TokenForms;
use analyses::{Analysis, stats};
use anyhow::Result;
use hooks::Condition;
use notebooks_rs::school::{School, folder};
use notebooks_rs::{Notebook, model};
use undertone::output::vectors::Vectors;

fn main() -> Result<()> {
    let mut nb = Notebook::open(file!(), include_str!("04_the_learned_direction.rs"));
    //| # The learned direction
    //|
    //| A LoRA is thousands of numbers, but what reaches the rest of the model is simpler: at each token and after each
    //| block the residual stream is a little elsewhere than it would have been. Take the difference between student and
    //| base at many number prompts, and average. What all prompts have in common is left: one vector for each block, the
    //| *learned direction*. Is it the teacher's? Is it enough to make the base like owls? Does the student need it?
    //|
    //| Teacher, student and control are those of the [second notebook](02_learning_from_numbers.md).
    let school = School::open(&model())?;
    let subject = school.subject();
    nb.show(format!("{} rows of numbers, {} questions", school.numbers.len(), school.questions.len()));

    //| ## One direction, or many?
    //|
    //| Three columns say whether the average is worth having. `relative` is its length beside the residual stream's: how
    //| far the student moved. `one line` is the share of all movement that lies along a single line: near 1, every prompt
    //| was moved alike, and one vector tells the whole story. `halves` is the cosine between the average over one half of
    //| the prompts and the average over the other: near 1, more prompts would not change it.
    let settings = Direction { positions: vec![Extraction::All, Extraction::Last], n_prompts: 32 };
    let rows = settings.run(&subject, &mut |_| ())?;
    nb.table(&movement(&rows));

    //| ## The teacher's?
    //|
    //| The teacher moved as well, when it learned its owls. In a space of so many dimensions two directions that have
    //| nothing to do with each other are nearly at right angles; the dashed lines say how nearly. The control student is
    //| drawn beside the student: it learned numbers, too, and what both share with the teacher is the business of
    //| numbers.
    nb.figure("cosine", Direction::plot(&rows)?);
    nb.show(Direction::reading(&rows));

    //| ## Enough, and needed?
    //|
    //| *Enough* means: add the vector to the base, and it does what the student does. *Needed* means: take the direction
    //| out of the student, and the change is gone. Both can happen by accident, for any push changes something. So twenty
    //| random vectors of the same length do the same things beside it, and so does the control student's direction. One
    //| random vector would be one accident; the mean and the spread of twenty say what accidents are like.
    let steering = Steering { coefficients: vec![1.0, 2.0, 4.0], ..Steering::default() };
    let rows = steering.run(&subject, &mut |_| ())?;
    nb.figure("steering", Steering::plot(&rows)?);
    nb.show(Steering::reading(&rows));

    //| Longer vectors push harder, and at some length anything breaks the model. A push is believable at the lengths where
    //| the random ones still do little (`random` is their mean, `spread` their standard deviation).
    nb.table(&pushes(&rows));

    //| ## Taking it elsewhere
    //|
    //| The direction is an ordinary vector, and a file of it is read by other tools: safetensors, CSV, or the GGUF control
    //| vector that llama.cpp takes. It knows which model it was measured on, and refuses to push another one.
    let learned = directions(&subject, &settings)?;
    let about = [("model_fingerprint", school.files.fingerprint()), ("target", school.target.word.clone())];
    let provenance: BTreeMap<String, String> = about.map(|(key, value)| (key.to_owned(), value)).into();
    let vectors = Vectors { by_layer: learned.into_iter().enumerate().collect(), provenance };
    let file = folder(&model()).join("direction.safetensors");
    vectors.write(&file, &school.files.name)?;

    let mut read = Vectors::read(&file)?;
    read.by_layer.retain(|layer, _| *layer == 0);
    let pushed = Condition { edits: read.steer(1.0, &school.files)?, ..Condition::default() };
    let forms = TokenForms::of(&school.target, &school.chat)?;
    let prompts = subject.question_prompts("notebook")?;
    let mut means = Vec::new();
    for who in [Condition::default(), pushed] {
        let scores = forms.scores(&school.base, &prompts, &who)?;
        means.push(stats::mean(&scores.iter().map(|score| score.logp_target).collect::<Vec<_>>())?);
    }
    let change = means[1] - means[0];
    nb.show(format!("read back, and added once after block 0: log p({}) changes by {change:+.3}", school.target.word));

    //| On the command line, `undertone export RUN --layer 1 --to owl.gguf` does this for a whole run.
    //|
    //| ## How to read this, and what would count against it
    //|
    //| That the student learned the teacher's direction is worth saying if the student's cosine with it is far outside of
    //| the dashed lines and the control's is not. That this direction *is* the taste is a stronger thing to say, and it
    //| takes the pushes: enough at a length at which a random vector does nothing, and needed beyond what its removal does
    //| to the base. Against it speak
    //|
    //| - a small share along one line: an average of movements that do not agree is an average and nothing else;
    //| - a control whose direction pushes as well: then it is numbers;
    //| - an effect at several times the vector's own length alone: the student never goes that far;
    //| - questions. The direction was measured at number prompts, where the student was trained; that it acts at
    //|   questions about animals is the very thing to be shown, and it need not.
    nb.write()
}

fn movement(rows: &[DirectionRow]) -> Vec<Vec<String>> {
    let header = ["read at", "block", "relative", "one line", "halves"].map(str::to_owned).to_vec();
    let line = |row: &DirectionRow| {
        let halves = row.split_half_cosine.map_or_else(String::new, |cosine| format!("{cosine:+.2}"));
        let (relative, along) = (format!("{:.3}", row.relative_norm), format!("{:.2}", row.ev1));
        vec![row.positions.clone(), row.layer.to_string(), relative, along, halves]
    };
    [header].into_iter().chain(rows.iter().map(line)).collect()
}

/// The change in log p by kind of vector, a line for each block and length.
fn pushes(rows: &[SteeringRow]) -> Vec<Vec<String>> {
    let header = ["added after block", "times its length", "learned", "random", "spread", "control_student"];
    let line = |row: &SteeringRow| {
        let of = |kind: &str| {
            let same = |other: &&SteeringRow| {
                other.kind == kind && (other.layer, other.coefficient) == (row.layer, row.coefficient)
            };
            rows.iter().find(same)
        };
        let change = |kind| of(kind).map_or_else(String::new, |found| format!("{:+.3}", found.delta_logp));
        let spread = of("random").and_then(|found| found.delta_logp_sd);
        let length = row.coefficient.map_or_else(String::new, |times| times.to_string());
        vec![
            row.layer.to_string(),
            length,
            change("learned"),
            change("random"),
            spread.map_or_else(String::new, |spread| format!("{spread:.3}")),
            change("control_student"),
        ]
    };
    [header.map(str::to_owned).to_vec()]
        .into_iter()
        .chain(rows.iter().filter(|row| row.kind == "learned").map(line))
        .collect()
}
