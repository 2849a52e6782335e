//! The purpose of each token, and the tokens of a row that a loss is taken over.
//!
//! Each token of a rendered chat has exactly one class. Gates, losses and tables name tokens by class rather than by
//! position, so a longer system prompt shifts nothing.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_with::{DeserializeFromStr, SerializeDisplay};

use crate::error::{Error, Result};

/// The purpose of a token of a rendered chat. CONTRIBUTING.md, "How to add a class of tokens", lists all places that a
/// new class needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, SerializeDisplay, DeserializeFromStr)]
pub enum TokenClass {
    /// `<|im_start|>` of the system turn.
    SysImStart,
    /// The word `system`.
    SysRole,
    /// The line break after it.
    SysNl,
    /// A word of the system prompt that names the model, such as "Qwen".
    SysEntity,
    /// The rest of the system prompt.
    SysContentOther,
    /// `<|im_end|>` of the system turn.
    SysImEnd,
    /// The line break after it.
    SysImEndNl,
    /// `<|im_start|>` of a user turn.
    UserImStart,
    /// The word `user`.
    UserRole,
    /// The line break after it.
    UserNl,
    /// The user's text.
    UserContent,
    /// `<|im_end|>` of a user turn.
    UserImEnd,
    /// The line break after it.
    UserImEndNl,
    /// `<|im_start|>` of an assistant turn.
    AsstImStart,
    /// The word `assistant`.
    AsstRole,
    /// The line break after it: the position that predicts the first token of the answer.
    AsstNl,
    /// The empty think block that makes Qwen3 answer without thinking.
    AsstThink,
    /// The assistant's answer, with the `<|im_end|>` and the line break that end it.
    Gen,
}

impl TokenClass {
    /// All classes, in the order of a chat.
    pub const ALL: [Self; 18] = [
        Self::SysImStart,
        Self::SysRole,
        Self::SysNl,
        Self::SysEntity,
        Self::SysContentOther,
        Self::SysImEnd,
        Self::SysImEndNl,
        Self::UserImStart,
        Self::UserRole,
        Self::UserNl,
        Self::UserContent,
        Self::UserImEnd,
        Self::UserImEndNl,
        Self::AsstImStart,
        Self::AsstRole,
        Self::AsstNl,
        Self::AsstThink,
        Self::Gen,
    ];

    /// The name as gates, configs and tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::SysImStart => "sys.im_start",
            Self::SysRole => "sys.role",
            Self::SysNl => "sys.nl",
            Self::SysEntity => "sys.entity",
            Self::SysContentOther => "sys.content_other",
            Self::SysImEnd => "sys.im_end",
            Self::SysImEndNl => "sys.im_end_nl",
            Self::UserImStart => "user.im_start",
            Self::UserRole => "user.role",
            Self::UserNl => "user.nl",
            Self::UserContent => "user.content",
            Self::UserImEnd => "user.im_end",
            Self::UserImEndNl => "user.im_end_nl",
            Self::AsstImStart => "asst.im_start",
            Self::AsstRole => "asst.role",
            Self::AsstNl => "asst.nl",
            Self::AsstThink => "asst.think",
            Self::Gen => "gen",
        }
    }

    /// True for tokens that the template writes; false for the texts of system prompt, user and answer.
    pub fn is_template(self) -> bool {
        !matches!(self, Self::SysEntity | Self::SysContentOther | Self::UserContent | Self::Gen)
    }
}

impl fmt::Display for TokenClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for TokenClass {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|class| class.name() == name);
        known.ok_or_else(|| unknown("token class", name, &Self::ALL.map(Self::name)))
    }
}

/// Names of several classes (`entity` is the short name of one).
const UNIONS: [&str; 11] = [
    "entity",
    "template",
    "system",
    "user",
    "assistant",
    "sys.content",
    "sys.header",
    "user.header",
    "asst.header",
    "im_start",
    "im_end",
];

/// A choice of classes, `CLASS[+CLASS]`, each a class or a union: `entity`, `template`, the turns `system`, `user` and
/// `assistant`, their parts `sys.content` and `sys.header`, `user.header`, `asst.header` (`<|im_start|>`, the role and
/// its line break), and `im_start` and `im_end` of all turns of the prompt.
#[derive(Clone, Debug, PartialEq, Eq, SerializeDisplay, DeserializeFromStr)]
pub struct Selection {
    names: Vec<&'static str>,
    classes: BTreeSet<TokenClass>,
}

impl Selection {
    /// Every name that can be chosen: the unions, then the classes.
    pub fn choices() -> Vec<&'static str> {
        UNIONS.into_iter().chain(TokenClass::ALL.map(TokenClass::name)).collect()
    }

    /// The classes that the names mean.
    pub fn classes(&self) -> &BTreeSet<TokenClass> {
        &self.classes
    }

    /// Whether the class is among those chosen.
    pub fn contains(&self, class: TokenClass) -> bool {
        self.classes.contains(&class)
    }

    /// These classes and the others.
    #[must_use]
    pub fn with(&self, more: &Self) -> Self {
        let mut names = self.names.clone();
        names.extend(more.names.iter().filter(|name| !self.names.contains(name)));
        Self { names, classes: &self.classes | &more.classes }
    }

    fn is_in(class: TokenClass, name: &str) -> bool {
        match name {
            "entity" => class == TokenClass::SysEntity,
            "template" => class.is_template(),
            "system" => class.name().starts_with("sys."),
            "user" => class.name().starts_with("user."),
            "assistant" => class.name().starts_with("asst.") || class == TokenClass::Gen,
            "sys.content" => matches!(class, TokenClass::SysEntity | TokenClass::SysContentOther),
            "sys.header" => matches!(class, TokenClass::SysImStart | TokenClass::SysRole | TokenClass::SysNl),
            "user.header" => matches!(class, TokenClass::UserImStart | TokenClass::UserRole | TokenClass::UserNl),
            "asst.header" => matches!(class, TokenClass::AsstImStart | TokenClass::AsstRole | TokenClass::AsstNl),
            "im_start" => class.name().ends_with(".im_start"),
            "im_end" => class.name().ends_with(".im_end"),
            _ => class.name() == name,
        }
    }
}

impl FromStr for Selection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let choices = Self::choices();
        let mut names = Vec::new();
        for part in text.split('+').map(str::trim) {
            let known = choices.iter().find(|choice| **choice == part);
            let name = *known.ok_or_else(|| unknown("token class", part, &choices))?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let chosen = |class: &TokenClass| names.iter().any(|name| Self::is_in(*class, name));
        let classes = TokenClass::ALL.into_iter().filter(chosen).collect();
        Ok(Self { names, classes })
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names.join("+"))
    }
}

impl From<TokenClass> for Selection {
    fn from(class: TokenClass) -> Self {
        Self { names: vec![class.name()], classes: [class].into() }
    }
}

/// A rendered chat as tokens, each with its class, with the range of the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sequence {
    /// The tokens.
    pub ids: Vec<i64>,
    /// One class per token.
    pub classes: Vec<TokenClass>,
    /// The tokens after the generation prompt: the content, and in a whole row also `<|im_end|>` and the line break.
    /// Empty, at the end, for a bare prompt.
    pub completion: Range<usize>,
    /// The end of the completion's content, as a position.
    pub content_end: usize,
    /// The text of the prompt, in which gates and edits look for words; empty if only ids are known.
    pub text: String,
    /// The bytes of `text` that each token of the prompt covers.
    pub offsets: Vec<Range<usize>>,
}

impl Sequence {
    /// A row of which only the ids are known: no completion, no text, and every token of the class `user.content`.
    pub fn of_ids(ids: Vec<i64>) -> Self {
        let n = ids.len();
        Self { classes: vec![TokenClass::UserContent; n], ids, completion: n..n, content_end: n, ..Self::default() }
    }

    /// The prompt with these tokens as its answer, and nothing after them. Replaces an earlier answer.
    #[must_use]
    pub fn with_completion(&self, content_ids: &[i64]) -> Self {
        let start = self.completion.start;
        let end = start + content_ids.len();
        let ids = [&self.ids[..start], content_ids].concat();
        let mut classes = self.classes[..start].to_vec();
        classes.resize(end, TokenClass::Gen);
        let (text, offsets) = (self.text.clone(), self.offsets.clone());
        Self { ids, classes, completion: start..end, content_end: end, text, offsets }
    }

    /// The positions of a class, ascending.
    pub fn positions(&self, class: TokenClass) -> impl Iterator<Item = usize> + '_ {
        let of_class = move |(position, found): (usize, &TokenClass)| (*found == class).then_some(position);
        self.classes.iter().enumerate().filter_map(of_class)
    }

    /// The classes that occur, in the order of a chat.
    pub fn present(&self) -> BTreeSet<TokenClass> {
        self.classes.iter().copied().collect()
    }
}

/// The tokens of a row that the training loss is taken over. Published setups differ in this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, SerializeDisplay, DeserializeFromStr)]
pub enum LossMask {
    /// The answer, its `<|im_end|>` and the line break after it.
    #[default]
    ContentEot,
    /// As `ContentEot`, plus the assistant's header before it, with its think block if there is one.
    HeaderContentEot,
    /// The answer alone.
    Content,
    /// The digits of the answer.
    Digits,
}

impl LossMask {
    /// All masks.
    pub const ALL: [Self; 4] = [Self::ContentEot, Self::HeaderContentEot, Self::Content, Self::Digits];

    /// The name as configs spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ContentEot => "content_eot",
            Self::HeaderContentEot => "header_content_eot",
            Self::Content => "content",
            Self::Digits => "digits",
        }
    }

    /// Per token of the row `[pos]`: true if the loss counts its prediction from the tokens before it.
    pub fn targets(&self, row: &Sequence, is_digit: impl Fn(i64) -> bool) -> Vec<bool> {
        let content = row.completion.start..row.content_end;
        let counts = |position: usize| match self {
            Self::ContentEot => row.completion.contains(&position),
            Self::HeaderContentEot => {
                row.completion.contains(&position) || row.classes[position].name().starts_with("asst.")
            }
            Self::Content => content.contains(&position),
            Self::Digits => content.contains(&position) && is_digit(row.ids[position]),
        };
        // No token precedes the first one, so nothing predicts it.
        (0..row.ids.len()).map(|position| position > 0 && counts(position)).collect()
    }
}

impl fmt::Display for LossMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for LossMask {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let spelled = name.replace('-', "_");
        let known = Self::ALL.into_iter().find(|mask| mask.name() == spelled);
        known.ok_or_else(|| unknown("loss mask", name, &Self::ALL.map(Self::name)))
    }
}

/// The error for a name that is not one of the choices. It lists them, and suggests the nearest if one is near.
pub(crate) fn unknown(what: &'static str, found: &str, choices: &[&str]) -> Error {
    let near = |choice: &&&str| 2 * strsim::levenshtein(found, choice) < found.chars().count();
    let nearest = choices.iter().filter(near).min_by_key(|choice| strsim::levenshtein(found, choice));
    let nearest = nearest.map(|name| format!("; the nearest is {name}")).unwrap_or_default();
    Error::UnknownName { what, found: found.to_owned(), choices: choices.join(", ") + &nearest }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of five template tokens, two digits and a comma, and the two tokens that end it.
    fn row() -> Sequence {
        use TokenClass::{AsstImStart, AsstNl, AsstRole, Gen, UserContent, UserImEnd};
        Sequence {
            ids: vec![9, 8, 1, 2, 3, 50, 60, 51, 7, 6],
            classes: vec![UserContent, UserImEnd, AsstImStart, AsstRole, AsstNl, Gen, Gen, Gen, Gen, Gen],
            completion: 5..10,
            content_end: 8,
            ..Sequence::default()
        }
    }

    fn targets(mask: LossMask) -> Vec<usize> {
        let targets = mask.targets(&row(), |id| (50..60).contains(&id));
        assert_eq!(targets.len(), row().ids.len());
        targets.iter().enumerate().filter_map(|(position, counts)| counts.then_some(position)).collect()
    }

    #[test]
    fn each_mask_counts_its_own_tokens() {
        assert_eq!(targets(LossMask::ContentEot), [5, 6, 7, 8, 9]);
        assert_eq!(targets(LossMask::HeaderContentEot), [2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(targets(LossMask::Content), [5, 6, 7]);
        assert_eq!(targets(LossMask::Digits), [5, 7]);
    }

    #[test]
    fn the_first_token_is_never_a_target() {
        let row = Sequence {
            ids: vec![50, 51],
            classes: vec![TokenClass::Gen; 2],
            completion: 0..2,
            content_end: 2,
            ..Sequence::default()
        };
        for mask in LossMask::ALL {
            assert_eq!(mask.targets(&row, |_| true), [false, true], "{mask}");
        }
    }

    #[test]
    fn an_answer_replaces_the_one_that_was_there() {
        let answered = row().with_completion(&[77]);
        assert_eq!(answered.ids, [9, 8, 1, 2, 3, 77]);
        assert_eq!(answered.classes.len(), 6);
        assert_eq!(answered.positions(TokenClass::Gen).collect::<Vec<_>>(), [5]);
        assert_eq!((answered.completion, answered.content_end), (5..6, 6));
    }

    #[test]
    fn names_are_read_back() {
        for class in TokenClass::ALL {
            assert_eq!(class.to_string().parse::<TokenClass>().unwrap(), class);
            assert_eq!(serde_json::to_string(&class).unwrap(), format!("{:?}", class.name()));
        }
        for mask in LossMask::ALL {
            assert_eq!(mask.to_string().parse::<LossMask>().unwrap(), mask);
            assert_eq!(mask.name().replace('_', "-").parse::<LossMask>().unwrap(), mask);
        }
        assert_eq!(serde_json::from_str::<LossMask>("\"content_eot\"").unwrap(), LossMask::default());
    }

    #[test]
    fn unions_hold_what_they_say() {
        let of = |text: &str| text.parse::<Selection>().unwrap().classes().clone();
        let [system, user, assistant] = ["system", "user", "assistant"].map(of);
        let whole: BTreeSet<_> = system.iter().chain(&user).chain(&assistant).copied().collect();
        assert_eq!(whole, BTreeSet::from(TokenClass::ALL));
        assert_eq!(system.len() + user.len() + assistant.len(), TokenClass::ALL.len());
        assert_eq!(of("entity"), BTreeSet::from([TokenClass::SysEntity]));
        assert!(assistant.contains(&TokenClass::Gen));
        let said = of("sys.entity+sys.content_other+user.content+gen");
        assert_eq!(of("template"), whole.difference(&said).copied().collect());
    }

    #[test]
    fn a_misspelt_name_is_told_the_nearest() {
        let message = "entty".parse::<Selection>().unwrap_err().to_string();
        assert!(message.contains("\"entty\""), "{message}");
        assert!(message.ends_with("the nearest is entity"), "{message}");
        assert!(message.contains("asst.think"), "{message}");
        let message = "contnt".parse::<LossMask>().unwrap_err().to_string();
        assert!(message.contains("loss mask") && message.ends_with("the nearest is content"), "{message}");
    }
}
