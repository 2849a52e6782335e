//! The errors, one variant per kind of problem that a user can solve.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// The result of a function that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// An error: what was expected, what was found, where, and what to try.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's own error.
        cause: std::io::Error,
    },
    /// The content of a file is wrong.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The key or place, with the expected and the found value.
        problem: String,
    },
    /// The model uses something that is not supported.
    #[error("{}: {feature} is not supported; {instead}", path.display())]
    Unsupported {
        /// The file with the unsupported feature.
        path: PathBuf,
        /// The key and its value.
        feature: String,
        /// The supported alternative.
        instead: String,
    },
    /// `--model` names nothing that can be found.
    #[error("no model {name}: {reason}")]
    NoSuchModel {
        /// The name as given.
        name: String,
        /// The files that were looked for, and a suggestion.
        reason: String,
    },
    /// A tensor of the model is not in its files.
    #[error("tensor {name} is missing in {file}")]
    MissingTensor {
        /// The tensor, by its Hugging Face name.
        name: String,
        /// The file or files.
        file: String,
    },
    /// A tensor does not have the shape that the configuration asks for.
    #[error("tensor {tensor} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that is needed.
        expected: Vec<i64>,
        /// The shape in the file.
        found: Vec<i64>,
    },
    /// No hook point has this name.
    #[error("no hook point {name}; the nearest name is {nearest}")]
    UnknownHookPoint {
        /// The name as given.
        name: String,
        /// The existing name that is closest to it.
        nearest: String,
    },
    /// A name is not one of the choices.
    #[error("unknown {what} {found:?}, expected one of: {choices}")]
    UnknownName {
        /// The kind of thing that was named.
        what: &'static str,
        /// The name as given.
        found: String,
        /// The choices.
        choices: String,
    },
    /// A tap was set at hook points that the forward pass did not reach.
    #[error("the tap at {points} never fired; the forward pass did not reach it")]
    TapNeverFired {
        /// The hook points.
        points: String,
    },
    /// An activation was requested that was not captured.
    #[error("{point} was not captured; captured were {captured}")]
    NotCaptured {
        /// The requested hook point.
        point: String,
        /// The hook points that were captured.
        captured: String,
    },
    /// An adapter does not fit the model or its own configuration.
    #[error("{}: {problem}", path.display())]
    Adapter {
        /// The adapter's file or folder.
        path: PathBuf,
        /// The problem, with the names of tensors or keys.
        problem: String,
    },
    /// Vectors or activations were read from another model, or under another chat template.
    #[error("{what}: read from {found}, not from {here}")]
    OtherModel {
        /// The file, or the vectors or activations.
        what: String,
        /// The file's value.
        found: String,
        /// The model's value.
        here: String,
    },
    /// A gate or an edit selects no token of a prompt.
    #[error("{what} selects no token of the prompt; {reason}")]
    EmptySelection {
        /// The gate or edit as written.
        what: String,
        /// The text, ids or positions that were not found, or the classes that the prompt has.
        reason: String,
    },
    /// A loss would be taken over no token at all.
    #[error("the loss mask {mask} selects no token of row {row}")]
    EmptyLossMask {
        /// The mask's name.
        mask: String,
        /// The row's index.
        row: usize,
    },
    /// A value is not allowed.
    #[error("{what} is {found}, expected {expected}")]
    Invalid {
        /// The name of the value.
        what: String,
        /// The values that are allowed.
        expected: String,
        /// The value that was found.
        found: String,
    },
    /// The tokenizer could not be read or used.
    #[error("tokenizer: {problem}")]
    Tokenizer {
        /// The tokenizer's own message.
        problem: String,
    },
    /// The chat template does not have the known shape.
    #[error("chat template: {problem}")]
    ChatTemplate {
        /// The first difference, or the template engine's error.
        problem: String,
    },
    /// CUDA was requested and is not available.
    #[error("CUDA is not available: {reason}; hint: {CUDA_HINT}")]
    CudaUnavailable {
        /// The library or device that was looked for, and the result.
        reason: String,
    },
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(String),
    /// One of the other errors, with a hint.
    #[error("{error}; hint: {hint}")]
    Hinted {
        /// The error.
        error: Box<Error>,
        /// A suggestion.
        hint: String,
    },
}

const CUDA_HINT: &str =
    "run with --device cpu, or point LD_LIBRARY_PATH at the lib folder of a CUDA build of PyTorch 2.11";

impl Error {
    /// The error for a value that is not allowed: `{what} is {found}, expected {expected}`.
    #[expect(clippy::needless_pass_by_value, reason = "a number or a text is given as it is")]
    pub fn invalid(what: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Invalid { what: what.into(), expected: expected.into(), found: found.to_string() }
    }

    /// This error with a hint.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self::Hinted { error: Box::new(self), hint: hint.into() }
    }

    /// The hint, if there is one. The error's text ends with `; hint: ` and the hint.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Hinted { hint, .. } => Some(hint),
            Self::CudaUnavailable { .. } => Some(CUDA_HINT),
            _ => None,
        }
    }
}

/// A problem in a file's bytes, with or without a hint. The caller adds the file's path.
#[derive(Debug)]
pub(crate) struct Problem {
    text: String,
    hint: Option<String>,
}

impl Problem {
    pub(crate) fn hinted(text: String, hint: impl Into<String>) -> Self {
        Self { text, hint: Some(hint.into()) }
    }

    /// Turns the problem into an error; `error` makes it from the problem's text.
    pub(crate) fn into_error(self, error: impl FnOnce(String) -> Error) -> Error {
        let error = error(self.text);
        match self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

impl From<Problem> for String {
    fn from(Problem { text, hint }: Problem) -> Self {
        match hint {
            Some(hint) => format!("{text}; hint: {hint}"),
            None => text,
        }
    }
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self { text, hint: None }
    }
}

impl From<tch::TchError> for Error {
    /// Keeps the first line. The rest is a C++ backtrace.
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// The error for a file whose content is wrong.
pub(crate) fn malformed(path: &Path, problem: impl Into<Problem>) -> Error {
    problem.into().into_error(|problem| Error::Malformed { path: path.to_owned(), problem })
}

/// The error for a feature in a file that is not supported, with the supported alternative.
pub(crate) fn unsupported(path: &Path, feature: impl Into<String>, instead: impl Into<String>) -> Error {
    Error::Unsupported { path: path.to_owned(), feature: feature.into(), instead: instead.into() }
}

/// Names for a message: at most ten, and the number of names if there are more.
pub(crate) fn few(names: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match (names.len(), shown.join(", ")) {
        (0, _) => "none".to_owned(),
        (n, shown) if n > SHOWN => format!("{shown}, … ({n} in all)"),
        (_, shown) => shown,
    }
}

/// A JSON value in one line, cut after 80 characters.
pub(crate) fn short(value: &serde_json::Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_ends_the_text() {
        let plain = || Error::Tokenizer { problem: "it has none".to_owned() };
        assert_eq!(plain().hint(), None);
        let cuda = Error::CudaUnavailable { reason: "no driver".to_owned() };
        let problem = Problem::hinted("it has none".to_owned(), "give another");
        for error in [plain().with_hint("give another"), problem.into_error(|_| plain()), cuda] {
            let (text, hint) = (error.to_string(), error.hint().map(str::to_owned));
            assert_eq!(text.split_once("; hint: ").map(|(_, hint)| hint.to_owned()), hint, "{text}");
        }
        assert_eq!(plain().with_hint("give another").to_string(), "tokenizer: it has none; hint: give another");
    }
}
