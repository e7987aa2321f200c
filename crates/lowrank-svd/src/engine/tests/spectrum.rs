//! Spectra in the norm of the weights.

use crate::test_support::*;
use crate::{PrecisionChoice, SvdError, SvdOptions};
use lowrank_compute::Faer;
use lowrank_model::{Dtype, Tensor};

#[test]
fn a_scaled_permutation_has_its_scales_as_spectrum() {
    // Two rows of three, one entry each.
    let w = Tensor::from_f32(vec![2, 3], Dtype::F32, &[0.0, 0.0, -2.0, 5.0, 0.0, 0.0]).unwrap();
    assert_eq!(plain_spectrum(&w, PrecisionChoice::Auto).sigma(), [5.0, 2.0]);
}

#[test]
fn zero_and_one_row_matrices_have_spectra() {
    let zero = Tensor::from_f32(vec![3, 5], Dtype::F32, &[0.0; 15]).unwrap();
    let row = Tensor::from_f32(vec![1, 2], Dtype::F32, &[3.0, 4.0]).unwrap();
    for precision in [PrecisionChoice::Auto, PrecisionChoice::F32, PrecisionChoice::F64] {
        assert_eq!(plain_spectrum(&zero, precision).sigma(), [0.0; 3]);
        assert_eq!(plain_spectrum(&row, precision).sigma(), [5.0]);
    }
}

#[test]
fn huge_and_tiny_weights_neither_overflow_nor_vanish() {
    for scale in [1e37_f32, 1e-37] {
        let w = Tensor::from_f32(vec![2, 2], Dtype::F32, &[3.0 * scale, 0.0, 0.0, 4.0 * scale]).unwrap();
        let spectrum = plain_spectrum(&w, PrecisionChoice::Auto);
        assert!((spectrum.sigma()[0] / f64::from(4.0 * scale) - 1.0).abs() < 1e-12);
    }
}

#[test]
fn f32_finds_every_singular_value_of_a_mild_spectrum() {
    let mut rng = crate::randomized::generator(4, 0);
    let mut weights: Vec<f32> =
        (0..700 * 300).map(|_| (rand_chacha::rand_core::RngCore::next_u32(&mut rng) >> 8) as f32).collect();
    // Uniform in [-1, 1) beside a head twenty times the floor.
    for (i, weight) in weights.iter_mut().enumerate() {
        *weight = *weight / 8_388_608.0 - 1.0 + if i / 300 % 2 == 0 { 0.5 } else { -0.5 };
    }
    let w = Tensor::from_f32(vec![700, 300], Dtype::F32, &weights).unwrap();
    let [f32, f64] =
        [PrecisionChoice::F32, PrecisionChoice::F64].map(|precision| plain_spectrum(&w, precision));
    assert!(f64.sigma()[0] > 15.0 * f64.sigma()[299]);
    for (value, expected) in f32.sigma().iter().zip(f64.sigma()) {
        assert!((value / expected - 1.0).abs() < 3e-6, "{value} for {expected}");
    }
    assert!((f32.energy() / f64.energy() - 1.0).abs() < 1e-13);
}

#[test]
fn only_rounding_may_push_an_eigenvalue_below_zero() {
    let w = Tensor::from_f32(vec![3, 2], Dtype::F32, &[1.0; 6]).unwrap();
    let engine = crate::engine::Engine::new(&Faer, &w, &SvdOptions::default(), None).unwrap();
    assert_eq!(engine.sigma(&[4.0_f64, -1e-16], 0.0).unwrap(), [2.0, 0.0]);
    for wrong in [[4.0, -1e-3], [4.0, f64::NAN], [f64::INFINITY, 0.0]] {
        assert!(matches!(engine.sigma(&wrong, 0.0), Err(SvdError::Negative { .. })));
    }
}
