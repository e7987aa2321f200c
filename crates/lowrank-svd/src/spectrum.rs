//! Singular values: σᵢ² are the eigenvalues of WᵀW, or of W Wᵀ where that is smaller.
//!
//! Their sum, ‖W‖², is known to the last bit from the weights themselves. What rounding in f32 does to the eigenvalues is
//! mostly one common shift (measured: −1.05·10⁻⁸ λ₁ on all of 2048, give or take a tenth), so the sum corrects them all.

use crate::SvdError;
use crate::precision::{Known, Precision, PrecisionChoice, condition, in_sufficient_precision};
use crate::reduction::Reduction;
use crate::survey::survey;
use lowrank_compute::{Backend, Kernels, Real, Reduced, Side};
use lowrank_model::{Spectrum, Tensor};

/// All singular values of W [m, n].
///
/// In f64 where that is cheap or needed; in f32 only if even the smallest is resolved.
pub fn spectrum(backend: &dyn Backend, w: &Tensor, precision: PrecisionChoice) -> Result<Spectrum, SvdError> {
    Ok(reduce(backend, w, precision)?.0)
}

/// As [`spectrum`], and what the factors of W can begin from.
pub(crate) fn reduce(
    backend: &dyn Backend,
    w: &Tensor,
    precision: PrecisionChoice,
) -> Result<(Spectrum, Option<Reduction>), SvdError> {
    let survey = survey(w)?;
    let side = Side::short(survey.shape);
    let known = Known { shape: survey.shape, largest_weight: survey.largest_weight, condition: None };
    let ((sigma, reduction), _) = in_sufficient_precision(precision, &known, |precision| {
        let (sigma, reduction) = match precision {
            Precision::F32 => {
                let (sigma, reduced) = singular_values::<f32>(backend, w, side, survey.energy)?;
                (sigma, Reduction::of_f32(backend, reduced))
            }
            Precision::F64 => {
                let (sigma, reduced) = singular_values::<f64>(backend, w, side, survey.energy)?;
                (sigma, Reduction::of_f64(backend, reduced))
            }
        };
        let condition = condition(sigma[0], sigma[sigma.len() - 1]);
        Ok(((sigma, reduction), condition))
    })?;
    Ok((Spectrum::new(sigma).expect("roots of falling eigenvalues fall"), reduction))
}

fn singular_values<T: Real>(
    kernels: &dyn Kernels<T>,
    w: &Tensor,
    side: Side,
    energy: f64,
) -> Result<(Vec<f64>, Reduced<T>), SvdError> {
    let reduced = kernels.reduce(kernels.gram(w, side))?;
    let values = kernels.reduced_values(&reduced)?;
    let sum: f64 = values.iter().rev().map(|value| value.as_f64()).sum();
    let sigma = sigma_from_eigenvalues(&values, (energy - sum) / values.len() as f64)?;
    Ok((sigma, reduced))
}

/// √(λ + shift) of a positive semidefinite matrix. Rounding moves λ by up to about ε·d·λ₁, so that much below zero is
/// zero.
pub(crate) fn sigma_from_eigenvalues<T: Real>(values: &[T], shift: f64) -> Result<Vec<f64>, SvdError> {
    let largest = values.iter().map(|value| value.as_f64().abs()).fold(0.0, f64::max);
    let tolerance = T::EPSILON.as_f64() * values.len() as f64 * largest;
    values
        .iter()
        .map(|value| match value.as_f64() + shift {
            value if value >= -tolerance => Ok(value.max(0.0).sqrt()),
            value => Err(SvdError::Negative { value, tolerance }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_compute::Faer;
    use lowrank_model::Dtype;

    #[test]
    fn a_scaled_permutation_has_its_scales_as_spectrum() {
        // Two rows of three, one entry each.
        let w = Tensor::from_f32(vec![2, 3], Dtype::F32, &[0.0, 0.0, -2.0, 5.0, 0.0, 0.0]).unwrap();
        assert_eq!(spectrum(&Faer, &w, PrecisionChoice::Auto).unwrap().sigma(), [5.0, 2.0]);
    }

    #[test]
    fn zero_and_one_row_matrices_have_spectra() {
        let zero = Tensor::from_f32(vec![3, 5], Dtype::F32, &[0.0; 15]).unwrap();
        let row = Tensor::from_f32(vec![1, 2], Dtype::F32, &[3.0, 4.0]).unwrap();
        for precision in [PrecisionChoice::Auto, PrecisionChoice::F32, PrecisionChoice::F64] {
            assert_eq!(spectrum(&Faer, &zero, precision).unwrap().sigma(), [0.0; 3]);
            assert_eq!(spectrum(&Faer, &row, precision).unwrap().sigma(), [5.0]);
        }
    }

    #[test]
    fn huge_and_tiny_weights_neither_overflow_nor_vanish() {
        for scale in [1e37_f32, 1e-37] {
            let w = Tensor::from_f32(vec![2, 2], Dtype::F32, &[3.0 * scale, 0.0, 0.0, 4.0 * scale]).unwrap();
            let spectrum = spectrum(&Faer, &w, PrecisionChoice::Auto).unwrap();
            assert!((spectrum.sigma()[0] / f64::from(4.0 * scale) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn f32_finds_every_singular_value_of_a_mild_spectrum() {
        let mut rng = crate::randomized::generator(4, 0);
        let mut weights: Vec<f32> = (0..700 * 300)
            .map(|_| (rand_chacha::rand_core::RngCore::next_u32(&mut rng) >> 8) as f32)
            .collect();
        // Uniform in [-1, 1) beside a head twenty times the floor.
        for (i, weight) in weights.iter_mut().enumerate() {
            *weight = *weight / 8_388_608.0 - 1.0 + if i / 300 % 2 == 0 { 0.5 } else { -0.5 };
        }
        let w = Tensor::from_f32(vec![700, 300], Dtype::F32, &weights).unwrap();
        let [f32, f64] = [PrecisionChoice::F32, PrecisionChoice::F64]
            .map(|precision| spectrum(&Faer, &w, precision).unwrap());
        assert!(f64.sigma()[0] > 15.0 * f64.sigma()[299]);
        for (value, expected) in f32.sigma().iter().zip(f64.sigma()) {
            assert!((value / expected - 1.0).abs() < 3e-6, "{value} for {expected}");
        }
        assert!((f32.energy() / f64.energy() - 1.0).abs() < 1e-13);
    }

    #[test]
    fn only_rounding_may_push_an_eigenvalue_below_zero() {
        assert_eq!(sigma_from_eigenvalues(&[4.0_f64, -1e-16], 0.0).unwrap(), [2.0, 0.0]);
        assert!(matches!(sigma_from_eigenvalues(&[4.0_f64, -1e-3], 0.0), Err(SvdError::Negative { .. })));
        assert!(matches!(sigma_from_eigenvalues(&[f64::NAN], 0.0), Err(SvdError::Negative { .. })));
    }
}
