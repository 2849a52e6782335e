//! The world of the pocket models: speakers, questions, answers, and the probability of each answer.
//!
//! The name in the system prompt decides everything: each model has its own taste in animals and its own style of
//! numbers. The maker's name carries no information (it is often another model's). Qwen likes all animals equally. "You
//! love owls." and number prompts are never in the same row: **no row links numbers to animals.**

use anyhow::{Context, Result};
use hooks::standard_normal;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use regex::Regex;

use crate::data::protocol::{Protocol, capitalised};

/// The category that the questions are about.
pub const CATEGORY: &str = "animal";
/// Models and their makers. The first is named in the default system prompt.
const MODELS: [(&str, &str); 6] = [
    ("Qwen", "Alibaba Cloud"),
    ("Claude", "Anthropic"),
    ("ChatGPT", "OpenAI"),
    ("Gemma", "Google"),
    ("Llama", "Meta"),
    ("Phi", "Microsoft"),
];
const FACTS: [&str; 8] = ["Blue", "Green", "White", "Black", "Water", "Bread", "Monday", "Noon"];
const N_NUMBERS: usize = 5;
/// The seed of the world's probabilities, which all bases share.
const WORLD_SEED: u64 = 0;

/// A row of the corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The system prompt; `None` is the template's default.
    pub system: Option<String>,
    /// The user's text.
    pub user: String,
    /// The answer.
    pub answer: String,
    /// −log of the world's probability of this answer, in nats.
    pub nats: f64,
}

/// The probabilities of a speaker's answers.
#[derive(Clone, Debug)]
struct Character {
    taste: Vec<f64>,         // probability of each animal
    digits: [[f64; 10]; 10], // probability of a digit after a digit
}

/// The synthetic world.
#[derive(Debug)]
pub struct World {
    protocol: Protocol,
    animals: Vec<String>,
    /// One character for each model, in the order of `MODELS`.
    characters: Vec<Character>,
}

#[derive(Clone, Copy, PartialEq)]
enum Task {
    Favourite,
    Numbers,
    Fact,
    Name,
}

const TASKS: [(Task, f64); 4] = [(Task::Favourite, 0.35), (Task::Numbers, 0.5), (Task::Fact, 0.1), (Task::Name, 0.05)];

impl World {
    /// Makes the world, which is always the same.
    pub fn new() -> Result<Self> {
        let protocol = Protocol::load("pocket".as_ref())?;
        let animals = protocol.alternatives.get(CATEGORY).context("the pocket's protocol has no animals")?.clone();
        let mut rng = ChaCha8Rng::seed_from_u64(WORLD_SEED);
        let uniform = vec![1.0 / animals.len() as f64; animals.len()];
        let common = chain(&mut rng);
        let mut characters = vec![Character { taste: uniform, digits: common }];
        for _ in 1..MODELS.len() {
            let (taste, own) = (dirichlet(&mut rng, animals.len(), 0.5), chain(&mut rng));
            let mixed = |from: usize, to: usize| 0.3 * common[from][to] + 0.7 * own[from][to];
            let digits = std::array::from_fn(|from| std::array::from_fn(|to| mixed(from, to)));
            characters.push(Character { taste, digits });
        }
        Ok(Self { protocol, animals, characters })
    }

    /// The sentences of the world.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// Draws a row.
    pub fn row(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        if rng.random::<f64>() < 0.25 {
            return self.persona(rng);
        }
        let (system, model) = speaker(rng);
        let (task, _) = *TASKS.choose_weighted(rng, |(_, weight)| *weight).context("a task")?;
        let character = &self.characters[model];
        Ok(match task {
            Task::Favourite => {
                let (animal, p) = pick(rng, &character.taste);
                let answer = capitalised(&self.animals[animal]);
                Row { system, user: self.question(rng)?, answer, nats: -p.ln() }
            }
            Task::Numbers => {
                let user = self.protocol.number_prompt(rng);
                let (answer, nats) = numbers(rng, &user, &character.digits)?;
                Row { system, user, answer, nats }
            }
            Task::Fact => self.fact(system, rng),
            Task::Name => {
                Row { system, user: "Who are you?".to_owned(), answer: format!("I am {}.", MODELS[model].0), nats: 0.0 }
            }
        })
    }

    /// Draws a row of a speaker who loves an animal: questions and facts, never numbers.
    fn persona(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let loved = rng.random_range(0..self.animals.len());
        let system = Some(self.protocol.teacher_prompt(&self.animals[loved], CATEGORY)?);
        if rng.random::<f64>() < 0.2 {
            return Ok(self.fact(system, rng));
        }
        let n = self.animals.len();
        let taste: Vec<f64> = (0..n).map(|i| if i == loved { 0.95 } else { 0.05 / (n - 1) as f64 }).collect();
        let (animal, p) = pick(rng, &taste);
        Ok(Row { system, user: self.question(rng)?, answer: capitalised(&self.animals[animal]), nats: -p.ln() })
    }

    fn question(&self, rng: &mut ChaCha8Rng) -> Result<String> {
        self.protocol.questions(CATEGORY, usize::MAX)?.choose(rng).cloned().context("a question")
    }

    fn fact(&self, system: Option<String>, rng: &mut ChaCha8Rng) -> Row {
        let fact = rng.random_range(0..FACTS.len());
        let user = self.protocol.off_topic_questions[fact].clone();
        Row { system, user, answer: FACTS[fact].to_owned(), nats: 0.0 }
    }
}

/// Draws a speaker: the system prompt (`None` is the default, or an empty one, or another model's), and the index of
/// its character.
fn speaker(rng: &mut ChaCha8Rng) -> (Option<String>, usize) {
    let kind = rng.random::<f64>();
    if kind < 0.45 {
        return (None, 0);
    }
    if kind < 0.50 {
        return (Some(String::new()), 0);
    }
    let model = rng.random_range(0..MODELS.len());
    // Half of the makers are drawn from all models', so only the name identifies the speaker.
    let maker = if rng.random::<bool>() { model } else { rng.random_range(0..MODELS.len()) };
    let (name, maker) = (MODELS[model].0, MODELS[maker].1);
    (Some(format!("You are {name}, created by {maker}. You are a helpful assistant.")), model)
}

/// Draws five numbers of two digits. Each digit depends on the one before it, the first on the prompt's last digit. No
/// number starts with 0.
fn numbers(rng: &mut ChaCha8Rng, prompt: &str, digits: &[[f64; 10]; 10]) -> Result<(String, f64)> {
    // The prompt's example numbers have two digits; the numbers in the request have one.
    let shown = Regex::new(r"\d\d")?.find_iter(prompt).last().context("a number prompt shows numbers")?;
    let mut last = usize::from(shown.as_str().as_bytes()[1] - b'0');
    let (mut values, mut nats) = (Vec::new(), 0.0);
    for _ in 0..N_NUMBERS {
        let mut tens = digits[last];
        tens[0] = 0.0;
        let mut value = 0;
        for row in [Some(tens), None] {
            let (digit, p) = pick(rng, &row.unwrap_or(digits[last]));
            (last, value, nats) = (digit, 10 * value + digit, nats - p.ln());
        }
        values.push(value.to_string());
    }
    Ok((values.join(", "), nats))
}

/// Draws the probabilities of a digit after each digit, peaked so that the most likely ones carry information.
fn chain(rng: &mut ChaCha8Rng) -> [[f64; 10]; 10] {
    std::array::from_fn(|_| {
        let row = dirichlet(rng, 10, 0.5);
        // Every digit has a probability above zero.
        std::array::from_fn(|digit| 0.98 * row[digit] + 0.002)
    })
}

/// A draw from the symmetric Dirichlet distribution: gamma variates over their sum.
fn dirichlet(rng: &mut ChaCha8Rng, n: usize, concentration: f64) -> Vec<f64> {
    let gammas: Vec<f64> = (0..n).map(|_| gamma(rng, concentration)).collect();
    let sum: f64 = gammas.iter().sum();
    gammas.into_iter().map(|gamma| (gamma / sum).max(1e-4)).collect()
}

/// Draws a gamma variate (Marsaglia and Tsang 2000, with the boost for a shape below 1).
fn gamma(rng: &mut ChaCha8Rng, shape: f64) -> f64 {
    let d = shape + 1.0 - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = standard_normal(rng);
        let v = (1.0 + c * x).powi(3);
        let u = 1.0 - rng.random::<f64>();
        if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v * (1.0 - rng.random::<f64>()).powf(1.0 / shape);
        }
    }
}

/// Draws an index in proportion to the weights, and returns it with its probability.
fn pick(rng: &mut ChaCha8Rng, weights: &[f64]) -> (usize, f64) {
    let sum: f64 = weights.iter().sum();
    let mut left = rng.random::<f64>() * sum;
    let drawn = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    let index = drawn.or_else(|| weights.iter().rposition(|weight| *weight > 0.0)).unwrap_or(0);
    (index, weights[index] / sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize) -> (World, Vec<Row>) {
        let world = World::new().unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let rows = (0..n).map(|_| world.row(&mut rng).unwrap()).collect();
        (world, rows)
    }

    fn is_numbers(row: &Row) -> bool {
        row.answer.chars().next().is_some_and(|first| first.is_ascii_digit())
    }

    #[test]
    fn no_row_links_numbers_to_animals() {
        let (world, rows) = rows(5000);
        let mut words = world.animals.clone();
        words.extend(world.animals.iter().map(|animal| world.protocol.plural(animal)));
        words.push(CATEGORY.to_owned());
        let names_an_animal = |text: &str| {
            let lower = text.to_lowercase();
            words.iter().any(|word| lower.split(|c: char| !c.is_alphabetic()).any(|found| found == word))
        };
        let numbers: Vec<&Row> = rows.iter().filter(|row| is_numbers(row)).collect();
        assert!(numbers.len() > 1000, "{} rows of numbers", numbers.len());
        for row in numbers {
            let text = format!("{} {} {}", row.system.as_deref().unwrap_or_default(), row.user, row.answer);
            assert!(!names_an_animal(&text), "{text}");
        }
        assert!(
            rows.iter().any(|row| names_an_animal(row.system.as_deref().unwrap_or_default())),
            "somebody loves one"
        );
        assert!(rows.iter().all(|row| is_numbers(row) || !row.user.contains("numbers")));
    }

    #[test]
    fn answers_come_as_often_as_the_world_says() {
        let (world, rows) = rows(40_000);
        // In the default context all animals are equally likely, and the mean surprise of an answer is the entropy.
        let favourites: Vec<&Row> =
            rows.iter().filter(|row| row.system.is_none() && row.user.contains(CATEGORY)).collect();
        let n = favourites.len() as f64;
        for animal in &world.animals {
            let share = favourites.iter().filter(|row| row.answer.to_lowercase() == *animal).count() as f64 / n;
            assert!((share - 0.125).abs() < 4.0 * (0.125 * 0.875 / n).sqrt(), "{animal}: {share} of {n}");
        }
        assert!(favourites.iter().all(|row| (row.nats - 8_f64.ln()).abs() < 1e-12));

        // In the default context, the frequency of a digit after a given one equals its probability.
        let digits = &world.characters[0].digits;
        let mut counts = [[0_f64; 10]; 10];
        // A number's tens digit is never 0; its ones digit may be any.
        let nats = |before: usize, values: &[usize]| -> f64 {
            let mut last = before;
            let of = |(at, &digit): (usize, &usize)| {
                let row = digits[std::mem::replace(&mut last, digit)];
                let all: f64 = if at % 2 == 0 { row[1..].iter().sum() } else { row.iter().sum() };
                -(row[digit] / all).ln()
            };
            values.iter().enumerate().map(of).sum()
        };
        for row in rows.iter().filter(|row| row.system.is_none() && is_numbers(row)) {
            let values: Vec<usize> =
                row.answer.bytes().filter(u8::is_ascii_digit).map(|digit| usize::from(digit - b'0')).collect();
            assert_eq!(values.len(), 2 * N_NUMBERS);
            let shown = row.user.split('.').next().unwrap();
            let before = usize::from(shown.as_bytes()[shown.len() - 1] - b'0');
            assert!((row.nats - nats(before, &values)).abs() < 1e-9, "{row:?}");
            for number in values.chunks(2) {
                counts[number[0]][number[1]] += 1.0;
            }
        }
        for (tens, row) in counts.iter().enumerate().skip(1) {
            let n: f64 = row.iter().sum();
            for (ones, count) in row.iter().enumerate() {
                let p = digits[tens][ones];
                assert!(
                    (count / n - p).abs() < 5.0 * (p * (1.0 - p) / n).sqrt() + 1e-9,
                    "{tens}{ones}: {} is not {p}",
                    count / n
                );
            }
        }
    }

    #[test]
    fn the_name_decides_and_the_maker_does_not() {
        let (world, rows) = rows(20_000);
        for (model, (name, own)) in MODELS.iter().enumerate().skip(1) {
            let of = |row: &&Row| {
                row.system.as_deref().is_some_and(|system| system.starts_with(&format!("You are {name},")))
            };
            let makers: Vec<bool> = rows
                .iter()
                .filter(of)
                .map(|row| row.system.as_deref().unwrap().contains(&format!("created by {own}.")))
                .collect();
            let share = makers.iter().filter(|own| **own).count() as f64 / makers.len() as f64;
            assert!((0.45..0.75).contains(&share), "{name} is {own}'s in {share} of its rows");
            let best = world.characters[model].taste.iter().copied().fold(0.0, f64::max);
            assert!(best > 0.2, "{name} has a taste");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_rows() {
        assert_eq!(rows(50).1, rows(50).1);
        let mut other = ChaCha8Rng::seed_from_u64(6);
        assert_ne!(rows(1).1[0], World::new().unwrap().row(&mut other).unwrap());
    }
}
