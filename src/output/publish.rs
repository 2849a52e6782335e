//! Writes rows as CSV files: a row struct is a file's schema, its field docs are the dictionary. A file appears whole
//! or not at all; a log that grows step by step has a temporary name until it is finished.

use std::fs::File;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hooks::files;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes rows as a CSV file. Floats are written as the shortest text that reads back as the same number.
pub fn write_csv<R: Serialize>(path: &Path, rows: &[R]) -> Result<()> {
    ensure!(
        !rows.is_empty(),
        "{}: there are no rows to write; a table without rows would hide that nothing was measured",
        path.display()
    );
    let text = to_csv(rows).with_context(|| path.display().to_string())?;
    Ok(files::write_atomic(path, text.as_bytes())?)
}

/// Rows as the text of a CSV file.
pub fn to_csv<R: Serialize>(rows: &[R]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.serialize(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// The rows of a CSV file; an error names the file and the line.
pub fn read_csv<R: DeserializeOwned>(path: &Path) -> Result<Vec<R>> {
    parse_csv(&files::read_string(path)?).with_context(|| path.display().to_string())
}

/// The rows of a CSV file; none if there is no such file.
pub(crate) fn read_csv_if_there<R: DeserializeOwned>(path: &Path) -> Result<Vec<R>> {
    if path.exists() { read_csv(path) } else { Ok(vec![]) }
}

/// The rows in the text of a CSV file; an error names the line.
pub fn parse_csv<R: DeserializeOwned>(text: &str) -> Result<Vec<R>> {
    Ok(csv::Reader::from_reader(text.as_bytes()).deserialize().collect::<Result<Vec<R>, csv::Error>>()?)
}

/// The text of a CSV file's cells, for a page that shows any table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The column names.
    pub header: Vec<String>,
    /// The cells, row by row.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Reads the table in a CSV file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = files::read(path)?;
        let mut reader = csv::Reader::from_reader(&bytes[..]);
        let cells = |record: &csv::StringRecord| record.iter().map(str::to_owned).collect::<Vec<_>>();
        let header = cells(reader.headers().with_context(|| path.display().to_string())?);
        let rows: Result<Vec<_>, csv::Error> = reader.records().map(|record| Ok(cells(&record?))).collect();
        Ok(Self { header, rows: rows.with_context(|| path.display().to_string())? })
    }
}

/// A CSV file that is written row by row, each on disk immediately, and gets its name when it is finished.
#[derive(Debug)]
pub struct CsvLog<R> {
    path: PathBuf,
    writer: Option<csv::Writer<File>>, // until it is finished
    n_rows: usize,
    row: PhantomData<fn(R)>,
}

impl<R: Serialize> CsvLog<R> {
    /// Creates an empty log, which has a temporary name in `path`'s folder until it is finished.
    pub fn create(path: &Path) -> Result<Self> {
        let partial = files::temporary(path);
        // All files are created by `write_atomic`; this one is then opened for appending.
        files::write_atomic(&partial, b"")?;
        let file = File::options().append(true).open(&partial).with_context(|| partial.display().to_string())?;
        let writer = Some(csv::Writer::from_writer(file));
        Ok(Self { path: path.to_owned(), writer, n_rows: 0, row: PhantomData })
    }

    /// Appends a row.
    pub fn push(&mut self, row: &R) -> Result<()> {
        if let Some(writer) = &mut self.writer {
            writer.serialize(row).with_context(|| self.path.display().to_string())?;
            writer.flush().map_err(|cause| files::unwritten(&self.path, cause))?;
        }
        self.n_rows += 1;
        Ok(())
    }

    /// Finishes the log: gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        ensure!(self.n_rows > 0, "{}: no row was logged", self.path.display());
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let file = writer.into_inner().map_err(|error| files::unwritten(&self.path, error.into_error()))?;
        Ok(files::publish(&file, &self.path)?)
    }
}

impl<R> Drop for CsvLog<R> {
    /// Removes the file of a log that was not finished.
    fn drop(&mut self) {
        if self.writer.is_some() {
            let _ = files::remove(&files::temporary(&self.path)); // the earlier error is reported
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Row {
        layer: usize,
        name: String,
        value: f64,
        error: Option<f32>,
    }

    fn row(layer: usize, value: f64) -> Row {
        Row { layer, name: "a,\"b\"\nc".to_owned(), value, error: None }
    }

    #[test]
    fn floats_are_written_short_and_without_loss() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/rows.csv");
        let rows = [Row { layer: 0, name: "x".to_owned(), value: 0.1, error: Some(0.1) }, row(1, 1.0 / 3.0)];
        write_csv(&path, &rows).unwrap();
        let text = files::read_string(&path).unwrap();
        assert!(text.starts_with("layer,name,value,error\n0,x,0.1,0.1\n"), "{text}");
        assert!(text.contains("0.3333333333333333"), "{text}");
        assert_eq!(read_csv::<Row>(&path).unwrap(), rows);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_finite_number_comes_back(value in any::<f64>().prop_filter("finite", |x| x.is_finite()), name in ".*") {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("rows.csv");
            let rows = [Row { layer: 3, name, value, error: Some(1.5) }];
            write_csv(&path, &rows).unwrap();
            prop_assert_eq!(read_csv::<Row>(&path).unwrap(), rows);
        }
    }

    #[test]
    fn no_rows_is_an_error_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        assert!(write_csv::<Row>(&path, &[]).unwrap_err().to_string().contains("rows.csv"));
        assert!(!path.exists());
    }

    #[test]
    fn a_bad_cell_is_named_by_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        files::write_atomic(&path, b"layer,name,value,error\n0,x,0.5,\n1,y,many,\n").unwrap();
        let message = format!("{:#}", read_csv::<Row>(&path).unwrap_err());
        assert!(message.contains("rows.csv") && message.contains("line: 3"), "{message}");
        assert_eq!(Table::read(&path).unwrap().rows[1], ["1", "y", "many", ""]);
    }

    #[test]
    fn a_log_is_on_disk_by_the_row_and_named_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.csv");
        let mut log = CsvLog::create(&path).unwrap();
        log.push(&row(1, 0.5)).unwrap();
        assert!(!path.exists(), "an unfinished log does not look finished");
        assert!(files::read_string(&files::temporary(&path)).unwrap().contains("0.5"));
        log.push(&row(2, 0.25)).unwrap();
        log.finish().unwrap();
        assert_eq!(read_csv::<Row>(&path).unwrap(), [row(1, 0.5), row(2, 0.25)]);
        let other = folder.path().join("other.csv");
        assert!(CsvLog::<Row>::create(&other).unwrap().finish().is_err(), "a log without rows stays unnamed");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "and leaves nothing");
    }
}
