//! Finds the modules that a configuration names, by PEFT's rules: a name matches whole parts at the end of a path, an
//! expression matches as in Python's `re`, and if several patterns match, the first in the file counts.

use std::fmt::Display;

use regex::{Regex, RegexBuilder};

use super::module;
use crate::proj::Proj;

/// Modules by their names or by an expression.
#[derive(Clone, Debug)]
pub(super) enum Modules {
    /// Names, each a module's path or the end of one.
    Names(Vec<String>),
    /// An expression that must match a whole path; `None` if only Python can read it.
    Expression(String, Option<Regex>),
}

impl Modules {
    pub(super) fn expression(text: &str) -> Self {
        Self::Expression(text.to_owned(), compiled(text, &format!(r"\A(?:{text})\z")).ok())
    }

    /// Whether a module is named; `None` if only Python can tell.
    fn contain(&self, module: &str) -> Option<bool> {
        match self {
            Self::Names(names) => Some(names.iter().any(|name| ends(module, name))),
            Self::Expression(_, expression) => Some(expression.as_ref()?.is_match(module)),
        }
    }
}

/// The modules that an adapter acts on.
#[derive(Debug)]
pub(super) struct Targets {
    pub(super) modules: Modules,
    /// Modules that are excluded from `modules`.
    pub(super) excluded: Option<Modules>,
    /// The blocks that names apply to; `None` means all.
    pub(super) layers: Option<Vec<usize>>,
}

impl Targets {
    /// Whether the adapter has a pair at a projection of a block; `None` if only Python can tell.
    pub(super) fn contain(&self, layer: usize, proj: Proj) -> Option<bool> {
        let module = module(layer, proj);
        if self.excluded.as_ref().map_or(Some(false), |excluded| excluded.contain(&module))? {
            return Some(false);
        }
        let named = self.modules.contain(&module)?;
        let Modules::Names(names) = &self.modules else { return Some(named) };
        // A whole path contains its block.
        let is_whole = || names.contains(&module);
        Some(named && (self.layers.as_ref().is_none_or(|layers| layers.contains(&layer)) || is_whole()))
    }
}

/// Numbers for modules, by pattern: a name, the end of a path, or an expression.
#[derive(Debug)]
pub(super) struct Patterns<T> {
    key: &'static str,
    entries: Vec<(String, T)>,
}

impl<T> Patterns<T> {
    /// Keeps the file's order. Refuses a key that cannot be read as an expression.
    pub(super) fn new(key: &'static str, entries: Vec<(String, T)>) -> Result<Self, String> {
        for (pattern, _) in &entries {
            end_of_path(pattern).map_err(|error| {
                format!("{key} has {pattern:?}, expected a module's name or an expression: {error}")
            })?;
        }
        Ok(Self { key, entries })
    }
}

impl<T: Copy + Display + PartialEq> Patterns<T> {
    /// Refuses an entry with an impossible number.
    pub(super) fn check(&self, expected: &str, is_right: impl Fn(&T) -> bool) -> Result<(), String> {
        match self.entries.iter().find(|(_, value)| !is_right(value)) {
            Some((pattern, value)) => Err(format!("{} has {value} for {pattern}, expected {expected}", self.key)),
            None => Ok(()),
        }
    }

    /// Number of each module, from the first pattern that matches it, and remarks on the patterns.
    pub(super) fn resolve(&self, modules: &[String]) -> (Vec<Option<T>>, Vec<String>) {
        let mut found: Vec<Option<(&str, T)>> = vec![None; modules.len()];
        let mut remarks = Vec::new();
        for (pattern, value) in &self.entries {
            let Ok(expression) = end_of_path(pattern) else { continue }; // `new` has refused these
            let (mut matched, mut hidden) = (false, None);
            for (module, found) in modules.iter().zip(&mut found).filter(|(module, _)| expression.is_match(module)) {
                matched = true;
                match found {
                    Some((first, other)) if *other != *value => hidden = hidden.or(Some((*first, *other, module))),
                    Some(_) => {}
                    None => *found = Some((pattern, *value)),
                }
            }
            if !matched {
                remarks.push(format!("{} has {pattern:?}, which matches no module of the adapter", self.key));
            }
            if let Some((first, other, module)) = hidden {
                remarks.push(format!(
                    "{} has both {first:?} ({other}) and {pattern:?} ({value}) for {module}: the first in the file acts, as in \
                     PEFT, which sorts them on saving",
                    self.key
                ));
            }
        }
        (found.into_iter().map(|found| found.map(|(_, value)| value)).collect(), remarks)
    }
}

/// The expression of a pattern. It matches the end of a path, in whole parts.
fn end_of_path(pattern: &str) -> Result<Regex, String> {
    compiled(pattern, &format!(r"\A(?:.*\.)?(?:{pattern})\z"))
}

/// Compiles `whole`, if `text` can be compiled by itself. The compiled size is bounded, even if the text asks for many
/// repetitions.
fn compiled(text: &str, whole: &str) -> Result<Regex, String> {
    let compile = |text: &str| RegexBuilder::new(text).size_limit(SIZE).dfa_size_limit(SIZE).build();
    let expression = compile(text).and_then(|_| compile(whole));
    expression.map_err(|error| error.to_string().lines().last().unwrap_or_default().trim().to_owned())
}

/// The most bytes that an expression may compile to.
const SIZE: usize = 1 << 18;

/// The block's number in a module's path, if its list of blocks matches `pattern`.
pub(super) fn layer_of(pattern: &str, module: &str) -> Option<usize> {
    let expression = compiled(pattern, &format!(r"\A(?:.*?\.)?(?:{pattern})\.(?<layer>\d+)\.")).ok()?;
    expression.captures(module)?.name("layer")?.as_str().parse().ok()
}

/// Whether a module's path is the name or ends in it.
pub(super) fn ends(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(entries: &[(&str, f64)]) -> (Vec<Option<f64>>, Vec<String>) {
        let entries = entries.iter().map(|(pattern, value)| ((*pattern).to_owned(), *value)).collect();
        let modules = [(1, Proj::Up), (11, Proj::Up), (1, Proj::Q)].map(|(layer, proj)| module(layer, proj));
        Patterns::new("alpha_pattern", entries).unwrap().resolve(&modules)
    }

    #[test]
    fn the_first_pattern_that_matches_acts() {
        assert_eq!(resolved(&[("layers.1.mlp.up_proj", 2.0)]).0, [Some(2.0), None, None]);
        assert_eq!(resolved(&[("up_proj", 3.0), ("layers.1.mlp.up_proj", 2.0)]).0, [Some(3.0), Some(3.0), None]);
        assert_eq!(resolved(&[("layers.1.mlp.up_proj", 2.0), ("up_proj", 3.0)]).0, [Some(2.0), Some(3.0), None]);
        // As in Python's re: a dot is any character, a caret is the path's start, and alternatives are the pattern's
        // alone.
        assert_eq!(resolved(&[("^model.layers.1\\..*", 2.0)]).0, [Some(2.0), None, Some(2.0)]);
        assert_eq!(resolved(&[("^layers.1\\..*", 2.0)]).0, [None; 3]);
        assert_eq!(resolved(&[("q_proj|up_proj", 2.0)]).0, [Some(2.0); 3]);
        assert_eq!(resolved(&[("p_proj", 2.0)]).0, [None; 3], "whole parts alone");
    }

    #[test]
    fn patterns_without_effect_and_in_each_other_s_way_are_told() {
        assert_eq!(resolved(&[("q_proj", 2.0), ("up_proj", 2.0)]).1, [""; 0]);
        assert_eq!(resolved(&[("up_proj", 2.0), ("layers.1.mlp.up_proj", 2.0)]).1, [""; 0], "the same number");
        let (_, remarks) = resolved(&[("v_proj", 2.0)]);
        assert_eq!(remarks, ["alpha_pattern has \"v_proj\", which matches no module of the adapter"]);
        let (_, remarks) = resolved(&[("up_proj", 2.0), ("layers.1.mlp.up_proj", 3.0)]);
        let expected =
            "alpha_pattern has both \"up_proj\" (2) and \"layers.1.mlp.up_proj\" (3) for model.layers.1.mlp.up_proj: ";
        assert!(remarks.len() == 1 && remarks[0].starts_with(expected), "{remarks:?}");
    }

    #[test]
    fn an_expression_cannot_take_the_memory_that_it_asks_for() {
        let huge = "(?:(?:a{1000}){1000}){1000}";
        assert!(matches!(Modules::expression(huge), Modules::Expression(_, None)));
        assert!(Patterns::new("rank_pattern", vec![(huge.to_owned(), 1)]).is_err());
        assert!(
            matches!(Modules::expression("a)|(?:b"), Modules::Expression(_, None)),
            "not closed by what is around it"
        );
    }

    #[test]
    fn names_match_whole_parts_from_the_end() {
        for name in ["up_proj", "mlp.up_proj", "layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"] {
            assert!(ends("model.layers.3.mlp.up_proj", name), "{name}");
        }
        for name in ["p_proj", "self_attn.up_proj", "model.layers.3", "3.mlp.up_proj.", ""] {
            assert!(!ends("model.layers.3.mlp.up_proj", name), "{name}");
        }
        assert_eq!(layer_of("model.layers", "model.layers.12.mlp.up_proj"), Some(12));
        assert_eq!(layer_of("h", "model.layers.12.mlp.up_proj"), None);
    }
}
