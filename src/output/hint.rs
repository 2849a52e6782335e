//! Errors with hints.

use std::fmt;

use anyhow::Error;

/// An error with a hint.
#[derive(Debug)]
pub struct Hinted {
    /// The expected and the found value.
    pub what: String,
    /// The hint.
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
        let text = cause.to_string();
        let Some(own) = hint_of(cause) else { return text };
        hint.get_or_insert_with(|| own.to_owned());
        text.strip_suffix(&format!("; hint: {own}")).unwrap_or(&text).to_owned()
    };
    (error.chain().map(&mut said).collect::<Vec<_>>().join(": "), hint)
}

fn hint_of<'e>(cause: &'e (dyn std::error::Error + 'static)) -> Option<&'e str> {
    let own = cause.downcast_ref::<Hinted>().map(|hinted| hinted.hint.as_str());
    own.or_else(|| match cause.downcast_ref::<analyses::Error>() {
        Some(analyses::Error::Hooks(error)) => error.hint(),
        _ => cause.downcast_ref::<hooks::Error>()?.hint(),
    })
}

/// An error with a hint, each a format string with its arguments: `hinted!("{} is there already", path; "use
/// --force")`.
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
