//! A `.gguf` file as a model: configuration, tokenizer, chat template, and weights dequantised tensor by tensor. A
//! model in several files is named by the first.
//!
//! A pure function of bytes reads the header (`header.rs`). candle dequantises the blocks, except for two types that it
//! does not know (`stored.rs`). Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

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

    /// Builds a model from all its files, in order; the first one describes it. A file whose own part number differs is
    /// refused.
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

    /// The tokenizer as Qwen publishes it, or nothing when the file carries none.
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

    /// The name that the file gives itself.
    pub fn name(&self) -> Option<&str> {
        self.text("general.name").ok()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by Hugging Face name.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The number of bytes of its files.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| (**part).as_ref().len()).sum()
    }

    /// The stored bytes of a tensor.
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

/// Keys of each file of a model in several: its number, from 0; the number of files; the number of tensors in all
/// files.
const SPLIT_NO: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// The number of files of a model.
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

/// Pairs of a Hugging Face name and a GGUF name; in a block both follow the block's prefix.
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

/// Qwen's tokenizer from its three lists.
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
pub(crate) mod tests {
    use std::fs;

    use candle_core::quantized::gguf_file;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device as CandleDevice, Tensor as CandleTensor};
    use proptest::prelude::*;
    use tch::{Device, Kind};

    use super::*;
    use crate::load::weights::Weights;

    type Metadata = Vec<(String, gguf_file::Value)>;

    fn texts(list: &[&str]) -> gguf_file::Value {
        gguf_file::Value::Array(list.iter().map(|text| gguf_file::Value::String((*text).to_owned())).collect())
    }

    fn metadata(architecture: &str) -> Metadata {
        use gguf_file::Value::{Array, F32, I32, String as Text, U32};
        let own = |key: &str| format!("{architecture}.{key}");
        vec![
            ("general.architecture".into(), Text(architecture.into())),
            ("general.name".into(), Text("Tiny".into())),
            (own("block_count"), U32(1)),
            (own("context_length"), U32(512)),
            (own("embedding_length"), U32(256)),
            (own("feed_forward_length"), U32(512)),
            (own("attention.head_count"), U32(4)),
            (own("attention.head_count_kv"), U32(2)),
            (own("attention.layer_norm_rms_epsilon"), F32(1e-6)),
            (own("rope.freq_base"), F32(1e6)),
            ("tokenizer.ggml.model".into(), Text("gpt2".into())),
            ("tokenizer.ggml.pre".into(), Text("qwen2".into())),
            (
                "tokenizer.ggml.tokens".into(),
                texts(&["a", "b", "Ġ", "ab", "Ġab", "<|im_end|>", "<tool_call>", "[PAD7]"]),
            ),
            ("tokenizer.ggml.token_type".into(), Array([1, 1, 1, 1, 1, 3, 4, 5].map(I32).to_vec())),
            ("tokenizer.ggml.merges".into(), texts(&["a b", "Ġ ab"])),
            ("tokenizer.chat_template".into(), Text("{{ messages }}".into())),
        ]
    }

    /// One block whose tensors are stored in as many types as there are.
    fn tensors() -> Vec<(String, QTensor)> {
        let shapes = [
            ("token_embd.weight", vec![8, 256], GgmlDType::Q5_0),
            ("output_norm.weight", vec![256], GgmlDType::F32),
            ("blk.0.attn_norm.weight", vec![256], GgmlDType::F32),
            ("blk.0.ffn_norm.weight", vec![256], GgmlDType::F32),
            ("blk.0.attn_q.weight", vec![256, 256], GgmlDType::Q4K),
            ("blk.0.attn_q.bias", vec![256], GgmlDType::F16),
            ("blk.0.attn_k.weight", vec![128, 256], GgmlDType::Q5K),
            ("blk.0.attn_v.weight", vec![128, 256], GgmlDType::Q6K),
            ("blk.0.attn_output.weight", vec![256, 256], GgmlDType::Q8_0),
            ("blk.0.ffn_gate.weight", vec![512, 256], GgmlDType::Q4_0),
            ("blk.0.ffn_up.weight", vec![512, 256], GgmlDType::BF16),
            ("blk.0.ffn_down.weight", vec![256, 512], GgmlDType::F16),
        ];
        let quantized = shapes.into_iter().map(|(name, shape, dtype)| {
            let n: usize = shape.iter().product();
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919) as f32).sin()).collect();
            let tensor = CandleTensor::from_vec(values, shape, &CandleDevice::Cpu).unwrap();
            (name.to_owned(), QTensor::quantize(&tensor, dtype).unwrap())
        });
        quantized.collect()
    }

    fn bytes(metadata: &Metadata, tensors: &[(String, QTensor)]) -> Vec<u8> {
        let mut file = std::io::Cursor::new(Vec::new());
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
        file.into_inner()
    }

    /// A whole small model, as bytes of a file.
    pub(crate) fn tiny() -> Vec<u8> {
        bytes(&metadata("qwen2"), &tensors())
    }

    fn open(bytes: &[u8]) -> Result<Gguf> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        fs::write(&path, bytes).unwrap();
        Gguf::parse(map(&path).unwrap(), Path::new("tiny.gguf"))
    }

    /// The file with another type for one tensor, whose bytes stay.
    fn retyped(name: &str, from: u32, to: u32) -> Vec<u8> {
        let mut file = tiny();
        let entry = file.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
        let at = entry + name.len() + 4 + 2 * 8; // after the number of dimensions and two dimensions
        assert_eq!(file[at..at + 4], from.to_le_bytes());
        file[at..at + 4].copy_from_slice(&to.to_le_bytes());
        file
    }

    /// The model in two files, with these values of the split keys.
    fn halves(folder: &Path, split: [(u16, u16, i32); 2]) -> PathBuf {
        let tensors = tensors();
        for (at, (no, count, n_tensors)) in split.into_iter().enumerate() {
            let mut keys = if at == 0 { metadata("qwen2") } else { vec![] };
            keys.push((SPLIT_NO.to_owned(), gguf_file::Value::U16(no)));
            keys.push((SPLIT_COUNT.to_owned(), gguf_file::Value::U16(count)));
            keys.push((SPLIT_TENSORS.to_owned(), gguf_file::Value::I32(n_tensors)));
            let here = if at == 0 { &tensors[..5] } else { &tensors[5..] };
            fs::write(folder.join(format!("m-{:05}-of-00002.gguf", at + 1)), bytes(&keys, here)).unwrap();
        }
        folder.join("m-00001-of-00002.gguf")
    }

    fn changed_in(key: &str, value: Option<gguf_file::Value>) -> Result<Gguf> {
        let mut metadata = metadata("qwen2");
        metadata.retain(|(name, _)| name != key);
        metadata.extend(value.map(|value| (key.to_owned(), value)));
        open(&bytes(&metadata, &tensors()))
    }

    fn changed(key: &str, value: Option<gguf_file::Value>) -> Gguf {
        changed_in(key, value).unwrap()
    }

    #[test]
    fn every_type_is_dequantised_as_candle_does_it() {
        let file = tiny();
        let mut reader = std::io::Cursor::new(&file);
        let content = gguf_file::Content::read(&mut reader).unwrap();
        let weights = Weights::gguf(open(&file).unwrap());
        assert_eq!(weights.names().len(), tensors().len());
        let root = weights.root(Kind::Float, Device::Cpu);
        for (name, info) in &content.tensor_infos {
            let candle =
                content.tensor(&mut reader, name, &CandleDevice::Cpu).unwrap().dequantize(&CandleDevice::Cpu).unwrap();
            let shape: Vec<i64> = info.shape.dims().iter().map(|dim| *dim as i64).collect();
            let found = root.get(&hf_name(name).unwrap(), &shape).unwrap();
            let found: Vec<f32> = Vec::try_from(found.flatten(0, -1)).unwrap();
            assert_eq!(found, candle.flatten_all().unwrap().to_vec1::<f32>().unwrap(), "{name} {:?}", info.ggml_dtype);
        }
        assert!(weights.describe().contains("2 f16 + 1 bf16"), "{}", weights.describe());
    }

    #[test]
    fn the_configuration_is_read_from_the_keys_and_the_tensors() {
        let config = open(&tiny()).unwrap().config().unwrap();
        assert_eq!((config.family, config.d_model, config.d_head, config.d_vocab), (Family::Qwen2, 256, 64, 8));
        assert_eq!(
            (config.rope_theta, config.tie_embeddings, config.qkv_bias, config.qk_norm),
            (1e6, true, true, false)
        );
        assert!((config.rms_norm_eps - 1e-6).abs() < 1e-12);

        let mut keys = metadata("qwen3");
        keys.push(("qwen3.attention.key_length".into(), gguf_file::Value::U32(128)));
        let mut untied = tensors();
        untied.retain(|(name, _)| !name.ends_with("bias"));
        untied.push((
            "output.weight".into(),
            QTensor::quantize(
                &CandleTensor::zeros((8, 256), candle_core::DType::F32, &CandleDevice::Cpu).unwrap(),
                GgmlDType::Q8_0,
            )
            .unwrap(),
        ));
        let config = open(&bytes(&keys, &untied)).unwrap().config().unwrap();
        assert_eq!((config.family, config.d_head), (Family::Qwen3, 128));
        assert_eq!((config.tie_embeddings, config.qkv_bias, config.qk_norm), (false, false, true));
    }

    #[test]
    fn types_of_a_table_are_dequantised_and_others_are_named() {
        let values = |file: &[u8], name: &str, shape: &[i64]| -> Vec<f32> {
            let weights = Weights::gguf(open(file).unwrap());
            let tensor = weights.root(Kind::Float, Device::Cpu).get(name, shape).unwrap();
            Vec::try_from(tensor.flatten(0, -1)).unwrap()
        };
        for (name, hf, shape, ids, block, dequantize) in [
            ("blk.0.ffn_gate.weight", "mlp.gate_proj", [512, 256], (2, 20), 18, iq4::nl as fn(&[u8]) -> Vec<f32>),
            ("blk.0.attn_q.weight", "self_attn.q_proj", [256, 256], (12, 23), 136, iq4::xs),
        ] {
            let mut file = retyped(name, ids.0, ids.1);
            let hf = format!("model.layers.0.{hf}.weight");
            let stored = open(&file).unwrap().tensors()[&hf].bytes.clone();
            for block in file[stored].chunks_mut(block) {
                block[1] &= 0b1011_1111; // clear the top exponent bit of the f16 scale, so that it is finite
            }
            let gguf = open(&file).unwrap();
            let expected = dequantize(gguf.bytes(&gguf.tensors()[&hf]));
            assert!(expected.iter().any(|value| *value != 0.0));
            assert_eq!(values(&file, &hf, &shape), expected, "{name}: whole, in blocks of many threads");
        }
        for (id, expected) in
            [(21, "is stored as IQ3_S, which is not read"), (99, "is stored as type 99, which is not read")]
        {
            let message = open(&retyped("blk.0.ffn_gate.weight", 2, id)).err().unwrap().to_string();
            assert!(message.contains(&format!("tensor blk.0.ffn_gate.weight {expected}")), "{message}");
            assert!(message.contains("IQ4_NL and IQ4_XS are; hint: take"), "{message}");
        }
    }

    #[test]
    fn a_model_in_several_files_is_named_by_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = halves(folder.path(), [(0, 2, 12), (1, 2, 12)]);
        let split = Gguf::open(&first).unwrap();
        let whole = open(&tiny()).unwrap();
        assert_eq!(split.config().unwrap(), whole.config().unwrap());
        assert!(split.tokenizer().unwrap().is_some() && split.len() > whole.len());
        for (name, info) in split.tensors() {
            assert!(split.bytes(info) == whole.bytes(&whole.tensors()[name]), "{name}");
        }
        assert_eq!(split.tensors().len(), whole.tensors().len());

        let refused = |path: &Path| Gguf::open(path).err().expect("an error").to_string();
        let second = folder.path().join("m-00002-of-00002.gguf");
        let message = refused(&second);
        assert!(message.contains("it is part 2 of a model in 2 files; hint: name the first"), "{message}");
        let renamed = folder.path().join("model.gguf");
        fs::copy(&first, &renamed).unwrap();
        let message = refused(&renamed);
        assert!(message.contains("expected a name that ends in -00001-of-00002.gguf"), "{message}");
        let alone = Gguf::parse(fs::read(&first).unwrap(), &first).err().unwrap().to_string();
        assert!(alone.contains("it says that it is part 1 of 2, where part 1 of 1 is expected"), "{alone}");
        for (split, expected) in [
            (
                [(0, 2, 12), (0, 2, 12)],
                "m-00002-of-00002.gguf: it says that it is part 1 of 2, where part 2 of 2 is expected",
            ),
            (
                [(0, 2, 12), (1, 3, 12)],
                "m-00002-of-00002.gguf: it says that it is part 2 of 3, where part 2 of 2 is expected",
            ),
            (
                [(0, 2, 13), (1, 2, 13)],
                "m-00001-of-00002.gguf: split.tensors.count is 13, but its 2 parts have 12 tensors",
            ),
        ] {
            let message = refused(&halves(folder.path(), split));
            assert!(message.contains(expected), "{message}");
        }
        let first = halves(folder.path(), [(0, 2, 12), (1, 2, 12)]);
        fs::remove_file(second).unwrap();
        let message = refused(&first);
        assert!(
            message.contains("m-00001-of-00002.gguf: it is part 1 of 2, and part 2, ")
                && message.contains("m-00002-of-00002.gguf, is missing; hint: all parts"),
            "{message}"
        );
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        use gguf_file::Value::{String as Text, U32};
        let cases = [
            ("general.architecture", Some(Text("llama".into())), "general.architecture llama is not supported"),
            ("qwen2.rope.scaling.type", Some(Text("yarn".into())), "rope.scaling.type yarn is not supported"),
            ("qwen2.attention.sliding_window", Some(U32(512)), "qwen2.attention.sliding_window is not supported"),
            ("qwen2.attention.head_count_kv", Some(U32(3)), "expected a multiple of num_key_value_heads 3"),
            ("qwen2.block_count", None, "qwen2.block_count is missing, expected an integer"),
            ("qwen2.rope.freq_base", Some(U32(1)), "qwen2.rope.freq_base is of another type, expected a float"),
        ];
        let vector = changed_in(ARCHITECTURE, Some(Text(CONTROL_VECTOR.to_owned()))).err().unwrap().to_string();
        assert!(
            vector.contains("controlvector as a model is not supported") && vector.contains("--steer FILE:1"),
            "{vector}"
        );
        for (key, value, expected) in cases {
            let message = changed(key, value).config().unwrap_err().to_string();
            assert!(message.starts_with("tiny.gguf: ") && message.contains(expected), "{message}");
        }
        assert!(changed("qwen2.rope.scaling.type", Some(Text("none".into()))).config().is_ok());
        let mut strange = tensors();
        strange[0].0 = "blk.0.ffn_gate_exps.weight".into();
        let message = open(&bytes(&metadata("qwen2"), &strange)).err().unwrap().to_string();
        assert!(message.contains("blk.0.ffn_gate_exps.weight is in no dense Qwen model"), "{message}");
    }

    #[test]
    fn the_tokenizer_merges_splits_and_knows_its_special_tokens() {
        let gguf = open(&tiny()).unwrap();
        let tokenizer = gguf.tokenizer().unwrap().unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids("ab ab<|im_end|>ba<tool_call>"), [3, 4, 5, 1, 0, 6]);
        assert_eq!(tokenizer.decode(&[3, 4, 5, 6], true).unwrap(), "ab ab<tool_call>"); // 5 is special, 6 is not
        assert_eq!(tokenizer.token_to_id("[PAD7]"), None);
        assert_eq!(gguf.chat_template(), Some("{{ messages }}"));
        assert!(changed("tokenizer.ggml.tokens", None).tokenizer().unwrap().is_none());
    }

    #[test]
    fn a_wrong_tokenizer_is_an_error() {
        use gguf_file::Value::{Array, I32, String as Text};
        let cases = [
            ("tokenizer.ggml.pre", Some(Text("llama-bpe".into())), "tokenizer.ggml.pre llama-bpe is not supported"),
            (
                "tokenizer.ggml.merges",
                Some(texts(&["a b", "Ġab <|im_end|>"])),
                "merges[1] \"Ġab <|im_end|>\" needs \"Ġab<|im_end|>\"",
            ),
            ("tokenizer.ggml.merges", Some(texts(&["ab"])), "merges[0] \"ab\", expected two tokens"),
            ("tokenizer.ggml.merges", None, "expected tokenizer.ggml.tokens and .merges as texts"),
            ("tokenizer.ggml.token_type", Some(Array(vec![I32(1)])), "token_type has 1 entries for 8 tokens"),
            (
                "tokenizer.ggml.tokens",
                Some(texts(&["a", "b", "a", "c", "d", "e", "f", "g"])),
                "tokens[2] \"a\" is there twice",
            ),
        ];
        for (key, value, expected) in cases {
            let message = changed(key, value).tokenizer().expect_err(expected).to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn hostile_counts_are_refused_before_anything_is_allocated() {
        let file = tiny();
        let with = |at: usize, bytes: &[u8]| {
            let mut file = file.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            open(&file).err().expect("an error").to_string()
        };
        assert!(with(0, b"GGML").contains("does not begin with GGUF"));
        assert!(with(4, &[9]).contains("GGUF version is 9, expected 2 or 3"));
        assert!(
            with(8, &[0xff; 8]).contains("the number of tensors is 18446744073709551615, but the file has room for")
        );
        assert!(with(16, &[0xff; 8]).contains("the number of metadata keys is 18446744073709551615"));
        assert!(with(24, &[0xff; 8]).contains("a metadata key is 18446744073709551615"));
        let mut keys = metadata("qwen2");
        keys.push(("general.alignment".into(), gguf_file::Value::U32(0))); // candle's own reader divides by it
        let message = open(&bytes(&keys, &tensors())).err().unwrap().to_string();
        assert!(message.contains("general.alignment is Integer(0)"), "{message}");
        let message = open(&file[..file.len() - 1000]).err().unwrap().to_string();
        assert!(message.contains("inside tensor blk.0.ffn_down.weight"), "{message}");
    }

    #[test]
    fn tensors_on_one_another_are_refused() {
        let file = bytes(&Vec::new(), &tensors()[1..4]); // three of [256] in f32, one behind the other
        let name = b"blk.0.ffn_norm.weight";
        let entry = file.windows(name.len()).position(|window| window == name).unwrap();
        let offset = entry + name.len() + 4 + 8 + 4; // behind the number of dimensions, the dimension and the type
        let moved = |to: u64| {
            let mut file = file.clone();
            assert_eq!(file[offset..offset + 8], 2048_u64.to_le_bytes());
            file[offset..offset + 8].copy_from_slice(&to.to_le_bytes());
            open(&file).err().map(|error| error.to_string())
        };
        assert_eq!(moved(2048), None);
        for to in [0, 992, 1024, 2016] {
            let message = moved(to).expect("an error");
            assert!(message.contains("share bytes") && message.contains("blk.0.ffn_norm.weight"), "{to}: {message}");
        }
        assert!(moved(2080).expect("an error").contains("inside tensor blk.0.ffn_norm.weight"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn a_damaged_header_never_panics(flips in prop::collection::vec((0_usize..2200, any::<u8>()), 0..4), cut in 0_usize..4000) {
            let mut file = bytes(&metadata("qwen2"), &[]);
            file.truncate(cut);
            for (at, byte) in flips {
                if let Some(target) = file.get_mut(at) {
                    *target = byte;
                }
            }
            if let Ok(gguf) = open(&file) {
                let _ = (gguf.config().is_ok(), gguf.tokenizer().is_ok(), gguf.chat_template());
            }
        }

        #[test]
        fn a_damaged_tensor_table_never_panics(flips in prop::collection::vec((0_usize..700, any::<u8>()), 1..4)) {
            let tensors = &tensors()[1..4]; // the smallest
            let mut file = bytes(&Vec::new(), tensors);
            for (at, byte) in flips {
                if let Some(target) = file.get_mut(at) {
                    *target = byte;
                }
            }
            if let Ok(gguf) = open(&file) {
                for info in gguf.tensors().values() {
                    let numel: i64 = info.shape.iter().product();
                    prop_assert!(gguf.dequantize(info, &(0..numel as usize)).is_ok());
                }
            }
        }
    }
}
