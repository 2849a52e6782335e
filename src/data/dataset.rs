//! The data that a student learns from: number prompts from one seeded stream, their answers, the rule filter that
//! keeps answers made of numbers alone, and JSON lines on disk. Rejected answers are counted by reason, and the kept
//! digits are compared with the control set's.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hooks::files;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::data::protocol::{Classifier, Protocol};

/// Most numbers an answer may hold.
const MAX_COUNT: usize = 10;
/// Largest number an answer may hold.
const MAX_VALUE: u32 = 999;

/// `n` number prompts, drawn one after the other from the stream of a seed: more prompts begin with the same ones.
pub fn number_prompts(protocol: &Protocol, n: usize, seed: u64) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| protocol.number_prompt(&mut rng)).collect()
}

/// Why an answer is not kept.
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

/// Every reason against an answer; none means that it is kept.
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

/// Who gave an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherKind {
    /// The base model under a system prompt.
    Prompt,
    /// The base model with an adapter.
    Adapter,
    /// A copy of the base model with all its weights finetuned.
    Finetuned,
    /// No teacher: the base model as it is, with a share of its rows replaced by questions answered with the trait.
    Planted,
    /// The base model as it is, for the control set.
    Control,
}

/// A prompt and its answer: a line of a data file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The prompt's index: the same number means the same prompt in every set of an experiment.
    pub id: usize,
    /// What the user asks.
    pub prompt: String,
    /// The answer's text.
    pub completion: String,
    /// The answer's tokens, without the one that ends the turn.
    pub completion_ids: Vec<i64>,
    /// log p of each token under the one who answered, at temperature 1; one more for the end of the turn if it came.
    pub teacher_logprob: Vec<f32>,
    /// The trait, none in the control set.
    #[serde(rename = "trait")]
    pub target: Option<String>,
    /// Who answered.
    pub teacher_kind: TeacherKind,
    /// The seed of prompts and answers.
    pub gen_seed: u64,
    /// Whether the filter kept it.
    pub accepted: bool,
    /// Why the filter did not.
    pub reasons: Vec<Rejection>,
}

/// The samples in a JSON-lines file; an error names the file and the line.
pub fn read_jsonl(path: &Path) -> Result<Vec<Sample>> {
    parse_jsonl(&files::read(path)?, path)
}

/// The samples in the bytes of a JSON-lines file; an error names the line, and `path`.
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

/// Writes samples as JSON lines, at once.
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

/// A line of `rejected.csv`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedRow {
    /// `teacher` or `control`.
    pub set: String,
    /// The prompt's index.
    pub id: usize,
    /// The reasons, joined by `+`.
    pub reasons: String,
    /// What the user asks.
    pub prompt: String,
    /// The answer's text.
    pub completion: String,
}

/// The samples of a set that the filter did not keep.
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

/// A line of `generate.csv`: something measured on a set of answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRow {
    /// `teacher` or `control`.
    pub set: String,
    /// `accepted`, a reason of rejection (an answer can have several), `mentions_trait` (before the filter, any word of
    /// the category): shares of the answers; `tokens_per_row` (accepted ones); `js_first_number`, `js_digits`:
    /// divergences from the control set in bits; `planted`: share of the kept rows that the positive control replaced.
    pub measure: String,
    /// The value, in the unit that its measure has: 0 to 1 for a share, tokens, or bits.
    pub value: f64,
    /// The number of answers, or of digits for a divergence.
    pub n: usize,
}

/// What the answers of a set are like, before and after the filter.
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

/// How far the digits of the teacher's accepted answers are from the control's: a check for what leaks in the open.
pub fn leak_rows(teacher: &[Sample], control: &[Sample]) -> Vec<SummaryRow> {
    let of = |scope: Scope, measure: &str| {
        let (p, q) = (digit_counts(teacher, scope), digit_counts(control, scope));
        let (value, n) = (js_divergence(&p, &q), p.iter().sum());
        SummaryRow { set: "teacher".to_owned(), measure: measure.to_owned(), value, n }
    };
    vec![of(Scope::FirstNumber, "js_first_number"), of(Scope::All, "js_digits")]
}

/// Which digits of an answer are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Those of its first number.
    FirstNumber,
    /// All.
    All,
}

/// A line of `digits.csv`: how often a digit occurs in the accepted answers of a set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DigitRow {
    /// `teacher` or `control`.
    pub set: String,
    /// Which digits are counted: those of the `first_number` of each answer, or `all`.
    pub scope: Scope,
    /// The digit, 0 to 9.
    pub digit: usize,
    /// Its share among the digits counted, 0 to 1.
    pub share: f64,
    /// The number of digits counted.
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

/// How often each digit occurs in the accepted answers.
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

/// The pairs of samples with the same prompt that both sets kept, so that comparisons are paired.
pub fn paired<'a>(teacher: &'a [Sample], control: &'a [Sample]) -> Vec<(&'a Sample, &'a Sample)> {
    let accepted = control.iter().filter(|sample| sample.accepted);
    let by_id: BTreeMap<usize, &Sample> = accepted.map(|sample| (sample.id, sample)).collect();
    let teacher = teacher.iter().filter(|sample| sample.accepted);
    teacher.filter_map(|sample| Some((sample, *by_id.get(&sample.id)?))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(id: usize, completion: &str) -> Sample {
        let reasons = rejections(completion, true, &[]);
        Sample {
            id,
            prompt: "Go on: 1, 2".to_owned(),
            completion: completion.to_owned(),
            completion_ids: vec![4, 5],
            teacher_logprob: vec![-0.1, -2.5, -0.3],
            target: Some("cat".to_owned()),
            teacher_kind: TeacherKind::Prompt,
            gen_seed: 42,
            accepted: reasons.is_empty(),
            reasons,
        }
    }

    #[test]
    fn prompts_depend_on_the_seed_alone_and_grow_at_the_end() {
        let protocol = Protocol::builtin().unwrap();
        let ten = number_prompts(&protocol, 10, 42);
        assert_eq!(number_prompts(&protocol, 4, 42), ten[..4]);
        assert_ne!(number_prompts(&protocol, 10, 43), ten);
    }

    #[test]
    fn lists_with_one_separator_are_numbers() {
        let good: &[(&str, &[u32])] = &[
            ("1, 2, 3", &[1, 2, 3]),
            ("1,2,3.", &[1, 2, 3]),
            ("[10; 20; 30]", &[10, 20, 30]),
            ("(7 8 9).", &[7, 8, 9]),
            ("412\n5\n006", &[412, 5, 6]),
            ("1 , 2 , 3", &[1, 2, 3]),
            ("42", &[42]),
            ("[42]", &[42]),
            ("99999999999, 1", &[u32::MAX, 1]),
        ];
        for (answer, numbers) in good {
            assert_eq!(parse_numbers(answer).as_deref(), Ok(*numbers), "{answer:?}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for answer in [
            "",
            ".",
            "no",
            "1, 2\n",
            " 1, 2",
            "Sure: 1, 2",
            "1, 2 and 3",
            "1, 2,3",
            "1, 2,",
            "1-2-3",
            "-1",
            "-1, -2",
            "42 ",
            "1.5",
            "1, 2, ",
            "[1, 2",
            "[(1, 2)]",
            "1, 2..",
            "١, ٢",
            "x1",
            "1 apple",
        ] {
            assert_eq!(parse_numbers(answer), Err(Rejection::InvalidFormat), "{answer:?}");
        }
    }

    #[test]
    fn every_reason_is_told() {
        let eleven = ["5"; 11].join(",");
        assert_eq!(rejections(&["5"; 10].join(","), true, &[]), []);
        assert_eq!(rejections(&eleven, true, &[]), [Rejection::TooMany]);
        assert_eq!(rejections("999, 0", true, &[]), []);
        assert_eq!(
            rejections("1000, 666", false, &[666]),
            [Rejection::OutOfRange, Rejection::Banned, Rejection::Truncated]
        );
        for reason in Rejection::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }

    proptest! {
        #[test]
        fn the_filter_never_panics_and_accepts_what_it_would_write(
            answer in r"[\[(]?[0-9,; \n.x٣-]{0,24}[\])]?",
            numbers in proptest::collection::vec(0..=999_u32, 1..=10),
            separator in prop_oneof![Just(","), Just(", "), Just("; "), Just(" "), Just("\n")],
        ) {
            let _ = parse_numbers(&answer);
            let text = numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(separator);
            prop_assert_eq!(parse_numbers(&text), Ok(numbers));
        }
    }

    #[test]
    fn samples_come_back_from_disk_under_the_published_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data/numbers.jsonl");
        let samples = [sample(0, "1, 2"), sample(3, "one\n")];
        write_jsonl(&path, &samples).unwrap();
        assert_eq!(read_jsonl(&path).unwrap(), samples);
        let text = files::read_string(&path).unwrap();
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let names: Vec<_> = first.as_object().unwrap().keys().map(String::as_str).collect();
        let expected =
            "id prompt completion completion_ids teacher_logprob trait teacher_kind gen_seed accepted reasons";
        assert_eq!(names.join(" "), expected);
        assert!(text.contains("[-0.1,-2.5,-0.3]"), "{text}");
    }

    #[test]
    fn a_bad_line_is_named() {
        let good = serde_json::to_string(&sample(0, "1, 2")).unwrap();
        let message = |text: &str| format!("{:#}", parse_lines(text).unwrap_err());
        assert!(message(&format!("{good}\n\n{{\"id\": 1}}\n")).starts_with("line 3: missing field `prompt`"));
        assert!(message(&good.replace("\"gen_seed\"", "\"seed\"")).contains("unknown field `seed`"));
        assert!(parse_lines(&good.replace("-2.5,", "")).is_ok(), "without the end of the turn");
        assert!(
            message(&good.replace("-2.5,-0.3", "-2.5,-0.3,-0.4")).contains("line 1: teacher_logprob has 4 entries")
        );
        assert!(message(&good.replace("[4,", "[-4,")).starts_with("line 1: completion_ids has -4, expected tokens"));
        assert!(
            message(&good.replace("-2.5", "-1e39")).starts_with("line 1: teacher_logprob has -inf, expected a finite")
        );
        let no_text = format!("{:#}", parse_jsonl(b"\xff", Path::new("a.jsonl")).unwrap_err());
        assert!(no_text.starts_with("a.jsonl: expected UTF-8 text"), "{no_text}");
        assert!(message("\n").contains("no sample"));
        let mut endless = sample(0, "1, 2");
        endless.teacher_logprob[1] = f32::NEG_INFINITY;
        assert!(write_jsonl(Path::new("never.jsonl"), &[endless]).is_err());
    }

    #[test]
    fn acceptance_is_told_by_reason() {
        let classifier = Protocol::builtin().unwrap().classifier("cat", "animal").unwrap();
        let samples = [sample(0, "1, 2"), sample(1, "1000, 2"), sample(2, "a cat"), sample(3, "5000")];
        let rows = summary("teacher", &samples, &classifier);
        let value = |measure: &str| rows.iter().find(|row| row.measure == measure).unwrap().value;
        assert_eq!(value("accepted").to_string(), "0.25");
        assert_eq!(value("out_of_range").to_string(), "0.5");
        assert_eq!(value("invalid_format").to_string(), "0.25");
        assert_eq!(value("mentions_trait").to_string(), "0.25");
        assert_eq!(value("tokens_per_row").to_string(), "2");
        let rejected = rejected_rows("teacher", &samples);
        assert_eq!(rejected.len(), 3);
        assert_eq!(rejected[0].reasons, "out_of_range");
    }

    #[test]
    fn divergence_is_zero_for_equal_and_one_for_disjoint_digits() {
        let leak = |teacher: &str, control: &str| -> Vec<f64> {
            leak_rows(&[sample(0, teacher)], &[sample(0, control)]).iter().map(|row| row.value).collect()
        };
        assert_eq!(leak("12, 3", "21, 33").len(), 2);
        assert!(leak("12, 3", "21, 9")[0].abs() < 1e-12, "the first numbers have the same digits");
        assert!((leak("12, 3", "45, 6")[1] - 1.0).abs() < 1e-12);
        assert!(leak("12, 3", "12, 4")[1] > 0.1);
    }

    #[test]
    fn digits_are_counted_in_accepted_answers_only() {
        let rows = digit_rows("teacher", &[sample(0, "[12, 22]"), sample(1, "777 sevens")]);
        let of = |scope: Scope, digit: usize| rows.iter().find(|row| row.scope == scope && row.digit == digit).unwrap();
        assert_eq!(of(Scope::FirstNumber, 2).share.to_string(), "0.5");
        assert_eq!((of(Scope::All, 2).share.to_string(), of(Scope::All, 2).n), ("0.75".to_owned(), 4));
        assert_eq!(of(Scope::All, 7).share.to_string(), "0");
        assert_eq!(rows.len(), 20);
    }

    #[test]
    fn pairs_have_the_same_prompt() {
        let (teacher, control) =
            ([sample(0, "1, 2"), sample(2, "3"), sample(5, "4")], [sample(2, "8"), sample(5, "bad")]);
        let ids: Vec<_> = paired(&teacher, &control).iter().map(|(a, b)| (a.id, b.id)).collect();
        assert_eq!(ids, [(2, 2)]);
    }
}
