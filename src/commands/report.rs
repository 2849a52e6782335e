//! The page of a run or of a claim.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::output::png;
use crate::output::progress::say;
use crate::stages::report;
use crate::stages::run_dir::RunDir;

/// A run.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// The folder of a run, or of a claim, whose page is written already.
    run: PathBuf,
    /// Also writes each SVG of the folder as PNG, at twice its size, in a font of this machine.
    #[arg(long)]
    png: bool,
}

/// Writes `report.html`, unless the folder is a claim's, which has its page; with `--png` a PNG for each SVG of the folder.
pub fn run(args: &ReportArgs) -> Result<()> {
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

fn pngs(folder: &Path) -> Result<()> {
    let made = png::beside_svgs(folder)?;
    say(format!("report: {} figures as PNG, each beside its SVG", made.len()));
    Ok(())
}
