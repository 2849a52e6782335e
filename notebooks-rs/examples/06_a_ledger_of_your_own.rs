//! The sixth notebook: a training loop of one's own, and the books of what it did to the model's taste.
//!
//! `cargo run --release -p notebooks-rs --example 06_a_ledger_of_your_own [-- MODEL]` prints the page; the second
//! notebook must have run.

use std::collections::BTreeMap;

use analyses::ledger::{Average, Books, EntryRow, LearnedRow, Ledger, Path, Step, report};
use analyses::{Subject, Tuned};
use anyhow::Result;
use hooks::{Adapter, Batch, Gate, PackedRow, Qwen, Targets};
use notebooks_rs::school::School;
use notebooks_rs::{Notebook, model};
use tch::{Kind, Tensor};

fn main() -> Result<()> {
    let mut nb = Notebook::open(file!(), include_str!("06_a_ledger_of_your_own.rs"));
    //| # A ledger of your own
    //|
    //| A finetuning is a path: the adapter's tensors before the first step and after each. Whatever was learned on the way
    //| was learned from some token, in some step. The ledger books it there, and at the end the books have to balance: the
    //| entries of all tokens add up to the change, but for a residual that stands beside them.
    //|
    //| The path may be of any training. Here is a loop of Adam, written out. It goes over rows that the teacher of the
    //| [second notebook](02_learning_from_numbers.md) wrote, fifty in each step.
    let school = School::open(&model())?;
    let whole = school.subject();
    let subject = Subject { student: Tuned::of(&school.base), start: None, control: None, ..whole.clone() };
    let rows: Vec<LearnedRow> = (0..school.numbers.len()).map(|at| learned(&whole, at)).collect::<Result<_>>()?;

    let (rate, beta, beta_2, epsilon) = (5e-3, 0.9, 0.999, 1e-4);
    let (mut states, mut steps) = (vec![values(&school.start)], vec![]);
    let zeros = || states[0].iter().map(Tensor::zeros_like).collect::<Vec<_>>();
    let (mut m, mut v) = (zeros(), zeros());
    for t in 0..120 {
        let of_step: Vec<usize> = (0..50).map(|k| (50 * t + k) % rows.len()).collect();
        let chosen: Vec<&LearnedRow> = of_step.iter().map(|row| &rows[*row]).collect();
        let gradients = mean_gradient(&school.base, &chosen, &school.start.with_values(&states[t])?)?;
        m = m.iter().zip(&gradients).map(|(m, g)| beta * m + (1.0 - beta) * g).collect();
        v = v.iter().zip(&gradients).map(|(v, g)| beta_2 * v + (1.0 - beta_2) * g * g).collect();
        let (of_m, of_v) = (1.0 - f64::powi(beta, t as i32 + 1), 1.0 - f64::powi(beta_2, t as i32 + 1));
        let scales: Vec<Tensor> = v.iter().map(|v| ((v / of_v).sqrt() + epsilon).reciprocal()).collect();
        let moved = states[t].iter().zip(m.iter().zip(&scales)).map(|(at, (m, scale))| at - rate / of_m * m * scale);
        states.push(moved.collect());
        steps.push(Step { rows: of_step, learning_rate: rate, clip: 1.0, scales: Some(scales) });
    }

    //| ## The books
    //|
    //| The loop kept what the ledger has to know of a step: its rows, its rate, and the scales by which Adam multiplied the
    //| average of the gradients. The ledger asks for two more things: the questions whose answers are measured (the
    //| *margin* is log p of an owl, less that of the other animals), and the teacher, so that it can tell what a token
    //| would have brought on average from what this token happened to bring.
    let path = Path {
        states,
        steps,
        average: Average::Corrected(beta),
        decay: 0.0,
        decay_in_gradient: 0.0,
        rows,
        by_teacher: true,
        gate: Gate::EVERYWHERE,
    };
    let books = Ledger::default().books(&subject, "student", (&school.start, &path), &mut |_| ())?;
    nb.show(report::reading(&books.rows));
    nb.table(&groups(&books));

    //| Read the columns from the right. `luck` is a token's entry less the entry that the teacher would have brought on
    //| average at its place. It is noise, and can be larger than everything else: where it is, the same teacher's next
    //| numbers may well move the owl the other way. `drive` is how far the teacher is from the base, and `pull` what holds
    //| the student back near the base; only their sum is what the teacher taught.
    //|
    //| ## The first row, token by token
    //|
    //| A row is learned several times. Here are the first one's entries, added up, in thousandths of a nat.
    nb.table(&first_row(&books.entries, path.rows[0].id));

    //| ## Where it sits
    //|
    //| The same sum once more, by the part of the training rows where the adapter learned it and the part of the questions
    //| where it is read.
    let figures = report::plots(&books.entries, &books.parts, &books.rows)?;
    for (name, figure) in figures.into_iter().filter(|(name, _)| *name == "parts") {
        nb.figure(name, figure);
    }

    //| ## What the books do not say
    //|
    //| They account for the path that was taken. Take the heaviest token out, and the rest of the path is another one, on
    //| which other tokens have other entries. Whether a token is *needed* takes a second training without it.
    nb.write()
}

/// A row as it is learned: every token of the answer counts, in the student's context and in the teacher's.
fn learned(subject: &Subject<'_>, at: usize) -> Result<LearnedRow> {
    let (in_teacher, row) = subject.paired_row(at, subject.teacher().and_then(|(_, system)| system))?;
    let weights = (0..row.ids.len()).map(|at| if row.completion.contains(&at) { 1.0 } else { 0.0 }).collect();
    Ok(LearnedRow { id: at, row, in_teacher: Some(in_teacher), weights, doses: None, soft: None })
}

/// The gradient of some rows' mean loss at an adapter's tensors.
fn mean_gradient(base: &Qwen, rows: &[&LearnedRow], adapter: &Adapter) -> Result<Vec<Tensor>> {
    let packed: Vec<PackedRow<'_>> = rows.iter().map(|row| PackedRow::of(&row.row.ids)).collect();
    let batch = Batch::packed(&[&packed], true, base.device())?;
    let ids: Vec<&[i64]> = rows.iter().map(|row| row.row.ids.as_slice()).collect();
    let masks: Vec<Vec<bool>> = rows.iter().map(|row| row.weights.iter().map(|w| *w > 0.0).collect()).collect();
    let targets = Targets::of(&batch, &ids, &masks.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
    let mean = Tensor::full([targets.n as i64], 1.0 / targets.n as f64, (Kind::Float, base.device()));
    Ok(base.lora_gradients(&batch, &targets, &mean, adapter, None)?.1)
}

fn values(adapter: &Adapter) -> Vec<Tensor> {
    adapter.parameters().into_iter().map(|(_, value)| value.copy()).collect()
}

fn groups(books: &Books) -> Vec<Vec<String>> {
    let header = ["tokens", "share", "share of the loss", "booked", "drive", "pull", "luck"];
    let nats = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:+.2}"));
    let lines = books.rows.iter().map(|row| {
        let is_group = row.n_tokens > 0;
        let share = |share: f64| if is_group { format!("{:.0} %", 100.0 * share) } else { String::new() };
        vec![
            row.group.replace('_', " "),
            share(row.share),
            share(row.share_of_loss),
            nats(Some(row.booked)),
            nats(row.drive),
            nats(is_group.then_some(row.pull)),
            nats(row.luck),
        ]
    });
    [header.map(str::to_owned).to_vec()].into_iter().chain(lines).collect()
}

fn first_row(entries: &[EntryRow], id: usize) -> Vec<Vec<String>> {
    let mut tokens: BTreeMap<i64, (String, bool, [f64; 3])> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.row_id == id) {
        let token = tokens.entry(entry.k).or_default();
        token.0.clone_from(&entry.token_text);
        token.1 = entry.nief == Some(true);
        for (sum, value) in token.2.iter_mut().zip([entry.entry, entry.entry_teacher.unwrap_or(0.0), entry.entry_base])
        {
            *sum += 1e3 * value;
        }
    }
    let header = ["token", "divergent", "booked", "expected from the teacher", "expected from the base"];
    let line = |(text, divergent, sums): (String, bool, [f64; 3])| {
        let text = if text.trim().is_empty() { format!("{text:?}") } else { text };
        let mark = if divergent { "yes" } else { "" };
        [text, mark.to_owned()].into_iter().chain(sums.map(|sum| format!("{sum:+.1}"))).collect()
    };
    [header.map(str::to_owned).to_vec()].into_iter().chain(tokens.into_values().map(line)).collect()
}
