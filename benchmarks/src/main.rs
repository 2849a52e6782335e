//! Our side of the benchmark: a process that is told by lines of JSON what to do, does it, and answers how long it took.
//! `bench.py` drives it and its peer in turns; `peer.py` understands the same lines.

mod data;
mod floor;
mod machine;
mod scenarios;

use std::io::{BufRead, Write};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::scenarios::{Bench, Request};

fn main() -> Result<()> {
    hooks::device::keep_freed_memory(); // as undertone itself does
    let mut bench: Option<Bench> = None;
    for line in std::io::stdin().lock().lines() {
        let reply = answer(&mut bench, &line?).unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{reply}")?;
        out.flush()?;
    }
    Ok(())
}

/// Does what a line asks for; its peak of memory is told with every answer.
fn answer(bench: &mut Option<Bench>, line: &str) -> Result<Value> {
    let request: Request = serde_json::from_str(line).with_context(|| format!("the request {line}"))?;
    machine::reset_peak()?;
    let mut reply = scenarios::run(bench, request)?;
    reply["peak_mib"] = json!(machine::peak_mib()?);
    Ok(reply)
}
