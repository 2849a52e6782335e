//! The data dictionary: every column of every CSV file of a run. The meanings are the doc comments of the row structs,
//! read from the embedded sources, so that the two always agree.

use anstyle::Style;
use anyhow::{Context, Result, bail};
use clap::Args;

use crate::claim::Quantity;
use crate::hinted;

use super::style::{cell, columns as terminal_columns, heading, wrapped};
use crate::output::progress::print;

/// Prints the meaning and unit of the columns of a run's CSV files.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  undertone columns
  undertone columns token_ablation
  undertone columns runs/demo/divergence/summary.csv
  undertone columns delta_logp
  undertone columns quantity
  undertone columns --csv > columns.csv")]
pub struct ColumnsArgs {
    /// A file (train.csv, steering/rows.csv, a path to one), a folder (data, steering), or a column (margin); if left
    /// out, all files.
    name: Option<String>,
    /// Prints CSV: file, column, meaning.
    #[arg(long)]
    csv: bool,
}

/// The CSV files of a run, each with the struct of its rows and the source code of that struct.
const SOURCES: &[(&str, &str, &str)] = &[
    ("data/generate.csv", "SummaryRow", include_str!("../data/dataset.rs")),
    ("data/signal.csv", "SignalRow", include_str!("../data/signal.rs")),
    ("data/rejected.csv", "RejectedRow", include_str!("../data/dataset.rs")),
    ("data/digits.csv", "DigitRow", include_str!("../data/dataset.rs")),
    ("data/teacher.csv", "TeacherRow", include_str!("../stages/teacher.rs")),
    ("teacher_train.csv", "StepRow", include_str!("../training/step_log.rs")),
    ("train.csv", "StepRow", include_str!("../training/step_log.rs")),
    ("control_train.csv", "StepRow", include_str!("../training/step_log.rs")),
    ("train_rows.csv", "StepRowsRow", include_str!("../training/step_log.rs")),
    ("control_train_rows.csv", "StepRowsRow", include_str!("../training/step_log.rs")),
    ("target_rate/rows.csv", "TargetRateRow", include_str!("../../analyses/src/target_rate.rs")),
    ("token_ablation/rows.csv", "TokenAblationRow", include_str!("../../analyses/src/token_ablation.rs")),
    ("position_scan/rows.csv", "PositionScanRow", include_str!("../../analyses/src/position_scan.rs")),
    ("direction/rows.csv", "DirectionRow", include_str!("../../analyses/src/direction.rs")),
    ("steering/rows.csv", "SteeringRow", include_str!("../../analyses/src/steering/rows.rs")),
    ("interventions/rows.csv", "InterventionRow", include_str!("../../analyses/src/interventions.rs")),
    ("divergence/rows.csv", "DivergenceRow", include_str!("../../analyses/src/divergence.rs")),
    ("divergence/summary.csv", "DivergenceSummaryRow", include_str!("../../analyses/src/divergence.rs")),
    ("gradients/rows.csv", "GradientRow", include_str!("../../analyses/src/gradients/rows.rs")),
    ("lens/rows.csv", "LensRow", include_str!("../../analyses/src/lens.rs")),
    ("ledger/summary.csv", "LedgerRow", include_str!("../../analyses/src/ledger/rows.rs")),
    ("ledger/entries.csv", "EntryRow", include_str!("../../analyses/src/ledger/rows.rs")),
    ("ledger/parts.csv", "PartRow", include_str!("../../analyses/src/ledger/rows.rs")),
    ("arms/rows.csv", "ArmRow", include_str!("../stages/arm_table.rs")),
    ("claim/outcomes.csv", "OutcomeRow", include_str!("../claim/outcome.rs")),
    ("claim/tests.csv", "TestRow", include_str!("../claim/verdict.rs")),
    ("claim/runs.csv", "ClaimRunRow", include_str!("../claim/tables.rs")),
    ("claim/matrix.csv", "MatrixRow", include_str!("../claim/tables.rs")),
    ("claim/context.csv", "ContextRow", include_str!("../claim/tables.rs")),
    ("claim/digit_conf.csv", "DigitConfRow", include_str!("../claim/tables.rs")),
    ("claim/steer.csv", "SteerRow", include_str!("../claim/tables.rs")),
    ("claim/spectrum.csv", "SpectrumRow", include_str!("../claim/tables.rs")),
];

/// A CSV file of a run, with its meaning and columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dictionary {
    /// Its path in the run's folder.
    pub file: &'static str,
    /// The meaning of a row.
    pub row: String,
    /// Its columns, in order.
    pub columns: Vec<Column>,
}

/// A column of a CSV file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name in the header.
    pub name: String,
    /// Its meaning and unit.
    pub meaning: String,
}

/// Every CSV file that a run can hold.
pub fn dictionaries() -> Result<Vec<Dictionary>> {
    let of = |(file, row, code): &(&'static str, &str, &str)| {
        let (row, columns) = struct_docs(code, row).with_context(|| *file)?;
        Ok(Dictionary { file, row, columns })
    };
    SOURCES.iter().map(of).collect()
}

/// The values of the column `quantity` of a claim's outcomes.
fn quantities() -> Dictionary {
    let of = |quantity: &Quantity| Column { name: quantity.name().to_owned(), meaning: quantity.meaning().to_owned() };
    let row = "What the column quantity of claim/outcomes.csv names.".to_owned();
    Dictionary { file: "quantity", row, columns: Quantity::ALL.iter().map(of).collect() }
}

/// Prints the dictionary, or the named part of it.
pub fn run(args: &ColumnsArgs) -> Result<()> {
    let mut all = dictionaries()?;
    all.push(quantities());
    let chosen = match &args.name {
        Some(name) => choose(&all, name)?,
        None => all,
    };
    print(&if args.csv { as_csv(&chosen)? } else { as_text(&chosen, terminal_columns()) })
}

/// The files of that name or folder; if there are none, the columns of that name.
fn choose(all: &[Dictionary], name: &str) -> Result<Vec<Dictionary>> {
    let asked = name.trim_start_matches("./").trim_end_matches('/');
    let is = |known: &str| asked == known || asked.ends_with(&format!("/{known}"));
    // A file is found by its path, name, stem or folder, also with the run's folder in front.
    let names = |file: &'static str| {
        let (folder, last) = file.rsplit_once('/').unwrap_or(("", file));
        [file, last, file.trim_end_matches(".csv"), last.trim_end_matches(".csv"), folder]
    };
    let known = |file: &'static str| names(file).into_iter().filter(|known| !known.is_empty());
    let is_whole = |one: &&Dictionary| is(one.file) || is(one.file.trim_end_matches(".csv"));
    let whole: Vec<_> = all.iter().filter(is_whole).cloned().collect();
    if !whole.is_empty() {
        return Ok(whole); // control_train.csv is not also train.csv's
    }
    let files: Vec<_> = all.iter().filter(|one| known(one.file).any(is)).cloned().collect();
    if !files.is_empty() {
        return Ok(files);
    }
    let of_that_name = |one: &Dictionary| {
        let columns: Vec<_> = one.columns.iter().filter(|column| column.name == asked).cloned().collect();
        (!columns.is_empty()).then(|| Dictionary { columns, ..one.clone() })
    };
    let found: Vec<_> = all.iter().filter_map(of_that_name).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let choices = all.iter().flat_map(|one| known(one.file).chain(one.columns.iter().map(|column| &*column.name)));
    let nearest = choices.min_by_key(|choice| strsim::damerau_levenshtein(asked, choice)).unwrap_or_default();
    bail!(hinted!(
        "no CSV file, analysis or column is called {name:?}, the nearest is {nearest}";
        "`undertone columns` lists all"
    ))
}

/// A heading per file and an indented line per column.
fn as_text(chosen: &[Dictionary], width: usize) -> String {
    let names = chosen.iter().flat_map(|one| &one.columns).map(|column| column.name.len());
    let name_width = names.max().unwrap_or(0).min(24);
    let mut text = String::new();
    for (at, one) in chosen.iter().enumerate() {
        if at > 0 {
            text.push('\n');
        }
        text += &heading(one.file);
        text.push('\n');
        for line in wrapped(&one.row, width) {
            text.extend([&line, "\n"]);
        }
        for column in &one.columns {
            let mut name = cell(&column.name, name_width, Style::new().bold());
            for line in wrapped(&column.meaning, width - name_width - 4) {
                text.extend(["  ", &name, "  ", &line, "\n"]);
                name = " ".repeat(name_width);
            }
        }
    }
    text
}

/// A line per column: file, column, meaning.
fn as_csv(chosen: &[Dictionary]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["file", "column", "meaning"])?;
    for one in chosen {
        for column in &one.columns {
            writer.write_record([one.file, &column.name, &column.meaning])?;
        }
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// The doc comments of a struct in Rust code and of its public fields. A field without a doc comment is an error.
fn struct_docs(code: &str, name: &str) -> Result<(String, Vec<Column>)> {
    let opening = format!("pub struct {name} {{");
    let mut lines = code.lines();
    let mut docs = Docs::default();
    let row = loop {
        let line = lines.next().with_context(|| format!("the source has no {opening}"))?.trim();
        if line == opening {
            break docs.take();
        }
        docs.read(line);
    };
    let mut columns = Vec::new();
    for line in lines.map(str::trim) {
        if line == "}" {
            return Ok((row, columns));
        }
        match line.strip_prefix("pub ").and_then(|field| field.split_once(':')) {
            Some((field, _)) => {
                let (meaning, name) = (docs.take(), field.trim_start_matches("r#").to_owned());
                if meaning.is_empty() {
                    bail!("the column {name} has no doc comment");
                }
                columns.push(Column { name, meaning });
            }
            None => docs.read(line),
        }
    }
    bail!("{opening} is not closed")
}

/// The lines of the doc comment that was read last.
#[derive(Default)]
struct Docs(Vec<String>);

impl Docs {
    /// Keeps a line of a doc comment. Attributes and comments may follow; any other line drops it.
    fn read(&mut self, line: &str) {
        if let Some(doc) = line.strip_prefix("///") {
            self.0.push(doc.trim().to_owned());
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            self.0.clear();
        }
    }

    fn take(&mut self) -> String {
        std::mem::take(&mut self.0).join(" ").trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "
/// Another.
pub struct OtherRow {
    /// Not this one.
    pub a: f64,
}

/// A row, over
/// two lines.
#[derive(Debug)]
pub struct Row {
    /// The layer, from 0.
    pub layer: usize, // not a doc
    /// A long one,
    /// in nats.
    #[serde(default)]
    pub delta_logp: Option<f64>,
}
";

    fn names(found: &[Dictionary]) -> Vec<&str> {
        found.iter().map(|one| one.file).collect()
    }

    #[test]
    fn doc_comments_of_the_named_struct_are_its_columns() {
        let (row, columns) = struct_docs(CODE, "Row").unwrap();
        assert_eq!(row, "A row, over two lines.");
        let columns: Vec<_> = columns.iter().map(|column| (&*column.name, &*column.meaning)).collect();
        assert_eq!(columns, [("layer", "The layer, from 0."), ("delta_logp", "A long one, in nats.")]);
    }

    #[test]
    fn a_column_without_a_meaning_and_a_struct_that_is_gone_are_errors() {
        let undocumented = CODE.replace("    /// The layer, from 0.\n", "");
        let error = struct_docs(&undocumented, "Row").unwrap_err().to_string();
        assert_eq!(error, "the column layer has no doc comment");
        assert!(struct_docs(CODE, "Ro").unwrap_err().to_string().contains("pub struct Ro {"));
        assert!(struct_docs(CODE.trim_end().trim_end_matches('}'), "Row").unwrap_err().to_string().contains("closed"));
    }

    #[test]
    fn a_file_answers_to_its_path_its_name_and_its_folder() {
        let all = dictionaries().unwrap();
        for (name, expected) in [
            ("train.csv", &["train.csv"][..]),
            ("train", &["train.csv"]),
            ("runs/demo/train.csv", &["train.csv"]),
            ("control_train.csv", &["control_train.csv"]),
            ("digits", &["data/digits.csv"]),
            (
                "data",
                &["data/generate.csv", "data/signal.csv", "data/rejected.csv", "data/digits.csv", "data/teacher.csv"],
            ),
            ("./runs/demo/divergence/", &["divergence/rows.csv", "divergence/summary.csv"]),
            ("divergence/summary", &["divergence/summary.csv"]),
            ("token_ablation", &["token_ablation/rows.csv"]),
        ] {
            assert_eq!(names(&choose(&all, name).unwrap()), expected, "{name}");
        }
        let column = choose(&all, "recovered_logp").unwrap();
        assert_eq!((names(&column), column[0].columns.len()), (vec!["token_ablation/rows.csv"], 1));
    }

    #[test]
    fn an_unknown_name_is_told_the_nearest() {
        let all = dictionaries().unwrap();
        for (name, nearest) in
            [("token_ablatoin", "token_ablation"), ("delta_lgp", "delta_logp"), ("trian.csv", "train.csv")]
        {
            let error = choose(&all, name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}, the nearest is {nearest}; hint: ")), "{error}");
        }
    }

    #[test]
    fn the_table_keeps_its_width_and_the_csv_its_cells() {
        let all = dictionaries().unwrap();
        let text = anstream::adapter::strip_str(&as_text(&all, 80)).to_string();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        let csv = as_csv(&all).unwrap();
        let mut reader = csv::Reader::from_reader(csv.as_bytes());
        let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
        assert_eq!(records.len(), all.iter().map(|one| one.columns.len()).sum::<usize>());
        let loss = records.iter().find(|cells| &cells[0] == "train.csv" && &cells[1] == "loss").unwrap();
        assert!(loss[2].contains("nats"), "{loss:?}");
    }

    #[test]
    fn every_quantity_has_a_meaning_and_answers_to_its_name() {
        let all = [dictionaries().unwrap(), vec![quantities()]].concat();
        let found = choose(&all, "quantity").unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].columns.iter().all(|column| column.meaning.ends_with('.') && column.meaning.len() > 20));
        let one = choose(&all, "gradient_cosine").unwrap();
        assert_eq!((one[0].file, one[0].columns.len()), ("quantity", 1));
        for quantity in Quantity::ALL {
            let written = serde_json::to_string(quantity).unwrap();
            assert_eq!(written, format!("\"{quantity}\""), "the name in tables is the name in files");
        }
    }
}
