//! The time that a thread spends in each stage of the work and kind of operation, with the FLOPs that the mathematics
//! needs.
//!
//! Nothing is recorded before [`start`]; a span then only reads a thread-local. Spans nest, and time counts for the
//! innermost one, so the times add up to the time between [`start`] and [`finish`]. On a GPU a span waits for the
//! device at its beginning and end, so that its time is right; this slows the program.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use tch::{Cuda, Device, Kind, Tensor};

use crate::error::Result;
use crate::mixed;

/// A stage of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Opening files and converting weights.
    Load,
    /// Passes over several positions at once, prefills included.
    Forward,
    /// Passes over one new position per row.
    Decode,
    /// Logits, and the loss or the log-probabilities that they give.
    Loss,
    /// Gradients.
    Backward,
    /// Collecting and clipping gradients, and updating weights.
    Optimizer,
    /// Drawing tokens from logits.
    Sampling,
    /// Writing files.
    Writing,
    /// Everything else.
    Other,
}

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// The products of the seven projections with the model's own weights.
    Projections,
    /// The LoRA's part of the projections.
    Lora,
    /// Scores, softmax, and the mean of the values.
    Attention,
    /// The unembedding.
    Head,
    /// A whole backward pass, which libtorch runs in one call.
    Gradients,
    /// The work of taps and edits.
    Taps,
    /// Norms, rotations, activation functions, sums, and all work outside of tensor operations.
    Rest,
}

/// The time and FLOPs of one kind of operation in one stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Wall time of the thread that recorded, in seconds.
    pub seconds: f64,
    /// Number of such operations.
    pub calls: u64,
    /// The FLOPs that the mathematics needs: two for a multiplication and its addition. Only products of matrices
    /// count.
    pub flops: f64,
}

/// The recorded times and FLOPs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// The cost of each kind of operation in each stage.
    pub costs: BTreeMap<(Stage, Op), Cost>,
    /// The device and precision of the model that was loaded last.
    pub model: Option<(Device, Kind)>,
}

struct Recording {
    profile: Profile,
    open: Vec<(Stage, Op)>, // the innermost is last; the first is never closed
    last: Instant,          // when the innermost began or resumed
    owed: f64,              // FLOPs of the backward pass that is to follow
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// Begins to record this thread; an earlier recording is dropped.
pub fn start() {
    let open = vec![(Stage::Other, Op::Rest)];
    RECORDING.set(Some(Recording { profile: Profile::default(), open, last: Instant::now(), owed: 0.0 }));
}

/// Whether this thread records.
pub fn is_on() -> bool {
    RECORDING.with_borrow(Option::is_some)
}

/// Ends the recording and returns it; it is empty if there was none. No span may be open.
pub fn finish() -> Profile {
    RECORDING.take().map_or_else(Profile::default, |mut recording| {
        recording.tick();
        recording.profile
    })
}

/// A span of time, which ends when the value is dropped.
#[must_use = "a span ends where it is dropped"]
#[derive(Debug)]
pub struct Span {
    on: bool,
}

/// Begins a stage. Its time outside of inner spans counts as [`Op::Rest`].
pub fn stage(stage: Stage) -> Span {
    open(|_| (stage, Op::Rest))
}

/// Begins an operation of the current stage.
pub fn op(op: Op) -> Span {
    open(|(stage, _)| (stage, op))
}

/// Begins a backward pass, and counts its FLOPs, which the forward products before it have noted. A second pass over
/// the same graph counts none.
pub fn backward() -> Span {
    let span = open(|_| (Stage::Backward, Op::Gradients));
    record(|recording| {
        let owed = std::mem::take(&mut recording.owed);
        recording.count(owed);
    });
    span
}

/// Notes the model's device and precision.
pub fn model(device: Device, kind: Kind) {
    record(|recording| recording.profile.model = Some((device, kind)));
}

/// Adds the recordings of other threads. The time since the innermost span began is left out, since this thread waited.
pub fn join(others: impl IntoIterator<Item = Profile>) {
    record(|recording| {
        recording.last = Instant::now();
        for other in others {
            for (cell, cost) in other.costs {
                recording.profile.costs.entry(cell).or_default().add(cost);
            }
            recording.profile.model = recording.profile.model.or(other.model);
        }
    });
}

fn record(what: impl FnOnce(&mut Recording)) {
    RECORDING.with_borrow_mut(|recording| recording.as_mut().map(what));
}

fn open(cell: impl FnOnce((Stage, Op)) -> (Stage, Op)) -> Span {
    let on = is_on();
    if on {
        record(|recording| {
            let around = recording.tick();
            let cell = cell(around);
            recording.open.push(cell);
            recording.profile.costs.entry(cell).or_default().calls += 1;
        });
    }
    Span { on }
}

impl Span {
    /// Counts the span's FLOPs and notes those of its backward pass, the second number of `count`. `count` is called
    /// only while recording.
    pub fn flops(&self, count: impl FnOnce() -> Result<(f64, f64)>) -> Result<()> {
        if self.on {
            let (now, later) = count()?;
            record(|recording| {
                recording.count(now);
                recording.owed += later;
            });
        }
        Ok(())
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if self.on {
            record(|recording| {
                recording.tick();
                recording.open.pop();
            });
        }
    }
}

impl Recording {
    fn innermost(&self) -> (Stage, Op) {
        self.open.last().copied().unwrap_or((Stage::Other, Op::Rest))
    }

    fn count(&mut self, flops: f64) {
        self.profile.costs.entry(self.innermost()).or_default().flops += flops;
    }

    /// Counts the time since the last event for the innermost span, and returns its cell.
    fn tick(&mut self) -> (Stage, Op) {
        if let Some((device, _)) = self.profile.model {
            wait_for(device);
        }
        let now = Instant::now();
        let cell = self.innermost();
        self.profile.costs.entry(cell).or_default().seconds += (now - self.last).as_secs_f64();
        self.last = now;
        cell
    }
}

impl Cost {
    fn add(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.calls += other.calls;
        self.flops += other.flops;
    }
}

impl Profile {
    /// The seconds of all threads together.
    pub fn seconds(&self) -> f64 {
        self.costs.values().map(|cost| cost.seconds).sum()
    }

    /// The costs by stage.
    pub fn by_stage(&self) -> Vec<(Stage, Cost)> {
        self.by(|(stage, _)| stage)
    }

    /// The costs by kind of operation.
    pub fn by_op(&self) -> Vec<(Op, Cost)> {
        self.by(|(_, op)| op)
    }

    fn by<K: Ord>(&self, key: impl Fn((Stage, Op)) -> K) -> Vec<(K, Cost)> {
        let mut sums = BTreeMap::<K, Cost>::new();
        for (cell, cost) in &self.costs {
            sums.entry(key(*cell)).or_default().add(*cost);
        }
        sums.into_iter().collect()
    }
}

/// FLOPs of `x Wᵀ` and, if the result has a gradient, those of the gradients of `x` and `W`. `weight`: `[d_out, d_in]`.
pub(crate) fn product(x: &Tensor, weight: &Tensor, graph: bool) -> Result<(f64, f64)> {
    let once = 2.0 * x.numel() as f64 * weight.size2()?.0 as f64;
    let wanted = [x, weight].iter().filter(|factor| graph && factor.requires_grad()).count();
    Ok((once, once * wanted as f64))
}

/// FLOPs of attention over all pairs of a query and a key, or if `causal` over those that the query may see. `q`:
/// `[batch, n_heads, query, d_head]`, `k`: `[batch, n_kv_heads, key, d_head]`. The gradient takes twice as many.
pub(crate) fn attention(q: &Tensor, k: &Tensor, causal: bool, graph: bool) -> Result<(f64, f64)> {
    let ((batch, heads, queries, d_head), (_, _, keys, _)) = (q.size4()?, k.size4()?);
    let pairs = if causal { queries * (queries + 1) / 2 } else { queries * keys };
    let once = 4.0 * (batch * heads * d_head) as f64 * pairs as f64;
    Ok((once, if graph { 2.0 * once } else { 0.0 }))
}

/// The speed at which this machine multiplies large matrices, in FLOPs per second: the best result of some `seconds`,
/// with this thread's number of threads.
pub fn product_rate(device: Device, kind: Kind, seconds: f64) -> Result<f64> {
    let n = if device == Device::Cpu { 1024 } else { 8192 };
    let (a, b) = (Tensor::f_ones([n, n], (kind, device))?, Tensor::f_ones([n, n], (kind, device))?);
    let wait = || wait_for(device);
    tch::no_grad(|| {
        let (begun, mut best) = (Instant::now(), f64::INFINITY);
        while best.is_infinite() || begun.elapsed().as_secs_f64() < seconds {
            wait();
            let start = Instant::now();
            let _product = if mixed::is_meant(&a) { mixed::matmul(&a, &b)? } else { a.f_matmul(&b)? };
            wait();
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * (n as f64).powi(3) / best)
    })
}

fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests;
