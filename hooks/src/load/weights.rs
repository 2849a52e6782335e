//! The tensors of a checkpoint, always asked for by their Hugging Face names, wherever they are stored.
//!
//! A [`Scope`] is a cursor in the checkpoint's tree: `root.at("model").at("layers").at(3)` spells the name. Files are
//! memory-mapped and converted block by block, by all threads, so that a large tensor never exists twice.

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
/// stay in a core's cache. Then only the tensor itself is fresh memory; touching memory is most of the cost of loading.
const BLOCK: usize = 1 << 14;

/// Elements converted at a time for another device, where each block is a transfer.
const DEVICE_BLOCK: usize = 1 << 21;

/// How many elements a thread is worth.
const THREAD: usize = 1 << 18;

/// The tensors of one model.
pub struct Weights {
    source: Source,
}

enum Source {
    /// Files, and for each tensor the file that holds it.
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
    opened: Option<File>, // where the bytes are a file's
    data: usize,          // where the tensors begin
    header: Metadata,
}

impl Weights {
    /// Maps `.safetensors` files and checks their headers. A `.safetensors.index.json` means the files that it names.
    pub fn safetensors(paths: &[PathBuf]) -> Result<Self> {
        let mut shards = Vec::new();
        let mut promised = BTreeMap::new(); // tensor → file, as the index says
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

    /// The tensors of a GGUF file, dequantised when they are asked for.
    pub fn gguf(gguf: Gguf) -> Self {
        Self { source: Source::Gguf(gguf) }
    }

    /// Tensors that are in memory already; `name` replaces the file's in messages.
    pub fn from_tensors(name: &str, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { source: Source::Memory { name: name.to_owned(), tensors } }
    }

    /// The top of the tree; what is asked for below it comes in this kind and on this device.
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

    /// One line on what is there: "290 tensors, bf16, 988 MB, memory-mapped".
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

    /// How the tensors are stored: "bf16", or "288 bf16 + 2 f32".
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

    /// Feeds a hash with every tensor's name, dtype and shape and a sample of its bytes: enough to tell checkpoints
    /// apart, and no gigabyte is read for it.
    pub(crate) fn hash_into(&self, hash: &mut Sha256) {
        for name in self.names() {
            let Some(stored) = self.stored(&name) else { continue };
            hash.update(format!("{name} {} {:?} {}\n", stored.dtype, stored.shape, stored.bytes.len()));
            let bytes = &stored.bytes;
            hash.update(&bytes[..bytes.len().min(64)]);
            hash.update(&bytes[bytes.len().saturating_sub(64)..]);
        }
    }

    /// How a tensor is stored: dtype as text, shape, bytes (a mapped file is not copied).
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

    /// A tensor read from a file must be finite. Tensors in memory are our own and are not checked.
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

    /// The files as they are named in messages.
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

/// A cursor in the checkpoint's tree of names.
pub struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
    kind: Kind,
    device: Device,
}

impl<'a> Scope<'a> {
    /// One step down: a module's name or a layer's number.
    #[must_use]
    pub fn at(&self, part: impl Display) -> Scope<'a> {
        Scope { weights: self.weights, prefix: self.name(part), kind: self.kind, device: self.device }
    }

    /// The tensor `name` below here, which must have this shape; a new one in the kind and on the device of the root.
    pub fn get(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.weights.load(&self.name(name), shape, self.kind, self.device)
    }

    /// Whether there is a tensor `name` below here.
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
    /// Maps a file.
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

    /// A tensor on the file's own pages: they are read on first use, and writing to one copies that page. `None` if the
    /// bytes are not a file's, or are not aligned to their width.
    fn in_place(&self, info: &TensorInfo, kind: Kind, shape: &[i64]) -> Option<Tensor> {
        let name = format!("/proc/self/fd/{}", self.opened.as_ref()?.as_raw_fd()); // the path may be another file's by now
        let (start, end) = (self.data + info.data_offsets.0, self.data + info.data_offsets.1);
        let bytes = Tensor::f_from_file(&name, false, Some(end as i64), (Kind::Uint8, Device::Cpu)).ok()?;
        bytes.f_narrow(0, start as i64, (end - start) as i64).ok()?.f_view_dtype(kind).ok()?.f_view(shape).ok()
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets; // the header was checked against the file's length
        &(*self.file).as_ref()[self.data + start..self.data + end]
    }
}

/// The files that an index names.
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

/// A name that cannot lead out of the folder.
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

/// The number of NaN or infinite values in a tensor's bytes: those whose exponent has all bits set. One pass of wide
/// instructions finds the runs without any, at the speed of memory.
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

/// The number of NaN or infinite values, counted by several threads if there is work for them.
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

/// The tensor, if all its numbers are finite: one NaN makes everything computed from it NaN.
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

/// A new tensor, made block by block from what `block` gives for a range of elements; `threads` share a large one.
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
            // moved as it is stored, converted where it is needed: less goes to the device
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

/// A size as people say it.
pub(crate) fn human(bytes: usize) -> String {
    match bytes as f64 {
        small if small < 1e6 => format!("{:.0} kB", (small / 1e3).ceil()),
        medium if medium < 1e10 => format!("{:.0} MB", medium / 1e6),
        large => format!("{:.1} GB", large / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use half::{bf16, f16};
    use safetensors::tensor::TensorView;

    use super::*;

    fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> PathBuf {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
        path.to_owned()
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(&tensor.flatten(0, -1).to_kind(Kind::Float)).unwrap()
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().expect("an error").to_string()
    }

    const SMALL: [f32; 6] = [1.0, -2.5, 0.0, 0.125, 65504.0, -0.5]; // exact in f16; the fifth is not in bf16

    #[test]
    fn each_stored_kind_comes_in_the_kind_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let halves = SMALL.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let brains = SMALL.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        let path = write(
            &folder.path().join("model.safetensors"),
            &[
                ("a.weight", Dtype::F32, &[2, 3], f32s(&SMALL)),
                ("b.weight", Dtype::F16, &[6], halves),
                ("c.weight", Dtype::BF16, &[3, 2], brains),
            ],
        );
        let weights = Weights::safetensors(&[path]).unwrap();
        assert_eq!(weights.names(), ["a.weight", "b.weight", "c.weight"]);
        let rounded: Vec<f32> = SMALL.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        assert!((rounded[4] - SMALL[4]).abs() > 1.0);

        let root = weights.root(Kind::Float, Device::Cpu);
        assert_eq!(values(&root.at("a").get("weight", &[2, 3]).unwrap()), SMALL);
        assert_eq!(values(&root.at("b").get("weight", &[6]).unwrap()), SMALL);
        assert_eq!(values(&root.at("c").get("weight", &[3, 2]).unwrap()), rounded);
        let root = weights.root(Kind::BFloat16, Device::Cpu);
        for (name, shape) in [("a.weight", &[2, 3][..]), ("c.weight", &[3, 2])] {
            let tensor = root.get(name, shape).unwrap();
            assert_eq!(
                (tensor.kind(), tensor.size().as_slice(), values(&tensor)),
                (Kind::BFloat16, shape, rounded.clone())
            );
        }
        assert!(weights.describe().starts_with("3 tensors, 1 bf16 + 1 f16 + 1 f32, 1 kB"), "{}", weights.describe());
    }

    #[test]
    fn a_tensor_of_several_blocks_and_threads_is_the_plain_conversion() {
        let n = 2 * THREAD + 3 * BLOCK + 1024;
        let floats: Vec<f32> = (0..n).map(|i| (i as f32).sin() * 2_f32.powi((i % 61) as i32 - 30)).collect();
        let plain = Tensor::from_slice(&floats).to_kind(Kind::BFloat16);
        let stored: Vec<u8> = floats.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        let block = |at: Range<usize>| {
            Ok(Tensor::f_from_data_size(&stored[2 * at.start..2 * at.end], &[at.len() as i64], Kind::BFloat16)?)
        };
        for threads in [1, 2, 3, 8] {
            let found = fill(&[(n / 1024) as i64, 1024], Kind::Float, Device::Cpu, threads, block).unwrap();
            assert!(found.view(-1).equal(&plain.to_kind(Kind::Float)), "{threads} threads");
        }
        for broken in [0, n - 1] {
            let block = |at: Range<usize>| {
                if at.contains(&broken) { Err(Error::Tokenizer { problem: "broken".to_owned() }) } else { block(at) }
            };
            let error = fill(&[n as i64], Kind::Float, Device::Cpu, 3, block);
            assert!(message(error).contains("broken"));
        }
    }

    #[test]
    fn what_is_not_finite_is_refused_wherever_it_stands() {
        let n = 2 * THREAD + 3 * BLOCK + 10;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let bits = |number: f32, dtype| match dtype {
            Dtype::F32 => number.to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(number).to_le_bytes().to_vec(),
            _ => bf16::from_f32(number).to_le_bytes().to_vec(),
        };
        let load = |kind: Kind| {
            let weights = Weights::safetensors(std::slice::from_ref(&path)).unwrap();
            weights
                .root(kind, Device::Cpu)
                .get("a.weight", &[n as i64])
                .map(|tensor| tensor.isfinite().all().int64_value(&[]))
        };
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let largest = match dtype {
                Dtype::F32 => f32::MAX,
                Dtype::F16 => f16::MAX.to_f32(),
                _ => bf16::MAX.to_f32(),
            };
            let numbers = |broken: &[(usize, f32)]| {
                let at = |at: usize| broken.iter().find(|(place, _)| *place == at).map(|(_, number)| *number);
                let number = |i: usize| bits(at(i).unwrap_or(if i.is_multiple_of(2) { largest } else { -1e-7 }), dtype);
                let bytes = (0..n).flat_map(number).collect();
                write(&path, &[("a.weight", dtype, &[n], bytes)]);
            };
            numbers(&[]);
            for kind in [Kind::Float, Kind::Double] {
                assert_eq!(load(kind).unwrap(), 1, "{dtype:?}: the largest numbers are numbers");
            }
            for (broken, expected) in [
                (vec![(0, f32::NAN)], 1),
                (vec![(n - 1, f32::INFINITY)], 1),
                (vec![(7, -f32::NAN), (BLOCK, f32::NEG_INFINITY), (THREAD + 1, f32::NAN), (n - 2, f32::INFINITY)], 4),
            ] {
                numbers(&broken);
                // A tensor in the stored dtype uses the file's pages; any other is converted.
                for kind in [Kind::Float, Kind::BFloat16] {
                    let refused = message(load(kind));
                    let expected =
                        format!("m.safetensors: tensor a.weight is NaN or infinite in {expected} of its {n} values");
                    assert!(refused.contains(&expected), "{dtype:?} as {kind:?}: {refused}");
                }
            }
        }
    }

    #[test]
    fn a_gguf_s_broken_scale_is_refused() {
        let mut bytes = crate::load::gguf::tests::tiny();
        let gguf = Gguf::parse(bytes.clone(), Path::new("m.gguf")).unwrap();
        let (name, info) = gguf.tensors().iter().find(|(_, info)| info.dtype.block_size() == 32).unwrap();
        let (name, shape, at) = (name.clone(), info.shape.clone(), info.bytes.start);
        let load = |bytes: &[u8]| {
            let weights = Weights::gguf(Gguf::parse(bytes.to_vec(), Path::new("m.gguf")).unwrap());
            weights.root(Kind::Float, Device::Cpu).get(&name, &shape)
        };
        assert!(load(&bytes).is_ok());
        bytes[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes()); // a block's scale
        let refused = message(load(&bytes));
        let numel: i64 = shape.iter().product();
        let expected = format!("m.gguf: tensor {name} is NaN or infinite in 32 of its {numel} values");
        assert!(refused.starts_with(&expected), "{refused}");
    }

    #[test]
    fn a_tensor_on_the_file_s_pages_is_a_copy_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let tensors: &[(&str, Dtype, &[usize], _)] =
            &[("a", Dtype::F32, &[2, 3], f32s(&SMALL)), ("b", Dtype::F32, &[6], f32s(&SMALL))];
        write(&path, tensors);
        let before = fs::read(&path).unwrap();
        let weights = Weights::safetensors(std::slice::from_ref(&path)).unwrap();
        let Source::Safetensors { shards, .. } = &weights.source else { panic!("another source") };
        let info = shards[0].header.info("b").unwrap();
        let in_place = shards[0].in_place(info, Kind::Float, &[6]).unwrap();
        assert_eq!(values(&in_place), SMALL);

        // Replacing the file under its name does not matter, and a write to one tensor reaches no other tensor and no
        // file.
        fs::write(folder.path().join("other"), vec![0; before.len()]).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        fs::rename(folder.path().join("other"), &path).unwrap();
        let root = weights.root(Kind::Float, Device::Cpu);
        let mut first = root.get("b", &[6]).unwrap();
        let _ = first.fill_(7.0);
        assert_eq!(values(&first), [7.0; 6]);
        assert_eq!(values(&root.get("b", &[6]).unwrap()), SMALL);
        assert_eq!(values(&root.get("a", &[2, 3]).unwrap()), SMALL);
        assert_eq!(fs::read(folder.path().join("moved")).unwrap(), before);
        drop(weights);
        assert_eq!(values(&in_place), SMALL);
    }

    #[test]
    fn the_cursor_spells_names_and_the_errors_say_them() {
        let folder = tempfile::tempdir().unwrap();
        let name = "model.layers.3.self_attn.q_proj.weight";
        let path = write(
            &folder.path().join("m.safetensors"),
            &[(name, Dtype::F32, &[2, 3], f32s(&SMALL)), ("steps", Dtype::I64, &[1], vec![0; 8])],
        );
        let weights = Weights::safetensors(&[path]).unwrap();
        let root = weights.root(Kind::Float, Device::Cpu);
        let q = root.at("model").at("layers").at(3).at("self_attn").at("q_proj");
        assert!(q.has("weight") && !q.has("bias") && q.get("weight", &[2, 3]).is_ok());
        assert_eq!(message(q.get("weight", &[3, 2])), format!("tensor {name} has shape [2, 3], expected [3, 2]"));
        let missing = message(q.get("bias", &[2]));
        assert!(
            missing.contains("model.layers.3.self_attn.q_proj.bias is missing in ")
                && missing.ends_with("m.safetensors"),
            "{missing}"
        );
        let wrong = message(root.get("steps", &[1]));
        assert!(wrong.contains("tensor steps is stored as I64, expected F32, F16 or BF16"), "{wrong}");
    }

    #[test]
    fn shards_are_found_by_their_index() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write(&at("s-1.safetensors"), &[("a", Dtype::F32, &[1], f32s(&[1.0]))]);
        write(&at("s-2.safetensors"), &[("b", Dtype::F32, &[1], f32s(&[2.0]))]);
        let index = |map: &str| {
            fs::write(at("m.index.json"), format!(r#"{{"metadata": {{"total_size": 8}}, "weight_map": {map}}}"#))
                .unwrap();
            Weights::safetensors(&[at("m.index.json")])
        };
        let weights = index(r#"{"a": "s-1.safetensors", "b": "s-2.safetensors"}"#).unwrap();
        assert_eq!(values(&weights.root(Kind::Float, Device::Cpu).get("b", &[1]).unwrap()), [2.0]);
        assert_eq!(Weights::safetensors(&[at("s-1.safetensors"), at("s-2.safetensors")]).unwrap().names(), ["a", "b"]);

        assert!(
            message(index(r#"{"a": "s-2.safetensors", "b": "s-2.safetensors"}"#)).contains("tensor a is missing in")
        );
        assert!(message(index(r#"{"a": "s-3.safetensors"}"#)).contains("s-3.safetensors: No such file"));
        for outside in [
            "../s-1.safetensors",
            "/s-1.safetensors",
            "deep/s-1.safetensors",
            "..\\\\s-1.safetensors",
            "",
            "..",
            "s-1.bin",
        ] {
            let refused = message(index(&format!(r#"{{"a": "{outside}"}}"#)));
            assert!(refused.contains("weight_map names \"") && refused.contains("beside it"), "{outside}: {refused}");
        }
        assert!(message(index("{}")).contains("weight_map is empty"));
        assert!(message(index("3")).contains("expected an index with a weight_map"));
        fs::copy(at("s-1.safetensors"), at("s-9.safetensors")).unwrap();
        assert!(
            message(Weights::safetensors(&[at("s-1.safetensors"), at("s-9.safetensors")]))
                .contains("tensor a is also in")
        );
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let whole =
            fs::read(write(&folder.path().join("m.safetensors"), &[("a", Dtype::F32, &[6], f32s(&SMALL))])).unwrap();
        let path = folder.path().join("cut.safetensors");
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let message = message(Weights::safetensors(std::slice::from_ref(&path)));
            assert!(message.contains("cut.safetensors: expected a safetensors file"), "{length}: {message}");
        }
        let mut huge = whole;
        huge[..8].fill(0xff);
        fs::write(&path, &huge).unwrap();
        assert!(Weights::safetensors(&[path]).is_err());
    }

    #[test]
    fn what_a_header_cannot_mean_is_refused() {
        let of = |header: &str, data: usize| {
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
            Weights::parse(bytes, Path::new("m.safetensors")).map(|weights| weights.names().len())
        };
        let tensor = |name: &str, dtype: &str, shape: &str, from: usize, to: usize| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let (a, b) = (tensor("a", "F32", "[2]", 0, 8), tensor("b", "F32", "[1]", 8, 12));
        assert_eq!(of(&format!("{{{a},{b}}}"), 12).unwrap(), 2);
        for (header, data) in [
            (format!("{{{a},{}}}", tensor("b", "F32", "[2]", 0, 8)), 8), // on one another
            (format!("{{{a},{}}}", tensor("b", "F32", "[1]", 12, 16)), 16), // a gap
            (format!("{{{a},{b}}}"), 11),
            (format!("{{{a},{b}}}"), 13),
            (format!("{{{}}}", tensor("a", "F32", "[3]", 0, 8)), 8),
            (format!("{{{}}}", tensor("a", "F32", "[-2]", 0, 8)), 8),
            (format!("{{{}}}", tensor("a", "PICKLE", "[2]", 0, 8)), 8),
            (format!("{{{}}}", tensor("a", "F32", "[4611686018427387904,4]", 0, 0)), 0),
        ] {
            assert!(message(of(&header, data)).starts_with("m.safetensors: expected a safetensors file: "), "{header}");
        }
        for shape in ["[0]", "[2,0]", "[0,9223372036854775807]"] {
            let refused = message(of(&format!("{{{}}}", tensor("a", "F32", shape, 0, 0)), 0));
            assert!(refused.contains("tensor a has the shape [") && refused.contains("at least 1"), "{refused}");
        }
    }

    #[test]
    fn tensors_in_memory_are_copied_out() {
        let weights = Weights::from_tensors("test", BTreeMap::from([("a".to_owned(), Tensor::from_slice(&SMALL))]));
        let mut copy = weights.root(Kind::Float, Device::Cpu).get("a", &[6]).unwrap();
        let _ = copy.fill_(7.0);
        assert_eq!(values(&weights.root(Kind::Float, Device::Cpu).get("a", &[6]).unwrap()), SMALL);
        assert_eq!(message(weights.root(Kind::Float, Device::Cpu).get("b", &[6])), "tensor b is missing in test");
    }
}
