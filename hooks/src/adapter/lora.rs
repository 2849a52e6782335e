//! Low-rank adapters (Hu et al. 2021): h = W x + s · B (g ⊙ A x), with s = α/r (rsLoRA: α/√r) and g the gate's dose at
//! the token, 1 without a gate. Adapters are looked up during a pass, never attached to the model.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::adapter::dose::Dose;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ops::{by_head, wide};
use crate::proj::Proj;

/// The settings of a LoRA, in PEFT's terms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// The rank r.
    pub rank: i64,
    /// The numerator α of the scaling.
    pub alpha: f64,
    /// Whether the scaling is α/√r instead of α/r.
    pub use_rslora: bool,
    /// Probability that an input of A is dropped in training.
    pub dropout: f64,
    /// The linear maps that have a pair.
    pub target_modules: Vec<Proj>,
    /// The blocks that have pairs; `None` means all.
    pub layers: Option<Vec<usize>>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, use_rslora: false, dropout: 0.0, target_modules: Proj::ALL.to_vec(), layers: None }
    }
}

impl LoraConfig {
    /// The scaling s of B A x for a rank and an α: α/r, or α/√r for rsLoRA.
    pub fn scaling(&self, rank: i64, alpha: f64) -> f64 {
        let rank = rank as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Refuses ranks, α and layers that no adapter can have in this model.
    pub fn check(&self, model: &Config) -> Result<()> {
        self.check_numbers()?;
        match self.layers.iter().flatten().find(|layer| **layer >= model.n_layers) {
            Some(layer) => Err(Error::invalid("a layer of the LoRA", format!("0 to {}", model.n_layers - 1), layer)),
            None => Ok(()),
        }
    }

    /// Refuses settings that are impossible in every model.
    pub(crate) fn check_numbers(&self) -> Result<()> {
        if self.rank < 1 {
            return Err(Error::invalid("the LoRA rank", "at least 1", self.rank));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(Error::invalid("the LoRA alpha", "a positive number", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::invalid("the LoRA dropout", "at least 0 and less than 1", self.dropout));
        }
        if self.target_modules.is_empty() {
            return Err(Error::invalid("target_modules", "at least one projection", "none"));
        }
        if self.layers.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::invalid("the layers of the LoRA", "at least one", "none"));
        }
        Ok(())
    }
}

/// The two factors A and B at one projection. In a stack ([`Adapter::stacked`]) they hold all students, along the first
/// dimension.
#[derive(Debug)]
pub struct LoraPair {
    /// A, `[rank, d_in]`, f32; of a stack `[n, rank, d_in]`.
    pub a: Tensor,
    /// B, `[d_out, rank]`, f32; of a stack `[n, d_out, rank]`.
    pub b: Tensor,
    /// The scaling s.
    pub scaling: f64,
    /// In a stack whose students have different s: each student's s, `[n, 1, 1]`; `scaling` is then 1.
    pub scalings: Option<Tensor>,
}

impl LoraPair {
    /// FLOPs of the pair's two products at `x`, `[.., d_in]`; second, those of their backward pass if a graph is
    /// recorded.
    pub(crate) fn flops(&self, x: &Tensor, graph: bool) -> (f64, f64) {
        let width = |tensor: &Tensor, from_end: usize| tensor.size().into_iter().rev().nth(from_end).unwrap_or(0);
        let (d_in, rank, d_out) = (width(&self.a, 0), width(&self.a, 1), width(&self.b, 1));
        let (down, up) =
            (2.0 * x.numel() as f64 * rank as f64, 2.0 * (x.numel() as f64 / d_in as f64) * (rank * d_out) as f64);
        let wanted = |tensor: &Tensor| f64::from(u8::from(graph && tensor.requires_grad()));
        // Whether the bottleneck A x has a gradient.
        let inner = f64::from(u8::from(graph && (x.requires_grad() || self.a.requires_grad())));
        (down + up, down * (wanted(x) + wanted(&self.a)) + up * (inner + wanted(&self.b)))
    }

    /// Number of students of a stack; `None` for a single adapter's pair.
    pub fn n_stacked(&self) -> Option<i64> {
        (self.a.dim() == 3).then(|| self.a.size()[0])
    }

    /// Returns `x`, `[tokens, width]`, as it is, or for a stack as `[students, tokens / students, width]`.
    pub(crate) fn by_student(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.n_stacked() {
            Some(n) => x.f_reshape([n, x.size()[0] / n, -1])?,
            None => x.shallow_clone(),
        })
    }

    /// y + s · B (g ⊙ A x), the second part in f32, or in f64 where `x` is; g is the dose. `x`: `[tokens, d_in]`; `y`
    /// and the result: `[tokens, d_out]`. Where the kinds allow, y is changed in place: another tensor of its size
    /// costs as much time as the products. The tokens belong to the students of a stack in order, equally many to each.
    pub(crate) fn add_to(
        &self,
        mut y: Tensor,
        x: &Tensor,
        dose: Dose<'_>,
        dropout: Option<&mut Dropout>,
    ) -> Result<Tensor> {
        let kind = y.kind();
        let (x, a, b) = self.widened(x, dropout)?;
        let bottleneck = self.by_student(&x)?.f_matmul(&a.f_transpose(-2, -1)?)?; // [tokens, rank], or [n, .., rank]
        let bottleneck = self.scaled(&bottleneck, dose, |doses| self.by_student(&doses.f_reshape([-1, 1])?))?;
        let b = b.f_transpose(-2, -1)?;
        if kind != bottleneck.kind() {
            let delta = bottleneck.f_matmul(&b)?.f_view(y.size().as_slice())?;
            return Ok(y.f_add(&delta)?.f_to_kind(kind)?);
        }
        if self.n_stacked().is_none() {
            return Ok(y.f_addmm_(&bottleneck, &b)?);
        }
        // If this were in place, autograd would copy the whole tensor, of which this is a view.
        Ok(self.by_student(&y)?.f_baddbmm(&bottleneck, &b, 1.0, 1.0)?.f_view(y.size().as_slice())?)
    }

    /// y + s · B (g ⊙ A x), separately for each head's part of `x`. `x`: `[batch, pos, n_heads, d_head]`; `y` and the
    /// result: `[batch, pos, n_heads, d_out]`. A stack is refused.
    pub(crate) fn add_by_head(
        &self,
        y: &Tensor,
        x: &Tensor,
        dose: Dose<'_>,
        dropout: Option<&mut Dropout>,
    ) -> Result<Tensor> {
        if let Some(n) = self.n_stacked() {
            return Err(no_stack("attn.hook_result", n));
        }
        let (x, a, b) = self.widened(x, dropout)?;
        let bottleneck = self.scaled(&by_head(&x, &a)?, dose, |doses| Ok(doses.f_unsqueeze(2)?))?; // [batch, pos, n_heads, rank]
        Ok(y.f_add(&bottleneck.f_matmul(&b.f_transpose(0, 1)?)?)?.f_to_kind(y.kind())?)
    }

    /// Returns `x` after dropout, A and B, in the precision that the adapter is computed in.
    fn widened(&self, x: &Tensor, dropout: Option<&mut Dropout>) -> Result<(Tensor, Tensor, Tensor)> {
        let x = x.f_to_kind(wide(x.kind()))?;
        let (a, b) = (self.a.f_to_kind(x.kind())?, self.b.f_to_kind(x.kind())?);
        let x = match dropout {
            Some(dropout) => dropout.apply(&x, self.n_stacked())?,
            None => x,
        };
        Ok((x, a, b))
    }

    /// s · g ⊙ A x, from the bottleneck A x; `shaped` reshapes the doses `[batch, pos, 1]` to fit it.
    fn scaled(
        &self,
        bottleneck: &Tensor,
        dose: Dose<'_>,
        shaped: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let bottleneck = bottleneck.f_mul_scalar(self.scaling)?;
        let bottleneck = match &self.scalings {
            None => bottleneck,
            Some(scalings) => bottleneck.f_mul(&scalings.f_to_kind(bottleneck.kind())?)?,
        };
        Ok(match dose {
            Dose::Uniform(1.0) => bottleneck,
            Dose::Uniform(dose) => bottleneck.f_mul_scalar(dose)?,
            Dose::Tokens(doses) => bottleneck.f_mul(&shaped(&doses.f_to_kind(bottleneck.kind())?)?)?,
        })
    }

    /// Whether ‖s · B · A‖ is finite in f32, for a pair that is not a stack's.
    pub(crate) fn has_finite_norm(&self) -> Result<bool> {
        let most = f64::from(f32::MAX);
        let norm = |factor: &Tensor| -> Result<f64> { Ok(factor.f_norm()?.f_double_value(&[])?) };
        let (a, b) = (norm(&self.a)?, norm(&self.b)?);
        // ‖BA‖ ≤ ‖B‖ ‖A‖. If all these bounds are finite, so is every intermediate value below.
        if [a * a, b * b, a * a * b * b, self.scaling * a * b].iter().all(|bound| *bound < most) {
            return Ok(true);
        }
        let (aa, bb) = (self.a.f_matmul(&self.a.f_transpose(0, 1)?)?, self.b.f_transpose(0, 1)?.f_matmul(&self.b)?);
        let square = aa.f_mul(&bb)?.f_sum(Kind::Double)?.f_double_value(&[])?;
        Ok(self.scaling * square.max(0.0).sqrt() < most && square.is_finite())
    }

    /// The weight change s · B · A, `[d_out, d_in]`. A stack has none.
    pub fn delta_weight(&self) -> Result<Tensor> {
        if let Some(n) = self.n_stacked() {
            return Err(no_stack("one weight change", n));
        }
        Ok(self.b.f_matmul(&self.a)?.f_mul_scalar(self.scaling)?)
    }
}

/// The error for something that is not possible with a stack of students.
pub(crate) fn no_stack(what: &str, n: i64) -> Error {
    Error::invalid(format!("the adapter of {what}"), "one student's", format!("a stack of {n}"))
}

/// A LoRA: pairs of A and B at some projections of some blocks.
#[derive(Debug)]
pub struct Adapter {
    /// Its settings.
    pub config: LoraConfig,
    /// Remarks on the files that the adapter was read from, a sentence each; empty for an adapter that was not read.
    pub remarks: Vec<String>,
    pairs: Vec<[Option<LoraPair>; 7]>,
}

impl Adapter {
    /// Makes a fresh adapter: A is uniform in `±1/√d_in` (Kaiming uniform with a = √5, as in PEFT). B is zero, so the
    /// adapter changes nothing.
    pub fn init(config: &LoraConfig, model: &Config, rng: &mut ChaCha8Rng, device: Device) -> Result<Self> {
        config.check(model)?;
        let scaling = config.scaling(config.rank, config.alpha);
        let mut adapter = Self::empty(config.clone(), model.n_layers);
        let is_meant = |layer: &usize| config.layers.as_ref().is_none_or(|layers| layers.contains(layer));
        for layer in (0..model.n_layers).filter(is_meant) {
            for proj in Proj::ALL.into_iter().filter(|proj| config.target_modules.contains(proj)) {
                let (d_in, d_out) = proj.widths(model);
                let bound = 1.0 / (d_in as f32).sqrt();
                let values: Vec<f32> = (0..config.rank * d_in).map(|_| rng.random_range(-bound..bound)).collect();
                let a = Tensor::f_from_slice(&values)?.f_view([config.rank, d_in])?.f_to_device(device)?;
                let b = Tensor::f_zeros([d_out, config.rank], (Kind::Float, device))?;
                adapter.set(layer, proj, LoraPair { a, b, scaling, scalings: None });
            }
        }
        Ok(adapter)
    }

    /// The adapter in other coordinates, with the same weight changes: each pair becomes R A and B Rᵀ, with a random
    /// orthogonal R `[rank, rank]`. This does not affect gradient descent, but it affects optimizers that scale each
    /// coordinate, such as Adam. A stack is refused.
    pub fn rotated(&self, rng: &mut ChaCha8Rng) -> Result<Self> {
        let mut rotated = Self::empty(self.config.clone(), self.n_layers());
        for (layer, proj, pair) in self.pairs() {
            if let Some(n) = pair.n_stacked() {
                return Err(no_stack("a rotation", n));
            }
            let rank = pair.a.size()[0];
            let drawn: Vec<f64> = (0..rank * rank).map(|_| rng.random_range(-1.0..1.0)).collect();
            let (r, _) = Tensor::f_linalg_qr(&Tensor::f_from_slice(&drawn)?.f_view([rank, rank])?, "reduced")?;
            let r = r.f_to_device(pair.a.device())?;
            let turned = |tensor: Tensor| tensor.f_to_kind(pair.a.kind());
            let a = turned(r.f_matmul(&pair.a.f_to_kind(Kind::Double)?)?)?;
            let b = turned(pair.b.f_to_kind(Kind::Double)?.f_matmul(&r.f_transpose(0, 1)?)?)?;
            rotated.set(layer, proj, LoraPair { a, b, scaling: pair.scaling, scalings: None });
        }
        Ok(rotated)
    }

    /// The same adapter with other values of its tensors, in the order and shapes of [`Self::parameters`], in any float
    /// dtype: another point of its training, or a step aside from it. A stack is refused.
    pub fn with_values(&self, values: &[Tensor]) -> Result<Self> {
        let own = self.parameters();
        let (expected, found): (Vec<_>, Vec<_>) =
            (own.iter().map(|(_, tensor)| tensor.size()).collect(), values.iter().map(Tensor::size).collect());
        if expected != found || self.n_stacked().is_some() {
            return Err(Error::invalid("an adapter's values", format!("{expected:?}"), format!("{found:?}")));
        }
        let mut other = Self::empty(self.config.clone(), self.n_layers());
        for ((layer, proj, pair), values) in self.pairs().zip(values.chunks(2)) {
            let (a, b) = (values[0].shallow_clone(), values[1].shallow_clone());
            other.set(layer, proj, LoraPair { a, b, scaling: pair.scaling, scalings: None });
        }
        Ok(other)
    }

    pub(crate) fn empty(config: LoraConfig, n_layers: usize) -> Self {
        Self { config, remarks: vec![], pairs: (0..n_layers).map(|_| [const { None }; 7]).collect() }
    }

    pub(crate) fn set(&mut self, layer: usize, proj: Proj, pair: LoraPair) {
        self.pairs[layer][proj as usize] = Some(pair);
    }

    /// Number of blocks of its model.
    pub fn n_layers(&self) -> usize {
        self.pairs.len()
    }

    /// The pair at a projection of a block.
    pub fn pair(&self, layer: usize, proj: Proj) -> Option<&LoraPair> {
        self.pairs.get(layer)?[proj as usize].as_ref()
    }

    /// Number of students of a stack; `None` for a single adapter.
    pub fn n_stacked(&self) -> Option<i64> {
        self.pairs().find_map(|(_, _, pair)| pair.n_stacked())
    }

    /// Whether the adapter changes nothing because A or B is zero in each of its pairs, as before its first training
    /// step.
    pub fn is_zero(&self) -> Result<bool> {
        let is_zero = |factor: &Tensor| -> Result<bool> { Ok(factor.f_count_nonzero(None)?.f_int64_value(&[])? == 0) };
        for (_, _, pair) in self.pairs() {
            if !(is_zero(&pair.b)? || is_zero(&pair.a)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Refuses a number of rows that the students of a stack cannot share equally.
    pub(crate) fn check_rows(&self, rows: i64) -> Result<()> {
        let Some(n) = self.n_stacked().filter(|n| rows % n != 0) else { return Ok(()) };
        let expected = format!("a multiple of {n}, equally many for each student of the stack");
        Err(Error::invalid("the number of rows", expected, rows))
    }

    /// Whether each student of a stack has equally many of the `places`, which are places among `tokens` tokens.
    pub(crate) fn shares(&self, places: &Tensor, tokens: i64) -> Result<bool> {
        let Some(n) = self.n_stacked() else { return Ok(true) };
        let mut each = vec![0; n as usize];
        for place in Vec::<i64>::try_from(places)? {
            each[(place * n / tokens) as usize] += 1;
        }
        Ok(each.windows(2).all(|two| two[0] == two[1]))
    }

    /// All pairs, each with its block and projection, block by block.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, Proj, &LoraPair)> {
        self.pairs.iter().enumerate().flat_map(|(layer, pairs)| {
            Proj::ALL.into_iter().filter_map(move |proj| Some((layer, proj, pairs[proj as usize].as_ref()?)))
        })
    }

    /// The tensors under PEFT's names, A before B, block by block. They share storage with the adapter.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.pairs()
            .flat_map(|(layer, proj, pair)| {
                let stem = format!("base_model.model.model.layers.{layer}.{}", proj.path());
                [
                    (format!("{stem}.lora_A.weight"), pair.a.shallow_clone()),
                    (format!("{stem}.lora_B.weight"), pair.b.shallow_clone()),
                ]
            })
            .collect()
    }
}

/// Dropout with a seeded random stream, independent of libtorch's.
#[derive(Debug)]
pub struct Dropout {
    probability: f64,
    rng: ChaCha8Rng,
}

impl Dropout {
    /// Drops each value with `probability`, drawing from `rng`.
    pub fn new(probability: f64, rng: ChaCha8Rng) -> Self {
        Self { probability, rng }
    }

    /// `x` with values dropped and the others scaled by 1/(1 − p), which keeps the expectation. A stack is refused: its
    /// students would share one random stream, so none would train as it does alone.
    fn apply(&mut self, x: &Tensor, n_stacked: Option<i64>) -> Result<Tensor> {
        if self.probability <= 0.0 {
            return Ok(x.shallow_clone());
        }
        if let Some(n) = n_stacked {
            return Err(Error::invalid(format!("the dropout of a stack of {n} students"), "0", self.probability)
                .with_hint("train those with dropout one by one"));
        }
        let kept = 1.0 / (1.0 - self.probability) as f32;
        let mask: Vec<f32> =
            (0..x.numel()).map(|_| if self.rng.random::<f64>() < self.probability { 0.0 } else { kept }).collect();
        Ok(x.f_mul(&Tensor::f_from_slice(&mask)?.f_view(x.size().as_slice())?.f_to_device(x.device())?)?)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn dropout_keeps_the_expectation() {
        let ones = Tensor::ones([100, 100], (Kind::Float, Device::Cpu));
        let dropped = Dropout::new(0.2, ChaCha8Rng::seed_from_u64(5)).apply(&ones, None).unwrap();
        let n_kept = dropped.count_nonzero(None).int64_value(&[]);
        assert!((7800..8200).contains(&n_kept), "{n_kept} of 10000, with a standard deviation of 40");
        assert!((dropped.max().double_value(&[]) - 1.25).abs() < 1e-6);
    }

    #[test]
    fn the_scaling_counts_in_what_f32_can_hold() {
        let is_finite = |size: f64, scaling: f64| {
            let full = |shape: [i64; 2]| Tensor::full(shape, size, (Kind::Float, Device::Cpu));
            LoraPair { a: full([1, 2]), b: full([2, 1]), scaling, scalings: None }.has_finite_norm().unwrap()
        };
        // ‖BA‖ is 2 · size².
        for (size, scaling, finite) in
            [(1.0, 1.0, true), (1e9, 1e19, true), (1e9, 1e25, false), (1e-9, 1e25, true), (1e15, 1e-9, false)]
        {
            assert_eq!(is_finite(size, scaling), finite, "{size} {scaling}");
        }
    }
}
