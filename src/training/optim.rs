//! `AdamW`, SGD, `RMSProp` and Muon exactly as in torch.optim, descent by signs, descent with fixed scales, the
//! learning rate's schedule, and clipping.
//!
//! The trained tensors become views of a few flat buffers, so that a step takes few operations for any number of
//! tensors. Weights in bf16 have a master copy in f32, unless `masters` is false.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use hooks::{Error, Result};

/// Number of elements after which a flat buffer is full. It bounds the memory of a step.
pub(crate) const BUFFER: usize = 1 << 24;

/// The change of the learning rate after the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Falls linearly to zero at the last step.
    #[default]
    Linear,
    /// Falls as half a cosine to zero at the last step.
    Cosine,
    /// Is constant.
    Constant,
}

/// The schedule of the learning rate, as in transformers' `get_scheduler`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The schedule after the warmup.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises from zero.
    pub warmup_steps: u64,
    /// Number of steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The factor on the learning rate for a step, counted from 0. With a warmup of w steps the factor is step / w, so
    /// the first step changes nothing, as in Hugging Face's Trainer.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = (step - self.warmup_steps) as f64 / decay_steps as f64;
        match self.kind {
            ScheduleKind::Linear => (1.0 - progress).max(0.0),
            ScheduleKind::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            ScheduleKind::Constant => 1.0,
        }
    }
}

/// The rule by which a gradient becomes a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Adam with decoupled decay (Loshchilov and Hutter 2019):
    /// θ ← θ(1 − lr·decay) − lr · m̂ / (√v̂ + ε), with averages m of g and v of g² corrected for their start at zero.
    AdamW {
        /// Weight of the past in m.
        beta1: f64,
        /// Weight of the past in v.
        beta2: f64,
        /// ε.
        epsilon: f64,
        /// The weight decay.
        weight_decay: f64,
    },
    /// Gradient descent with momentum μ: b ← μ b + g + decay · θ, θ ← θ − lr · b.
    Sgd {
        /// μ.
        momentum: f64,
        /// The weight decay.
        weight_decay: f64,
    },
    /// Descent by the gradient's sign (Bernstein et al. 2018): θ ← θ − lr · sign(g + decay · θ).
    SignSgd {
        /// The weight decay.
        weight_decay: f64,
    },
    /// `RMSProp` as `torch.optim.RMSprop`, without momentum: v ← α v + (1 − α) g², θ ← θ − lr · g / (√v + ε), g with
    /// decay · θ.
    RmsProp {
        /// α, the weight of the past in v.
        alpha: f64,
        /// ε.
        epsilon: f64,
        /// The weight decay.
        weight_decay: f64,
    },
    /// Muon as `torch.optim.Muon` (Jordan et al. 2024), with Nesterov's momentum μ: m ← μ m + (1 − μ) g,
    /// u = (1 − μ) g + μ m, θ ← θ(1 − lr·decay) − lr √max(1, rows / columns) · O(u).
    /// O sets all singular values to about 1.
    Muon {
        /// μ.
        momentum: f64,
        /// The weight decay.
        weight_decay: f64,
    },
    /// Gradient descent preconditioned by fixed scales (Blank et al. 2026): θ ← θ − lr · g / √(v + 1e-8), g with decay
    /// · θ. v is Adam's from an earlier training.
    Preconditioned {
        /// The weight decay.
        weight_decay: f64,
    },
}

impl Rule {
    /// The weight decay that is added to the gradient; 0 for `AdamW` and Muon, which decay the weights separately.
    fn coupled_decay(self) -> f64 {
        match self {
            Self::AdamW { .. } | Self::Muon { .. } => 0.0,
            Self::Sgd { weight_decay, .. }
            | Self::SignSgd { weight_decay }
            | Self::RmsProp { weight_decay, .. }
            | Self::Preconditioned { weight_decay } => weight_decay,
        }
    }
}

/// The gradients of all trained tensors, in f32 and in the layout of the optimizer's buffers.
#[derive(Debug)]
pub struct Gradients {
    flat: Vec<Tensor>,
}

impl Gradients {
    /// The Euclidean norm of all gradients together, a scalar in f32. The squares are summed in parts: one f32 sum of nine
    /// million numbers makes the norm too small by 4e-4.
    pub fn norm(&self) -> Result<Tensor> {
        const PART: i64 = 1 << 16;
        let mut norms = vec![];
        for flat in &self.flat {
            let in_parts = flat.numel() as i64 / PART * PART;
            let rest = flat.f_narrow(0, in_parts, flat.numel() as i64 - in_parts)?;
            if in_parts > 0 {
                let parts = flat.f_narrow(0, 0, in_parts)?.f_view([-1, PART])?;
                norms.push(parts.f_norm_scalaropt_dim(2, [1_i64].as_slice(), false)?);
            }
            if rest.numel() > 0 {
                norms.push(rest.f_norm()?.f_view([1])?);
            }
        }
        match norms.as_slice() {
            [norm] if norm.numel() == 1 => Ok(norm.f_squeeze()?),
            norms => Ok(Tensor::f_cat(norms, 0)?.f_norm()?),
        }
    }

    /// Scales the gradients to `max_norm` if their norm, `norm`, is above it: the factor is `max_norm` / (norm + 1e-6)
    /// in f32, at most 1, as in `torch.nn.utils.clip_grad_norm_`.
    pub fn clip(&mut self, max_norm: f64, norm: f32) -> Result<()> {
        let factor = max_norm as f32 * (norm + 1e-6).recip();
        if factor < 1.0 {
            for flat in &mut self.flat {
                let _ = flat.f_mul_scalar_(f64::from(factor))?;
            }
        }
        Ok(())
    }
}

/// Some trained tensors in one buffer, with the optimizer's state.
#[derive(Debug)]
struct Buffer {
    members: Vec<(String, Vec<i64>)>, // names and shapes
    values: Tensor,                   // [n], in the weights' dtype; the model's tensors are views of it
    master: Option<Tensor>,           // [n], f32, if `values` are rounded from it
    first: Option<Tensor>,            // [n], m of AdamW and Muon, or SGD's b
    second: Option<Tensor>,           // [n], AdamW's v
}

impl Buffer {
    /// Moves tensors into one buffer, with their values and shapes.
    fn adopt(parameters: &[(String, Tensor)], rule: Rule, masters: bool) -> Result<Self> {
        let flat = parameters.iter().map(|(_, tensor)| Ok(tensor.f_detach()?.f_reshape([-1])?));
        let values = Tensor::f_cat(&flat.collect::<Result<Vec<_>>>()?, 0)?;
        let mut from = 0;
        for (_, tensor) in parameters {
            let n = tensor.numel() as i64;
            tensor.shallow_clone().f_set_data(&values.f_narrow(0, from, n)?.f_view(tensor.size().as_slice())?)?;
            from += n;
        }
        let master = if masters && values.kind() != Kind::Float { Some(values.f_to_kind(Kind::Float)?) } else { None };
        let zeros = |needed: bool| needed.then(|| master.as_ref().unwrap_or(&values).f_zeros_like()).transpose();
        let (first, second) = match rule {
            Rule::AdamW { .. } => (zeros(true)?, zeros(true)?),
            Rule::Sgd { momentum, .. } => (zeros(momentum != 0.0)?, None),
            Rule::SignSgd { .. } => (None, None),
            Rule::RmsProp { .. } | Rule::Preconditioned { .. } => (None, zeros(true)?),
            Rule::Muon { .. } => (zeros(true)?, None),
        };
        let members = parameters.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
        Ok(Self { members, values, master, first, second })
    }

    /// Takes one step with this gradient, `[n]`. If `counted`, returns the number of stored values that changed, a
    /// scalar.
    fn step(&mut self, rule: Rule, gradient: &Tensor, lr: f64, steps: u64, counted: bool) -> Result<Option<Tensor>> {
        let before = counted.then(|| self.values.f_detach_copy()).transpose()?;
        let mut weights = self.master.as_ref().unwrap_or(&self.values).shallow_clone();
        let mut gradient = gradient.f_to_kind(weights.kind())?; // without masters it is rounded, as in torch.optim
        if rule.coupled_decay() != 0.0 {
            gradient = gradient.f_add(&weights.f_mul_scalar(rule.coupled_decay())?)?;
        }
        match rule {
            Rule::AdamW { beta1, beta2, epsilon, weight_decay } => {
                if weight_decay != 0.0 {
                    let _ = weights.f_mul_scalar_(1.0 - lr * weight_decay)?;
                }
                let (Some(m), Some(v)) = (&mut self.first, &mut self.second) else { return Err(stateless()) };
                let _ = m.f_lerp_(&gradient, 1.0 - beta1)?;
                let _ = v.f_mul_scalar_(beta2)?;
                let wide = gradient.f_to_kind(Kind::Float)?;
                rounded_once(v, |v| v.f_addcmul_(&wide.f_mul_scalar(1.0 - beta2)?, &wide))?;
                let correction = |beta: f64| 1.0 - beta.powf(steps as f64);
                let divisor = v.f_sqrt()?.f_div_scalar(correction(beta2).sqrt())?.f_add_scalar(epsilon)?;
                let scaled = m.f_to_kind(Kind::Float)?.f_mul_scalar(-lr / correction(beta1))?;
                rounded_once(&mut weights, |weights| weights.f_addcdiv_(&scaled, &divisor.f_to_kind(Kind::Float)?))?;
            }
            Rule::Sgd { momentum, .. } => {
                if let Some(b) = &mut self.first {
                    gradient = b.f_mul_scalar_(momentum)?.f_add_(&gradient)?;
                }
                let step = gradient.f_to_kind(Kind::Float)?.f_mul_scalar(lr)?;
                rounded_once(&mut weights, |weights| weights.f_sub_(&step))?;
            }
            Rule::SignSgd { .. } => {
                let step = gradient.f_to_kind(Kind::Float)?.f_sign()?.f_mul_scalar(lr)?;
                rounded_once(&mut weights, |weights| weights.f_sub_(&step))?;
            }
            Rule::RmsProp { alpha, epsilon, .. } => {
                let Some(v) = &mut self.second else { return Err(stateless()) };
                let _ = v.f_mul_scalar_(alpha)?;
                let wide = gradient.f_to_kind(Kind::Float)?;
                rounded_once(v, |v| v.f_addcmul_(&wide.f_mul_scalar(1.0 - alpha)?, &wide))?;
                let divisor = v.f_to_kind(Kind::Float)?.f_sqrt()?.f_add_scalar(epsilon)?;
                let scaled = wide.f_mul_scalar(-lr)?;
                rounded_once(&mut weights, |weights| weights.f_addcdiv_(&scaled, &divisor))?;
            }
            Rule::Muon { momentum, weight_decay } => {
                if weight_decay != 0.0 {
                    let _ = weights.f_mul_scalar_(1.0 - lr * weight_decay)?;
                }
                let Some(m) = &mut self.first else { return Err(stateless()) };
                let _ = m.f_lerp_(&gradient, 1.0 - momentum)?;
                let step = orthogonal_step(&self.members, &gradient.f_lerp(m, momentum)?)?.f_mul_scalar(lr)?;
                rounded_once(&mut weights, |weights| weights.f_sub_(&step))?;
            }
            Rule::Preconditioned { .. } => {
                let Some(v) = &self.second else { return Err(stateless()) };
                let divisor = v.f_to_kind(Kind::Float)?.f_add_scalar(SCALE_EPSILON)?.f_sqrt()?;
                let scaled = gradient.f_to_kind(Kind::Float)?.f_mul_scalar(-lr)?;
                rounded_once(&mut weights, |weights| weights.f_addcdiv_(&scaled, &divisor))?;
            }
        }
        if let Some(master) = &self.master {
            self.values.f_copy_(master)?;
        }
        before.map(|before| Ok(self.values.f_ne_tensor(&before)?.f_sum(Kind::Int64)?)).transpose()
    }
}

/// Added to v under the root of the fixed scales.
const SCALE_EPSILON: f64 = 1e-8;
/// The coefficients a, b and c of Muon's iteration x ← a x + (b (x xᵀ) + c (x xᵀ)²) x.
const NEWTON_SCHULZ: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
const NEWTON_SCHULZ_STEPS: usize = 5;

/// Muon's step without the learning rate, f32 `[n]`: for each member's matrix the nearest one whose singular values are
/// all about 1, by the Newton-Schulz iteration in bf16 as in torch, times √max(1, rows / columns). Matrices of the same
/// shape are batched.
fn orthogonal_step(members: &[(String, Vec<i64>)], update: &Tensor) -> Result<Tensor> {
    let mut alike: BTreeMap<(i64, i64), Vec<i64>> = BTreeMap::new(); // the starts of the matrices of a shape
    let mut from = 0;
    for (name, shape) in members {
        let [rows, columns] = shape[..] else {
            let what = format!("{name}, which Muon is to train");
            return Err(Error::invalid(what, "a matrix", format!("the shape {shape:?}")));
        };
        alike.entry((rows, columns)).or_default().push(from);
        from += rows * columns;
    }
    let step = update.f_zeros_like()?.f_to_kind(Kind::Float)?;
    for ((rows, columns), places) in alike {
        let matrix = |flat: &Tensor, from: i64| Ok(flat.f_narrow(0, from, rows * columns)?.f_view([rows, columns])?);
        let all = places.iter().map(|from| matrix(update, *from)).collect::<Result<Vec<_>>>()?;
        let mut x = Tensor::f_stack(&all, 0)?.f_to_kind(Kind::BFloat16)?; // [n, rows, columns]
        if rows > columns {
            x = x.f_transpose(1, 2)?;
        }
        let norms = x.f_norm_scalaropt_dim(2.0, [1, 2], true)?.f_clamp_min(1e-7)?;
        x = x.f_div(&norms)?;
        let (a, b, c) = NEWTON_SCHULZ;
        for _ in 0..NEWTON_SCHULZ_STEPS {
            let gram = x.f_bmm(&x.f_transpose(1, 2)?)?;
            let gram = gram.f_baddbmm(&gram, &gram, b, c)?;
            x = x.f_baddbmm(&gram, &x, a, 1.0)?;
        }
        if rows > columns {
            x = x.f_transpose(1, 2)?;
        }
        let x = x.f_to_kind(Kind::Float)?.f_mul_scalar((rows as f64 / columns as f64).max(1.0).sqrt())?;
        for (at, from) in (0..).zip(places) {
            matrix(&step, from)?.f_copy_(&x.f_get(at)?)?;
        }
    }
    Ok(step)
}

/// Computes `change` in f32 and rounds the result to the tensor's dtype, as libtorch's kernels do.
fn rounded_once(
    tensor: &mut Tensor,
    change: impl FnOnce(&mut Tensor) -> std::result::Result<Tensor, tch::TchError>,
) -> Result<()> {
    let mut wide = tensor.f_to_kind(Kind::Float)?; // the tensor itself if it is f32
    let _ = change(&mut wide)?;
    if tensor.kind() != Kind::Float {
        tensor.f_copy_(&wide)?;
    }
    Ok(())
}

fn stateless() -> Error {
    Error::invalid("the optimizer's state", "averages m and v", "none")
}

/// An optimizer with the tensors that it updates.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    buffers: Vec<Buffer>,
    steps: u64,
}

impl Optimizer {
    /// Turns the tensors into views of the optimizer's buffers, which `step` changes in place. With `masters`, tensors
    /// that are not f32 are trained through a copy in f32; without, the optimizer's state has their dtype.
    pub fn new(rule: Rule, parameters: &[(String, Tensor)], masters: bool) -> Result<Self> {
        let mut buffers = Vec::new();
        let mut rest = parameters;
        while let Some((_, first)) = rest.first() {
            let mut elements = 0;
            let n = rest.iter().take_while(|(_, tensor)| {
                elements += tensor.numel();
                elements <= BUFFER && tensor.kind() == first.kind()
            });
            let (taken, left) = rest.split_at(n.count().max(1));
            buffers.push(no_grad(|| Buffer::adopt(taken, rule, masters))?);
            rest = left;
        }
        Ok(Self { rule, buffers, steps: 0 })
    }

    /// Copies gradients into the layout of the buffers, and adds `sums`, if given. `gradients`: one per tensor, in the
    /// order given to `new`. Each is freed once it is copied: in full finetuning, two copies of all gradients would be
    /// the peak of a step's memory.
    pub fn gather(&self, gradients: Vec<Tensor>, mut sums: Option<Gradients>) -> Result<Gradients> {
        let mut gradients = gradients.into_iter();
        let mut flat = Vec::with_capacity(self.buffers.len());
        for (at, buffer) in self.buffers.iter().enumerate() {
            let parts = buffer.members.iter().zip(gradients.by_ref()).map(|((_, shape), gradient)| {
                if gradient.defined() {
                    return Ok(gradient.f_reshape([-1])?.f_to_kind(Kind::Float)?); // itself if it is f32
                }
                Ok(Tensor::f_zeros([shape.iter().product::<i64>()], (Kind::Float, buffer.values.device()))?)
            });
            let found = Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
            flat.push(match &mut sums {
                Some(sums) => sums.flat[at].f_add_(&found)?,
                None => found,
            });
        }
        Ok(Gradients { flat })
    }

    /// Takes one step with the gradients. If `counted`, returns the number of stored values that changed, a scalar.
    pub fn step(&mut self, gradients: &Gradients, learning_rate: f64, counted: bool) -> Result<Option<Tensor>> {
        self.steps += 1;
        let (rule, steps) = (self.rule, self.steps);
        let mut changed = Vec::new();
        for (buffer, gradient) in self.buffers.iter_mut().zip(&gradients.flat) {
            changed.extend(no_grad(|| buffer.step(rule, gradient, learning_rate, steps, counted))?);
        }
        counted.then(|| Ok(Tensor::f_stack(&changed, 0)?.f_sum(Kind::Int64)?)).transpose()
    }

    /// Takes the averages of squared gradients from another optimizer of the same tensors, as fixed scales.
    pub fn take_scales(&mut self, of: Self) -> Result<()> {
        for (buffer, other) in self.buffers.iter_mut().zip(of.buffers) {
            let (Some(scales), Some(found)) = (&mut buffer.second, &other.second) else { return Err(stateless()) };
            no_grad(|| scales.f_copy_(found))?;
        }
        Ok(())
    }

    /// The factors D by which the last step multiplied the averaged gradient of each element, besides the learning rate,
    /// shaped as the tensors: 1 / (√v̂ + ε) for `AdamW`. `None` if there are none, as for SGD. An error for rules whose
    /// step is not such a product.
    pub fn scales(&self) -> Result<Option<Vec<Tensor>>> {
        let of_buffer = |v: &Tensor| -> Result<Tensor> {
            let v = v.f_to_kind(Kind::Double)?;
            Ok(match self.rule {
                Rule::AdamW { beta2, epsilon, .. } => {
                    let corrected = v.f_div_scalar(1.0 - beta2.powf(self.steps as f64))?;
                    corrected.f_sqrt()?.f_add_scalar(epsilon)?.f_reciprocal()?
                }
                Rule::RmsProp { epsilon, .. } => v.f_sqrt()?.f_add_scalar(epsilon)?.f_reciprocal()?,
                _ => v.f_add_scalar(SCALE_EPSILON)?.f_rsqrt()?,
            })
        };
        match self.rule {
            Rule::Sgd { .. } => return Ok(None),
            Rule::SignSgd { .. } | Rule::Muon { .. } => {
                return Err(Error::invalid("the optimizer", "one whose step is linear in its gradients", "another"));
            }
            Rule::AdamW { .. } | Rule::RmsProp { .. } | Rule::Preconditioned { .. } => {}
        }
        let mut scales = Vec::new();
        for buffer in &self.buffers {
            let flat = of_buffer(buffer.second.as_ref().ok_or_else(stateless)?)?;
            let mut from = 0;
            for (_, shape) in &buffer.members {
                let n = shape.iter().product();
                scales.push(flat.f_narrow(0, from, n)?.f_view(shape.as_slice())?);
                from += n;
            }
        }
        Ok(Some(scales))
    }

    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Continues after `steps` steps, whose state was restored.
    pub fn go_on_after(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The state that is kept from step to step, as views: each name is the tensor's, followed by torch.optim's name of
    /// the state.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let first = if matches!(self.rule, Rule::AdamW { .. }) { "exp_avg" } else { "momentum_buffer" };
        let mut state = Vec::new();
        for buffer in &self.buffers {
            let kept = [("master", &buffer.master), (first, &buffer.first), ("exp_avg_sq", &buffer.second)];
            for (what, flat) in kept.into_iter().filter_map(|(what, flat)| Some((what, flat.as_ref()?))) {
                let mut from = 0;
                for (name, shape) in &buffer.members {
                    let n = shape.iter().product();
                    state.push((format!("{name}.{what}"), flat.f_narrow(0, from, n)?.f_view(shape.as_slice())?));
                    from += n;
                }
            }
        }
        Ok(state)
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests;
