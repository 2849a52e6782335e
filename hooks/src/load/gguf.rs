//! A `.gguf` file as a model: configuration, tokenizer, chat template, and weights dequantised tensor by tensor. A
//! model in several files is opened by the path of the first.
//!
//! A pure function of bytes reads the header (`header.rs`). candle dequantises the blocks, except for two types that it
//! lacks (`stored.rs`). Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

pub(crate) mod header;
mod iq4;
pub(crate) mod stored;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use crate::config::{Config, Family};
use crate::error::{Error, Problem, Result, malformed, unsupported};
use crate::load::files::{Bytes, map};
use crate::load::gguf::header::{Header, TensorInfo, Value};
use crate::load::tokenizer_file::{WORDS, check_merge};

/// An open GGUF model: its header in memory, its tensors still on disk.
pub struct Gguf {
    path: PathBuf,
    parts: Vec<Bytes>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>, // by Hugging Face name
}

impl Gguf {
    /// Maps a file. If it is the first of several, maps the others too.
    pub fn open(path: &Path) -> Result<Self> {
        let first = map(path)?;
        let header = Header::read(&first).map_err(|problem| malformed(path, problem))?;
        let n_parts = split_count(&header.metadata).map_err(|problem| malformed(path, problem))?;
        check_part(&header.metadata, 0, n_parts).map_err(|problem| malformed(path, problem))?;
        let mut files: Vec<(Bytes, PathBuf)> = vec![(Box::new(first), path.to_owned())];
        for part in 2..=n_parts {
            let next = part_path(path, part, n_parts)?;
            if !next.exists() {
                let missing = next.display();
                let problem = format!("it is part 1 of {n_parts}, and part {part}, {missing}, is missing");
                return Err(malformed(path, problem).with_hint("all parts go into one folder"));
            }
            files.push((Box::new(map(&next)?), next));
        }
        Self::of_parts(files)
    }

    /// Reads the header of a file that holds the whole model, mapped or in memory; `path` is for messages.
    pub fn parse(file: impl AsRef<[u8]> + Send + Sync + 'static, path: &Path) -> Result<Self> {
        Self::of_parts(vec![(Box::new(file), path.to_owned())])
    }

    /// Builds a model from all its files, in order; the first one describes it. Refuses a file whose part number is
    /// another.
    pub fn of_parts(files: Vec<(Bytes, PathBuf)>) -> Result<Self> {
        let n_parts = files.len();
        let mut whole: Option<Self> = None;
        for (part, (file, path)) in files.into_iter().enumerate() {
            let header = Header::read((*file).as_ref()).map_err(|problem| malformed(&path, problem))?;
            check_part(&header.metadata, part, n_parts).map_err(|problem| malformed(&path, problem))?;
            let whole = whole.get_or_insert_with(|| Self {
                path: path.clone(),
                parts: vec![],
                metadata: header.metadata,
                tensors: BTreeMap::new(),
            });
            whole.parts.push(file);
            if whole.text(ARCHITECTURE).is_ok_and(|architecture| architecture == CONTROL_VECTOR) {
                let instead = "it is a vector that undertone ask adds to a model: --steer FILE:1";
                return Err(whole.unsupported(format!("{ARCHITECTURE} {CONTROL_VECTOR} as a model"), instead));
            }
            for (name, info) in header.tensors {
                let hf = hf_name(&name)
                    .ok_or_else(|| malformed(&path, format!("tensor {name} is in no dense Qwen model")))?;
                if whole.tensors.insert(hf, TensorInfo { part, ..info }).is_some() {
                    return Err(malformed(&path, format!("tensor {name} is there twice")));
                }
            }
        }
        let whole = whole.ok_or_else(|| malformed(Path::new(""), "a model without a file".to_owned()))?;
        match whole.value(SPLIT_TENSORS) {
            Some(Value::Integer(n)) if n_parts > 1 && *n != whole.tensors.len() as i64 => Err(whole.malformed(
                format!("{SPLIT_TENSORS} is {n}, but its {n_parts} parts have {} tensors", whole.tensors.len()),
            )),
            _ => Ok(whole),
        }
    }

    /// The model's numbers, from the keys `qwen2.*` or `qwen3.*` and from the presence of tensors.
    pub fn config(&self) -> Result<Config> {
        let architecture = self.text(ARCHITECTURE)?;
        let family = match architecture {
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => return Err(self.unsupported(format!("{ARCHITECTURE} {other}"), "qwen2 and qwen3 are")),
        };
        let key = |name: &str| format!("{architecture}.{name}");
        if let Some(scaling) = self.text(&key("rope.scaling.type")).ok().filter(|scaling| *scaling != "none") {
            return Err(self.unsupported(format!("rope.scaling.type {scaling}"), "the unscaled rotary embedding is"));
        }
        if self.value(&key("attention.sliding_window")).is_some_and(|window| *window != Value::Integer(0)) {
            return Err(self.unsupported(key("attention.sliding_window"), "full attention in every layer is"));
        }
        let d_model = self.integer(&key("embedding_length"))?;
        let n_heads = self.integer(&key("attention.head_count"))?;
        let d_head = match self.value(&key("attention.key_length")) {
            Some(_) => self.integer(&key("attention.key_length"))?,
            None if n_heads > 0 && d_model % n_heads == 0 => d_model / n_heads,
            None => {
                return Err(self.malformed(format!(
                    "embedding_length is {d_model}, expected a multiple of attention.head_count {n_heads}"
                )));
            }
        };
        let n_layers = self.integer(&key("block_count"))?;
        let has = |name: &str| self.tensors.contains_key(name);
        let config = Config {
            family,
            d_model,
            n_layers: usize::try_from(n_layers)
                .map_err(|_| self.malformed(format!("block_count is {n_layers}, expected 1 to 1024")))?,
            n_heads,
            n_kv_heads: self.integer(&key("attention.head_count_kv"))?,
            d_head,
            d_mlp: self.integer(&key("feed_forward_length"))?,
            d_vocab: self.info("model.embed_tokens.weight")?.shape.first().copied().unwrap_or(0),
            n_ctx: self.integer(&key("context_length"))?,
            rope_theta: self.float(&key("rope.freq_base"))?,
            rms_norm_eps: self.float(&key("attention.layer_norm_rms_epsilon"))?,
            tie_embeddings: !has("lm_head.weight"),
            qkv_bias: has("model.layers.0.self_attn.q_proj.bias"),
            qk_norm: family == Family::Qwen3,
        };
        config.check(&self.path)?;
        Ok(config)
    }

    /// The tokenizer as Qwen publishes it; `None` if the file has none.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        if self.value("tokenizer.ggml.tokens").is_none() {
            return Ok(None);
        }
        for (key, expected) in [("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")] {
            let found = self.text(key)?;
            if found != expected {
                let instead = format!("{expected} is, the tokenizer of Qwen");
                return Err(self.unsupported(format!("{key} {found}"), instead));
            }
        }
        let (Some(Value::Texts(tokens)), Some(Value::Texts(merges)), Some(Value::Integers(types))) = (
            self.value("tokenizer.ggml.tokens"),
            self.value("tokenizer.ggml.merges"),
            self.value("tokenizer.ggml.token_type"),
        ) else {
            let problem = "expected tokenizer.ggml.tokens and .merges as texts and .token_type as integers";
            return Err(self.malformed(problem.to_owned()));
        };
        if tokens.len() != types.len() {
            let (n_types, n) = (types.len(), tokens.len());
            return Err(self.malformed(format!("tokenizer.ggml.token_type has {n_types} entries for {n} tokens")));
        }
        tokenizer(tokens, types, merges).map(Some).map_err(|problem| self.malformed(problem))
    }

    /// The chat template, if there is one.
    pub fn chat_template(&self) -> Option<&str> {
        self.text("tokenizer.chat_template").ok()
    }

    /// The model's name in the file's metadata.
    pub fn name(&self) -> Option<&str> {
        self.text("general.name").ok()
    }

    /// The path of the file, or of the first of several.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Number of bytes of its files.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| (**part).as_ref().len()).sum()
    }

    pub(crate) fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &(*self.parts[info.part]).as_ref()[info.bytes.clone()]
    }

    /// Some elements of a tensor. The range begins and ends at multiples of 256 or at the
    /// tensor's end, so that no quantised block is cut.
    pub(crate) fn dequantize(&self, info: &TensorInfo, elements: &Range<usize>) -> Result<Vec<f32>> {
        let (per_block, block_bytes) = (info.dtype.block_size(), info.dtype.block_bytes());
        let byte = |element: usize| element / per_block * block_bytes;
        let stored = &self.bytes(info)[byte(elements.start)..byte(elements.end)];
        info.dtype.dequantize(stored, elements.len()).map_err(|problem| self.malformed(problem))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || Error::MissingTensor { name: name.to_owned(), file: self.path.display().to_string() };
        self.tensors.get(name).ok_or_else(missing)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn text(&self, key: &str) -> Result<&str> {
        let Some(Value::Text(text)) = self.value(key) else { return Err(self.wrong(key, "a text")) };
        Ok(text)
    }

    fn integer(&self, key: &str) -> Result<i64> {
        let Some(Value::Integer(number)) = self.value(key) else { return Err(self.wrong(key, "an integer")) };
        Ok(*number)
    }

    fn float(&self, key: &str) -> Result<f64> {
        let Some(Value::Float(number)) = self.value(key) else { return Err(self.wrong(key, "a float")) };
        Ok(*number)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = if self.value(key).is_some() { "of another type" } else { "missing" };
        self.malformed(format!("{key} is {found}, expected {expected}"))
    }

    fn malformed(&self, problem: String) -> Error {
        malformed(&self.path, problem)
    }

    fn unsupported(&self, feature: String, instead: impl Into<String>) -> Error {
        unsupported(&self.path, feature, instead)
    }
}

pub(crate) const ARCHITECTURE: &str = "general.architecture";
pub(crate) const CONTROL_VECTOR: &str = "controlvector";

/// Keys in each file of a model in several: the file's number, from 0; the number of files; the number of tensors in
/// all files.
const SPLIT_NO: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";

fn split_count(metadata: &BTreeMap<String, Value>) -> std::result::Result<usize, String> {
    match metadata.get(SPLIT_COUNT) {
        None | Some(Value::Integer(0)) => Ok(1),
        Some(Value::Integer(n)) if (1..=MOST_PARTS).contains(n) => Ok(*n as usize),
        Some(found) => Err(format!("{SPLIT_COUNT} is {found:?}, expected 1 to {MOST_PARTS}")),
    }
}

/// The part's number in a file name has five digits.
const MOST_PARTS: i64 = 99_999;

/// Refuses a file that is not part `part` (from 0) of `n_parts`.
fn check_part(metadata: &BTreeMap<String, Value>, part: usize, n_parts: usize) -> std::result::Result<(), Problem> {
    let count = split_count(metadata)?;
    let number = match metadata.get(SPLIT_NO) {
        Some(Value::Integer(number)) => *number,
        None if count == 1 => 0,
        found => return Err(format!("{SPLIT_NO} is {found:?}, expected the number of the part, from 0").into()),
    };
    if part == 0 && number != 0 {
        return Err(Problem::hinted(
            format!("it is part {} of a model in {count} files", number + 1),
            format!("name the first, …-00001-of-{count:05}.gguf"),
        ));
    }
    if count != n_parts || number != part as i64 {
        let (is, asked) = (number + 1, part + 1);
        let problem = format!("it says that it is part {is} of {count}, where part {asked} of {n_parts} is expected");
        return Err(problem.into());
    }
    Ok(())
}

/// The file name of another part, made from the first one's.
fn part_path(first: &Path, part: usize, n_parts: usize) -> Result<PathBuf> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ending = format!("-00001-of-{n_parts:05}.gguf");
    let Some(stem) = name.strip_suffix(&ending) else {
        let problem = format!(
            "it is the first of {n_parts} files of a model, expected a name that ends in {ending}, by which the others are found"
        );
        return Err(malformed(first, problem));
    };
    Ok(first.with_file_name(format!("{stem}-{part:05}-of-{n_parts:05}.gguf")))
}

/// Pairs of a tensor's Hugging Face name and GGUF name; those in a block follow the block's prefix.
const OUTSIDE_BLOCKS: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];
const IN_BLOCK: [(&str, &str); 14] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

/// `blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`; `None` for a tensor that no dense Qwen has.
fn hf_name(gguf: &str) -> Option<String> {
    let same = |(_, candidate): &&(&str, &str), name: &str| *candidate == name;
    let Some((layer, name)) = gguf.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        return OUTSIDE_BLOCKS.iter().find(|pair| same(pair, gguf)).map(|(hf, _)| (*hf).to_owned());
    };
    let layer: u32 = layer.parse().ok()?;
    let (hf, _) = IN_BLOCK.iter().find(|pair| same(pair, name))?;
    Some(format!("model.layers.{layer}.{hf}"))
}

const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5; // fills the embedding up to its round number of rows

/// Builds Qwen's tokenizer from the file's three lists.
fn tokenizer(tokens: &[String], types: &[i64], merges: &[String]) -> std::result::Result<Tokenizer, String> {
    let mut vocab = Vocab::with_capacity(tokens.len());
    let mut added = Vec::new();
    for (id, (token, kind)) in (0_u32..).zip(tokens.iter().zip(types)) {
        if *kind == UNUSED {
            continue;
        }
        if vocab.insert(token.clone(), id).is_some() {
            return Err(format!("tokenizer.ggml.tokens[{id}] {token:?} is there twice"));
        }
        if [CONTROL, USER_DEFINED].contains(kind) {
            added.push(AddedToken::from(token.clone(), *kind == CONTROL).normalized(false));
        }
    }
    let merges = merges.iter().enumerate().map(|(rank, merge)| {
        let (left, right) =
            merge.split_once(' ').ok_or(format!("tokenizer.ggml.merges[{rank}] {merge:?}, expected two tokens"))?;
        check_merge(left, right, |token| vocab.contains_key(token)).map_err(|unknown| {
            format!("tokenizer.ggml.merges[{rank}] {merge:?} needs {unknown:?}, which is no token")
        })?;
        Ok((left.to_owned(), right.to_owned()))
    });
    let merges = merges.collect::<std::result::Result<Vec<_>, String>>()?;
    let said = |error: tokenizers::Error| format!("tokenizer: {error}");
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(said)?;
    let words =
        Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Isolated, false).map_err(said)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(NFC)).map_err(said)?;
    let steps = vec![PreTokenizerWrapper::Split(words), PreTokenizerWrapper::ByteLevel(bytes)];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_post_processor(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    tokenizer.add_tokens(added).map_err(said)?;
    Ok(tokenizer)
}

#[cfg(test)]
pub(crate) mod tests;
