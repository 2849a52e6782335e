//! The command line of undertone: parse, run, print the error and its hint.

use std::process::ExitCode;

use clap::Parser;
use undertone::cli::{Cli, run};
use undertone::output::hint::explained;
use undertone::output::progress::say;

fn main() -> ExitCode {
    hooks::device::keep_freed_memory();
    let Err(error) = run(&Cli::parse()) else { return ExitCode::SUCCESS };
    let (what, hint) = explained(&error);
    say(format!("error: {what}"));
    if let Some(hint) = hint {
        say(format!("hint: {hint}"));
    }
    ExitCode::FAILURE
}
