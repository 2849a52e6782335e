//! A model linearized at an adapter: from the tensors kept from one forward pass follow the tangent of the logits along
//! a direction of the adapter's tensors, and the gradient of any function of the logits.
//!
//! The tangent of an activation x is written dx. Below the first block where the adapter acts it is zero, which is
//! `None`.

use std::collections::BTreeMap;

use tch::Tensor;

use super::{
    At, Found, KeptAttention, KeptBlock, KeptLinear, KeptMlp, KeptPass, Lora, LoraAt, backward, few_columns, in_order,
};
use crate::adapter::dose::Doses;
use crate::adapter::lora::Adapter;
use crate::error::{Error, Result};
use crate::model::loss::Targets;
use crate::model::qwen::Qwen;
use crate::ops::{embedding, matmul, of_kind, wide};
use crate::profile::{self, Op, Stage};
use crate::proj::Proj;
use crate::rows::batch::Batch;

/// A direction: dA and dB of each pair.
type Along = BTreeMap<(usize, Proj), (Tensor, Tensor)>;

/// A model at the targets of a batch, as a function of an adapter's tensors θ, with its value and derivatives.
///
/// ```
/// use hooks::tch::{Device, Kind, Tensor};
/// use hooks::{Adapter, Batch, LoraConfig, ModelFiles, PackedRow, Qwen, Targets};
/// use rand::SeedableRng;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let model = Qwen::load(&ModelFiles::open("tiny-random")?, Device::Cpu, Kind::Double)?;
/// let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
/// let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut rng, Device::Cpu)?;
/// let row = [1, 2, 3, 4];
/// let batch = Batch::packed(&[&[PackedRow::of(&row[..3])]], true, Device::Cpu)?;
/// let targets = Targets::of(&batch, &[&row], &[&[false, false, true, true]])?;
///
/// // How much both targets' log-probabilities rise along a direction, to first order.
/// let along: Vec<Tensor> = adapter.parameters().iter().map(|(_, tensor)| tensor.ones_like()).collect();
/// let at = model.linearized(&batch, &targets, &adapter, None, None)?;
/// let probs = at.logits()?.softmax(-1, Kind::Double);
/// let tangent = at.tangent(&along)?; // [2, d_vocab]
/// let rise = &tangent - (&probs * &tangent).sum_dim_intlist(-1, true, Kind::Double);
/// assert_eq!(rise.size(), [2, model.config.d_vocab]);
/// # Ok(())
/// # }
/// ```
pub struct Linearized<'m> {
    model: &'m Qwen,
    adapter: &'m Adapter,
    kept: KeptPass<'m>,
    rows: Tensor, // of the places, [n]
    n_parts: Option<i64>,
}

impl Qwen {
    /// Linearizes the model at an adapter, by a forward pass over a packed batch. `doses` and `parts` are those of
    /// [`Self::lora_gradients`] and [`Self::lora_gradients_by_part`]. A stack is refused.
    pub fn linearized<'m>(
        &'m self,
        batch: &Batch,
        targets: &Targets,
        adapter: &'m Adapter,
        doses: Option<&Doses>,
        parts: Option<&Tensor>,
    ) -> Result<Linearized<'m>> {
        super::check_parts(batch, adapter, parts)?;
        tch::no_grad(|| {
            let lora = Lora { adapter: Some(adapter), doses, parts };
            let at = LoraAt::places(lora, &targets.places)?;
            let kept = KeptPass::forward(self, batch, &targets.places, lora, &at, None)?;
            let n_parts = parts.map(|parts| parts.size()[0]);
            Ok(Linearized { model: self, adapter, kept, rows: targets.rows.shallow_clone(), n_parts })
        })
    }
}

impl Linearized<'_> {
    /// The logits at each target, `[n, d_vocab]`.
    pub fn logits(&self) -> Result<Tensor> {
        tch::no_grad(|| {
            let _stage = profile::stage(Stage::Loss);
            self.model.logits(&embedding(&self.kept.normed, &self.rows)?)
        })
    }

    /// The tangent of the logits along a direction, `∂logits/∂θ · along`, `[n, d_vocab]`. `along`: shaped as the adapter's
    /// tensors, in the order of `Adapter::parameters`.
    pub fn tangent(&self, along: &[Tensor]) -> Result<Tensor> {
        let parameters = self.adapter.parameters();
        let fits = along.len() == parameters.len()
            && along.iter().zip(&parameters).all(|(along, (_, tensor))| along.size() == tensor.size());
        if !fits {
            let sizes = |tensors: Vec<Vec<i64>>| format!("{tensors:?}");
            return Err(Error::invalid(
                "the direction of a tangent",
                sizes(parameters.iter().map(|(_, tensor)| tensor.size()).collect()),
                sizes(along.iter().map(Tensor::size).collect()),
            ));
        }
        tch::no_grad(|| {
            let pairs = self.adapter.pairs().zip(along.chunks(2));
            let along: Along = pairs
                .map(|((layer, proj, _), two)| ((layer, proj), (two[0].shallow_clone(), two[1].shallow_clone())))
                .collect();
            let _stage = profile::stage(Stage::Forward);
            let mut resid = None;
            for block in &self.kept.blocks {
                resid = block.tangent(resid, &self.kept.tokens.at(block.is_last), &along)?;
            }
            let normed = match resid {
                Some(resid) => self.kept.ln_final.tangent(&resid)?,
                None => self.kept.normed.f_zeros_like()?,
            };
            self.model.logits(&of_kind(&embedding(&normed, &self.rows)?, self.kept.normed.kind())?)
        })
    }

    /// The gradient of a function f of the logits at the adapter's tensors, in the order of `Adapter::parameters`; with
    /// parts `[parts, ..]`. `at_logits`: ∂f/∂logits, `[n, d_vocab]`.
    pub fn gradients(self, at_logits: &Tensor) -> Result<Vec<Tensor>> {
        tch::no_grad(|| {
            let Self { model, adapter, kept, rows, n_parts } = self;
            let places = kept.normed.size()[0];
            let at_normed = {
                let _stage = profile::stage(Stage::Loss);
                let span = profile::op(Op::Head);
                let at_normed = matmul(&of_kind(at_logits, model.activation_kind())?, model.head())?;
                span.flops(|| Ok((2.0 * at_logits.numel() as f64 * model.config.d_model as f64, 0.0)))?;
                Tensor::f_embedding_dense_backward(&at_normed, &rows, places, -1, false)?
            };
            let at_top = kept.ln_final.backward(&at_normed)?;
            let mut found = Found::new();
            backward(kept.blocks.into_iter(), at_top, &kept.tokens, &mut found, &mut |_| ())?;
            in_order(found, adapter, n_parts)
        })
    }
}

/// The sum of two tangents.
fn sum(one: Option<Tensor>, other: Option<Tensor>) -> Result<Option<Tensor>> {
    match (one, other) {
        (Some(one), Some(other)) => Ok(Some(one.f_add(&other)?)),
        (one, other) => Ok(one.or(other)),
    }
}

impl KeptBlock<'_> {
    fn tangent(&self, resid: Option<Tensor>, at: &At<'_>, along: &Along) -> Result<Option<Tensor>> {
        let normed = resid.as_ref().map(|resid| self.ln1.tangent(resid)).transpose()?;
        let out = self.attention.tangent(normed.as_ref(), at, along)?;
        let resid = match (resid, at.places) {
            (Some(resid), Some(places)) => Some(embedding(&resid, places)?),
            (resid, _) => resid,
        };
        let resid = sum(resid, out)?;
        let normed = resid.as_ref().map(|resid| self.ln2.tangent(resid)).transpose()?;
        let out = self.mlp.tangent(normed.as_ref(), along)?;
        sum(resid, out)
    }
}

impl KeptAttention<'_> {
    fn tangent(&self, dx: Option<&Tensor>, at: &At<'_>, along: &Along) -> Result<Option<Tensor>> {
        let at_places = at.places.and_then(|places| dx.map(|dx| embedding(dx, places))).transpose()?;
        let dq = self.q.tangent(&self.x_of_q, at_places.as_ref().or(dx), along)?;
        let (dk, dv) = (self.k.tangent(&self.x, dx, along)?, self.v.tangent(&self.x, dx, along)?);
        let dz = if dq.is_some() || dk.is_some() || dv.is_some() {
            let or_zeros =
                |tangent: Option<Tensor>, of: &KeptLinear<'_>, x: &Tensor| tangent.map_or_else(|| of.zeros(x), Ok);
            let (dq, dk) = (or_zeros(dq, &self.q, &self.x_of_q)?, or_zeros(dk, &self.k, &self.x)?);
            Some(self.mix.tangent([&dq, &dk, &or_zeros(dv, &self.v, &self.x)?], at.around)?)
        } else {
            None
        };
        self.o.tangent(&self.z, dz.as_ref(), along)
    }
}

impl KeptMlp<'_> {
    /// `d(silu(pre) ⊙ linear) = silu'(pre) ⊙ dpre ⊙ linear + silu(pre) ⊙ dlinear`.
    fn tangent(&self, dx: Option<&Tensor>, along: &Along) -> Result<Option<Tensor>> {
        let (gate, up) = (self.gate.tangent(&self.x, dx, along)?, self.up.tangent(&self.x, dx, along)?);
        let kind = wide(self.pre.kind());
        let (pre, linear) = (of_kind(&self.pre, kind)?, of_kind(&self.linear, kind)?);
        let by_gate = gate.map(|gate| pre.f_silu_backward(&gate.f_mul(&linear)?)).transpose()?;
        let by_up = up.map(|up| up.f_mul(&pre.f_silu()?)).transpose()?;
        self.down.tangent(&self.post, sum(by_gate, by_up)?.as_ref(), along)
    }
}

impl KeptLinear<'_> {
    /// `dy = W dx + B d(sg A x) + dB sg A x`, where `d(A x) = A dx + dA x`. `x`: the input.
    fn tangent(&self, x: &Tensor, dx: Option<&Tensor>, along: &Along) -> Result<Option<Tensor>> {
        let (weight, kind) = (&self.linear.weight, wide(x.kind()));
        let dy = match dx {
            Some(dx) => {
                let span = profile::op(Op::Projections);
                let dy = of_kind(&matmul(&of_kind(dx, weight.kind())?, &weight.f_transpose(0, 1)?)?, kind)?;
                span.flops(|| profile::product(dx, weight, false))?;
                Some(dy)
            }
            None => None,
        };
        let of_pair = self.acting.as_ref().zip(along.get(&(self.linear.layer, self.linear.proj)));
        let Some(((acting, bottleneck), (da, db))) = of_pair else { return Ok(dy) };
        let _span = profile::op(Op::Lora);
        let wider = |tensor: &Tensor| of_kind(tensor, kind);
        let mut inner = few_columns(&wider(x)?, &wider(da)?.f_transpose(0, 1)?)?;
        if let Some(dx) = dx {
            inner = inner.f_add(&few_columns(dx, &wider(&acting.pair.a)?.f_transpose(0, 1)?)?)?;
        }
        // Both products in one.
        let inner = Tensor::f_cat(&[acting.scale(inner)?, wider(bottleneck)?], 1)?; // [tokens, 2 · rank]
        let outer = Tensor::f_cat(&[wider(&acting.pair.b)?, wider(db)?], 1)?.f_transpose(0, 1)?;
        Ok(Some(match dy {
            Some(mut dy) => dy.f_addmm_(&inner, &outer)?,
            None => inner.f_matmul(&outer)?,
        }))
    }

    /// A tangent that is zero, `[tokens, d_out]`.
    fn zeros(&self, x: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_zeros([x.size()[0], self.linear.weight.size()[0]], (wide(x.kind()), x.device()))?)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::super::tests::{adapter, case, configs, gates, model};
    use super::*;
    use crate::adapter::lora::LoraConfig;
    use crate::config::Family;

    /// Numbers that differ, in the shapes of an adapter's tensors.
    fn direction(adapter: &Adapter) -> Vec<Tensor> {
        let of = |(at, (_, tensor)): (usize, (String, Tensor))| {
            let n = tensor.numel() as i64;
            let numbers = (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 1.7 + at as f64).sin();
            numbers.view_as(&tensor).to_kind(tensor.kind())
        };
        adapter.parameters().into_iter().enumerate().map(of).collect()
    }

    fn dot(one: &Tensor, other: &Tensor) -> f64 {
        (one.to_kind(Kind::Double) * other.to_kind(Kind::Double)).sum(Kind::Double).double_value(&[])
    }

    /// The tangent is the difference quotient, and the map of tangents is the transpose of that of gradients: `u · (J v) =
    /// (Jᵀ u) · v`.
    #[test]
    fn the_tangent_is_the_difference_quotient_and_the_gradients_transpose() {
        let configs = configs();
        for family in [Family::Qwen2, Family::Qwen3] {
            let model = model(family, Kind::Double);
            for (seed, config) in configs.iter().enumerate() {
                let adapter = adapter(&model, config, seed as u64);
                let along = direction(&adapter);
                let gates = gates();
                let gates = gates.iter().filter(|_| seed == 0).map(|gate| Some(&**gate)).chain([None]);
                for gate in gates {
                    let of = case(&model, 1, gate);
                    let at = |adapter: &'_ Adapter| {
                        let at = model.linearized(&of.batch, &of.targets, adapter, of.doses.as_ref(), None).unwrap();
                        at.logits().unwrap()
                    };
                    let here = model.linearized(&of.batch, &of.targets, &adapter, of.doses.as_ref(), None).unwrap();
                    let tangent = here.tangent(&along).unwrap();
                    let moved = |by: f64| {
                        let values = adapter.parameters().into_iter().zip(&along);
                        let values: Vec<Tensor> = values.map(|((_, value), along)| value + by * along).collect();
                        at(&adapter.with_values(&values).unwrap())
                    };
                    let quotient = (moved(2e-6) - moved(-2e-6)) / 4e-6;
                    let most = quotient.abs().max().double_value(&[]);
                    let apart = (&tangent - &quotient).abs().max().double_value(&[]);
                    assert!(most > 1e-2 && apart < 1e-7 * most, "{family:?} {config:?}: {apart} of {most}");

                    let u = (Tensor::arange(tangent.numel() as i64, (Kind::Double, Device::Cpu)) * 0.3).cos();
                    let u = u.view_as(&tangent);
                    let gradients = here.gradients(&u).unwrap();
                    let transposed: f64 = gradients.iter().zip(&along).map(|(gradient, v)| dot(gradient, v)).sum();
                    let plain = dot(&u, &tangent);
                    assert!(
                        plain.abs() > 1e-2 && (plain - transposed).abs() < 1e-11 * most * 100.0,
                        "{plain} {transposed}"
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_of_a_loss_are_those_of_its_targets() {
        let model = model(Family::Qwen2, Kind::Double);
        let adapter = adapter(&model, &LoraConfig::default(), 1);
        let of = case(&model, 1, None);
        let (_, expected) = model.lora_gradients(&of.batch, &of.targets, &of.weights, &adapter, None).unwrap();
        let at = model.linearized(&of.batch, &of.targets, &adapter, None, None).unwrap();
        let at_logits = of.targets.labels.gradient(&at.logits().unwrap().softmax(-1, Kind::Double)).unwrap();
        let found = at.gradients(&(at_logits * of.weights.unsqueeze(1))).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs().max().double_value(&[]) < 1e-12);
        }
    }

    /// In f32 and bf16 models the tangent is that of the f64 model, but for rounding.
    #[test]
    fn in_other_precisions_it_is_the_same_tangent() {
        let exact = model(Family::Qwen2, Kind::Double);
        let drawn = adapter(&model(Family::Qwen2, Kind::Float), &LoraConfig::default(), 3);
        let of = |model: &Qwen, adapter: &Adapter| {
            let of = case(model, 1, None);
            let at = model.linearized(&of.batch, &of.targets, adapter, None, None).unwrap();
            at.tangent(&direction(adapter)).unwrap().to_kind(Kind::Double)
        };
        let expected = of(&exact, &crate::laws::model_laws::exact(&drawn));
        let most = expected.abs().max().double_value(&[]);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
            let apart = (of(&model(Family::Qwen2, kind), &drawn) - &expected).abs().max().double_value(&[]);
            assert!(apart < tolerance * most, "{kind:?}: {apart} of {most}");
        }
    }

    #[test]
    fn a_direction_of_another_shape_is_refused() {
        let model = model(Family::Qwen2, Kind::Float);
        let adapter = adapter(&model, &LoraConfig::default(), 1);
        let of = case(&model, 1, None);
        let at = model.linearized(&of.batch, &of.targets, &adapter, None, None).unwrap();
        let error = at.tangent(&direction(&adapter)[1..]).unwrap_err().to_string();
        assert!(error.contains("the direction of a tangent"), "{error}");
    }
}
