//! Products of bf16 numbers with sums in f32, on a CPU. libtorch rounds such sums to bf16, so MKL's own function is
//! called. Where MKL is missing, or where autograd records, libtorch multiplies.

use std::ffi::{c_float, c_int, c_void};
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use crate::device::symbol;
use crate::error::{Error, Result};

/// Whether a product with `tensor` is one of this file: on a CPU, if the tensor is bf16.
pub(crate) fn is_meant(tensor: &Tensor) -> bool {
    tensor.kind() == Kind::BFloat16 && tensor.device() == Device::Cpu
}

/// `x z` in f32, both rounded to bf16 if they are not. `x`: `[m, k]` or `[n, m, k]`, `z`: `[k, o]` or `[n, k, o]`; the
/// result is `[m, o]`, or `[n, m, o]` if one of them has that dimension.
pub(crate) fn matmul(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    let shape = [x, z].into_iter().find(|tensor| tensor.dim() == 3).map(|tensor| tensor.size()[0]);
    let size = |tensor: &Tensor, from_end: usize| tensor.size()[tensor.dim() - from_end];
    let shape: Vec<i64> = shape.into_iter().chain([size(x, 2), size(z, 1)]).collect();
    let (x, z) = (rounded(x)?, rounded(z)?);
    let Some(gemm) = gemm_for(&[&x, &z]) else { return Ok(x.f_matmul(&z)?.f_to_kind(Kind::Float)?) };
    let y = Tensor::f_empty(shape.as_slice(), (Kind::Float, x.device()))?;
    gemm.of_each(&y, &x, &z, false)?;
    Ok(y)
}

/// Adds `x z` to `y`, in place. `y`: f32, contiguous; the shapes are those of [`matmul`].
pub(crate) fn add_matmul(y: &mut Tensor, x: &Tensor, z: &Tensor) -> Result<()> {
    let (x, z) = (rounded(x)?, rounded(z)?);
    if let Some(gemm) = gemm_for(&[y, &x, &z]) {
        return gemm.of_each(y, &x, &z, true);
    }
    let _ = y.f_add_(&matmul(&x, &z)?)?;
    Ok(())
}

fn rounded(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(Kind::BFloat16)?)
}

/// MKL's function, if the process has it and autograd records none of the tensors.
fn gemm_for(tensors: &[&Tensor]) -> Option<Gemm> {
    static FOUND: OnceLock<Option<Gemm>> = OnceLock::new();
    FOUND.get_or_init(Gemm::find).filter(|_| !tensors.iter().any(|tensor| is_recorded(tensor)))
}

/// Whether autograd records what is done with a tensor. Without it, as in `no_grad`, an alias asks for no gradient.
pub(crate) fn is_recorded(tensor: &Tensor) -> bool {
    tensor.requires_grad() && tensor.alias().requires_grad()
}

type Cblas = unsafe extern "C" fn(
    layout: c_int,
    transpose_a: c_int,
    transpose_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: c_float,
    a: *const c_void,
    lda: c_int,
    b: *const c_void,
    ldb: c_int,
    beta: c_float,
    c: *mut c_void,
    ldc: c_int,
);

/// `cblas_gemm_bf16bf16f32`: C = A B + β C, with A and B in bf16 and C in f32.
#[derive(Clone, Copy)]
struct Gemm(Cblas);

impl Gemm {
    #[expect(unsafe_code, reason = "a symbol has no type")]
    fn find() -> Option<Self> {
        let found = symbol(c"cblas_gemm_bf16bf16f32")?;
        // SAFETY: the symbol is MKL's, whose interface with 32-bit integers libtorch contains.
        Some(Self(unsafe { std::mem::transmute::<*mut c_void, Cblas>(found) }))
    }

    /// Sets y, or adds to it, one matrix after another.
    fn of_each(self, y: &Tensor, x: &Tensor, z: &Tensor, add: bool) -> Result<()> {
        if y.dim() == 2 {
            return self.run(y, x, z, add);
        }
        let part = |tensor: &Tensor, at| if tensor.dim() == 3 { tensor.f_get(at) } else { Ok(tensor.shallow_clone()) };
        (0..y.size()[0]).try_for_each(|at| self.run(&part(y, at)?, &part(x, at)?, &part(z, at)?, add))
    }

    /// Sets y, or adds to it. `y`: `[m, o]`, f32, contiguous; `x`: `[m, k]`, `z`: `[k, o]`, bf16.
    #[expect(unsafe_code, reason = "MKL's interface has pointers")]
    fn run(self, y: &Tensor, x: &Tensor, z: &Tensor, add: bool) -> Result<()> {
        const ROW_MAJOR: c_int = 101;
        let ((m, k), (_, o)) = (x.size2()?, z.size2()?);
        let is_bf16 = [x, z].iter().all(|tensor| tensor.kind() == Kind::BFloat16);
        assert!(is_bf16 && y.kind() == Kind::Float && y.is_contiguous(), "a product of other tensors");
        assert_eq!((y.size2()?, z.size()[0]), ((m, o), k), "the shapes of a product");
        if m == 0 || o == 0 {
            return Ok(());
        }
        let int = |size: i64| c_int::try_from(size).map_err(|_| Error::invalid("a product's size", "below 2³¹", size));
        let ((transpose_x, ldx, x), (transpose_z, ldz, z)) = (laid_out(x)?, laid_out(z)?);
        let (m, o, k, ldx, ldz) = (int(m)?, int(o)?, int(k)?, int(ldx)?, int(ldz)?);
        let beta = if add { 1.0 } else { 0.0 };
        // SAFETY: the tensors have the kinds, shapes and strides that were checked, and outlive the call.
        unsafe {
            (self.0)(
                ROW_MAJOR,
                transpose_x,
                transpose_z,
                m,
                o,
                k,
                1.0,
                x.data_ptr(),
                ldx,
                z.data_ptr(),
                ldz,
                beta,
                y.data_ptr(),
                o,
            );
        }
        Ok(())
    }
}

/// How MKL reads a matrix: transposed or not, the numbers between the beginnings of two lines, and the matrix, copied if
/// its strides are of neither kind.
fn laid_out(matrix: &Tensor) -> Result<(c_int, i64, Tensor)> {
    const NO_TRANSPOSE: c_int = 111;
    const TRANSPOSE: c_int = 112;
    let ((rows, columns), strides) = (matrix.size2()?, matrix.stride());
    Ok(if strides[1] == 1 && strides[0] >= columns {
        (NO_TRANSPOSE, strides[0].max(1), matrix.shallow_clone())
    } else if strides[0] == 1 && strides[1] >= rows {
        (TRANSPOSE, strides[1].max(1), matrix.shallow_clone())
    } else {
        (NO_TRANSPOSE, columns.max(1), matrix.f_contiguous()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(shape: &[i64], step: f64, kind: Kind) -> Tensor {
        let n: i64 = shape.iter().product();
        (Tensor::arange(n, (Kind::Double, Device::Cpu)) * step).sin().view(shape).to_kind(kind)
    }

    fn apart(found: &Tensor, expected: &Tensor) -> f64 {
        assert_eq!(found.size(), expected.size());
        (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[])
    }

    /// What the product of the rounded numbers is in f64, and how far f32 sums may be from it. Sums that are rounded to
    /// bf16 would be 1e-2 away.
    fn exact(x: &Tensor, z: &Tensor) -> (Tensor, f64) {
        let wide = |tensor: &Tensor| tensor.to_kind(Kind::BFloat16).to_kind(Kind::Double);
        let has_mkl = Gemm::find().is_some();
        assert_eq!(has_mkl, cfg!(all(target_arch = "x86_64", target_os = "linux")), "MKL's product of bf16");
        (wide(x).matmul(&wide(z)), if has_mkl { 2e-5 } else { 0.1 })
    }

    #[test]
    fn sums_of_rounded_numbers_stay_f32() {
        let (x, w) = (numbers(&[37, 96], 0.37, Kind::Float), numbers(&[80, 96], 1.3, Kind::BFloat16));
        let z = w.transpose(0, 1);
        let (expected, bound) = exact(&x, &z);
        let mut y = matmul(&x, &z).unwrap();
        assert!(apart(&y, &expected) < bound);
        add_matmul(&mut y, &x, &z).unwrap();
        assert!(apart(&y, &(&expected * 2.0)) < bound);

        // All layouts of both sides, and columns out of a wider matrix.
        let wider = numbers(&[37, 3 * 96], 0.71, Kind::BFloat16);
        for x in
            [wider.narrow(1, 96, 96), wider.view([96, 111]).transpose(0, 1).narrow(0, 5, 37), wider.slice(1, 0, 288, 3)]
        {
            for z in [z.shallow_clone(), z.contiguous()] {
                let (expected, bound) = exact(&x, &z);
                assert!(apart(&matmul(&x, &z).unwrap(), &expected) < bound);
            }
        }
    }

    #[test]
    fn several_products_are_each_alone() {
        let (x, z) = (numbers(&[3, 7, 16], 0.37, Kind::BFloat16), numbers(&[3, 16, 5], 1.3, Kind::Float));
        for (x, z) in [(&x, &z), (&x, &z.get(1)), (&x.get(1), &z)] {
            let (expected, bound) = exact(x, z);
            assert!(apart(&matmul(x, z).unwrap(), &expected) < bound);
        }
        assert_eq!(matmul(&x.narrow(1, 0, 0), &z).unwrap().size(), [3, 0, 5]);
    }

    #[test]
    fn a_recorded_product_has_gradients() {
        let x = numbers(&[5, 96], 0.37, Kind::Float).set_requires_grad(true);
        let w = numbers(&[80, 96], 1.3, Kind::BFloat16);
        let y = matmul(&x, &w.transpose(0, 1)).unwrap();
        assert_eq!(y.kind(), Kind::Float);
        y.sum(Kind::Float).backward();
        let expected = w.to_kind(Kind::Double).sum_dim_intlist(0, false, Kind::Double).expand([5, 96], false);
        assert!(apart(&x.grad(), &expected) < 0.05);
        let plain = tch::no_grad(|| matmul(&x, &w.transpose(0, 1))).unwrap();
        let apart = apart(&plain, &y.to_kind(Kind::Double));
        assert!(0.0 < apart && apart < 0.05, "autograd's sums are rounded: {apart}");
    }
}
