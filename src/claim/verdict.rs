//! Compares each test's estimate with its expectation, and decides the verdict from the tests.

use std::fmt;

use analyses::inference::holm;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::estimate::{LEVEL, Outcomes, estimate};
use super::file::{Claim, Kind, Role, Test};
use super::outcome::OutcomeRow;
use super::study::Size;

/// The outcome of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole interval is in the expected range.
    Holds,
    /// The whole interval is outside the expected range.
    Fails,
    /// The interval is partly inside and partly outside.
    Undecided,
}

/// A test and its outcome; a line of `tests.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestRow {
    /// The sentence that is tested.
    pub test: String,
    /// Its purpose: `test` (the claim), `premise` (that there is an effect), `control`.
    pub role: Role,
    /// The method of estimation: `mean`, `difference`, `recovered`, `slope`, `rise`, `fall`, `peak_spread`, `diagonal`.
    pub kind: Kind,
    /// The trait of the line; `all` is the mean over traits, which decides.
    pub target: String,
    /// Number of data sets that the interval is over.
    pub n_datasets: usize,
    /// Number of trained students that the estimate is from.
    pub n_runs: usize,
    /// The estimate, in the unit of the quantity (for a slope, per unit of its axis; for `recovered`, a share); empty
    /// if there is none.
    pub estimate: Option<f64>,
    /// Low end of the 95 % interval; empty if there is none.
    pub low: Option<f64>,
    /// High end of the 95 % interval; empty if there is none.
    pub high: Option<f64>,
    /// Two-sided p of "the estimate is zero", by Student's t over data sets; for `diagonal` and `peak_spread`
    /// one-sided, by permutation; empty if there is none.
    pub p: Option<f64>,
    /// Two-sided p of "the estimate is zero", by flipping the data sets' signs in all ways; empty if that is not
    /// possible.
    pub p_sign_flip: Option<f64>,
    /// `p` adjusted for the number of traits by Holm; for lines of single traits only.
    pub p_holm: Option<f64>,
    /// The range in which the interval is expected.
    pub expected: String,
    /// `holds`, `fails` or `undecided`.
    pub outcome: Outcome,
    /// The reason that there is no estimate, or a remark on it.
    pub note: String,
}

/// The verdict on a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// All tests and controls hold.
    Supported,
    /// A test fails, and the premises hold.
    NotSupported,
    /// All other cases.
    Undecided,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(["supported", "not supported", "undecided"][*self as usize])
    }
}

/// A claim's verdict and its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The verdict.
    pub word: Word,
    /// The reason, in a few words.
    pub because: String,
    /// Verdict, reason and numbers, including the controls'.
    pub line: String,
}

impl Verdict {
    /// Decides the verdict at a size.
    pub fn of(claim: &Claim, size: Size, rows: &[TestRow]) -> Self {
        let (word, because) = Self::decide(rows);
        let numbers: Vec<String> = rows.iter().filter(|row| row.target == ALL).map(TestRow::phrase).collect();
        let line =
            format!("Claim {} at {size} size: {word}, as {because}. Numbers: {}.", claim.claim, numbers.join("; "));
        Self { word, because, line }
    }

    /// The verdict and its reason. If a premise does not hold, a claim is undecided; otherwise, if a test fails, it is
    /// not supported. It is supported only if all tests and controls hold.
    pub(super) fn decide(rows: &[TestRow]) -> (Word, String) {
        let deciding: Vec<&TestRow> = rows.iter().filter(|row| row.target == ALL).collect();
        let of_role = |role: Role| deciding.iter().filter(move |row| row.role == role);
        let not_held = |role: Role| of_role(role).find(|row| row.outcome != Outcome::Holds);
        let failed = of_role(Role::Test).find(|row| row.outcome == Outcome::Fails);
        if let Some(premise) = not_held(Role::Premise) {
            (Word::Undecided, format!("there is no clear effect to speak of ({:?} {})", premise.test, premise.outcome))
        } else if let Some(failed) = failed {
            (Word::NotSupported, format!("{:?} fails", failed.test))
        } else if let Some(open) = not_held(Role::Test) {
            (Word::Undecided, format!("{:?} {}", open.test, open.outcome))
        } else if let Some(control) = not_held(Role::Control) {
            (Word::Undecided, format!("its tests hold, but the control {:?} {}", control.test, control.outcome))
        } else {
            (Word::Supported, "its tests and controls hold".to_owned())
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(["holds", "fails", "is undecided"][*self as usize])
    }
}

impl TestRow {
    /// The estimate and its interval as text, `+0.72 (0.61 to 0.83)`.
    pub fn number(&self) -> String {
        let text = match (self.estimate, self.low, self.high, self.p) {
            (Some(estimate), Some(low), Some(high), _) => format!("{estimate:+.3} ({low:.3} to {high:.3})"),
            (Some(estimate), _, _, Some(p)) => format!("{estimate:+.3}, p {p:.3}"),
            (Some(estimate), ..) => format!("{estimate:+.3}"),
            _ => "none".to_owned(),
        };
        text.replace('-', "\u{2212}")
    }

    /// The estimate and its interval for a page's table, `+0.72 (+0.61 to +0.83)`.
    pub(super) fn short_number(&self) -> String {
        let Some(estimate) = self.estimate else { return "none".to_owned() };
        let digits = if estimate.abs() >= 0.1 { 2 } else { 3 };
        let signed = |value: f64| format!("{value:+.digits$}").replace('-', "\u{2212}");
        match (self.low, self.high, self.p) {
            (Some(low), Some(high), _) => format!("{} ({} to {})", signed(estimate), signed(low), signed(high)),
            (_, _, Some(p)) => format!("{}, p {p:.2}", signed(estimate)),
            _ => signed(estimate),
        }
    }

    /// The row as text: `control, NAME: +0.72 (0.61 to 0.83 over 5 data sets, expected above 0.5)`.
    fn phrase(&self) -> String {
        let role = match self.role {
            Role::Test => "",
            Role::Premise => "premise, ",
            Role::Control => "control, ",
        };
        let number = match (self.estimate, self.low, self.high) {
            (Some(estimate), Some(low), Some(high)) => format!(
                "{estimate:+.3} ({low:+.3} to {high:+.3} over {} data sets, expected {})",
                self.n_datasets, self.expected
            ),
            (Some(estimate), ..) => format!(
                "{estimate:+.3}{} (no interval: {}, expected {})",
                self.p.map_or_else(String::new, |p| format!(", p {p:.3}")),
                self.note,
                self.expected
            ),
            _ => format!("no number ({})", self.note),
        };
        format!("{role}{}: {number}", self.test)
    }
}

/// The value of `target` in the line over all traits, which decides.
pub const ALL: &str = "all";

/// The rows of every test: one over all traits, then one per trait if there are several.
pub fn tests(claim: &Claim, outcomes: &[OutcomeRow]) -> Result<Vec<TestRow>> {
    let mut rows = vec![];
    for test in &claim.tests {
        let context = || format!("test {:?}", test.name);
        let traits: Vec<&str> = claim.targets.iter().map(|target| target.word.as_str()).collect();
        let table = Outcomes { rows: outcomes, traits };
        rows.push(line(test, ALL, &table).with_context(context)?);
        let by_trait = !matches!(test.kind, Kind::Diagonal | Kind::PeakSpread) && table.traits.len() > 1;
        if by_trait {
            let of_trait = |word: &&str| line(test, word, &Outcomes { rows: outcomes, traits: vec![word] });
            let mut lines = table.traits.iter().map(of_trait).collect::<Result<Vec<_>>>().with_context(context)?;
            let with_p: Vec<f64> = lines.iter().filter_map(|line| line.p).collect();
            let mut adjusted = holm(&with_p)?.into_iter();
            lines.iter_mut().filter(|line| line.p.is_some()).for_each(|line| line.p_holm = adjusted.next());
            rows.append(&mut lines);
        }
    }
    Ok(rows)
}

fn line(test: &Test, target: &str, table: &Outcomes<'_>) -> Result<TestRow> {
    let found = estimate(test, table)?;
    let (side, sign) = if test.above.is_some() { ("above", 1.0) } else { ("below", -1.0) };
    let bound = test.above.or(test.below).unwrap_or(f64::NAN);
    let outcome = match (found.interval, found.value, found.p_one_sided) {
        // By a permutation test, the estimate is larger than chance.
        (None, Some(_), Some(p)) if p < 1.0 - LEVEL => Outcome::Holds,
        (Some((low, high)), ..) => {
            let (near, far) = if sign > 0.0 { (low, high) } else { (-high, -low) };
            if near > sign * bound {
                Outcome::Holds
            } else if far < sign * bound {
                Outcome::Fails
            } else {
                Outcome::Undecided
            }
        }
        _ => Outcome::Undecided,
    };
    Ok(TestRow {
        test: test.name.clone(),
        role: test.role,
        kind: test.kind,
        target: target.to_owned(),
        n_datasets: found.n_datasets,
        n_runs: found.n_runs,
        estimate: found.value,
        low: found.interval.map(|(low, _)| low),
        high: found.interval.map(|(_, high)| high),
        p: found.p_one_sided.or(found.p),
        p_sign_flip: found.p_sign_flip,
        p_holm: None,
        expected: format!("{side} {bound}"),
        outcome,
        note: found.note,
    })
}

#[cfg(test)]
mod tests;
