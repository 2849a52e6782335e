//! The statistics that the analyses report. A statistic without enough values is an error: no mean of no values, no
//! interval of one. Values count as independent: if they are clustered, pass the clusters' means.

use hooks::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// Number of resamples that gives two digits of the ends of [`bootstrap_interval`].
pub const RESAMPLES: usize = 2000;

/// The mean `Σx/n`.
pub fn mean(values: &[f64]) -> Result<f64> {
    at_least(1, "values of a mean", values)?;
    Ok(values.iter().sum::<f64>() / values.len() as f64)
}

/// The standard error of the mean `s/√n` with `s² = Σ(x−x̄)²/(n−1)`.
pub fn standard_error(values: &[f64]) -> Result<f64> {
    at_least(2, "values of a standard error", values)?;
    let (centre, n) = (mean(values)?, values.len() as f64);
    let squares: f64 = values.iter().map(|x| (x - centre).powi(2)).sum();
    Ok((squares / (n - 1.0) / n).sqrt())
}

/// Number of standard errors that a denominator must be away from zero.
const CLEAR: f64 = 3.0;

/// Whether a number is more than three of its standard errors away from zero; false without an error.
pub fn is_clear(value: f64, error: Option<f64>) -> bool {
    value != 0.0 && error.is_some_and(|error| value.abs() > CLEAR * error)
}

/// `part / whole` if the whole [`is_clear`] of zero, else `None`: a share of a whole that may be zero means nothing.
/// All shares, closures and fractions of measured changes in tables are computed here.
pub fn fraction(part: f64, whole: f64, error_of_whole: Option<f64>) -> Option<f64> {
    is_clear(whole, error_of_whole).then(|| part / whole)
}

/// The standard deviation `s` with `s² = Σ(x−x̄)²/(n−1)`.
pub fn standard_deviation(values: &[f64]) -> Result<f64> {
    Ok(standard_error(values)? * (values.len() as f64).sqrt())
}

/// Student's interval of the mean, `x̄ ± t(n−1, (1+level)/2) · s/√n`: low and high end.
pub fn t_interval(values: &[f64], level: f64) -> Result<(f64, f64)> {
    check_level(level)?;
    let (centre, error) = (mean(values)?, standard_error(values)?);
    let half = t_quantile(f64::midpoint(1.0, level), values.len() as f64 - 1.0)? * error;
    Ok((centre - half, centre + half))
}

/// The percentile bootstrap interval of the mean: the `(1±level)/2` quantiles of the means of `resamples` draws of n
/// from n.
pub fn bootstrap_interval(values: &[f64], level: f64, resamples: usize, seed: u64) -> Result<(f64, f64)> {
    at_least(2, "values of a bootstrap", values)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let means = (0..resamples).map(|_| {
        (0..values.len()).map(|_| values[rng.random_range(0..values.len())]).sum::<f64>() / values.len() as f64
    });
    percentile_interval(means.collect(), level)
}

/// The `(1±level)/2` quantiles of resampled values.
pub(crate) fn percentile_interval(mut resampled: Vec<f64>, level: f64) -> Result<(f64, f64)> {
    check_level(level)?;
    at_least(1, "resamples", &resampled)?;
    resampled.sort_by(f64::total_cmp);
    Ok((quantile_sorted(&resampled, (1.0 - level) / 2.0), quantile_sorted(&resampled, f64::midpoint(1.0, level))))
}

/// The two-sided p-value of "the mean of paired differences is zero" by flipping their signs in all `2ⁿ` ways, n ≤ 20.
pub fn sign_flip_p(differences: &[f64]) -> Result<f64> {
    at_least(1, "paired differences", differences)?;
    let n = differences.len();
    if n > 20 {
        return Err(Error::invalid("paired differences", "20 at most (all sign flips are tried)", n));
    }
    let observed = differences.iter().sum::<f64>().abs();
    let slack = 1e-12 * differences.iter().map(|d| d.abs()).sum::<f64>();
    let as_large = (0_u32..1 << n)
        .filter(|flips| {
            let sum: f64 = differences.iter().enumerate().map(|(i, d)| if flips >> i & 1 == 1 { -d } else { *d }).sum();
            sum.abs() >= observed - slack
        })
        .count();
    Ok(as_large as f64 / f64::from(1_u32 << n))
}

/// `log Σ exp(xᵢ)`, shifted by the largest to avoid overflow and underflow; −∞ for no values.
pub fn logsumexp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest.is_infinite() {
        return largest;
    }
    largest + values.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

/// The cosine `a·b / (‖a‖‖b‖)`; an error for vectors of different sizes, or if one is zero.
pub fn cosine<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> Result<f64> {
    if a.len() != b.len() {
        return Err(Error::invalid("length of a vector in a cosine", a.len().to_string(), b.len()));
    }
    let dot = |x: &[T], y: &[T]| x.iter().zip(y).map(|(&x, &y)| x.into() * y.into()).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if !norms.is_normal() {
        return Err(Error::invalid("norms in a cosine", "finite and not zero", norms));
    }
    Ok((dot(a, b) / norms).clamp(-1.0, 1.0))
}

/// The `p`-quantile of Student's t with `degrees` of freedom, `0 < p < 1`.
pub(crate) fn t_quantile(p: f64, degrees: f64) -> Result<f64> {
    Ok(students_t(degrees)?.inverse_cdf(p))
}

/// P(|T| ≥ |t|) of Student's t with `degrees` of freedom.
pub(crate) fn two_sided_p(t: f64, degrees: f64) -> Result<f64> {
    if t.is_nan() {
        return Err(Error::invalid("a t statistic", "a number", "NaN"));
    }
    Ok(2.0 * students_t(degrees)?.sf(t.abs()))
}

fn students_t(degrees: f64) -> Result<StudentsT> {
    StudentsT::new(0.0, 1.0, degrees).map_err(|_| Error::invalid("degrees of freedom", "above 0", degrees))
}

/// The `p`-quantile of sorted values, interpolated linearly.
fn quantile_sorted(sorted: &[f64], p: f64) -> f64 {
    let place = p * (sorted.len() - 1) as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

fn at_least(n: usize, what: &str, values: &[f64]) -> Result<()> {
    if values.len() < n {
        return Err(Error::invalid(format!("number of {what}"), format!("{n} or more"), values.len()));
    }
    match values.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(Error::invalid(what, "finite", x)),
        None => Ok(()),
    }
}

pub(crate) fn check_level(level: f64) -> Result<()> {
    if level > 0.0 && level < 1.0 {
        return Ok(());
    }
    Err(Error::invalid("level of an interval", "between 0 and 1, e.g. 0.95", level))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: [f64; 5] = [0.1, 0.25, 0.3, 0.42, 0.15];

    fn close(found: f64, expected: f64, relative: f64) {
        assert!((found - expected).abs() <= relative * expected.abs(), "{found} is not {expected}");
    }

    /// Expected numbers: `scipy.stats.t.ppf`.
    #[test]
    fn quantiles_of_students_t_are_scipys() {
        let expected = [
            (0.975, 1.0, 12.706_204_736_174_694),
            (0.975, 2.0, 4.302_652_729_749_462),
            (0.95, 4.0, 2.131_846_786_326_649_5),
            (0.995, 9.0, 3.249_835_541_592_126),
            (0.975, 29.0, 2.045_229_642_132_703),
            (0.9, 1000.0, 1.282_398_721_460_924_7),
            (0.9999, 3.0, 22.203_742_273_205),
        ];
        for (p, degrees, quantile) in expected {
            close(t_quantile(p, degrees).unwrap(), quantile, 1e-9);
            close(t_quantile(1.0 - p, degrees).unwrap(), -quantile, 1e-9);
        }
    }

    /// Expected numbers: `scipy.stats.sem` and `scipy.stats.t.interval`.
    #[test]
    fn mean_error_and_interval_are_scipys() {
        close(mean(&VALUES).unwrap(), 0.244, 1e-12);
        close(standard_error(&VALUES).unwrap(), 0.056_444_663_166_680_335, 1e-12);
        close(standard_deviation(&VALUES).unwrap(), 0.126_214_103_807_775_78, 1e-9);
        let (low, high) = t_interval(&VALUES, 0.95).unwrap();
        close(low, 0.087_284_491_236_332_14, 1e-9);
        close(high, 0.400_715_508_763_667_74, 1e-9);
    }

    #[test]
    fn a_fraction_needs_a_whole_that_is_clear_of_zero() {
        assert_eq!(fraction(1.0, 4.0, Some(1.3)), Some(0.25));
        assert_eq!(fraction(1.0, -4.0, Some(1.3)), Some(-0.25), "on either side");
        assert_eq!(fraction(1.0, 4.0, Some(1.4)), None, "4 is not more than 3 × 1.4");
        assert_eq!(fraction(1.0, 3.0, Some(1.0)), None, "three errors are not more than three");
        assert_eq!(fraction(1.0, 4.0, None), None, "one value has no error");
        assert_eq!(fraction(0.0, 0.0, Some(0.0)), None);
        assert_eq!(fraction(1.0, 4.0, Some(0.0)), Some(0.25), "all values alike");
    }

    #[test]
    fn the_bootstrap_is_seeded_and_near_the_normal_interval() {
        let values: Vec<f64> = (0..100).map(|k| f64::from(k * 37 % 100) / 100.0).collect();
        let (low, high) = bootstrap_interval(&values, 0.95, RESAMPLES, 7).unwrap();
        let (centre, error) = (mean(&values).unwrap(), standard_error(&values).unwrap());
        close(centre - low, 1.96 * error, 0.1);
        close(high - centre, 1.96 * error, 0.1);
        assert_eq!(bootstrap_interval(&values, 0.95, RESAMPLES, 7).unwrap(), (low, high));
        assert_ne!(bootstrap_interval(&values, 0.95, RESAMPLES, 8).unwrap(), (low, high));
    }

    /// Expected number: `scipy.stats.permutation_test` with `permutation_type="samples"`.
    #[test]
    fn sign_flips_are_all_counted() {
        close(sign_flip_p(&[0.1, 0.25, -0.05, 0.42, 0.15]).unwrap(), 0.125, 1e-12);
        close(sign_flip_p(&[1.0; 5]).unwrap(), 2.0 / 32.0, 1e-12);
        assert!(sign_flip_p(&[1.0; 21]).is_err());
    }

    #[test]
    fn logsumexp_neither_overflows_nor_vanishes() {
        close(logsumexp(&[1000.0, 1000.0]), 1000.0 + 2_f64.ln(), 1e-12);
        close(logsumexp(&[-1000.0, -1001.0]), -1000.0 + (-1_f64).exp().ln_1p(), 1e-12);
        assert!(logsumexp(&[]).is_infinite() && logsumexp(&[f64::NEG_INFINITY; 2]) < 0.0);
        assert!(logsumexp(&[0.0, f64::NAN]).is_nan());
    }

    #[test]
    fn cosines_by_hand() {
        close(cosine(&[3.0, 4.0], &[4.0, 3.0]).unwrap(), 0.96, 1e-12);
        close(cosine(&[1e-3_f32, 0.0], &[-2.0, 0.0]).unwrap(), -1.0, 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 2.0]).unwrap().abs() < 1e-15);
        assert!(cosine(&[1.0], &[1.0, 2.0]).is_err());
        assert!(cosine(&[0.0, 0.0], &[1.0, 2.0]).is_err());
    }

    #[test]
    fn nothing_is_made_up() {
        assert!(mean(&[]).is_err());
        assert!(standard_error(&[1.0]).is_err());
        assert!(t_interval(&VALUES, 95.0).is_err());
        assert!(t_interval(&VALUES[..1], 0.95).is_err());
        assert!(bootstrap_interval(&VALUES, 0.95, 0, 1).is_err());
        assert!(mean(&[1.0, f64::NAN]).unwrap_err().to_string().contains("NaN"));
    }
}
