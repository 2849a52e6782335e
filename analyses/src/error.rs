//! What can go wrong in a measurement, beyond what the model itself refuses.

use std::fmt::Display;

use thiserror::Error;

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What could not be measured, and why.
#[derive(Debug, Error)]
pub enum Error {
    /// The model, the chat or a gate refused.
    #[error(transparent)]
    Hooks(#[from] hooks::Error),
    /// The analysis needs a LoRA, and the student has none.
    #[error("{analysis} needs a student with an adapter: {reason}")]
    NeedsAdapter {
        /// The analysis.
        analysis: &'static str,
        /// Why there is none, and what can be measured instead.
        reason: String,
    },
    /// The analysis compares with a teacher, and there is none.
    #[error("{analysis} needs a teacher, expected its system prompt or its adapter, found neither")]
    NeedsTeacher {
        /// The analysis.
        analysis: &'static str,
    },
    /// There is nothing to measure on.
    #[error("{analysis} needs {what}, found none")]
    Nothing {
        /// The analysis, or what else asked.
        analysis: &'static str,
        /// What is needed.
        what: &'static str,
    },
    /// The target or its alternatives cannot be scored.
    #[error("target {word:?}: {problem}")]
    Target {
        /// The word.
        word: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Two inputs that should say the same do not.
    #[error("row {row} of the numbers: {problem}")]
    Mismatch {
        /// The row's index.
        row: usize,
        /// What differs.
        problem: String,
    },
    /// A setting is outside of what is allowed.
    #[error("{analysis}.{setting} is {found}, expected {expected}")]
    Setting {
        /// The analysis.
        analysis: &'static str,
        /// The setting.
        setting: &'static str,
        /// What is allowed.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A chart could not be drawn.
    #[error("plot {title:?}: {problem}")]
    Plot {
        /// The chart's title.
        title: String,
        /// What went wrong.
        problem: String,
    },
}

impl Error {
    /// A setting outside of what is allowed: `{analysis}.{setting} is {found}, expected {expected}`.
    pub(crate) fn setting(analysis: &'static str, setting: &'static str, expected: &str, found: &dyn Display) -> Self {
        Self::Setting { analysis, setting, expected: expected.to_owned(), found: found.to_string() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Hooks(error.into())
    }
}
