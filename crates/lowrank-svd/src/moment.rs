//! Second moments of activations as they come from outside: checked, symmetric, on a scale of 1.

use crate::error::SvdError;
use lowrank_compute::mirror_lower;
use lowrank_model::MatrixShape;
use ndarray::{Array2, ArrayView2};

/// A second moment over its mean eigenvalue.
pub(crate) struct UnitMoment {
    /// Both triangles.
    pub(crate) matrix: Array2<f64>,
    /// What it was divided by.
    pub(crate) mean: f64,
}

impl UnitMoment {
    /// From a matrix of which the lower triangle is read; absent if it vanishes.
    pub(crate) fn new(
        moment: ArrayView2<'_, f64>,
        size: usize,
        shape: MatrixShape,
    ) -> Result<Option<Self>, SvdError> {
        let Some(mean) = check_moment(moment, size, shape)? else { return Ok(None) };
        let of_lower = |(i, j)| if j <= i { moment[[i, j]] / mean } else { 0.0 };
        let mut matrix = Array2::from_shape_fn((size, size), of_lower);
        mirror_lower(&mut matrix);
        Ok(Some(Self { matrix, mean }))
    }
}

/// The mean eigenvalue of a matrix of which the lower triangle is read; absent if it vanishes. Refuses what is of another size
/// or not finite.
pub(crate) fn check_moment(
    moment: ArrayView2<'_, f64>,
    size: usize,
    shape: MatrixShape,
) -> Result<Option<f64>, SvdError> {
    let what = "moment";
    check_size(what, moment, size, shape)?;
    for (row, values) in moment.rows().into_iter().enumerate() {
        if let Some((col, &value)) =
            values.iter().take(row + 1).enumerate().find(|(_, value)| !value.is_finite())
        {
            return Err(SvdError::MetricNotFinite { what, row, col, value });
        }
    }
    let mean = moment.diag().sum() / size as f64;
    Ok(Some(mean).filter(|mean| *mean > 0.0 && mean.is_normal()))
}

pub(crate) fn check_shrinkage(shrinkage: f64) -> Result<(), SvdError> {
    if (0.0..=1.0).contains(&shrinkage) { Ok(()) } else { Err(SvdError::Blend { value: shrinkage }) }
}

pub(crate) fn check_ridge(ridge: f64) -> Result<(), SvdError> {
    if ridge.is_finite() && ridge >= 0.0 { Ok(()) } else { Err(SvdError::Ridge { value: ridge }) }
}

/// Refuses what is not square, of another size or not finite.
pub(crate) fn check_square(
    what: &'static str,
    matrix: ArrayView2<'_, f64>,
    size: usize,
    shape: MatrixShape,
) -> Result<(), SvdError> {
    check_size(what, matrix, size, shape)?;
    match matrix.indexed_iter().find(|(_, value)| !value.is_finite()) {
        Some(((row, col), &value)) => Err(SvdError::MetricNotFinite { what, row, col, value }),
        None => Ok(()),
    }
}

fn check_size(
    what: &'static str,
    matrix: ArrayView2<'_, f64>,
    size: usize,
    shape: MatrixShape,
) -> Result<(), SvdError> {
    let (rows, cols) = matrix.dim();
    if (rows, cols) == (size, size) {
        return Ok(());
    }
    Err(SvdError::MetricShape { what, rows, cols, size, shape })
}
