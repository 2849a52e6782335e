//! The gated MLP's product, `silu(pre) ⊙ linear`, and its gradient. On a CPU with bf16 weights each of the two is one loop
//! over the numbers, which also rounds the results. libtorch's operations, one after another, move four times as many
//! bytes.

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::mixed::is_recorded;
use crate::ops::of_kind;
use crate::threads;

/// `silu(pre) ⊙ linear`, `pre` and `linear`, all in a precision. Their shape is `[tokens, d_mlp]`.
pub(crate) fn product(pre: &Tensor, linear: &Tensor, kind: Kind) -> Result<[Tensor; 3]> {
    if is_for_a_loop(&[pre, linear], kind) {
        return rounded_product(pre, linear);
    }
    let post = pre.f_silu()?.f_mul_(linear)?;
    Ok([of_kind(&post, kind)?, of_kind(pre, kind)?, of_kind(linear, kind)?])
}

/// The gradients at `pre` and `linear`, in their precision, from that at the product, which is overwritten. `pre` and
/// `linear`: `[tokens, d_mlp]`; the gradients: `[tokens, d_mlp]` or `[losses, tokens, d_mlp]`.
pub(crate) fn backward(mut at_post: Tensor, pre: &Tensor, linear: &Tensor) -> Result<[Tensor; 2]> {
    let kind = pre.kind();
    if is_for_a_loop(&[&at_post], kind) {
        return rounded_backward(&at_post, pre, linear);
    }
    let (pre, linear) = (of_kind(pre, at_post.kind())?, of_kind(linear, at_post.kind())?);
    let at_linear = at_post.f_mul(&pre.f_silu()?)?;
    let at_silu = at_post.f_mul_(&linear)?;
    let at_pre = pre.f_silu_backward_grad_input(&at_silu, &at_silu)?; // in place
    Ok([of_kind(&at_pre, kind)?, of_kind(&at_linear, kind)?])
}

/// Whether some f32 numbers on a CPU are to be rounded to bf16, and autograd records none of them.
fn is_for_a_loop(numbers: &[&Tensor], kind: Kind) -> bool {
    let is = |x: &&Tensor| {
        x.kind() == Kind::Float && x.device() == Device::Cpu && x.numel() > 0 && !is_recorded(x) // none has no address
    };
    kind == Kind::BFloat16 && numbers.iter().all(is)
}

/// The numbers that a thread takes at once.
const PIECE: usize = 1 << 16;

fn rounded_product(pre: &Tensor, linear: &Tensor) -> Result<[Tensor; 3]> {
    let (pre, linear) = (pre.f_contiguous()?, linear.f_contiguous()?);
    let empty = || Tensor::f_empty(pre.size(), (Kind::BFloat16, pre.device()));
    let mut results = [empty()?, empty()?, empty()?];
    let [post, kept_pre, kept_linear] = results.each_mut().map(|result| numbers_mut(result).chunks_mut(PIECE));
    let inputs = numbers(&pre).chunks(PIECE).zip(numbers(&linear).chunks(PIECE));
    let pieces = inputs.zip(post.zip(kept_pre.zip(kept_linear))).collect();
    threads::each(pieces, |((pre, linear), (post, (kept_pre, kept_linear)))| {
        multiply(pre, linear, post, kept_pre, kept_linear);
    });
    Ok(results)
}

/// With σ = sigmoid(pre) the gradients are `at_post ⊙ linear ⊙ σ (1 + pre (1 − σ))` and `at_post ⊙ pre ⊙ σ`.
fn rounded_backward(at_post: &Tensor, pre: &Tensor, linear: &Tensor) -> Result<[Tensor; 2]> {
    let (at_post, pre, linear) = (at_post.f_contiguous()?, pre.f_contiguous()?, linear.f_contiguous()?);
    let empty = || Tensor::f_empty(at_post.size(), (Kind::BFloat16, at_post.device()));
    let mut results = [empty()?, empty()?];
    let n = pre.numel();
    let [at_pre, at_linear] = results.each_mut().map(|result| numbers_mut(result).chunks_mut(n));
    let mut pieces = vec![];
    for (at_post, (at_pre, at_linear)) in numbers::<f32>(&at_post).chunks(n).zip(at_pre.zip(at_linear)) {
        let inputs = numbers(&pre).chunks(PIECE).zip(numbers(&linear).chunks(PIECE));
        let gradients = at_post.chunks(PIECE).zip(at_pre.chunks_mut(PIECE).zip(at_linear.chunks_mut(PIECE)));
        pieces.extend(inputs.zip(gradients));
    }
    threads::each(pieces, |((pre, linear), (at_post, (at_pre, at_linear)))| {
        differentiate(at_post, pre, linear, at_pre, at_linear);
    });
    Ok(results)
}

/// Defines a loop over the numbers of slices. Where the processor has AVX2 it takes eight at once instead of four, with the
/// same results. The compiler needs a function for this: only of a function's arguments does it know that they do not
/// overlap.
macro_rules! vectorized {
    (fn $name:ident($($argument:ident: $of:ty),*) $body:block) => {
        fn $name($($argument: $of),*) {
            #[inline(always)]
            #[allow(clippy::inline_always, reason = "it is compiled anew with other instructions")]
            fn plain($($argument: $of),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn with_avx2($($argument: $of),*) {
                plain($($argument),*);
            }

            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2.
                #[expect(unsafe_code, reason = "a function with other instructions")]
                return unsafe { with_avx2($($argument),*) };
            }
            plain($($argument),*);
        }
    };
}

vectorized! {
    fn multiply(pre: &[f32], linear: &[f32], post: &mut [bf16], kept_pre: &mut [bf16], kept_linear: &mut [bf16]) {
        let kept = kept_pre.iter_mut().zip(kept_linear);
        for (((pre, linear), post), (kept_pre, kept_linear)) in pre.iter().zip(linear).zip(post).zip(kept) {
            *post = rounded(pre * sigmoid(*pre) * linear);
            (*kept_pre, *kept_linear) = (rounded(*pre), rounded(*linear));
        }
    }
}

vectorized! {
    fn differentiate(at_post: &[f32], pre: &[bf16], linear: &[bf16], at_pre: &mut [bf16], at_linear: &mut [bf16]) {
        let inputs = at_post.iter().zip(pre.iter().zip(linear));
        for ((at_post, (pre, linear)), (at_pre, at_linear)) in inputs.zip(at_pre.iter_mut().zip(at_linear)) {
            let (pre, linear) = (exact(*pre), exact(*linear));
            let sigmoid = sigmoid(pre);
            *at_pre = rounded(at_post * linear * sigmoid * (1.0 + pre * (1.0 - sigmoid)));
            *at_linear = rounded(at_post * pre * sigmoid);
        }
    }
}

#[inline]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// eˣ to a relative error of 2e-7, without a branch or a call, so that the compiler makes one instruction for many
/// numbers. With n the integer nearest to x / ln 2, it is 2ⁿ times the Taylor polynomial of x − n ln 2.
#[inline]
fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: a sum with it is rounded to an integer, which stands in its lowest bits.
    const INTEGER: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4]; // ln 2 as an exact sum; n times the first is exact
    let shifted = x.clamp(-87.0, 88.0) * std::f32::consts::LOG2_E + INTEGER;
    let n = shifted - INTEGER;
    let rest = x.clamp(-87.0, 88.0) - n * LN_2[0] - n * LN_2[1];
    let mut polynomial = 1.0 / 5040.0;
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        polynomial = polynomial * rest + 1.0 / factorial;
    }
    polynomial * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))
}

/// The nearest bf16 number, of two the even one.
#[inline]
fn rounded(x: f32) -> bf16 {
    let bits = x.to_bits();
    let nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { 0x7fc0 } else { nearest as u16 })
}

#[inline]
fn exact(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// A number as tensors hold it. (tch has such a trait, in which bf16 is of another kind.)
trait Number {
    const KIND: Kind;
}

impl Number for f32 {
    const KIND: Kind = Kind::Float;
}

impl Number for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// The numbers of a contiguous tensor on the CPU.
#[expect(unsafe_code, reason = "a tensor's memory has no type")]
fn numbers<T: Number>(tensor: &Tensor) -> &[T] {
    check::<T>(tensor);
    // SAFETY: checked; the tensor is borrowed for as long.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

#[expect(unsafe_code, reason = "a tensor's memory has no type")]
fn numbers_mut<T: Number>(tensor: &mut Tensor) -> &mut [T] {
    check::<T>(tensor);
    // SAFETY: checked; the tensor is borrowed for as long, and nothing else shares its memory.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

fn check<T: Number>(tensor: &Tensor) {
    assert_eq!((tensor.kind(), tensor.device()), (T::KIND, Device::Cpu), "the numbers of a tensor");
    assert!(tensor.is_contiguous(), "the numbers of a tensor");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_and_rounding_are_the_standard_ones() {
        for at in -88_000_i32..=88_000 {
            let x = at as f32 * 1e-3;
            let apart = f64::from(exp(x)) / f64::from(x.clamp(-87.0, 88.0)).exp() - 1.0;
            assert!(apart.abs() < 2e-7, "{x}: {apart:e}");
            for x in [x, exp(x), -exp(x) * 1.000_1] {
                assert_eq!(rounded(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
                assert_eq!(exact(rounded(x)).to_bits(), bf16::from_f32(x).to_f32().to_bits(), "{x}");
            }
        }
        for x in [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 0.0, -0.0, f32::MIN_POSITIVE] {
            assert_eq!(rounded(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(rounded(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
        assert!((sigmoid(f32::INFINITY) - 1.0).abs() + (sigmoid(0.0) - 0.5).abs() < 1e-7);
        assert!(sigmoid(f32::NEG_INFINITY) < 1e-37);
    }

    fn sines(shape: &[i64], step: f64, kind: Kind) -> Tensor {
        let n: i64 = shape.iter().product();
        ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * step).sin() * 6.0).view(shape).to_kind(kind)
    }

    /// Against autograd in f64, to half of bf16's spacing: in one piece and in several, with gradients of one loss and of
    /// two.
    #[test]
    fn product_and_gradient_are_autograds() {
        for (tokens, kind, bound) in [
            (0, Kind::BFloat16, 0.0),
            (3, Kind::BFloat16, 4e-3),
            (1100, Kind::BFloat16, 4e-3),
            (1100, Kind::Float, 1e-6),
        ] {
            for losses in [vec![], vec![2]] {
                let (pre, linear) = (sines(&[tokens, 100], 0.37, kind), sines(&[tokens, 100], 0.71, kind));
                if tokens == 0 {
                    let wide = |x: &Tensor| x.to_kind(Kind::Float);
                    assert_eq!(product(&wide(&pre), &wide(&linear), kind).unwrap()[0].size(), [0, 100]);
                    assert_eq!(backward(wide(&pre), &pre, &linear).unwrap()[1].size(), [0, 100]);
                    continue;
                }
                let shape: Vec<i64> = losses.into_iter().chain([tokens, 100]).collect();
                let at_post = sines(&shape, 1.3, Kind::Float);
                let [wide_pre, wide_linear] = [&pre, &linear].map(|x| x.to_kind(Kind::Double).set_requires_grad(true));
                let expected = wide_pre.silu() * &wide_linear;

                let found = product(&pre.to_kind(Kind::Float), &linear.to_kind(Kind::Float), kind).unwrap();
                let apart = |found: &Tensor, expected: &Tensor| {
                    assert_eq!((found.kind(), found.size()), (kind, expected.size()));
                    let scale = expected.abs().max().double_value(&[]);
                    (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]) / scale
                };
                assert!(apart(&found[0], &expected) < bound);
                assert!(found[1] == pre && found[2] == linear, "they were rounded already");

                let found = backward(at_post.copy(), &pre, &linear).unwrap();
                let losses = at_post.view([-1, tokens, 100]);
                for at in 0..losses.size()[0] {
                    let of_loss = (&expected * losses.get(at).to_kind(Kind::Double)).sum(Kind::Double);
                    let gradients = Tensor::run_backward(&[&of_loss], &[&wide_pre, &wide_linear], true, false);
                    for (found, expected) in found.iter().zip(gradients) {
                        let apart = apart(&found.view([-1, tokens, 100]).get(at), &expected);
                        assert!(apart < bound, "{tokens} {kind:?} {apart}");
                    }
                }
            }
        }
    }
}
