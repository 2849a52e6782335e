//! From the outcomes of runs to a verdict: each test is an estimate with its interval, compared with its expectation.
//! All of it follows from the table of outcomes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use analyses::inference::{
    bootstrap_peak, diagonal_contrast, diagonal_gamma, fieller_interval, holm, paired_t_p, peak_of, recovered_fraction,
};
use analyses::stats::{mean, sign_flip_p, t_interval};
use anyhow::{Context, Result, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Claim, Kind, Of, OutcomeRow, Over, Quantity, RankAxis, Role, Size, Test};

/// The level of all intervals.
pub(super) const LEVEL: f64 = 0.95;
/// Draws of a bootstrap, and of a permutation that is not exact.
const DRAWS: usize = 4000;
/// The seed of those draws: the same table gives the same numbers.
const SEED: u64 = 20_260_831;
/// Most data sets whose signs are flipped in all ways.
const EXACT: usize = 20;

/// What became of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole interval is where it was expected.
    Holds,
    /// The whole interval is elsewhere.
    Fails,
    /// The interval has both.
    Undecided,
}

/// A test and what became of it; a line of `tests.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestRow {
    /// What it says.
    pub test: String,
    /// What it is for: `test` (the claim), `premise` (there is an effect to speak of), `control`.
    pub role: Role,
    /// How it is estimated: `mean`, `difference`, `recovered`, `slope`, `rise`, `fall`, `peak_spread`, `diagonal`.
    pub kind: Kind,
    /// The trait that the line is about; `all` is the mean over traits, which decides.
    pub target: String,
    /// How many data sets the interval is over.
    pub n_datasets: usize,
    /// How many trained students the estimate is of.
    pub n_runs: usize,
    /// The estimate, in the unit of the quantity (of a slope, per unit of what it is over; of `recovered`, a share).
    pub estimate: Option<f64>,
    /// Low end of the 95 % interval.
    pub low: Option<f64>,
    /// High end of the 95 % interval.
    pub high: Option<f64>,
    /// Two-sided p of "it is zero": by Student's t over data sets; of `diagonal` and `peak_spread` by permutation, one-sided.
    pub p: Option<f64>,
    /// Two-sided p of "it is zero" by flipping the data sets' signs in all ways; empty if that is not possible.
    pub p_sign_flip: Option<f64>,
    /// `p` adjusted for the number of traits by Holm; for lines of single traits.
    pub p_holm: Option<f64>,
    /// Where the interval is expected.
    pub expected: String,
    /// `holds`, `fails` or `undecided`.
    pub outcome: Outcome,
    /// Why there is no estimate, or what must be known of it.
    pub note: String,
}

/// The verdict on a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// Every test holds, and every control.
    Supported,
    /// A test fails, with an effect to speak of.
    NotSupported,
    /// Anything else.
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
    /// Why, in a few words.
    pub because: String,
    /// Verdict, reason and numbers, the control's among them.
    pub line: String,
}

impl Verdict {
    /// The verdict. Without its premise a claim is undecided; else a failed test means not supported. A claim is
    /// supported only if all its tests and controls hold.
    pub fn of(claim: &Claim, size: Size, rows: &[TestRow]) -> Self {
        let deciding: Vec<&TestRow> = rows.iter().filter(|row| row.target == ALL).collect();
        let of_role = |role: Role| deciding.iter().filter(move |row| row.role == role);
        let not_held = |role: Role| of_role(role).find(|row| row.outcome != Outcome::Holds);
        let failed = of_role(Role::Test).find(|row| row.outcome == Outcome::Fails);
        let (word, because) = if let Some(premise) = not_held(Role::Premise) {
            (Word::Undecided, format!("there is no clear effect to speak of ({:?} {})", premise.test, premise.outcome))
        } else if let Some(failed) = failed {
            (Word::NotSupported, format!("{:?} fails", failed.test))
        } else if let Some(open) = not_held(Role::Test) {
            (Word::Undecided, format!("{:?} {}", open.test, open.outcome))
        } else if let Some(control) = not_held(Role::Control) {
            (Word::Undecided, format!("its tests hold, but the control {:?} {}", control.test, control.outcome))
        } else {
            (Word::Supported, "its tests and controls hold".to_owned())
        };
        let numbers: Vec<String> = deciding.iter().map(|row| row.phrase()).collect();
        let line =
            format!("Claim {} at {size} size: {word}, as {because}. Numbers: {}.", claim.claim, numbers.join("; "));
        Self { word, because, line }
    }
}

fn said(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Holds => "holds",
        Outcome::Fails => "fails",
        Outcome::Undecided => "is undecided",
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(said(*self))
    }
}

impl TestRow {
    /// The estimate and its interval as they are shown, `+0.72 (0.61 to 0.83)`.
    pub fn number(&self) -> String {
        let text = match (self.estimate, self.low, self.high, self.p) {
            (Some(estimate), Some(low), Some(high), _) => format!("{estimate:+.3} ({low:.3} to {high:.3})"),
            (Some(estimate), _, _, Some(p)) => format!("{estimate:+.3}, p {p:.3}"),
            (Some(estimate), ..) => format!("{estimate:+.3}"),
            _ => "none".to_owned(),
        };
        text.replace('-', "\u{2212}")
    }

    /// `control, NAME: +0.72 (0.61 to 0.83 over 5 data sets, expected above 0.5)`.
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

/// The name of the line that decides, in the place of a trait's.
pub const ALL: &str = "all";

/// Every test's line over all traits, then its lines trait by trait where there are several.
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
    let expected = match (test.above, test.below) {
        (Some(above), _) => format!("above {above}"),
        (_, below) => format!("below {}", below.unwrap_or(f64::NAN)),
    };
    let (sign, bound) = test.above.map_or((-1.0, test.below.unwrap_or(f64::NAN)), |above| (1.0, above));
    let outcome = match (found.interval, found.estimate, found.p_one_sided) {
        // A permutation says how large the estimate is among those of chance.
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
        estimate: found.estimate,
        low: found.interval.map(|(low, _)| low),
        high: found.interval.map(|(_, high)| high),
        p: found.p_one_sided.or(found.p),
        p_sign_flip: found.p_sign_flip,
        p_holm: None,
        expected,
        outcome,
        note: found.note,
    })
}

/// The result of a test, before it is compared with its expectation.
#[derive(Default)]
struct Found {
    estimate: Option<f64>,
    interval: Option<(f64, f64)>,
    p: Option<f64>,
    p_one_sided: Option<f64>, // of a permutation
    p_sign_flip: Option<f64>,
    n_datasets: usize,
    n_runs: usize,
    note: String,
}

impl Found {
    /// Names the runs that it leaves out.
    fn without(mut self, runs: &BTreeSet<(&str, u64)>) -> Self {
        if !runs.is_empty() {
            let names: Vec<String> =
                runs.iter().map(|(word, dataset)| format!("{word} in data set {dataset}")).collect();
            let left_out =
                format!("without {}, where the teacher's gain in loss is not clear of zero", names.join(", "));
            let notes = [std::mem::take(&mut self.note), left_out];
            self.note = notes.into_iter().filter(|note| !note.is_empty()).collect::<Vec<_>>().join("; ");
        }
        self
    }
}

fn estimate(test: &Test, table: &Outcomes<'_>) -> Result<Found> {
    let one_trait = || table.rows.windows(2).all(|two| two[0].target == two[1].target);
    if test.of.quantity == Quantity::InjectedOtherDeltaMargin && one_trait() {
        return Ok(alone(table));
    }
    match test.kind {
        Kind::Mean => {
            let values = table.by_dataset(&test.of)?;
            Ok(over_datasets(&values, table.n_runs(&[&test.of])).without(&table.without_gain(&test.of)))
        }
        Kind::Difference => {
            let minus = test.minus.as_ref().context("minus is not given")?;
            let (values, other) = (table.by_dataset(&test.of)?, table.by_dataset(minus)?);
            let values: Vec<f64> = values.iter().zip(&other).map(|(value, other)| value - other).collect();
            Ok(over_datasets(&values, table.n_runs(&[&test.of, minus])).without(&table.without_gain(&test.of)))
        }
        Kind::Recovered => recovered(test, table),
        Kind::Slope | Kind::Rise | Kind::Fall => slopes(test, table),
        Kind::PeakSpread => peak_spread(test, table),
        Kind::Diagonal => diagonal(test, table),
    }
}

/// The mean with Student's interval, as far as the data sets carry one.
fn over_datasets(values: &[f64], n_runs: usize) -> Found {
    let few = if values.len() < 2 { "one data set has no spread" } else { "" };
    Found {
        estimate: mean(values).ok(),
        interval: t_interval(values, LEVEL).ok(),
        p: paired_t_p(values).ok(),
        p_sign_flip: if (2..=EXACT).contains(&values.len()) { sign_flip_p(values).ok() } else { None },
        n_datasets: values.len(),
        n_runs,
        note: few.to_owned(),
        ..Found::default()
    }
}

fn recovered(test: &Test, table: &Outcomes<'_>) -> Result<Found> {
    let all = test.all.as_ref().context("all is not given")?;
    let (part, whole) = (table.by_dataset(&test.of)?, table.by_dataset(all)?);
    let (n_datasets, n_runs) = (part.len(), table.n_runs(&[&test.of, all]));
    if n_datasets < 2 {
        // With one data set there is no error that could show the denominator clear of zero.
        let note =
            format!("{:+.3} of {:+.3} nats; one data set has no spread, so that no share is given", part[0], whole[0]);
        return Ok(Found { n_datasets, n_runs, note, ..Found::default() });
    }
    let runs: Vec<(f64, f64, f64)> = part.iter().zip(&whole).map(|(part, whole)| (*part, 0.0, *whole)).collect();
    let found = recovered_fraction(&runs, LEVEL, DRAWS, SEED)?;
    let note = format!("{:+.3} of {:+.3} nats", found.numerator, found.denominator);
    Ok(match found.fraction {
        Some(share) => {
            let interval = fieller_interval(&part, &whole, LEVEL)?;
            let open = if interval.is_none() { "; the whole is not clear of zero at this level" } else { "" };
            let note = format!("{note}; by the bootstrap {:.3} to {:.3}{open}", share.low, share.high);
            Found { estimate: Some(share.estimate), interval, n_datasets, n_runs, note, ..Found::default() }
        }
        None => Found {
            n_datasets,
            n_runs,
            note: format!("{note}: the whole is not three standard errors clear of zero"),
            ..Found::default()
        },
    })
}

/// Slopes within each data set, on the kind's side of the peak. The other data sets locate the peak: a series' own peak
/// is where its noise is highest, so that noise alone would rise up to it.
fn slopes(test: &Test, table: &Outcomes<'_>) -> Result<Found> {
    let over =
        if test.kind == Kind::Slope { test.over.context("over is not given")? } else { Over::Rank(RankAxis::Log2Rank) };
    let series = table.series(&test.of, over)?;
    let n_runs = table.n_runs(&[&test.of]);
    if test.kind == Kind::Slope {
        let values: Option<Vec<f64>> = series.iter().map(|points| least_squares(points)).collect();
        return Ok(over_datasets(&values.context("its points lie at one place, and a slope takes two")?, n_runs));
    }
    let mut places: Vec<f64> = series.concat().into_iter().map(|(x, _)| x).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    ensure!(places.len() > 1, "{} has one rank, and a slope takes two", test.of);
    let (first, last) = (places[0], places[places.len() - 1]);
    let of_side = |at: usize| -> Result<f64> {
        let others: Vec<(f64, f64)> = if series.len() == 1 {
            series[0].clone()
        } else {
            series.iter().enumerate().filter(|(other, _)| *other != at).flat_map(|(_, points)| points.clone()).collect()
        };
        let peak = peak_of(&others)?;
        // With the peak at that end, the slope is between the last two ranks (of a rise, the first two).
        let keep = |x: f64| match test.kind {
            Kind::Rise => x <= places[1].max(peak),
            _ => x >= places[places.len() - 2].min(peak),
        };
        let side: Vec<(f64, f64)> = series[at].iter().copied().filter(|(x, _)| keep(*x)).collect();
        least_squares(&side).context("a data set lacks ranks on that side")
    };
    let values = (0..series.len()).map(of_side).collect::<Result<Vec<f64>>>()?;
    let peak = peak_of(&series.concat())?;
    let at_end = peak.to_bits() == first.to_bits() || peak.to_bits() == last.to_bits();
    let end = if at_end { ", an end of the ranks" } else { "" };
    let spread = if series.len() > 1 {
        let found = bootstrap_peak(&series, LEVEL, DRAWS, SEED)?;
        format!(" ({:.0} to {:.0} by a bootstrap over data sets)", found.low.exp2(), found.high.exp2())
    } else {
        String::new()
    };
    let note = format!("the mean is highest at rank {}{spread}{end}", peak.exp2());
    Ok(Found { note, ..over_datasets(&values, n_runs) })
}

/// The slope of a line through points at two places or more.
fn least_squares(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let (x, y) = (points.iter().map(|(x, _)| x).sum::<f64>() / n, points.iter().map(|(_, y)| y).sum::<f64>() / n);
    let (xx, xy) = points.iter().fold((0.0, 0.0), |(xx, xy), (a, b)| (xx + (a - x).powi(2), xy + (a - x) * (b - y)));
    (xx > 0.0).then(|| xy / xx)
}

/// The comparison of traits has nothing to say of a single one.
fn alone(table: &Outcomes<'_>) -> Found {
    Found {
        n_datasets: table.datasets().len(),
        note: "it takes two traits, and there is one".to_owned(),
        ..Found::default()
    }
}

fn peak_spread(test: &Test, table: &Outcomes<'_>) -> Result<Found> {
    if table.traits.len() < 2 {
        return Ok(alone(table));
    }
    let of_trait = |word: &&str| {
        let alone = Outcomes { rows: table.rows, traits: vec![word] };
        alone.series(&test.of, Over::Rank(RankAxis::Log2Rank))
    };
    let by_trait: Vec<Vec<Vec<(f64, f64)>>> = table.traits.iter().map(of_trait).collect::<Result<_>>()?;
    let spread = |by_trait: &[Vec<&Vec<(f64, f64)>>]| -> Result<f64> {
        let peaks = by_trait
            .iter()
            .map(|datasets| peak_of(&datasets.iter().flat_map(|points| points.iter().copied()).collect::<Vec<_>>()));
        let peaks: Vec<f64> = peaks.collect::<std::result::Result<_, _>>()?;
        let (low, high) = peaks
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), peak| (low.min(*peak), high.max(*peak)));
        Ok(high - low)
    };
    let n_datasets = by_trait[0].len();
    let actual: Vec<Vec<&Vec<(f64, f64)>>> = by_trait.iter().map(|datasets| datasets.iter().collect()).collect();
    let found = spread(&actual)?;
    // Were the traits alike, each data set's series could be any trait's.
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut as_large = 1;
    for _ in 1..DRAWS {
        let mut drawn: Vec<Vec<&Vec<(f64, f64)>>> = vec![vec![]; by_trait.len()];
        for dataset in 0..n_datasets {
            let mut order: Vec<usize> = (0..by_trait.len()).collect();
            order.shuffle(&mut rng);
            order.into_iter().enumerate().for_each(|(at, from)| drawn[at].push(&by_trait[from][dataset]));
        }
        as_large += usize::from(spread(&drawn)? >= found - 1e-9);
    }
    Ok(Found {
        estimate: Some(found),
        p_one_sided: Some(as_large as f64 / DRAWS as f64),
        n_datasets,
        n_runs: table.n_runs(&[&test.of]),
        note: "a largest difference is above 0 by chance as well, so that its p decides".to_owned(),
        ..Found::default()
    })
}

fn diagonal(test: &Test, table: &Outcomes<'_>) -> Result<Found> {
    if table.traits.len() < 2 {
        return Ok(alone(table));
    }
    let position = |word: &str| table.traits.iter().position(|known| *known == word);
    // A run is a trained student: its row of the matrix is what it does to every trait.
    let mut runs: BTreeMap<(u64, usize, usize), Vec<Option<f64>>> = BTreeMap::new();
    for row in table.matching(&test.of) {
        let (Some(trained), Some(evaluated)) = (position(&row.target), position(&row.evaluated)) else { continue };
        let cells =
            runs.entry((row.dataset, trained, row.seed_index)).or_insert_with(|| vec![None; table.traits.len()]);
        cells[evaluated] = Some(row.value);
    }
    let mut changes: Vec<(u64, usize, Vec<f64>)> = vec![];
    for ((dataset, trained, _), cells) in runs {
        let cells: Option<Vec<f64>> = cells.into_iter().collect();
        let word = table.traits[trained];
        changes.push((
            dataset,
            trained,
            cells.with_context(|| format!("the row of {word} in data set {dataset} has gaps"))?,
        ));
    }
    let datasets: BTreeSet<u64> = changes.iter().map(|(dataset, ..)| *dataset).collect();
    let of = |keep: &dyn Fn(u64) -> bool| -> (Vec<usize>, Vec<Vec<f64>>) {
        let kept = changes.iter().filter(|(dataset, ..)| keep(*dataset));
        kept.map(|(_, trained, row)| (*trained, row.clone())).unzip()
    };
    let by_dataset = datasets.iter().map(|dataset| {
        let (trained, rows) = of(&|other| other == *dataset);
        diagonal_gamma(&rows, &trained)
    });
    let found = over_datasets(&by_dataset.collect::<hooks::Result<Vec<f64>>>()?, changes.len());
    let (trained, rows) = of(&|_| true);
    if trained.len() * table.traits.len() <= trained.len() + table.traits.len() {
        return Ok(Found { p: None, note: "too few runs for a permutation".to_owned(), ..found });
    }
    let all = diagonal_contrast(&rows, &trained, SEED)?;
    let how = if all.is_exact { "all" } else { "drawn" };
    Ok(Found {
        p: Some(all.p),
        note: format!("p of {} {how} permutations of the runs' traits", all.n_permutations),
        ..found
    })
}

/// The outcomes, and their traits.
struct Outcomes<'a> {
    rows: &'a [OutcomeRow],
    traits: Vec<&'a str>,
}

impl<'a> Outcomes<'a> {
    /// The lines that a number is the mean of, evaluated on any trait.
    fn matching(&self, of: &'a Of) -> impl Iterator<Item = &'a OutcomeRow> + use<'a, '_> {
        let of = of.clone();
        self.rows.iter().filter(move |row| {
            row.student == of.student
                && of.rank.is_none_or(|rank| row.rank == Some(rank))
                && (of.cell == "*" || row.cell == of.cell)
                && row.quantity == of.quantity
                && self.traits.contains(&row.target.as_str())
        })
    }

    /// The outcomes of the trained trait alone.
    fn own(&self, of: &'a Of) -> impl Iterator<Item = &'a OutcomeRow> + use<'a, '_> {
        self.matching(of).filter(|row| row.evaluated == row.target)
    }

    /// The data sets that there are.
    fn datasets(&self) -> BTreeSet<u64> {
        self.rows.iter().map(|row| row.dataset).collect()
    }

    fn n_runs(&self, numbers: &[&'a Of]) -> usize {
        let runs = numbers.iter().flat_map(|of| self.own(of));
        runs.map(|row| (&row.target, row.dataset, &row.student, row.rank, row.seed_index))
            .collect::<BTreeSet<_>>()
            .len()
    }

    /// Runs, by trait and data set, in which no student has a share of the teacher's gain, as that is not clear of zero.
    fn without_gain(&self, of: &Of) -> BTreeSet<(&'a str, u64)> {
        let has = |word: &str, dataset: u64| {
            let mut of_run = self.rows.iter().filter(|row| row.target == word && row.dataset == dataset);
            of_run.any(|row| row.quantity == of.quantity)
        };
        let runs = self.traits.iter().flat_map(|word| self.datasets().into_iter().map(move |dataset| (*word, dataset)));
        runs.filter(|(word, dataset)| of.quantity == Quantity::Fit && !has(word, *dataset)).collect()
    }

    /// Per data set, the mean over traits of each trait's mean over seeds. Every trait has to be there in every data set,
    /// except in runs without a gain.
    fn by_dataset(&self, of: &'a Of) -> Result<Vec<f64>> {
        let mut ranks = self.own(of).map(|row| row.rank).collect::<BTreeSet<_>>();
        ensure!(ranks.len() <= 1, "{of} has the ranks {ranks:?}, expected one; hint: name it with rank = 8");
        ensure!(ranks.pop_first().is_some(), "{of} was not measured");
        let left_out = self.without_gain(of);
        let of_run = |word: &str, dataset: u64| {
            let here = self.own(of).filter(|row| row.dataset == dataset && row.target == word);
            mean(&here.map(|row| row.value).collect::<Vec<_>>())
                .with_context(|| format!("{of} was not measured for {word} in data set {dataset}"))
        };
        let of_dataset = |dataset: u64| {
            let there = self.traits.iter().filter(|word| !left_out.contains(&(**word, dataset)));
            there.map(|word| of_run(word, dataset)).collect::<Result<Vec<f64>>>()
        };
        let values = self.datasets().into_iter().map(of_dataset).collect::<Result<Vec<Vec<f64>>>>()?;
        Ok(values
            .iter()
            .filter(|values| !values.is_empty())
            .map(|values| mean(values))
            .collect::<hooks::Result<_>>()?)
    }

    /// Per data set, points of a number over the rank or over another quantity, each the mean over traits and seeds at one rank in
    /// one condition.
    fn series(&self, of: &'a Of, over: Over) -> Result<Vec<Vec<(f64, f64)>>> {
        let means = |of: &Of, dataset: u64| -> Result<BTreeMap<(Option<i64>, String), f64>> {
            let mut found: BTreeMap<(Option<i64>, String), Vec<f64>> = BTreeMap::new();
            let table = Outcomes { rows: self.rows, traits: self.traits.clone() };
            for row in table.rows.iter().filter(|row| {
                row.dataset == dataset
                    && row.student == of.student
                    && (of.cell == "*" || row.cell == of.cell)
                    && of.rank.is_none_or(|rank| row.rank == Some(rank))
                    && row.quantity == of.quantity
                    && row.evaluated == row.target
                    && table.traits.contains(&row.target.as_str())
            }) {
                found.entry((row.rank, row.cell.clone())).or_default().push(row.value);
            }
            found.into_iter().map(|(key, values)| Ok((key, mean(&values)?))).collect()
        };
        let one = |dataset: u64| -> Result<Vec<(f64, f64)>> {
            let ys = means(of, dataset)?;
            ensure!(!ys.is_empty(), "{of} was not measured in data set {dataset}");
            let xs = match over {
                Over::Rank(_) => None,
                Over::Quantity(quantity) => Some(means(&Of { quantity, ..of.clone() }, dataset)?),
            };
            ys.into_iter()
                .map(|(key, y)| {
                    let x = match &xs {
                        None => (key.0.with_context(|| format!("{of} has no rank"))? as f64).log2(),
                        Some(xs) => *xs
                            .get(&key)
                            .with_context(|| format!("{of} has no {over:?} at {key:?} in data set {dataset}"))?,
                    };
                    Ok((x, y))
                })
                .collect()
        };
        self.datasets().into_iter().map(one).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Outcome::{Fails, Holds, Undecided};
    use super::*;
    use crate::claim::Claim;

    /// Two traits, data sets as many as `effects`, a student whose effect is given, and a control student around zero.
    fn outcomes(effects: &[f64]) -> Vec<OutcomeRow> {
        let mut rows = vec![];
        for (dataset, effect) in effects.iter().enumerate() {
            for (at, target) in ["cat", "owl"].into_iter().enumerate() {
                let row = |student: &str, rank: i64, cell: &str, evaluated: &str, value: f64| OutcomeRow {
                    target: target.to_owned(),
                    dataset: dataset as u64,
                    student: student.to_owned(),
                    rank: Some(rank),
                    seed_index: 0,
                    cell: cell.to_owned(),
                    evaluated: evaluated.to_owned(),
                    quantity: Quantity::DeltaMargin,
                    value,
                    n: 1,
                };
                let wobble = 0.01 * (dataset as f64 - 1.0) + 0.02 * at as f64;
                rows.push(row("student", 8, "everywhere", target, effect + wobble));
                rows.push(row("student", 8, "part", target, 0.7 * (effect + wobble)));
                rows.push(row("student", 8, "everywhere", if target == "cat" { "owl" } else { "cat" }, 0.1 * wobble));
                rows.push(row(
                    "control student",
                    8,
                    "everywhere",
                    target,
                    wobble * if dataset % 2 == 0 { 1.0 } else { -1.0 },
                ));
                for (rank, height) in [(1, 0.0), (2, 0.5), (4, 1.0), (8, 0.6), (16, 0.2)] {
                    rows.push(row("ranked", rank, "everywhere", target, height * effect + wobble * 0.3));
                }
            }
        }
        rows
    }

    fn claim(tests: &str) -> Claim {
        let head = "claim = 1\nstatement = \"s\"\nsource = \"x\"\ndecisive_control = \"c\"\ndatasets = 4\n\
                    targets = [{ word = \"cat\", category = \"animal\" }, { word = \"owl\", category = \"animal\" }]\nfigures = []\n";
        toml::from_str(&format!("{head}{tests}")).unwrap()
    }

    fn first(tests_text: &str, rows: &[OutcomeRow]) -> TestRow {
        tests(&claim(tests_text), rows).unwrap().remove(0)
    }

    const EFFECT: &str =
        "[[tests]]\nname = \"effect\"\nkind = \"difference\"\nminus = { student = \"control student\" }\nabove = 0\n";

    #[test]
    fn a_difference_is_paired_and_over_data_sets() {
        let found = first(EFFECT, &outcomes(&[1.0, 1.2, 0.8, 1.0]));
        assert_eq!((found.n_datasets, found.n_runs, found.outcome), (4, 16, Holds));
        // By hand: student minus control in data set d is e_d + w_d − s_d w_d of w_d = 0.01 (d − 1) + 0.01 and signs + − + −.
        let by_hand = [1.0 + 0.0, 1.2 + 0.02, 0.8 + 0.0, 1.0 + 0.06];
        assert!((found.estimate.unwrap() - mean(&by_hand).unwrap()).abs() < 1e-12, "{found:?}");
        let (low, high) = t_interval(&by_hand, LEVEL).unwrap();
        assert!((found.low.unwrap() - low).abs() < 1e-12 && (found.high.unwrap() - high).abs() < 1e-12);
        assert!((found.p_sign_flip.unwrap() - 0.125).abs() < 1e-12, "2 of 16 sign patterns");
        assert_eq!(first(EFFECT, &outcomes(&[0.3, -0.3, 0.2, -0.1])).outcome, Undecided);
        assert_eq!(first(EFFECT, &outcomes(&[-1.0, -1.2, -0.8, -1.0])).outcome, Fails);
        let alone = first(EFFECT, &outcomes(&[1.0]));
        assert_eq!((alone.outcome, alone.low), (Undecided, None), "one data set decides nothing");
    }

    #[test]
    fn traits_have_lines_of_their_own_that_decide_nothing() {
        let rows = tests(&claim(EFFECT), &outcomes(&[1.0, 1.2, 0.8, 1.0])).unwrap();
        let targets: Vec<&str> = rows.iter().map(|row| row.target.as_str()).collect();
        assert_eq!(targets, [ALL, "cat", "owl"]);
        assert!(rows[0].p_holm.is_none() && rows[1].p_holm.unwrap() >= rows[1].p.unwrap());
    }

    #[test]
    fn a_share_is_told_only_of_an_effect() {
        let share =
            "[[tests]]\nname = \"share\"\nkind = \"recovered\"\nof = { cell = \"part\" }\nall = {}\nabove = 0.5\n";
        let found = first(share, &outcomes(&[1.0, 1.2, 0.8, 1.0]));
        assert!((found.estimate.unwrap() - 0.7).abs() < 1e-12 && found.outcome == Holds, "{found:?}");
        let none = first(share, &outcomes(&[0.3, -0.3, 0.2, -0.1]));
        assert!(
            none.estimate.is_none() && none.outcome == Undecided && none.note.contains("not three standard errors")
        );
        let alone = first(share, &outcomes(&[1.0]));
        assert!(alone.estimate.is_none() && alone.note.contains("no share is given"), "{alone:?}");
    }

    #[test]
    fn a_rise_and_a_fall_are_on_the_sides_of_the_peak() {
        let text = |kind: &str, bound: &str| {
            format!("[[tests]]\nname = \"x\"\nkind = \"{kind}\"\nof = {{ student = \"ranked\" }}\n{bound} = 0\n")
        };
        let rows = outcomes(&[1.0, 1.2, 0.8, 1.0]);
        let (rise, fall) = (first(&text("rise", "above"), &rows), first(&text("fall", "below"), &rows));
        assert!((rise.estimate.unwrap() - 0.5).abs() < 1e-9 && rise.outcome == Holds, "{rise:?}");
        assert!((fall.estimate.unwrap() + 0.4).abs() < 1e-9 && fall.outcome == Holds, "{fall:?}");
        assert!(fall.note.contains("highest at rank 4"));
        // Without what is behind the peak, nothing falls.
        let rising: Vec<OutcomeRow> = rows
            .into_iter()
            .filter(|row| row.rank != Some(8) || row.student != "ranked")
            .filter(|row| row.rank != Some(16))
            .collect();
        let none = first(&text("fall", "below"), &rising);
        assert!(none.outcome == Fails && none.note.contains("an end of the ranks"), "{none:?}");
    }

    #[test]
    fn a_trait_moves_in_its_own_students_alone() {
        let diagonal = "[[tests]]\nname = \"x\"\nkind = \"diagonal\"\nabove = 0\n";
        let found = first(diagonal, &outcomes(&[1.0, 1.2, 0.8, 1.0]));
        assert_eq!((found.n_runs, found.outcome), (8, Holds));
        // Of two traits γ is the mean of the diagonal minus the mean of the rest.
        let by_hand = [1.0 + 0.0, 1.2 + 0.01, 0.8 + 0.02, 1.0 + 0.03]
            .iter()
            .zip([0.0, 0.01, 0.02, 0.03])
            .map(|(d, w)| d - 0.1 * w);
        let by_hand = mean(&by_hand.collect::<Vec<f64>>()).unwrap();
        assert!((found.estimate.unwrap() - by_hand).abs() < 1e-9, "{found:?} {by_hand}");
        assert!(found.p.unwrap() < 0.02, "8 runs of 2 traits have 70 patterns: {found:?}");
    }

    #[test]
    fn what_compares_traits_says_nothing_of_one() {
        let mut one = claim("[[tests]]\nname = \"x\"\nkind = \"diagonal\"\nabove = 0\n");
        one.targets.truncate(1);
        let found = tests(&one, &outcomes(&[1.0, 1.2, 0.8])).unwrap().remove(0);
        assert!(found.estimate.is_none() && found.outcome == Undecided && found.note.contains("takes two traits"));
    }

    #[test]
    fn peaks_lie_apart_where_traits_differ_and_not_by_chance() {
        let spread = "[[tests]]\nname = \"x\"\nkind = \"peak_spread\"\nof = { student = \"ranked\" }\nabove = 0\n";
        let same = outcomes(&[1.0, 1.2, 0.8, 1.0, 1.1]);
        let found = first(spread, &same);
        assert!(found.estimate.unwrap().abs() < 1e-12 && found.outcome == Undecided, "{found:?}");
        // The owl's series turned round: it is highest at rank 4 still; shifted by two ranks, at 16.
        let shifted = same.into_iter().map(|mut row| {
            if row.target == "owl" && row.student == "ranked" {
                row.value = row.rank.map_or(0.0, |rank| (rank as f64).log2()) + 0.01 * row.dataset as f64;
            }
            row
        });
        let found = first(spread, &shifted.collect::<Vec<_>>());
        assert!((found.estimate.unwrap() - 2.0).abs() < 1e-12, "{found:?}");
        // Of the 32 ways to exchange two traits in five data sets, those where one trait has none or one of the steep
        // series.
        assert!((found.p.unwrap() - 12.0 / 32.0).abs() < 0.03, "{found:?}");
    }

    #[test]
    fn a_slope_over_another_quantity_takes_both_at_one_place() {
        let mut rows = outcomes(&[1.0, 1.2, 0.8]);
        let more: Vec<OutcomeRow> = rows
            .iter()
            .filter(|row| row.student == "ranked")
            .map(|row| OutcomeRow { quantity: Quantity::CosTeacher, value: 3.0 * row.value - 1.0, ..row.clone() })
            .collect();
        rows.extend(more);
        let text = "[[tests]]\nname = \"x\"\nkind = \"slope\"\nof = { student = \"ranked\", quantity = \"cos_teacher\" }\nover = \"delta_margin\"\nabove = 0\n";
        let found = first(text, &rows);
        assert!((found.estimate.unwrap() - 3.0).abs() < 1e-9, "{found:?}");
        rows.retain(|row| row.quantity != Quantity::DeltaMargin || row.rank != Some(4));
        assert!(tests(&claim(text), &rows).is_err(), "a point without its place");
    }

    /// With numbers that are chance alone, an effect is called as seldom as the level says: with a 95 % interval one
    /// time in forty on the tested side, and one time in twenty by a permutation.
    #[test]
    fn a_null_is_not_called_an_effect_more_often_than_the_level_says() {
        use rand::Rng;
        let kinds = [
            ("kind = \"mean\"\nabove = 0", 400, 0.05),
            ("kind = \"difference\"\nminus = { student = \"control student\" }\nabove = 0", 400, 0.05),
            ("kind = \"slope\"\nover = \"log2_rank\"\nof = { student = \"ranked\" }\nabove = 0", 400, 0.05),
            ("kind = \"rise\"\nof = { student = \"ranked\" }\nabove = 0", 400, 0.06),
            ("kind = \"fall\"\nof = { student = \"ranked\" }\nbelow = 0", 400, 0.06),
            ("kind = \"recovered\"\nof = { cell = \"part\" }\nall = { cell = \"whole\" }\nabove = 0.5", 400, 0.05),
            ("kind = \"diagonal\"\nabove = 0", 60, 0.1),
            ("kind = \"peak_spread\"\nof = { student = \"ranked\" }\nabove = 0", 60, 0.1),
        ];
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut chance = move || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0; // nearly normal, of variance 1
        let mut said = vec![];
        for (kind, times, at_most) in kinds {
            let claim = claim(&format!("[[tests]]\nname = \"null\"\n{kind}\n"));
            let mut called = 0;
            for _ in 0..times {
                let mut rows = outcomes(&[0.0; 5]);
                for row in &mut rows {
                    row.value = chance();
                }
                // A share of an effect that is there: of 10, the part is a half in truth.
                let whole = rows
                    .iter()
                    .filter(|row| row.cell == "part")
                    .map(|row| OutcomeRow { cell: "whole".to_owned(), ..row.clone() });
                let whole: Vec<OutcomeRow> = whole.map(|row| OutcomeRow { value: 10.0 + chance(), ..row }).collect();
                rows.extend(whole);
                rows.iter_mut().filter(|row| row.cell == "part").for_each(|row| row.value += 5.0);
                called += usize::from(tests(&claim, &rows).unwrap()[0].outcome == Holds);
            }
            let share = f64::from(u32::try_from(called).unwrap()) / f64::from(times);
            said.push(format!("{kind:?}: {called} of {times}"));
            assert!(share <= at_most, "{said:?}");
        }
    }

    #[test]
    fn a_run_whose_teacher_gains_nothing_has_no_fit_and_is_left_out() {
        let text = "[[tests]]\nname = \"x\"\nkind = \"difference\"\nof = { quantity = \"fit\" }\n\
                    minus = { student = \"control student\", quantity = \"fit\" }\nabove = 0\n";
        let margins = outcomes(&[1.0, 2.0, 6.0]);
        let fits = margins.iter().map(|row| OutcomeRow { quantity: Quantity::Fit, ..row.clone() });
        let told = |row: &OutcomeRow| row.dataset != 1 && !(row.dataset == 2 && row.target == "owl");
        let mut rows: Vec<OutcomeRow> = fits.filter(told).collect();
        rows.extend(margins);
        let found = first(text, &rows);
        // By hand, as in a difference: 1 in data set 0, and 6 for the cat in data set 2.
        assert!((found.estimate.unwrap() - 3.5).abs() < 1e-12 && found.n_datasets == 2, "{found:?}");
        let said = "without cat in data set 1, owl in data set 1, owl in data set 2, where the teacher's gain in loss is not clear of zero";
        assert_eq!(found.note, said);
        // A student without it in a run where another has it is a gap.
        rows.retain(|row| !(row.quantity, row.student.as_str(), row.dataset).eq(&(Quantity::Fit, "student", 2)));
        let gap = format!("{:#}", tests(&claim(text), &rows).unwrap_err());
        assert!(gap.contains("fit of \"student\" was not measured for cat in data set 2"), "{gap}");
    }

    #[test]
    fn what_was_not_measured_is_an_error_and_no_number() {
        let text = "[[tests]]\nname = \"x\"\nkind = \"mean\"\nof = { quantity = \"ece\" }\nabove = 0\n";
        let found = format!("{:#}", tests(&claim(text), &outcomes(&[1.0, 1.0])).unwrap_err());
        assert!(found.contains("ece of \"student\" was not measured"), "{found}");
        let mut gap = outcomes(&[1.0, 1.0]);
        gap.retain(|row| !(row.target == "owl" && row.dataset == 1 && row.student == "control student"));
        let found = format!("{:#}", tests(&claim(EFFECT), &gap).unwrap_err());
        assert!(found.contains("was not measured for owl in data set 1"), "{found}");
        let ranked = "[[tests]]\nname = \"x\"\nkind = \"mean\"\nof = { student = \"ranked\" }\nabove = 0\n";
        assert!(
            format!("{:#}", tests(&claim(ranked), &outcomes(&[1.0])).unwrap_err()).contains("hint: name it with rank")
        );
    }

    #[test]
    fn a_verdict_needs_its_premise_and_its_control() {
        let row = |role: Role, outcome: Outcome| TestRow {
            test: format!("{role:?}"),
            role,
            kind: Kind::Mean,
            target: ALL.to_owned(),
            n_datasets: 5,
            n_runs: 10,
            estimate: Some(1.0),
            low: Some(0.5),
            high: Some(1.5),
            p: None,
            p_sign_flip: None,
            p_holm: None,
            expected: "above 0".to_owned(),
            outcome,
            note: String::new(),
        };
        for (premise, test, control, word) in [
            (Holds, Holds, Holds, Word::Supported),
            (Holds, Fails, Holds, Word::NotSupported),
            (Holds, Fails, Fails, Word::NotSupported),
            (Holds, Undecided, Holds, Word::Undecided),
            (Holds, Holds, Fails, Word::Undecided),
            (Holds, Holds, Undecided, Word::Undecided),
            (Fails, Fails, Holds, Word::Undecided),
            (Undecided, Holds, Holds, Word::Undecided),
        ] {
            let rows = [row(Role::Premise, premise), row(Role::Test, test), row(Role::Control, control)];
            let verdict = Verdict::of(&claim(EFFECT), Size::Pocket, &rows);
            assert_eq!(verdict.word, word, "{premise:?} {test:?} {control:?}");
            assert!(verdict.line.contains("control, Control: +1.000"), "{}", verdict.line);
        }
    }
}
