//! The route by products alone reaches what eigenvectors reach.

use crate::randomized::{generator, random_signs};
use crate::residual::residual_energy;
use crate::test_support::*;
use crate::{MethodChoice, Metric, Precision, PrecisionChoice, Route, SvdOptions};
use lowrank_compute::{Faer, Kernels};
use lowrank_model::{Dtype, Spectrum, Tensor};
use ndarray::Array2;

/// W with these singular values, as f32 numbers hold it.
fn with_spectrum(sigma: &[f64], rows: usize, cols: usize, seed: u64) -> Tensor {
    let kernels: &dyn Kernels<f64> = &Faer;
    let mut rng = generator(seed, 0);
    let mut orthonormal = |size| kernels.thin_qr(uniform(size, sigma.len(), &mut rng)).unwrap();
    let (mut u, v) = (orthonormal(rows), orthonormal(cols));
    u.columns_mut().into_iter().zip(sigma).for_each(|(mut column, &sigma)| column *= sigma);
    let values: Vec<f32> = u.dot(&v.t()).iter().map(|&value| value as f32).collect();
    Tensor::from_f32(vec![rows, cols], Dtype::F32, &values).unwrap()
}

/// Error of factors at a rank by the projector over the least possible, − 1, and the route that was taken.
fn excess(w: &Tensor, rank: usize, precision: PrecisionChoice, known: Option<&Spectrum>) -> (f64, Route) {
    let options = SvdOptions { method: MethodChoice::Projector, precision, ..SvdOptions::default() };
    let factored = plain_factor(w, rank, &options, known);
    let reference = direct_spectrum(w);
    let error = (residual_energy(&Faer, w, &factored.factors) / reference.energy()).sqrt();
    assert!((factored.relative_error - error).abs() <= 1e-4 * error + 1e-7, "{factored:?}: {error}");
    // Below the rounding of f32 factors there is no telling errors apart.
    let optimum = reference.relative_error(rank).max(2e-7);
    (error / optimum - 1.0, factored.route)
}

const F32: Route = Route::Projector { precision: Precision::F32 };
const F64: Route = Route::Projector { precision: Precision::F64 };
const EIGENVECTORS: [Route; 2] =
    [Route::Exact { precision: Precision::F32 }, Route::Exact { precision: Precision::F64 }];

#[test]
fn the_optimum_is_reached_without_eigenvectors() {
    let size = 60;
    // A flat floor below a power-law head, as trained weights have it.
    let trained: Vec<f64> =
        (0..size).map(|k| 10.0 * (k as f64 + 1.0).powf(-0.9) + 1.0 - 0.5 * k as f64 / size as f64).collect();
    // Two clusters, and the rank inside of one.
    let clustered: Vec<f64> = (0..size).map(|k| if k < 40 { 1.0 } else { 0.3 } - 1e-4 * k as f64).collect();
    for (rows, cols) in [(96, size), (size, 96)] {
        for sigma in [&trained, &clustered] {
            let w = with_spectrum(sigma, rows, cols, 3);
            let known = plain_spectrum(&w, PrecisionChoice::F64);
            for rank in [1, 20, 39, 40, 59] {
                for known in [None, Some(&known)] {
                    let (excess, route) = excess(&w, rank, PrecisionChoice::F64, known);
                    assert!(excess < 1e-7 && route == F64, "rank {rank}: {excess:e}, {route}");
                    let (excess, route) = self::excess(&w, rank, PrecisionChoice::F32, known);
                    assert!(excess < 1e-6 && route == F32, "rank {rank}: {excess:e}, {route}");
                }
            }
        }
    }
}

#[test]
fn a_gap_that_rounding_closes_is_left_to_eigenvectors() {
    let mut sigma: Vec<f64> = (0..60).map(|k| 2.0 - 0.02 * f64::from(k)).collect();
    for (gap, routes) in [(1e-5, [F32, F64]), (1e-7, [EIGENVECTORS[0], F64]), (0.0, EIGENVECTORS)] {
        // On rows and columns of their own, where storing them in f32 does not open the gap again.
        sigma[30] = sigma[29] * (1.0 - gap);
        let mut values = vec![0.0_f32; 96 * 60];
        let others: Vec<f64> = sigma.iter().take(29).chain(&sigma[31..]).copied().collect();
        let block = with_spectrum(&others, 94, 58, 5).to_f32();
        for (row, numbers) in block.chunks_exact(58).enumerate() {
            values[row * 60..row * 60 + 58].copy_from_slice(numbers);
        }
        let exact = sigma[29] as f32;
        values[94 * 60 + 58] = exact;
        values[95 * 60 + 59] = if gap == 0.0 { exact } else { (f64::from(exact) * (1.0 - gap)) as f32 };
        let w = Tensor::from_f32(vec![96, 60], Dtype::F32, &values).unwrap();
        let known = plain_spectrum(&w, PrecisionChoice::F64);
        for (precision, expected) in [PrecisionChoice::F32, PrecisionChoice::F64].into_iter().zip(routes) {
            let (excess, route) = excess(&w, 30, precision, Some(&known));
            assert!(excess < 1e-6, "gap {gap:e}: {excess:e}");
            assert_eq!(route, expected, "gap {gap:e}");
        }
    }
}

#[test]
fn matrices_of_less_than_full_rank_and_full_ranks_have_factors() {
    let sigma: Vec<f64> = (0..60).map(|k| if k < 25 { 1.0 + f64::from(k % 7) } else { 0.0 }).collect();
    let mut falling = sigma.clone();
    falling.sort_by(|a, b| b.total_cmp(a));
    let w = with_spectrum(&falling, 96, 60, 7);
    let zero = Tensor::from_f32(vec![6, 9], Dtype::Bf16, &[0.0; 54]).unwrap();
    for precision in [PrecisionChoice::F32, PrecisionChoice::F64] {
        // Where the spectrum ends, beyond it, and all of it: nothing is missed but rounding.
        for rank in [25, 40, 60] {
            let error = |method| {
                let options = SvdOptions { method, precision, ..SvdOptions::default() };
                let factored = plain_factor(&w, rank, &options, None);
                residual_energy(&Faer, &w, &factored.factors).sqrt() / direct_spectrum(&w).energy().sqrt()
            };
            let (found, least) = (error(MethodChoice::Projector), error(MethodChoice::Exact));
            assert!(found < 2.0 * least + 1e-7, "{rank}, {precision:?}: {found:e} for {least:e}");
        }
        let options = SvdOptions { method: MethodChoice::Projector, precision, ..SvdOptions::default() };
        assert_eq!(plain_factor(&zero, 4, &options, None).relative_error, 0.0);
    }
    assert_eq!(excess(&w, 25, PrecisionChoice::F64, None).1, F64);
}

#[test]
fn a_metric_is_met_as_well_as_by_eigenvectors() {
    let (rows, cols) = (50, 30);
    let sigma: Vec<f64> = (0..cols).map(|k| 3.0 / (k as f64 + 2.0)).collect();
    let w = with_spectrum(&sigma, rows, cols, 9);
    let seen = random_signs::<f64>(cols, 80, generator(10, 0));
    let seen = Array2::from_shape_fn(seen.dim(), |(i, j)| seen[[i, j]] / (1.0 + i as f64));
    let moment = seen.dot(&seen.t());
    let weights: Vec<f64> = (0..rows).map(|i| 1.0 / (1.0 + i as f64)).collect();
    let of_outputs = Array2::from_diag(&ndarray::Array1::from(weights.clone()));
    for metric in [
        Metric::Inputs {
            second_moment: &moment,
            row_weights: &weights,
            shrinkage: 0.1,
            map: None,
            root: None,
        },
        Metric::Outputs { second_moment: &of_outputs, shrinkage: 0.1, map: None },
    ] {
        let options = SvdOptions { method: MethodChoice::Projector, ..SvdOptions::default() };
        let exact = SvdOptions { method: MethodChoice::Exact, ..options };
        let best = factor_in(&w, 12, &metric, &exact, None);
        let known = spectrum_in(&w, &metric, PrecisionChoice::F64);
        for known in [None, Some(&known)] {
            let factored = factor_in(&w, 12, &metric, &options, known);
            assert_eq!((best.route, factored.route), (EIGENVECTORS[1], F64));
            let (error, least) = (factored.metric_error.unwrap(), best.metric_error.unwrap());
            assert!(error / least - 1.0 < 1e-6, "{error} for {least}");
        }
    }
}
