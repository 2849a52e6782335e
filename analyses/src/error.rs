//! The errors of measurements, including those of the model.

use std::fmt::Display;

use thiserror::Error;

/// The result of a function that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// The reason that something could not be measured.
#[derive(Debug, Error)]
pub enum Error {
    /// An error of the model, the chat or a gate.
    #[error(transparent)]
    Hooks(#[from] hooks::Error),
    /// The analysis needs a LoRA, and the student has none.
    #[error("{analysis} needs a student with an adapter: {reason}")]
    NeedsAdapter {
        /// The analysis.
        analysis: &'static str,
        /// The reason that there is none, and an alternative.
        reason: String,
    },
    /// The analysis compares with a teacher, and there is none.
    #[error("{analysis} needs a teacher, expected its system prompt or its adapter, found neither")]
    NeedsTeacher {
        /// The analysis.
        analysis: &'static str,
    },
    /// An input that the measurement needs is missing.
    #[error("{analysis} needs {what}, found none")]
    Nothing {
        /// The analysis, or another function.
        analysis: &'static str,
        /// The missing input.
        what: &'static str,
    },
    /// The target or its alternatives cannot be scored.
    #[error("target {word:?}: {problem}")]
    Target {
        /// The word.
        word: String,
        /// The problem, and what to do.
        problem: String,
    },
    /// Two inputs that should agree do not.
    #[error("row {row} of the numbers: {problem}")]
    Mismatch {
        /// The row's index.
        row: usize,
        /// The difference.
        problem: String,
    },
    /// A setting has a value that is not allowed.
    #[error("{analysis}.{setting} is {found}, expected {expected}")]
    Setting {
        /// The analysis.
        analysis: &'static str,
        /// The setting.
        setting: &'static str,
        /// The values that are allowed.
        expected: String,
        /// The value that was found.
        found: String,
    },
    /// A chart could not be drawn.
    #[error("plot {title:?}: {problem}")]
    Plot {
        /// The chart's title.
        title: String,
        /// The problem.
        problem: String,
    },
}

impl Error {
    /// The error for a setting that is not allowed: `{analysis}.{setting} is {found}, expected {expected}`.
    pub(crate) fn setting(analysis: &'static str, setting: &'static str, expected: &str, found: &dyn Display) -> Self {
        Self::Setting { analysis, setting, expected: expected.to_owned(), found: found.to_string() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Hooks(error.into())
    }
}
