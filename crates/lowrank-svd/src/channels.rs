//! Widths: which of an expert's F channels to keep, the error of every width, and w2 fitted to the channels that stay.
//!
//! An expert is y = W₂ h, h = silu(W₁ x) ∘ W₃ x. Keeping the channels S, |S| = k, drops the other rows of W₁ and W₃ and the
//! other columns of W₂; what stays of W₂ takes over what the dropped ones did. C = Σ g² h hᵀ [F, F] is the second moment of
//! the activations over the expert's routed tokens, g the router weight, and C ← C + ridge · mean(diag C) · I.
//!
//! - **Order.** The error grows by ‖W₂[:, i]‖² / [C⁻¹]ᵢᵢ if channel i alone goes (optimal brain surgeon: Hassibi and Stork,
//!   1993). This is computed for all channels, then again for the better half with W₂ fitted to it, and so on: each stage
//!   costs an eighth of the one before.
//! - **Error of every width.** In that order, with C = L Lᵀ, the first k channels miss Σ_{j≥k} ‖(W₂ L)[:, j]‖².
//! - **Refit.** min over W of Σ g² ‖W₂ h − W h_S‖² is W = W₂ C[:, S] C[S, S]⁻¹ = (W₂ L)[:, :k] · L⁻¹[:k, :k]: no further
//!   factorisation for any width.
//! - **Outputs.** The second moment of what is left, W C[S, S] Wᵀ, is (W₂ L)[:, :k] (W₂ L)[:, :k]ᵀ.
//!
//! Measured in `docs/research/widths.md`.

use crate::error::SvdError;
use crate::linalg::product;
use crate::moment::{UnitMoment, check_ridge};
use crate::stats::weight_stats;
use lowrank_compute::blocks::{for_each_block, matrix_shape};
use lowrank_compute::{Backend, Cholesky, Kernels, Side};
use lowrank_model::{MatrixShape, Tensor};
use ndarray::{Array2, ArrayView2, Axis, s};

/// Stages of the order; the last one compares a sixteenth of the channels.
const STAGES: usize = 4;

/// An expert's channels by falling importance, with what is needed to keep any number of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Channels {
    order: Vec<usize>,
    errors: Vec<f64>,
    /// W₂ L [H, F], channels in `order`, in the units of the second moment.
    outputs: Array2<f64>,
    /// L⁻¹ [F, F], likewise.
    inverse: Array2<f64>,
    has_moment: bool,
}

impl Channels {
    /// From w2 [H, F] and the second moment of the activations [F, F], of which the lower triangle is read and which may be
    /// singular. If it vanishes, the identity takes its place: see [`Channels::has_moment`].
    ///
    /// `ridge` is in mean diagonal elements. At least F²·ε is added, so that a singular second moment has a Cholesky factor.
    ///
    /// # Errors
    /// A matrix has another shape or is not finite, the ridge is negative or not finite, or rounding finds the second moment
    /// plus ridge indefinite, as it does if the given matrix is not positive semidefinite.
    pub fn new(
        backend: &dyn Backend,
        w2: &Tensor,
        second_moment: ArrayView2<'_, f64>,
        ridge: f64,
    ) -> Result<Self, SvdError> {
        check_ridge(ridge)?;
        weight_stats(w2)?;
        let kernels: &dyn Kernels<f64> = backend;
        let shape = matrix_shape(w2);
        let size = shape.cols;
        let moment = UnitMoment::new(second_moment, size, shape)?;
        let has_moment = moment.is_some();
        let (mut moment, mean) =
            moment.map_or_else(|| (Array2::eye(size), 1.0), |unit| (unit.matrix, unit.mean));
        let floor = (size * size) as f64 * f64::EPSILON;
        moment.diag_mut().mapv_inplace(|value| value + ridge.max(floor));
        let mut w2_wide = Array2::zeros((shape.rows, size));
        for_each_block(w2, Side::Cols, |first, block| {
            w2_wide.slice_mut(s![first..first + block.nrows(), ..]).assign(&block);
        });
        let order = order(kernels, w2_wide.view(), moment.view())?;
        moment = chosen(moment.view(), &order);
        let Cholesky { lower, inverse } = cholesky(kernels, moment.view())?;
        drop(moment);
        let root = mean.sqrt();
        let outputs = product(kernels, w2_wide.select(Axis(1), &order).view(), lower.view()) * root;
        let errors = tails(&outputs);
        Ok(Self { order, errors, outputs, inverse: inverse / root, has_moment })
    }

    /// All F channels; a width k keeps the first k.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The error Σ g² ‖W₂ h − W h_S‖² of every width 0..=F, the ridge's share included; it does not grow.
    pub fn errors(&self) -> &[f64] {
        &self.errors
    }

    /// Whether the second moment said anything. If not, channels and errors are those of the weights alone, and errors are in
    /// other units than those of an expert with tokens.
    pub fn has_moment(&self) -> bool {
        self.has_moment
    }

    /// W [H, k]: the columns of w2 for the first k channels, in order.
    ///
    /// # Errors
    /// The width is not in 1..=F.
    pub fn refit(&self, backend: &dyn Backend, width: usize) -> Result<Array2<f64>, SvdError> {
        self.check(width)?;
        let inverse = self.inverse.slice(s![..width, ..width]);
        Ok(product(backend, self.outputs.slice(s![.., ..width]), inverse))
    }

    /// W C[S, S] Wᵀ [H, H]: the second moment of the outputs that the first k channels give, both triangles.
    ///
    /// # Errors
    /// The width is not in 1..=F.
    pub fn output_moment(&self, backend: &dyn Backend, width: usize) -> Result<Array2<f64>, SvdError> {
        self.check(width)?;
        let outputs = self.outputs.slice(s![.., ..width]);
        Ok(product(backend, outputs, outputs.t()))
    }

    /// W₂ L [H, F].
    pub(crate) fn outputs(&self) -> ArrayView2<'_, f64> {
        self.outputs.view()
    }

    fn check(&self, width: usize) -> Result<(), SvdError> {
        let width_max = self.order.len();
        if (1..=width_max).contains(&width) { Ok(()) } else { Err(SvdError::Width { width, width_max }) }
    }
}

/// W [H, k] that minimises Σ g² ‖y − W z‖² + ridge · mean(diag C) ‖W − W₂[:, S]‖², where `cross` is Σ g² y zᵀ [H, k],
/// `moment` C = Σ g² z zᵀ [k, k], lower triangle, and `columns` W₂[:, S] [H, k]: w2 fitted to channels that may be those of
/// changed matrices. For the original's channels, this is [`Channels::refit`] with the mean of theirs. Without a moment,
/// the columns.
///
/// # Errors
/// A size is another, a value is not finite, or rounding finds the second moment plus ridge indefinite.
pub fn fit_columns(
    backend: &dyn Backend,
    cross: ArrayView2<'_, f64>,
    moment: ArrayView2<'_, f64>,
    columns: ArrayView2<'_, f64>,
    ridge: f64,
) -> Result<Array2<f64>, SvdError> {
    check_ridge(ridge)?;
    let (rows, size) = columns.dim();
    let shape = MatrixShape { rows, cols: size };
    if cross.dim() != (rows, size) {
        let (rows, cols) = cross.dim();
        return Err(SvdError::MetricShape { what: "cross moment", rows, cols, size, shape });
    }
    let Some(UnitMoment { mut matrix, mean }) = UnitMoment::new(moment, size, shape)? else {
        return Ok(columns.to_owned());
    };
    let ridge = ridge.max((size * size) as f64 * f64::EPSILON);
    matrix.diag_mut().mapv_inplace(|value| value + ridge);
    let kernels: &dyn Kernels<f64> = backend;
    let Cholesky { inverse, .. } = cholesky(kernels, matrix.view())?;
    drop(matrix);
    let mut wanted = &cross / mean;
    wanted.scaled_add(ridge, &columns);
    let half = product(kernels, wanted.view(), inverse.t());
    Ok(product(kernels, half.view(), inverse.view()))
}

/// Channels by falling importance; of equal ones the first comes first.
fn order(
    kernels: &dyn Kernels<f64>,
    w2: ArrayView2<'_, f64>,
    moment: ArrayView2<'_, f64>,
) -> Result<Vec<usize>, SvdError> {
    let mut left: Vec<usize> = (0..w2.ncols()).collect();
    let mut dropped = Vec::new(); // The last stage's channels come first in the end.
    for stage in 1..=STAGES {
        let part = chosen(moment, &left);
        let Cholesky { inverse, .. } = cholesky(kernels, part.view())?;
        let fitted = if stage == 1 {
            w2.to_owned()
        } else {
            let outputs = product(kernels, w2, moment.select(Axis(1), &left).view());
            let half = product(kernels, outputs.view(), inverse.t());
            product(kernels, half.view(), inverse.view())
        };
        // [C⁻¹]ᵢᵢ is the squared norm of column i of L⁻¹.
        let columns = fitted.columns().into_iter().zip(inverse.columns());
        let scores: Vec<f64> = columns.map(|(w, inverse)| w.dot(&w) / inverse.dot(&inverse)).collect();
        let mut places: Vec<usize> = (0..left.len()).collect();
        places.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let mut ordered: Vec<usize> = places.into_iter().map(|place| left[place]).collect();
        let kept = if stage == STAGES { 0 } else { ordered.len() / 2 };
        dropped.push(ordered.split_off(kept));
        left = ordered;
        if left.is_empty() {
            break;
        }
    }
    Ok(dropped.into_iter().rev().flatten().collect())
}

/// C[S, S] in the order of S, both triangles.
fn chosen(moment: ArrayView2<'_, f64>, channels: &[usize]) -> Array2<f64> {
    let size = channels.len();
    Array2::from_shape_fn((size, size), |(i, j)| moment[[channels[i], channels[j]]])
}

fn cholesky(kernels: &dyn Kernels<f64>, matrix: ArrayView2<'_, f64>) -> Result<Cholesky<f64>, SvdError> {
    kernels.cholesky(matrix).ok_or(SvdError::Indefinite { size: matrix.nrows() })
}

/// What each number of first columns leaves: sums from the smallest on.
fn tails(outputs: &Array2<f64>) -> Vec<f64> {
    let mut tails = vec![0.0; outputs.ncols() + 1];
    for (k, column) in outputs.columns().into_iter().enumerate().rev() {
        tails[k] = tails[k + 1] + column.dot(&column);
    }
    tails
}

#[cfg(test)]
mod tests;
