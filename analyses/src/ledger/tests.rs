//! The books of short trainings of a tiny model in f64, against gradients by autograd and the definition's double sum.

use hooks::{Adapter, Batch, Condition, Doses, Gate, ModelFiles, Pass, Qwen, Sequence, gradients};
use tch::{Device, Kind, Tensor};

use super::measure::Measured;
use super::*;
use crate::fixture::World;
use crate::subject::Tuned;

struct Training {
    world: World,
    qwen: Qwen,
    like: Adapter,
    gate: Gate,
    is_soft: bool,
}

impl Training {
    fn new() -> Self {
        let world = World::new();
        let qwen = Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Double).unwrap();
        let values = |adapter: &Adapter| -> Vec<Tensor> {
            adapter.parameters().iter().map(|(_, tensor)| tensor.to_kind(Kind::Double)).collect()
        };
        // A small B, so that A has a gradient from the first step on.
        let values: Vec<Tensor> = values(&world.start)
            .iter()
            .zip(values(&world.student))
            .map(|(start, student)| start + 0.1 * (student - start))
            .collect();
        let like = world.start.with_values(&values).unwrap();
        Self { world, qwen, like, gate: Gate::EVERYWHERE, is_soft: false }
    }

    fn subject(&self) -> Subject<'_> {
        Subject { base: &self.qwen, student: Tuned::of(&self.qwen), ..self.world.subject() }
    }

    fn rows(&self) -> Vec<LearnedRow> {
        let subject = self.subject();
        let (_, system) = subject.teacher().unwrap();
        let row = |(id, row): (usize, &Sequence)| {
            let places = row.completion.clone();
            let others = |own: i64| [3, 4, 5].into_iter().filter(move |id| own != *id).take(2);
            let labels = |at: usize| std::iter::once(row.ids[at]).chain(others(row.ids[at]));
            let ids: Vec<i64> = places.flat_map(labels).collect();
            LearnedRow {
                id: 10 + id,
                row: row.clone(),
                in_teacher: Some(
                    subject.chat.row(system, &subject.number_users[id].0, &subject.number_users[id].1).unwrap(),
                ),
                weights: (0..row.ids.len())
                    .map(|at| if row.completion.contains(&at) { [1.0, 0.5][at % 2] } else { 0.0 })
                    .collect(),
                doses: (!self.gate.is_everywhere()).then(|| self.gate.doses(row).unwrap()),
                soft: self.is_soft.then(|| SoftTargets { k: 3, probs: [0.5, 0.25, 0.125].repeat(ids.len() / 3), ids }),
            }
        };
        self.world.numbers.iter().enumerate().map(row).collect()
    }

    /// The weighted mean loss of some rows, with its graph.
    fn loss(&self, adapter: &Adapter, rows: &[LearnedRow], chosen: &[usize]) -> Tensor {
        let (mut sum, mut total) = (Tensor::from(0.0_f64), 0.0);
        for row in chosen.iter().map(|row| &rows[*row]) {
            let logprobs = self.of_row(adapter, row);
            for at in (0..row.weights.len()).filter(|at| row.weights[*at] > 0.0) {
                sum += row.weights[at] * token_loss(&logprobs, row, at);
                total += row.weights[at];
            }
        }
        sum / total
    }

    /// log p at each token of a row of the training.
    fn of_row(&self, adapter: &Adapter, row: &LearnedRow) -> Tensor {
        let doses = row.doses.as_ref().map(|doses| self.gate.spread(std::slice::from_ref(doses), Device::Cpu).unwrap());
        self.logprobs_at(adapter, &row.row, doses)
    }

    fn logprobs(&self, adapter: &Adapter, row: &Sequence) -> Tensor {
        self.logprobs_at(adapter, row, None)
    }

    fn logprobs_at(&self, adapter: &Adapter, row: &Sequence, doses: Option<Doses>) -> Tensor {
        let batch = Batch::of(&[row], Device::Cpu).unwrap();
        let mut pass = Pass { adapter: Some(adapter), doses, ..Pass::default() };
        self.qwen.forward(&batch, &mut pass).unwrap().get(0).log_softmax(-1, Kind::Double)
    }

    /// The mean margin over the questions, with its graph.
    fn margin(&self, adapter: &Adapter) -> Tensor {
        let subject = self.subject();
        let forms = TokenForms::of(subject.target, subject.chat).unwrap();
        let questions = subject.question_prompts(NAME).unwrap();
        let of_question = |question: &Sequence| {
            let logp = |form: &Vec<i64>| -> Tensor {
                let logprobs = self.logprobs(adapter, &question.with_completion(form));
                let from = question.ids.len() as i64 - 1;
                (0..form.len()).map(|k| logprobs.get(from + k as i64).get(form[k])).sum::<Tensor>()
            };
            let all = |members: &[Vec<Vec<i64>>]| {
                Tensor::stack(&members.iter().flatten().map(logp).collect::<Vec<_>>(), 0).logsumexp([0], false)
            };
            let members = forms.members();
            all(&members[..1]) - all(&members[1..]) + ((members.len() - 1) as f64).ln()
        };
        questions.iter().map(of_question).sum::<Tensor>() / questions.len() as f64
    }

    fn gradient(&self, values: &[Tensor], of: impl Fn(&Adapter) -> Tensor) -> Vec<Tensor> {
        let leaves: Vec<Tensor> = values.iter().map(|value| value.detach().copy().set_requires_grad(true)).collect();
        let adapter = self.like.with_values(&leaves).unwrap();
        gradients(&of(&adapter), &leaves, false).unwrap().iter().map(Tensor::detach).collect()
    }

    /// A training of the rows in turns, with two of three in each step.
    fn path(&self, average: Average, n_steps: usize, rate: f64) -> Path {
        let rows = self.rows();
        let mut states: Vec<Vec<Tensor>> = vec![self.like.parameters().iter().map(|(_, value)| value.copy()).collect()];
        let zeros = || states_zeros(&self.like);
        let (mut m, mut v) = (zeros(), zeros());
        let mut steps = vec![];
        for t in 0..n_steps {
            let here = states.last().unwrap();
            let chosen = vec![t % 3, (t + 1) % 3];
            let g = self.gradient(here, |adapter| self.loss(adapter, &rows, &chosen));
            let clip = if t == 1 { 0.5 } else { 1.0 };
            let g: Vec<Tensor> = g.iter().map(|g| g * clip).collect();
            let (scales, delta): (Option<Vec<Tensor>>, Vec<Tensor>) = match average {
                Average::Corrected(beta) => {
                    m = m.iter().zip(&g).map(|(m, g)| beta * m + (1.0 - beta) * g).collect();
                    v = v.iter().zip(&g).map(|(v, g)| 0.99 * v + 0.01 * g * g).collect();
                    let at = t as i32 + 1;
                    let scale = |v: &Tensor| ((v / (1.0 - 0.99_f64.powi(at))).sqrt() + 1e-3).reciprocal();
                    let scales: Vec<Tensor> = v.iter().map(scale).collect();
                    let m_hat = |m: &Tensor| m / (1.0 - beta.powi(at));
                    let delta = m.iter().zip(&scales).map(|(m, scale)| -rate * m_hat(m) * scale).collect();
                    (Some(scales), delta)
                }
                Average::Sum(momentum) => {
                    m = m.iter().zip(&g).map(|(m, g)| momentum * m + g).collect();
                    (None, m.iter().map(|m| -rate * m).collect())
                }
            };
            let next = here.iter().zip(&delta).map(|(value, delta)| value + delta).collect();
            states.push(next);
            steps.push(Step { rows: chosen, learning_rate: rate, clip, scales });
        }
        Path {
            states,
            steps,
            average,
            decay: 0.0,
            decay_in_gradient: 0.0,
            rows,
            by_teacher: true,
            gate: self.gate.clone(),
        }
    }

    fn books(&self, path: &Path, points: usize) -> Books {
        let settings = Ledger { points, ..Ledger::default() };
        settings.books(&self.subject(), "student", (&self.like, path), &mut |_| ()).unwrap()
    }
}

/// The loss of a row's token, by the definition: of its soft label the divergence over three tokens and all others.
fn token_loss(logprobs: &Tensor, row: &LearnedRow, at: usize) -> Tensor {
    let logprobs = logprobs.get(at as i64 - 1);
    let Some(soft) = &row.soft else { return -logprobs.get(row.row.ids[at]) };
    let place = 3 * (at - row.row.completion.start);
    let mut rest = (Tensor::from(1.0_f64), 1.0);
    let mut loss = Tensor::from(0.0_f64);
    for (id, q) in soft.ids[place..place + 3].iter().zip(&soft.probs[place..place + 3]) {
        let (logp, q) = (logprobs.get(*id), f64::from(*q));
        rest = (rest.0 - logp.exp(), rest.1 - q);
        loss += q * (q.ln() - logp);
    }
    loss + rest.1 * (rest.1.ln() - rest.0.log())
}

fn states_zeros(like: &Adapter) -> Vec<Tensor> {
    like.parameters().iter().map(|(_, value)| value.zeros_like()).collect()
}

fn line<'a>(books: &'a Books, group: &str) -> &'a LedgerRow {
    books.rows.iter().find(|row| row.group == group).unwrap()
}

#[test]
fn the_measure_and_its_gradient_are_those_of_the_scores() {
    let training = Training::new();
    let subject = training.subject();
    let forms = TokenForms::of(subject.target, subject.chat).unwrap();
    let questions = subject.question_prompts(NAME).unwrap();
    for measure in [Measure::Margin, Measure::Logp] {
        let asked = Measured::answers(&training.qwen, &forms, &questions, measure).unwrap();
        let scores = forms.scores(&training.qwen, &questions, &Condition::adapted(&training.like)).unwrap();
        let score = |score: &crate::target::Score| match measure {
            Measure::Margin => score.margin,
            _ => score.logp_target,
        };
        let mean = scores.iter().map(score).sum::<f64>() / scores.len() as f64;
        let value = asked.value(&training.qwen, &training.like).unwrap();
        assert!((value - mean).abs() < 1e-5, "{measure:?}: {value} {mean}"); // scores are handed on as f32
    }
    let asked = Measured::answers(&training.qwen, &forms, &questions, Measure::Margin).unwrap();
    let values: Vec<Tensor> = training.like.parameters().into_iter().map(|(_, value)| value).collect();
    let expected = training.gradient(&values, |adapter| training.margin(adapter));
    let found = whole(&asked.gradient(&training.qwen, &training.like).unwrap()).unwrap();
    let most = expected.iter().map(|tensor| tensor.abs().max().double_value(&[])).fold(0.0, f64::max);
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs().max().double_value(&[]) < 1e-9 * most, "{found} {expected}");
    }
}

/// `a_s` by its definition: the sum over later steps of each one's share of this gradient.
fn adjoint_by_definition(training: &Training, path: &Path, s: usize) -> Vec<Tensor> {
    let mut sum = states_zeros(&training.like);
    for t in s..path.steps.len() {
        let step = &path.steps[t];
        let points = gauss(2).unwrap();
        let mut gradient = states_zeros(&training.like);
        for (part, weight) in points {
            let adapter = path.adapter(&training.like, t, part, Kind::Double).unwrap();
            let values: Vec<Tensor> = adapter.parameters().into_iter().map(|(_, value)| value).collect();
            let here = training.gradient(&values, |adapter| training.margin(adapter));
            gradient = gradient.iter().zip(&here).map(|(sum, here)| sum + weight * here).collect();
        }
        let factor = match path.average {
            Average::Corrected(beta) => {
                (1.0 - beta) * beta.powi((t - s) as i32) / (1.0 - beta.powi(t as i32 + 1)) * step.learning_rate
            }
            Average::Sum(momentum) => momentum.powi((t - s) as i32) * step.learning_rate,
        };
        for (tensor, (sum, gradient)) in sum.iter_mut().zip(&gradient).enumerate() {
            let own = factor * gradient;
            *sum += step.scales.as_ref().map_or(own.shallow_clone(), |scales| own * &scales[tensor]);
        }
    }
    sum
}

/// Each entry of a training, compared with autograd's gradients along the adjoint by its definition.
fn assert_entries(training: &Training, average: Average) {
    let path = training.path(average, 4, 1e-2);
    let books = training.books(&path, 2);
    let most = books.entries.iter().map(|entry| entry.entry.abs()).fold(0.0, f64::max);
    for s in [0, 2] {
        let along = adjoint_by_definition(training, &path, s);
        let step = &path.steps[s];
        let total: f64 = step.rows.iter().flat_map(|row| &path.rows[*row].weights).sum();
        let here: Vec<&EntryRow> = books.entries.iter().filter(|entry| entry.step == s + 1).collect();
        let adapter = training.like.with_values(&path.states[s]).unwrap();
        assert!(!here.is_empty());
        for entry in here {
            let row = &path.rows[entry.row_id - 10];
            let at = row.row.completion.start + entry.k as usize;
            let of_loss =
                training.gradient(&path.states[s], |adapter| -token_loss(&training.of_row(adapter, row), row, at));
            let factor = step.clip * row.weights[at] / total;
            let expected = factor * dot(&along, &of_loss).unwrap();
            assert!((entry.entry - expected).abs() < 1e-9 * most, "{average:?} {entry:?}: {expected}");
            let logprobs = training.of_row(&adapter, row);
            let p = logprobs.get(at as i64 - 1).double_value(&[row.row.ids[at]]).exp();
            assert!((f64::from(entry.p_student) - p).abs() < 1e-7);
            let loss = token_loss(&logprobs, row, at).double_value(&[]) * row.weights[at] / total;
            assert!((entry.loss - loss).abs() < 1e-12, "{entry:?}: {loss}");
            if entry.k > 0 {
                continue; // a vocabulary of gradients is enough for one token of each row
            }
            let zero = training.like.with_values(&states_zeros(&training.like)).unwrap();
            let base = training.logprobs(&zero, &row.row).get(at as i64 - 1).exp();
            let direct = training.gradient(&path.states[s], |adapter| {
                (training.of_row(adapter, row).get(at as i64 - 1) * &base).sum(Kind::Double)
            });
            let expected = factor * dot(&along, &direct).unwrap();
            assert!((entry.entry_base - expected).abs() < 1e-9 * most, "{entry:?}: {expected}");
        }
    }
}

#[test]
fn entries_are_the_tokens_gradients_along_the_adjoint() {
    let training = Training::new();
    for average in [Average::Corrected(0.8), Average::Sum(0.5)] {
        assert_entries(&training, average);
    }
}

#[test]
fn so_they_are_of_soft_labels_and_where_a_gate_acts_in_the_training() {
    for (gate, is_soft) in [(Gate::EVERYWHERE, true), ("only:template+entity".parse().unwrap(), true)] {
        let training = Training { gate, is_soft, ..Training::new() };
        assert_entries(&training, Average::Corrected(0.8));
        let path = training.path(Average::Corrected(0.8), 4, 3e-3);
        let books = training.books(&path, 3);
        let (all, residual) = (line(&books, "all"), line(&books, "residual"));
        assert!(residual.booked.abs() < 1e-6 * all.change.abs(), "{all:?} {residual:?}");
        let of = |written: &str| {
            books.parts.iter().filter(|part| part.written == written).map(|part| part.booked.abs()).sum::<f64>()
        };
        let parts: f64 = books.parts.iter().map(|part| part.booked).sum();
        assert!((parts - all.booked).abs() < 1e-9 * (of("template") + of("entity")));
        let elsewhere = of("user.content") + of("gen");
        assert_eq!(elsewhere == 0.0, !training.gate.is_everywhere(), "nothing is written where the gate is 0");
    }
}

#[test]
fn the_books_balance() {
    let training = Training::new();
    for average in [Average::Corrected(0.8), Average::Sum(0.5)] {
        let path = training.path(average, 5, 3e-3);
        let residual = |points: usize| {
            let books = training.books(&path, points);
            let all = line(&books, "all");
            let [first, last] = [0, path.steps.len()].map(|at| {
                let adapter = training.like.with_values(&path.states[at]).unwrap();
                training.margin(&adapter).double_value(&[])
            });
            assert!((all.change - (last - first)).abs() < 1e-9, "{all:?}");
            let parts: f64 = books.parts.iter().map(|part| part.booked).sum();
            assert!((parts - all.booked).abs() < 1e-9 * all.booked.abs().max(1e-3), "{parts} {all:?}");
            for step in 1..=path.steps.len() {
                let of_step: f64 = books.parts.iter().filter(|part| part.step == step).map(|part| part.booked).sum();
                let entries: f64 =
                    books.entries.iter().filter(|entry| entry.step == step).map(|entry| entry.entry).sum();
                assert!((of_step - entries).abs() < 1e-9 * all.booked.abs().max(1e-3), "{step}: {of_step} {entries}");
            }
            let sum = all.drive.unwrap() + all.pull + all.luck.unwrap();
            assert!((sum - all.booked).abs() < 1e-12, "drive, pull and luck are the whole: {all:?}");
            let groups: f64 =
                ["first_digit", "later_digit", "other"].iter().map(|group| line(&books, group).booked).sum();
            assert!((groups - all.booked).abs() < 1e-12);
            assert!(
                all.booked_se.unwrap() > 0.0
                    && all.n_tokens == books.entries.len()
                    && (all.share_of_loss - 1.0).abs() < 1e-12
            );
            (line(&books, "residual").booked.abs(), all.change.abs())
        };
        let [(one, change), (two, _), (three, _)] = [1, 2, 3].map(residual);
        assert!(change > 1e-4, "{average:?}: {change}");
        // Each point takes two orders of the step's length; in the end rounding is left.
        assert!(two < 0.05 * one && three < 1e-8 * change && two < 1e-4 * change, "{one} {two} {three} of {change}");
    }
}

#[test]
fn a_single_step_of_sgd_is_an_inner_product_and_decay_has_a_line() {
    let training = Training::new();
    let path = training.path(Average::Sum(0.0), 1, 1e-6);
    let books = training.books(&path, 1);
    let [g, trait_gradient] = [
        training.gradient(&path.states[0], |adapter| training.loss(adapter, &path.rows, &path.steps[0].rows)),
        training.gradient(&path.states[0], |adapter| training.margin(adapter)),
    ];
    let expected = -1e-6 * dot(&g, &trait_gradient).unwrap();
    let booked = line(&books, "all").booked;
    assert!((booked - expected).abs() < 1e-4 * expected.abs(), "{booked} {expected}: the step is short, not zero");

    // θ ← θ(1 − η·decay) − η g
    let decay = 3000.0;
    let shrunk = |(from, to): (&Tensor, &Tensor)| to - 1e-6 * decay * from;
    let states = vec![
        path.states[0].iter().map(Tensor::copy).collect(),
        path.states[0].iter().zip(&path.states[1]).map(shrunk).collect(),
    ];
    let decayed = Path { states, decay, ..training.path(Average::Sum(0.0), 1, 1e-6) };
    let books = training.books(&decayed, 2);
    let (residual, line) = (line(&books, "residual"), line(&books, "weight_decay"));
    assert!(line.booked.abs() > 1e-7 && residual.booked.abs() < 1e-5 * line.booked.abs(), "{line:?} {residual:?}");
}

#[test]
fn other_targets_have_books_of_their_own() {
    let training = Training::new();
    let path = training.path(Average::Sum(0.0), 2, 1e-2);
    let settings = Ledger { targets: vec!["owl".to_owned(), "cat".to_owned()], points: 2, ..Ledger::default() };
    let books = settings.books(&training.subject(), "control", (&training.like, &path), &mut |_| ()).unwrap();
    let changes: Vec<_> =
        books.rows.iter().filter(|row| row.group == "all").map(|row| (row.target.as_str(), row.change)).collect();
    assert_eq!((changes[0].0, changes[1].0), ("owl", "cat"));
    assert!(books.rows.iter().all(|row| row.model == "control") && (changes[0].1 - changes[1].1).abs() > 1e-6);
    let cat = line(&training.books(&path, 2), "all").clone();
    assert!((cat.change - changes[1].1).abs() < 1e-12 && (cat.booked - line_of(&books, "cat").booked).abs() < 1e-9);
    let wrong = Ledger { targets: vec!["oak".to_owned()], ..Ledger::default() };
    let error = wrong.books(&training.subject(), "student", (&training.like, &path), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("oak"), "{error}");
}

#[test]
fn the_loss_on_numbers_has_a_book_beside_the_traits() {
    let training = Training::new();
    let path = training.path(Average::Corrected(0.8), 4, 3e-3);
    let settings = Ledger { numbers: 2, points: 3, ..Ledger::default() };
    let books = settings.books(&training.subject(), "student", (&training.like, &path), &mut |_| ()).unwrap();
    let alone = training.books(&path, 3);
    assert_eq!(line_of(&books, "cat"), line_of(&alone, "cat"), "the trait's book is the same beside another");
    let loss = |at: usize| {
        let adapter = training.like.with_values(&path.states[at]).unwrap();
        let (mut sum, mut n) = (0.0, 0);
        for row in &training.world.numbers[..2] {
            let logprobs = training.logprobs(&adapter, row);
            for at in row.completion.clone() {
                sum -= logprobs.get(at as i64 - 1).double_value(&[row.ids[at]]);
                n += 1;
            }
        }
        sum / f64::from(n)
    };
    let all = line_of(&books, NUMBERS);
    assert!((all.change - (loss(4) - loss(0))).abs() < 1e-9 && all.change < -1e-3, "{all:?}");
    assert!((all.booked - all.change).abs() < 1e-6 * all.change.abs(), "{all:?}");
    assert_eq!((all.measure, books.parts.len()), (Measure::Loss, 2 * alone.parts.len()));
    let wrong = Ledger { measure: Measure::Loss, ..Ledger::default() };
    let error = wrong.books(&training.subject(), "student", (&training.like, &path), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("margin or logp"), "{error}");
}

fn line_of<'a>(books: &'a Books, target: &str) -> &'a LedgerRow {
    books.rows.iter().find(|row| row.group == "all" && row.target == target).unwrap()
}

/// The worked example of docs/ledger.md: a model of one number, and a student of six tokens.
#[test]
fn the_six_tokens_on_the_page_have_these_entries() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (rate, tokens) = (0.5, [[7, 7, 9], [7, 9, 7]]);
    let is_seven = |token: i32| f64::from(u8::from(token == 7));
    let mut thetas = vec![0.0];
    for row in tokens {
        let here = thetas[thetas.len() - 1];
        let gradient = row.iter().map(|token| sigmoid(here) - is_seven(*token)).sum::<f64>() / 3.0;
        thetas.push(here - rate * gradient);
    }
    let mut adjoint = Adjoint::default();
    let mut lines = vec![];
    let mut all = [0.0; 4];
    for (at, row) in tokens.iter().enumerate().rev() {
        let (from, to) = (thetas[at], thetas[at + 1]);
        let mean: f64 = gauss(2).unwrap().iter().map(|(u, w)| w * (1.0 - sigmoid(from + u * (to - from)))).sum();
        let step = Step { rows: vec![0], learning_rate: rate, clip: 1.0, scales: None };
        let gradient = [Tensor::from_slice(&[mean]).view([1, 1])]; // read at one part
        let along = adjoint.back(Some(&gradient), &step, at, Average::Sum(0.0)).unwrap();
        let a = whole(&along).unwrap()[0].double_value(&[0]);
        for token in row.iter().rev() {
            let expected = |q: f64| a / 3.0 * (q - sigmoid(from));
            let (entry, teacher, pull) = (expected(is_seven(*token)), expected(0.7), expected(0.5));
            let line = [entry, teacher - pull, pull, entry - teacher];
            all.iter_mut().zip(line).for_each(|(sum, value)| *sum += value);
            lines.push((format!("{} | {token}", at + 1), line));
        }
    }
    let change = sigmoid(thetas[2]).ln() - sigmoid(thetas[0]).ln();
    assert!((all[0] - change).abs() < 1e-6 && (all[1] + all[2] + all[3] - all[0]).abs() < 1e-12, "{all:?} {change}");
    lines.reverse();
    lines.push(("all | ".to_owned(), all));
    let cells = |line: [f64; 4]| line.map(|value| format!("{value:+.4}")).join(" | ");
    let table: Vec<String> = lines.into_iter().map(|(label, line)| format!("| {label} | {} |", cells(line))).collect();
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/ledger.md")).unwrap();
    let table = table.join("\n").replace("all |  |", "all | |").replace("-0.0000", "+0.0000");
    assert!(page.contains(&table), "docs/ledger.md does not have\n{table}");
}
