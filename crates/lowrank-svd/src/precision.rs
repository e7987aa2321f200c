//! When f32 suffices: the one rule.
//!
//! A Gram matrix squares the spectrum, so in f32 it loses singular values once (σ₁/σ)² nears 1/ε ≈ 10⁷. Measured on
//! 14336×4096 matrices, the error beyond the optimum is 1e-10 at σ₁/σᵣ = 10, 2e-6 at 77, 1e-3 at 361 and 0.1 at 3706 in
//! f32, and at most 1e-7 in f64 everywhere.

use crate::SvdError;
use crate::survey::Survey;
use lowrank_model::MatrixShape;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Up to this short side f64 costs nothing worth saving, and leaves next to nothing for another CPU to round otherwise.
const SHORT_SIDE_F64: usize = 1024;
/// Largest σ₁/σ that f32 resolves.
const F32_CONDITION_MAX: f64 = 100.0;
/// Largest weights whose squares and their sums stay well inside f32.
const F32_LARGEST_WEIGHT: std::ops::RangeInclusive<f64> = 1e-12..=1e12;

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

/// What is known before computing.
pub(crate) struct Known {
    pub(crate) shape: MatrixShape,
    /// max |w|
    pub(crate) largest_weight: f64,
    /// σ₁ over the smallest wanted σ, if a spectrum is at hand.
    pub(crate) condition: Option<f64>,
}

/// Whether f32 is worth a thought.
pub(crate) fn f32_saves(shape: MatrixShape, largest_weight: f64) -> bool {
    shape.short_side() > SHORT_SIDE_F64 && F32_LARGEST_WEIGHT.contains(&largest_weight)
}

/// For an error that is only told: f32 loses what is below a millionth of the weights.
pub(crate) fn of_measurements(survey: &Survey) -> Precision {
    if f32_saves(survey.shape, survey.largest_weight) { Precision::F32 } else { Precision::F64 }
}

/// Computes in the precision that suffices. `compute` returns its result and the condition it saw; when that refutes
/// f32, everything is done again in f64.
pub(crate) fn in_sufficient_precision<R>(
    choice: PrecisionChoice,
    known: &Known,
    mut compute: impl FnMut(Precision) -> Result<(R, f64), SvdError>,
) -> Result<(R, Precision), SvdError> {
    let f64_from_the_start = !f32_saves(known.shape, known.largest_weight)
        || known.condition.is_some_and(|condition| condition > F32_CONDITION_MAX);
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

/// σ₁/σ; infinite where σ vanishes, 1 for a zero matrix.
pub(crate) fn condition(sigma_first: f64, sigma: f64) -> f64 {
    if sigma_first == 0.0 { 1.0 } else { sigma_first / sigma }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(short_side: usize, largest_weight: f64, given: Option<f64>, seen: f64) -> Vec<Precision> {
        let shape = MatrixShape { rows: 2 * short_side, cols: short_side };
        let mut tried = Vec::new();
        in_sufficient_precision(
            PrecisionChoice::Auto,
            &Known { shape, largest_weight, condition: given },
            |precision| {
                tried.push(precision);
                Ok(((), seen))
            },
        )
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
        assert_eq!(used(4096, 0.1, None, condition(1.0, 0.0)), [F32, F64]);
    }
}
