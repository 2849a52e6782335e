//! Reading and writing with the path in every error; what is written appears whole or not at all.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// A file's bytes, mapped or in memory.
pub(crate) type Bytes = Box<dyn AsRef<[u8]> + Send + Sync>;

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |cause| Error::Io { path: path.to_owned(), cause }
}

/// The bytes of a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(at(path))
}

/// The text of a file, which must be UTF-8.
pub fn read_string(path: &Path) -> Result<String> {
    text(&read(path)?, path).map(str::to_owned)
}

/// The text in the bytes of a file, which must be UTF-8; `path` is for messages.
pub fn text<'a>(bytes: &'a [u8], path: &Path) -> Result<&'a str> {
    std::str::from_utf8(bytes)
        .map_err(|error| Error::Malformed { path: path.to_owned(), problem: format!("expected UTF-8 text: {error}") })
}

/// Why weights in pickles are refused, and what to do instead.
pub const NO_PICKLE: &str = "a pickle runs the code that is in it when it is read, so it never is; hint: where you trust it, \
    load it in Python and call save_pretrained(FOLDER, safe_serialization=True)";

/// The name of a file of pickled weights in a folder, if there is one.
pub(crate) fn pickle(folder: &Path) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| is_pickle(Path::new(name))).min()
}

/// Whether a name is that of pickled weights.
pub fn is_pickle(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|pickled| extension.eq_ignore_ascii_case(pickled))
}

/// Opens a file for reading.
pub fn open(path: &Path) -> Result<fs::File> {
    fs::File::open(path).map_err(at(path))
}

/// Makes a folder and those above it.
pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(at(path))
}

/// Writes a file under a temporary name beside it and renames it, so that nothing half-written is ever seen.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        create_dir(folder)?;
    }
    let partial = temporary(path);
    fs::write(&partial, bytes).map_err(at(&partial))?;
    fs::rename(&partial, path).map_err(at(path))
}

/// The name beside `path` under which it is written before it is whole.
pub fn temporary(path: &Path) -> std::path::PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named() {
        let message = read(Path::new("no/such/file")).unwrap_err().to_string();
        assert!(message.starts_with("no/such/file: "), "{message}");
    }

    #[test]
    fn an_atomic_write_leaves_only_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/rows.csv");
        write_atomic(&path, b"a\n1\n").unwrap();
        assert_eq!(read_string(&path).unwrap(), "a\n1\n");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
