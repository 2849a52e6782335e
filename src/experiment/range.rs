//! Checks the range of a number of an experiment.

use anyhow::{Result, ensure};

pub(super) fn at_least_one(key: &str, value: usize) -> Result<()> {
    ensure!(value >= 1, "{key} is {value}, expected at least 1");
    Ok(())
}

pub(super) fn positive(key: &str, value: f64) -> Result<()> {
    ensure!(value.is_finite() && value > 0.0, "{key} is {value}, expected a number above 0");
    Ok(())
}
