//! Factors in the norm of the weights against a direct SVD.

use crate::factors::Factors;
use crate::randomized::generator;
use crate::residual::residual_energy;
use crate::test_support::*;
use crate::{MethodChoice, Precision, PrecisionChoice, Route, SvdError, SvdOptions, factor};
use lowrank_compute::Faer;
use lowrank_model::{Dtype, MatrixShape, Spectrum, Tensor};
use rayon::prelude::*;

/// Σ over k of decay^k · aₖ bₖᵀ + noise, entries of a, b and noise uniform.
fn matrix(rows: usize, cols: usize, decay: f64, noise: f64, seed: u64) -> Tensor {
    let rng = &mut generator(seed, 0);
    let terms = rows.min(cols);
    let (mut a, b) = (uniform(rows, terms, rng), uniform(terms, cols, rng));
    for (k, mut column) in a.columns_mut().into_iter().enumerate() {
        column *= decay.powi(k as i32);
    }
    let values = a.dot(&b) + noise * uniform(rows, cols, rng);
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Tensor::from_f32(vec![rows, cols], Dtype::F32, &values).unwrap()
}

fn true_error(w: &Tensor, factors: &Factors) -> f64 {
    let energy: f64 = w.to_f32().iter().map(|&value| f64::from(value).powi(2)).sum();
    (residual_energy(&Faer, w, factors) / energy).sqrt()
}

#[test]
fn factors_reach_the_optimum_and_know_their_error() {
    for (rows, cols) in [(60, 24), (24, 60), (30, 30), (1, 12), (12, 1), (1, 1), (1200, 40), (40, 1200)] {
        for (decay, noise) in [(0.9, 0.01), (1.0, 0.0), (0.5, 1e-5)] {
            let w = matrix(rows, cols, decay, noise, 3);
            let (reference, known) = (direct_spectrum(&w), plain_spectrum(&w, PrecisionChoice::Auto));
            let short = rows.min(cols);
            for rank in [1, short.div_ceil(2), short] {
                for known in [None, Some(&known)] {
                    let options = SvdOptions { method: MethodChoice::Exact, ..Default::default() };
                    let factored = plain_factor(&w, rank, &options, known);
                    let optimum = reference.relative_error(rank);
                    let actual = true_error(&w, &factored.factors);
                    let what = format!("{rows}x{cols} decay {decay} rank {rank}");
                    assert_eq!(factored.route, Route::Exact { precision: Precision::F64 });
                    // Factors are f32: their rounding adds about ε·‖W‖ in quadrature.
                    assert!(actual <= optimum * (1.0 + 1e-6) + 2e-7, "{what}: {actual} for {optimum}");
                    assert!(
                        (factored.relative_error - actual).abs() <= 1e-6 * actual,
                        "{what}: {factored:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn f32_is_as_good_where_the_spectrum_is_mild() {
    let w = matrix(300, 120, 0.99, 0.1, 5);
    let options =
        SvdOptions { method: MethodChoice::Exact, precision: PrecisionChoice::F32, ..Default::default() };
    let reference = direct_spectrum(&w);
    for rank in [10, 60, 100] {
        let factored = plain_factor(&w, rank, &options, None);
        let actual = true_error(&w, &factored.factors);
        assert!(actual / reference.relative_error(rank) - 1.0 < 1e-5);
        assert!((factored.relative_error / actual - 1.0).abs() < 1e-4);
    }
}

#[test]
fn zero_and_rank_deficient_matrices_have_finite_factors() {
    let zero = Tensor::from_f32(vec![6, 9], Dtype::Bf16, &[0.0; 54]).unwrap();
    let ones = Tensor::from_f32(vec![9, 6], Dtype::Bf16, &[1.0; 54]).unwrap();
    for method in [MethodChoice::Exact, MethodChoice::Randomized] {
        for precision in [PrecisionChoice::F32, PrecisionChoice::F64] {
            let options = SvdOptions { method, precision, ..Default::default() };
            let factored = plain_factor(&zero, 4, &options, None);
            assert_eq!(factored.relative_error, 0.0);
            assert!(factored.factors.u.iter().chain(&factored.factors.v).all(|&value| value == 0.0));
            let factored = plain_factor(&ones, 4, &options, None);
            assert!(factored.relative_error < 1e-6, "{factored:?}");
            assert!(factored.factors.u.iter().chain(&factored.factors.v).all(|value| value.is_finite()));
        }
    }
}

#[test]
fn both_factors_carry_the_root_of_each_singular_value() {
    let w = matrix(50, 20, 0.8, 0.0, 6);
    let Factors { u, v, rank, .. } = plain_factor(&w, 5, &SvdOptions::default(), None).factors;
    let sigma = direct_spectrum(&w);
    for j in 0..rank {
        let size =
            |values: &mut dyn Iterator<Item = &f32>| values.map(|&x| f64::from(x).powi(2)).sum::<f64>();
        for norm in [size(&mut u.iter().skip(j).step_by(rank)), size(&mut v[j * 20..(j + 1) * 20].iter())] {
            assert!((norm / sigma.sigma()[j] - 1.0).abs() < 1e-5);
        }
    }
}

#[test]
fn the_sketch_finds_a_falling_spectrum_and_reports_what_it_misses_of_a_flat_one() {
    let options = SvdOptions { method: MethodChoice::Randomized, ..Default::default() };
    for (rows, cols) in [(400, 150), (150, 400)] {
        let w = matrix(rows, cols, 0.8, 1e-3, 7);
        let known = plain_spectrum(&w, PrecisionChoice::Auto);
        let factored = plain_factor(&w, 10, &options, Some(&known));
        assert!(factored.excess_over_optimum.unwrap() < 1e-4, "{factored:?}");
        let flat = matrix(rows, cols, 1.0, 1.0, 8);
        let known = plain_spectrum(&flat, PrecisionChoice::Auto);
        let options = SvdOptions { power_iterations: 0, ..options };
        let factored = plain_factor(&flat, 10, &options, Some(&known));
        let actual = true_error(&flat, &factored.factors);
        let excess = actual / known.relative_error(10) - 1.0;
        assert!(excess > 1e-3);
        assert!((factored.excess_over_optimum.unwrap() / excess - 1.0).abs() < 1e-3);
        assert!((factored.relative_error / actual - 1.0).abs() < 1e-6);
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_workers() {
    let weights: Vec<Tensor> = (0..4).map(|seed| matrix(200, 90, 0.95, 0.01, seed)).collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let work = weights.par_iter().enumerate().flat_map(|(stream, w)| {
                [MethodChoice::Exact, MethodChoice::Randomized].into_par_iter().map(move |method| {
                    let options = SvdOptions { method, stream: stream as u64, ..Default::default() };
                    let spectrum = plain_spectrum(w, PrecisionChoice::Auto);
                    let factored = plain_factor(w, 20, &options, None);
                    (spectrum, factored)
                })
            });
            work.collect::<Vec<_>>()
        })
    };
    assert_eq!(run(1), run(2));
}

#[test]
fn ranks_and_spectra_that_do_not_fit_are_refused() {
    let w = matrix(4, 6, 1.0, 0.0, 1);
    let try_rank = |rank| factor(&Faer, &w, rank, &SvdOptions::default()).unwrap_err();
    let shape = MatrixShape { rows: 4, cols: 6 };
    assert_eq!(try_rank(0), SvdError::Rank { rank: 0, rank_max: 4, shape });
    assert_eq!(try_rank(5), SvdError::Rank { rank: 5, rank_max: 4, shape });
    let other = Spectrum::new(vec![1.0; 5]).unwrap();
    let error =
        factor(&Faer, &w, 1, &SvdOptions { spectrum: Some(&other), ..Default::default() }).unwrap_err();
    assert_eq!(error, SvdError::OtherSpectrum { values: 5, shape });
}
