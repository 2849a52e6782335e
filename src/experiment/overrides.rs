//! Changes an experiment's table before it is parsed: `section.key=value`, and the seeds that derive from one seed.

use anyhow::{Context, Result, ensure};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use toml::{Table, Value};

use super::default_seed;

const SEEDS: [&str; 5] = ["gen_seed", "init_seed", "order_seed", "dropout_seed", "eval_seed"];

/// The key that decides which other keys its section has.
const TEACHER_KIND: &str = "teacher.kind";

/// Applies changes `section.key=value` to an experiment's table, and fills in its seeds.
pub(super) fn apply(table: &mut Table, overrides: &[String]) -> Result<()> {
    forget_derived_seeds(table);
    change(table, overrides)?;
    if let Some(teacher) = table.get_mut("teacher").and_then(Value::as_table_mut) {
        // A file must name the kind; an override of another key implies the default kind.
        teacher.entry("kind").or_insert_with(|| Value::String("prompt".to_owned()));
    }
    derive_seeds(table);
    Ok(())
}

/// Applies changes `section.key=value` to an experiment's table.
pub(crate) fn change(table: &mut Table, changes: &[String]) -> Result<()> {
    // A change of the kind of teacher comes first, since kinds have different keys.
    let is_kind = |text: &&String| text.split_once('=').is_some_and(|(key, _)| key.trim() == TEACHER_KIND);
    let (kinds, others): (Vec<_>, Vec<_>) = changes.iter().partition(is_kind);
    kinds.into_iter().chain(others).try_for_each(|text| set(table, text))
}

/// Applies `section.key=value`; a value that is not TOML is taken as text, so that words need no quotes.
fn set(table: &mut Table, text: &str) -> Result<()> {
    let (key, value) = text.split_once('=').with_context(|| format!("--set {text}: expected section.key=value"))?;
    let value = value.trim();
    let parsed = toml::from_str::<Table>(&format!("value = {value}")).ok().and_then(|mut one| one.remove("value"));
    let value = parsed.unwrap_or_else(|| Value::String(value.to_owned()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    // No key is deeper, and dropping a very deep table would overflow the stack.
    ensure!(parts.len() <= 8, "--set {}...: expected section.key=value", text.chars().take(40).collect::<String>());
    let last = parts.pop().unwrap_or_default();
    let mut section = table;
    for part in parts {
        let entry = section.entry(part).or_insert_with(|| Value::Table(Table::new()));
        section = entry.as_table_mut().with_context(|| format!("--set {text}: {part} is no section"))?;
    }
    if key.trim() == TEACHER_KIND && section.get(last) != Some(&value) {
        section.clear(); // removes the other kind's keys
    }
    section.insert(last.to_owned(), value);
    Ok(())
}

/// The seeds that derive from one seed.
fn derived(seed: u64) -> [(&'static str, Value); 5] {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    SEEDS.map(|name| (name, Value::Integer(rng.next_u32().into())))
}

/// The seed of a table, or the default one.
fn seed_of(table: &Table) -> u64 {
    let given = table.get("seed").and_then(Value::as_integer);
    given.map_or_else(default_seed, i64::cast_unsigned)
}

/// Removes seeds that equal the derived ones, so that a new seed changes them too.
fn forget_derived_seeds(table: &mut Table) {
    let derived = derived(seed_of(table));
    if let Some(seeds) = table.get_mut("seeds").and_then(Value::as_table_mut) {
        seeds.retain(|name, value| !derived.iter().any(|(known, seed)| name == *known && seed == value));
    }
}

fn derive_seeds(table: &mut Table) {
    let derived = derived(seed_of(table));
    let seeds = table.entry("seeds").or_insert_with(|| Value::Table(Table::new()));
    if let Some(seeds) = seeds.as_table_mut() {
        for (name, seed) in derived {
            seeds.entry(name).or_insert(seed);
        }
    }
}
