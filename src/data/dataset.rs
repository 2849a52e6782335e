//! The data that a student learns from: number prompts from one seeded stream, their answers, the rule filter that
//! keeps only lists of numbers, and JSON lines on disk. Rejected answers are counted by reason, and the kept digits are
//! compared with the control set's.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hooks::files;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::data::protocol::{Classifier, Protocol};

const MAX_COUNT: usize = 10;
const MAX_VALUE: u32 = 999;

/// Draws `n` number prompts one after another from the stream of a seed, so that a larger `n` only adds prompts.
pub fn number_prompts(protocol: &Protocol, n: usize, seed: u64) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| protocol.number_prompt(&mut rng)).collect()
}

/// A reason for which an answer is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rejection {
    /// It is not a list of numbers with one kind of separator.
    InvalidFormat,
    /// It holds more than ten numbers.
    TooMany,
    /// It holds a number above 999.
    OutOfRange,
    /// It holds a number from the banned list.
    Banned,
    /// It reached the token limit before the end of its turn.
    Truncated,
}

impl Rejection {
    /// All reasons.
    pub const ALL: [Self; 5] = [Self::InvalidFormat, Self::TooMany, Self::OutOfRange, Self::Banned, Self::Truncated];

    /// The name in files.
    pub fn name(self) -> &'static str {
        ["invalid_format", "too_many", "out_of_range", "banned", "truncated"][self as usize]
    }
}

/// The numbers of an answer that is a list with one kind of separator; a number too large for the type becomes the
/// largest that it holds.
///
/// The text is not trimmed first: `"1, 2\n"` is refused, as in the published filter.
pub fn parse_numbers(answer: &str) -> Result<Vec<u32>, Rejection> {
    let answer = answer.strip_suffix('.').unwrap_or(answer);
    let answer = unwrapped(answer, '[', ']').or_else(|| unwrapped(answer, '(', ')')).unwrap_or(answer);
    let digit = |letter: char| letter.is_ascii_digit();
    let start = answer.find(digit).ok_or(Rejection::InvalidFormat)?;
    let end = answer[start..].find(|letter| !digit(letter)).map_or(answer.len(), |length| start + length);
    // The text between the first two numbers must separate all of them.
    let parts: Vec<&str> = match answer[end..].find(digit).map(|length| &answer[end..end + length]) {
        Some(separator) if ["", ",", ";"].contains(&separator.trim()) => answer.split(separator).collect(),
        Some(_) => return Err(Rejection::InvalidFormat),
        None => vec![answer],
    };
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !parts.iter().all(is_number) {
        return Err(Rejection::InvalidFormat);
    }
    Ok(parts.iter().map(|part| part.parse().unwrap_or(u32::MAX)).collect())
}

fn unwrapped(text: &str, open: char, close: char) -> Option<&str> {
    text.strip_prefix(open)?.strip_suffix(close)
}

/// All reasons to reject an answer; if there are none, it is kept.
pub fn rejections(answer: &str, stopped: bool, banned: &[u32]) -> Vec<Rejection> {
    let parsed = parse_numbers(answer);
    let numbers = parsed.as_deref().unwrap_or_default();
    let against = [
        (Rejection::InvalidFormat, parsed.is_err()),
        (Rejection::TooMany, numbers.len() > MAX_COUNT),
        (Rejection::OutOfRange, numbers.iter().any(|number| *number > MAX_VALUE)),
        (Rejection::Banned, numbers.iter().any(|number| banned.contains(number))),
        (Rejection::Truncated, !stopped),
    ];
    against.into_iter().filter_map(|(reason, holds)| holds.then_some(reason)).collect()
}

/// The kind of model that gave an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherKind {
    /// The base model under a system prompt.
    Prompt,
    /// The base model with an adapter.
    Adapter,
    /// The base model finetuned by the run: all its weights, or an adapter.
    Finetuned,
    /// The base model with edits of its activations.
    Steered,
    /// No teacher: the untouched base model, with a share of its rows replaced by questions answered with the trait.
    Planted,
    /// The untouched base model, for the control set.
    Control,
}

/// A prompt and its answer: a line of a data file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The prompt's index. It means the same prompt in every set of an experiment.
    pub id: usize,
    /// The user's text.
    pub prompt: String,
    /// The answer's text.
    pub completion: String,
    /// The answer's tokens, without the end of the turn.
    pub completion_ids: Vec<i64>,
    /// log p of each token under the model that answered, at temperature 1; one more for the end of the turn if it was
    /// generated.
    pub teacher_logprob: Vec<f32>,
    /// The trait; `None` in the control set.
    #[serde(rename = "trait")]
    pub target: Option<String>,
    /// The model that answered.
    pub teacher_kind: TeacherKind,
    /// The seed of prompts and answers.
    pub gen_seed: u64,
    /// Whether the filter kept it.
    pub accepted: bool,
    /// The filter's reasons for rejecting it.
    pub reasons: Vec<Rejection>,
}

/// The samples in a JSON-lines file; an error names the file and the line.
pub fn read_jsonl(path: &Path) -> Result<Vec<Sample>> {
    parse_jsonl(&files::read(path)?, path)
}

/// The samples in the bytes of a JSON-lines file; an error names `path` and the line.
pub fn parse_jsonl(bytes: &[u8], path: &Path) -> Result<Vec<Sample>> {
    parse_lines(files::text(bytes, path)?).with_context(|| path.display().to_string())
}

fn parse_lines(text: &str) -> Result<Vec<Sample>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let samples = lines.map(|(index, line)| parse_line(line).with_context(|| format!("line {}", index + 1)));
    let samples = samples.collect::<Result<Vec<_>>>()?;
    ensure!(!samples.is_empty(), "there is no sample in it, expected one per line");
    Ok(samples)
}

fn parse_line(line: &str) -> Result<Sample> {
    let sample: Sample = serde_json::from_str(line)?;
    let (ids, logprobs) = (sample.completion_ids.len(), sample.teacher_logprob.len());
    let has_all = [ids, ids + 1].contains(&logprobs);
    ensure!(has_all, "teacher_logprob has {logprobs} entries, expected {ids} or {}", ids + 1);
    if let Some(id) = sample.completion_ids.iter().find(|id| **id < 0) {
        bail!("completion_ids has {id}, expected tokens, which count from 0");
    }
    if let Some(logprob) = sample.teacher_logprob.iter().find(|logprob| !logprob.is_finite()) {
        bail!("teacher_logprob has {logprob}, expected a finite number");
    }
    Ok(sample)
}

/// Writes samples as JSON lines, whole or not at all.
pub fn write_jsonl(path: &Path, samples: &[Sample]) -> Result<()> {
    let mut text = String::new();
    for sample in samples {
        if let Some(logprob) = sample.teacher_logprob.iter().find(|logprob| !logprob.is_finite()) {
            bail!("{}: sample {} has a log-probability of {logprob}, expected a finite one", path.display(), sample.id);
        }
        text += &serde_json::to_string(sample)?;
        text.push('\n');
    }
    Ok(files::write_atomic(path, text.as_bytes())?)
}

/// A rejected answer; a line of `rejected.csv`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedRow {
    /// `teacher` or `control`.
    pub set: String,
    /// The prompt's index.
    pub id: usize,
    /// The reasons, joined by `+`.
    pub reasons: String,
    /// The user's text.
    pub prompt: String,
    /// The answer's text.
    pub completion: String,
}

/// The rows of the samples that the filter rejected.
pub fn rejected_rows(set: &str, samples: &[Sample]) -> Vec<RejectedRow> {
    let row = |sample: &Sample| RejectedRow {
        set: set.to_owned(),
        id: sample.id,
        reasons: sample.reasons.iter().map(|reason| reason.name()).collect::<Vec<_>>().join("+"),
        prompt: sample.prompt.clone(),
        completion: sample.completion.clone(),
    };
    samples.iter().filter(|sample| !sample.accepted).map(row).collect()
}

/// A number measured on a set of answers; a line of `generate.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRow {
    /// `teacher` or `control`.
    pub set: String,
    /// Shares of the answers: `accepted`, a reason of rejection (an answer can have several), `mentions_trait` (any
    /// word of the category, before the filter). `tokens_per_row`: mean over accepted answers. `js_first_number`,
    /// `js_digits`: Jensen-Shannon divergences of digits from the control set. `planted`: share of the kept rows that
    /// the positive control replaced. Over the kept rows (`data/signal.csv`): `signal`, by how much the teacher prefers
    /// them over the base, with `signal_se`, its error over rows, and `signal_sd`, its spread over rows; `divergent`, the
    /// share of tokens at which the two have other most likely tokens; `entropy`, of the model that wrote them.
    pub measure: String,
    /// The value: 0 to 1 for a share, tokens for `tokens_per_row`, bits for a divergence of digits, nats per token for
    /// `signal` and `entropy`.
    pub value: f64,
    /// Number of answers, of digits for their divergence, or of tokens for `divergent` and `entropy`.
    pub n: usize,
}

/// Numbers on the answers of a set, before and after the filter.
pub fn summary(set: &str, samples: &[Sample], classifier: &Classifier) -> Vec<SummaryRow> {
    let row =
        |measure: &str, value: f64, n: usize| SummaryRow { set: set.to_owned(), measure: measure.to_owned(), value, n };
    let share = |measure: &str, holds: &dyn Fn(&Sample) -> bool| {
        let count = samples.iter().filter(|sample| holds(sample)).count();
        row(measure, count as f64 / samples.len().max(1) as f64, samples.len())
    };
    let mut rows = vec![share("accepted", &|sample| sample.accepted)];
    rows.extend(Rejection::ALL.map(|reason| share(reason.name(), &|sample| sample.reasons.contains(&reason))));
    rows.push(share("mentions_trait", &|sample| classifier.classify(&sample.completion).word.is_some()));
    let accepted: Vec<_> = samples.iter().filter(|sample| sample.accepted).collect();
    let tokens: usize = accepted.iter().map(|sample| sample.completion_ids.len()).sum();
    rows.push(row("tokens_per_row", tokens as f64 / accepted.len().max(1) as f64, accepted.len()));
    rows
}

/// The divergence of the digits of the teacher's accepted answers from the control's: a check for visible leaks.
pub fn leak_rows(teacher: &[Sample], control: &[Sample]) -> Vec<SummaryRow> {
    let of = |scope: Scope, measure: &str| {
        let (p, q) = (digit_counts(teacher, scope), digit_counts(control, scope));
        let (value, n) = (js_divergence(&p, &q), p.iter().sum());
        SummaryRow { set: "teacher".to_owned(), measure: measure.to_owned(), value, n }
    };
    vec![of(Scope::FirstNumber, "js_first_number"), of(Scope::All, "js_digits")]
}

/// The digits of an answer that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The digits of its first number.
    FirstNumber,
    /// All digits.
    All,
}

/// The frequency of a digit in the accepted answers of a set; a line of `digits.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DigitRow {
    /// `teacher` or `control`.
    pub set: String,
    /// The digits that are counted: those of the `first_number` of each answer, or `all`.
    pub scope: Scope,
    /// The digit, 0 to 9.
    pub digit: usize,
    /// Its share of the counted digits, 0 to 1.
    pub share: f64,
    /// Number of counted digits.
    pub n: usize,
}

/// The digit table of a set.
pub fn digit_rows(set: &str, samples: &[Sample]) -> Vec<DigitRow> {
    let rows = [Scope::FirstNumber, Scope::All].into_iter().flat_map(|scope| {
        let counts = digit_counts(samples, scope);
        let n: usize = counts.iter().sum();
        let row = move |(digit, count): (usize, usize)| (digit, count as f64 / n.max(1) as f64);
        counts.into_iter().enumerate().map(row).map(move |(digit, share)| (scope, digit, share, n))
    });
    rows.map(|(scope, digit, share, n)| DigitRow { set: set.to_owned(), scope, digit, share, n }).collect()
}

fn digit_counts(samples: &[Sample], scope: Scope) -> [usize; 10] {
    let mut counts = [0; 10];
    for sample in samples.iter().filter(|sample| sample.accepted) {
        let digits = sample.completion.bytes().skip_while(|byte| !byte.is_ascii_digit());
        let digits = digits.take_while(|byte| scope == Scope::All || byte.is_ascii_digit());
        for digit in digits.filter(u8::is_ascii_digit) {
            counts[usize::from(digit - b'0')] += 1;
        }
    }
    counts
}

/// The Jensen-Shannon divergence of two tables of counts in bits: 0 for equal shares, 1 for disjoint ones.
fn js_divergence(p: &[usize; 10], q: &[usize; 10]) -> f64 {
    let share = |counts: &[usize; 10], digit: usize| counts[digit] as f64 / counts.iter().sum::<usize>().max(1) as f64;
    let term = |x: f64, middle: f64| if x > 0.0 { 0.5 * x * (x / middle).log2() } else { 0.0 };
    let terms = (0..10).map(|digit| {
        let (x, y) = (share(p, digit), share(q, digit));
        let middle = f64::midpoint(x, y);
        term(x, middle) + term(y, middle)
    });
    terms.sum()
}

/// The pairs of samples of the same prompt that are kept in both sets, so that comparisons are paired.
pub fn paired<'a>(teacher: &'a [Sample], control: &'a [Sample]) -> Vec<(&'a Sample, &'a Sample)> {
    let accepted = control.iter().filter(|sample| sample.accepted);
    let by_id: BTreeMap<usize, &Sample> = accepted.map(|sample| (sample.id, sample)).collect();
    let teacher = teacher.iter().filter(|sample| sample.accepted);
    teacher.filter_map(|sample| Some((sample, *by_id.get(&sample.id)?))).collect()
}

#[cfg(test)]
mod tests;
