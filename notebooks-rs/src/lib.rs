//! A notebook is a cargo example that prints itself: lines that begin with `//|` are prose, the rest of `main` is code,
//! and what [`Notebook::show`] is given stands on the page under the code that showed it. No macro and no parser: each
//! result remembers the line it came from, and [`Notebook::write`] walks the example's own source.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::panic::Location;
use std::path::{Path, PathBuf};

use analyses::Svg;
use anyhow::{Context, Result, bail};
use hooks::files;

/// The first and the last line of what is printed: the example's `main`.
const BEGIN: &str = "fn main(";
const END: &str = "}";
/// The notebook's own first and last line are left out.
const FRAME: [&str; 2] = ["Notebook::open(", "nb.write()"];

/// A page in the making.
#[derive(Debug)]
pub struct Notebook {
    source: &'static str,
    page: PathBuf,
    /// What was shown, as Markdown, by the line of the source that showed it.
    shown: BTreeMap<usize, Vec<String>>,
    /// The figures, by the file that each goes to.
    figures: BTreeMap<PathBuf, Svg>,
}

impl Notebook {
    /// A notebook whose code is `source` (`include_str!` of the example itself) and which is written to `page`.
    pub fn open(source: &'static str, page: impl AsRef<Path>) -> Self {
        Self { source, page: page.as_ref().to_owned(), shown: BTreeMap::new(), figures: BTreeMap::new() }
    }

    /// Puts a value under the code that calls this.
    #[track_caller]
    pub fn show(&mut self, value: impl Display) {
        let text = value.to_string();
        // a fence longer than any in the text, so that shown Markdown cannot end it
        let fence = "`".repeat(3.max(longest_run(&text, '`') + 1));
        self.put(Location::caller(), format!("{fence}text\n{}\n{fence}", text.trim_end()));
    }

    /// Puts rows as a table under the code that calls this; the first row names the columns.
    #[track_caller]
    pub fn table<C: Display>(&mut self, rows: &[Vec<C>]) {
        let mut text = String::new();
        for (index, row) in rows.iter().enumerate() {
            for cell in row {
                let cell = cell.to_string().replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;");
                let _ = write!(text, "| {} ", cell.replace('\n', " "));
            }
            text.push_str("|\n");
            if index == 0 {
                let _ = writeln!(text, "{}|", "| --- ".repeat(row.len()));
            }
        }
        self.put(Location::caller(), text.trim_end().to_owned());
    }

    /// Puts a figure under the code that calls this; it is written beside the page, as `{page}-{name}.svg`.
    #[track_caller]
    pub fn figure(&mut self, name: &str, svg: Svg) {
        let stem = self.page.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let file = format!("{stem}-{name}.svg");
        self.put(Location::caller(), format!("![{name}]({file})"));
        self.figures.insert(self.page.with_file_name(file), svg);
    }

    /// Writes the page and its figures.
    pub fn write(&self) -> Result<()> {
        let page = self.markdown()?;
        for (path, svg) in &self.figures {
            files::write_atomic(path, svg.0.as_bytes())?;
        }
        files::write_atomic(&self.page, page.as_bytes())?;
        Ok(())
    }

    fn put(&mut self, at: &Location<'_>, markdown: String) {
        self.shown.entry(at.line() as usize).or_default().push(markdown);
    }

    /// The page: prose as it is, code in fences, each result after the statement that showed it.
    fn markdown(&self) -> Result<String> {
        let lines: Vec<&str> = self.source.lines().collect();
        let begin = lines
            .iter()
            .position(|line| line.starts_with(BEGIN))
            .context("the notebook has no fn main at the start of a line")?;
        let end = begin
            + lines[begin..]
                .iter()
                .position(|line| *line == END)
                .context("fn main does not end with } at the start of a line")?;
        if let Some(line) = self.shown.keys().find(|line| !(begin + 1..=end).contains(*line)) {
            bail!(
                "line {line} shows something outside of main, which is not on the page; hint: show what a function returns"
            );
        }
        let mut page = Page::default();
        let mut pending: Vec<&String> = Vec::new();
        for (index, line) in lines.iter().enumerate().take(end).skip(begin + 1) {
            let line = line.strip_prefix("    ").unwrap_or(line);
            if let Some(prose) = line.trim_start().strip_prefix("//|") {
                page.prose(prose.strip_prefix(' ').unwrap_or(prose));
                continue;
            }
            if FRAME.iter().any(|frame| line.contains(frame)) {
                continue;
            }
            page.code(line);
            pending.extend(self.shown.get(&(index + 1)).into_iter().flatten());
            // a call over several lines, or a loop, is one statement of main: its results wait for its end
            let statement = line.split(" //").next().unwrap_or_default().trim_end();
            if !line.starts_with(' ') && (statement.ends_with(';') || statement.ends_with('}')) {
                pending.drain(..).for_each(|result| page.result(result));
            }
        }
        for result in pending {
            page.result(result);
        }
        Ok(page.finish())
    }
}

/// Markdown that grows by prose lines, blocks of code and results, with a blank line between parts.
#[derive(Default)]
struct Page {
    text: String,
    code: Vec<String>,
}

impl Page {
    fn prose(&mut self, line: &str) {
        self.end_code();
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    fn code(&mut self, line: &str) {
        self.code.push(line.trim_end().to_owned());
    }

    fn result(&mut self, markdown: &str) {
        self.end_code();
        self.part(markdown);
    }

    /// Ends the block of code, without the blank lines around it.
    fn end_code(&mut self) {
        let code = std::mem::take(&mut self.code).join("\n");
        if !code.trim().is_empty() {
            self.part(&format!("```rust\n{}\n```", code.trim_matches('\n')));
        }
    }

    fn part(&mut self, markdown: &str) {
        while !self.text.is_empty() && !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
        self.text.push_str(markdown);
        self.text.push_str("\n\n");
    }

    fn finish(mut self) -> String {
        self.end_code();
        format!("{}\n", self.text.trim_end())
    }
}

fn longest_run(text: &str, wanted: char) -> usize {
    text.split(|character| character != wanted).map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
