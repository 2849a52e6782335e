//! What this machine and this process do: clocks, peak memory, the rate of matrix products.

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use cpu_time::ProcessTime;
use hooks::Qwen;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::{Cuda, Device, Kind, Tensor};

/// When something began.
pub(crate) struct Clock {
    device: Device,
    start: Instant,
    cpu: ProcessTime,
}

/// How long something took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    /// Seconds on the wall's clock.
    pub(crate) seconds: f64,
    /// Seconds that the threads of this process ran.
    pub(crate) cpu: f64,
}

impl Clock {
    /// Begins, once the device has done what it was given before.
    pub(crate) fn start(device: Device) -> Self {
        wait_for(device);
        Self { device, cpu: ProcessTime::now(), start: Instant::now() }
    }

    /// The time since then, once the device is done.
    pub(crate) fn stop(&self) -> Took {
        wait_for(self.device);
        Took { seconds: self.start.elapsed().as_secs_f64(), cpu: self.cpu.elapsed().as_secs_f64() }
    }
}

fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Lets the kernel count the peak of resident memory anew.
pub(crate) fn reset_peak() -> Result<()> {
    fs::write("/proc/self/clear_refs", "5").context("/proc/self/clear_refs: the peak of memory could not be reset")
}

/// The peak of resident memory since `reset_peak`, in MiB.
pub(crate) fn peak_mib() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    Ok(kib.context("/proc/self/status: expected a line VmHWM in kB")? / 1024.0)
}

/// How fast this machine does what floors are made of.
#[derive(Debug, Serialize)]
pub(crate) struct Rates {
    /// FLOP/s of the products with the blocks' matrices, all of them in turn.
    pub(crate) body: f64,
    /// FLOP/s of the product with the unembedding.
    pub(crate) head: f64,
    /// Bytes read and written per second in copying a large tensor.
    pub(crate) copy: f64,
}

/// The rates for `rows` rows in the blocks and `head_rows` in the unembedding, with this model's own matrices. A product is
/// taken in the faster of its two orders, x Wᵀ and (W xᵀ)ᵀ; with `backward`, dY W is done as often.
pub(crate) fn rates(model: &Qwen, rows: i64, head_rows: i64, backward: bool) -> Result<Rates> {
    let (device, kind) = (model.device(), model.kind());
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut random = |rows: i64, width: i64| -> Result<Tensor> {
        let values: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-1.0..1.0)).collect();
        Ok(Tensor::f_from_slice(&values)?.f_view([rows, width])?.f_to_kind(kind)?.f_to_device(device)?)
    };
    let parameters = model.parameters();
    let projections = || parameters.iter().filter(|(name, _)| name.ends_with("_proj.weight")).map(|(_, weight)| weight);
    let unembedding = parameters
        .iter()
        .find(|(name, _)| name == "lm_head.weight")
        .or(parameters.iter().find(|(name, _)| name == "model.embed_tokens.weight"))
        .map(|(_, weight)| weight)
        .context("the model has no unembedding")?;

    let mut widths: Vec<i64> = projections().chain([unembedding]).flat_map(Tensor::size).collect();
    widths.sort_unstable();
    widths.dedup();
    let inputs = |random: &mut dyn FnMut(i64, i64) -> Result<Tensor>, rows: i64| -> Result<Vec<Tensor>> {
        widths.iter().map(|width| random(rows, *width)).collect()
    };
    let of = |xs: &[Tensor], width: i64| -> Result<Tensor> {
        let at = widths.binary_search(&width).ok().context("a width that no matrix has")?;
        Ok(xs[at].shallow_clone())
    };
    // Each order over all matrices, so that the weights come from memory as they do in a pass.
    let measure = |xs: &[Tensor], weights: &[&Tensor], backward: bool| -> Result<f64> {
        let flops: f64 = weights.iter().map(|weight| 2.0 * weight.numel() as f64).sum::<f64>() * xs[0].size()[0] as f64;
        let forward = |swapped: bool| {
            fastest(device, || {
                for weight in weights {
                    let x = of(xs, weight.size()[1])?;
                    let _ = black_box(if swapped {
                        weight.f_matmul(&x.f_transpose(0, 1)?)?
                    } else {
                        x.f_linear::<&Tensor>(weight, None)?
                    });
                }
                Ok(())
            })
        };
        let mut seconds = forward(false)?.min(forward(true)?);
        if backward {
            seconds += fastest(device, || {
                for weight in weights {
                    let _ = black_box(of(xs, weight.size()[0])?.f_matmul(weight)?);
                }
                Ok(())
            })?;
        }
        Ok(flops * if backward { 2.0 } else { 1.0 } / seconds)
    };
    tch::no_grad(|| {
        let projections: Vec<&Tensor> = projections().collect();
        let body = measure(&inputs(&mut random, rows)?, &projections, backward)?;
        let head = measure(&inputs(&mut random, head_rows)?, &[unembedding], backward)?;
        Ok(Rates { body, head, copy: copy_rate(device)? })
    })
}

fn copy_rate(device: Device) -> Result<f64> {
    let from = Tensor::f_ones([1 << 27], (Kind::Float, device))?; // 512 MiB, more than caches hold
    let mut to = from.f_zeros_like()?;
    let seconds = fastest(device, || Ok(to.f_copy_(&from)?))?;
    Ok(2.0 * 4.0 * from.numel() as f64 / seconds)
}

/// The shortest of three times, after one that does not count: a floor is what the machine can do.
fn fastest(device: Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let clock = Clock::start(device);
        work()?;
        best = best.min(clock.stop().seconds);
    }
    Ok(best)
}
