//! In which norm the error of a matrix is counted, and what that makes of the search for its factors.
//!
//! Data-free, every weight counts the same. Calibrated, an error counts by what it does to the activations that were
//! seen: for w1 and w3 [m, n] by the moment C [n, n] of their inputs (and a weight dᵢ per output), for w2 by the moment
//! O [m, m] of its outputs. Either is an eigenproblem of the hidden size H:
//!
//! | Form | Error | A [H, H] | Ŵ |
//! |---|---|---|---|
//! | [`Metric::Weights`] | ‖W − Ŵ‖² | WᵀW or W Wᵀ | W V Vᵀ or V Vᵀ W |
//! | [`Metric::Inputs`] | tr (W − Ŵ)ᵀ diag(d) (W − Ŵ) C̃ | SᵀWᵀdiag(d) W S, S Sᵀ = C̃ | W S V Vᵀ S⁺ |
//! | [`Metric::Outputs`] | tr (I − V Vᵀ) Õ | Õ | V Vᵀ W |
//!
//! V [H, r] are the first eigenvectors of A, and the eigenvalues beyond r sum to the error. d drops out of Ŵ.
//! A moment is *blended* with what a data-free run would use, at equal trace, so that a direction that was never seen
//! still counts: C̃ = (1 − b) C + b tr(C)/n I, Õ = (1 − b) O + b tr(O)/‖W‖² W Wᵀ.
//!
//! With a *map*, the factors approximate not W but W M or T W, fitted to inputs that are themselves changed by the
//! compression; see [`crate::fitted_map`].

use crate::SvdError;
use crate::inputs::Inputs;
use crate::outputs::Outputs;
use crate::root::MomentRoot;
use crate::survey::Survey;
use lowrank_model::MatrixShape;
use ndarray::{Array2, ArrayView2};

/// How the error of one matrix W [m, n] is counted.
///
/// Moments are positive semidefinite up to rounding, on any scale, and may be singular; of each only the lower triangle
/// is read. Where a moment or the row weights vanish (an expert that saw nothing), the metric is [`Metric::Weights`]:
/// spectrum, factors and errors are those of a data-free run.
#[derive(Debug, Clone, Copy)]
pub enum Metric<'a> {
    /// ‖W − Ŵ‖².
    Weights,
    /// tr (W − Ŵ)ᵀ diag(d) (W − Ŵ) C̃, the error of the outputs for the inputs that were seen.
    Inputs {
        /// C `[n, n]`: Σ x xᵀ of the inputs, each term weighted as the caller sees fit.
        moment: ArrayView2<'a, f64>,
        /// d ≥ 0 `[m]`: how much each output matters.
        rows: &'a [f64],
        /// b, in 0..=1: the share of the identity in C̃.
        blend: f64,
        /// M `[n, n]`: approximate W M instead of W.
        map: Option<ArrayView2<'a, f64>>,
        /// S of the same moment and blend, where [`crate::fitted_map`] made one: saves another.
        root: Option<&'a MomentRoot>,
    },
    /// tr (I − U Uᵀ) Õ where Ŵ = U Uᵀ W, the error of the outputs that were seen.
    Outputs {
        /// O `[m, m]`: Σ y yᵀ of the outputs y = W z.
        moment: ArrayView2<'a, f64>,
        /// b, in 0..=1: the share of W Wᵀ in Õ.
        blend: f64,
        /// T `[m, m]`: approximate T W instead of W.
        map: Option<ArrayView2<'a, f64>>,
    },
}

/// A metric that was checked against its matrix, brought to a scale of about 1.
pub(crate) enum Norm<'a> {
    Inputs(Inputs<'a>),
    Outputs(Outputs<'a>),
}

impl<'a> Metric<'a> {
    /// Absent where the weights themselves are the metric.
    pub(crate) fn norm(&self, survey: &Survey) -> Result<Option<Norm<'a>>, SvdError> {
        let shape = survey.shape;
        let norm = match *self {
            Self::Weights => None,
            Self::Inputs { moment, rows, blend, map, root } => {
                check_blend(blend)?;
                let (moment, mean) = unit_moment(moment, shape.cols, shape)?;
                let map = map.map(|map| checked("map", map, shape.cols, shape)).transpose()?;
                let largest = largest_row_weight(rows, shape)?;
                if let Some(root) = root {
                    root.check(shape.cols, shape)?;
                }
                moment.zip(largest).map(|(moment, largest)| {
                    Norm::Inputs(Inputs::new(moment, mean, rows, largest, blend, map, root))
                })
            }
            Self::Outputs { moment, blend, map } => {
                check_blend(blend)?;
                let (moment, mean) = unit_moment(moment, shape.rows, shape)?;
                let map = map.map(|map| checked("map", map, shape.rows, shape)).transpose()?;
                let moment = moment.filter(|_| survey.energy > 0.0);
                moment.map(|moment| Norm::Outputs(Outputs::new(moment, mean, blend, map, survey.energy)))
            }
        };
        Ok(norm)
    }
}

pub(crate) fn check_blend(blend: f64) -> Result<(), SvdError> {
    if (0.0..=1.0).contains(&blend) { Ok(()) } else { Err(SvdError::Blend { value: blend }) }
}

/// The largest of d; absent if all are zero.
fn largest_row_weight(rows: &[f64], shape: MatrixShape) -> Result<Option<f64>, SvdError> {
    if rows.len() != shape.rows {
        return Err(SvdError::RowWeights { values: rows.len(), shape });
    }
    if let Some((row, &value)) = rows.iter().enumerate().find(|(_, d)| !d.is_finite() || **d < 0.0) {
        return Err(SvdError::RowWeight { row, value });
    }
    let largest = rows.iter().copied().fold(0.0, f64::max);
    Ok(Some(largest).filter(|largest| largest.is_normal()))
}

/// A finite square matrix of the right size.
pub(crate) fn checked<'a>(
    what: &'static str,
    matrix: ArrayView2<'a, f64>,
    size: usize,
    shape: MatrixShape,
) -> Result<ArrayView2<'a, f64>, SvdError> {
    if matrix.dim() != (size, size) {
        let (rows, cols) = matrix.dim();
        return Err(SvdError::MetricShape { what, rows, cols, size, shape });
    }
    match matrix.indexed_iter().find(|(_, value)| !value.is_finite()) {
        Some(((row, col), &value)) => Err(SvdError::MetricNotFinite { what, row, col, value }),
        None => Ok(matrix),
    }
}

/// Both triangles of a moment over its mean eigenvalue, and that; absent if it vanishes.
pub(crate) fn unit_moment(
    moment: ArrayView2<'_, f64>,
    size: usize,
    shape: MatrixShape,
) -> Result<(Option<Array2<f64>>, f64), SvdError> {
    let what = "moment";
    if moment.dim() != (size, size) {
        let (rows, cols) = moment.dim();
        return Err(SvdError::MetricShape { what, rows, cols, size, shape });
    }
    let lower = Array2::from_shape_fn((size, size), |(i, j)| if j <= i { moment[[i, j]] } else { 0.0 });
    checked(what, lower.view(), size, shape)?;
    let mean = lower.diag().sum() / size as f64;
    if mean <= 0.0 || !mean.is_normal() {
        return Ok((None, mean));
    }
    let mut unit = lower / mean;
    mirror(&mut unit);
    Ok((Some(unit), mean))
}

/// Copies the lower triangle to the upper one.
pub(crate) fn mirror<T: Copy>(matrix: &mut Array2<T>) {
    for i in 0..matrix.nrows() {
        for j in 0..i {
            matrix[[j, i]] = matrix[[i, j]];
        }
    }
}
