//! Writes `report.html`: one file with a run's figures and the question that each answers. It has no scripts and loads
//! nothing, so that it can be mailed, printed and opened in ten years. Every text is escaped: prompts hold
//! `<|im_start|>`.

use std::path::Path;

use analyses::Svg;
use hooks::files;
use maud::{DOCTYPE, Markup, PreEscaped, Render, html};

use crate::output::publish::Table;

/// A wider figure, in pixels, is placed above its text.
const COLUMN: f64 = 480.0;

/// Number of rows of a table that the page shows. The CSV file has all.
const ROWS_SHOWN: usize = 20;

/// The content of the page, from top to bottom.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The title: the run in a few words.
    pub title: String,
    /// A warning at the top, such as "The model's weights are random: nothing here is evidence.".
    pub banner: Option<String>,
    /// The result on one screen.
    pub opening: Opening,
    /// The measurements, in reading order.
    pub sections: Vec<Section>,
    /// The origin of the run, as names and values: model, fingerprint, seeds, device, dtype, version, commands.
    pub provenance: Vec<(String, String)>,
}

/// The result on one screen: a sentence, a figure, a few numbers and their cells in the CSV files.
#[derive(Clone, Debug, Default)]
pub struct Opening {
    /// The result in one sentence with its numbers.
    pub headline: String,
    /// The figure of the result.
    pub figure: Option<Figure>,
    /// The most important numbers, each in a line.
    pub numbers: Vec<Number>,
}

/// A number and its cell in a CSV file.
#[derive(Clone, Debug, Default)]
pub struct Number {
    /// Its name.
    pub label: String,
    /// The number as text.
    pub value: String,
    /// The CSV file, relative to the page.
    pub csv: String,
    /// The cell of the CSV file: "`delta_logp` where scope is mean and model is student".
    pub cell: String,
}

/// A drawing and its file.
#[derive(Clone, Debug)]
pub struct Figure {
    /// The drawing, which is embedded in the page.
    pub svg: Svg,
    /// Its file, relative to the page; empty if there is none.
    pub path: String,
}

impl Figure {
    /// The drawing at `path`, on a page in the folder `root`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn of(root: &Path, path: &Path) -> hooks::Result<Self> {
        Ok(Self { svg: Svg(files::read_string(path)?), path: relative(root, path) })
    }
}

/// A path as a link from a page in the folder `root`.
pub(crate) fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

/// One measurement. Empty parts are left out.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// The anchor, unique on the page: the analysis' name.
    pub id: String,
    /// The heading.
    pub title: String,
    /// The question.
    pub question: String,
    /// The result in one sentence. It states the absence of an effect as plainly as an effect.
    pub reading: String,
    /// The controls that the measurement is compared with.
    pub control: String,
    /// Facts that a reader needs to judge it.
    pub notes: Vec<String>,
    /// The figures.
    pub figures: Vec<Figure>,
    /// The CSV file that the figures were drawn from, relative to the page.
    pub csv: String,
    /// The content of the CSV file.
    pub table: Option<Table>,
    /// The settings of the measurement, as TOML.
    pub settings: String,
}

/// Renders the page.
pub fn html(report: &Report) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (Text(&report.title)) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                @if let Some(banner) = &report.banner {
                    p.banner role="note" { (Text(banner)) }
                }
                header {
                    h1 { (Text(&report.title)) }
                    (opening(&report.opening))
                }
                (contents(report))
                main {
                    @for measurement in &report.sections { (section(measurement)) }
                    @if !report.provenance.is_empty() {
                        section id="provenance" {
                            h2 { (PROVENANCE) }
                            dl.provenance {
                                @for (name, value) in &report.provenance { dt { (Text(name)) } dd { (Text(value)) } }
                            }
                        }
                    }
                }
            }
        }
    };
    page.into_string()
}

const PROVENANCE: &str = "What made this run";

/// The result on one screen: the sentence, the figure, and below it each number with its file and cell.
fn opening(Opening { headline, figure, numbers }: &Opening) -> Markup {
    html! {
        @if !headline.is_empty() { p.headline { (Text(headline)) } }
        @if let Some(figure) = figure { (drawing(figure)) }
        @if !numbers.is_empty() {
            div.scroll {
                table.numbers {
                    thead { tr { th { "number" } th.number { "value" } th { "where it stands" } } }
                    tbody {
                        @for Number { label, value, csv, cell } in numbers {
                            tr {
                                td { (Text(label)) }
                                td.number { (Text(value)) }
                                td { (link(csv)) ": " (Text(cell)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn contents(report: &Report) -> Markup {
    html! {
        nav aria-label="Contents" {
            ol {
                @for Section { id, title, .. } in &report.sections {
                    li { a href={ "#" (Text(id)) } { (Text(title)) } }
                }
                @if !report.provenance.is_empty() { li { a href="#provenance" { (PROVENANCE) } } }
            }
        }
    }
}

fn section(section: &Section) -> Markup {
    html! {
        section id=(Text(&section.id)) {
            h2 { (Text(&section.title)) }
            p.question { (Text(&section.question)) }
            div.beside {
                @if !section.figures.is_empty() {
                    div.figures { @for figure in &section.figures { (drawing(figure)) } }
                }
                div.words {
                    p.reading { (Text(&section.reading)) }
                    (sources(section))
                    @if !section.notes.is_empty() {
                        ul.notes { @for note in &section.notes { li { (Text(note)) } } }
                    }
                }
            }
            @if let Some(rows) = &section.table { (table(rows)) }
            @if !section.settings.is_empty() {
                details { summary { "Settings" } pre { (Text(section.settings.trim())) } }
            }
        }
    }
}

/// The controls, and the files with the numbers and figures.
fn sources(Section { control, csv, figures, .. }: &Section) -> Markup {
    let paths: Vec<&String> = figures.iter().map(|figure| &figure.path).filter(|path| !path.is_empty()).collect();
    html! {
        dl.sources {
            @if !control.is_empty() { dt { "Control" } dd { (Text(control)) } }
            @if !csv.is_empty() { dt { "Data" } dd { (link(csv)) } }
            @if !paths.is_empty() {
                dt { "Figure" }
                dd { @for (at, path) in paths.iter().enumerate() { @if at > 0 { ", " } (link(path)) } }
            }
        }
    }
}

fn link(path: &str) -> Markup {
    html! { a href=(Text(path)) { (Text(path)) } }
}

fn drawing(Figure { svg, .. }: &Figure) -> Markup {
    html! { figure class=[(width(svg) > COLUMN).then_some("wide")] { (PreEscaped(svg.0.trim())) } }
}

/// The width of a drawing, from its SVG header.
fn width(svg: &Svg) -> f64 {
    let head = svg.0.split('>').next().unwrap_or_default();
    let number = head.split_once(" width=\"").and_then(|(_, rest)| rest.split('"').next()?.parse().ok());
    number.unwrap_or_default()
}

/// The table's first rows, in a collapsed element.
fn table(Table { header, rows }: &Table) -> Markup {
    let shown = rows.len().min(ROWS_SHOWN);
    let summary = if shown < rows.len() {
        format!("The first {shown} of {} rows", rows.len())
    } else {
        format!("All {shown} rows")
    };
    // columns of numbers are right-aligned, including their names
    let is_number =
        |column: usize| rows.iter().any(|row| row.get(column).is_some_and(|cell| cell.parse::<f64>().is_ok()));
    let classes: Vec<Option<&str>> = (0..header.len()).map(|column| is_number(column).then_some("number")).collect();
    html! {
        details {
            summary { (summary) }
            div.scroll {
                table {
                    thead { tr { @for (name, class) in header.iter().zip(&classes) { th class=[class] { (Text(name)) } } } }
                    tbody {
                        @for row in &rows[..shown] {
                            tr { @for (cell, class) in row.iter().zip(&classes) { td class=[class] { (Text(&rounded(cell))) } } }
                        }
                    }
                }
            }
        }
    }
}

/// A long decimal number, rounded to five digits. The CSV file has all digits.
fn rounded(cell: &str) -> String {
    match cell.parse::<f64>() {
        Ok(value) if cell.len() > 8 && cell.contains('.') && value.is_finite() => {
            let size = value.abs();
            if size != 0.0 && !(1e-4..1e7).contains(&size) {
                return format!("{value:.3e}");
            }
            let decimals = if size == 0.0 { 0 } else { (4.0 - size.log10().floor()).max(0.0) as usize };
            format!("{value:.decimals$}")
        }
        _ => cell.to_owned(),
    }
}

/// A text of the page. `html!` escapes it, except for apostrophes and control characters. HTML allows only line ends
/// and tabs as control characters, so others are written out.
struct Text<'a>(&'a str);

impl Render for Text<'_> {
    fn render_to(&self, page: &mut String) {
        for character in self.0.render().0.chars() {
            match character {
                '\'' => page.push_str("&#39;"),
                other if other.is_control() && !matches!(other, '\n' | '\t') => page.extend(other.escape_unicode()),
                other => page.push(other),
            }
        }
    }
}

/// The page's style. In dark mode the figures' background, text and grid change too; their series keep their colours.
const STYLE: &str = "\
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --faint: #595959; --rule: #ddd; --hair: #eee; --link: #0059a3; --mark: #0072b2; --note: #fff3d6; --note-rule: #b36b00; --grid: #e4e4e4; --axis: #888; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --ink: #e4e4e6; --faint: #a9adb5; --rule: #3a3e46; --hair: #2a2d34; --link: #7cbcf0; --mark: #3d9bd6; --note: #35290f; --note-rule: #c98a1b; --grid: #32363e; --axis: #80858f; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .25rem; }
a { color: var(--link); }
.banner { background: var(--note); border: 2px solid var(--note-rule); border-radius: 6px; padding: .75rem 1rem; margin: 0 0 1.5rem; font-weight: 600; }
.headline { font-size: 1.15rem; margin: 0 0 1rem; max-width: 48rem; }
header figure { margin: 1rem 0; }
header figure:not(.wide) svg { width: 44rem; }
nav { border: solid var(--rule); border-width: 1px 0; padding: .5rem 0; margin: 2rem 0; }
nav ol { margin: 0; padding-left: 1.5rem; columns: 3 14rem; }
nav li { break-inside: avoid; }
section { margin: 3rem 0; scroll-margin-top: 1rem; }
.question { color: var(--faint); margin: 0 0 .75rem; }
.beside { display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: flex-start; }
.figures { flex: 0 1 auto; max-width: 100%; }
.words { flex: 1 1 20rem; min-width: 0; max-width: 48rem; }
.reading { border-left: 4px solid var(--mark); padding-left: .75rem; margin: .5rem 0 .75rem; font-weight: 500; }
.sources { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem .75rem; margin: .75rem 0; font-size: .9rem; }
.sources dt { color: var(--faint); }
.sources dd { margin: 0; overflow-wrap: anywhere; }
.notes { font-size: .9rem; padding-left: 1.1rem; margin: .75rem 0; }
figure { margin: .5rem 0; overflow-x: auto; }
figure svg { display: block; width: 29rem; max-width: 100%; height: auto; }
figure.wide svg { width: auto; }
svg text { font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; }
svg text[fill='#222222'] { fill: var(--ink); }
svg text[fill='#595959'] { fill: var(--faint); }
svg [stroke='#222222'] { stroke: var(--ink); }
svg [stroke='#888888'] { stroke: var(--axis); }
svg [stroke='#E4E4E4'] { stroke: var(--grid); }
svg [fill='#FFFFFF']:not(text) { fill: var(--paper); }
@media (prefers-color-scheme: dark) {
  svg [fill='#0072B2'] { fill: #2f8ac9; }
  svg [stroke='#0072B2'] { stroke: #2f8ac9; }
}
details { margin: .35rem 0; }
summary { cursor: pointer; font-size: .9rem; }
pre { font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; margin: .5rem 0; padding: .6rem .8rem; border: 1px solid var(--rule); border-radius: 6px; overflow-x: auto; }
.scroll { overflow: auto; max-height: 30rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; margin-top: .5rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--hair); text-align: left; white-space: pre; max-width: 24rem; overflow: hidden; text-overflow: ellipsis; }
th { border-bottom: 2px solid var(--rule); background: var(--paper); position: sticky; top: 0; }
.numbers { font-size: .9rem; }
.numbers td { white-space: normal; max-width: none; vertical-align: top; }
.numbers .number { white-space: nowrap; font-weight: 600; }
.number { text-align: right; }
.provenance { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem; font-size: .9rem; }
.provenance dt { color: var(--faint); }
.provenance dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 44rem) {
  /* wide figures shrink no further and scroll, so that their text stays readable */
  figure.wide svg { max-width: max(100%, 44rem); }
  .headline { font-size: 1.05rem; }
  .provenance { display: block; }
  .provenance dd { margin-bottom: .5rem; }
  .numbers thead { display: none; }
  .numbers td { display: inline-block; border: 0; padding: 0 .4rem 0 0; }
  .numbers td:last-child { display: block; padding: 0 0 .5rem; color: var(--faint); overflow-wrap: anywhere; }
}
@media print {
  :root { --paper: #fff; --ink: #222; --faint: #595959; --rule: #ddd; --hair: #eee; --grid: #e4e4e4; --axis: #888; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, table, .reading { break-inside: avoid; }
  h2 { break-after: avoid; }
  nav, details { display: none; }
}
";

#[cfg(test)]
mod tests;
