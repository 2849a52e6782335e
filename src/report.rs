//! `report.html`: one file that holds a run's figures and says what each one answers. No script and nothing loaded from
//! elsewhere, so that it can be mailed, printed and opened in ten years. Every text is escaped: prompts hold `<|im_start|>`.

use std::fmt::Write as _;

use analyses::Svg;

use crate::publish::Table;

/// How many rows of a table the page shows; the CSV file has them all.
const ROWS_SHOWN: usize = 20;

/// What the page says, from top to bottom.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The run in a few words.
    pub title: String,
    /// A warning above everything: "The model's weights are random: nothing here is evidence.".
    pub banner: Option<String>,
    /// The result on one screen.
    pub opening: Opening,
    /// The measurements, in reading order.
    pub sections: Vec<Section>,
    /// What made the run, name and value: model, fingerprint, seeds, device, dtype, version, commands.
    pub provenance: Vec<(String, String)>,
}

/// The result on one screen: a sentence, a figure, a few numbers.
#[derive(Clone, Debug, Default)]
pub struct Opening {
    /// What came out, in one sentence with its numbers.
    pub headline: String,
    /// The figure that shows it.
    pub svg: Option<Svg>,
    /// Label and value of each number worth its own box.
    pub numbers: Vec<(String, String)>,
}

/// One measurement.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// The anchor, unique on the page: the analysis' name.
    pub id: String,
    /// The heading.
    pub title: String,
    /// What is asked.
    pub question: String,
    /// What the rows say, in one sentence.
    pub reading: String,
    /// What a reader must know to trust or doubt it.
    pub notes: Vec<String>,
    /// The figures.
    pub svgs: Vec<Svg>,
    /// The CSV file that they were drawn from, relative to the page.
    pub csv: String,
    /// What is in that file.
    pub table: Option<Table>,
}

/// The page.
pub fn html(report: &Report) -> String {
    let title = escape(&report.title);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
    );
    if let Some(banner) = &report.banner {
        push(&mut page, &format!("<p class=\"banner\" role=\"note\">{}</p>", escape(banner)));
    }
    push(&mut page, &format!("<header>\n<h1>{title}</h1>"));
    push_opening(&mut page, &report.opening);
    push(&mut page, "</header>");
    push_contents(&mut page, report);
    push(&mut page, "<main>");
    for section in &report.sections {
        push_section(&mut page, section);
    }
    push_provenance(&mut page, &report.provenance);
    push(&mut page, "</main>\n</body>\n</html>");
    page
}

fn push_opening(page: &mut String, opening: &Opening) {
    if !opening.headline.is_empty() {
        push(page, &format!("<p class=\"headline\">{}</p>", escape(&opening.headline)));
    }
    if !opening.numbers.is_empty() {
        push(page, "<dl class=\"numbers\">");
        for (label, value) in &opening.numbers {
            push(page, &format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(label), escape(value)));
        }
        push(page, "</dl>");
    }
    opening.svg.iter().for_each(|svg| push_figure(page, svg));
}

fn push_contents(page: &mut String, report: &Report) {
    push(page, "<nav aria-label=\"Contents\">\n<ol>");
    for section in &report.sections {
        push(page, &format!("<li><a href=\"#{}\">{}</a></li>", escape(&section.id), escape(&section.title)));
    }
    if !report.provenance.is_empty() {
        push(page, "<li><a href=\"#provenance\">What made this run</a></li>");
    }
    push(page, "</ol>\n</nav>");
}

fn push_section(page: &mut String, section: &Section) {
    let (id, title) = (escape(&section.id), escape(&section.title));
    push(
        page,
        &format!("<section id=\"{id}\">\n<h2>{title}</h2>\n<p class=\"question\">{}</p>", escape(&section.question)),
    );
    section.svgs.iter().for_each(|svg| push_figure(page, svg));
    push(page, &format!("<p class=\"reading\">{}</p>", escape(&section.reading)));
    if !section.notes.is_empty() {
        push(page, "<ul class=\"notes\">");
        section.notes.iter().for_each(|note| push(page, &format!("<li>{}</li>", escape(note))));
        push(page, "</ul>");
    }
    push_table(page, section);
    push(page, "</section>");
}

fn push_figure(page: &mut String, svg: &Svg) {
    push(page, &format!("<figure>\n{}\n</figure>", svg.0.trim()));
}

/// The link to the CSV and its first rows, folded away.
fn push_table(page: &mut String, section: &Section) {
    if !section.csv.is_empty() {
        let csv = escape(&section.csv);
        push(page, &format!("<p class=\"csv\">Data: <a href=\"{csv}\">{csv}</a></p>"));
    }
    let Some(Table { header, rows }) = &section.table else { return };
    let shown = rows.len().min(ROWS_SHOWN);
    let summary = if shown < rows.len() {
        format!("The first {shown} of {} rows", rows.len())
    } else {
        format!("All {shown} rows")
    };
    push(page, &format!("<details>\n<summary>{summary}</summary>\n<div class=\"scroll\">\n<table>"));
    // numbers stand at the right, and so do their columns' names
    let is_number =
        |column: usize| rows.iter().any(|row| row.get(column).is_some_and(|cell| cell.parse::<f64>().is_ok()));
    let classes: Vec<&str> =
        (0..header.len()).map(|column| if is_number(column) { " class=\"number\"" } else { "" }).collect();
    let line = |tag: &str, cells: &[String], show: fn(&str) -> String| -> String {
        let cell = |(cell, class): (&String, &&str)| format!("<{tag}{class}>{}</{tag}>", escape(&show(cell)));
        cells.iter().zip(&classes).map(cell).collect()
    };
    push(page, &format!("<thead><tr>{}</tr></thead>\n<tbody>", line("th", header, str::to_owned)));
    rows[..shown].iter().for_each(|row| push(page, &format!("<tr>{}</tr>", line("td", row, rounded))));
    push(page, "</tbody>\n</table>\n</div>\n</details>");
}

fn push_provenance(page: &mut String, provenance: &[(String, String)]) {
    if provenance.is_empty() {
        return;
    }
    push(page, "<section id=\"provenance\">\n<h2>What made this run</h2>\n<dl class=\"provenance\">");
    for (name, value) in provenance {
        push(page, &format!("<dt>{}</dt><dd>{}</dd>", escape(name), escape(value)));
    }
    push(page, "</dl>\n</section>");
}

fn push(page: &mut String, line: &str) {
    page.push_str(line);
    page.push('\n');
}

/// A long decimal number in five digits; the CSV file has them all.
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

/// The text as it may stand between tags and in attributes.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut escaped, character| {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // other control characters are not allowed in HTML at all
            control if control.is_control() && !matches!(control, '\n' | '\t') => {
                let _ = write!(escaped, "\\u{{{:x}}}", u32::from(control));
            }
            other => escaped.push(other),
        }
        escaped
    })
}

const STYLE: &str = "\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .25rem; }
a { color: #0059a3; }
.banner { background: #fff3d6; border: 2px solid #b36b00; border-radius: 6px; padding: .75rem 1rem; margin: 0 0 1.5rem; font-weight: 600; }
.headline { font-size: 1.2rem; margin: 0 0 1rem; }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0 0 1rem; }
.numbers div { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .9rem; }
.numbers dt { color: #595959; font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
nav { border: solid #ddd; border-width: 1px 0; padding: .5rem 0; margin: 1.5rem 0; }
nav ol { margin: 0; padding-left: 1.5rem; columns: 2 18rem; }
section { margin: 2.5rem 0; scroll-margin-top: 1rem; }
.question { color: #595959; margin: 0 0 .75rem; }
.reading { border-left: 4px solid #0072b2; padding-left: .75rem; margin: .75rem 0; font-weight: 600; }
.notes, .csv { font-size: .9rem; }
.notes { padding-left: 1.25rem; }
figure { margin: .75rem 0; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-size: .9rem; }
.scroll { overflow: auto; max-height: 30rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; margin-top: .5rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #eee; text-align: left; white-space: pre; max-width: 24rem; overflow: hidden; text-overflow: ellipsis; }
th { border-bottom: 2px solid #bbb; background: #fff; position: sticky; top: 0; }
.number { text-align: right; }
.provenance { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
.provenance dt { color: #595959; }
.provenance dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 44rem) {
  /* figures shrink no further and scroll, so that their text stays readable */
  figure svg { max-width: max(100%, 32rem); }
  .provenance { display: block; }
  .provenance dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, table, .reading { break-inside: avoid; }
  h2 { break-after: avoid; }
  figure svg { max-width: 100%; }
  nav, details { display: none; }
}
";

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let row = |gate: &str, value: &str| vec![gate.to_owned(), value.to_owned()];
        let section = Section {
            id: "token-ablation".to_owned(),
            title: "Where the adapter acts".to_owned(),
            question: "Does <|im_start|> carry it?".to_owned(),
            reading: "\"Qwen\" & template: 0.33 of 0.45.".to_owned(),
            notes: vec!["1 < 2".to_owned()],
            svgs: vec![Svg("<svg viewBox=\"0 0 1 1\"></svg>".to_owned())],
            csv: "token-ablation/rows.csv".to_owned(),
            table: Some(Table {
                header: vec!["gate".to_owned(), "p_target".to_owned()],
                rows: (0..25).map(|n| row(&format!("only:<{n}>"), "0.3333333333333333")).collect(),
            }),
        };
        Report {
            title: "cats <script>".to_owned(),
            sections: vec![section],
            provenance: vec![("seed".to_owned(), "1".to_owned())],
            ..Report::default()
        }
    }

    #[test]
    fn every_text_is_escaped_and_figures_are_not() {
        let page = html(&report());
        assert!(page.contains("Does &lt;|im_start|&gt; carry it?") && !page.contains("<|im_start|>"));
        assert!(page.contains("<title>cats &lt;script&gt;</title>") && !page.contains("<script"));
        assert!(page.contains("&quot;Qwen&quot; &amp; template") && page.contains("<li>1 &lt; 2</li>"));
        assert!(page.contains("<svg viewBox=\"0 0 1 1\"></svg>"));
    }

    #[test]
    fn contents_lead_to_sections() {
        let page = html(&report());
        for id in ["token-ablation", "provenance"] {
            assert!(
                page.contains(&format!("href=\"#{id}\"")) && page.contains(&format!("<section id=\"{id}\"")),
                "{id}"
            );
        }
        assert!(page.contains("href=\"token-ablation/rows.csv\""));
    }

    #[test]
    fn the_table_shows_twenty_rows_and_says_of_how_many() {
        let page = html(&report());
        assert_eq!(page.matches("<tr>").count(), 1 + ROWS_SHOWN);
        assert!(
            page.contains("The first 20 of 25 rows")
                && page.contains("only:&lt;19&gt;")
                && !page.contains("only:&lt;20&gt;")
        );
        assert!(page.contains("<td class=\"number\">0.33333</td>"), "long numbers are rounded");
    }

    #[test]
    fn the_banner_is_there_only_when_given() {
        let banner = Some("weights are random".to_owned());
        assert!(!html(&report()).contains("class=\"banner\""));
        assert!(html(&Report { banner, ..report() }).contains("role=\"note\">weights are random</p>"));
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let page = html(&report());
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn numbers_are_rounded_and_other_cells_are_not() {
        let cells =
            ["0.123456789", "-12.3456789012", "1.23456789e-7", "12345678901", "0.25", "1.0.0.0.0.0", "only:sys.entity"]
                .map(rounded);
        assert_eq!(cells, ["0.12346", "-12.346", "1.235e-7", "12345678901", "0.25", "1.0.0.0.0.0", "only:sys.entity"]);
    }
}
