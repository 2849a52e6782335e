//! An error that says what to try.

use std::fmt;

use anyhow::Error;

/// What went wrong, and what to try.
#[derive(Debug)]
pub struct Hinted {
    /// What was expected and what was found.
    pub what: String,
    /// What to try.
    pub hint: String,
}

impl std::error::Error for Hinted {}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; hint: {}", self.what, self.hint)
    }
}

impl Hinted {
    /// An error with its causes on one line, and a hint.
    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    pub fn because(cause: Error, hint: &str) -> Error {
        Self { what: format!("{cause:#}"), hint: hint.to_owned() }.into()
    }
}

/// An error's causes on one line, without the hint, and the hint.
pub fn explained(error: &Error) -> (String, Option<String>) {
    let mut hint = None;
    let mut said = |cause: &(dyn std::error::Error + 'static)| {
        if let Some(hinted) = cause.downcast_ref::<Hinted>() {
            hint.get_or_insert_with(|| hinted.hint.clone());
            return hinted.what.clone();
        }
        cause.to_string()
    };
    (error.chain().map(&mut said).collect::<Vec<_>>().join(": "), hint)
}

/// An error with a hint, each a format string with its arguments: `hinted!("{} is there already", path; "use --force")`.
#[macro_export]
macro_rules! hinted {
    ($what:literal $(, $arg:expr)* ; $hint:literal $(, $more:expr)* $(,)?) => {
        $crate::output::hint::Hinted { what: format!($what $(, $arg)*), hint: format!($hint $(, $more)*) }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_told_apart_wherever_it_is_in_the_chain() {
        let error = Error::from(hinted!("{} is there already", "x.csv"; "use {}", "--force")).context("export");
        assert_eq!(format!("{error:#}"), "export: x.csv is there already; hint: use --force");
        assert_eq!(explained(&error), ("export: x.csv is there already".to_owned(), Some("use --force".to_owned())));
        assert_eq!(explained(&Error::msg("none")), ("none".to_owned(), None));
    }
}
