//! The header of a GGUF file, up to the tensors' bytes. Every count is checked against the length of the file.

use std::collections::BTreeMap;
use std::ops::Range;

use super::stored::Stored;
use crate::error::Problem;

pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>, // by the file's own names
}

/// One value of the metadata. Integers of all widths are one variant, and floats another; values that no model needs
/// are skipped.
#[derive(Debug, PartialEq)]
pub(crate) enum Value {
    Integer(i64),
    Float(f64),
    Bool,
    Text(String),
    Integers(Vec<i64>),
    Texts(Vec<String>),
    Skipped,
}

#[derive(Debug)]
pub(crate) struct TensorInfo {
    pub(crate) dtype: Stored,
    pub(crate) shape: Vec<i64>, // [d_out, d_in]: GGUF stores the reverse order
    pub(crate) bytes: Range<usize>,
    pub(crate) part: usize, // which file of a model in several
}

impl Header {
    /// Reads a header from any bytes, or returns what is wrong with them. A pure function.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, Problem> {
        let mut cursor = Cursor { bytes, at: 0 };
        if cursor.take(4, "the magic")? != b"GGUF" {
            return Err("expected a GGUF file: it does not begin with GGUF".to_owned().into());
        }
        let version = cursor.u32("the version")?;
        if ![2, 3].contains(&version) {
            return Err(format!("GGUF version is {version}, expected 2 or 3, little-endian").into());
        }
        let n_tensors = cursor.count(24, "the number of tensors")?; // name's length, dimensions, dtype, offset
        let n_keys = cursor.count(13, "the number of metadata keys")?; // name's length, type, one byte
        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let key = cursor.name("a metadata key")?;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(kind, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("metadata key {key} is there twice").into());
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Integer(alignment)) if *alignment >= 8 && alignment.count_ones() == 1 => *alignment as usize,
            Some(found) => {
                return Err(format!("general.alignment is {found:?}, expected a power of two of at least 8").into());
            }
        };
        let mut tensors = BTreeMap::new();
        for _ in 0..n_tensors {
            let name = cursor.name("a tensor's name")?;
            let info = cursor.tensor(&name, alignment)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("tensor {name} is there twice").into());
            }
        }
        let data =
            cursor.at.checked_next_multiple_of(alignment).ok_or_else(|| "general.alignment is too large".to_owned())?;
        for (name, info) in &mut tensors {
            let range = info.bytes.start.checked_add(data).zip(info.bytes.end.checked_add(data));
            let range = range.filter(|(_, end)| *end <= bytes.len());
            let (start, end) =
                range.ok_or_else(|| format!("the file ends at byte {} inside tensor {name}", bytes.len()))?;
            info.bytes = start..end;
        }
        // Tensors must not share bytes: a small file could describe a model of any size.
        let mut places: Vec<_> = tensors.iter().map(|(name, info)| (info.bytes.clone(), name)).collect();
        places.sort_by_key(|(place, _)| place.start);
        if let Some(pair) = places.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
            let (first, second) = (pair[0].1, pair[1].1);
            return Err(format!("the tensors {first} and {second} share bytes, expected each to have its own").into());
        }
        Ok(Self { metadata, tensors })
    }
}

/// A reading position in the header's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the file ends at byte {} inside {what}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let taken = self.take(N, what)?;
        taken.try_into().map_err(|_| format!("the file ends inside {what}"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `size` bytes each.
    fn count(&mut self, size: usize, what: &str) -> Result<usize, String> {
        let count = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / size;
        let fits = usize::try_from(count).ok().filter(|count| *count <= room);
        fits.ok_or_else(|| format!("{what} is {count}, but the file has room for {room}"))
    }

    fn text(&mut self, what: &str) -> Result<Option<String>, String> {
        let length = self.count(1, what)?;
        Ok(std::str::from_utf8(self.take(length, what)?).ok().map(str::to_owned))
    }

    fn name(&mut self, what: &str) -> Result<String, String> {
        let start = self.at;
        self.text(what)?.ok_or_else(|| format!("{what} at byte {start} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, String> {
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

    /// An integer of any width; `None` if it is beyond i64.
    fn integer(&mut self, kind: u32, key: &str) -> Result<Option<i64>, String> {
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

    fn list(&mut self, key: &str) -> Result<Value, String> {
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
                let texts: Option<Vec<_>> = (0..n).map(|_| self.text(key)).collect::<Result<_, _>>()?;
                Ok(texts.map_or(Value::Skipped, Value::Texts))
            }
            _ => {
                let integers: Option<Vec<_>> = (0..n).map(|_| self.integer(kind, key)).collect::<Result<_, _>>()?;
                Ok(integers.map_or(Value::Skipped, Value::Integers))
            }
        }
    }

    /// A tensor's description. Its byte range still counts from the start of the tensors' data.
    fn tensor(&mut self, name: &str, alignment: usize) -> Result<TensorInfo, Problem> {
        let n_dims = self.u32(name)?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("tensor {name} has {n_dims} dimensions, expected 1 to 4").into());
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let dim = self.u64(name)?;
            let positive = i64::try_from(dim).ok().filter(|dim| *dim > 0);
            shape.push(positive.ok_or_else(|| format!("tensor {name} has a dimension of {dim}"))?);
        }
        let row = shape[0] as usize;
        shape.reverse();
        let dtype = Stored::of(self.u32(name)?).map_err(|unread| {
            Problem::hinted(
                format!(
                    "tensor {name} is stored as {unread}, which is not read; F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL \
                     and IQ4_XS are"
                ),
                "take the model's file of one of these, or make one with llama-quantize from its F16",
            )
        })?;
        let per_block = dtype.block_size();
        if !row.is_multiple_of(per_block) {
            let problem = format!("tensor {name} has rows of {row}, expected a multiple of {per_block} for {dtype:?}");
            return Err(problem.into());
        }
        let elements = shape.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim as usize));
        let size = elements.and_then(|n| (n / per_block).checked_mul(dtype.block_bytes()));
        let offset = usize::try_from(self.u64(name)?).ok();
        let (Some(size), Some(offset)) = (size, offset.filter(|offset| offset.is_multiple_of(alignment))) else {
            return Err(format!(
                "tensor {name} lies at no multiple of {alignment}, or its size {shape:?} is beyond all bounds"
            )
            .into());
        };
        let end = offset.checked_add(size).ok_or_else(|| format!("tensor {name} ends beyond all bounds"))?;
        Ok(TensorInfo { dtype, shape, bytes: offset..end, part: 0 })
    }
}
