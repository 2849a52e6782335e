//! Numbers and names as a chart writes them, and their estimated width.

/// A number in three digits: `0.452`, `12`, `3.1e−5`.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    let text = if size == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.1e}").replace(".0e", "e")
    } else {
        let decimals = (2.0 - size.log10().floor()).max(0.0) as usize;
        let text = format!("{value:.decimals$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    minus(&text)
}

/// A number next to others: with the decimals that give the largest three digits (`−1.18` with `−0.01`), or more if its
/// first digit needs them (`0.004`).
pub(super) fn beside(value: f64, largest: f64) -> String {
    let size = largest.abs();
    if value == 0.0 || !(1e-3..1e6).contains(&size) {
        return short(value);
    }
    let (for_largest, for_itself) = (2.0 - size.log10().floor(), -value.abs().log10().floor());
    let decimals = for_largest.max(for_itself).clamp(0.0, 5.0) as usize;
    minus(&format!("{value:.decimals$}"))
}

/// The text with typographic minus signs.
pub(super) fn minus(text: &str) -> String {
    text.replace('-', "\u{2212}")
}

/// The estimated width of a text in a wide sans-serif font.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    let share = |character: char| match character {
        'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '|' | '!' | '\'' => 0.33,
        'f' | 't' | 'r' | ' ' | '(' | ')' | '/' => 0.42,
        'm' | 'w' | 'M' | 'W' | '@' | '%' => 0.98,
        'A'..='Z' | '0'..='9' => 0.68,
        character if character.is_ascii() => 0.63,
        '\u{2212}' => 0.8,
        _ => 1.0,
    };
    text.chars().map(share).sum::<f64>() * size
}

/// Wraps a text at words, in lines of at most `width`.
pub(super) fn wrap(text: &str, width: f64, size: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if text_width(line, size) + text_width(word, size) + size * 0.6 <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A token's text with its blanks and line ends made visible.
pub(crate) fn visible(token: &str) -> String {
    let shown = |character: char| match character {
        ' ' => "\u{b7}".to_owned(),
        control if control.is_control() => control.escape_default().to_string(),
        other => other.to_string(),
    };
    name(&token.chars().map(shown).collect::<String>())
}

/// A name of at most 60 characters; longer ones lose their middle.
pub(super) fn name(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= 60 {
        return text.to_owned();
    }
    let (head, tail) = (&characters[..40], &characters[characters.len() - 19..]);
    head.iter().chain(&['…']).chain(tail).collect()
}
