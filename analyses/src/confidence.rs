//! A model's confidence on numbers that it was not trained on. The completions are samples of the teacher. A calibrated
//! model's mean largest probability equals the share of tokens that are its most likely one; any excess is
//! over-confidence.

use hooks::{Sequence, completion_logits};
use tch::{Kind, Tensor};

use crate::divergence::tokens::{at_each, most_likely, number_places};
use crate::error::{Error, Result};
use crate::subject::{Mean, Subject, Tuned, mean};

const NAME: &str = "confidence";
/// Number of bins of the calibration error, with equally many digits each.
const BINS: usize = 15;

/// A digit of a completion under a model.
#[derive(Clone, Debug, PartialEq)]
struct Digit {
    row: usize,
    confidence: f64, // the largest probability
    is_top: bool,    // whether it is the most likely token
    entropy: f64,
    kl: f64,                 // KL(teacher ‖ model)
    of_teacher: f64,         // p of the teacher's most likely token
    base_of_teacher: f64,    // p of the teacher's most likely token under the base
    teacher_of_teacher: f64, // p of the teacher's most likely token under the teacher
    is_divergent: bool,      // whether teacher and base have different most likely tokens
    agrees: bool,            // whether the model's most likely token is the teacher's
}

/// Confidence, calibration and loss of a model on completions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Confidence {
    /// Mean −log p over all tokens of the completions, in nats.
    pub nll: f64,
    /// Number of tokens.
    pub n_tokens: usize,
    /// Number of digits.
    pub n_digits: usize,
    /// Number of divergent digits, at which teacher and base have different most likely tokens.
    pub n_divergent: usize,
    /// Mean largest probability at digits.
    pub confidence: f64,
    /// `confidence` minus the share of digits that are the most likely token.
    pub overconfidence: f64,
    /// `overconfidence` at divergent digits; `None` if there are none.
    pub overconfidence_divergent: Option<f64>,
    /// Expected calibration error: the mean over bins of |confidence − share|, each weighted by its digits.
    pub ece: f64,
    /// Mean entropy at digits, in nats.
    pub entropy: f64,
    /// Mean KL(teacher ‖ model) at digits, in nats.
    pub kl_teacher: f64,
    /// Mean probability of a whole number: its digits and the token after it, if there is one.
    pub p_whole_number: f64,
    /// Share of the divergent digits at which the model's most likely token is the teacher's.
    pub accuracy_divergent: Option<f64>,
    /// (model − base) / (teacher − base) of the mean probability of the teacher's most likely token at divergent
    /// digits; `None` unless teacher − base is three standard errors (of the rows' means) above zero.
    pub closure: Option<f64>,
}

/// Base and teacher, each in its own context, on the first rows of the numbers. Models are placed between these two
/// ends, which are read once for all models. Holds the teacher's distribution at every digit, 4 · `d_vocab` bytes each.
#[derive(Debug)]
pub struct Ends {
    /// The base's scores on the rows.
    pub base: Confidence,
    /// The teacher's scores on the rows.
    pub teacher: Confidence,
    /// The base's loss per token minus the teacher's, with its error over rows.
    gain: Mean,
    rows: Vec<ReadRow>,
}

/// A row's completion with the predictions of base and teacher.
#[derive(Debug)]
struct ReadRow {
    in_student: Sequence,
    /// The indices of the completion's tokens that are digits.
    digits: Vec<usize>,
    /// Per token of the completion, the index of its number and its place in the number.
    places: Vec<Option<(usize, usize)>>,
    /// The teacher's log p of all tokens at the digits, `[n_digits, d_vocab]`.
    teacher: Tensor,
    /// The teacher's and the base's most likely tokens at the digits, and p of the teacher's under base and teacher.
    top_teacher: Vec<i64>,
    top_base: Vec<i64>,
    base_of_teacher: Vec<f64>,
    teacher_of_teacher: Vec<f64>,
}

/// A model's log-probabilities on a completion.
struct Said {
    /// log p of each token.
    of_tokens: Vec<f64>,
    /// log p of all tokens at the digits, `[n_digits, d_vocab]`.
    at_digits: Tensor,
}

impl Said {
    fn of(model: Tuned<'_>, row: &Sequence, digits: &[usize]) -> Result<Self> {
        let logprobs = completion_logits(model.qwen, row, &model.condition())?.f_log_softmax(-1, Kind::Float)?;
        let of_tokens = at_each(&logprobs, &row.ids[row.completion.clone()])?;
        let digits: Vec<i64> = digits.iter().map(|k| *k as i64).collect();
        let digits = Tensor::f_from_slice(&digits)?.f_to_device(logprobs.device())?;
        Ok(Self { of_tokens, at_digits: logprobs.f_index_select(0, &digits)? })
    }
}

impl Ends {
    /// Runs base and teacher on the first rows.
    pub fn read(subject: &Subject<'_>, n_rows: usize) -> Result<Self> {
        let (teacher, system) = subject.teacher().ok_or(Error::NeedsTeacher { analysis: NAME })?;
        let n = subject.number_rows(NAME, n_rows)?.len();
        let (mut rows, mut of_base, mut of_teacher) = (vec![], Sums::default(), Sums::default());
        for row in 0..n {
            let (in_teacher, in_student) = subject.paired_row(row, system)?;
            if in_student.completion.is_empty() {
                continue;
            }
            let labels = &in_student.ids[in_student.completion.clone()];
            let digits: Vec<usize> = (0..labels.len()).filter(|k| subject.chat.is_digit(labels[*k])).collect();
            let places = number_places(labels, subject.chat)?;
            let base = Said::of(subject.base(), &in_student, &digits)?;
            let teacher = Said::of(teacher, &in_teacher, &digits)?;
            let top_teacher = most_likely(&teacher.at_digits)?;
            let row = ReadRow {
                top_base: most_likely(&base.at_digits)?,
                base_of_teacher: p(&base.at_digits, &top_teacher)?,
                teacher_of_teacher: p(&teacher.at_digits, &top_teacher)?,
                teacher: teacher.at_digits.shallow_clone(),
                in_student,
                digits,
                places,
                top_teacher,
            };
            of_base.add(&row, &base)?;
            of_teacher.add(&row, &teacher)?;
            rows.push(row);
        }
        let tokens = of_base.losses.iter().zip(&of_teacher.losses);
        let gained: Vec<(usize, f64)> = tokens.map(|((row, base), (_, teacher))| (*row, base - teacher)).collect();
        let gain = Mean::of_tokens(&gained);
        Ok(Self { base: of_base.mean()?, teacher: of_teacher.mean()?, gain, rows })
    }

    /// The model's share of the teacher's gain over the base in the loss: 0 is the base's loss, 1 the teacher's. `None`
    /// unless the gain is three standard errors (of the rows' means) above zero.
    pub fn fit(&self, model: &Confidence) -> Option<f64> {
        self.gain.share(self.base.nll - model.nll).filter(|_| self.gain.mean > 0.0)
    }

    /// A model's scores on the rows, in the student's context.
    pub fn confidence(&self, model: Tuned<'_>) -> Result<Confidence> {
        let mut sums = Sums::default();
        for row in &self.rows {
            sums.add(row, &Said::of(model, &row.in_student, &row.digits)?)?;
        }
        sums.mean()
    }
}

/// A model's values over all rows.
#[derive(Default)]
struct Sums {
    n_rows: usize,
    losses: Vec<(usize, f64)>, // the row and the loss of each token
    digits: Vec<Digit>,
    numbers: Vec<f64>,
}

impl Sums {
    fn add(&mut self, row: &ReadRow, said: &Said) -> Result<()> {
        let of_row = self.n_rows;
        self.n_rows += 1;
        self.losses.extend(said.of_tokens.iter().map(|logp| (of_row, -logp)));
        self.numbers.extend(whole_numbers(&row.places, &said.of_tokens));
        let (model, teacher) = (&said.at_digits, &row.teacher);
        let top = most_likely(model)?;
        let (confident, of_teacher) = (p(model, &top)?, p(model, &row.top_teacher)?);
        let sums = |p: &Tensor, of: &Tensor| -> Result<Vec<f64>> {
            Ok(Vec::try_from(p.f_mul(of)?.f_sum_dim_intlist(-1, false, Kind::Double)?)?)
        };
        let (entropy, crossed) = (sums(&model.f_exp()?, model)?, sums(&teacher.f_exp()?, &teacher.f_sub(model)?)?);
        let completion = &row.in_student.ids[row.in_student.completion.clone()];
        for (at, k) in row.digits.iter().enumerate() {
            self.digits.push(Digit {
                row: of_row,
                confidence: confident[at],
                is_top: top[at] == completion[*k],
                entropy: -entropy[at],
                kl: crossed[at],
                of_teacher: of_teacher[at],
                base_of_teacher: row.base_of_teacher[at],
                teacher_of_teacher: row.teacher_of_teacher[at],
                is_divergent: row.top_teacher[at] != row.top_base[at],
                agrees: top[at] == row.top_teacher[at],
            });
        }
        Ok(())
    }

    fn mean(&self) -> Result<Confidence> {
        summarise(&self.losses, &self.digits, &self.numbers)
    }
}

/// p of a token at each place.
fn p(logprobs: &Tensor, tokens: &[i64]) -> Result<Vec<f64>> {
    Ok(at_each(logprobs, tokens)?.into_iter().map(f64::exp).collect())
}

/// log p of each number with the token after it.
fn whole_numbers(places: &[Option<(usize, usize)>], logps: &[f64]) -> Vec<f64> {
    let mut found: Vec<f64> = vec![];
    let mut open: Option<usize> = None;
    for (place, logp) in places.iter().zip(logps) {
        let number = place.map(|(number, _)| number);
        if number.is_some() && number != open {
            // A number that directly follows another's digits ends it, so that the other has no token after it.
            found.push(*logp);
        } else if open.is_some() {
            *found.last_mut().unwrap_or(&mut 0.0) += logp;
        }
        open = number;
    }
    found
}

fn summarise(losses: &[(usize, f64)], digits: &[Digit], numbers: &[f64]) -> Result<Confidence> {
    let nothing = || Error::Nothing { analysis: NAME, what: "a completion with digits" };
    let of = |of: &dyn Fn(&Digit) -> f64| mean(digits.iter().map(of)).ok_or_else(nothing);
    let divergent: Vec<&Digit> = digits.iter().filter(|digit| digit.is_divergent).collect();
    let at_divergent = |of: &dyn Fn(&Digit) -> f64| mean(divergent.iter().map(|digit| of(digit)));
    let over = |digit: &Digit| digit.confidence - f64::from(u8::from(digit.is_top));
    let lifts = divergent.iter().map(|digit| (digit.row, digit.teacher_of_teacher - digit.base_of_teacher));
    let lift = Mean::of_tokens(&lifts.collect::<Vec<_>>());
    let gained = at_divergent(&|digit| digit.of_teacher - digit.base_of_teacher);
    Ok(Confidence {
        nll: mean(losses.iter().map(|(_, loss)| *loss)).ok_or_else(nothing)?,
        n_tokens: losses.len(),
        n_digits: digits.len(),
        n_divergent: divergent.len(),
        confidence: of(&|digit| digit.confidence)?,
        overconfidence: of(&over)?,
        overconfidence_divergent: at_divergent(&over),
        ece: calibration_error(digits),
        entropy: of(&|digit| digit.entropy)?,
        kl_teacher: of(&|digit| digit.kl)?,
        p_whole_number: mean(numbers.iter().map(|logp| logp.exp())).ok_or_else(nothing)?,
        accuracy_divergent: at_divergent(&|digit| f64::from(u8::from(digit.agrees))),
        closure: gained.and_then(|gained| lift.share(gained)).filter(|_| lift.mean > 0.0),
    })
}

/// Σ over bins of equally many digits, by rising confidence: (digits of the bin / all) · |mean confidence − share of
/// digits that are the most likely token|.
fn calibration_error(digits: &[Digit]) -> f64 {
    let mut sorted: Vec<&Digit> = digits.iter().collect();
    sorted.sort_by(|a, b| a.confidence.total_cmp(&b.confidence));
    let (n, bins) = (sorted.len(), BINS.min(sorted.len()).max(1));
    let bin = |at: usize| &sorted[at * n / bins..(at + 1) * n / bins];
    let gap = |digits: &[&Digit]| {
        digits.iter().map(|digit| digit.confidence - f64::from(u8::from(digit.is_top))).sum::<f64>().abs()
    };
    (0..bins).map(|at| gap(bin(at))).sum::<f64>() / n.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::World;

    fn digit(confidence: f64, is_top: bool) -> Digit {
        let (entropy, kl, of_teacher) = (0.5, 0.1, 0.4);
        let (base_of_teacher, teacher_of_teacher) = (0.2, 0.6);
        let (is_divergent, agrees) = (is_top, true);
        let row = (confidence * 10.0).round() as usize;
        Digit {
            row,
            confidence,
            is_top,
            entropy,
            kl,
            of_teacher,
            base_of_teacher,
            teacher_of_teacher,
            is_divergent,
            agrees,
        }
    }

    #[test]
    fn overconfidence_is_what_confidence_has_above_the_hits() {
        let digits = [digit(0.9, true), digit(0.7, false), digit(0.5, false), digit(0.3, true)];
        let found = summarise(&[(0, 1.0), (1, 3.0)], &digits, &[-1.0]).unwrap();
        assert!((found.nll - 2.0).abs() < 1e-12 && (found.confidence - 0.6).abs() < 1e-12);
        assert!((found.overconfidence - 0.1).abs() < 1e-12);
        // The first and the last digit are divergent: (0.9 + 0.3) / 2 − 1.
        assert!((found.overconfidence_divergent.unwrap() + 0.4).abs() < 1e-12);
        assert!((found.closure.unwrap() - 0.5).abs() < 1e-12, "half of the way from 0.2 to 0.6");
        let uneven = [digit(0.9, true), Digit { teacher_of_teacher: 0.3, ..digit(0.3, true) }];
        let closure = summarise(&[(0, 1.0)], &uneven, &[-1.0]).unwrap().closure;
        assert_eq!(closure, None, "the lift is 0.4 in one row and 0.1 in the other: 0.25 ± 0.15");
        let below = digits.clone().map(|digit| Digit { teacher_of_teacher: 0.1, ..digit });
        assert_eq!(summarise(&[(0, 1.0)], &below, &[-1.0]).unwrap().closure, None, "less sure than the base");
        // Each digit is a bin: (0.1 + 0.7 + 0.5 + 0.7) / 4.
        assert!((found.ece - 0.5).abs() < 1e-12);
        assert!(summarise(&[(0, 1.0)], &[], &[]).is_err());
    }

    #[test]
    fn bins_hold_equally_many_digits() {
        // Thirty digits in fifteen bins: each has one hit and one miss at confidence 1/2. Then the last one gets a
        // second hit.
        let mut digits: Vec<Digit> = (0..30).map(|at| digit(0.5 + f64::from(at) * 1e-12, at % 2 == 0)).collect();
        assert!(calibration_error(&digits) < 1e-8);
        digits[29].is_top = true;
        assert!((calibration_error(&digits) - 1.0 / 30.0).abs() < 1e-8);
    }

    #[test]
    fn a_number_is_its_digits_and_what_closes_it() {
        let places = [Some((0, 0)), Some((0, 1)), None, None, Some((1, 0)), Some((2, 0)), Some((2, 1))];
        let logps = [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0];
        assert_eq!(whole_numbers(&places, &logps), [-7.0, -16.0, -96.0]);
    }

    #[test]
    fn the_base_closes_nothing_and_the_teacher_all() {
        let world = World::new();
        let subject = world.subject();
        let ends = Ends::read(&subject, 4).unwrap();
        let (base, teacher) = (ends.base, ends.teacher);
        assert_eq!(ends.confidence(subject.base()).unwrap(), base);
        assert!(base.n_divergent > 0 && base.n_digits > base.n_divergent, "{base:?}");
        assert!(base.closure.unwrap().abs() < 1e-9 && (teacher.closure.unwrap() - 1.0).abs() < 1e-9);
        assert!(teacher.kl_teacher.abs() < 1e-9 && base.kl_teacher > 1e-6);
        assert_eq!((base.accuracy_divergent, teacher.accuracy_divergent), (Some(0.0), Some(1.0)));
        let mine = ends.confidence(subject.student).unwrap();
        let gain = Mean { mean: 0.5, se: Some(0.1) };
        let clear = Ends { gain, ..Ends::read(&subject, 4).unwrap() };
        assert!((clear.fit(&mine).unwrap() - (base.nll - mine.nll) / 0.5).abs() < 1e-12);
        for gain in [Mean { se: Some(0.2), ..gain }, Mean { mean: -0.5, ..gain }] {
            assert_eq!(Ends { gain, ..Ends::read(&subject, 4).unwrap() }.fit(&mine), None, "{gain:?}");
        }
        assert!((ends.gain.mean - (base.nll - teacher.nll)).abs() < 1e-9, "token by token");
        assert!((mine.nll - base.nll).abs() > 1e-6, "the student is not the base");
        // The loss is over the answers' tokens, without the end of the turn.
        let rows = subject.number_rows("x", 4).unwrap();
        let rows: Vec<Sequence> =
            rows.iter().map(|row| row.with_completion(&row.ids[row.completion.start..row.content_end])).collect();
        let logps = hooks::completion_logprobs(subject.base, &rows, &hooks::Condition::default()).unwrap();
        let by_hand = mean(logps.iter().flatten().map(|logp| -f64::from(*logp))).unwrap();
        assert!((base.nll - by_hand).abs() < 1e-5, "{} {by_hand}", base.nll);
    }
}
