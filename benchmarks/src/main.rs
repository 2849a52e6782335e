//! Our side of the benchmark: a process that reads requests as lines of JSON, does them, and answers how long each
//! took. `bench.py` drives it and its peer in turns; `peer.py` understands the same lines.

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

/// Does a line's request; every answer has its peak of memory.
fn answer(bench: &mut Option<Bench>, line: &str) -> Result<Value> {
    let request: Request = serde_json::from_str(line).with_context(|| format!("the request {line}"))?;
    machine::reset_peak()?;
    let mut reply = scenarios::run(bench, request)?;
    reply["peak_mib"] = json!(machine::peak_mib()?);
    Ok(reply)
}
