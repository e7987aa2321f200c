//! The subspace above a threshold of a symmetric matrix, by matrix products alone, without eigenvectors: where to split, how
//! many steps to take and when to stop. [`Kernels::upper_subspace`](crate::Kernels::upper_subspace) computes it.
//!
//! With G = V Λ Vᵀ and a threshold μ between eigenvalues k and k + 1, X₀ = (G − μI)/c has the eigenvectors of G, and
//! sign(X₀) tells the two sides apart: P = (sign(X₀) + I)/2 projects onto the wanted side. The sign is the limit of
//!
//! X ← α X (3I − α²X²)/2,
//!
//! Newton and Schulz' iteration, where α spreads [l, 1], in which the sizes of all eigenvalues lie, as far as it may:
//! α² = 3/(1 + l + l²) (Chen and Chow, 2014), at most 1.6977² so that an eigenvalue at 1 is not thrown across zero by its
//! own rounding. Small eigenvalues grow by 2.5 for two products. A basis of the range of P is the Q of P Ω, Ω [d, k]
//! random, and once more of P Q, which drowns what rounding put outside.
//!
//! The gap between the two sides decides how many products are needed, and whether rounding leaves anything to tell.

use crate::Real;

/// Largest α: at √3 the eigenvalue 1 would become 0.
const ALPHA_MAX: f64 = 1.69770248526;
/// Steps beyond those that the gap asks for.
const STEPS_TO_SPARE: usize = 6;
/// A gap below so many roundings is none.
const GAP_ROUNDINGS: f64 = 4.0;

/// Where to split a spectrum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Split {
    /// k
    pub above: usize,
    /// μ
    pub threshold: f64,
    /// Distance from μ to the nearest eigenvalue.
    pub gap: f64,
    /// Distance from μ to the farthest.
    pub radius: f64,
}

impl Split {
    /// Between eigenvalues k and k + 1 of all, which fall. `None` where there is no such place.
    pub fn after(above: usize, eigenvalues: &[f64]) -> Option<Self> {
        let (first, last) = (*eigenvalues.first()?, *eigenvalues.last()?);
        let (upper, lower) = (*eigenvalues.get(above.checked_sub(1)?)?, *eigenvalues.get(above)?);
        let threshold = lower + (upper - lower) / 2.0;
        let split = Self {
            above,
            threshold,
            gap: (upper - threshold).min(threshold - lower),
            radius: (first - threshold).max(threshold - last),
        };
        (split.gap > 0.0).then_some(split)
    }

    /// c, a little more than the radius: the eigenvalues are known up to rounding.
    pub(crate) fn scale(&self) -> f64 {
        self.radius * 1.001
    }

    /// α of every step, if rounding of this size leaves the gap open.
    pub(crate) fn schedule(&self, epsilon: f64) -> Option<Vec<f64>> {
        // Half: the gap is known up to rounding.
        let mut least = self.gap / self.scale() / 2.0;
        if least.is_nan() || least < GAP_ROUNDINGS * epsilon {
            return None;
        }
        let mut steps = Vec::new();
        let image = |alpha: f64, value: f64| {
            let value = alpha * value;
            value * (3.0 - value * value) / 2.0
        };
        while least < 0.99 {
            let alpha = (3.0 / (1.0 + least + least * least)).sqrt().min(ALPHA_MAX);
            steps.push(alpha);
            least = image(alpha, least).min(image(alpha, 1.0));
        }
        steps.extend([1.0; STEPS_TO_SPARE]);
        Some(steps)
    }
}

/// What is left of the iteration: whether it has ended, from the diagonal of X².
pub(crate) fn missing<T: Real>(squares: impl Iterator<Item = T>) -> f64 {
    squares.map(|square| 1.0 - square.as_f64()).sum()
}

/// Whether the iteration is at its end but for one step. An eigenvalue that lacks e then lacks 1.5 e², and of what it leaves
/// outside of the subspace the two products of the projector with a basis keep (0.75 e²)²: less than a rounding.
pub(crate) fn is_last(missing: f64, epsilon: f64) -> bool {
    missing.abs() < epsilon.powf(0.25)
}

/// Whether the trace of the sign says that as many eigenvalues as wanted lie above. NaN does not.
pub(crate) fn splits(trace: f64, size: usize, above: usize) -> bool {
    ((size as f64 + trace) / 2.0 - above as f64).abs() < 0.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_lies_between_its_eigenvalues() {
        let split = Split::after(2, &[10.0, 4.0, 3.0, 0.5]).unwrap();
        assert_eq!(split, Split { above: 2, threshold: 3.5, gap: 0.5, radius: 6.5 });
        for above in [0, 4, 5] {
            assert_eq!(Split::after(above, &[10.0, 4.0, 3.0, 0.5]), None);
        }
        assert_eq!(Split::after(1, &[3.0, 3.0]), None);
        assert_eq!(Split::after(1, &[f64::NAN, 3.0]), None);
        assert_eq!(Split::after(1, &[]), None);
    }

    #[test]
    fn the_schedule_takes_every_size_to_one_and_none_across_zero() {
        for gap in [0.5, 1e-2, 1e-5, 1e-9, 1e-12] {
            let split = Split { above: 1, threshold: 0.0, gap, radius: 1.0 };
            let steps = split.schedule(f64::EPSILON).unwrap();
            for size in [gap, (3.0 * gap).min(1.0), gap.sqrt(), 0.5, 0.999, 1.0] {
                for sign in [-1.0, 1.0] {
                    let x = steps
                        .iter()
                        .fold(sign * size, |x, alpha| alpha * x * (3.0 - (alpha * x).powi(2)) / 2.0);
                    assert!((x - sign).abs() < 1e-12, "{size} of gap {gap} becomes {x}");
                }
            }
            // 2.5 a step, and a handful at the end.
            let growth = (1.0 / gap).ln() / 2.5_f64.ln();
            assert!((steps.len() as f64) < growth + 7.0 + STEPS_TO_SPARE as f64, "{gap}: {}", steps.len());
        }
        let split = Split { above: 1, threshold: 0.0, gap: 1e-7, radius: 1.0 };
        assert_eq!(split.schedule(f64::from(f32::EPSILON)), None);
    }
}
