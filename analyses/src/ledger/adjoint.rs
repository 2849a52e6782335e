//! The direction along which a step's gradient moved the measure: the adjoint of the optimizer's averages, gathered
//! backwards in time.
//!
//! With θ ← θ − η D ∘ m a measure f changes by `Σ_t G_t · Δθ_t`, where G is the gradient of f. Since m is an average of
//! earlier gradients g, that is also `−Σ_s a_s · g_s`. Counting steps from 0, for Adam `M_s = η_s/(1 − β^{s+1}) D_s ∘ G_s +
//! β M_{s+1}` and `a_s = (1 − β) M_s`; for SGD `M_s = η_s D_s ∘ G_s + μ M_{s+1}` and `a_s = M_s`.

use tch::{Kind, Tensor};

use super::path::{Average, Step};
use crate::error::Result;

/// M, split by the part at which the measure reads: `[part, ..]` of each of the adapter's tensors.
#[derive(Default)]
pub(super) struct Adjoint {
    sums: Vec<Tensor>,
}

impl Adjoint {
    /// Goes back over a step. `gradient`: G, `[part, ..]`; `at`: the step's index. Returns a, `[part, ..]`.
    pub(super) fn back(
        &mut self,
        gradient: Option<&[Tensor]>,
        step: &Step,
        at: usize,
        average: Average,
    ) -> Result<Vec<Tensor>> {
        let (past, rate, share) = match average {
            Average::Corrected(beta) => (beta, step.learning_rate / (1.0 - beta.powi(at as i32 + 1)), 1.0 - beta),
            Average::Sum(momentum) => (momentum, step.learning_rate, 1.0),
        };
        for sum in &mut self.sums {
            let _ = sum.f_mul_scalar_(past)?;
        }
        if let Some(gradient) = gradient {
            for (tensor, gradient) in gradient.iter().enumerate() {
                let mut own = gradient.f_mul_scalar(rate)?;
                if let Some(scales) = &step.scales {
                    let _ = own.f_mul_(&scales[tensor].f_to_kind(own.kind())?.f_unsqueeze(0)?)?;
                }
                match self.sums.get_mut(tensor) {
                    Some(sum) => drop(sum.f_add_(&own)?),
                    None => self.sums.push(own),
                }
            }
        }
        Ok(self.sums.iter().map(|sum| sum.f_mul_scalar(share)).collect::<std::result::Result<_, _>>()?)
    }
}

/// The sum over parts, shaped as the adapter's tensors.
pub(super) fn whole(parts: &[Tensor]) -> Result<Vec<Tensor>> {
    parts.iter().map(|parts| Ok(parts.f_sum_dim_intlist([0].as_slice(), false, parts.kind())?)).collect()
}

/// Σ a · b.
pub(super) fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let product = |(a, b): (&Tensor, &Tensor)| -> Result<f64> {
        Ok(a.f_to_kind(Kind::Double)?.f_mul(&b.f_to_kind(Kind::Double)?)?.f_sum(Kind::Double)?.f_double_value(&[])?)
    };
    a.iter().zip(b).map(product).sum()
}
