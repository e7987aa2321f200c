//! In which norm the error of a matrix is measured, and which eigenproblem that makes of its factors.
//!
//! Without data, every weight counts the same. Calibrated, an error counts by what it does to the activations of the
//! calibration text: for w1 (gate) and w3 (up) [m, n] by the second moment C [n, n] of their inputs (and a weight dᵢ per
//! output), for w2 (down) by the second moment O [m, m] of its outputs. The eigenproblem has the hidden size H:
//!
//! | Norm | Squared error | A [H, H] | Ŵ |
//! |---|---|---|---|
//! | [`Metric::Weights`] | ‖W − Ŵ‖² | WᵀW or W Wᵀ | W V Vᵀ or V Vᵀ W |
//! | [`Metric::Inputs`] | tr (W − Ŵ)ᵀ diag(d) (W − Ŵ) C̃ | SᵀWᵀdiag(d) W S, S Sᵀ = C̃ | W S V Vᵀ S⁺ |
//! | [`Metric::Outputs`] | tr (I − V Vᵀ) Õ | Õ | V Vᵀ W |
//!
//! V [H, r] are the first eigenvectors of A, and the eigenvalues beyond r sum to the error. d drops out of Ŵ. S whitens
//! the inputs.
//! A second moment is *shrunk* by b towards what a run without data would use, at equal trace, so that directions without
//! activations still count: C̃ = (1 − b) C + b tr(C)/n I, Õ = (1 − b) O + b tr(O)/‖W‖² W Wᵀ.
//!
//! With a *map*, the factors approximate not W but W M or T W, fitted to inputs that the compression itself has changed;
//! see [`crate::ridge_map`].

use crate::error::SvdError;
use crate::error_norm::ErrorNorm;
use crate::inputs::Inputs;
use crate::moment::{UnitMoment, check_shrinkage, check_square};
use crate::outputs::Outputs;
use crate::root::{MomentRoot, Root};
use crate::stats::Problem;
use crate::weights::Weights;
use lowrank_compute::Kernels;
use lowrank_model::MatrixShape;
use ndarray::Array2;
use std::borrow::Cow;

/// How the error of one matrix W [m, n] is measured.
///
/// Second moments are positive semidefinite up to rounding, on any scale, and may be singular; of each only the lower
/// triangle is read. Where a second moment or the row weights vanish (an expert without routed tokens), the norm is
/// [`Metric::Weights`]: spectrum, factors and errors are those of a run without data.
#[derive(Debug, Clone, Copy, Default)]
pub enum Metric<'a> {
    /// ‖W − Ŵ‖².
    #[default]
    Weights,
    /// tr (W − Ŵ)ᵀ diag(d) (W − Ŵ) C̃, the error of the outputs for the inputs of the calibration text.
    Inputs {
        /// C `[n, n]`: Σ x xᵀ of the inputs, each term weighted as the caller sees fit.
        second_moment: &'a Array2<f64>,
        /// d ≥ 0 `[m]`: how much each output matters.
        row_weights: &'a [f64],
        /// b, in 0..=1: the share of the identity in C̃.
        shrinkage: f64,
        /// M `[n, n]`: approximate W M instead of W.
        map: Option<&'a Array2<f64>>,
        /// S of the same second moment and shrinkage, where [`crate::ridge_map`] made one: saves another.
        root: Option<&'a MomentRoot>,
    },
    /// tr (I − U Uᵀ) Õ where Ŵ = U Uᵀ W, the error of the outputs for the calibration text.
    Outputs {
        /// O `[m, m]`: Σ y yᵀ of the outputs y = W z.
        second_moment: &'a Array2<f64>,
        /// b, in 0..=1: the share of W Wᵀ in Õ.
        shrinkage: f64,
        /// T `[m, m]`: approximate T W instead of W.
        map: Option<&'a Array2<f64>>,
    },
}

impl<'a> Metric<'a> {
    /// Checked against its matrix, on a scale of 1. A sketch needs no root of a second moment.
    pub(crate) fn prepared(
        &self,
        problem: &Problem<'_>,
        is_sketched: bool,
    ) -> Result<Box<dyn ErrorNorm + 'a>, SvdError> {
        let stats = &problem.stats;
        let shape = stats.shape;
        let of_weights = || Ok(Box::new(Weights::new(stats)) as Box<dyn ErrorNorm>);
        match *self {
            Self::Weights => of_weights(),
            Self::Inputs { second_moment, row_weights, shrinkage, map, root } => {
                check_shrinkage(shrinkage)?;
                let moment = UnitMoment::new(second_moment.view(), shape.cols, shape)?;
                map.map_or(Ok(()), |map| check_square("map", map.view(), shape.cols, shape))?;
                let largest = largest_row_weight(row_weights, shape)?;
                root.map_or(Ok(()), |root| root.check(shape.cols, shape))?;
                let (Some(moment), Some(largest)) = (moment, largest) else { return of_weights() };
                let row_roots = row_weights.iter().map(|d| (d / largest).sqrt()).collect();
                let mut inputs = Inputs::new(moment, shrinkage, row_roots, map);
                inputs.scale *= largest;
                inputs.root = match root {
                    _ if is_sketched => None,
                    Some(MomentRoot(root)) => Some(Cow::Borrowed(root)),
                    None => {
                        let kernels: &dyn Kernels<f64> = problem.backend;
                        Some(Cow::Owned(Root::of(kernels, inputs.second_moment.clone())?))
                    }
                };
                Ok(Box::new(inputs))
            }
            Self::Outputs { second_moment, shrinkage, map } => {
                check_shrinkage(shrinkage)?;
                let moment = UnitMoment::new(second_moment.view(), shape.rows, shape)?;
                map.map_or(Ok(()), |map| check_square("map", map.view(), shape.rows, shape))?;
                match moment.filter(|_| stats.energy > 0.0) {
                    Some(moment) => Ok(Box::new(Outputs::new(moment, shrinkage, map, stats.energy))),
                    None => of_weights(),
                }
            }
        }
    }
}

/// The largest of d; absent if all are zero.
pub(crate) fn largest_row_weight(row_weights: &[f64], shape: MatrixShape) -> Result<Option<f64>, SvdError> {
    if row_weights.len() != shape.rows {
        return Err(SvdError::RowWeights { values: row_weights.len(), shape });
    }
    if let Some((row, &value)) = row_weights.iter().enumerate().find(|(_, d)| !d.is_finite() || **d < 0.0) {
        return Err(SvdError::RowWeight { row, value });
    }
    let largest = row_weights.iter().copied().fold(0.0, f64::max);
    Ok(Some(largest).filter(|largest| largest.is_normal()))
}
