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
//! - **Outputs.** The second moment of what is left, W C[S, S] Wᵀ, is (W₂ L)[:, :k] (W₂ L)[:, :k]ᵀ.
//!
//! C takes gigabytes where F is 14,336, so all threads work on one expert ([`TiledCholesky`], on the CPU), and beside C there
//! is L, a quarter of it in f32. The ridge bounds the condition number of C by F/ridge, so f32 suffices from some size on:
//! [`Precision::of_channels`](crate::Precision::of_channels). Measured in `docs/research/widths.md`.

use crate::error::SvdError;
use crate::moment::{check_moment, check_ridge};
use crate::stats::weight_stats;
use lowrank_compute::blocks::{for_each_block, matrix_shape};
use lowrank_compute::{Real, Side, TiledCholesky, product_with_symmetric};
use lowrank_model::{MatrixShape, Tensor};
use ndarray::{Array2, ArrayView2, Axis, Zip, s};

/// Stages of the order; the last one compares an eighth of the channels.
const STAGES: usize = 4;

/// An expert's channels by falling importance, with what is needed to keep any number of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Channels<T> {
    order: Vec<usize>,
    errors: Vec<f64>,
    /// W₂ L [H, F], channels in `order`.
    outputs: Array2<T>,
    /// L of the second moment over `mean`.
    factor: TiledCholesky<T>,
    mean: f64,
}

impl<T: Real> Channels<T> {
    /// From w2 [H, F] and the second moment of the activations [F, F], both triangles, which may be
    /// singular. If it vanishes, the identity takes its place: channels and errors are then those of the weights alone, and
    /// errors are in other units than those of an expert with tokens.
    ///
    /// `ridge` is in mean diagonal elements. At least F²·ε is added, so that a singular second moment has a Cholesky factor.
    ///
    /// # Errors
    /// A matrix has another shape or is not finite, the ridge is negative or not finite, or rounding finds the second moment
    /// plus ridge indefinite, as it does if the given matrix is not positive semidefinite.
    pub fn new(w2: &Tensor, second_moment: ArrayView2<'_, f64>, ridge: f64) -> Result<Self, SvdError> {
        weight_stats(w2)?;
        let shape = matrix_shape(w2);
        let moment = UnitRidged::new(second_moment, shape, ridge)?;
        let mut w2_wide = Array2::zeros((shape.rows, shape.cols));
        for_each_block(w2, Side::Cols, |first, block| {
            w2_wide.slice_mut(s![first..first + block.nrows(), ..]).assign(&block);
        });
        let order = order(w2_wide.view(), &moment)?;
        let w2_ordered = w2_wide.select(Axis(1), &order);
        drop(w2_wide);
        let factor = moment.factor(&order)?;
        let outputs = factor.product(w2_ordered.view());
        let errors = tails(&outputs, moment.mean);
        Ok(Self { order, errors, outputs, factor, mean: moment.mean })
    }

    /// All F channels; a width k keeps the first k.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The error Σ g² ‖W₂ h − W h_S‖² of every width 0..=F, the ridge's share included; it does not grow.
    pub fn errors(&self) -> &[f64] {
        &self.errors
    }

    /// W [H, k] that minimises Σ g² ‖W₂ h − W h_S‖² and the ridge's share of it, S the first k channels in their order:
    /// (W₂ L)[:, :k] L[:k, :k]⁻¹.
    ///
    /// # Panics
    /// If there are fewer channels.
    pub fn fitted(&self, width: usize) -> Array2<T> {
        let mut fitted = self.outputs.slice(s![.., ..width]).to_owned();
        self.factor.divide_by_leading(fitted.view_mut());
        fitted
    }

    /// W₂ L [H, F], and what its squares are multiplied by to be in the units of the second moment.
    pub(crate) fn outputs(&self) -> (ArrayView2<'_, T>, f64) {
        (self.outputs.view(), self.mean)
    }
}

/// A second moment over its mean eigenvalue, plus a ridge: C, read where it lies.
struct UnitRidged<'a> {
    /// Absent: it vanishes, and the identity takes its place.
    moment: Option<ArrayView2<'a, f64>>,
    mean: f64,
    ridge: f64,
}

impl<'a> UnitRidged<'a> {
    fn new(moment: ArrayView2<'a, f64>, shape: MatrixShape, ridge: f64) -> Result<Self, SvdError> {
        check_ridge(ridge)?;
        let size = shape.cols;
        let ridge = ridge.max((size * size) as f64 * f64::EPSILON);
        Ok(match check_moment(moment, size, shape)? {
            Some(mean) => Self { moment: Some(moment), mean, ridge },
            None => Self { moment: None, mean: 1.0, ridge },
        })
    }

    fn at<T: Real>(&self, i: usize, j: usize) -> T {
        let value = match self.moment {
            Some(moment) => moment[[i, j]] / self.mean,
            None => f64::from(u8::from(i == j)),
        };
        T::of_f64(if i == j { value + self.ridge } else { value })
    }

    /// L of C[S, S] in the order of S.
    fn factor<T: Real>(&self, channels: &[usize]) -> Result<TiledCholesky<T>, SvdError> {
        TiledCholesky::new(channels.len(), |i, j| self.at(channels[i], channels[j]))
            .ok_or(SvdError::Indefinite { size: channels.len() })
    }

    /// A C[:, S] [n, k].
    fn product<T: Real>(&self, a: ArrayView2<'_, T>, channels: &[usize]) -> Array2<T> {
        let mut out = match self.moment {
            Some(moment) => product_with_symmetric(a, moment, channels, self.mean),
            None => a.select(Axis(1), channels),
        };
        for (mut out, &channel) in out.columns_mut().into_iter().zip(channels) {
            out.scaled_add(T::of_f64(self.ridge), &a.column(channel));
        }
        out
    }
}

/// W [H, k] that minimises Σ g² ‖y − W z‖² + ridge · mean(diag C) ‖W − W₂[:, S]‖², where `cross` is Σ g² y zᵀ [H, k],
/// `moment` C = Σ g² z zᵀ [k, k], both triangles, and `columns` W₂[:, S] [H, k]: w2 fitted to channels that may be those of
/// changed matrices. Without a moment, the columns.
///
/// # Errors
/// A size is another, a value is not finite, or rounding finds the second moment plus ridge indefinite.
pub fn fit_columns<T: Real>(
    cross: ArrayView2<'_, f64>,
    moment: ArrayView2<'_, f64>,
    columns: ArrayView2<'_, f64>,
    ridge: f64,
) -> Result<Array2<T>, SvdError> {
    let (rows, size) = columns.dim();
    let shape = MatrixShape { rows, cols: size };
    if cross.dim() != (rows, size) {
        let (rows, cols) = cross.dim();
        return Err(SvdError::MetricShape { what: "cross moment", rows, cols, size, shape });
    }
    let moment = UnitRidged::new(moment, shape, ridge)?;
    if moment.moment.is_none() {
        return Ok(columns.mapv(T::of_f64));
    }
    let of = |cross: f64, column: f64| T::of_f64(cross / moment.mean + moment.ridge * column);
    let mut fitted = Zip::from(&cross).and(&columns).map_collect(|&cross, &column| of(cross, column));
    let all: Vec<usize> = (0..size).collect();
    moment.factor::<T>(&all)?.solve_rows(fitted.view_mut());
    Ok(fitted)
}

/// Channels by falling importance; of equal ones the first comes first.
fn order<T: Real>(w2: ArrayView2<'_, T>, moment: &UnitRidged<'_>) -> Result<Vec<usize>, SvdError> {
    let mut left: Vec<usize> = (0..w2.ncols()).collect();
    let mut dropped = Vec::new(); // The last stage's channels come first in the end.
    // W₂ C[:, S] of the second stage's S; later stages have some of its columns.
    let mut outputs: Option<(Vec<usize>, Array2<T>)> = None;
    for stage in 1..=STAGES {
        let factor = moment.factor::<T>(&left)?;
        let fitted = if stage == 1 {
            w2.to_owned()
        } else {
            let (channels, outputs) =
                outputs.get_or_insert_with(|| (left.clone(), moment.product(w2, &left)));
            let place =
                |channel| channels.iter().position(|own| own == channel).expect("one of those before");
            let places: Vec<usize> = left.iter().map(place).collect();
            let mut fitted = outputs.select(Axis(1), &places);
            factor.solve_rows(fitted.view_mut());
            fitted
        };
        let columns = fitted.columns().into_iter().zip(factor.inverse_diagonal());
        let scores: Vec<f64> = columns.map(|(w, inverse)| (w.dot(&w) / inverse).as_f64()).collect();
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

/// What each number of first columns leaves, times `scale`: sums from the smallest on.
fn tails<T: Real>(outputs: &Array2<T>, scale: f64) -> Vec<f64> {
    let mut energies = vec![0.0; outputs.ncols()];
    for row in outputs.rows() {
        energies.iter_mut().zip(row).for_each(|(energy, &value)| *energy += scale * value.as_f64().powi(2));
    }
    let mut tails = vec![0.0; outputs.ncols() + 1];
    for (k, energy) in energies.into_iter().enumerate().rev() {
        tails[k] = tails[k + 1] + energy;
    }
    tails
}

#[cfg(test)]
mod tests;
