//! Where the time of a thread goes: per stage of the work and kind of operation, with the FLOPs that the mathematics
//! needs.
//!
//! Nothing is recorded until [`start`]; until then a span costs a look at a thread-local. Spans nest, and every moment
//! counts for the innermost one, so that the times add up to the time between [`start`] and [`finish`]. On a GPU a span
//! waits for the device at its beginning and end, so that its time is its own; that slows the whole.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use tch::{Cuda, Device, Kind, Tensor};

use crate::error::Result;

/// A stage of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Files are opened and weights made ready.
    Load,
    /// Passes over several positions at once, prefills included.
    Forward,
    /// Passes over one new position per row.
    Decode,
    /// Logits, and the loss or the log-probabilities that they give.
    Loss,
    /// Gradients.
    Backward,
    /// Gradients gathered and clipped, weights moved.
    Optimizer,
    /// Tokens drawn from logits.
    Sampling,
    /// Files written.
    Writing,
    /// All else.
    Other,
}

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// The products of the seven projections with the model's own weights.
    Projections,
    /// The LoRA's part of them.
    Lora,
    /// Scores, softmax, and the mean of the values.
    Attention,
    /// The unembedding.
    Head,
    /// All of a reverse pass, whose operations libtorch runs in one call.
    Gradients,
    /// What taps and edits do.
    Taps,
    /// Norms, rotations, activation functions, sums, and what is no tensor operation.
    Rest,
}

/// Time and FLOPs of a kind of operation in a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Wall time of the thread that recorded, in seconds.
    pub seconds: f64,
    /// How often.
    pub calls: u64,
    /// The FLOPs that the mathematics needs, two for a multiplication and its addition; only products of matrices
    /// count.
    pub flops: f64,
}

/// The recorded times and FLOPs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// The cost of each kind of operation in each stage.
    pub costs: BTreeMap<(Stage, Op), Cost>,
    /// Where the model was and in which precision, the last one loaded.
    pub model: Option<(Device, Kind)>,
}

/// The recording of this thread.
struct Recording {
    profile: Profile,
    open: Vec<(Stage, Op)>, // the innermost last; the first is never closed
    last: Instant,          // when the innermost began or went on
    owed: f64,              // FLOPs of the reverse pass that is to follow
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// Begins to record what this thread does; what was recorded before is forgotten.
pub fn start() {
    let open = vec![(Stage::Other, Op::Rest)];
    RECORDING.set(Some(Recording { profile: Profile::default(), open, last: Instant::now(), owed: 0.0 }));
}

/// Whether this thread records.
pub fn is_on() -> bool {
    RECORDING.with_borrow(Option::is_some)
}

/// Ends the recording; empty where there was none. No span may be open.
pub fn finish() -> Profile {
    RECORDING.take().map_or_else(Profile::default, |mut recording| {
        recording.tick();
        recording.profile
    })
}

/// A span: it ends where the value does.
#[must_use = "a span ends where it is dropped"]
#[derive(Debug)]
pub struct Span {
    on: bool,
}

/// Begins a stage; what no inner span claims is [`Op::Rest`] of it.
pub fn stage(stage: Stage) -> Span {
    open(|_| (stage, Op::Rest))
}

/// Begins an operation of the stage that is under way.
pub fn op(op: Op) -> Span {
    open(|(stage, _)| (stage, op))
}

/// Begins a backward pass, and counts the FLOPs that the forward products before it need there. A second one over the
/// same graph counts none.
pub fn backward() -> Span {
    let span = open(|_| (Stage::Backward, Op::Gradients));
    record(|recording| {
        let owed = std::mem::take(&mut recording.owed);
        recording.count(owed);
    });
    span
}

/// Notes where the model is.
pub fn model(device: Device, kind: Kind) {
    record(|recording| recording.profile.model = Some((device, kind)));
}

/// Adds what was recorded on another thread, and leaves out the time since the innermost span began: this thread
/// waited.
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
    /// Counts FLOPs for the span, and second those of its backward pass. `count` is called only while recording.
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

    /// Gives the time since the last event to the innermost span, whose cell is returned.
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

/// FLOPs of `x Wᵀ` and, where the result has a gradient, those of the gradients of `x` and `W`. `weight`: `[d_out,
/// d_in]`.
pub(crate) fn product(x: &Tensor, weight: &Tensor, graph: bool) -> Result<(f64, f64)> {
    let once = 2.0 * x.numel() as f64 * weight.size2()?.0 as f64;
    let wanted = [x, weight].iter().filter(|factor| graph && factor.requires_grad()).count();
    Ok((once, once * wanted as f64))
}

/// FLOPs of attention over the pairs of a query and a key that it may see, or over all pairs if there is a mask. `q`:
/// `[batch, n_heads, query, d_head]`, `k`: `[batch, n_kv_heads, key, d_head]`. The gradient takes twice as many.
pub(crate) fn attention(q: &Tensor, k: &Tensor, causal: bool, graph: bool) -> Result<(f64, f64)> {
    let ((batch, heads, queries, d_head), (_, _, keys, _)) = (q.size4()?, k.size4()?);
    let pairs = if causal { queries * (queries + 1) / 2 } else { queries * keys };
    let once = 4.0 * (batch * heads * d_head) as f64 * pairs as f64;
    Ok((once, if graph { 2.0 * once } else { 0.0 }))
}

/// How fast this machine multiplies large matrices, in FLOPs per second: the best of half a second, in this thread's
/// number of threads.
pub fn product_rate(device: Device, kind: Kind) -> Result<f64> {
    let n = if device == Device::Cpu { 1024 } else { 8192 };
    let (a, b) = (Tensor::f_ones([n, n], (kind, device))?, Tensor::f_ones([n, n], (kind, device))?);
    let wait = || wait_for(device);
    tch::no_grad(|| {
        let (begun, mut best) = (Instant::now(), f64::INFINITY);
        while best.is_infinite() || begun.elapsed().as_secs_f64() < 0.5 {
            wait();
            let start = Instant::now();
            let _product = a.f_matmul(&b)?;
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
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::adapter::lora::{Adapter, LoraConfig};
    use crate::ask::condition::Condition;
    use crate::ask::generate::{Sampling, generate};
    use crate::ask::gradient::gradients;
    use crate::chat::tokens::Sequence;
    use crate::load::model_files::ModelFiles;
    use crate::model::loss::{Targets, cross_entropy_sum};
    use crate::model::pass::Pass;
    use crate::model::qwen::Qwen;
    use crate::proj::Proj;
    use crate::rows::batch::Batch;

    const ROWS: [&[i64]; 2] = [&[5, 6, 7, 8, 9], &[10, 11, 12, 13, 14]];

    fn model() -> Qwen {
        Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Float).unwrap()
    }

    /// The loss of one step of a LoRA of rank 4 and its gradients, as bits.
    fn step(model: &Qwen) -> Vec<f32> {
        let config = LoraConfig { rank: 4, ..LoraConfig::default() };
        let adapter = Adapter::init(&config, &model.config, &mut ChaCha8Rng::seed_from_u64(1), Device::Cpu).unwrap();
        let tensors: Vec<Tensor> =
            adapter.parameters().into_iter().map(|(_, tensor)| tensor.set_requires_grad(true)).collect();
        let batch = Batch::from_ids(&ROWS, Device::Cpu).unwrap();
        let mut pass = Pass { adapter: Some(&adapter), ..Pass::default() };
        let masks: [&[bool]; 2] = [&[false, false, false, true, true], &[false, false, false, false, true]];
        let targets = Targets::of(&batch, &ROWS, &masks).unwrap();
        let resid = model.resid_at(&batch, &targets.places, &mut pass).unwrap();
        let loss = cross_entropy_sum(model, &resid, &targets).unwrap();
        let mut found = vec![f32::try_from(&loss.detach()).unwrap()];
        for gradient in gradients(&loss, &tensors, false).unwrap() {
            found.extend(Vec::<f32>::try_from(gradient.flatten(0, -1)).unwrap());
        }
        found
    }

    fn answer(model: &Qwen) -> Vec<i64> {
        let sampling = Sampling { temperature: 1.0, max_new_tokens: 4, stop: vec![], constrain: None, batch: 2 };
        let prompt = Sequence::of_ids(vec![5, 6, 7, 8]);
        let answers = generate(model, &[prompt], &Condition::default(), &sampling, &[3], &mut |_| ()).unwrap();
        answers[0].ids.clone()
    }

    #[test]
    fn the_flops_of_a_training_step_are_those_by_hand() {
        let model = model();
        let config = &model.config;
        start();
        step(&model);
        let recorded = finish();

        let (tokens, targets, rank) = (10.0, 3.0, 4.0);
        let widths = || Proj::ALL.map(|proj| (proj, proj.widths(config)));
        let weights: f64 = widths().iter().map(|(_, (d_in, d_out))| (d_in * d_out) as f64).sum();
        let layers = config.n_layers as f64;
        let projections = layers * 2.0 * tokens * weights;
        let lora =
            layers * widths().iter().map(|(_, (d_in, d_out))| 2.0 * tokens * rank * (d_in + d_out) as f64).sum::<f64>();
        // Each row's five queries see 1 + 2 + 3 + 4 + 5 keys: a product for the score and one for the mean.
        let attention = layers * 2.0 * 15.0 * (config.n_heads * config.d_head) as f64 * 4.0;
        let head = 2.0 * targets * (config.d_model * config.d_vocab) as f64;
        // The first block's input, the embedding, has no gradient: its q, k and v need none, of the model and of A.
        let first: Vec<(i64, i64)> = [Proj::Q, Proj::K, Proj::V].map(|proj| proj.widths(config)).to_vec();
        let first_weights: f64 = first.iter().map(|(d_in, d_out)| 2.0 * tokens * (d_in * d_out) as f64).sum();
        let first_a: f64 = first.iter().map(|(d_in, _)| 2.0 * tokens * rank * *d_in as f64).sum();
        let backward = projections - first_weights + 2.0 * lora - first_a + 2.0 * attention;

        let flops = |cell: (Stage, Op)| recorded.costs[&cell].flops;
        assert_eq!(flops((Stage::Forward, Op::Projections)), projections);
        assert_eq!(flops((Stage::Forward, Op::Lora)), lora);
        assert_eq!(flops((Stage::Forward, Op::Attention)), attention);
        assert_eq!(
            flops((Stage::Loss, Op::Head)),
            2.0 * head,
            "the gradient at the hidden states is taken with the loss"
        );
        assert_eq!(flops((Stage::Backward, Op::Gradients)), backward);
        let all: f64 = recorded.costs.values().map(|cost| cost.flops).sum();
        assert_eq!(all, projections + lora + attention + 2.0 * head + backward);
        assert_eq!(recorded.costs[&(Stage::Forward, Op::Projections)].calls, 7 * config.n_layers as u64);
        assert_eq!(recorded.costs[&(Stage::Forward, Op::Attention)].calls, config.n_layers as u64);
    }

    #[test]
    fn the_flops_of_an_answer_are_those_by_hand() {
        let model = model();
        let config = &model.config;
        start();
        assert_eq!(answer(&model).len(), 4);
        let recorded = finish();
        let weights: f64 = Proj::ALL.iter().map(|proj| proj.widths(config)).map(|(i, o)| (i * o) as f64).sum();
        let (layers, head) = (config.n_layers as f64, (config.d_model * config.d_vocab) as f64);
        let flops = |cell: (Stage, Op)| recorded.costs[&cell].flops;
        // Four tokens of the prompt, and three of the answer. For the prompt's tokens but the last, the last block
        // computes keys and values only. The head is run for each of the answer's four.
        let kv: f64 = [Proj::K, Proj::V].iter().map(|proj| proj.widths(config)).map(|(i, o)| (i * o) as f64).sum();
        let last_block = 4.0 * kv + weights - kv;
        assert_eq!(flops((Stage::Forward, Op::Projections)), 2.0 * ((layers - 1.0) * 4.0 * weights + last_block));
        assert_eq!(flops((Stage::Decode, Op::Projections)), layers * 2.0 * 3.0 * weights);
        assert_eq!(flops((Stage::Decode, Op::Head)), 2.0 * 4.0 * head);
        // The three see five, six and seven keys.
        let heads = (config.n_heads * config.d_head) as f64;
        assert_eq!(flops((Stage::Decode, Op::Attention)), layers * 4.0 * 18.0 * heads);
        assert_eq!(recorded.costs[&(Stage::Sampling, Op::Rest)].calls, 4);
    }

    #[test]
    fn every_moment_counts_once() {
        let before = Instant::now();
        start();
        let inner = Instant::now();
        step(&model());
        {
            let _outer = stage(Stage::Writing);
            let _inner = op(Op::Taps);
        }
        let inner = inner.elapsed().as_secs_f64();
        let recorded = finish();
        let outer = before.elapsed().as_secs_f64();
        let seconds = recorded.seconds();
        assert!(inner <= seconds && seconds <= outer, "{inner} {seconds} {outer}");
        let of = |costs: &[Cost]| costs.iter().map(|cost| cost.seconds / seconds).sum::<f64>();
        let by_stage: Vec<Cost> = recorded.by_stage().into_iter().map(|(_, cost)| cost).collect();
        let by_op: Vec<Cost> = recorded.by_op().into_iter().map(|(_, cost)| cost).collect();
        for shares in [of(&by_stage), of(&by_op)] {
            assert!((shares - 1.0).abs() < 1e-12, "the shares add up to {shares}");
        }
        assert_eq!(recorded.costs[&(Stage::Writing, Op::Taps)].calls, 1);
        assert_eq!(recorded.model, Some((Device::Cpu, Kind::Float)));
        assert!(recorded.costs.contains_key(&(Stage::Load, Op::Rest)));
    }

    #[test]
    fn off_nothing_is_recorded_and_on_nothing_is_changed() {
        let model = model();
        let bare = (step(&model), answer(&model));
        assert!(!is_on());
        assert_eq!(finish(), Profile::default());
        start();
        let recorded = (step(&model), answer(&model));
        assert!(is_on());
        assert_ne!(finish(), Profile::default());
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&bare.0), bits(&recorded.0));
        assert_eq!(bare.1, recorded.1);
    }
}
