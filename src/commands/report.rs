//! Makes the page of a run, or finds that of a claim.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::claim::verdict_table::verdicts;
use crate::output::png;
use crate::output::progress::{print, say};
use crate::stages::report;
use crate::stages::run_dir::RunDir;

/// A run or a claim.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// The folder of a run, of a claim (whose page exists already), or of several claims (for the table of their
    /// verdicts).
    run: PathBuf,
    /// Also writes each SVG of the folder as PNG, at twice its size, with a font of this machine.
    #[arg(long)]
    png: bool,
}

/// Writes a run's `report.html`, prints the path of a claim's, or prints the verdicts of several claims. With `--png`,
/// also makes a PNG of each SVG in the folder.
pub fn run(args: &ReportArgs) -> Result<()> {
    if holds_claims(&args.run) {
        return print(&verdicts(&args.run)?);
    }
    if is_claim(&args.run) {
        say(format!("report: {}", args.run.join("report.html").display()));
        return if args.png { pngs(&args.run) } else { Ok(()) };
    }
    let folder = RunDir::open(&args.run)?;
    let _lock = RunDir::lock(&args.run)?;
    report::stage(&folder)?;
    if args.png { pngs(folder.root()) } else { Ok(()) }
}

fn is_claim(folder: &Path) -> bool {
    folder.join("claim.toml").is_file()
}

fn holds_claims(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    !folder.join("run.toml").exists() && entries.into_iter().any(|entry| is_claim(&entry.path()))
}

fn pngs(folder: &Path) -> Result<()> {
    let made = png::beside_svgs(folder)?;
    say(format!("report: {} figures as PNG, each beside its SVG", made.len()));
    Ok(())
}
