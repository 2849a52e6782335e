//! Names of a row's tokens, for gates and edits: `TERM[+TERM]`, or `not(TERM[+TERM])` for all others.
//!
//! A term is a class or a union of classes (`entity`, `template`, `sys.content`, …), a text (`"Qwen"`, every
//! occurrence; `"Qwen"#2`, the second), token ids (`ids(151644)`) or positions (`positions(0..6,-1)`). Classes and ids
//! also select generated tokens. Texts and positions select tokens of the prompt: a position means the same token in a
//! whole row, in the prefill and in every later step. A term that selects nothing is an error, since nothing would be
//! measured.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde_with::{DeserializeFromStr, SerializeDisplay};

use crate::chat::tokens::{Selection, Sequence, TokenClass};
use crate::error::{Error, Result};

/// Some tokens of a row.
///
/// ```
/// let (_, chat) = hooks::open("tiny-random")?;
/// let prompt = chat.prompt(None, "Name an animal.")?;
/// let tokens: hooks::Tokens = "\"animal\"+positions(-1)".parse()?;
/// let chosen = tokens.among(&prompt, &"an example")?; // [pos]
/// assert!(!chosen[0] && chosen[prompt.ids.len() - 1]);
/// # Ok::<(), hooks::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, SerializeDisplay, DeserializeFromStr)]
pub struct Tokens {
    terms: Vec<Term>,
    /// Whether the terms are negated: all other tokens are meant.
    others: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Term {
    Classes(Selection),
    Text { text: String, nth: Option<usize> }, // the n-th place, from 1
    Ids(Numbers),
    Positions(Numbers),
}

/// A set of numbers, written with half-open ranges: `0..6,12,-1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Numbers(BTreeSet<i64>);

impl Tokens {
    /// One position of the prompt, from 0 at its start or from -1 at its end.
    pub fn position(position: i64) -> Self {
        Self { terms: vec![Term::Positions(Numbers([position].into()))], others: false }
    }

    /// All tokens of the prompt, no generated ones.
    pub fn prompt() -> Self {
        Self { terms: vec![Term::Classes(TokenClass::Gen.into())], others: true }
    }

    /// Per token of the row `[pos]`: true if it is chosen. If there are none, the error names `what`, such as "gate
    /// only:entity".
    pub fn among(&self, row: &Sequence, what: &dyn fmt::Display) -> Result<Vec<bool>> {
        let nothing = |reason: String| Error::EmptySelection { what: what.to_string(), reason };
        let mut chosen = vec![false; row.ids.len()];
        let mut classes = BTreeSet::new();
        for term in &self.terms {
            let found = match term {
                Term::Classes(selection) => {
                    classes.extend(selection.classes());
                    row.classes.iter().map(|class| selection.contains(*class)).collect()
                }
                Term::Text { text, nth } => text_at(row, text, *nth).map_err(nothing)?,
                Term::Ids(ids) => ids_at(row, ids).map_err(nothing)?,
                Term::Positions(positions) => positions_at(row, positions, what)?,
            };
            chosen.iter_mut().zip(found).for_each(|(chosen, found)| *chosen |= found);
        }
        // The row must have one of the classes, not all: unions name classes that some chats lack. Generated tokens may
        // come later.
        classes.remove(&TokenClass::Gen);
        let present = row.present();
        if !classes.is_empty() && classes.is_disjoint(&present) {
            let present: Vec<_> = present.into_iter().map(TokenClass::name).collect();
            return Err(nothing(format!("it holds the classes {}", present.join(", "))));
        }
        let chosen: Vec<bool> = chosen.into_iter().map(|chosen| chosen != self.others).collect();
        if self.others && !chosen.contains(&true) && !self.has_generated(i64::MIN) {
            return Err(nothing(format!("{self} leaves none over")));
        }
        Ok(chosen)
    }

    /// Whether a generated token with this id is chosen.
    pub fn has_generated(&self, id: i64) -> bool {
        let chosen = self.terms.iter().any(|term| match term {
            Term::Classes(selection) => selection.contains(TokenClass::Gen),
            Term::Ids(ids) => ids.0.contains(&id),
            Term::Text { .. } | Term::Positions(_) => false,
        });
        chosen != self.others
    }

    /// True if the terms can choose generated tokens, by class or by id.
    pub fn names_generated(&self) -> bool {
        let names = |term: &Term| matches!(term, Term::Classes(selection) if selection.contains(TokenClass::Gen));
        self.names_ids() || self.terms.iter().any(names)
    }

    /// True if tokens are chosen by id, so that the choice of a generated token depends on its id.
    pub fn names_ids(&self) -> bool {
        self.terms.iter().any(|term| matches!(term, Term::Ids(_)))
    }
}

/// The tokens that contain any part of a text, `[pos]`: of every occurrence in the prompt, or of the n-th.
fn text_at(row: &Sequence, text: &str, nth: Option<usize>) -> std::result::Result<Vec<bool>, String> {
    if row.text.is_empty() {
        return Err(format!("it was given by its ids, and has no text to look for {text:?} in"));
    }
    let starts = row.text.char_indices().map(|(at, _)| at); // places may overlap
    let mut places: Vec<usize> = starts.filter(|at| row.text[*at..].starts_with(text)).collect();
    if let Some(nth) = nth {
        let n = places.len();
        let place = places.get(nth - 1).copied();
        places = vec![place.ok_or_else(|| format!("of the text {text:?} it holds {n}, not {nth}"))?];
    }
    if places.is_empty() {
        return Err(format!("the text {text:?} does not stand in it"));
    }
    let holds = |token: &std::ops::Range<usize>| {
        places.iter().any(|place| token.start < place + text.len() && *place < token.end)
    };
    let mut chosen: Vec<bool> = row.offsets.iter().map(holds).collect();
    chosen.resize(row.ids.len(), false);
    Ok(chosen)
}

/// The tokens that have one of some ids, `[pos]`.
fn ids_at(row: &Sequence, ids: &Numbers) -> std::result::Result<Vec<bool>, String> {
    if !row.ids.iter().any(|id| ids.0.contains(id)) {
        return Err(format!("none of its {} tokens has one of the ids {ids}", row.ids.len()));
    }
    Ok(row.ids.iter().map(|id| ids.0.contains(id)).collect())
}

/// The tokens at some positions of the prompt, `[pos]`; each position must be there.
fn positions_at(row: &Sequence, positions: &Numbers, what: &dyn fmt::Display) -> Result<Vec<bool>> {
    let n = row.completion.start as i64;
    let mut chosen = vec![false; row.ids.len()];
    for position in &positions.0 {
        let at = if *position < 0 { n + position } else { *position };
        if !(0..n).contains(&at) {
            let expected = format!("one of the prompt's {n}: 0 to {}, or -1 to -{n} from its end", n - 1);
            return Err(Error::invalid(format!("position {position} of {what}"), expected, "beyond the prompt"));
        }
        chosen[at as usize] = true;
    }
    Ok(chosen)
}

impl Numbers {
    /// Whether the set has this number.
    pub fn contains(&self, number: i64) -> bool {
        self.0.contains(&number)
    }

    /// The first number that is not an index below `n`.
    pub fn first_outside(&self, n: usize) -> Option<i64> {
        self.0.iter().copied().find(|number| !(0..n as i64).contains(number))
    }

    /// Parses `0..6,12,-1`; errors name `what`. A range has at most 4096 numbers, and does not go from negative to
    /// positive, which would be ambiguous.
    pub(crate) fn parse(text: &str, what: &str) -> Result<Self> {
        let expected = "numbers and half-open ranges such as 0..6,12,-1, 4096 at most";
        let invalid = || Error::invalid(what, expected, format!("{text:?}"));
        let number = |text: &str| text.trim().parse::<i64>().map_err(|_| invalid());
        let mut chosen = BTreeSet::new();
        for part in text.split(',') {
            let (from, to) = match part.split_once("..") {
                Some((from, to)) => (number(from)?, number(to)?),
                None => (number(part)?, number(part)?.saturating_add(1)),
            };
            if from >= to || (from < 0 && to > 0) || to.saturating_sub(from) > 4096 {
                return Err(invalid());
            }
            chosen.extend(from..to);
        }
        Ok(Self(chosen))
    }
}

impl fmt::Display for Numbers {
    /// Runs of neighbours as half-open ranges: `0..6,12,-1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (negative, positive): (Vec<i64>, Vec<i64>) = self.0.iter().partition(|number| **number < 0);
        let runs = positive.chunk_by(|left, right| left + 1 == *right).chain(negative.chunks(1));
        let runs = runs.map(|run| match run {
            [one] => one.to_string(),
            _ => format!("{}..{}", run[0], run[0] + run.len() as i64),
        });
        f.write_str(&runs.collect::<Vec<_>>().join(","))
    }
}

impl From<Selection> for Tokens {
    fn from(classes: Selection) -> Self {
        Self { terms: vec![Term::Classes(classes)], others: false }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Classes(selection) => write!(f, "{selection}"),
            Self::Text { text, nth: None } => f.write_str(&quoted(text)),
            Self::Text { text, nth: Some(nth) } => write!(f, "{}#{nth}", quoted(text)),
            Self::Ids(ids) => write!(f, "ids({ids})"),
            Self::Positions(positions) => write!(f, "positions({positions})"),
        }
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = self.terms.iter().map(ToString::to_string).collect::<Vec<_>>().join("+");
        if self.others { write!(f, "not({terms})") } else { f.write_str(&terms) }
    }
}

impl FromStr for Tokens {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        if let Some(inside) = argument(text, "not") {
            let Self { terms, others } = inside.parse()?;
            return Ok(Self { terms, others: !others });
        }
        let mut terms: Vec<Term> = Vec::new();
        for part in split(text, &['+'])? {
            let term = part.trim().parse()?;
            match (terms.last_mut(), term) {
                // Neighbouring classes are merged into one selection, without repeated names.
                (Some(Term::Classes(classes)), Term::Classes(more)) => *classes = classes.with(&more),
                (_, term) => terms.push(term),
            }
        }
        Ok(Self { terms, others: false })
    }
}

impl FromStr for Term {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(inside) = argument(text, "positions") {
            return Ok(Self::Positions(Numbers::parse(inside, "the positions")?));
        }
        if let Some(inside) = argument(text, "ids") {
            return Ok(Self::Ids(Numbers::parse(inside, "the token ids")?));
        }
        if !text.starts_with('"') {
            return Ok(Self::Classes(text.parse()?));
        }
        let expected = "a text in double quotes, and #2 after it for its second place";
        let invalid = || Error::invalid("a text among tokens", expected, text);
        let end = text.rfind('"').filter(|end| *end > 0).ok_or_else(invalid)?;
        let number = |text: &str| text.strip_prefix('#')?.parse::<usize>().ok().filter(|nth| *nth > 0);
        let nth = match &text[end + 1..] {
            "" => None,
            nth => Some(number(nth).ok_or_else(invalid)?),
        };
        let text = unquoted(&text[1..end]).filter(|text| !text.is_empty()).ok_or_else(invalid)?;
        Ok(Self::Text { text, nth })
    }
}

/// The text in the parentheses of `name(..)`; `None` if the text has another form.
pub(crate) fn argument<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.strip_prefix(name)?.strip_prefix('(')?.strip_suffix(')')
}

/// The parts between separators outside quotes and parentheses.
pub(crate) fn split<'a>(text: &'a str, separators: &[char]) -> Result<Vec<&'a str>> {
    let (mut parts, mut start, mut depth, mut in_quotes, mut escaped) = (Vec::new(), 0, 0_usize, false, false);
    for (at, letter) in text.char_indices() {
        match letter {
            _ if escaped => escaped = false,
            '\\' if in_quotes => escaped = true,
            '"' => in_quotes = !in_quotes,
            _ if in_quotes => {}
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ if depth == 0 && separators.contains(&letter) => {
                parts.push(&text[start..at]);
                start = at + letter.len_utf8();
            }
            _ => {}
        }
    }
    if in_quotes || depth > 0 {
        let closing = if in_quotes { "a closing quote" } else { "a closing parenthesis" };
        return Err(Error::invalid("a list of tokens, layers or modules", closing, text));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// A text in double quotes, with the escapes `\"`, `\\`, `\n` and `\t`.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('\t', "\\t");
    format!("\"{escaped}\"")
}

/// The text inside quotes; `None` if it contains a bare quote, or a backslash before any other character.
fn unquoted(text: &str) -> Option<String> {
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        plain.push(match letter {
            '"' => return None,
            '\\' => match letters.next()? {
                'n' => '\n',
                't' => '\t',
                letter @ ('"' | '\\') => letter,
                _ => return None,
            },
            letter => letter,
        });
    }
    Some(plain)
}
