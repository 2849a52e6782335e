//! Styles of text on a terminal: one colour per family of token classes, in two shades that separate neighbouring
//! tokens. Without colour the characters are the same.

use anstyle::{Ansi256Color, Style};
use clap::ValueEnum;
use hooks::TokenClass;
use unicode_width::UnicodeWidthStr;

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// If stdout is a terminal and `NO_COLOR` is not set.
    #[default]
    Auto,
    /// Always, also through pipes.
    Always,
    /// Never.
    Never,
}

impl Color {
    /// Applies the choice to everything that is printed afterwards.
    pub fn apply(self) {
        match self {
            Self::Auto => anstream::ColorChoice::Auto,
            Self::Always => anstream::ColorChoice::AlwaysAnsi,
            Self::Never => anstream::ColorChoice::Never,
        }
        .write_global();
    }
}

/// Classes that share a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    /// The template's text around the system prompt and the user's text.
    Template,
    /// The system prompt.
    System,
    /// The model's name in the system prompt.
    Entity,
    /// The user's text.
    User,
    /// The assistant's header, from which the answer is predicted.
    Assistant,
    /// The answer.
    Generated,
}

impl Family {
    pub(super) fn of(class: TokenClass) -> Self {
        match class {
            TokenClass::SysContentOther => Self::System,
            TokenClass::SysEntity => Self::Entity,
            TokenClass::UserContent => Self::User,
            TokenClass::AsstImStart | TokenClass::AsstRole | TokenClass::AsstNl | TokenClass::AsstThink => {
                Self::Assistant
            }
            TokenClass::Gen => Self::Generated,
            _ => Self::Template,
        }
    }

    pub(super) fn name(self) -> &'static str {
        ["template", "system", "entity", "user", "assistant", "generated"][self as usize]
    }

    /// Its background, in one of two shades that alternate from token to token. Families can be distinguished with
    /// every kind of colour vision; the test below says by how much.
    pub(super) fn style(self, odd: bool) -> Style {
        const BLACK: u8 = 16;
        const WHITE: u8 = 231;
        let (ink, even_shade, odd_shade) = match self {
            Self::Template => (WHITE, 238, 242),
            Self::System => (WHITE, 19, 27),
            Self::Entity => (BLACK, 214, 208),
            Self::User => (BLACK, 44, 51),
            Self::Assistant => (BLACK, 144, 186),
            Self::Generated => (WHITE, 90, 127),
        };
        let shade = if odd { odd_shade } else { even_shade };
        Style::new().fg_color(Some(Ansi256Color(ink).into())).bg_color(Some(Ansi256Color(shade).into()))
    }
}

pub(super) fn painted(text: &str, style: Style) -> String {
    if text.is_empty() { String::new() } else { format!("{style}{text}{style:#}") }
}

pub(super) fn heading(text: &str) -> String {
    painted(text, Style::new().bold())
}

/// Less important text: dimmed.
pub(super) fn aside(text: &str) -> String {
    painted(text, Style::new().dimmed())
}

/// Text padded with spaces to a width in columns of the terminal, and painted without the padding.
pub(super) fn cell(text: &str, width: usize, style: Style) -> String {
    format!("{}{}", painted(text, style), " ".repeat(width.saturating_sub(text.width())))
}

/// Text with its control characters written out (`\u{1b}`), so that none reaches the terminal. Line breaks and tabs are
/// kept.
pub(super) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() && !matches!(letter, '\n' | '\t') {
            safe.extend(letter.escape_default());
        } else {
            safe.push(letter);
        }
    }
    safe
}

/// Number of columns of the terminal, at most 110; 80 if there is no terminal.
pub(super) fn columns() -> usize {
    terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0)).clamp(40, 110)
}

/// Wraps words into lines of at most `width` columns. A longer word gets its own line.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.width() + 1 + word.width() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A style's background in linear light: one of the 216 colours or 24 greys of a terminal with 256 colours.
    fn linear(style: Style) -> [f64; 3] {
        let Some(anstyle::Color::Ansi256(Ansi256Color(code))) = style.get_bg_color() else { panic!("{style:?}") };
        let level = |at: u8| if at == 0 { 0 } else { 55 + 40 * at };
        let rgb = match code {
            232.. => [8 + 10 * (code - 232); 3],
            _ => [(code - 16) / 36, (code - 16) / 6 % 6, (code - 16) % 6].map(level),
        };
        rgb.map(|value| f64::from(value) / 255.0)
            .map(|value| if value <= 0.040_45 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) })
    }

    /// Converts linear light to CIELAB under D65.
    fn lab([r, g, b]: [f64; 3]) -> [f64; 3] {
        let f = |t: f64| if t > 0.008_856 { t.cbrt() } else { 7.787 * t + 16.0 / 116.0 };
        let x = f((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505);
        let y = f(0.2126 * r + 0.7152 * g + 0.0722 * b);
        let z = f((0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089);
        [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
    }

    #[test]
    fn families_stay_apart_for_every_kind_of_colour_vision() {
        // Normal vision, protanopia, deuteranopia and tritanopia (Machado et al. 2009, severity 1).
        const VISIONS: [[[f64; 3]; 3]; 4] = [
            [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            [
                [0.152_286, 1.052_583, -0.204_868],
                [0.114_503, 0.786_281, 0.099_216],
                [-0.003_882, -0.048_116, 1.051_998],
            ],
            [[0.367_322, 0.860_646, -0.227_968], [0.280_085, 0.672_501, 0.047_413], [-0.011_820, 0.042_940, 0.968_881]],
            [
                [1.255_528, -0.076_749, -0.178_779],
                [-0.078_411, 0.930_809, 0.147_602],
                [0.004_733, 0.691_367, 0.303_900],
            ],
        ];
        let families: BTreeSet<Family> = TokenClass::ALL.into_iter().map(Family::of).collect();
        assert_eq!(families.len(), 6);
        for vision in VISIONS {
            let seen = |family: &Family, odd: bool| {
                let light = linear(family.style(odd));
                lab(vision.map(|row| row.iter().zip(light).map(|(m, x)| m * x).sum::<f64>().clamp(0.0, 1.0)))
            };
            let distance = |left: [f64; 3], right: [f64; 3]| {
                left.iter().zip(right).map(|(left, right)| (left - right).powi(2)).sum::<f64>().sqrt()
            };
            for left in &families {
                assert!(distance(seen(left, false), seen(left, true)) > 8.0, "the shades of {left:?}");
                for right in families.iter().filter(|right| *right > left) {
                    for (one, other) in [(false, false), (false, true), (true, false), (true, true)] {
                        let apart = distance(seen(left, one), seen(right, other));
                        assert!(apart > 23.0, "{left:?} and {right:?}: {apart}");
                    }
                }
            }
        }
    }

    #[test]
    fn paint_adds_no_characters() {
        for text in ["owl", " a b ", "你好"] {
            let painted = cell(text, 9, Family::Entity.style(false));
            assert_ne!(painted, text);
            let bare = anstream::adapter::strip_str(&painted).to_string();
            assert_eq!((bare.trim_end(), bare.width()), (text.trim_end(), 9));
        }
        assert_eq!(painted("", Style::new().bold()), "");
    }

    #[test]
    fn a_control_character_does_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n\tc\u{9b}é"), "a\\u{1b}[2Jb\\r\n\tc\\u{9b}é");
    }

    #[test]
    fn lines_are_as_wide_as_they_may_be() {
        assert_eq!(wrapped("one two  three\nfour", 9), ["one two", "three", "four"]);
        assert_eq!(wrapped("one two three", 13), ["one two three"]);
        assert_eq!(wrapped("a extraordinarily b", 5), ["a", "extraordinarily", "b"]);
        assert_eq!(wrapped("你好 你好", 8), ["你好", "你好"], "wide letters take two columns each");
        assert!(wrapped(" ", 8).is_empty());
    }
}
