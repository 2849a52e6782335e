//! A `.gguf` file as a model: configuration, tokenizer, chat template, and weights dequantised tensor by tensor.
//!
//! The header is read by a pure function of bytes that checks every count against what the file can hold; the blocks
//! themselves are dequantised by candle. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use crate::config::{Config, Family};
use crate::error::{Error, Result};
use crate::files::Bytes;
use crate::tokenizer_file::{WORDS, check_merge};

/// An open GGUF file: its header in memory, its tensors still on disk.
pub struct Gguf {
    path: PathBuf,
    file: Bytes,
    header: Header,
}

/// What stands before the tensors' bytes.
struct Header {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>, // by Hugging Face name
}

/// One value of the metadata. Numbers of all widths are one; what no model needs is only skipped over.
#[derive(Debug, PartialEq)]
enum Value {
    Integer(i64),
    Float(f64),
    Bool,
    Text(String),
    Integers(Vec<i64>),
    Texts(Vec<String>),
    Skipped,
}

/// Where a tensor lies and how it is stored.
#[derive(Debug)]
pub(crate) struct TensorInfo {
    pub(crate) dtype: GgmlDType,
    pub(crate) shape: Vec<i64>, // [d_out, d_in]: GGUF writes it the other way round
    pub(crate) bytes: Range<usize>,
}

impl Gguf {
    /// Reads the header in the bytes of a file, mapped or in memory; `path` is for messages.
    pub fn parse(file: impl AsRef<[u8]> + Send + Sync + 'static, path: &Path) -> Result<Self> {
        let header = Header::read(file.as_ref()).map_err(|problem| malformed(path, problem))?;
        Ok(Self { path: path.to_owned(), file: Box::new(file), header })
    }

    /// The model's numbers, from the keys `qwen2.*` or `qwen3.*` and from which tensors there are.
    pub fn config(&self) -> Result<Config> {
        let architecture = self.text("general.architecture")?;
        let family = match architecture {
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => return Err(self.unsupported(format!("general.architecture {other}"), "qwen2 and qwen3 are")),
        };
        let key = |name: &str| format!("{architecture}.{name}");
        if let Some(Value::Text(scaling)) =
            self.value(&key("rope.scaling.type")).filter(|value| **value != Value::Text("none".to_owned()))
        {
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
        let has = |name: &str| self.header.tensors.contains_key(name);
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
                return Err(
                    self.unsupported(format!("{key} {found}"), &format!("{expected} is, the tokenizer of Qwen"))
                );
            }
        }
        let (Some(Value::Texts(tokens)), Some(Value::Texts(merges)), Some(Value::Integers(types))) = (
            self.value("tokenizer.ggml.tokens"),
            self.value("tokenizer.ggml.merges"),
            self.value("tokenizer.ggml.token_type"),
        ) else {
            return Err(self.malformed(
                "expected tokenizer.ggml.tokens and .merges as texts and .token_type as integers".to_owned(),
            ));
        };
        if tokens.len() != types.len() {
            return Err(self.malformed(format!(
                "tokenizer.ggml.token_type has {} entries for {} tokens",
                types.len(),
                tokens.len()
            )));
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
        &self.header.tensors
    }

    /// How many bytes the file has.
    pub(crate) fn len(&self) -> usize {
        (*self.file).as_ref().len()
    }

    /// The stored bytes of a tensor.
    pub(crate) fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &(*self.file).as_ref()[info.bytes.clone()]
    }

    /// Some elements of a tensor. The range begins and ends at multiples of 256 or at the
    /// tensor's end, so that no quantised block is cut.
    pub(crate) fn dequantize(&self, info: &TensorInfo, elements: &Range<usize>) -> Result<Vec<f32>> {
        let (per_block, block_bytes) = (info.dtype.block_size(), info.dtype.type_size());
        let byte = |element: usize| element / per_block * block_bytes;
        let stored = &self.bytes(info)[byte(elements.start)..byte(elements.end)];
        let refused = |error: candle_core::Error| self.malformed(format!("{:?} block: {error}", info.dtype));
        match info.dtype.from_data(stored.into()).dequantize(elements.len()).map_err(refused)? {
            CpuStorage::F32(values) => Ok(values),
            _ => Err(self.malformed(format!("{:?} block: expected it to dequantise to f32", info.dtype))),
        }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || Error::MissingTensor { name: name.to_owned(), file: self.path.display().to_string() };
        self.header.tensors.get(name).ok_or_else(missing)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    fn text(&self, key: &str) -> Result<&str> {
        match self.value(key) {
            Some(Value::Text(text)) => Ok(text),
            other => Err(self.wrong(key, "a text", other)),
        }
    }

    fn integer(&self, key: &str) -> Result<i64> {
        match self.value(key) {
            Some(Value::Integer(number)) => Ok(*number),
            other => Err(self.wrong(key, "an integer", other)),
        }
    }

    fn float(&self, key: &str) -> Result<f64> {
        match self.value(key) {
            Some(Value::Float(number)) => Ok(*number),
            other => Err(self.wrong(key, "a float", other)),
        }
    }

    fn wrong(&self, key: &str, expected: &str, found: Option<&Value>) -> Error {
        self.malformed(match found {
            None => format!("{key} is missing, expected {expected}"),
            Some(_) => format!("{key} is of another type, expected {expected}"),
        })
    }

    fn malformed(&self, problem: String) -> Error {
        malformed(&self.path, problem)
    }

    fn unsupported(&self, feature: String, hint: &str) -> Error {
        Error::Unsupported { path: self.path.clone(), feature, hint: hint.to_owned() }
    }
}

fn malformed(path: &Path, problem: String) -> Error {
    Error::Malformed { path: path.to_owned(), problem }
}

/// Pairs of a Hugging Face name and a GGUF name; in a block both stand behind the block's prefix.
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

/// `blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`; nothing for a tensor that no dense Qwen has.
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
        match check_merge(left, right, |token| vocab.contains_key(token)) {
            Err(unknown) => {
                Err(format!("tokenizer.ggml.merges[{rank}] {merge:?} needs {unknown:?}, which is no token"))
            }
            Ok(()) => Ok((left.to_owned(), right.to_owned())),
        }
    });
    let merges = merges.collect::<std::result::Result<Vec<_>, _>>()?;
    let said = |error: tokenizers::Error| format!("tokenizer: {error}");
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(said)?;
    let words =
        Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Isolated, false).map_err(said)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(NFC)).map_err(said)?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(bytes),
    ])));
    tokenizer.with_post_processor(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    tokenizer.add_tokens(added).map_err(said)?;
    Ok(tokenizer)
}

impl Header {
    /// A pure function of the file's bytes: whatever they are, it answers with a header or with what is wrong.
    fn read(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut cursor = Cursor { bytes, at: 0 };
        if cursor.take(4, "the magic")? != b"GGUF" {
            return Err("expected a GGUF file: it does not begin with GGUF".to_owned());
        }
        let version = cursor.u32("the version")?;
        if ![2, 3].contains(&version) {
            return Err(format!("GGUF version is {version}, expected 2 or 3, little-endian"));
        }
        let n_tensors = cursor.count(24, "the number of tensors")?; // name's length, dimensions, dtype, offset
        let n_keys = cursor.count(13, "the number of metadata keys")?; // name's length, type, one byte
        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let key = cursor.name("a metadata key")?;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(kind, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("metadata key {key} is there twice"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Integer(alignment)) if *alignment >= 8 && alignment.count_ones() == 1 => *alignment as usize,
            Some(found) => {
                return Err(format!("general.alignment is {found:?}, expected a power of two of at least 8"));
            }
        };
        let mut tensors = BTreeMap::new();
        for _ in 0..n_tensors {
            let name = cursor.name("a tensor's name")?;
            let info = cursor.tensor(&name, alignment)?;
            let hf = hf_name(&name).ok_or(format!("tensor {name} is in no dense Qwen model"))?;
            if tensors.insert(hf, info).is_some() {
                return Err(format!("tensor {name} is there twice"));
            }
        }
        let data = cursor.at.checked_next_multiple_of(alignment).ok_or("general.alignment is too large")?;
        for (name, info) in &mut tensors {
            let range = info.bytes.start.checked_add(data).zip(info.bytes.end.checked_add(data));
            let range = range.filter(|(_, end)| *end <= bytes.len());
            let (start, end) =
                range.ok_or_else(|| format!("the file ends at byte {} inside tensor {name}", bytes.len()))?;
            info.bytes = start..end;
        }
        // Tensors on one another would let a small file stand for a model as large as it likes.
        let mut places: Vec<_> = tensors.iter().map(|(name, info)| (info.bytes.clone(), name)).collect();
        places.sort_by_key(|(place, _)| place.start);
        if let Some(pair) = places.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
            let (first, second) = (pair[0].1, pair[1].1);
            return Err(format!("the tensors {first} and {second} share bytes, expected each to have its own"));
        }
        Ok(Self { metadata, tensors })
    }
}

/// A place in the header's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> std::result::Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the file ends at byte {} inside {what}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> std::result::Result<[u8; N], String> {
        let taken = self.take(N, what)?;
        taken.try_into().map_err(|_| format!("the file ends inside {what}"))
    }

    fn u32(&mut self, what: &str) -> std::result::Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> std::result::Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of which each takes at least `size` bytes.
    fn count(&mut self, size: usize, what: &str) -> std::result::Result<usize, String> {
        let count = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / size;
        let fits = usize::try_from(count).ok().filter(|count| *count <= room);
        fits.ok_or_else(|| format!("{what} is {count}, but the file has room for {room}"))
    }

    fn text(&mut self, what: &str) -> std::result::Result<Option<String>, String> {
        let length = self.count(1, what)?;
        Ok(std::str::from_utf8(self.take(length, what)?).ok().map(str::to_owned))
    }

    fn name(&mut self, what: &str) -> std::result::Result<String, String> {
        let start = self.at;
        self.text(what)?.ok_or_else(|| format!("{what} at byte {start} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str) -> std::result::Result<Value, String> {
        Ok(match kind {
            0..=5 | 10 | 11 => self.integer(kind, key)?.map_or(Value::Skipped, Value::Integer),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => {
                self.take(1, key)?;
                Value::Bool
            }
            8 => self.text(key)?.map_or(Value::Skipped, Value::Text),
            9 => self.list(key)?,
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(format!("{key} has the unknown type {other}")),
        })
    }

    /// An integer of any width; nothing if it is beyond i64.
    fn integer(&mut self, kind: u32, key: &str) -> std::result::Result<Option<i64>, String> {
        Ok(match kind {
            0 => Some(u8::from_le_bytes(self.array(key)?).into()),
            1 => Some(i8::from_le_bytes(self.array(key)?).into()),
            2 => Some(u16::from_le_bytes(self.array(key)?).into()),
            3 => Some(i16::from_le_bytes(self.array(key)?).into()),
            4 => Some(self.u32(key)?.into()),
            5 => Some(i32::from_le_bytes(self.array(key)?).into()),
            10 => i64::try_from(self.u64(key)?).ok(),
            _ => Some(i64::from_le_bytes(self.array(key)?)),
        })
    }

    fn list(&mut self, key: &str) -> std::result::Result<Value, String> {
        let kind = self.u32(key)?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            other => return Err(format!("{key} is a list of type {other}, which no Qwen model has")),
        };
        let n = self.count(size, key)?;
        match kind {
            6 | 7 | 12 => {
                self.take(n * size, key)?;
                Ok(Value::Skipped)
            }
            8 => {
                let texts: Option<Vec<_>> = (0..n).map(|_| self.text(key)).collect::<std::result::Result<_, _>>()?;
                Ok(texts.map_or(Value::Skipped, Value::Texts))
            }
            _ => {
                let integers: Option<Vec<_>> =
                    (0..n).map(|_| self.integer(kind, key)).collect::<std::result::Result<_, _>>()?;
                Ok(integers.map_or(Value::Skipped, Value::Integers))
            }
        }
    }

    /// A tensor's description; its bytes still counted from where the tensors begin.
    fn tensor(&mut self, name: &str, alignment: usize) -> std::result::Result<TensorInfo, String> {
        let n_dims = self.u32(name)?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("tensor {name} has {n_dims} dimensions, expected 1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let dim = self.u64(name)?;
            shape.push(
                i64::try_from(dim)
                    .ok()
                    .filter(|dim| *dim > 0)
                    .ok_or_else(|| format!("tensor {name} has a dimension of {dim}"))?,
            );
        }
        let row = shape[0] as usize;
        shape.reverse();
        let dtype =
            dtype(self.u32(name)?).map_err(|id| format!("tensor {name} has the type {id}, which is not known"))?;
        if !row.is_multiple_of(dtype.block_size()) {
            return Err(format!(
                "tensor {name} has rows of {row}, expected a multiple of {} for {dtype:?}",
                dtype.block_size()
            ));
        }
        let elements = shape.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim as usize));
        let size = elements.and_then(|n| (n / dtype.block_size()).checked_mul(dtype.type_size()));
        let offset = usize::try_from(self.u64(name)?).ok();
        let (Some(size), Some(offset)) = (size, offset.filter(|offset| offset.is_multiple_of(alignment))) else {
            return Err(format!(
                "tensor {name} lies at no multiple of {alignment}, or its size {shape:?} is beyond all bounds"
            ));
        };
        let end = offset.checked_add(size).ok_or_else(|| format!("tensor {name} ends beyond all bounds"))?;
        Ok(TensorInfo { dtype, shape, bytes: offset..end })
    }
}

/// The types by their number in the file. `Q8_1` and `Q8_K` hold activations and stand in no file.
fn dtype(id: u32) -> std::result::Result<GgmlDType, u32> {
    Ok(match id {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => return Err(other),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(crate) mod tests {
    use std::fs;

    use candle_core::quantized::QTensor;
    use candle_core::quantized::gguf_file;
    use candle_core::{Device as CandleDevice, Tensor as CandleTensor};
    use proptest::prelude::*;
    use tch::{Device, Kind};

    use super::*;
    use crate::weights::{Weights, map};

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

    fn changed(key: &str, value: Option<gguf_file::Value>) -> Gguf {
        let mut metadata = metadata("qwen2");
        metadata.retain(|(name, _)| name != key);
        metadata.extend(value.map(|value| (key.to_owned(), value)));
        open(&bytes(&metadata, &tensors())).unwrap()
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
        assert!(message.contains("inside tensor model.layers.0.mlp.down_proj.weight"), "{message}");
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
            assert!(message.contains("share bytes") && message.contains("post_attention_layernorm"), "{to}: {message}");
        }
        assert!(
            moved(2080).expect("an error").contains("inside tensor model.layers.0.post_attention_layernorm.weight")
        );
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
