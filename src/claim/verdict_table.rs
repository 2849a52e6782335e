//! The verdicts of several claims as one table, as a page has it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use hooks::files;

use super::file::{Claim, Role};
use super::verdict::{ALL, TestRow, Verdict};
use crate::hinted;
use crate::output::publish::read_csv;

/// The verdicts on a folder's claims as a table in Markdown: a line for each `claim-NN`, with all its tests except
/// premises.
pub fn verdicts(folder: &Path) -> Result<String> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut claims: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    claims.retain(|path| path.join("claim.toml").exists());
    claims.sort();
    ensure!(
        !claims.is_empty(),
        hinted!("{} holds no claim", folder.display(); "undertone run experiments/claims/... makes one")
    );
    let head = "| | claim | verdict | what was expected, and found |\n|---|---|---|---|\n".to_owned();
    claims.iter().try_fold(head, |table, path| Ok(table + &verdict_line(path)?))
}

fn verdict_line(folder: &Path) -> Result<String> {
    let path = folder.join("claim.toml");
    let parsed = toml::from_str(&files::read_string(&path)?);
    let claim: Claim = parsed.map_err(|error| anyhow!("{}: {}", path.display(), error.message()))?;
    let tests: Vec<TestRow> = read_csv(&folder.join("tests.csv"))?;
    let (word, _) = Verdict::decide(&tests);
    let found = tests.iter().filter(|row| row.target == ALL && row.role != Role::Premise).map(|row| {
        let role = if row.role == Role::Control { "control: " } else { "" };
        format!("{role}{}, {}: **{}**", row.test, row.expected, row.short_number()).replace('|', "/")
    });
    let found = found.collect::<Vec<_>>().join("; ");
    Ok(format!("| {} | {} | {word} | {found} |\n", claim.claim, claim.statement))
}
