//! What a number of an experiment may be.

use anyhow::{Result, ensure};

pub(super) fn at_least_one(key: &str, value: usize) -> Result<()> {
    ensure!(value >= 1, "{key} is {value}, expected at least 1");
    Ok(())
}

pub(super) fn positive(key: &str, value: f64) -> Result<()> {
    ensure!(value.is_finite() && value > 0.0, "{key} is {value}, expected a number above 0");
    Ok(())
}

pub(super) fn not_negative(key: &str, value: f64) -> Result<()> {
    ensure!(value.is_finite() && value >= 0.0, "{key} is {value}, expected 0 or a number above");
    Ok(())
}

pub(super) fn below_one(key: &str, value: f64) -> Result<()> {
    ensure!((0.0..1.0).contains(&value), "{key} is {value}, expected at least 0 and less than 1");
    Ok(())
}

pub(super) fn distinct_layers(key: &str, layers: Option<&[usize]>) -> Result<()> {
    let Some(layers) = layers else { return Ok(()) };
    ensure!(!layers.is_empty(), "{key} is empty, expected block numbers, or no such key for all blocks");
    ensure!(layers.windows(2).all(|pair| pair[0] < pair[1]), "{key} is {layers:?}, expected rising block numbers");
    Ok(())
}
