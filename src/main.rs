//! The command line of undertone: parse, run, print the error and its hint.

use std::process::ExitCode;

use clap::Parser;
use undertone::cli::{Cli, run};
use undertone::output::progress::say;

fn main() -> ExitCode {
    hooks::device::keep_freed_memory();
    let Err(error) = run(&Cli::parse()) else { return ExitCode::SUCCESS };
    // The chain on one line; a hint, wherever in it, on a line of its own.
    let text = format!("{error:#}");
    match text.split_once("hint: ") {
        Some((what, hint)) => {
            let what = what.trim_end_matches([' ', ';', ':']);
            let (hint, cause) = hint.split_once(": ").unwrap_or((hint, ""));
            // If the hint comes first, the text after it is the error.
            let (what, cause) = if what.is_empty() { (cause, "") } else { (what, cause) };
            say(format!("error: {what}"));
            if !cause.is_empty() {
                say(format!("cause: {cause}"));
            }
            say(format!("hint: {hint}"));
        }
        None => say(format!("error: {text}")),
    }
    ExitCode::FAILURE
}
