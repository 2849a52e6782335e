//! The Markdown page: prose as it is, code in fences, tables, figures as links to files in its folder.

use std::fmt::Write as _;

use crate::{Notebook, Part, Shown};

/// The page of a notebook, ending with the line that says where it comes from.
pub(crate) fn page(notebook: &Notebook, parts: &[Part<'_>]) -> String {
    let parts = parts.iter().map(|part| match part {
        Part::Prose(text) => text.clone(),
        Part::Code(code) => format!("```rust\n{code}\n```"),
        Part::Result(Shown::Text(text)) => fenced(text),
        Part::Result(Shown::Table(rows)) => table(rows),
        Part::Result(Shown::Figure { name, .. }) => format!("![{name}]({})", notebook.figure_file(name)),
    });
    let parts: Vec<String> = parts.chain([notebook.origin()]).collect();
    parts.join("\n\n") + "\n"
}

/// A fence longer than any in the text, so that shown Markdown cannot end it.
fn fenced(text: &str) -> String {
    let longest = text.split(|character| character != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(3.max(longest + 1));
    format!("{fence}text\n{text}\n{fence}")
}

/// A table, its columns named by the first row.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for cell in row {
            let cell = cell.replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;").replace('\n', " ");
            let _ = write!(text, "| {cell} ");
        }
        text.push_str("|\n");
        if index == 0 {
            let _ = writeln!(text, "{}|", "| --- ".repeat(row.len()));
        }
    }
    text.trim_end().to_owned()
}
