//! The estimate of a test and its interval, from the table of outcomes: means and paired differences over data sets,
//! shares of an effect, slopes on either side of a peak, and permutations of the traits.

use std::collections::{BTreeMap, BTreeSet};

use crate::hinted;

use analyses::inference::{
    bootstrap_peak, diagonal_contrast, diagonal_gamma, fieller_interval, paired_t_p, peak_of, recovered_fraction,
};
use analyses::stats::{mean, sign_flip_p, t_interval};
use anyhow::{Context, Result, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::file::{Kind, Over, RankAxis, StudentNumber, Test};
use super::outcome::{OutcomeRow, Quantity};

/// The level of all intervals.
pub(super) const LEVEL: f64 = 0.95;
/// Number of draws of a bootstrap, and of a permutation test that is not exact.
const DRAWS: usize = 4000;
/// The seed of the draws, so that the same table gives the same numbers.
const SEED: u64 = 20_260_831;
/// Largest number of data sets whose signs are flipped in all ways.
const EXACT: usize = 20;

/// The result of a test, before it is compared with its expectation.
#[derive(Default)]
pub(super) struct Estimate {
    pub(super) value: Option<f64>,
    pub(super) interval: Option<(f64, f64)>,
    pub(super) p: Option<f64>,
    pub(super) p_one_sided: Option<f64>, // of a permutation
    pub(super) p_sign_flip: Option<f64>,
    pub(super) n_datasets: usize,
    pub(super) n_runs: usize,
    pub(super) note: String,
}

impl Estimate {
    /// Adds to the note the runs that are left out.
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

pub(super) fn estimate(test: &Test, table: &Outcomes<'_>) -> Result<Estimate> {
    let one_trait = || table.rows.windows(2).all(|two| two[0].target == two[1].target);
    if test.of.quantity == Quantity::InjectedOtherDeltaMargin && one_trait() {
        return Ok(alone(table));
    }
    match test.kind {
        Kind::Mean => {
            let Measured { values: [values], n_runs, left_out } = table.measured([&test.of])?;
            Ok(over_datasets(&values, n_runs).without(&left_out))
        }
        Kind::Difference => {
            let minus = test.minus.as_ref().context("minus is not given")?;
            let Measured { values: [values, other], n_runs, left_out } = table.measured([&test.of, minus])?;
            let values: Vec<f64> = values.iter().zip(&other).map(|(value, other)| value - other).collect();
            Ok(over_datasets(&values, n_runs).without(&left_out))
        }
        Kind::Recovered => {
            let all = test.all.as_ref().context("all is not given")?;
            let Measured { values: [part, whole], n_runs, left_out } = table.measured([&test.of, all])?;
            Ok(recovered(&part, &whole, n_runs)?.without(&left_out))
        }
        Kind::Slope | Kind::Rise | Kind::Fall => slopes(test, table),
        Kind::PeakSpread => peak_spread(test, table),
        Kind::Diagonal => diagonal(test, table),
    }
}

/// The mean with Student's interval, if there are enough data sets for one.
fn over_datasets(values: &[f64], n_runs: usize) -> Estimate {
    let few = if values.len() == 1 { "one data set has no spread" } else { "" };
    Estimate {
        value: mean(values).ok(),
        interval: t_interval(values, LEVEL).ok(),
        p: paired_t_p(values).ok(),
        p_sign_flip: if (2..=EXACT).contains(&values.len()) { sign_flip_p(values).ok() } else { None },
        n_datasets: values.len(),
        n_runs,
        note: few.to_owned(),
        ..Estimate::default()
    }
}

fn recovered(part: &[f64], whole: &[f64], n_runs: usize) -> Result<Estimate> {
    let n_datasets = part.len();
    if n_datasets < 2 {
        // With one data set there is no standard error, so the denominator cannot be shown to be clear of zero.
        let found = part.iter().zip(whole).map(|(part, whole)| {
            format!("{part:+.3} of {whole:+.3} nats; one data set has no spread, so that no share is given")
        });
        let note = found.collect::<String>();
        return Ok(Estimate { n_datasets, n_runs, note, ..Estimate::default() });
    }
    let runs: Vec<(f64, f64, f64)> = part.iter().zip(whole).map(|(part, whole)| (*part, 0.0, *whole)).collect();
    let found = recovered_fraction(&runs, LEVEL, DRAWS, SEED)?;
    let note = format!("{:+.3} of {:+.3} nats", found.numerator, found.denominator);
    let Some(share) = found.fraction else {
        let note = format!("{note}: the whole is not three standard errors clear of zero");
        return Ok(Estimate { n_datasets, n_runs, note, ..Estimate::default() });
    };
    let interval = fieller_interval(part, whole, LEVEL)?;
    let open = if interval.is_none() { "; the whole is not clear of zero at this level" } else { "" };
    let note = format!("{note}; by the bootstrap {:.3} to {:.3}{open}", share.low, share.high);
    Ok(Estimate { value: Some(share.estimate), interval, n_datasets, n_runs, note, ..Estimate::default() })
}

/// Slopes within each data set, on the kind's side of the peak. The other data sets locate the peak: a series' own peak
/// is where its noise is highest, so noise alone would show a rise up to it.
fn slopes(test: &Test, table: &Outcomes<'_>) -> Result<Estimate> {
    let over =
        if test.kind == Kind::Slope { test.over.context("over is not given")? } else { Over::Rank(RankAxis::Log2Rank) };
    let series = table.series(&test.of, over)?;
    let n_runs = table.n_runs(&[&test.of], &BTreeSet::new());
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
        let others = series.iter().enumerate().filter(|(other, _)| *other != at || series.len() == 1);
        let peak = peak_of(&others.flat_map(|(_, points)| points.clone()).collect::<Vec<_>>())?;
        // If the peak is at that end, the slope is between the last two ranks (for a rise, the first two).
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
    Ok(Estimate { note, ..over_datasets(&values, n_runs) })
}

/// The least-squares slope of points; `None` if they have only one x.
fn least_squares(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let (x, y) = (points.iter().map(|(x, _)| x).sum::<f64>() / n, points.iter().map(|(_, y)| y).sum::<f64>() / n);
    let (xx, xy) = points.iter().fold((0.0, 0.0), |(xx, xy), (a, b)| (xx + (a - x).powi(2), xy + (a - x) * (b - y)));
    (xx > 0.0).then(|| xy / xx)
}

/// The estimate of a comparison of traits if there is only one.
fn alone(table: &Outcomes<'_>) -> Estimate {
    Estimate {
        n_datasets: table.datasets().len(),
        note: "it takes two traits, and there is one".to_owned(),
        ..Estimate::default()
    }
}

fn peak_spread(test: &Test, table: &Outcomes<'_>) -> Result<Estimate> {
    if table.traits.len() < 2 {
        return Ok(alone(table));
    }
    let of_trait = |word: &&str| {
        let alone = Outcomes { rows: table.rows, traits: vec![word] };
        alone.series(&test.of, Over::Rank(RankAxis::Log2Rank))
    };
    let by_trait: Vec<Vec<Vec<(f64, f64)>>> = table.traits.iter().map(of_trait).collect::<Result<_>>()?;
    let spread = |by_trait: &[Vec<&[(f64, f64)]>]| -> Result<f64> {
        let peaks = by_trait.iter().map(|datasets| peak_of(&datasets.concat())).collect::<hooks::Result<Vec<_>>>()?;
        let (low, high) = (f64::INFINITY, f64::NEG_INFINITY);
        Ok(peaks.iter().copied().fold(high, f64::max) - peaks.iter().copied().fold(low, f64::min))
    };
    let n_datasets = by_trait[0].len();
    let actual: Vec<Vec<&[(f64, f64)]>> =
        by_trait.iter().map(|datasets| datasets.iter().map(Vec::as_slice).collect()).collect();
    let found = spread(&actual)?;
    // If the traits did not differ, each data set's series could belong to any trait.
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut as_large = 1;
    for _ in 1..DRAWS {
        let mut drawn: Vec<Vec<&[(f64, f64)]>> = vec![vec![]; by_trait.len()];
        for dataset in 0..n_datasets {
            let mut order: Vec<usize> = (0..by_trait.len()).collect();
            order.shuffle(&mut rng);
            order.into_iter().enumerate().for_each(|(at, from)| drawn[at].push(&by_trait[from][dataset]));
        }
        as_large += usize::from(spread(&drawn)? >= found - 1e-9);
    }
    Ok(Estimate {
        value: Some(found),
        p_one_sided: Some(as_large as f64 / DRAWS as f64),
        n_datasets,
        n_runs: table.n_runs(&[&test.of], &BTreeSet::new()),
        note: "a largest difference is above 0 by chance as well, so that its p decides".to_owned(),
        ..Estimate::default()
    })
}

fn diagonal(test: &Test, table: &Outcomes<'_>) -> Result<Estimate> {
    if table.traits.len() < 2 {
        return Ok(alone(table));
    }
    let position = |word: &str| table.traits.iter().position(|known| *known == word);
    // A run is a trained student; its row of the matrix has its change of every trait.
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
        let gaps = || format!("the row of {} in data set {dataset} has gaps", table.traits[trained]);
        changes.push((dataset, trained, cells.with_context(gaps)?));
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
        return Ok(Estimate { p: None, note: "too few runs for a permutation".to_owned(), ..found });
    }
    let all = diagonal_contrast(&rows, &trained, SEED)?;
    let how = if all.is_exact { "all" } else { "drawn" };
    Ok(Estimate {
        p: Some(all.p),
        note: format!("p of {} {how} permutations of the runs' traits", all.n_permutations),
        ..found
    })
}

/// Several numbers, measured on the same runs.
struct Measured<'a, const N: usize> {
    /// For each number, a value per data set, in the same order.
    values: [Vec<f64>; N],
    n_runs: usize,
    /// The runs that are left out, by trait and data set.
    left_out: BTreeSet<(&'a str, u64)>,
}

pub(super) struct Outcomes<'a> {
    pub(super) rows: &'a [OutcomeRow],
    pub(super) traits: Vec<&'a str>,
}

impl<'a> Outcomes<'a> {
    /// The lines whose mean is the number, evaluated on any trait.
    fn matching<'s>(&'s self, of: &StudentNumber) -> impl Iterator<Item = &'a OutcomeRow> + use<'a, 's> {
        let of = of.clone();
        self.rows.iter().filter(move |row| {
            row.student == of.student
                && of.rank.is_none_or(|rank| row.rank == Some(rank))
                && (of.cell == "*" || row.cell == of.cell)
                && row.quantity == of.quantity
                && self.traits.contains(&row.target.as_str())
        })
    }

    /// The lines whose mean is the number, evaluated on the trained trait.
    fn own<'s>(&'s self, of: &StudentNumber) -> impl Iterator<Item = &'a OutcomeRow> + use<'a, 's> {
        self.matching(of).filter(|row| row.evaluated == row.target)
    }

    fn datasets(&self) -> BTreeSet<u64> {
        self.rows.iter().map(|row| row.dataset).collect()
    }

    fn n_runs(&self, numbers: &[&StudentNumber], left_out: &BTreeSet<(&str, u64)>) -> usize {
        let runs = numbers.iter().flat_map(|of| self.own(of));
        runs.filter(|row| !left_out.contains(&(row.target.as_str(), row.dataset)))
            .map(|row| (&row.target, row.dataset, &row.student, row.rank, row.seed_index))
            .collect::<BTreeSet<_>>()
            .len()
    }

    /// Runs, by trait and data set, in which no student has a fit, because the teacher's gain is not clear of zero.
    fn without_gain(&self, of: &StudentNumber) -> BTreeSet<(&'a str, u64)> {
        let has = |word: &str, dataset: u64| {
            let mut of_run = self.rows.iter().filter(|row| row.target == word && row.dataset == dataset);
            of_run.any(|row| row.quantity == of.quantity)
        };
        let runs = self.traits.iter().flat_map(|word| self.datasets().into_iter().map(move |dataset| (*word, dataset)));
        runs.filter(|(word, dataset)| of.quantity == Quantity::Fit && !has(word, *dataset)).collect()
    }

    /// Several numbers of the same runs, per data set. Runs without a gain for one of the numbers are left out of all.
    fn measured<const N: usize>(&self, numbers: [&StudentNumber; N]) -> Result<Measured<'a, N>> {
        let left_out: BTreeSet<_> = numbers.iter().flat_map(|of| self.without_gain(of)).collect();
        let mut values = [(); N].map(|()| vec![]);
        for (values, of) in values.iter_mut().zip(numbers) {
            *values = self.by_dataset(of, &left_out)?;
        }
        Ok(Measured { values, n_runs: self.n_runs(&numbers, &left_out), left_out })
    }

    /// Per data set, the mean over traits of each trait's mean over seeds. Every trait must be in every data set,
    /// except for runs that are left out. A data set without any run has no mean.
    fn by_dataset(&self, of: &StudentNumber, left_out: &BTreeSet<(&str, u64)>) -> Result<Vec<f64>> {
        if left_out.len() == self.traits.len() * self.datasets().len() {
            return Ok(vec![]);
        }
        let mut ranks = self.own(of).map(|row| row.rank).collect::<BTreeSet<_>>();
        ensure!(ranks.len() <= 1, hinted!("{of} has the ranks {ranks:?}, expected one"; "name it with rank = 8"));
        ensure!(ranks.pop_first().is_some(), "{of} was not measured");
        let of_run = |word: &str, dataset: u64| {
            let here = self.own(of).filter(|row| row.dataset == dataset && row.target == word);
            mean(&here.map(|row| row.value).collect::<Vec<_>>())
                .with_context(|| format!("{of} was not measured for {word} in data set {dataset}"))
        };
        let of_dataset = |dataset: u64| {
            let there = self.traits.iter().filter(|word| !left_out.contains(&(**word, dataset)));
            there.map(|word| of_run(word, dataset)).collect::<Result<Vec<f64>>>()
        };
        let mut values = self.datasets().into_iter().map(of_dataset).collect::<Result<Vec<Vec<f64>>>>()?;
        values.retain(|values| !values.is_empty());
        Ok(values.iter().map(|values| mean(values)).collect::<hooks::Result<_>>()?)
    }

    /// Per data set, the points (x, y) of a number over the rank or over another quantity. Each is the mean over traits
    /// and seeds at one rank in one condition.
    fn series(&self, of: &StudentNumber, over: Over) -> Result<Vec<Vec<(f64, f64)>>> {
        let means = |of: &StudentNumber, dataset: u64| -> Result<BTreeMap<(Option<i64>, &'a str), f64>> {
            let mut found: BTreeMap<(Option<i64>, &str), Vec<f64>> = BTreeMap::new();
            for row in self.own(of).filter(|row| row.dataset == dataset) {
                found.entry((row.rank, &row.cell)).or_default().push(row.value);
            }
            found.into_iter().map(|(key, values)| Ok((key, mean(&values)?))).collect()
        };
        let one = |dataset: u64| -> Result<Vec<(f64, f64)>> {
            let ys = means(of, dataset)?;
            ensure!(!ys.is_empty(), "{of} was not measured in data set {dataset}");
            let xs = match over {
                Over::Rank(_) => None,
                Over::Quantity(quantity) => Some(means(&StudentNumber { quantity, ..of.clone() }, dataset)?),
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
