//! The Jupyter notebook (nbformat 4.5): a cell per section of prose, a cell per block of code with its results under
//! it. The keys are in Jupyter's own order, so that saving the file there changes nothing.
//!
//! Figures are SVG alone. GitHub puts an SVG result into its page through a sanitizer that drops styles, links and
//! scripts; our drawings have none of these: shapes and text with attributes.

use std::collections::BTreeMap;

use anyhow::Result;
use hooks::stream_seed;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Value, json};

use crate::{Notebook, Part, Shown};

/// The notebook as JSON text, beginning with the line that says how it is run.
pub(crate) fn notebook(notebook: &Notebook, parts: &[Part<'_>]) -> Result<String> {
    let mut cells = Cells::default();
    cells.prose(&notebook.origin());
    for part in parts {
        match part {
            Part::Prose(text) => sections(text).iter().for_each(|section| cells.prose(section)),
            Part::Code(code) => cells.code(code),
            Part::Result(shown) => cells.result(output(shown)),
        }
    }
    let kernel = json!({ "display_name": "Rust", "language": "rust", "name": "rust" }); // evcxr's
    let language =
        json!({ "file_extension": ".rs", "mimetype": "text/rust", "name": "rust", "pygments_lexer": "rust" });
    let whole = json!({
        "cells": cells.done,
        "metadata": { "kernelspec": kernel, "language_info": language },
        "nbformat": 4,
        "nbformat_minor": 5,
    });
    let mut text = Vec::new();
    whole.serialize(&mut Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b" ")))?;
    Ok(String::from_utf8(text)? + "\n")
}

#[derive(Default)]
struct Cells {
    done: Vec<Value>,
    /// How often each text was met.
    met: BTreeMap<String, u64>,
    executed: usize,
}

impl Cells {
    /// Prose; its links to other pages become links to their notebooks.
    fn prose(&mut self, text: &str) {
        let text = &text.replace(".md)", ".ipynb)");
        let id = self.id("prose", text);
        self.done.push(json!({ "cell_type": "markdown", "id": id, "metadata": {}, "source": lines(text) }));
    }

    fn code(&mut self, code: &str) {
        let id = self.id("code", code);
        self.executed += 1;
        self.done.push(json!({
            "cell_type": "code",
            "execution_count": self.executed,
            "id": id,
            "metadata": {},
            "outputs": [],
            "source": lines(code),
        }));
    }

    /// Puts a result under the cell before it, which is code: nothing else shows anything.
    fn result(&mut self, output: Value) {
        if let Some(outputs) = self.done.last_mut().and_then(|cell| cell["outputs"].as_array_mut()) {
            outputs.push(output);
        }
    }

    /// An id made of the cell's text alone, so that a change elsewhere does not change it; the same text met again gets
    /// another.
    fn id(&mut self, kind: &str, text: &str) -> String {
        let named = format!("{kind} {text}");
        let times = self.met.entry(named.clone()).or_default();
        *times += 1;
        format!("{:016x}", stream_seed(0, &named, *times))
    }
}

/// Prose in pieces that begin with a heading each, which is what Jupyter folds. A `#` in a block of code is no heading.
fn sections(text: &str) -> Vec<String> {
    let mut sections: Vec<String> = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        fenced ^= line.trim_start().starts_with("```");
        let heading = !fenced && line.trim_start_matches('#').starts_with(' ') && line.starts_with('#');
        match sections.last_mut() {
            Some(section) if !heading => section.extend(["\n", line]),
            _ => sections.push(line.to_owned()),
        }
    }
    sections.iter().map(|section| section.trim_matches('\n').to_owned()).collect()
}

/// A result in the forms that viewers choose from: the richest that they know, else plain text.
fn output(shown: &Shown) -> Value {
    let data = match shown {
        Shown::Text(text) => json!({ "text/plain": lines(text) }),
        Shown::Table(rows) => json!({ "text/html": lines(&html(rows)), "text/plain": lines(&aligned(rows)) }),
        Shown::Figure { name, svg } => json!({ "image/svg+xml": lines(&svg.0), "text/plain": [name] }),
    };
    json!({ "data": data, "metadata": {}, "output_type": "display_data" })
}

/// A text as nbformat keeps it: a list of lines with their ends.
fn lines(text: &str) -> Value {
    text.split_inclusive('\n').collect()
}

/// A table in HTML, its columns named by the first row.
fn html(rows: &[Vec<String>]) -> String {
    let escaped = |cell: &String| cell.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let row = |tag: &str, row: &Vec<String>| {
        let cells = row.iter().map(|cell| format!("<{tag} style=\"text-align: left\">{}</{tag}>", escaped(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let (head, body) = rows.split_at(rows.len().min(1));
    let part = |tag: &str, rows: &[Vec<String>]| rows.iter().map(|cells| row(tag, cells)).collect::<String>();
    format!("<table>\n<thead>\n{}</thead>\n<tbody>\n{}</tbody>\n</table>", part("th", head), part("td", body))
}

/// A table in columns of equal width.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let row = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(column, cell)| format!("{cell:<0$}", width(column).unwrap_or(0)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(row).collect::<Vec<_>>().join("\n")
}
