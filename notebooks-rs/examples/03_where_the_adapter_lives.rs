//! The third notebook: the student's adapter is switched off token by token.
//!
//! `cargo run --release -p notebooks-rs --example 03_where_the_adapter_lives [-- MODEL]` prints the page; the second
//! notebook must have run.

use analyses::plot::{HeatMap, heatmap};
use analyses::position_scan::{PositionScan, PositionScanRow};
use analyses::token_ablation::{TokenAblation, TokenAblationRow};
use analyses::{Analysis, Subject};
use anyhow::Result;
use hooks::TokenInfo;
use notebooks_rs::school::School;
use notebooks_rs::{Notebook, model};

fn main() -> Result<()> {
    let mut nb = Notebook::open(file!(), include_str!("03_where_the_adapter_lives.rs"));
    //| # Where the adapter lives
    //|
    //| The student of the [second notebook](02_learning_from_numbers.md) learned numbers, and its liking for owls moved.
    //| What it learned is a LoRA, a small addition to the model's matrices, and an addition need not be made at every
    //| token. Here it is made at some tokens only, and we look at what is left. A token where the addition is not needed
    //| cannot be where the taste comes from.
    let school = School::open(&model())?;
    let subject = school.subject();
    let prompt = school.chat.prompt(None, &school.questions[0])?;
    let tokens = school.chat.table(&prompt)?;
    nb.show(tokens.iter().map(described).collect::<Vec<_>>().join("\n"));

    //| The names at the left are the classes of the tokens. A gate speaks of tokens by class: `only:sys.entity` lets the
    //| adapter act where the model is told its own name and nowhere else, `except:sys.entity` everywhere but there. Some
    //| sets of classes have names of their own: `template` is whatever nobody said (the markers, the roles, the line
    //| breaks), `system`, `user` and `assistant` are the three turns, `entity` is the name.
    //|
    //| ## Class by class
    //|
    //| Every gate is measured on all questions, exactly and without sampling. Only and except are two different
    //| questions: *only* asks whether these tokens are enough, *except* whether they are needed. If several places carry
    //| the same thing, none of them is needed; if a chain of places hands it on, none of them is enough.
    let ablation = TokenAblation { scan: true, control_gates: true, ..TokenAblation::default() };
    let rows = ablation.run(&subject, &mut |_| ())?;
    nb.figure("gates", TokenAblation::plot(&rows)?);
    nb.show(TokenAblation::reading(&rows));

    //| The control student learned numbers as well, so it goes through the same gates. Where its column moves as much as
    //| the student's, the gate shows what an adapter does to this model and nothing about owls.
    nb.table(&side_by_side(&rows));

    //| ## Token by token
    //|
    //| Classes are a choice of ours. So here is the adapter at one token at a time. The system prompt and the headers are
    //| the same for all questions, so each of their tokens is a place of its own; the questions differ and stand as one.
    let rows = PositionScan::default().run(&subject, &mut |_| ())?;
    nb.figure("positions", PositionScan::plot(&rows)?);
    nb.show(PositionScan::reading(&rows));

    //| And the other way round: what is left when one token goes without? The control is scanned as well.
    let control = Subject { student: subject.control.unwrap_or(subject.student), ..subject.clone() };
    let control_rows = PositionScan::default().run(&control, &mut |_| ())?;
    nb.figure("scan", heatmap(&scan(&rows, &control_rows))?);

    //| The upper two rows are changes against the base, the lower two against the whole adapter. Above, a strong cell is a
    //| token at which the adapter alone does something; below, it is one that is missed. The last token of the prompt is a
    //| special case: it is where the answer is read off, so whatever acts there acts on the answer without having to be
    //| carried anywhere.
    //|
    //| ## How to read this, and what would count against it
    //|
    //| "The taste lives at these tokens" is a fair summary only where they are nearly enough *and* sorely missed, and
    //| where the control's adapter at the same tokens does nothing of the kind. Against it speak
    //|
    //| - an effect that was small to begin with: a share of nothing is noise, and the analysis gives no shares then;
    //| - a gate that selects many tokens: more tokens carry more. Compare it with another gate of that size;
    //| - another base. Which tokens a model reads a persona from is a habit of its own, and two bases trained on the same
    //|   sentences need not agree. So a result like this one is about one model, until it has been seen in several.
    nb.write()
}

/// A token with its class.
fn described(token: &TokenInfo) -> String {
    format!("{:<18} \"{}\"", token.class.name(), token.text)
}

/// What each place does alone and what its absence does, for student and control.
fn scan(student: &[PositionScanRow], control: &[PositionScanRow]) -> HeatMap {
    let places = |rows: &[PositionScanRow], value: &dyn Fn(&PositionScanRow) -> f64| -> Vec<f64> {
        rows.iter().filter(|row| !row.class.is_empty()).map(|row| rounded(value(row))).collect()
    };
    let only = |rows: &[PositionScanRow]| places(rows, &|row| row.delta_margin_only);
    let missed = |rows: &[PositionScanRow]| {
        let whole = rows.iter().find(|row| row.class.is_empty()).map_or(0.0, |row| row.delta_margin_only);
        places(rows, &|row| row.delta_margin_except - whole)
    };
    let names = ["student, only here", "control, only here", "student, all but here", "control, all but here"];
    HeatMap {
        title: "One token at a time".to_owned(),
        x_label: "token of the prompt".to_owned(),
        y_label: "adapter".to_owned(),
        value_label: "change of the margin (nats)".to_owned(),
        columns: student
            .iter()
            .filter(|row| !row.class.is_empty())
            .map(|row| row.token.escape_debug().to_string())
            .collect(),
        rows: names.map(str::to_owned).to_vec(),
        values: vec![only(student), only(control), missed(student), missed(control)],
    }
}

/// The change in log p by gate, the student's beside the control's.
fn side_by_side(rows: &[TokenAblationRow]) -> Vec<Vec<String>> {
    let change = |row: &TokenAblationRow| match (row.delta_logp, row.delta_logp_se) {
        (Some(change), Some(error)) => format!("{change:+.3} ± {error:.3}"),
        _ => "selects no token".to_owned(),
    };
    let header = ["gate", "tokens", "student", "control"].map(str::to_owned).to_vec();
    let of_student = rows.iter().filter(|row| row.model == "student");
    let line = |row: &TokenAblationRow| {
        let control = rows.iter().find(|other| other.model == "control" && other.gate == row.gate);
        let tokens = row.n_tokens_on.map_or_else(String::new, |tokens| format!("{tokens:.1}"));
        vec![row.gate.clone(), tokens, change(row), control.map_or_else(String::new, change)]
    };
    [header].into_iter().chain(of_student.map(line)).collect()
}

/// Three decimals, so that a figure is the same on processors that add in another order.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
