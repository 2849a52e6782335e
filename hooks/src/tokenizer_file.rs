//! `tokenizer.json`, which must have the shape of Qwen's: byte-level BPE behind NFC, split by Qwen's own expression.
//!
//! The file says what the tokenizers crate builds, and some of what can be said there makes it panic (a merge longer than
//! every token), make text that is no UTF-8 (a prefix for words that go on), draw random numbers (dropout) or search for ever
//! (a regular expression). So each part is checked before the crate sees the file, and what no Qwen has is refused.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// Where Qwen cuts a text into words before the byte-level merges.
pub(crate) const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The parts of the file that decide what it does; the crate reads the rest.
#[derive(Deserialize)]
struct File {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    #[serde(default)]
    added_tokens: Vec<Added>,
    model: Bpe,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct Bpe {
    r#type: String,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Spaced(String),
}

/// The tokenizer in the bytes of a `tokenizer.json`; `path` is for messages. It neither cuts texts nor fills them up.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let refused = |problem: String| Error::Tokenizer { problem: format!("{name}: {problem}") };
    // Read once and handed on as it was read: where a key is there twice, the crate might take the other.
    let json: Value = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
    let file = File::deserialize(&json).map_err(|error| refused(error.to_string()))?;
    for (key, part, known) in [
        ("normalizer", &file.normalizer, &["NFC"][..]),
        ("pre_tokenizer", &file.pre_tokenizer, &["Split", "ByteLevel"]),
        ("post_processor", &file.post_processor, &["ByteLevel"]),
        ("decoder", &file.decoder, &["ByteLevel"]),
    ] {
        for part in part.iter().flat_map(steps) {
            check_step(key, part, known).map_err(refused)?;
        }
    }
    file.model.check().map_err(refused)?;
    let mut tokenizer = Tokenizer::from_bytes(json.to_string()).map_err(|error| refused(error.to_string()))?;
    for Added { id, content } in &file.added_tokens {
        // The crate numbers what is not in the vocabulary anew, whatever the file says.
        if let Some(found) = Some(tokenizer.token_to_id(content)).filter(|found| *found != Some(*id)) {
            let found = found.map_or("no token".to_owned(), |found| found.to_string());
            return Err(refused(format!(
                "added_tokens gives {content:?} the id {id}, but the vocabulary makes it {found}"
            )));
        }
    }
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| refused(error.to_string()))?;
    Ok(tokenizer)
}

/// The steps of a part: those of a sequence, or itself.
fn steps(part: &Value) -> &[Value] {
    ["normalizers", "pretokenizers", "processors", "decoders"]
        .iter()
        .find_map(|steps| part.get(steps).filter(|_| part["type"] == "Sequence")?.as_array())
        .map_or(std::slice::from_ref(part), Vec::as_slice)
}

fn check_step(key: &str, step: &Value, known: &[&str]) -> std::result::Result<(), String> {
    if !known.iter().any(|known| step["type"] == *known) {
        return Err(format!(
            "{key} has a step of type {}, expected {}, as Qwen's has",
            step["type"],
            known.join(" or ")
        ));
    }
    match step.get("pattern") {
        Some(pattern) if pattern["Regex"] != WORDS => {
            Err(format!("{key} splits by {pattern}, expected Qwen's expression; another could search for ever"))
        }
        _ => Ok(()),
    }
}

impl Bpe {
    fn check(&self) -> std::result::Result<(), String> {
        if self.r#type != "BPE" {
            return Err(format!("model.type is {:?}, expected \"BPE\", as Qwen's is", self.r#type));
        }
        if let Some(dropout) = self.dropout.filter(|dropout| *dropout != 0.0) {
            return Err(format!("model.dropout is {dropout}, expected none: a text has one way to be tokenised"));
        }
        let affixes = [
            ("continuing_subword_prefix", &self.continuing_subword_prefix),
            ("end_of_word_suffix", &self.end_of_word_suffix),
        ];
        for (key, affix) in affixes {
            if let Some(affix) = affix.as_deref().filter(|affix| !affix.is_empty()) {
                return Err(format!("model.{key} is {affix:?}, expected none, as Qwen's has"));
            }
        }
        for (rank, merge) in self.merges.iter().enumerate() {
            let (left, right) = match merge {
                Merge::Pair(left, right) => (left.as_str(), right.as_str()),
                Merge::Spaced(both) => both
                    .split_once(' ')
                    .ok_or_else(|| format!("model.merges[{rank}] is {both:?}, expected two tokens"))?,
            };
            check_merge(left, right, |token| self.vocab.contains_key(token))
                .map_err(|unknown| format!("model.merges[{rank}] needs {unknown:?}, which is no token"))?;
        }
        Ok(())
    }
}

/// A merge needs both its tokens and what they make; the crate panics where that is longer than every token. The error is
/// the token that is not there.
pub(crate) fn check_merge(left: &str, right: &str, known: impl Fn(&str) -> bool) -> std::result::Result<(), String> {
    let both = format!("{left}{right}");
    match [left, right, &both].into_iter().find(|token| token.is_empty() || !known(token)) {
        Some(unknown) => Err(unknown.to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tiny_random::TOKENIZER;

    /// The message with which the embedded tokenizer is refused after one of its values was changed.
    fn refusal(pointer: &str, value: Value) -> String {
        let mut json: Value = serde_json::from_slice(TOKENIZER).unwrap();
        *json.pointer_mut(pointer).unwrap() = value;
        parse(json.to_string().as_bytes(), Path::new("a/tokenizer.json")).expect_err(pointer).to_string()
    }

    #[test]
    fn what_no_qwen_has_is_refused_by_its_key() {
        for (pointer, value, expected) in [
            (
                "/normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
                "normalizer has a step of type \"Precompiled\", expected NFC",
            ),
            (
                "/normalizer",
                json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
                "type \"Lowercase\"",
            ),
            (
                "/pre_tokenizer/pretokenizers/0/pattern/Regex",
                json!("(a+)+$"),
                "pre_tokenizer splits by {\"Regex\":\"(a+)+$\"}, expected Qwen's",
            ),
            (
                "/pre_tokenizer/pretokenizers/1/type",
                json!("Metaspace"),
                "pre_tokenizer has a step of type \"Metaspace\"",
            ),
            ("/post_processor/type", json!("BertProcessing"), "post_processor has a step of type \"BertProcessing\""),
            ("/decoder/type", json!("WordPiece"), "decoder has a step of type \"WordPiece\""),
            ("/model/type", json!("Unigram"), "model.type is \"Unigram\", expected \"BPE\""),
            ("/model/dropout", json!(0.1), "model.dropout is 0.1, expected none"),
            ("/model/continuing_subword_prefix", json!("é"), "model.continuing_subword_prefix is \"é\""),
            ("/model/end_of_word_suffix", json!("</w>"), "model.end_of_word_suffix is \"</w>\""),
            ("/model/merges/3", json!("ab"), "model.merges[3] is \"ab\", expected two tokens"),
            ("/model/merges/3", json!(["Ġ", ""]), "model.merges[3] needs \"\", which is no token"),
            ("/model/merges/3", json!(["a", "\u{4f60}"]), "model.merges[3] needs \"\u{4f60}\""),
            ("/model/vocab", json!({"a": 0}), "model.merges[0] needs "),
            (
                "/added_tokens/1/id",
                json!(7),
                "added_tokens gives \"<|im_start|>\" the id 7, but the vocabulary makes it 1006",
            ),
            ("/model/vocab/a", json!(-1), "invalid value: integer `-1`"),
            ("/model/vocab", Value::Null, "invalid type: null"),
        ] {
            let message = refusal(pointer, value);
            assert!(message.starts_with("tokenizer: tokenizer.json: ") && message.contains(expected), "{message}");
        }
        assert!(parse(b"{", Path::new("t")).is_err());
    }

    #[test]
    fn both_spellings_of_a_merge_are_read_and_texts_are_left_whole() {
        let mut json: Value = serde_json::from_slice(TOKENIZER).unwrap();
        json["padding"] = json!({"strategy": {"Fixed": 1_000_000_000_000_u64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
        json["truncation"] = json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        let ids = |json: &Value| {
            let tokenizer = parse(json.to_string().as_bytes(), Path::new("t")).unwrap();
            tokenizer.encode("hello there, 123", false).unwrap().get_ids().to_vec()
        };
        let plain = ids(&serde_json::from_slice(TOKENIZER).unwrap());
        assert!(plain.len() > 3);
        assert_eq!(ids(&json), plain);
        for merge in json["model"]["merges"].as_array_mut().unwrap() {
            *merge = match &*merge {
                Value::String(both) => json!(both.split_once(' ').unwrap()),
                pair => json!(format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())),
            };
        }
        assert_eq!(ids(&json), plain);
    }
}
