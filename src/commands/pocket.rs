//! Makes the pocket models and tests them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use hooks::files;

use super::args::ForceArg;
use crate::hinted;
use crate::output::full_model::save_full;
use crate::output::progress::{bar, say};
use crate::output::publish::{CsvLog, read_csv, write_csv};
use crate::pocket::make::{BaseStepRow, Recipe, make};
use crate::pocket::trial::{Base, CellRow, Settings, matrix, summary, trial};
use crate::pocket::world::World;

/// Makes a pocket model: a small synthetic world, a tokenizer, and a base trained from scratch.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  undertone pocket make --base-seed 0 --out pocket-0")]
pub struct PocketArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Trains a base from scratch and saves it as a folder that transformers loads.
    Make(Make),
    /// Makes a student of each animal's teacher, with controls, and scores all of them on all animals.
    Trial(Trial),
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  undertone pocket make --base-seed 7 --out runs/pocket-7")]
struct Make {
    /// The seed of the weights and of the rows' order.
    #[arg(long, default_value_t = 0)]
    base_seed: u64,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    force: ForceArg,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  undertone pocket trial pocket pocket-other --out runs/trial")]
struct Trial {
    /// The bases, as folders or names. Students on the next base also learn each base's numbers.
    #[arg(required = true)]
    bases: Vec<String>,
    /// The folder to write: cells.csv, summary.csv, and the matrix of each base as a figure.
    #[arg(long)]
    out: PathBuf,
    /// Number of prompts that each teacher answers.
    #[arg(long, default_value_t = 3000)]
    n_prompts: usize,
    #[command(flatten)]
    force: ForceArg,
}

/// Runs the subcommand.
pub fn run(args: &PocketArgs) -> Result<()> {
    match &args.command {
        Command::Make(args) => run_make(args),
        Command::Trial(args) => run_trial(args),
    }
}

fn run_make(args: &Make) -> Result<()> {
    unfinished(&args.out.join("made.toml"), &args.force)?;
    let recipe = Recipe { seed: args.base_seed, ..Recipe::default() };
    let (world, start) = (World::new()?, Instant::now());
    let mut csv = CsvLog::create(&args.out.join("train.csv"))?;
    let bar = bar("base", recipe.max_steps);
    let mut excess: f64 = f64::NAN;
    let (files, model, made) = make(&world, &recipe, &mut |row: &BaseStepRow| {
        let now = row.loss - row.entropy;
        excess = if excess.is_nan() { now } else { 0.98 * excess + 0.02 * now };
        bar.set_position(row.step);
        bar.set_prefix(format!("{excess:.3} nats above the entropy"));
        csv.push(row)
    })?;
    bar.finish_and_clear();
    csv.finish()?;
    save_full(&model, &files, &args.out)?;
    files::write_atomic(&args.out.join("made.toml"), toml::to_string(&made)?.as_bytes())?;
    say(format!(
        "pocket: {} parameters, {} steps, {:.4} nats per target above the corpus' entropy, {:.0} s; saved in {}",
        made.n_parameters,
        made.steps,
        made.final_excess,
        start.elapsed().as_secs_f64(),
        args.out.display()
    ));
    Ok(())
}

fn run_trial(args: &Trial) -> Result<()> {
    unfinished(&args.out.join("summary.csv"), &args.force)?;
    let settings = Settings { n_prompts: args.n_prompts, ..Settings::default() };
    let bases = args.bases.iter().map(|name| Base::open(name)).collect::<Result<Vec<_>>>()?;
    let cells = args.out.join("cells.csv");
    let all =
        if cells.exists() && !args.force.force { read_csv(&cells)? } else { all_cells(&bases, &settings, &cells)? };
    for base in &bases {
        let svg = matrix(&all, &base.name)?;
        let stem = base.name.rsplit('/').next().unwrap_or(&base.name);
        files::write_atomic(&args.out.join(format!("{stem}.svg")), svg.0.as_bytes())?;
    }
    write_csv(&args.out.join("summary.csv"), &summary(&all))
}

/// Makes and scores all models; rows are written to `path` as they are made.
fn all_cells(bases: &[Base], settings: &Settings, path: &Path) -> Result<Vec<CellRow>> {
    let (mut csv, start) = (CsvLog::create(path)?, Instant::now());
    let mut all: Vec<CellRow> = vec![];
    for (at, base) in bases.iter().enumerate() {
        let other = (bases.len() > 1).then(|| &bases[(at + 1) % bases.len()]);
        trial(base, other, settings, &mut |cells| {
            for cell in cells {
                csv.push(cell)?;
                if cell.gate == "everywhere" && cell.learned_from == cell.animal {
                    say(format!(
                        "{}: {} of {}: p {:.3}, margin {:+.2} nats, {} rows, {:.0} s",
                        cell.base,
                        cell.model,
                        cell.animal,
                        cell.p,
                        cell.delta_margin,
                        cell.n_rows,
                        start.elapsed().as_secs_f64()
                    ));
                }
            }
            all.extend_from_slice(cells);
            Ok(())
        })?;
    }
    csv.finish()?;
    Ok(all)
}

/// Refuses to overwrite a file without `--force`.
pub(super) fn unfinished(path: &Path, ForceArg { force }: &ForceArg) -> Result<()> {
    ensure!(*force || !path.exists(), hinted!("{} is there already", path.display(); "overwrite it with --force"));
    Ok(())
}
