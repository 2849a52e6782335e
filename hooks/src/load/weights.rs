//! The tensors of a checkpoint by their Hugging Face names, from any file format or from memory.
//!
//! A [`Scope`] is a prefix of names: `root.at("model").at("layers").at(3)` is `model.layers.3`. Files are memory-mapped
//! and converted block by block, by all threads, so that a large tensor never exists twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, malformed};
use crate::load::files::{self, Bytes};
use crate::load::gguf::Gguf;

/// Elements converted at a time: a multiple of every quantised block's size, and few enough that intermediate results
/// stay in a core's cache. Then only the tensor itself is new memory; touching memory is most of the cost of loading.
const BLOCK: usize = 1 << 14;

/// Elements converted at a time for another device, where each block is a transfer.
const DEVICE_BLOCK: usize = 1 << 21;

/// Number of elements that are worth a thread.
const THREAD: usize = 1 << 18;

/// The tensors of one model.
pub struct Weights {
    source: Source,
}

enum Source {
    /// The files, and the file of each tensor.
    Safetensors {
        shards: Vec<Shard>,
        owner: BTreeMap<String, usize>,
    },
    Gguf(Gguf),
    Memory {
        name: String,
        tensors: BTreeMap<String, Tensor>,
    },
}

/// One `.safetensors` file.
struct Shard {
    path: PathBuf,
    file: Bytes,
    opened: Option<File>, // if the bytes are a file's
    data: usize,          // where the tensors begin
    header: Metadata,
}

impl Weights {
    /// Maps `.safetensors` files and checks their headers. A `.safetensors.index.json` in `paths` is replaced by the
    /// files that it names.
    pub fn safetensors(paths: &[PathBuf]) -> Result<Self> {
        let mut shards = Vec::new();
        let mut promised = BTreeMap::new(); // tensor → file, from the index
        for path in paths {
            if path.extension().is_some_and(|extension| extension == "json") {
                let weight_map = parse_index(&files::read(path)?, path)?;
                for name in weight_map.values().collect::<BTreeSet<_>>() {
                    shards.push(Shard::open(&path.with_file_name(name))?);
                }
                promised.extend(weight_map.into_iter().map(|(tensor, file)| (tensor, path.with_file_name(file))));
            } else {
                shards.push(Shard::open(path)?);
            }
        }
        Self::of_shards(shards, promised)
    }

    /// The tensors in the bytes of one `.safetensors` file, mapped or in memory; `path` is for messages.
    pub fn parse(file: impl AsRef<[u8]> + Send + Sync + 'static, path: &Path) -> Result<Self> {
        Self::of_shards(vec![Shard::parse(Box::new(file), path)?], BTreeMap::new())
    }

    /// Refuses shards that share a tensor, and an index that puts a tensor into a file that lacks it.
    fn of_shards(shards: Vec<Shard>, promised: BTreeMap<String, PathBuf>) -> Result<Self> {
        let mut owner = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for name in shard.header.offset_keys() {
                if let Some(first) = owner.insert(name.clone(), index) {
                    let problem = format!("tensor {name} is also in {}", shards[first].path.display());
                    return Err(malformed(&shard.path, problem));
                }
            }
        }
        for (name, path) in promised {
            if owner.get(&name).is_none_or(|index| shards[*index].path != path) {
                return Err(Error::MissingTensor { name, file: path.display().to_string() });
            }
        }
        Ok(Self { source: Source::Safetensors { shards, owner } })
    }

    /// The tensors of a GGUF file, dequantised when they are read.
    pub fn gguf(gguf: Gguf) -> Self {
        Self { source: Source::Gguf(gguf) }
    }

    /// Tensors in memory; messages use `name` in place of a file's name.
    pub fn from_tensors(name: &str, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { source: Source::Memory { name: name.to_owned(), tensors } }
    }

    /// The root of the names. Tensors read below it have this kind and are on this device.
    pub fn root(&self, kind: Kind, device: Device) -> Scope<'_> {
        Scope { weights: self, prefix: String::new(), kind, device }
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        match &self.source {
            Source::Safetensors { owner, .. } => owner.keys().cloned().collect(),
            Source::Gguf(gguf) => gguf.tensors().keys().cloned().collect(),
            Source::Memory { tensors, .. } => tensors.keys().cloned().collect(),
        }
    }

    /// A line for the user: "290 tensors, bf16, 988 MB, memory-mapped".
    pub fn describe(&self) -> String {
        let (bytes, how) = match &self.source {
            Source::Safetensors { shards, .. } => {
                (shards.iter().map(|shard| (*shard.file).as_ref().len()).sum(), "memory-mapped")
            }
            Source::Gguf(gguf) => (gguf.len(), "memory-mapped, dequantised on loading"),
            Source::Memory { tensors, .. } => (tensors.values().map(bytes_of).sum(), "in memory"),
        };
        format!("{} tensors, {}, {}, {how}", self.names().len(), self.dtypes(), human(bytes))
    }

    /// The dtypes that the tensors are stored in: "bf16", or "288 bf16 + 2 f32".
    pub(crate) fn dtypes(&self) -> String {
        let mut counts = BTreeMap::<String, usize>::new();
        for name in self.names() {
            let dtype = self.stored(&name).map_or_else(String::new, |stored| stored.dtype);
            *counts.entry(dtype).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(dtype, n)| (std::cmp::Reverse(*n), dtype.clone()));
        match counts.as_slice() {
            [(only, _)] => only.clone(),
            many => many.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect::<Vec<_>>().join(" + "),
        }
    }

    /// Whether a tensor is stored in one of the kinds that weights are computed with.
    pub(crate) fn is_float(&self, name: &str) -> bool {
        self.stored(name).is_some_and(|stored| ["f32", "f16", "bf16"].contains(&stored.dtype.as_str()))
    }

    /// Whether two tensors hold the same numbers.
    pub(crate) fn are_equal(&self, one: &str, other: &str) -> Result<bool> {
        let (Some(left), Some(right)) = (self.stored(one), self.stored(other)) else { return Ok(false) };
        if left.shape != right.shape || left.dtype == right.dtype {
            return Ok(left.shape == right.shape && left.bytes == right.bytes);
        }
        let root = self.root(Kind::Float, Device::Cpu);
        Ok(root.get(one, &left.shape)?.f_equal(&root.get(other, &right.shape)?)?)
    }

    /// Feeds a hash with every tensor's name, dtype and shape and a sample of its bytes: enough to distinguish
    /// checkpoints without reading them whole.
    pub(crate) fn hash_into(&self, hash: &mut Sha256) {
        for name in self.names() {
            let Some(stored) = self.stored(&name) else { continue };
            hash.update(format!("{name} {} {:?} {}\n", stored.dtype, stored.shape, stored.bytes.len()));
            let bytes = &stored.bytes;
            hash.update(&bytes[..bytes.len().min(64)]);
            hash.update(&bytes[bytes.len().saturating_sub(64)..]);
        }
    }

    /// A tensor as it is stored: dtype as text, shape, bytes (those of a mapped file are not copied).
    fn stored(&self, name: &str) -> Option<Stored<'_>> {
        match &self.source {
            Source::Safetensors { shards, owner } => {
                let shard = &shards[*owner.get(name)?];
                let info = shard.header.info(name)?;
                let shape = info.shape.iter().map(|dim| *dim as i64).collect();
                Some(Stored { dtype: info.dtype.to_string().to_lowercase(), shape, bytes: shard.bytes(info).into() })
            }
            Source::Gguf(gguf) => {
                let info = gguf.tensors().get(name)?;
                let dtype = format!("{:?}", info.dtype).to_lowercase();
                Some(Stored { dtype, shape: info.shape.clone(), bytes: gguf.bytes(info).into() })
            }
            Source::Memory { tensors, .. } => {
                let tensor = tensors.get(name)?;
                let mut bytes = vec![0; bytes_of(tensor)];
                tensor.f_contiguous().and_then(|tensor| tensor.f_copy_data_u8(&mut bytes, tensor.numel())).ok()?;
                let dtype = match tensor.kind() {
                    Kind::Float => "f32".to_owned(),
                    Kind::Half => "f16".to_owned(),
                    Kind::BFloat16 => "bf16".to_owned(),
                    other => format!("{other:?}").to_lowercase(),
                };
                Some(Stored { dtype, shape: tensor.size(), bytes: bytes.into() })
            }
        }
    }

    /// The shape of a tensor, if there is such a tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        match &self.source {
            Source::Safetensors { shards, owner } => {
                let info = shards[*owner.get(name)?].header.info(name)?;
                Some(info.shape.iter().map(|dim| *dim as i64).collect())
            }
            Source::Gguf(gguf) => gguf.tensors().get(name).map(|info| info.shape.clone()),
            Source::Memory { tensors, .. } => tensors.get(name).map(Tensor::size),
        }
    }

    /// Loads a tensor. It must be finite if it is read from a file; tensors in memory are not checked.
    fn load(&self, name: &str, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let missing = || Error::MissingTensor { name: name.to_owned(), file: self.files() };
        let found = self.shape(name).ok_or_else(missing)?;
        if found != shape {
            return Err(Error::Shape { tensor: name.to_owned(), expected: shape.to_vec(), found });
        }
        let threads = tch::get_num_threads() as usize;
        match &self.source {
            Source::Safetensors { shards, owner } => {
                let shard = owner.get(name).map(|index| &shards[*index]).ok_or_else(missing)?;
                let info = shard.header.info(name).ok_or_else(missing)?;
                let stored = kind_of(info.dtype).ok_or_else(|| {
                    let problem = format!("tensor {name} is stored as {}, expected F32, F16 or BF16", info.dtype);
                    malformed(&shard.path, problem)
                })?;
                let (bytes, width) = (shard.bytes(info), stored.elt_size_in_bytes());
                if (stored, Device::Cpu) == (kind, device)
                    && let Some(tensor) = shard.in_place(info, stored, shape)
                {
                    let broken = n_not_finite_by(threads, bytes, stored);
                    return finite(tensor, broken, name, &shard.path);
                }
                let broken = AtomicUsize::new(0);
                let tensor = fill(shape, kind, device, threads, |elements| {
                    let block = &bytes[elements.start * width..elements.end * width];
                    broken.fetch_add(n_not_finite(block, stored), Ordering::Relaxed);
                    Ok(Tensor::f_from_data_size(block, &[elements.len() as i64], stored)?)
                })?;
                finite(tensor, broken.into_inner(), name, &shard.path)
            }
            Source::Gguf(gguf) => {
                let info = gguf.tensors().get(name).ok_or_else(missing)?;
                let broken = AtomicUsize::new(0);
                let tensor = fill(shape, kind, device, threads, |elements| {
                    let values = gguf.dequantize(info, &elements)?;
                    broken.fetch_add(values.iter().filter(|value| !value.is_finite()).count(), Ordering::Relaxed);
                    Ok(Tensor::f_from_slice(&values)?)
                })?;
                finite(tensor, broken.into_inner(), name, gguf.path())
            }
            Source::Memory { tensors, .. } => {
                let tensor = tensors.get(name).ok_or_else(missing)?;
                Ok(tensor.f_to_device(device)?.f_to_dtype(kind, false, true)?) // a copy, as from the other sources
            }
        }
    }

    /// The names of the files, for messages.
    pub(crate) fn files(&self) -> String {
        match &self.source {
            Source::Safetensors { shards, .. } => {
                shards.iter().map(|shard| shard.path.display().to_string()).collect::<Vec<_>>().join(", ")
            }
            Source::Gguf(gguf) => gguf.path().display().to_string(),
            Source::Memory { name, .. } => name.clone(),
        }
    }
}

/// A prefix of tensor names, with the kind and device that tensors are loaded to.
pub struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
    kind: Kind,
    device: Device,
}

impl<'a> Scope<'a> {
    /// The scope below this one, by a module's name or a layer's number.
    #[must_use]
    pub fn at(&self, part: impl Display) -> Scope<'a> {
        Scope { weights: self.weights, prefix: self.name(part), kind: self.kind, device: self.device }
    }

    /// Loads the tensor `name` below this scope, which must have this shape, in the root's kind and on its device.
    pub fn get(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.weights.load(&self.name(name), shape, self.kind, self.device)
    }

    /// Whether there is a tensor `name` below this scope.
    pub fn has(&self, name: &str) -> bool {
        self.weights.shape(&self.name(name)).is_some()
    }

    fn name(&self, part: impl Display) -> String {
        if self.prefix.is_empty() { part.to_string() } else { format!("{}.{part}", self.prefix) }
    }
}

struct Stored<'a> {
    dtype: String,
    shape: Vec<i64>,
    bytes: std::borrow::Cow<'a, [u8]>,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let opened = files::open(path)?;
        let shard = Self::parse(Box::new(files::map_opened(&opened, path)?), path)?;
        Ok(Self { opened: Some(opened), ..shard })
    }

    fn parse(file: Bytes, path: &Path) -> Result<Self> {
        let (header_length, header) = SafeTensors::read_metadata((*file).as_ref())
            .map_err(|error| malformed(path, format!("expected a safetensors file: {error}")))?;
        for (name, info) in header.tensors() {
            let shape = &info.shape;
            let numel = shape.iter().try_fold(1_i64, |numel, dim| numel.checked_mul(i64::try_from(*dim).ok()?));
            if numel.unwrap_or(0) == 0 {
                let problem = format!("tensor {name} has the shape {shape:?}, expected dimensions of at least 1");
                return Err(malformed(path, problem));
            }
        }
        // 8 bytes of header length come first
        Ok(Self { path: path.to_owned(), file, opened: None, data: 8 + header_length, header })
    }

    /// A tensor on the file's own pages, which are read on first use and copied when they are written to. `None` if the
    /// bytes are not a file's, or are not aligned to their width.
    fn in_place(&self, info: &TensorInfo, kind: Kind, shape: &[i64]) -> Option<Tensor> {
        let name = format!("/proc/self/fd/{}", self.opened.as_ref()?.as_raw_fd()); // the path may be replaced by now
        let (start, end) = (self.data + info.data_offsets.0, self.data + info.data_offsets.1);
        let bytes = Tensor::f_from_file(&name, false, Some(end as i64), (Kind::Uint8, Device::Cpu)).ok()?;
        bytes.f_narrow(0, start as i64, (end - start) as i64).ok()?.f_view_dtype(kind).ok()?.f_view(shape).ok()
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets; // the header was checked against the file's length
        &(*self.file).as_ref()[self.data + start..self.data + end]
    }
}

pub(crate) fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    Ok(parse_index(&files::read(index)?, index)?.into_values().collect())
}

/// The file of each tensor, by name, from the bytes of a `.safetensors.index.json` in its folder. `path` is for
/// messages.
pub fn parse_index(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes)
        .map_err(|error| malformed(path, format!("expected an index with a weight_map: {error}")))?;
    if index.weight_map.is_empty() {
        return Err(malformed(path, "weight_map is empty".to_owned()));
    }
    if let Some(name) = index.weight_map.values().find(|name| !is_plain_shard(name)) {
        return Err(malformed(path, format!("weight_map names {name:?}, expected a .safetensors file beside it")));
    }
    Ok(index.weight_map)
}

/// Whether a name cannot lead out of the folder.
fn is_plain_shard(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "safetensors") && !name.contains(['/', '\\'])
}

/// The kinds that weights may be stored in.
fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// The number of NaN or infinite values in a tensor's bytes: those whose exponent has all bits set. A fast pass with
/// wide instructions skips the runs that have none.
fn n_not_finite(bytes: &[u8], kind: Kind) -> usize {
    fn count<const N: usize>(bytes: &[u8], is_broken: impl Fn([u8; N]) -> bool) -> usize {
        const RUN: usize = 1 << 12;
        let (numbers, _) = bytes.as_chunks::<N>();
        let has = |run: &&[[u8; N]]| run.iter().fold(false, |any, number| any | is_broken(*number));
        numbers.chunks(RUN).filter(has).map(|run| run.iter().filter(|number| is_broken(**number)).count()).sum()
    }
    match kind {
        Kind::Half => count(bytes, |number| u16::from_le_bytes(number) & 0x7c00 == 0x7c00),
        Kind::BFloat16 => count(bytes, |number| u16::from_le_bytes(number) & 0x7f80 == 0x7f80),
        _ => count(bytes, |number| u32::from_le_bytes(number) & 0x7f80_0000 == 0x7f80_0000),
    }
}

/// Number of NaN or infinite values, counted by up to `threads` threads.
fn n_not_finite_by(threads: usize, bytes: &[u8], kind: Kind) -> usize {
    let width = kind.elt_size_in_bytes();
    let share = (bytes.len() / width).div_ceil(threads).max(THREAD) * width;
    let mut parts = bytes.chunks(share);
    let first = parts.next().unwrap_or_default();
    thread::scope(|scope| {
        let others: Vec<_> = parts.map(|part| scope.spawn(move || n_not_finite(part, kind))).collect();
        let join =
            |other: thread::ScopedJoinHandle<'_, usize>| other.join().unwrap_or_else(|panic| resume_unwind(panic));
        n_not_finite(first, kind) + others.into_iter().map(join).sum::<usize>()
    })
}

/// Returns the tensor, or an error if some of its numbers are not finite: one NaN makes everything computed from it
/// NaN.
pub(crate) fn finite(tensor: Tensor, n_broken: usize, name: &str, path: &Path) -> Result<Tensor> {
    if n_broken == 0 {
        return Ok(tensor);
    }
    let problem = format!(
        "tensor {name} is NaN or infinite in {n_broken} of its {} values, expected finite numbers",
        tensor.numel()
    );
    let hint = "fetch the file again, or go back to a checkpoint from before the training diverged";
    Err(malformed(path, problem).with_hint(hint))
}

/// Makes a tensor block by block; `block` returns a range of elements. Several `threads` share a large tensor.
fn fill(
    shape: &[i64],
    kind: Kind,
    device: Device,
    threads: usize,
    block: impl Fn(Range<usize>) -> Result<Tensor> + Sync,
) -> Result<Tensor> {
    let numel = shape.iter().product::<i64>() as usize;
    let out = Tensor::f_empty(shape, (kind, device))?;
    let flat = out.f_view([numel as i64])?;
    let length = if device == Device::Cpu { BLOCK } else { DEVICE_BLOCK };
    let fill_part = |elements: Range<usize>, part: Tensor| -> Result<()> {
        for start in elements.clone().step_by(length) {
            let end = (start + length).min(elements.end);
            // Moved as it is stored and converted on the device, so that less is transferred.
            let stored = block(start..end)?.f_to_device(device)?;
            part.f_narrow(0, (start - elements.start) as i64, (end - start) as i64)?.f_copy_(&stored)?;
        }
        Ok(())
    };
    let share = numel.div_ceil(threads).max(THREAD).next_multiple_of(length);
    let parts = (0..numel).step_by(share).map(|start| start..(start + share).min(numel));
    let parts = parts.map(|at| Ok((at.clone(), flat.f_narrow(0, at.start as i64, at.len() as i64)?)));
    let mut parts = parts.collect::<Result<Vec<_>>>()?;
    let last = parts.pop();
    thread::scope(|scope| {
        let fill_part = &fill_part;
        let others: Vec<_> = parts.into_iter().map(|(at, part)| scope.spawn(move || fill_part(at, part))).collect();
        last.map_or(Ok(()), |(at, part)| fill_part(at, part))?;
        others.into_iter().try_for_each(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    Ok(out)
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// A size in bytes for people, such as "988 MB".
pub(crate) fn human(bytes: usize) -> String {
    match bytes as f64 {
        small if small < 1e6 => format!("{:.0} kB", (small / 1e3).ceil()),
        medium if medium < 1e10 => format!("{:.0} MB", medium / 1e6),
        large => format!("{:.1} GB", large / 1e9),
    }
}

#[cfg(test)]
mod tests;
