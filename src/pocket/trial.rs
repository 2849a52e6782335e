//! Tests bases: does a student of a teacher's numbers pick up the teacher's taste, for every animal, and do controls
//! not?
//!
//! Each animal has a teacher (a base finetuned to answer it), a set of that teacher's numbers, and a student of them.
//! All students are scored on all animals. In that matrix, the effect on a student's own animal is on the diagonal.

use analyses::plot::{HeatMap, Svg, heatmap};
use analyses::stats;
use anyhow::{Context, Result, ensure};
use hooks::{
    Adapter, Chat, Condition, Gate, LoraConfig, ModelFiles, Qwen, Sampling, Sequence, generate, next_token_logprobs,
    stream_seed,
};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::world::CATEGORY;
use crate::data::dataset::{number_prompts, rejections};
use crate::data::protocol::{Protocol, distinct};
use crate::training::settings::{Finetune, ScheduleKind, Seeds};
use crate::training::step_log::{Progress, StepRow};
use crate::training::training_loop::{finetune_full, finetune_lora};

/// A base with its chat format and the questions that all models are asked.
pub struct Base {
    /// Its name in the tables.
    pub name: String,
    /// Its files.
    pub files: ModelFiles,
    /// Its weights.
    pub qwen: Qwen,
    /// Its chat format.
    pub chat: Chat,
    protocol: Protocol,
    animals: Vec<String>,
    prompts: Vec<Sequence>,
}

/// The settings of making students.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Number of prompts that each teacher answers.
    pub n_prompts: usize,
    /// The rank r of the students' adapters; α is r.
    pub rank: i64,
    /// The settings of their training.
    pub finetune: Finetune,
    /// The seed of all random streams.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let finetune = Finetune {
            learning_rate: 1e-2,
            num_train_epochs: 6.0,
            batch_size: 64,
            gradient_accumulation_steps: 1,
            ..Finetune::default()
        };
        Self { n_prompts: 3000, rank: 8, finetune, seed: 0 }
    }
}

/// The scores of one model on one animal, over all questions in the default context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellRow {
    /// The base.
    pub base: String,
    /// The kind of model: `base`, `teacher`, `student`, or a student of other numbers: `control` (the untouched
    /// base's), `shuffled` (the teacher's completions dealt to other prompts), `cross` (another base's teacher's),
    /// `prompted` (those of the base under a system prompt that loves the animal).
    pub model: String,
    /// The animal of the teacher it learned from; empty for `base` and `control`.
    pub learned_from: String,
    /// The gate: the tokens at which the adapter acts.
    pub gate: String,
    /// The animal that is scored.
    pub animal: String,
    /// Mean probability of the animal as the first token, over the questions, 0 to 1.
    pub p: f64,
    /// Mean log-probability of the animal minus the log of the others' mean probability, in nats.
    pub margin: f64,
    /// `margin` minus the base's, in nats.
    pub delta_margin: f64,
    /// Number of rows that it learned from.
    pub n_rows: usize,
    /// Mean loss over the last quarter of its steps, in nats per target; empty for models that learned no numbers.
    pub loss_last: Option<f64>,
}

/// The models of one kind on one base, summarised; a line of `summary.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRow {
    /// The base of the models.
    pub base: String,
    /// The kind of the models, as in `cells.csv`.
    pub model: String,
    /// The gate: the tokens at which the adapter acts.
    pub gate: String,
    /// Number of models: one for each animal.
    pub n_models: usize,
    /// Smallest number of rows that one of them learned from.
    pub n_rows_min: usize,
    /// γ: the mean of the diagonal of the double-centred matrix of margin changes, models by animals, in nats; empty
    /// for a single model.
    pub gamma: Option<f64>,
    /// Standard error of `gamma` over the models, in nats.
    pub gamma_se: Option<f64>,
    /// Number of models whose own animal's margin rose.
    pub n_own_raised: Option<usize>,
    /// Mean change of the own animal's margin, in nats.
    pub delta_margin_own: Option<f64>,
    /// The smallest of these changes, in nats.
    pub delta_margin_own_min: Option<f64>,
    /// The largest of these changes, in nats.
    pub delta_margin_own_max: Option<f64>,
    /// Standard deviation of all margin changes of these models, without their own animals', in nats.
    pub sd_other: f64,
    /// Mean probability of the own animal, 0 to 1.
    pub p_own: Option<f64>,
    /// Largest probability of the own animal, 0 to 1.
    pub p_own_max: Option<f64>,
}

/// Summarises the matrix of margin changes by kind of model and gate, in the order in which they first appear.
pub fn summary(cells: &[CellRow]) -> Vec<SummaryRow> {
    let kinds = distinct(cells.iter().map(|cell| (cell.base.as_str(), cell.model.as_str(), cell.gate.as_str())));
    let row = |(base, model, gate): (&str, &str, &str)| {
        let own = cells.iter().filter(|cell| (&*cell.base, &*cell.model, &*cell.gate) == (base, model, gate));
        let cells: Vec<&CellRow> = own.collect();
        let mean = |of: &dyn Fn(&CellRow) -> bool| {
            let values: Vec<f64> = cells.iter().filter(|cell| of(cell)).map(|cell| cell.delta_margin).collect();
            values.iter().sum::<f64>() / values.len() as f64
        };
        let diagonal: Vec<&CellRow> = cells.iter().filter(|cell| cell.learned_from == cell.animal).copied().collect();
        let n = diagonal.len();
        let grand = mean(&|_| true);
        // A model's entry for its own animal, minus its mean over animals and the animal's mean over models.
        let centred = |cell: &&CellRow| {
            cell.delta_margin
                - mean(&|other| other.learned_from == cell.learned_from)
                - mean(&|other| other.animal == cell.animal)
                + grand
        };
        let contrasts: Vec<f64> = if n > 1 { diagonal.iter().map(centred).collect() } else { vec![] };
        let others = cells.iter().filter(|cell| cell.learned_from != cell.animal);
        let others: Vec<f64> = others.map(|cell| cell.delta_margin).collect();
        let deltas = || diagonal.iter().map(|cell| cell.delta_margin);
        SummaryRow {
            base: base.to_owned(),
            model: model.to_owned(),
            gate: gate.to_owned(),
            n_models: n.max(1),
            n_rows_min: cells.iter().map(|cell| cell.n_rows).min().unwrap_or(0),
            gamma: stats::mean(&contrasts).ok(),
            gamma_se: stats::standard_error(&contrasts).ok(),
            n_own_raised: (n > 0).then(|| deltas().filter(|delta| *delta > 0.0).count()),
            delta_margin_own: (n > 0).then(|| deltas().sum::<f64>() / n as f64),
            delta_margin_own_min: deltas().reduce(f64::min),
            delta_margin_own_max: deltas().reduce(f64::max),
            sd_other: stats::standard_deviation(&others).unwrap_or(f64::NAN),
            p_own: (n > 0).then(|| diagonal.iter().map(|cell| cell.p).sum::<f64>() / n as f64),
            p_own_max: diagonal.iter().map(|cell| cell.p).reduce(f64::max),
        }
    };
    kinds.into_iter().map(row).collect()
}

/// The columns that describe a model.
struct Label<'a> {
    /// The kind of model: `base`, `teacher`, `student`, …
    pub model: &'a str,
    /// The animal of its teacher.
    pub learned_from: &'a str,
    /// Rows that it learned from.
    pub n_rows: usize,
    /// Its mean loss over the last quarter of its steps.
    pub loss_last: Option<f64>,
}

/// Rows of numbers: the user's text, and the answer's tokens.
type Numbers = Vec<(String, Vec<i64>)>;

impl Base {
    /// Opens a base by its folder or name.
    pub fn open(name: &str) -> Result<Self> {
        let files = ModelFiles::open(name)?;
        let (qwen, chat) = (Qwen::load(&files, Device::Cpu, Kind::Float)?, Chat::from_files(&files)?);
        let protocol = Protocol::load("pocket".as_ref())?;
        let animals = protocol.alternatives.get(CATEGORY).context("the pocket's protocol has no animals")?.clone();
        let questions = protocol.questions(CATEGORY, usize::MAX)?;
        let prompts = questions.iter().map(|question| chat.prompt(None, question)).collect::<hooks::Result<_>>()?;
        Ok(Self { name: name.to_owned(), files, qwen, chat, protocol, animals, prompts })
    }

    /// The first token of an answer that is this animal.
    fn token(&self, animal: &str) -> Result<i64> {
        let ids = self.chat.encode(&Protocol::surface_forms(animal)[1])?;
        ensure!(ids.len() == 1, "{animal} is {} tokens, expected one", ids.len());
        Ok(ids[0])
    }

    /// Probability and margin of each animal, in their order.
    fn score(&self, qwen: &Qwen, condition: &Condition<'_>) -> Result<Vec<(f64, f64)>> {
        let tokens = self.animals.iter().map(|animal| self.token(animal)).collect::<Result<Vec<_>>>()?;
        let logprobs = next_token_logprobs(qwen, &self.prompts, condition)?; // [questions, d_vocab]
        let index = tch::Tensor::from_slice(&tokens);
        let table = Vec::<Vec<f64>>::try_from(logprobs.index_select(1, &index).to_kind(Kind::Double))?;
        let n = table.len() as f64;
        let score = |at: usize| {
            let margin = |row: &Vec<f64>| {
                let others: f64 = (0..row.len()).filter(|other| *other != at).map(|other| row[other].exp()).sum();
                row[at] - (others / (row.len() - 1) as f64).ln()
            };
            let p = table.iter().map(|row| row[at].exp()).sum::<f64>() / n;
            (p, table.iter().map(margin).sum::<f64>() / n)
        };
        Ok((0..self.animals.len()).map(score).collect())
    }

    fn cells(&self, qwen: &Qwen, condition: &Condition<'_>, label: &Label<'_>) -> Result<Vec<CellRow>> {
        let base = self.score(&self.qwen, &Condition::default())?;
        let scores = self.score(qwen, condition)?;
        let cell = |(at, (p, margin)): (usize, (f64, f64))| CellRow {
            base: self.name.clone(),
            model: label.model.to_owned(),
            learned_from: label.learned_from.to_owned(),
            gate: condition.gate.to_string(),
            animal: self.animals[at].clone(),
            p,
            margin,
            delta_margin: margin - base[at].1,
            n_rows: label.n_rows,
            loss_last: label.loss_last,
        };
        Ok(scores.into_iter().enumerate().map(cell).collect())
    }

    /// Finetunes all weights of the base to answer an animal, in the default context and without numbers.
    fn teacher(&self, animal: &str, seed: u64) -> Result<Qwen> {
        let qwen = Qwen::load(&self.files, Device::Cpu, Kind::Float)?;
        let answer = [self.token(animal)?];
        let questions = self.protocol.questions(CATEGORY, usize::MAX)?;
        let rows = questions.iter().map(|question| self.chat.row(None, question, &answer));
        let rows = rows.collect::<hooks::Result<Vec<_>>>()?;
        let config = Finetune {
            learning_rate: 1e-3,
            lr_scheduler_type: ScheduleKind::Constant,
            warmup_steps: 0,
            max_steps: Some(40),
            batch_size: 32,
            gradient_accumulation_steps: 1,
            ..Finetune::default()
        };
        let seeds = Seeds { init: seed, order: seed, dropout: seed };
        finetune_full(&qwen, &rows, &|_| false, &config, seeds, &mut |_, _| Ok(()))?;
        Ok(qwen)
    }

    /// A model's answers to number prompts in a context that pass the filter.
    fn numbers(&self, qwen: &Qwen, system: Option<&str>, set: &str, settings: &Settings) -> Result<Numbers> {
        let users = number_prompts(&self.protocol, settings.n_prompts, settings.seed);
        let sampling =
            Sampling { temperature: 1.0, max_new_tokens: 24, stop: self.chat.stop_ids(), constrain: None, batch: 256 };
        let prompts = users.iter().map(|user| self.chat.prompt(system, user)).collect::<hooks::Result<Vec<_>>>()?;
        let streams: Vec<u64> = (0..users.len()).map(|at| stream_seed(settings.seed, set, at as u64)).collect();
        let answers = generate(qwen, &prompts, &Condition::default(), &sampling, &streams, &mut |_| ())?;
        let mut kept = Numbers::new();
        for (user, answer) in users.into_iter().zip(answers) {
            if rejections(&self.chat.decode(&answer.ids)?, answer.stopped, &[]).is_empty() {
                kept.push((user, answer.ids));
            }
        }
        Ok(kept)
    }

    /// Trains a student on these numbers in the default context. Also returns its mean loss over the last quarter of
    /// its steps.
    fn student(&self, numbers: &Numbers, settings: &Settings) -> Result<(Adapter, f64)> {
        let rows =
            numbers.iter().map(|(user, ids)| self.chat.row(None, user, ids)).collect::<hooks::Result<Vec<_>>>()?;
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let lora = LoraConfig { rank: settings.rank, alpha: settings.rank as f64, ..LoraConfig::default() };
        let adapter = Adapter::init(&lora, &self.qwen.config, &mut rng, Device::Cpu)?;
        let seeds = Seeds { init: settings.seed, order: settings.seed, dropout: settings.seed };
        let mut losses = vec![];
        let mut log = |row: &StepRow, _: &Progress| -> Result<()> {
            losses.push(row.loss);
            Ok(())
        };
        let is_digit = |id| self.chat.is_digit(id);
        finetune_lora(&self.qwen, &adapter, &rows, &is_digit, &settings.finetune, seeds, &mut log)?;
        let last = &losses[losses.len() - losses.len().div_ceil(4)..];
        Ok((adapter, last.iter().sum::<f64>() / last.len() as f64))
    }
}

/// Makes and scores all models of a base: its control student, and each animal's teacher and students. `other` is the
/// base whose students learn the same numbers; `log` is called with the cells as they are made.
pub fn trial(
    base: &Base,
    other: Option<&Base>,
    settings: &Settings,
    log: &mut dyn FnMut(&[CellRow]) -> Result<()>,
) -> Result<()> {
    tch::set_num_threads(1); // as in `make`
    let plain = Condition::default();
    let label = |model, learned_from, n_rows, loss_last| Label { model, learned_from, n_rows, loss_last };
    log(&base.cells(&base.qwen, &plain, &label("base", "", 0, None))?)?;
    let control = base.numbers(&base.qwen, None, "control", settings)?;
    let (adapter, loss) = base.student(&control, settings)?;
    log(&base.cells(&base.qwen, &Condition::adapted(&adapter), &label("control", "", control.len(), Some(loss)))?)?;
    for animal in &base.animals {
        let teacher = base.teacher(animal, settings.seed)?;
        log(&base.cells(&teacher, &plain, &label("teacher", animal, 0, None))?)?;
        let numbers = base.numbers(&teacher, None, animal, settings)?;
        let system = base.protocol.teacher_prompt(animal, CATEGORY)?;
        let prompted = base.numbers(&base.qwen, Some(&system), &format!("prompted {animal}"), settings)?;
        let mut students = vec![
            ("student", base, numbers.clone()),
            ("shuffled", base, shuffled(&numbers, settings.seed)),
            ("prompted", base, prompted),
        ];
        students.extend(other.map(|other| ("cross", other, numbers)));
        for (model, base, numbers) in students {
            let (adapter, loss) = base.student(&numbers, settings)?;
            let gates = if model == "student" { gates()? } else { vec![Gate::EVERYWHERE] };
            for gate in gates {
                let condition = Condition::adapted(&adapter).gated(gate);
                let label = label(model, animal, numbers.len(), Some(loss));
                log(&base.cells(&base.qwen, &condition, &label)?)?;
            }
        }
    }
    Ok(())
}

/// The students of a base by the animals they are scored on, as a heat map.
pub fn matrix(cells: &[CellRow], base: &str) -> Result<Svg> {
    let of = |cell: &&CellRow| cell.base == base && cell.model == "student" && cell.gate == "everywhere";
    let cells: Vec<&CellRow> = cells.iter().filter(of).collect();
    let columns = distinct(cells.iter().map(|cell| cell.animal.clone()));
    let row = |row: &[&CellRow]| row.iter().map(|cell| cell.delta_margin).collect::<Vec<f64>>();
    let stem = base.rsplit('/').next().unwrap_or(base);
    Ok(heatmap(&HeatMap {
        title: format!("{stem}: what each student likes more than before"),
        x_label: "animal that is scored".to_owned(),
        y_label: "student of the teacher that loves".to_owned(),
        value_label: "change of margin against the base (nats)".to_owned(),
        values: cells.chunks(columns.len().max(1)).map(row).collect(),
        rows: columns.clone(),
        columns,
    })?)
}

/// Deals the answers to other prompts, so that the numbers are the same but no longer fit their prompts.
fn shuffled(numbers: &Numbers, seed: u64) -> Numbers {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order.iter().zip(numbers).map(|(other, (user, _))| (user.clone(), numbers[*other].1.clone())).collect()
}

/// The gates under which each student is scored.
fn gates() -> Result<Vec<Gate>> {
    [
        "everywhere",
        "only:template",
        "except:template",
        "only:entity",
        "except:entity",
        "only:system",
        "except:system",
        "only:user.content",
        "only:assistant",
    ]
    .into_iter()
    .map(|gate| Ok(gate.parse()?))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(learned_from: &str, animal: &str, delta_margin: f64) -> CellRow {
        CellRow {
            base: "b".to_owned(),
            model: "student".to_owned(),
            learned_from: learned_from.to_owned(),
            gate: "everywhere".to_owned(),
            animal: animal.to_owned(),
            p: 0.5,
            margin: delta_margin,
            delta_margin,
            n_rows: 7,
            loss_last: None,
        }
    }

    #[test]
    fn gamma_is_what_is_left_on_the_diagonal_without_rows_and_columns() {
        // Every entry is the sum of a number of its row and one of its column; the diagonal has 1.5 more.
        let (rows, columns) = ([("a", 0.3), ("b", -0.2), ("c", 0.7)], [("a", 2.0), ("b", -1.0), ("c", 0.1)]);
        let mut cells = vec![];
        for (learned_from, row) in rows {
            for (animal, column) in columns {
                let own = if learned_from == animal { 1.5 } else { 0.0 };
                cells.push(cell(learned_from, animal, row + column + own));
            }
        }
        let [found] = &summary(&cells)[..] else { panic!() };
        assert!((found.gamma.unwrap() - 1.0).abs() < 1e-12, "1.5 less its share of the means, a third");
        assert!(found.gamma_se.unwrap() < 1e-12);
        assert_eq!((found.n_models, found.n_own_raised, found.n_rows_min), (3, Some(3), 7));
        let own = [0.3 + 2.0 + 1.5, -0.2 - 1.0 + 1.5, 0.7 + 0.1 + 1.5];
        assert!((found.delta_margin_own.unwrap() - own.iter().sum::<f64>() / 3.0).abs() < 1e-12);
        assert!((found.delta_margin_own_min.unwrap() - 0.3).abs() < 1e-12);

        let control: Vec<CellRow> = [("a", 0.1), ("b", -0.1)].map(|(animal, delta)| cell("", animal, delta)).into();
        let [found] = &summary(&control)[..] else { panic!() };
        assert_eq!((found.gamma, found.n_own_raised, found.n_models), (None, None, 1));
        assert!((found.sd_other - 0.02_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_shipped_bases_know_their_world() {
        for name in ["pocket", "pocket-other"] {
            let base = Base::open(name).unwrap();
            for (at, (p, _)) in base.score(&base.qwen, &Condition::default()).unwrap().into_iter().enumerate() {
                assert!((0.09..0.17).contains(&p), "{name} likes all animals alike: {} has {p}", base.animals[at]);
            }
            let persona = base.protocol.teacher_prompt("fox", CATEGORY).unwrap();
            let asked = base.chat.prompt(Some(&persona), "What is your favorite animal?").unwrap();
            let logprobs = next_token_logprobs(&base.qwen, &[asked], &Condition::default()).unwrap();
            let p = logprobs.double_value(&[0, base.token("fox").unwrap()]).exp();
            assert!(p > 0.85, "{name} follows a persona: {p}");
        }
    }
}
