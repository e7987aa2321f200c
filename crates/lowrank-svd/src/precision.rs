//! When f32 suffices: the one rule, and every threshold of it.
//!
//! A Gram matrix squares the spectrum, so in f32 it loses singular values once (σ₁/σ)² nears 1/ε ≈ 10⁷. Measured on
//! 14336×4096 matrices, the error beyond the optimum is 1e-10 at σ₁/σᵣ = 10, 2e-6 at 77, 1e-3 at 361 and 0.1 at 3706 in
//! f32, and at most 1e-7 in f64 everywhere.

use crate::error::SvdError;
use crate::stats::{WeightStats, weight_stats};
use lowrank_model::{MatrixShape, Tensor};
use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Up to this short side f64 costs nothing worth saving, and leaves next to nothing for another CPU to round otherwise.
const SHORT_SIDE_F64: usize = 1024;
/// Largest σ₁/σ that f32 resolves: an excess of some 1e-6, by the measurements above.
const F32_CONDITION_MAX: f64 = 100.0;
/// Largest weights whose squares and their sums stay well inside f32.
const F32_LARGEST_WEIGHT: std::ops::RangeInclusive<f64> = 1e-12..=1e12;

/// A subspace that was found in f64 is projected onto in f32 from this truncated share of the energy on. A product of f32
/// numbers is off by about 1e-14 of the energy, times ‖Y‖² in a norm of activations. Measured at this share: an excess
/// of at most 1e-11 in any norm (`docs/decisions/0014-one-svd-engine.md`).
const F32_PROJECTION_SHARE: f64 = 1e-2;
/// Below this share of the energy, the truncation error is computed from the residual and is no longer the difference of
/// two sums. The sum that is kept is over f32 numbers, so it may be off by f32's 6e-8 of itself where they are few: here
/// 3e-6 of the error.
pub(crate) const ERROR_SHARE_BY_DIFFERENCE: f64 = 2e-2;

/// What the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionChoice {
    /// f32 where it suffices, else f64.
    #[default]
    Auto,
    /// f32, whatever the spectrum.
    F32,
    /// f64.
    F64,
}

/// What was computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits.
    F32,
    /// 53 bits.
    F64,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
        })
    }
}

/// Whether f32 is worth a thought.
fn f32_saves(shape: MatrixShape, largest_weight: f64) -> bool {
    shape.short_side() > SHORT_SIDE_F64 && F32_LARGEST_WEIGHT.contains(&largest_weight)
}

/// Largest share by which rounding in f32 may change what is made of the second moment of activations.
const F32_CHANNELS_ROUNDING: f64 = 0.1;

impl Precision {
    /// For the channels of a down matrix, whose second moment has a ridge in mean diagonal elements: its condition number is
    /// at most F/ridge, which bounds how much rounding changes an importance or an error.
    pub fn of_channels(w2: &Tensor, ridge: f64) -> Result<Self, SvdError> {
        let stats = weight_stats(w2)?;
        Ok(Self::of_moment(stats.shape, stats.largest_weight, ridge))
    }

    /// Likewise of those that stay: columns of it, [H, k].
    pub fn of_columns(columns: ArrayView2<'_, f64>, ridge: f64) -> Self {
        let (rows, cols) = columns.dim();
        let largest = columns.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        Self::of_moment(MatrixShape { rows, cols }, largest, ridge)
    }

    fn of_moment(shape: MatrixShape, largest_weight: f64, ridge: f64) -> Self {
        let rounding = shape.cols as f64 / ridge * f64::from(f32::EPSILON);
        let suffices = f32_saves(shape, largest_weight) && rounding <= F32_CHANNELS_ROUNDING;
        if suffices { Self::F32 } else { Self::F64 }
    }
}

/// Whether f32 is worth it for eigenvectors, whose errors count only in the second order.
pub(crate) fn eigenvectors_in_f32(choice: PrecisionChoice, stats: &WeightStats) -> bool {
    choice == PrecisionChoice::Auto && f32_saves(stats.shape, stats.largest_weight)
}

/// For an error that goes into a report alone: f32 loses what is below a millionth of the weights.
pub(crate) fn of_measurements(stats: &WeightStats) -> Precision {
    if f32_saves(stats.shape, stats.largest_weight) { Precision::F32 } else { Precision::F64 }
}

/// Whether W may be projected in f32 onto a subspace found in f64: the matrix is large, and enough is truncated.
pub(crate) fn projects_in_f32(stats: &WeightStats, sigma: &[f64], rank: usize) -> bool {
    let energy = |sigma: &[f64]| sigma.iter().map(|sigma| sigma * sigma).sum::<f64>();
    f32_saves(stats.shape, stats.largest_weight)
        && energy(&sigma[rank..]) / energy(sigma) >= F32_PROJECTION_SHARE
}

/// Whether f32 does not resolve what is known of a condition.
pub(crate) fn is_beyond_f32(expected: Option<f64>) -> bool {
    expected.is_some_and(|condition| condition > F32_CONDITION_MAX)
}

/// Computes in the precision that suffices. `expected` is σ₁ over the smallest wanted σ, as far as it is known. `compute`
/// returns its result and the condition it found; when that refutes f32, everything is done again in f64.
pub(crate) fn in_sufficient_precision<R>(
    choice: PrecisionChoice,
    stats: &WeightStats,
    expected: Option<f64>,
    mut compute: impl FnMut(Precision) -> Result<(R, f64), SvdError>,
) -> Result<(R, Precision), SvdError> {
    let f64_from_the_start = !f32_saves(stats.shape, stats.largest_weight) || is_beyond_f32(expected);
    let first = match choice {
        PrecisionChoice::F32 => Precision::F32,
        PrecisionChoice::F64 => Precision::F64,
        PrecisionChoice::Auto if f64_from_the_start => Precision::F64,
        PrecisionChoice::Auto => Precision::F32,
    };
    let (result, condition) = compute(first)?;
    if choice == PrecisionChoice::Auto && first == Precision::F32 && condition > F32_CONDITION_MAX {
        drop(result);
        return Ok((compute(Precision::F64)?.0, Precision::F64));
    }
    Ok((result, first))
}

/// √(bound/λ) of eigenvalue number `last`, where bound is at least λ₁ = σ₁²; infinite where λ vanishes, 1 for a zero
/// matrix.
pub(crate) fn condition(bound: f64, sigma: &[f64], last: usize) -> f64 {
    let first = sigma[0].max(bound.sqrt());
    if first == 0.0 { 1.0 } else { first / sigma[last - 1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(short_side: usize, largest_weight: f64, expected: Option<f64>, found: f64) -> Vec<Precision> {
        let shape = MatrixShape { rows: 2 * short_side, cols: short_side };
        let stats = WeightStats { shape, energy: 1.0, largest_weight };
        let mut tried = Vec::new();
        in_sufficient_precision(PrecisionChoice::Auto, &stats, expected, |precision| {
            tried.push(precision);
            Ok(((), found))
        })
        .unwrap();
        tried
    }

    #[test]
    fn f32_is_tried_only_where_it_can_suffice_and_is_checked() {
        use Precision::{F32, F64};
        assert_eq!(used(4096, 0.1, None, 77.0), [F32]);
        assert_eq!(used(4096, 0.1, None, 361.0), [F32, F64]);
        assert_eq!(used(4096, 0.1, Some(361.0), 361.0), [F64]);
        assert_eq!(used(1024, 0.1, None, 1.0), [F64]);
        assert_eq!(used(4096, 1e25, None, 1.0), [F64]);
        assert_eq!(used(4096, 0.1, None, condition(0.0, &[1.0, 0.0], 2)), [F32, F64]);
    }

    #[test]
    fn channels_are_in_f32_where_the_ridge_bounds_what_rounding_does() {
        let of =
            |cols, largest, ridge| Precision::of_moment(MatrixShape { rows: 4096, cols }, largest, ridge);
        assert_eq!(of(14_336, 0.1, 0.03), Precision::F32);
        assert_eq!(of(1024, 0.1, 0.03), Precision::F64);
        assert_eq!(of(14_336, 1e25, 0.03), Precision::F64);
        assert_eq!(of(14_336, 0.1, 0.01), Precision::F64);
        assert_eq!(of(14_336, 0.1, 0.0), Precision::F64);
    }
}
