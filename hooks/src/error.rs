//! What can go wrong, one variant per thing that a user can do something about.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What could not be done: what was expected, what was found, where, and what to try.
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
    /// A file that was read does not hold what it should.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The key or place, what was expected and what was found.
        problem: String,
    },
    /// The model uses something that is not supported.
    #[error("{}: {feature} is not supported; {instead}", path.display())]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// The key and its value.
        feature: String,
        /// What is supported instead.
        instead: String,
    },
    /// `--model` names nothing that can be found.
    #[error("no model {name}: {reason}")]
    NoSuchModel {
        /// The name as given.
        name: String,
        /// What was looked for, and what to try.
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
        /// The shape that is there.
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
        /// What was being named.
        what: &'static str,
        /// The name as given.
        found: String,
        /// What can be chosen.
        choices: String,
    },
    /// A tap was set at hook points that the forward pass did not reach.
    #[error("the tap at {points} never fired; the forward pass did not reach it")]
    TapNeverFired {
        /// The hook points.
        points: String,
    },
    /// An activation was asked for that was not captured.
    #[error("{point} was not captured; captured were {captured}")]
    NotCaptured {
        /// The hook point asked for.
        point: String,
        /// The hook points at hand.
        captured: String,
    },
    /// An adapter does not fit the model or its own configuration.
    #[error("{}: {problem}", path.display())]
    Adapter {
        /// The adapter's file or folder.
        path: PathBuf,
        /// What does not fit, with names.
        problem: String,
    },
    /// Vectors or activations were read from another model, or under another chat template.
    #[error("{what}: read from {found}, not from {here}")]
    OtherModel {
        /// The file, or what was read.
        what: String,
        /// What the file says.
        found: String,
        /// The model at hand.
        here: String,
    },
    /// A gate or an edit selects no token of a prompt.
    #[error("{what} selects no token of the prompt; {reason}")]
    EmptySelection {
        /// The gate or edit as written.
        what: String,
        /// What was looked for, or what the prompt does have.
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
    /// A value is outside of what is allowed.
    #[error("{what} is {found}, expected {expected}")]
    Invalid {
        /// What the value is.
        what: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The tokenizer could not be read or used.
    #[error("tokenizer: {problem}")]
    Tokenizer {
        /// What went wrong, in its own words.
        problem: String,
    },
    /// The chat template is not one whose pieces are known.
    #[error("chat template: {problem}")]
    ChatTemplate {
        /// The first difference, or the template engine's error.
        problem: String,
    },
    /// CUDA was asked for and is not there.
    #[error("CUDA is not available: {reason}; hint: {CUDA_HINT}")]
    CudaUnavailable {
        /// What was looked for and what was found.
        reason: String,
    },
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(String),
    /// Any of these, with a hint.
    #[error("{error}; hint: {hint}")]
    Hinted {
        /// The error.
        error: Box<Error>,
        /// What to try.
        hint: String,
    },
}

const CUDA_HINT: &str =
    "run with --device cpu, or point LD_LIBRARY_PATH at the lib folder of a CUDA build of PyTorch 2.11";

impl Error {
    /// A value outside of what is allowed: `{what} is {found}, expected {expected}`.
    #[expect(clippy::needless_pass_by_value, reason = "a number or a text is given as it is")]
    pub fn invalid(what: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Invalid { what: what.into(), expected: expected.into(), found: found.to_string() }
    }

    /// This error with a hint at what to try.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self::Hinted { error: Box::new(self), hint: hint.into() }
    }

    /// What to try, if there is a hint: the text ends with `; hint: ` and it.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Hinted { hint, .. } => Some(hint),
            Self::CudaUnavailable { .. } => Some(CUDA_HINT),
            _ => None,
        }
    }
}

/// A problem in some bytes, and perhaps a hint. The caller knows the file.
#[derive(Debug)]
pub(crate) struct Problem {
    text: String,
    hint: Option<String>,
}

impl Problem {
    /// A problem with a hint.
    pub(crate) fn hinted(text: String, hint: impl Into<String>) -> Self {
        Self { text, hint: Some(hint.into()) }
    }

    /// The problem as an error, which `error` makes of its text.
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
    /// Keeps the first line: what follows is a C++ backtrace.
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// A file that does not hold what it should.
pub(crate) fn malformed(path: &Path, problem: impl Into<Problem>) -> Error {
    problem.into().into_error(|problem| Error::Malformed { path: path.to_owned(), problem })
}

/// Something in a file that is not supported, and what is instead.
pub(crate) fn unsupported(path: &Path, feature: impl Into<String>, instead: impl Into<String>) -> Error {
    Error::Unsupported { path: path.to_owned(), feature: feature.into(), instead: instead.into() }
}

/// Names in a message: at most ten, and how many there are if there are more.
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
