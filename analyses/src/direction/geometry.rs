//! Lengths and cosines of directions, and the share of a set of them that is along one line.

use tch::{Kind, Tensor};

use crate::error::Result;

pub(crate) fn length(vector: &Tensor) -> Result<f64> {
    Ok(vector.f_to_kind(Kind::Double)?.f_norm()?.f_double_value(&[])?)
}

/// The cosine of two vectors; 0 if one of them is zero.
pub(crate) fn cosine(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.f_to_kind(Kind::Double)?, b.f_to_kind(Kind::Double)?);
    let lengths = length(&a)? * length(&b)?;
    Ok(if lengths > 0.0 { a.f_dot(&b)?.f_double_value(&[])? / lengths } else { 0.0 })
}

/// σ₁²/Σσ² of a matrix `[n, d]` as it is, uncentred: the squared singular values are the eigenvalues of its Gram
/// matrix.
pub(super) fn first_share(matrix: &Tensor) -> Result<f64> {
    let gram = matrix.f_matmul(&matrix.f_transpose(0, 1)?)?; // [n, n]
    let squares = gram.f_linalg_eigvalsh("L")?;
    let sum = squares.f_sum(None)?.f_double_value(&[])?;
    Ok(if sum > 0.0 { squares.f_max()?.f_double_value(&[])? / sum } else { 0.0 })
}

/// The share of the first principal component in the variance of the rows of a matrix `[n, d]`; `None` if nothing
/// varies, or if there are fewer than three rows: two are always on a line.
pub(super) fn principal_share(matrix: &Tensor) -> Result<Option<f64>> {
    let rows = matrix.f_to_kind(Kind::Double)?;
    let centred = rows.f_sub(&rows.f_mean_dim([0].as_slice(), true, Kind::Double)?)?;
    let share = first_share(&centred)?;
    Ok((rows.size()[0] > 2 && share > 0.0).then_some(share))
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn the_first_share_is_one_for_a_line_and_half_for_a_square() {
        let of = |values: &[f64]| first_share(&Tensor::from_slice(values).view([2, 2])).unwrap();
        assert!((of(&[1.0, 2.0, -3.0, -6.0]) - 1.0).abs() < 1e-12);
        assert!((of(&[1.0, 0.0, 0.0, 1.0]) - 0.5).abs() < 1e-12);
        assert_eq!(of(&[0.0; 4]), 0.0);
    }

    #[test]
    fn the_principal_share_is_that_of_the_variance_around_the_mean() {
        let of = |values: &[f64]| principal_share(&Tensor::from_slice(values).view([-1, 2])).unwrap();
        // Points around (10, 10), ±3 along x and ±1 along y: 18 of 20.
        let cross = [13.0, 10.0, 7.0, 10.0, 10.0, 11.0, 10.0, 9.0];
        assert!((of(&cross).unwrap() - 0.9).abs() < 1e-6, "{:?}", of(&cross));
        assert_eq!(of(&[1.0, 2.0, 3.0, 4.0]), None, "two rows always lie on a line");
        assert_eq!(of(&[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]), None, "nothing varies");
    }
}
