//! Every norm against a direct SVD of a matrix that holds the activations themselves, never their second moment: with inputs
//! x₁ … xₜ as columns of X, C = X Xᵀ and the error is ‖D^½ (W − Ŵ) [√(1−b) X, √(b tr C/n) I]‖².

use crate::engine::{All, Engine};
use crate::randomized::generator;
use crate::test_support::*;
use crate::{Factored, Factors, MethodChoice, Metric, Precision, PrecisionChoice, Route, SvdOptions};
use lowrank_compute::{Faer, Kernels};
use lowrank_model::{Dtype, Spectrum, Tensor};
use ndarray::{Array2, Axis, concatenate};
use rand_chacha::ChaCha8Rng;

const EXACT: SvdOptions<'_> = SvdOptions {
    metric: Metric::Weights,
    method: MethodChoice::Exact,
    precision: PrecisionChoice::Auto,
    seed: 0,
    stream: 0,
    power_iterations: 4,
    oversampling_percent: 50,
    spectrum: None,
    reduction: None,
};

/// Σ over k of decay^k · aₖ bₖᵀ + noise.
fn falling(rows: usize, cols: usize, decay: f64, noise: f64, rng: &mut ChaCha8Rng) -> Array2<f64> {
    let terms = rows.min(cols);
    let mut a = uniform(rows, terms, rng);
    for (k, mut column) in a.columns_mut().into_iter().enumerate() {
        column *= decay.powi(k as i32);
    }
    a.dot(&uniform(terms, cols, rng)) + noise * uniform(rows, cols, rng)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Inputs,
    Outputs,
}

/// A matrix with its activations.
struct Case {
    w: Tensor,
    wide: Array2<f64>,
    side: Side,
    moment: Array2<f64>,
    row_weights: Vec<f64>,
    shrinkage: f64,
    /// The error is ‖D^½ (W − Ŵ) `stacked`‖.
    stacked: Array2<f64>,
}

impl Case {
    fn new(side: Side, shape: (usize, usize), tokens: usize, shrinkage: f64, seed: u64) -> Self {
        let rng = &mut generator(seed, 9);
        let (m, n) = shape;
        let weights: Vec<f32> = falling(m, n, 0.97, 0.05, rng).iter().map(|&value| value as f32).collect();
        let wide = Array2::from_shape_vec(shape, weights.iter().map(|&w| f64::from(w)).collect()).unwrap();
        let w = Tensor::from_f32(vec![m, n], Dtype::F32, &weights).unwrap();
        // On a scale far from 1, as sums over many tokens are.
        let inputs = 300.0 * falling(n, tokens, 0.9, 0.02, rng);
        let row_weights = match side {
            Side::Inputs => {
                (0..m).map(|i| if i % 5 == 1 { 0.0 } else { 1e-4 * (1.0 + (i % 7) as f64) }).collect()
            }
            Side::Outputs => vec![1.0; m],
        };
        let outputs = wide.dot(&inputs);
        let energy = |matrix: &Array2<f64>| matrix.iter().map(|value| value * value).sum::<f64>();
        let (moment, prior) = match side {
            Side::Inputs => (inputs.dot(&inputs.t()), energy(&inputs) / n as f64),
            Side::Outputs => (outputs.dot(&outputs.t()), energy(&outputs) / energy(&wide)),
        };
        let stacked = concatenate![
            Axis(1),
            (1.0 - shrinkage).sqrt() * inputs,
            (shrinkage * prior).sqrt() * Array2::eye(n)
        ];
        Self { w, wide, side, moment, row_weights, shrinkage, stacked }
    }

    fn metric(&self) -> Metric<'_> {
        match self.side {
            Side::Inputs => Metric::Inputs {
                second_moment: &self.moment,
                row_weights: &self.row_weights,
                shrinkage: self.shrinkage,
                map: None,
                root: None,
            },
            Side::Outputs => {
                Metric::Outputs { second_moment: &self.moment, shrinkage: self.shrinkage, map: None }
            }
        }
    }

    fn short(&self) -> usize {
        self.wide.nrows().min(self.wide.ncols())
    }

    /// D^½ E [X, I]
    fn weighted(&self, error: &Array2<f64>) -> Array2<f64> {
        let mut weighted = error.dot(&self.stacked);
        for (mut row, d) in weighted.rows_mut().into_iter().zip(&self.row_weights) {
            row *= d.sqrt();
        }
        weighted
    }

    /// The least error of every rank, by a direct SVD.
    fn optimum(&self) -> Spectrum {
        let kernels: &dyn Kernels<f64> = &Faer;
        let mut sigma = kernels.singular_values(self.weighted(&self.wide)).unwrap();
        sigma.truncate(self.short());
        sigma.resize(self.short(), 0.0);
        Spectrum::new(sigma).unwrap()
    }

    fn product(factors: &Factors) -> Array2<f64> {
        let (u, v) = crate::residual::wide(factors);
        u.dot(&v)
    }

    /// ‖D^½ (W − u·v) [X, I]‖ relative to u·v = 0.
    fn error(&self, factored: &Factored) -> f64 {
        self.error_of(&factored.factors)
    }

    fn error_of(&self, factors: &Factors) -> f64 {
        let size = |w: Array2<f64>| self.weighted(&w).iter().map(|value| value * value).sum::<f64>().sqrt();
        size(&self.wide - Self::product(factors)) / size(self.wide.clone())
    }

    /// ‖W − u·v‖ / ‖W‖
    fn plain_error(&self, factored: &Factored) -> f64 {
        let size = |w: Array2<f64>| w.iter().map(|value| value * value).sum::<f64>().sqrt();
        size(&self.wide - Self::product(&factored.factors)) / size(self.wide.clone())
    }
}

fn cases() -> impl Iterator<Item = (String, Case)> {
    let shapes = |side| match side {
        // More than one block of rows, where the eigenproblem stays small.
        Side::Inputs => [(60, 24), (24, 60), (30, 30), (1, 12), (12, 1), (1, 1), (1100, 10)],
        Side::Outputs => [(60, 24), (24, 60), (30, 30), (1, 12), (12, 1), (1, 1), (10, 1100)],
    };
    let kinds = [Side::Inputs, Side::Outputs].into_iter().flat_map(move |side| {
        shapes(side).into_iter().flat_map(move |shape| {
            // Nine tokens make a singular moment.
            [200, 9].into_iter().flat_map(move |tokens| {
                [0.0, 0.1, 1.0].into_iter().map(move |shrinkage| (side, shape, tokens, shrinkage))
            })
        })
    });
    kinds.map(|(side, shape, tokens, shrinkage)| {
        let what = format!("{side:?} {shape:?} {tokens} tokens shrinkage {shrinkage}");
        (what, Case::new(side, shape, tokens, shrinkage, 3))
    })
}

#[test]
fn the_spectrum_in_a_metric_is_that_of_the_activations() {
    for (what, case) in cases() {
        let expected = case.optimum();
        let spectrum = spectrum_in(&case.w, &case.metric(), PrecisionChoice::Auto);
        assert_eq!(spectrum.sigma().len(), case.short(), "{what}");
        let first = expected.sigma()[0];
        for (rank, (value, expected)) in
            spectrum.tail_energies().iter().zip(expected.tail_energies()).enumerate()
        {
            // A Gram matrix squares: ε of λ₁.
            assert!(
                (value - expected).abs() <= 1e-9 * expected + 1e-12 * first * first,
                "{what} rank {rank}: {value:e} for {expected:e}"
            );
        }
    }
}

#[test]
fn factors_reach_the_optimum_of_the_metric_and_know_their_errors() {
    for (what, case) in cases() {
        let (reference, metric) = (case.optimum(), case.metric());
        let known = spectrum_in(&case.w, &metric, PrecisionChoice::Auto);
        let short = case.short();
        for rank in [1, short.div_ceil(2), short] {
            let optimum = reference.relative_error(rank);
            let (spectrum, both) = decompose_in(&case.w, rank, &metric, &EXACT);
            let alone = factor_in(&case.w, rank, &metric, &EXACT, None);
            let informed = factor_in(&case.w, rank, &metric, &EXACT, Some(&known));
            let sure = factor_in(&case.w, rank, &metric, &EXACT, Some(&spectrum));
            assert_eq!(alone.factors, both, "{what}");
            assert_eq!(alone.factors, informed.factors, "{what}");
            assert!((spectrum.energy() / known.energy() - 1.0).abs() < 1e-12, "{what}");
            let (actual, plain) = (case.error(&alone), case.plain_error(&alone));
            // Factors are f32: their rounding adds about ε in quadrature.
            assert!(actual <= optimum * (1.0 + 1e-9) + 2e-7, "{what} rank {rank}: {actual} for {optimum}");
            let reported = alone.metric_error.unwrap();
            assert!(
                (reported - actual).abs() <= 1e-7 * actual + 1e-7,
                "{what} rank {rank}: {reported} for {actual}"
            );
            if optimum > 1e-6 {
                assert!(sure.excess_over_optimum.unwrap() < 1e-6, "{what} rank {rank}: {sure:?}");
                assert!(informed.excess_over_optimum.unwrap() < 1e-6, "{what} rank {rank}: {informed:?}");
            }
            assert_eq!(alone.route, Route::Exact { precision: Precision::F64 });
            assert!((alone.relative_error - plain).abs() <= 1e-6 * plain + 1e-9, "{what}");
        }
    }
}

#[test]
fn calibrated_factors_err_more_in_the_weights_and_less_in_the_activations() {
    for side in [Side::Inputs, Side::Outputs] {
        let case = Case::new(side, (60, 24), 200, 0.1, 5);
        let calibrated = factor_in(&case.w, 6, &case.metric(), &EXACT, None);
        let plain = plain_factor(&case.w, 6, &EXACT, None);
        assert!(case.error(&calibrated) < 0.99 * case.error(&plain), "{side:?}");
        assert!(calibrated.relative_error > 1.001 * plain.relative_error, "{side:?}");
    }
}

#[test]
fn weights_as_metric_give_the_bits_of_a_data_free_run() {
    let case = Case::new(Side::Inputs, (60, 24), 9, 0.1, 5);
    for precision in [PrecisionChoice::Auto, PrecisionChoice::F32, PrecisionChoice::F64] {
        for method in [MethodChoice::Exact, MethodChoice::Randomized] {
            let options = SvdOptions { method, precision, ..EXACT };
            let free = plain_spectrum(&case.w, precision);
            assert_eq!(spectrum_in(&case.w, &Metric::Weights, precision), free);
            let factored = plain_factor(&case.w, 5, &options, Some(&free));
            assert_eq!(factor_in(&case.w, 5, &Metric::Weights, &options, Some(&free)), factored);
            assert_eq!(factored.metric_error, None);
            if method == MethodChoice::Exact {
                let both = decompose_in(&case.w, 5, &Metric::Weights, &options);
                assert_eq!(both, (free, factored.factors));
            }
        }
    }
}

#[test]
fn a_vanishing_second_moment_is_factored_as_without_data() {
    let (m, n) = (12, 7);
    let case = Case::new(Side::Inputs, (m, n), 9, 0.1, 5);
    let (inputs, outputs, rows) = (Array2::zeros((n, n)), Array2::zeros((m, m)), vec![1.0; m]);
    let (eye, no_rows) = (Array2::eye(n), vec![0.0; m]);
    for metric in [
        Metric::Inputs { second_moment: &inputs, row_weights: &rows, shrinkage: 0.1, map: None, root: None },
        Metric::Inputs { second_moment: &eye, row_weights: &no_rows, shrinkage: 0.0, map: None, root: None },
        Metric::Outputs { second_moment: &outputs, shrinkage: 0.1, map: None },
    ] {
        let free = plain_spectrum(&case.w, PrecisionChoice::Auto);
        assert_eq!(spectrum_in(&case.w, &metric, PrecisionChoice::Auto), free);
        let factored = factor_in(&case.w, 3, &metric, &EXACT, None);
        assert_eq!(factored, plain_factor(&case.w, 3, &EXACT, None));
        assert_eq!(decompose_in(&case.w, 3, &metric, &EXACT).0, free);
    }
}

#[test]
fn zero_weights_and_single_directions_have_finite_factors() {
    let (m, n) = (12, 7);
    let weights: Vec<f32> = (0..m * n).map(|i| if i / n == 4 { 0.0 } else { (i % 5) as f32 - 2.0 }).collect();
    let zero = Tensor::from_f32(vec![m, n], Dtype::Bf16, &[0.0; 84]).unwrap();
    let some = Tensor::from_f32(vec![m, n], Dtype::Bf16, &weights).unwrap();
    let one_input = Array2::from_shape_fn((n, n), |place| if place == (2, 2) { 1e-30 } else { 0.0 });
    let one_output = Array2::from_shape_fn((m, m), |place| if place == (4, 4) { 1e30 } else { 0.0 });
    // The only row that counts is zero.
    let rows: Vec<f64> = (0..m).map(|i| if i == 4 { 1e-30 } else { 0.0 }).collect();
    for w in [&zero, &some] {
        for shrinkage in [0.0, 0.1] {
            for metric in [
                Metric::Inputs {
                    second_moment: &one_input,
                    row_weights: &[1.0; 12],
                    shrinkage,
                    map: None,
                    root: None,
                },
                Metric::Inputs {
                    second_moment: &one_input,
                    row_weights: &rows,
                    shrinkage,
                    map: None,
                    root: None,
                },
                Metric::Outputs { second_moment: &one_output, shrinkage, map: None },
            ] {
                for method in [MethodChoice::Exact, MethodChoice::Randomized] {
                    for precision in [PrecisionChoice::F32, PrecisionChoice::F64] {
                        let options = SvdOptions { method, precision, ..EXACT };
                        let spectrum = spectrum_in(w, &metric, precision);
                        let factored = factor_in(w, 4, &metric, &options, Some(&spectrum));
                        let Factored { factors, relative_error, metric_error, .. } = &factored;
                        assert!(factors.u.iter().chain(&factors.v).all(|value| value.is_finite()));
                        assert!(relative_error.is_finite() && metric_error.is_none_or(f64::is_finite));
                    }
                }
            }
        }
    }
}

#[test]
fn a_direction_counts_only_through_the_shrinkage() {
    // Only the first input is ever nonzero; rank 1 keeps its column exactly and drops the rest.
    let w = Tensor::from_f32(vec![3, 3], Dtype::F32, &[1.0, 9.0, 5.0, 2.0, 8.0, 6.0, 3.0, 7.0, 4.0]).unwrap();
    let moment = Array2::from_shape_fn((3, 3), |place| if place == (0, 0) { 6.0 } else { 0.0 });
    let metric = |shrinkage| Metric::Inputs {
        second_moment: &moment,
        row_weights: &[1.0; 3],
        shrinkage,
        map: None,
        root: None,
    };
    let found = spectrum_in(&w, &metric(0.0), PrecisionChoice::Auto);
    for (value, expected) in found.sigma().iter().zip([84.0_f64.sqrt(), 0.0, 0.0]) {
        assert!((value - expected).abs() < 1e-12);
    }
    for rank in [1, 3] {
        let factored = factor_in(&w, rank, &metric(0.0), &EXACT, None);
        for (place, value) in Case::product(&factored.factors).indexed_iter() {
            let expected = [1.0, 2.0, 3.0][place.0] * f64::from(u8::from(place.1 == 0));
            assert!((value - expected).abs() < 1e-6, "{place:?} {value}");
        }
    }
    let factored = factor_in(&w, 3, &metric(1e-3), &EXACT, None);
    assert!(factored.relative_error < 1e-6);
}

#[test]
fn f32_is_as_good_where_the_metric_is_mild() {
    for side in [Side::Inputs, Side::Outputs] {
        let case = Case::new(side, (300, 120), 400, 0.5, 5);
        let (reference, metric) = (case.optimum(), case.metric());
        let options = SvdOptions { precision: PrecisionChoice::F32, ..EXACT };
        for rank in [10, 60] {
            let (spectrum, both) = decompose_in(&case.w, rank, &metric, &options);
            let factored = factor_in(&case.w, rank, &metric, &options, Some(&spectrum));
            assert_eq!(factored.factors, both);
            assert_eq!(factored.route, Route::Exact { precision: Precision::F32 });
            let (actual, optimum) = (case.error(&factored), reference.relative_error(rank));
            assert!(actual / optimum - 1.0 < 1e-4, "{side:?} {rank}: {actual} for {optimum}");
            assert!((factored.metric_error.unwrap() / actual - 1.0).abs() < 1e-5);
            let alone = spectrum_in(&case.w, &metric, PrecisionChoice::F32);
            for spectrum in [spectrum, alone] {
                let predicted = spectrum.relative_error(rank);
                assert!(
                    (predicted / optimum - 1.0).abs() < 1e-4,
                    "{side:?} {rank}: {predicted} for {optimum}"
                );
            }
        }
    }
}

/// Every norm that spreads eigenvalues, on the scale of a large model: 2,000 of them do not fit a test.
#[test]
fn eigenvectors_in_f32_give_the_spectrum_and_factors_of_f64() {
    for side in [Side::Inputs, Side::Outputs] {
        for (tokens, shrinkage) in [(400, 0.5), (400, 0.05), (400, 0.01), (30, 0.05)] {
            let what = format!("{side:?} {tokens} tokens shrinkage {shrinkage}");
            let case = Case::new(side, (300, 120), tokens, shrinkage, 5);
            let reference = case.optimum();
            let options = SvdOptions { metric: case.metric(), ..EXACT };
            for rank in [10, 60, 100] {
                let engine = Engine::new(&Faer, &case.w, &options, Some(rank)).unwrap();
                let from_f64 = engine.truncated(rank, case.short()).unwrap();
                let from_f64 = case.error_of(&from_f64.balanced.factors);
                for all in [All::None, All::Vectors, All::VectorsAndImage] {
                    let (found, image) = engine.eigenvectors_in_f32(rank, all).unwrap();
                    assert_eq!(image.is_some(), all == All::VectorsAndImage && side == Side::Inputs);
                    let (spectrum, factors) = engine.finished(found, rank).unwrap();
                    let error = case.error_of(&factors);
                    let excess = error * error - from_f64 * from_f64;
                    // Below ε·λ₁ eigenvectors are any: there an error is no longer the least.
                    let allowed = if from_f64 > 0.1 { 5e-9 } else { 1e-6 };
                    assert!(excess < allowed, "{what} rank {rank}: {error} and {from_f64}");
                    if all == All::None {
                        continue;
                    }
                    for (rank, (found, expected)) in
                        spectrum.tail_energies().iter().zip(reference.tail_energies()).enumerate()
                    {
                        let tolerance = 1e-6 * (expected + reference.energy());
                        assert!(
                            (found - expected).abs() <= tolerance,
                            "{what} rank {rank}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_sketch_finds_a_falling_spectrum_in_either_metric() {
    for side in [Side::Inputs, Side::Outputs] {
        for shape in [(400, 150), (150, 400)] {
            for (tokens, shrinkage) in [(500, 0.1), (500, 0.0), (40, 0.1), (40, 0.0), (4, 0.0)] {
                let case = Case::new(side, shape, tokens, shrinkage, 7);
                let (metric, reference) = (case.metric(), case.optimum());
                let what = format!("{side:?} {shape:?} {tokens} tokens shrinkage {shrinkage}");
                let options = SvdOptions { method: MethodChoice::Randomized, ..EXACT };
                let factored = factor_in(&case.w, 10, &metric, &options, Some(&reference));
                let (actual, optimum) = (case.error(&factored), reference.relative_error(10));
                assert!(actual <= optimum * (1.0 + 1e-4) + 2e-7, "{what}: {actual} for {optimum}");
                let reported = factored.metric_error.unwrap();
                assert!((reported - actual).abs() <= 1e-5 * actual + 1e-7, "{what}: {reported} for {actual}");
                let plain = case.plain_error(&factored);
                assert!((factored.relative_error - plain).abs() <= 1e-6 * plain, "{what}");
                let again = factor_in(&case.w, 10, &metric, &options, None);
                assert_eq!(again.factors, factored.factors);
                assert!(matches!(again.route, Route::Randomized { sketch_columns: 26, .. }), "{what}");
            }
        }
    }
}

#[test]
fn moments_that_do_not_fit_are_refused() {
    let w = Tensor::from_f32(vec![2, 3], Dtype::F32, &[1.0; 6]).unwrap();
    let (two, mut three) = (Array2::eye(2), Array2::eye(3));
    let refusal = |metric: Metric<'_>| {
        crate::spectrum(&Faer, &w, &SvdOptions { metric, ..EXACT }).unwrap_err().to_string()
    };
    fn inputs<'a>(second_moment: &'a Array2<f64>, row_weights: &'a [f64], shrinkage: f64) -> Metric<'a> {
        Metric::Inputs { second_moment, row_weights, shrinkage, map: None, root: None }
    }
    assert_eq!(
        refusal(inputs(&two, &[1.0; 2], 0.1)),
        "a moment [2, 2] was given for a matrix [2, 3], where it must be [3, 3]"
    );
    assert_eq!(
        refusal(Metric::Outputs { second_moment: &three, shrinkage: 0.1, map: None }),
        "a moment [3, 3] was given for a matrix [2, 3], where it must be [2, 2]"
    );
    assert_eq!(
        refusal(inputs(&three, &[1.0; 3], 0.1)),
        "3 row weights were given for a matrix [2, 3]: one per row is needed"
    );
    assert_eq!(
        refusal(inputs(&three, &[1.0, -2.0], 0.1)),
        "row weight 1 is -2: it must be finite and not negative"
    );
    assert_eq!(refusal(inputs(&three, &[1.0; 2], 1.5)), "the shrinkage is 1.5: it must lie in 0..=1");
    three[[2, 1]] = f64::NAN;
    assert_eq!(
        refusal(inputs(&three, &[1.0; 2], 0.1)),
        "entry [2, 1] of the moment is NaN: every entry must be finite"
    );
}
