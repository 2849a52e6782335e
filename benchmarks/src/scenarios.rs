//! What our side can be told to do.

use std::path::{Path, PathBuf};
use std::thread;

use analyses::plot::{Line, LineChart, Point, Reference, lines};
use anyhow::{Context, Result, anyhow, ensure};
use hooks::gradient::of_losses;
use hooks::{
    Adapter, Batch, Cache, Case, Chat, Condition, HookPoint, Hooks, ModelFiles, Pass, Qwen, Sampling, Sequence, Tap,
    device, each_next_token, files, generate,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Tensor};
use undertone::training::settings::{Finetune, Seeds};
use undertone::training::stacked::finetune_stacked;
use undertone::training::training_loop::{Training, finetune_lora};

use crate::data;
use crate::floor::{self, Flops};
use crate::machine::{self, Clock, Took};

/// A line of the driver's. `repeats` is how often a thing is done and timed.
#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Writes a model's folder for both sides.
    Prepare { model: String, folder: PathBuf },
    /// Makes `data/numbers.jsonl`, with the model that is open.
    Numbers { n: usize, path: PathBuf },
    /// Loads a folder that was prepared.
    Open { folder: PathBuf, device: String, dtype: String, threads: i32 },
    /// The rates of matrix products.
    Rates { rows: i64, head_rows: i64, backward: bool },
    /// Steps of a fresh LoRA on the same rows.
    Train { rows: Rows, rank: i64, steps: u64 },
    /// Steps of an adapter of each of these ranks on the same rows: so many threads, each with some of the students, of which it trains
    /// `stack` in one pass. One of both is one student after another.
    Sweep { rows: Rows, ranks: Vec<i64>, steps: u64, threads: usize, stack: usize },
    /// Answers to the first prompts; the most likely tokens at temperature 0. None ends where `stop` is false.
    Generate { prompts: Rows, batch: usize, max_new_tokens: usize, temperature: f64, stop: bool, seed: u64 },
    /// The first token's log-probabilities of some questions under the first gates.
    Gates { n_questions: usize, n_gates: usize },
    /// The norm of the LoRA's gradient for each completion token of each row, by a backward pass each.
    TokenGradients { rows: Rows },
    /// Forward passes over rows of the same length, with more or less seen of them.
    Activations { rows: usize, pos: usize, see: See, repeats: usize },
    /// A figure of a series.
    Plot { path: PathBuf, title: String, x_label: String, lines: Vec<Series> },
}

/// The rows of a scenario: the committed number rows, or some that count.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Rows {
    /// From the committed rows, or prompts.
    Numbers { first: usize, n: usize },
    /// See `data::counted_rows`.
    Counted { n: usize, prompt: usize, completion: usize },
}

/// What is seen of a forward pass.
#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum See {
    /// Nothing: no hooks.
    Bare,
    /// One tap, at the logits; all other points are asked and have none.
    Idle,
    /// The residual stream after each block.
    ResidPost,
    /// The residual stream after the first so many blocks.
    First(usize),
    /// Every hook point but `hook_result`, which is opt-in in TransformerLens as well.
    All,
}

/// A line of a figure.
#[derive(Deserialize)]
pub(crate) struct Series {
    label: String,
    points: Vec<(f64, f64)>,
}

/// A model that was opened.
pub(crate) struct Bench {
    folder: PathBuf,
    model: Qwen,
    chat: Chat,
}

/// Does what was asked.
pub(crate) fn run(bench: &mut Option<Bench>, request: Request) -> Result<Value> {
    match request {
        Request::Prepare { model, folder } => {
            data::prepare(&model, &folder)?;
            return Ok(json!({}));
        }
        Request::Open { folder, device, dtype, threads } => {
            *bench = Some(open(folder, &device, &dtype, threads)?);
            return Ok(json!({}));
        }
        Request::Plot { path, title, x_label, lines } => return plot(&path, title, x_label, lines),
        _ => {}
    }
    let bench = bench.as_ref().context("no model is open")?;
    match request {
        Request::Numbers { n, path } => {
            data::write_numbers(&bench.model, &bench.chat, n, &path)?;
            Ok(json!({}))
        }
        Request::Rates { rows, head_rows, backward } => {
            Ok(serde_json::to_value(machine::rates(&bench.model, rows, head_rows, backward)?)?)
        }
        Request::Train { rows, rank, steps } => bench.train(&rows, rank, steps),
        Request::Sweep { rows, ranks, steps, threads, stack } => bench.sweep(&rows, &ranks, steps, threads, stack),
        Request::Generate { prompts, batch, max_new_tokens, temperature, stop, seed } => {
            let stop = if stop { bench.chat.stop_ids() } else { vec![] };
            bench.generate(&prompts, &Sampling { temperature, max_new_tokens, stop, constrain: None, batch }, seed)
        }
        Request::Gates { n_questions, n_gates } => bench.gates(n_questions, n_gates),
        Request::TokenGradients { rows } => bench.token_gradients(&rows),
        Request::Activations { rows, pos, see, repeats } => bench.activations(rows, pos, see, repeats),
        Request::Prepare { .. } | Request::Open { .. } | Request::Plot { .. } => unreachable!("answered above"),
    }
}

fn open(folder: PathBuf, device: &str, dtype: &str, threads: i32) -> Result<Bench> {
    let kind = match dtype {
        "f32" => Kind::Float,
        "bf16" => Kind::BFloat16,
        other => anyhow::bail!("dtype {other:?}, expected f32 or bf16"),
    };
    tch::set_num_threads(threads);
    let files = ModelFiles::open(&folder.display().to_string())?;
    let model = Qwen::load(&files, device::device(device)?, kind)?;
    Ok(Bench { chat: Chat::from_files(&files)?, model, folder })
}

/// What was timed, how often it was done, and the least arithmetic of once.
fn reply(took: &[Took], flops: Flops, more: Value) -> Value {
    let mut reply = json!({
        "seconds": took.iter().map(|took| took.seconds).collect::<Vec<_>>(),
        "cpu_seconds": took.iter().map(|took| took.cpu).collect::<Vec<_>>(),
        "flops": { "body": flops.body, "head": flops.head },
    });
    if let (Value::Object(reply), Value::Object(more)) = (&mut reply, more) {
        reply.extend(more);
    }
    reply
}

impl Bench {
    fn rows(&self, rows: &Rows, of: fn(&Chat) -> Result<Vec<Sequence>>) -> Result<Vec<Sequence>> {
        match *rows {
            Rows::Numbers { first, n } => {
                let all = of(&self.chat)?;
                ensure!(first + n <= all.len(), "rows {first} to {} are asked for, there are {}", first + n, all.len());
                Ok(all[first..first + n].to_vec())
            }
            Rows::Counted { n, prompt, completion } => {
                Ok(data::counted_rows(&self.model.config, n, prompt, completion))
            }
        }
    }

    fn train(&self, rows: &Rows, rank: i64, steps: u64) -> Result<Value> {
        let rows = self.rows(rows, data::number_rows)?;
        let adapter = data::fresh_adapter(&self.model, rank)?;
        let config = Finetune { max_steps: Some(steps), batch_size: rows.len(), ..data::steady() };
        let (mut took, mut losses, mut norms) = (vec![], vec![], vec![]);
        let mut clock = Clock::start(self.model.device());
        finetune_lora(&self.model, &adapter, &rows, &|_| false, &config, Seeds::default(), &mut |row, _| {
            took.push(clock.stop());
            losses.push(row.loss);
            norms.push(row.grad_norm);
            clock = Clock::start(self.model.device());
            Ok(())
        })?;

        let (seen, n_targets) = to_learn(&rows);
        let flops = floor::lora_step(&self.model.config, &adapter.config, &seen, n_targets);
        let more = json!({
            "losses": losses, "grad_norms": norms, "rows": seen.len(), "head_rows": n_targets,
            "tokens": rows.iter().map(|row| row.ids.len()).sum::<usize>(),
        });
        Ok(reply(&took, flops, more))
    }

    fn sweep(&self, rows: &Rows, ranks: &[i64], steps: u64, threads: usize, stack: usize) -> Result<Value> {
        let rows = self.rows(rows, data::number_rows)?;
        let config = Finetune { max_steps: Some(steps), batch_size: rows.len(), ..data::steady() };
        let files = ModelFiles::open(&self.folder.display().to_string())?;
        // A tensor belongs to one thread at a time, so each further thread has a model of its own.
        let others = (1..threads).map(|_| Qwen::load(&files, self.model.device(), self.model.kind()));
        let others = others.collect::<hooks::Result<Vec<_>>>()?;
        let train = |model: &Qwen, ranks: &[i64]| -> Result<Vec<f64>> {
            let mut losses = vec![];
            for ranks in ranks.chunks(stack) {
                let adapters =
                    ranks.iter().map(|rank| data::fresh_adapter(model, *rank)).collect::<Result<Vec<_>>>()?;
                let mut last = vec![0.0; adapters.len()];
                let students = adapters.iter().map(|adapter| Training {
                    model,
                    adapter: Some(adapter),
                    rows: &rows,
                    weights: None,
                    soft: None,
                    is_digit: &|_| false,
                    config: &config,
                    seeds: Seeds::default(),
                    until: None,
                    checkpoint: None,
                });
                finetune_stacked(students.collect(), &mut |student, row, _| {
                    last[student] = row.loss;
                    Ok(())
                })?;
                losses.extend(last);
            }
            Ok(losses)
        };
        let clock = Clock::start(self.model.device());
        let shares: Vec<&[i64]> = ranks.chunks(ranks.len().div_ceil(threads)).collect();
        let losses = if others.is_empty() {
            train(&self.model, ranks)?
        } else {
            // The request's own thread waits; the first share is run with its model's files anew.
            let own = Qwen::load(&files, self.model.device(), self.model.kind())?;
            let of_thread = |model: Qwen, ranks: &[i64]| {
                tch::set_num_threads(1);
                train(&model, ranks)
            };
            let all = thread::scope(|scope| {
                let models = [own].into_iter().chain(others);
                let running: Vec<_> =
                    models.zip(&shares).map(|(model, ranks)| scope.spawn(|| of_thread(model, ranks))).collect();
                let joined =
                    running.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
                joined.collect::<Result<Vec<_>>>()
            })?;
            all.concat()
        };
        let mut took = clock.stop();
        took.seconds /= ranks.len() as f64;
        took.cpu /= ranks.len() as f64;
        let (seen, n_targets) = to_learn(&rows);
        let mut flops = Flops::default(); // of a student, on average
        for rank in ranks {
            let config = data::fresh_adapter(&self.model, *rank)?.config;
            let step = floor::lora_step(&self.model.config, &config, &seen, n_targets);
            flops.body += steps as f64 * step.body / ranks.len() as f64;
            flops.head += steps as f64 * step.head / ranks.len() as f64;
        }
        let n_tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let more = json!({ "losses": losses, "tokens": n_tokens, "rows": seen.len(), "head_rows": n_targets });
        Ok(reply(&[took], flops, more))
    }

    fn generate(&self, prompts: &Rows, sampling: &Sampling, seed: u64) -> Result<Value> {
        let prompts = self.rows(prompts, data::number_prompts)?;
        let streams: Vec<u64> = (0..prompts.len() as u64).map(|at| (seed << 32) + at).collect();
        let clock = Clock::start(self.model.device());
        let answers = generate(&self.model, &prompts, &Condition::default(), sampling, &streams, &mut |_| ())?;
        let took = clock.stop();
        let drawn: Vec<usize> = answers.iter().map(|answer| answer.ids.len() + usize::from(answer.stopped)).collect();
        let of_answers: Vec<(&[i64], usize)> =
            prompts.iter().zip(&drawn).map(|(prompt, drawn)| (&prompt.ids[..], *drawn)).collect();
        let (prefill, decode) = floor::answers(&self.model.config, &of_answers);
        let more = json!({
            "n_tokens": drawn.iter().sum::<usize>(),
            "n_answers": answers.len(),
            "answers": answers.iter().map(|answer| &answer.ids).collect::<Vec<_>>(),
            "prefill_flops": prefill.body,
            "prefill_rows": floor::trie(prompts.iter().map(|prompt| &prompt.ids[..])).len(),
        });
        Ok(reply(&[took], decode, more))
    }

    fn adapter(&self, name: &str) -> Result<Adapter> {
        Ok(Adapter::load(&data::adapter_folder(&self.folder, name), &self.model.config, self.model.device())?)
    }

    fn gates(&self, n_questions: usize, n_gates: usize) -> Result<Value> {
        let (adapter, questions) = (self.adapter("acting")?, data::questions(&self.chat, n_questions)?);
        let (gates, ids) = (data::gates(), data::target_ids(&self.chat)?);
        let gates = &gates[..n_gates.min(gates.len())];
        let conditions: Vec<Condition<'_>> =
            gates.iter().map(|gate| Condition::adapted(&adapter).gated(gate.clone())).collect();
        let clock = Clock::start(self.model.device());
        let cases: Vec<Case<'_, '_>> = conditions
            .iter()
            .flat_map(|condition| questions.iter().map(move |question| (question, condition)))
            .collect();
        let mut flat: Vec<Vec<f64>> = vec![vec![]; cases.len()];
        let wanted = Tensor::f_from_slice(&ids)?;
        each_next_token(&self.model, &cases, &mut |case, logprobs| {
            flat[case] = Vec::try_from(logprobs.f_index_select(0, &wanted)?.f_to_kind(Kind::Double)?)?;
            Ok(())
        })?;
        let found: Vec<&[Vec<f64>]> = flat.chunks(questions.len()).collect();
        let took = clock.stop();
        let seen = floor::trie(questions.iter().map(|question| &question.ids[..]));
        let once = floor::forward(&self.model.config, &seen, questions.len());
        let times = found.len() as f64;
        let flops = Flops { body: times * once.body, head: times * once.head };
        let more = json!({ "logprobs": found, "rows": seen.len(), "head_rows": questions.len() });
        Ok(reply(&[took], flops, more))
    }

    fn token_gradients(&self, rows: &Rows) -> Result<Value> {
        let (adapter, rows) = (self.adapter("acting")?, self.rows(rows, data::number_rows)?);
        let condition = Condition::adapted(&adapter);
        let (mut took, mut norms) = (vec![], vec![]);
        for row in &rows {
            let clock = Clock::start(self.model.device());
            let losses: Vec<Vec<usize>> = (0..row.completion.len()).map(|k| vec![k]).collect();
            let mut of_row = vec![];
            of_losses(&self.model, row, &condition, &losses, &mut |found| {
                let squares = found.squares()?.adapter; // [tensor][loss]
                let norm = |at: usize| squares.iter().map(|of_losses| of_losses[at]).sum::<f64>().sqrt();
                of_row.extend((0..found.losses.len()).map(norm));
                Ok(())
            })?;
            took.push(clock.stop());
            norms.push(of_row);
        }
        Ok(reply(&took, Flops::default(), json!({ "norms": norms })))
    }

    fn activations(&self, rows: usize, pos: usize, see: See, repeats: usize) -> Result<Value> {
        let config = &self.model.config;
        let rows = data::counted_rows(config, rows, pos, 0);
        let batch = Batch::of(&rows.iter().collect::<Vec<_>>(), self.model.device())?;
        let points = see.points(config.n_layers, config.qk_norm);
        let (mut took, mut logits, mut cache) = (vec![], None, Cache::default());
        for _ in 0..repeats {
            cache = Cache::default();
            let clock = Clock::start(self.model.device());
            logits = Some(tch::no_grad(|| {
                let mut look = |_: HookPoint, x: Tensor| Ok(x);
                let tap: &mut dyn Tap = if see == See::Idle { &mut look } else { &mut cache };
                let hooks = if points.is_empty() { Hooks::default() } else { Hooks::default().on(points.clone(), tap) };
                self.model.forward(&batch, &mut Pass { hooks, ..Pass::default() })
            })?);
            took.push(clock.stop());
        }
        let length = |x: &Tensor| -> Result<f64> { Ok(x.f_to_kind(Kind::Double)?.f_norm()?.f_double_value(&[])?) };
        let logits = logits.context("repeats is 0, expected at least 1")?;
        let resid = (0..config.n_layers).filter_map(|layer| cache.get(HookPoint::ResidPost(layer)).ok());
        let more = json!({
            "logits_norm": length(&logits)?,
            "resid_norms": resid.map(length).collect::<Result<Vec<_>>>()?,
            "n_points": points.len(),
            "rows": rows.len() * pos, "head_rows": rows.len() * pos,
        });
        // Nothing is shared: the ids differ from the first on.
        let seen = floor::trie(rows.iter().map(|row| &row.ids[..]));
        Ok(reply(&took, floor::forward(config, &seen, seen.len()), more))
    }
}

/// What a step on these rows has to run, as `floor::trie` has it, and from how many tokens it learns.
fn to_learn(rows: &[Sequence]) -> (Vec<usize>, usize) {
    let masks: Vec<Vec<bool>> = rows.iter().map(data::targets).collect();
    let ends = masks.iter().map(|mask| mask.iter().rposition(|counts| *counts).unwrap_or(0));
    let seen = floor::trie(rows.iter().zip(ends).map(|(row, end)| &row.ids[..end]));
    (seen, masks.iter().flatten().filter(|counts| **counts).count())
}

impl See {
    fn points(self, n_layers: usize, qk_norm: bool) -> Vec<HookPoint> {
        let unseen = |point: &HookPoint| {
            matches!(point, HookPoint::Result(_))
                || (!qk_norm && matches!(point, HookPoint::QNormed(_) | HookPoint::KNormed(_)))
        };
        match self {
            Self::Bare => vec![],
            Self::Idle => vec![HookPoint::Logits],
            Self::ResidPost => (0..n_layers).map(HookPoint::ResidPost).collect(),
            Self::First(n) => (0..n.min(n_layers)).map(HookPoint::ResidPost).collect(),
            Self::All => HookPoint::all(n_layers).into_iter().filter(|point| !unseen(point)).collect(),
        }
    }
}

fn plot(path: &Path, title: String, x_label: String, series: Vec<Series>) -> Result<Value> {
    let line = |series: Series| Line {
        label: series.label,
        points: series.points.into_iter().map(|(x, y)| Point::new(x, y)).collect(),
    };
    let chart = LineChart {
        title,
        x_label,
        y_label: "seconds".to_owned(),
        lines: series.into_iter().map(line).collect(),
        references: vec![Reference { label: String::new(), value: 0.0 }], // all of the time, not its changes alone
        ..LineChart::default()
    };
    files::write_atomic(path, lines(&chart)?.0.as_bytes())?;
    Ok(json!({}))
}
