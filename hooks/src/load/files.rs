//! Reading and writing files, with the path in every error. A written file appears whole or not at all, and its bytes
//! are on the disk before it appears.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result, malformed};
use crate::profile::{self, Stage};

/// A file's bytes, memory-mapped or in memory.
pub(crate) type Bytes = Box<dyn AsRef<[u8]> + Send + Sync>;

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |cause| Error::Io { path: path.to_owned(), cause }
}

/// The error for a file that could not be written, with a hint.
pub fn unwritten(path: &Path, cause: io::Error) -> Error {
    let hint = match cause.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "free some space there and give the same command again; what was whole is as it was"
        }
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => "choose a folder that can be written",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "a file is where a folder is needed; choose another",
        _ => return at(path)(cause),
    };
    at(path)(cause).with_hint(hint)
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
    std::str::from_utf8(bytes).map_err(|error| malformed(path, format!("expected UTF-8 text: {error}")))
}

pub(crate) const NO_PICKLE: &str = "a pickle runs the code that is in it when it is read, so it never is";

pub(crate) const PICKLE_HINT: &str =
    "where you trust it, load it in Python and call save_pretrained(FOLDER, safe_serialization=True)";

/// The name of a file of pickled weights in a folder, if there is one.
pub(crate) fn pickle(folder: &Path) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| is_pickle(Path::new(name))).min()
}

/// The folders inside `folder` that contain `file`, sorted.
pub(crate) fn folders_with(folder: &Path, file: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(std::result::Result::ok);
    let holding = entries.filter(|entry| entry.path().join(file).is_file());
    let mut names: Vec<String> = holding.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Whether a file is named like pickled weights.
pub fn is_pickle(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|pickled| extension.eq_ignore_ascii_case(pickled))
}

pub(crate) fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Opens a file for reading.
pub fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(at(path))
}

/// Maps a file into memory, read-only.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    map_opened(&open(path)?, path)
}

/// Maps an open file into memory, read-only; `path` is for messages.
pub(crate) fn map_opened(file: &File, path: &Path) -> Result<Mmap> {
    #[expect(
        unsafe_code,
        reason = "a mapped model must not be changed while it is in use; no program writes into one in place"
    )]
    let map = unsafe { Mmap::map(file) };
    map.map_err(at(path))
}

/// Makes a folder and those above it.
pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|cause| unwritten(path, cause))
}

/// Removes a file, if it exists.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(unwritten(path, cause)),
        _ => Ok(()),
    }
}

/// Writes a file under a temporary name in the same folder and renames it, so that no reader sees half a file.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_by(path, |file| file.write_all(bytes).map_err(|cause| unwritten(path, cause)))
}

/// Writes a file piece by piece, under a temporary name until it is whole. On an error the old file stays.
pub fn write_atomic_by(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let _stage = profile::stage(Stage::Writing);
    create_dir(folder_of(path))?;
    let partial = temporary(path);
    let written = File::create(&partial).map_err(|cause| unwritten(path, cause)).and_then(|file| {
        let mut buffered = BufWriter::new(file);
        write(&mut buffered)?;
        let file = buffered.into_inner().map_err(|error| unwritten(path, error.into_error()))?;
        publish(&file, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&partial); // the caller gets the write's error
    }
    written
}

/// Renames a file from its temporary name to `path`, once every byte of it is on the disk.
pub fn publish(file: &File, path: &Path) -> Result<()> {
    file.sync_all().and_then(|()| fs::rename(temporary(path), path)).map_err(|cause| unwritten(path, cause))?;
    // The rename should survive a power cut too. Not every file system can promise that; the file itself is safe.
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

/// The name in `path`'s folder under which the file is written until it is whole.
pub fn temporary(path: &Path) -> std::path::PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
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
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_write_that_fails_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        write_atomic(&path, b"before").unwrap();
        let full = |file: &mut dyn Write| {
            file.write_all(&vec![0; 100_000]).unwrap(); // more than a buffer holds
            assert!(path.with_file_name("rows.csv.tmp").metadata().unwrap().len() > 0);
            assert_eq!(read(&path).unwrap(), b"before", "while it is written");
            Err(unwritten(&path, ErrorKind::StorageFull.into()))
        };
        let message = write_atomic_by(&path, full).unwrap_err().to_string();
        assert!(message.contains("rows.csv: ") && message.contains("hint: free some space"), "{message}");
        assert_eq!(read(&path).unwrap(), b"before");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no half-written file stays");

        let below = write_atomic(&path.join("x"), b"").unwrap_err().to_string();
        assert!(below.contains("rows.csv: ") && below.contains("hint: a file is where a folder is needed"), "{below}");
    }
}
