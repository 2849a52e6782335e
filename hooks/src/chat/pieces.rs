//! A chat in pieces, each of one class, as the templates of Qwen2, Qwen2.5 and Qwen3 render it, or without a template.
//! In the system prompt, words that name the model are separate pieces.

use std::ops::Range;

use unicode_script::UnicodeScript;

use crate::chat::template::{Role, Turn};
use crate::chat::tokens::TokenClass;

pub(super) const IM_START: &str = "<|im_start|>";
pub(super) const IM_END: &str = "<|im_end|>";

/// A stretch of the rendered text that has one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    pub(super) class: TokenClass,
    pub(super) text: &'a str,
}

/// The text that a template adds to the turns.
#[derive(Debug, Default)]
pub(super) struct Shape {
    /// The system prompt of a chat that has none; `None` if the template then writes no system turn.
    pub(super) default_system: Option<String>,
    /// The text between the assistant's header and its answer: Qwen3's empty think block, or nothing.
    pub(super) think: String,
    /// The words that name the model.
    pub(super) entities: Vec<String>,
    /// Whether there is no template: each turn is a line of plain text.
    pub(super) bare: bool,
}

impl Shape {
    /// The chat in pieces; none is empty.
    pub(super) fn pieces<'a>(&'a self, turns: &[Turn<'a>], generation: bool) -> Vec<Piece<'a>> {
        let mut pieces = if self.bare { self.lines(turns) } else { self.templated(turns, generation) };
        pieces.retain(|piece| !piece.text.is_empty());
        pieces
    }

    /// The template's own text, and the texts of the turns.
    fn templated<'a>(&'a self, turns: &[Turn<'a>], generation: bool) -> Vec<Piece<'a>> {
        let has_system = turns.first().is_some_and(|turn| turn.role == Role::System);
        let system = self.default_system.as_deref().filter(|_| !has_system);
        let system = system.map(|content| Turn { role: Role::System, content });
        let turns: Vec<Turn<'a>> = system.into_iter().chain(turns.iter().copied()).collect();
        let mut pieces = Vec::new();
        let last = turns.len().saturating_sub(1);
        for (index, turn) in turns.iter().enumerate() {
            pieces.extend(header(turn.role));
            match turn.role {
                Role::System => pieces.extend(self.named_apart(turn.content)),
                Role::User => pieces.push(Piece { class: TokenClass::UserContent, text: turn.content }),
                Role::Assistant => {
                    // Only the last answer has a think block before it; the template drops those of older ones.
                    let think = if index == last && !generation { &*self.think } else { "" };
                    pieces.push(Piece { class: TokenClass::AsstThink, text: think });
                    pieces.push(Piece { class: TokenClass::Gen, text: turn.content });
                }
            }
            pieces.extend(footer(turn.role));
        }
        if generation {
            pieces.extend(header(Role::Assistant));
            pieces.push(Piece { class: TokenClass::AsstThink, text: &self.think });
        }
        pieces
    }

    /// A chat without a template: the text of each turn, followed by a line break unless it is an answer.
    fn lines<'a>(&'a self, turns: &[Turn<'a>]) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        for turn in turns {
            match turn.role {
                Role::System => {
                    pieces.extend(self.named_apart(turn.content));
                    let text = if turn.content.is_empty() { "" } else { "\n" };
                    pieces.push(Piece { class: TokenClass::SysContentOther, text });
                }
                Role::User => {
                    pieces.push(Piece { class: TokenClass::UserContent, text: turn.content });
                    pieces.push(Piece { class: TokenClass::AsstNl, text: "\n" });
                }
                Role::Assistant => pieces.push(Piece { class: TokenClass::Gen, text: turn.content }),
            }
        }
        pieces
    }

    /// A system prompt in pieces: the words that name the model, and the text between them.
    fn named_apart<'a>(&self, content: &'a str) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for name in whole_words(content, &self.entities) {
            pieces.push(Piece { class: TokenClass::SysContentOther, text: &content[start..name.start] });
            pieces.push(Piece { class: TokenClass::SysEntity, text: &content[name.clone()] });
            start = name.end;
        }
        pieces.push(Piece { class: TokenClass::SysContentOther, text: &content[start..] });
        pieces
    }
}

/// The template's text before a turn's content.
fn header(role: Role) -> [Piece<'static>; 3] {
    use TokenClass as Class;
    let (classes, role) = match role {
        Role::System => ([Class::SysImStart, Class::SysRole, Class::SysNl], "system"),
        Role::User => ([Class::UserImStart, Class::UserRole, Class::UserNl], "user"),
        Role::Assistant => ([Class::AsstImStart, Class::AsstRole, Class::AsstNl], "assistant"),
    };
    let [im_start, word, nl] = classes;
    [Piece { class: im_start, text: IM_START }, Piece { class: word, text: role }, Piece { class: nl, text: "\n" }]
}

/// The template's text after a turn's content.
fn footer(role: Role) -> [Piece<'static>; 2] {
    let (im_end, nl) = match role {
        Role::System => (TokenClass::SysImEnd, TokenClass::SysImEndNl),
        Role::User => (TokenClass::UserImEnd, TokenClass::UserImEndNl),
        Role::Assistant => (TokenClass::Gen, TokenClass::Gen),
    };
    [Piece { class: im_end, text: IM_END }, Piece { class: nl, text: "\n" }]
}

/// The class of a token over these bytes of the text. If it touches several pieces, the model's name comes first (every
/// token of it, also one that starts with the space before it), then the template, then any other text.
pub(super) fn class_of(token: &Range<usize>, spans: &[(Range<usize>, TokenClass)]) -> Option<TokenClass> {
    let touched = spans.iter().filter(|(span, _)| span.start < token.end && token.start < span.end);
    touched.map(|(_, class)| *class).min_by_key(|class| match class {
        TokenClass::SysEntity => 0,
        class if class.is_template() => 1,
        _ => 2,
    })
}

/// The places of the words in the text, as whole words, ascending and without overlaps.
fn whole_words(text: &str, words: &[String]) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for word in words.iter().filter(|word| !word.is_empty()) {
        found.extend(text.match_indices(word.as_str()).map(|(start, _)| start..start + word.len()));
    }
    found.retain(|range| {
        let (before, word, after) = (&text[..range.start], &text[range.clone()], &text[range.end..]);
        let left = word.chars().next().zip(before.chars().next_back());
        let right = word.chars().next_back().zip(after.chars().next());
        ![left, right].into_iter().flatten().any(|(inside, outside)| goes_on(inside, outside))
    });
    found.sort_by_key(|range| (range.start, std::cmp::Reverse(range.end)));
    let mut end = 0;
    found.retain(|range| {
        let apart = range.start >= end;
        end = if apart { range.end } else { end };
        apart
    });
    found
}

/// Whether a word whose last letter is `inside` continues with the letter `outside`. Chinese has no spaces around a
/// Latin name, so a word also ends where the script changes; digits and `_` belong to every script.
fn goes_on(inside: char, outside: char) -> bool {
    let in_word = outside.is_alphanumeric() || outside == '_';
    in_word && !inside.script_extension().intersection(outside.script_extension()).is_empty()
}
