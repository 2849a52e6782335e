//! `tokenizer.json`, which must have the shape of Qwen's: byte-level BPE after NFC, split by Qwen's own expression.
//!
//! Some files make the tokenizers crate panic (a merge longer than every token), return text that is not UTF-8 (a
//! prefix for continued words), draw random numbers (dropout) or search without end (a regular expression). So each
//! part of the file is checked before the crate gets it, and parts that no Qwen has are refused.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

use crate::error::{Error, Result, malformed};

/// The expression by which Qwen cuts a text into words before the byte-level merges.
pub(crate) const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The parts of the file that decide its behaviour. The crate gets the parsed values; giving it text to parse again
/// takes three times as long.
#[derive(Deserialize)]
struct File {
    version: Option<String>,
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
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct Bpe {
    r#type: String,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    unk_token: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Spaced(String),
}

/// The tokenizer in the bytes of a `tokenizer.json`; `path` is for messages. It neither truncates nor pads texts.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let refused = |problem: String| Error::Tokenizer { problem: format!("{name}: {problem}") };
    let file: File = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
    if let Some(version) = file.version.filter(|version| version != "1.0") {
        return Err(refused(format!("version is {version:?}, expected \"1.0\"")));
    }
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
    let said = |error: tokenizers::Error| refused(error.to_string());
    let mut tokenizer = Tokenizer::new(file.model.build().map_err(refused)?);
    tokenizer.with_normalizer(part::<NormalizerWrapper>(file.normalizer).map_err(refused)?).map_err(said)?;
    tokenizer.with_pre_tokenizer(part::<PreTokenizerWrapper>(file.pre_tokenizer).map_err(refused)?);
    tokenizer.with_post_processor(part::<PostProcessorWrapper>(file.post_processor).map_err(refused)?);
    tokenizer.with_decoder(part::<DecoderWrapper>(file.decoder).map_err(refused)?);
    tokenizer.add_tokens(file.added_tokens.iter().map(|added| added.token.clone())).map_err(said)?;
    for Added { id, token: AddedToken { content, .. } } in &file.added_tokens {
        // The crate gives its own ids to tokens outside the vocabulary and ignores the file's.
        if let Some(found) = Some(tokenizer.token_to_id(content)).filter(|found| *found != Some(*id)) {
            let found = found.map_or("no token".to_owned(), |found| found.to_string());
            let problem = format!("added_tokens gives {content:?} the id {id}, but the vocabulary makes it {found}");
            return Err(refused(problem));
        }
    }
    Ok(tokenizer)
}

/// The files next to `tokenizer.json` that may name further tokens.
pub(crate) const BESIDE: [&str; 2] = ["tokenizer_config.json", "added_tokens.json"];

/// Refuses a tokenizer that lacks a token named in another file: transformers makes that text one token, and this
/// tokenizer would cut it into several. `bytes` are a `tokenizer_config.json`, which names tokens by id in
/// `added_tokens_decoder`, or an `added_tokens.json`, a table of ids. `path` is for messages.
pub fn check_beside(bytes: &[u8], path: &Path, tokenizer: &Tokenizer) -> Result<()> {
    #[derive(Deserialize)]
    struct Named {
        content: String,
    }
    #[derive(Deserialize)]
    struct TokenizerConfig {
        added_tokens_decoder: Option<BTreeMap<u32, Named>>,
    }
    let said = |error: serde_json::Error| malformed(path, error.to_string());
    let mut named: Vec<(u32, String)> = if path.ends_with(BESIDE[1]) {
        let ids: BTreeMap<String, u32> = serde_json::from_slice(bytes).map_err(said)?;
        ids.into_iter().map(|(content, id)| (id, content)).collect()
    } else {
        let config: TokenizerConfig = serde_json::from_slice(bytes).map_err(said)?;
        config.added_tokens_decoder.into_iter().flatten().map(|(id, named)| (id, named.content)).collect()
    };
    named.sort();
    let known = tokenizer.get_added_tokens_decoder();
    let is_unknown = |(id, content): &(u32, String)| known.get(id).is_none_or(|token| token.content != *content);
    let Some((id, content)) = named.into_iter().find(is_unknown) else { return Ok(()) };
    let found = match tokenizer.token_to_id(&content) {
        Some(other) if known.contains_key(&other) => format!("gives it the id {other}"),
        _ => "has no such added token, so that it would be cut into pieces".to_owned(),
    };
    let problem = format!("it has the token {content:?} with the id {id}, but tokenizer.json {found}");
    let hint = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes them all anew";
    Err(malformed(path, problem).with_hint(hint))
}

/// Parses a value of the file into a type of the crate.
fn part<T: DeserializeOwned>(part: Option<Value>) -> std::result::Result<Option<T>, String> {
    part.map(serde_json::from_value).transpose().map_err(|error| error.to_string())
}

/// The steps of a part: those of a sequence, or the part alone.
fn steps(part: &Value) -> &[Value] {
    ["normalizers", "pretokenizers", "processors", "decoders"]
        .iter()
        .find_map(|steps| part.get(steps).filter(|_| part["type"] == "Sequence")?.as_array())
        .map_or(std::slice::from_ref(part), Vec::as_slice)
}

fn check_step(key: &str, step: &Value, known: &[&str]) -> std::result::Result<(), String> {
    if !known.iter().any(|known| step["type"] == *known) {
        let (found, known) = (&step["type"], known.join(" or "));
        return Err(format!("{key} has a step of type {found}, expected {known}, as Qwen's has"));
    }
    let Some(pattern) = step.get("pattern").filter(|pattern| pattern["Regex"] != WORDS) else { return Ok(()) };
    Err(format!("{key} splits by {pattern}, expected Qwen's expression; another could search for ever"))
}

impl Bpe {
    /// Builds the crate's BPE model. Refuses a model that no Qwen has.
    fn build(self) -> std::result::Result<BPE, String> {
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
        let mut merges = Vec::with_capacity(self.merges.len());
        for (rank, merge) in self.merges.into_iter().enumerate() {
            let (left, right) = match merge {
                Merge::Pair(left, right) => (left, right),
                Merge::Spaced(both) => match both.split_once(' ') {
                    Some((left, right)) => (left.to_owned(), right.to_owned()),
                    None => return Err(format!("model.merges[{rank}] is {both:?}, expected two tokens")),
                },
            };
            check_merge(&left, &right, |token| self.vocab.contains_key(token))
                .map_err(|unknown| format!("model.merges[{rank}] needs {unknown:?}, which is no token"))?;
            merges.push((left, right));
        }
        let mut bpe = BPE::builder()
            .fuse_unk(self.fuse_unk.unwrap_or(false))
            .byte_fallback(self.byte_fallback.unwrap_or(false))
            .ignore_merges(self.ignore_merges.unwrap_or(false))
            .vocab_and_merges(self.vocab, merges);
        if let Some(unknown) = self.unk_token {
            bpe = bpe.unk_token(unknown);
        }
        bpe.build().map_err(|error| error.to_string())
    }
}

/// A merge needs both its tokens and their concatenation; the crate panics if that is longer than every token. The
/// error names the missing token.
pub(crate) fn check_merge(left: &str, right: &str, known: impl Fn(&str) -> bool) -> std::result::Result<(), String> {
    let both = format!("{left}{right}");
    let unknown = [left, right, &both].into_iter().find(|token| token.is_empty() || !known(token));
    unknown.map_or(Ok(()), |unknown| Err(unknown.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::load::tiny_random::TOKENIZER;

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
    fn what_is_built_is_what_the_crate_builds() {
        let pockets = crate::load::pocket::POCKETS.iter().map(|pocket| pocket.tokenizer);
        for (at, bytes) in [TOKENIZER].into_iter().chain(pockets).enumerate() {
            let mut json: Value = serde_json::from_slice(bytes).unwrap();
            for key in ["fuse_unk", "byte_fallback", "ignore_merges"] {
                json["model"][key] = json!(at % 2 == 0);
            }
            json["model"]["unk_token"] = if at % 2 == 0 { json!("a") } else { Value::Null };
            let text = json.to_string();
            let ours = parse(text.as_bytes(), Path::new("t")).unwrap();
            let theirs = Tokenizer::from_bytes(&text).unwrap();
            assert_eq!(ours.to_string(false).unwrap(), theirs.to_string(false).unwrap());
        }
        let old = refusal("/version", json!("0.9"));
        assert!(old.contains("version is \"0.9\", expected \"1.0\""), "{old}");
    }

    #[test]
    fn tokens_that_other_files_name_are_the_tokenizer_s_own() {
        let tokenizer = parse(TOKENIZER, Path::new("t")).unwrap();
        let of = |file: &str, text: String| {
            let checked = check_beside(text.as_bytes(), Path::new(file), &tokenizer);
            checked.map_or_else(|error| error.to_string(), |()| String::new())
        };
        let decoder = |id: &str, content: &str| {
            of(
                "m/tokenizer_config.json",
                format!(
                    r#"{{"added_tokens_decoder": {{"{id}": {{"content": "{content}", "special": true}}}}, "x": 1}}"#
                ),
            )
        };
        let table = |content: &str, id: &str| of("m/added_tokens.json", format!(r#"{{"{content}": {id}}}"#));
        assert_eq!(decoder("1006", "<|im_start|>") + &table("<|im_start|>", "1006"), "");
        assert_eq!(of("tokenizer_config.json", "{}".to_owned()) + &of("added_tokens.json", "{}".to_owned()), "");
        assert_eq!(of("tokenizer_config.json", r#"{"added_tokens_decoder": null}"#.to_owned()), "");
        let own = tokenizer.id_to_token(5).unwrap(); // in the vocabulary, so not an added token
        for (found, expected) in [
            (
                decoder("1008", "<|owl|>"),
                "it has the token \"<|owl|>\" with the id 1008, but tokenizer.json has no such added token",
            ),
            (
                table("<|owl|>", "1008"),
                "it has the token \"<|owl|>\" with the id 1008, but tokenizer.json has no such added token",
            ),
            (table(&own, "5"), "but tokenizer.json has no such added token"),
            (decoder("1007", "<|im_start|>"), "with the id 1007, but tokenizer.json gives it the id 1006"),
            (table("<|im_start|>", "1007"), "with the id 1007, but tokenizer.json gives it the id 1006"),
            (table("<|im_start|>", "-1"), "invalid value"),
            (decoder("x", "<|owl|>"), "invalid"),
        ] {
            assert!(found.starts_with("m/") && found.contains(expected), "{expected}: {found}");
        }
    }

    #[test]
    fn a_key_that_is_there_twice_has_one_reading() {
        let twice = |from: &str, to: &str| {
            let text = std::str::from_utf8(TOKENIZER).unwrap();
            assert!(text.contains(from), "{from}");
            parse(text.replacen(from, to, 1).as_bytes(), Path::new("t"))
        };
        let refused = twice("\"model\":", "\"decoder\": null, \"model\":").unwrap_err().to_string();
        assert!(refused.contains("duplicate field `decoder`"), "{refused}");
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
