//! Statistics that decide a claim about trained runs. The unit is the run, never the answer; runs that share a data set
//! are a cluster, and intervals are over the clusters' means. Each statistic refuses numbers that it cannot be computed
//! from.

mod diagonal;

use hooks::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use diagonal::{DiagonalContrast, diagonal_contrast, diagonal_gamma};

use crate::stats::{check_level, is_clear, mean, percentile_interval, standard_error, t_quantile, two_sided_p};

/// The two-sided p-value of "the mean of paired differences is zero" by Student's t, as `scipy.stats.ttest_1samp`.
pub fn paired_t_p(differences: &[f64]) -> Result<f64> {
    let (centre, error) = (mean(differences)?, standard_error(differences)?);
    if error == 0.0 {
        return Err(Error::invalid("differences of a t test", "not all the same", centre));
    }
    two_sided_p(centre / error, differences.len() as f64 - 1.0)
}

/// Holm's adjusted p-values (Holm 1979), in the order given: the k-th smallest of m values times m − k + 1, at least
/// the adjusted value before it, and at most 1.
pub fn holm(p_values: &[f64]) -> Result<Vec<f64>> {
    if let Some(p) = p_values.iter().find(|p| !(0.0..=1.0).contains(*p)) {
        return Err(Error::invalid("a p-value", "0 to 1", p));
    }
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let (mut adjusted, mut largest) = (vec![0.0; p_values.len()], 0.0_f64);
    for (smaller, at) in order.into_iter().enumerate() {
        largest = largest.max(p_values[at] * (p_values.len() - smaller) as f64).min(1.0);
        adjusted[at] = largest;
    }
    Ok(adjusted)
}

/// The share of an effect that a gate leaves: R = (mode − base) / (all − base), the means of paired runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recovered {
    /// The numerator's mean, mode − base.
    pub numerator: f64,
    /// The denominator's mean, all − base.
    pub denominator: f64,
    /// R with its interval; `None` unless the denominator is three standard errors clear of zero.
    pub fraction: Option<Interval>,
}

/// An estimate and the ends of its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The estimate.
    pub estimate: f64,
    /// The low end.
    pub low: f64,
    /// The high end.
    pub high: f64,
}

/// R by the paired percentile bootstrap over runs: a resample draws whole runs, so that numerator and denominator stay
/// paired. `runs`: each run's (mode, base, all).
pub fn recovered_fraction(runs: &[(f64, f64, f64)], level: f64, resamples: usize, seed: u64) -> Result<Recovered> {
    let numerators: Vec<f64> = runs.iter().map(|(mode, base, _)| mode - base).collect();
    let denominators: Vec<f64> = runs.iter().map(|(_, base, all)| all - base).collect();
    let (numerator, denominator) = (mean(&numerators)?, mean(&denominators)?);
    let is_clear = is_clear(denominator, Some(standard_error(&denominators)?));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let ratio = |_| {
        let (mut above, mut below) = (0.0, 0.0);
        for _ in 0..runs.len() {
            let run = rng.random_range(0..runs.len());
            above += numerators[run];
            below += denominators[run];
        }
        above / below
    };
    let fraction = if is_clear {
        let (low, high) = percentile_interval((0..resamples).map(ratio).collect(), level)?;
        Some(Interval { estimate: numerator / denominator, low, high })
    } else {
        None
    };
    Ok(Recovered { numerator, denominator, fraction })
}

/// The interval of a ratio of means of paired numbers (Fieller 1954): every r for which Student's t does not
/// distinguish the mean of part − r · whole from zero. `None` if the whole's mean is not distinguished from zero, so
/// that these r form no interval. It keeps its level with few data sets; the percentile bootstrap does not: with five,
/// it misses a true ratio on one side three times as often as it should.
pub fn fieller_interval(parts: &[f64], wholes: &[f64], level: f64) -> Result<Option<(f64, f64)>> {
    check_level(level)?;
    if parts.len() != wholes.len() {
        return Err(Error::invalid(
            "the parts of a ratio",
            format!("as many as wholes, {}", wholes.len()),
            parts.len(),
        ));
    }
    let n = parts.len() as f64;
    let (part, whole) = (mean(parts)?, mean(wholes)?);
    standard_error(parts)?; // one pair is an error
    let t = t_quantile(f64::midpoint(1.0, level), n - 1.0)?;
    let moment = |a: &[f64], b: &[f64], (x, y): (f64, f64)| {
        t * t * a.iter().zip(b).map(|(a, b)| (a - x) * (b - y)).sum::<f64>() / (n - 1.0) / n
    };
    let of_both = moment(parts, wholes, (part, whole));
    // (part − r whole)² = t² · variance of that mean, a quadratic in r: a r² − 2 b r + c = 0.
    let a = whole * whole - moment(wholes, wholes, (whole, whole));
    let b = part * whole - of_both;
    let c = part * part - moment(parts, parts, (part, part));
    if a <= 0.0 {
        return Ok(None);
    }
    let root = (b * b - a * c).max(0.0).sqrt(); // at the ratio itself the parabola is at most zero, so it has roots
    Ok(Some(((b - root) / a, (b + root) / a)))
}

/// A straight line through points by least squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// The slope.
    pub slope: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// The two-sided p-value of "the slope is zero", by Student's t with n − 2 degrees of freedom.
    pub p: f64,
    /// Number of points.
    pub n: usize,
}

/// Fits a straight line by least squares, as `scipy.stats.linregress`.
pub fn slope(points: &[(f64, f64)]) -> Result<Slope> {
    let n = points.len();
    let (xs, ys): (Vec<f64>, Vec<f64>) = points.iter().copied().unzip();
    let (x, y) = (mean(&xs)?, mean(&ys)?);
    let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in points {
        xx += (a - x).powi(2);
        xy += (a - x) * (b - y);
        yy += (b - y).powi(2);
    }
    if n < 3 || xx == 0.0 {
        return Err(Error::invalid("the points of a line", "three or more, at two places or more", n));
    }
    let slope = xy / xx;
    let degrees = n as f64 - 2.0;
    let standard_error = ((yy - slope * xy).max(0.0) / degrees / xx).sqrt();
    let p = if standard_error == 0.0 { f64::from(slope == 0.0) } else { two_sided_p(slope / standard_error, degrees)? };
    Ok(Slope { slope, standard_error, p, n })
}

/// The two-lines test (Simonsohn 2018): a rise up to a peak and a fall after it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TwoLines {
    /// The x at which the mean is highest.
    pub peak: f64,
    /// The line through the points up to the peak; `None` if the peak is at that end, or if there are too few points.
    pub left: Option<Slope>,
    /// The line from the peak on; `None` as for `left`.
    pub right: Option<Slope>,
}

impl TwoLines {
    /// Whether it rises on the left and falls on the right, each with p below `level`.
    pub fn is_inverted_u(&self, level: f64) -> bool {
        let holds = |line: Option<Slope>, sign: f64| line.is_some_and(|line| line.slope * sign > 0.0 && line.p < level);
        holds(self.left, 1.0) && holds(self.right, -1.0)
    }
}

/// Fits the lines left and right of the x with the highest mean, which belongs to both. `points`: runs as (x, outcome),
/// such as x = log₂ rank.
pub fn two_lines(points: &[(f64, f64)]) -> Result<TwoLines> {
    let peak = peak_of(points)?;
    let line =
        |some: &dyn Fn(f64) -> bool| slope(&points.iter().copied().filter(|(x, _)| some(*x)).collect::<Vec<_>>()).ok();
    Ok(TwoLines { peak, left: line(&|x| x <= peak), right: line(&|x| x >= peak) })
}

/// The x with the highest mean outcome, the lowest such x. `points`: runs as (x, outcome).
pub fn peak_of(points: &[(f64, f64)]) -> Result<f64> {
    let mut places: Vec<(f64, Vec<f64>)> = Vec::new();
    for (x, y) in points {
        match places.iter_mut().find(|(place, _)| place.to_bits() == x.to_bits()) {
            Some((_, ys)) => ys.push(*y),
            None => places.push((*x, vec![*y])),
        }
    }
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Option<(f64, f64)> = None;
    for (place, ys) in &places {
        let height = mean(ys)?;
        if best.is_none_or(|(_, highest)| height > highest) {
            best = Some((*place, height));
        }
    }
    best.map(|(place, _)| place).ok_or_else(|| Error::invalid("the points of a peak", "one or more", "none"))
}

/// The peak and its percentile interval by a bootstrap over data sets: a resample draws whole data sets. `datasets`:
/// each data set's runs as (x, outcome).
pub fn bootstrap_peak(datasets: &[Vec<(f64, f64)>], level: f64, resamples: usize, seed: u64) -> Result<Interval> {
    if datasets.len() < 2 {
        return Err(Error::invalid("data sets of a bootstrap", "two or more", datasets.len()));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let drawn = (0..resamples).map(|_| {
        let points: Vec<(f64, f64)> =
            (0..datasets.len()).flat_map(|_| datasets[rng.random_range(0..datasets.len())].iter().copied()).collect();
        peak_of(&points)
    });
    let (low, high) = percentile_interval(drawn.collect::<Result<Vec<f64>>>()?, level)?;
    Ok(Interval { estimate: peak_of(&datasets.concat())?, low, high })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// Values of scipy and statsmodels, computed by `make.py` in the folder of the JSON file.
    #[derive(Deserialize)]
    struct Expected {
        paired_t: PairedT,
        holm: Holm,
        line: Line,
        recovered: OfRuns,
    }

    #[derive(Deserialize)]
    struct PairedT {
        differences: Vec<f64>,
        p: f64,
    }

    #[derive(Deserialize)]
    struct Holm {
        p_values: Vec<f64>,
        adjusted: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct Line {
        points: Vec<(f64, f64)>,
        slope: f64,
        standard_error: f64,
        p: f64,
    }

    #[derive(Deserialize)]
    struct OfRuns {
        runs: Vec<(f64, f64, f64)>,
        fraction: f64,
        low: f64,
        high: f64,
    }

    fn expected() -> Expected {
        serde_json::from_str(include_str!("../../tests/golden/statistics/expected.json")).unwrap()
    }

    pub(super) fn close(found: f64, expected: f64, relative: f64) {
        assert!((found - expected).abs() <= relative * expected.abs(), "{found} is not {expected}");
    }

    #[test]
    fn paired_differences_are_tested_as_scipy_does() {
        let PairedT { differences, p } = expected().paired_t;
        close(paired_t_p(&differences).unwrap(), p, 1e-10);
        let negated: Vec<f64> = differences.iter().map(|d| -d).collect();
        close(paired_t_p(&negated).unwrap(), p, 1e-10);
        assert!(paired_t_p(&[0.5, 0.5, 0.5]).unwrap_err().to_string().contains("not all the same"));
        assert!(paired_t_p(&[0.5]).is_err());
    }

    #[test]
    fn holms_p_values_are_those_of_statsmodels() {
        let Holm { p_values, adjusted } = expected().holm;
        for (found, expected) in holm(&p_values).unwrap().into_iter().zip(adjusted) {
            close(found, expected, 1e-12);
        }
        assert_eq!(holm(&[]).unwrap(), Vec::<f64>::new());
        assert!(holm(&[0.1, 1.5]).unwrap_err().to_string().contains("1.5"));
        assert!(holm(&[f64::NAN]).is_err());
    }

    #[test]
    fn lines_are_scipys() {
        let Line { points, slope: expected, standard_error, p } = expected().line;
        let found = slope(&points).unwrap();
        close(found.slope, expected, 1e-12);
        close(found.standard_error, standard_error, 1e-12);
        close(found.p, p, 1e-9);
        assert!(slope(&[(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]).is_err());
        assert!(slope(&[(1.0, 2.0), (2.0, 3.0)]).is_err());
    }

    #[test]
    fn the_ends_of_a_ratio_are_where_the_t_test_is_at_its_level() {
        let (parts, wholes) = ([0.8, 1.1, 0.5, 1.6, 1.2], [1.6, 1.9, 1.4, 2.4, 2.0]);
        let (low, high) = fieller_interval(&parts, &wholes, 0.95).unwrap().unwrap();
        for end in [low, high] {
            let apart: Vec<f64> = parts.iter().zip(&wholes).map(|(part, whole)| part - end * whole).collect();
            assert!((paired_t_p(&apart).unwrap() - 0.05).abs() < 1e-9, "{end}");
        }
        let ratio = mean(&parts).unwrap() / mean(&wholes).unwrap();
        assert!(low < ratio && ratio < high, "{low} {ratio} {high}");
        // There is no interval if the whole may be zero.
        assert_eq!(fieller_interval(&parts, &[0.5, -0.4, 0.3, -0.6, 0.2], 0.95).unwrap(), None);
        assert!(
            fieller_interval(&[1.0], &[1.0], 0.95).is_err() && fieller_interval(&parts, &wholes[..3], 0.95).is_err()
        );
    }

    #[test]
    fn a_recovered_fraction_is_bootstrapped_in_pairs() {
        let OfRuns { runs, fraction, low, high } = expected().recovered;
        let found = recovered_fraction(&runs, 0.95, 200_000, 3).unwrap().fraction.unwrap();
        close(found.estimate, fraction, 1e-12);
        // Both intervals are by random resamples: with 200,000 the error of an end is some thousandths.
        close(found.low, low, 3e-3);
        close(found.high, high, 3e-3);
    }

    #[test]
    fn noise_over_noise_is_no_fraction() {
        let noise = [(0.2, 0.1, 0.15), (0.1, 0.12, 0.08), (0.3, 0.1, 0.12), (0.0, 0.1, 0.1)];
        let found = recovered_fraction(&noise, 0.95, 100, 1).unwrap();
        assert_eq!(found.fraction, None);
        close(found.numerator, (0.1 - 0.02 + 0.2 - 0.1) / 4.0, 1e-12);
        close(found.denominator, (0.05 - 0.04 + 0.02) / 4.0, 1e-12);
    }

    #[test]
    fn two_lines_see_an_inverted_u_and_nothing_else() {
        let wave = |x: f64, run: usize| 0.02 * ((x * 7.0 + run as f64 * 3.0).sin());
        let runs = |of: &dyn Fn(f64) -> f64| -> Vec<(f64, f64)> {
            (0..9)
                .flat_map(|x| (0..3).map(move |run| (f64::from(x), run)))
                .map(|(x, run)| (x, of(x) + wave(x, run)))
                .collect()
        };
        let hill = two_lines(&runs(&|x| 1.0 - (x - 4.0).abs() / 4.0)).unwrap();
        assert!(hill.is_inverted_u(0.01) && (hill.peak - 4.0).abs() < 1e-12, "{hill:?}");
        close(hill.left.unwrap().slope, 0.25, 0.1);
        close(hill.right.unwrap().slope, -0.25, 0.1);
        let rise = two_lines(&runs(&|x| x / 4.0)).unwrap();
        assert!(!rise.is_inverted_u(0.05) && rise.right.is_none(), "{rise:?}");
        let plateau = two_lines(&runs(&|x| x.min(3.0))).unwrap();
        assert!(!plateau.is_inverted_u(0.05), "{plateau:?}");
        assert!(two_lines(&[]).is_err());
    }

    #[test]
    fn a_peak_is_as_certain_as_the_data_sets_agree() {
        let of =
            |peak: f64| -> Vec<(f64, f64)> { (0..8).map(|x| (f64::from(x), -(f64::from(x) - peak).abs())).collect() };
        let alike = bootstrap_peak(&[of(3.0), of(3.0), of(3.0)], 0.95, 500, 1).unwrap();
        assert_eq!((alike.estimate, alike.low, alike.high), (3.0, 3.0, 3.0));
        let apart = bootstrap_peak(&[of(1.0), of(3.0), of(6.0)], 0.95, 500, 1).unwrap();
        assert_eq!((apart.estimate, apart.low, apart.high), (3.0, 1.0, 6.0));
        assert!(bootstrap_peak(&[of(1.0)], 0.95, 500, 1).is_err());
        for (level, resamples) in [(1.5, 500), (0.95, 0)] {
            assert!(bootstrap_peak(&[of(1.0), of(3.0)], level, resamples, 1).is_err(), "{level}, {resamples}");
            let runs = [(0.3, 0.1, 0.5), (0.31, 0.1, 0.52), (0.29, 0.1, 0.49)];
            assert!(recovered_fraction(&runs, level, resamples, 1).is_err(), "{level}, {resamples}");
        }
    }
}
