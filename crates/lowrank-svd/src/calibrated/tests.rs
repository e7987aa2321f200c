//! Every form against a direct SVD of a matrix that holds the seen activations themselves, never their moment: with inputs
//! x₁ … xₜ as columns of X, C = X Xᵀ and the error is ‖D^½ (W − Ŵ) [√(1−b) X, √(b tr C/n) I]‖².

use super::*;
use crate::{MethodChoice, Route};
use lowrank_compute::Faer;
use lowrank_model::Dtype;
use ndarray::{ArrayView2, Axis, concatenate};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;

const EXACT: FactorOptions = FactorOptions {
    method: MethodChoice::Exact,
    precision: PrecisionChoice::Auto,
    seed: 0,
    stream: 0,
    power_iterations: 4,
    oversampling_percent: 50,
};

fn uniform(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Array2<f64> {
    Array2::from_shape_simple_fn((rows, cols), || f64::from(rng.next_u32()) / 2.0_f64.powi(31) - 1.0)
}

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
enum Form {
    Inputs,
    Outputs,
}

/// A matrix with the activations that it saw.
struct Case {
    w: Tensor,
    wide: Array2<f64>,
    form: Form,
    moment: Array2<f64>,
    rows: Vec<f64>,
    blend: f64,
    /// The error is ‖D^½ (W − Ŵ) `seen`‖.
    seen: Array2<f64>,
}

impl Case {
    fn new(form: Form, shape: (usize, usize), tokens: usize, blend: f64, seed: u64) -> Self {
        let rng = &mut generator(seed, 9);
        let (m, n) = shape;
        let weights: Vec<f32> = falling(m, n, 0.97, 0.05, rng).iter().map(|&value| value as f32).collect();
        let wide = Array2::from_shape_vec(shape, weights.iter().map(|&w| f64::from(w)).collect()).unwrap();
        let w = Tensor::from_f32(vec![m, n], Dtype::F32, &weights).unwrap();
        // On a scale far from 1, as sums over many tokens are.
        let inputs = 300.0 * falling(n, tokens, 0.9, 0.02, rng);
        let rows = match form {
            Form::Inputs => {
                (0..m).map(|i| if i % 5 == 1 { 0.0 } else { 1e-4 * (1.0 + (i % 7) as f64) }).collect()
            }
            Form::Outputs => vec![1.0; m],
        };
        let outputs = wide.dot(&inputs);
        let energy = |matrix: &Array2<f64>| matrix.iter().map(|value| value * value).sum::<f64>();
        let (moment, unseen) = match form {
            Form::Inputs => (inputs.dot(&inputs.t()), energy(&inputs) / n as f64),
            Form::Outputs => (outputs.dot(&outputs.t()), energy(&outputs) / energy(&wide)),
        };
        let seen =
            concatenate![Axis(1), (1.0 - blend).sqrt() * inputs, (blend * unseen).sqrt() * Array2::eye(n)];
        Self { w, wide, form, moment, rows, blend, seen }
    }

    fn metric(&self) -> Metric<'_> {
        match self.form {
            Form::Inputs => Metric::Inputs {
                moment: self.moment.view(),
                rows: &self.rows,
                blend: self.blend,
                map: None,
                root: None,
            },
            Form::Outputs => Metric::Outputs { moment: self.moment.view(), blend: self.blend, map: None },
        }
    }

    fn short(&self) -> usize {
        self.wide.nrows().min(self.wide.ncols())
    }

    /// D^½ E [X, I]
    fn met(&self, error: &Array2<f64>) -> Array2<f64> {
        let mut met = error.dot(&self.seen);
        for (mut row, d) in met.rows_mut().into_iter().zip(&self.rows) {
            row *= d.sqrt();
        }
        met
    }

    /// The least error of every rank, by a direct SVD.
    fn optimum(&self) -> Spectrum {
        let kernels: &dyn Kernels<f64> = &Faer;
        let mut sigma = kernels.singular_values(self.met(&self.wide)).unwrap();
        sigma.truncate(self.short());
        sigma.resize(self.short(), 0.0);
        Spectrum::new(sigma).unwrap()
    }

    fn product(factored: &Factored) -> Array2<f64> {
        let (u, v) = crate::residual::wide(&factored.factors);
        u.dot(&v)
    }

    /// ‖D^½ (W − u·v) [X, I]‖ relative to u·v = 0.
    fn error(&self, factored: &Factored) -> f64 {
        let size = |w: Array2<f64>| self.met(&w).iter().map(|value| value * value).sum::<f64>().sqrt();
        size(&self.wide - Self::product(factored)) / size(self.wide.clone())
    }

    /// ‖W − u·v‖ / ‖W‖
    fn plain_error(&self, factored: &Factored) -> f64 {
        let size = |w: Array2<f64>| w.iter().map(|value| value * value).sum::<f64>().sqrt();
        size(&self.wide - Self::product(factored)) / size(self.wide.clone())
    }
}

fn cases() -> impl Iterator<Item = (String, Case)> {
    let shapes = |form| match form {
        // More than one block of rows, where the eigenproblem stays small.
        Form::Inputs => [(60, 24), (24, 60), (30, 30), (1, 12), (12, 1), (1, 1), (1100, 10)],
        Form::Outputs => [(60, 24), (24, 60), (30, 30), (1, 12), (12, 1), (1, 1), (10, 1100)],
    };
    let kinds = [Form::Inputs, Form::Outputs].into_iter().flat_map(move |form| {
        shapes(form).into_iter().flat_map(move |shape| {
            // Nine tokens make a singular moment.
            [200, 9].into_iter().flat_map(move |tokens| {
                [0.0, 0.1, 1.0].into_iter().map(move |blend| (form, shape, tokens, blend))
            })
        })
    });
    kinds.map(|(form, shape, tokens, blend)| {
        let what = format!("{form:?} {shape:?} {tokens} tokens blend {blend}");
        (what, Case::new(form, shape, tokens, blend, 3))
    })
}

#[test]
fn the_spectrum_in_a_metric_is_that_of_the_activations() {
    for (what, case) in cases() {
        let expected = case.optimum();
        let spectrum = spectrum_in(&Faer, &case.w, &case.metric(), PrecisionChoice::Auto).unwrap();
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
        let known = spectrum_in(&Faer, &case.w, &metric, PrecisionChoice::Auto).unwrap();
        let short = case.short();
        for rank in [1, short.div_ceil(2), short] {
            let optimum = reference.relative_error(rank);
            let (spectrum, both) = decompose_in(&Faer, &case.w, rank, &metric, &EXACT).unwrap();
            let alone = factor_in(&Faer, &case.w, rank, &metric, &EXACT, None).unwrap();
            let informed = factor_in(&Faer, &case.w, rank, &metric, &EXACT, Some(&known)).unwrap();
            let sure = factor_in(&Faer, &case.w, rank, &metric, &EXACT, Some(&spectrum)).unwrap();
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
fn calibrated_factors_miss_more_of_the_weights_and_less_of_what_was_seen() {
    for form in [Form::Inputs, Form::Outputs] {
        let case = Case::new(form, (60, 24), 200, 0.1, 5);
        let calibrated = factor_in(&Faer, &case.w, 6, &case.metric(), &EXACT, None).unwrap();
        let plain = factor(&Faer, &case.w, 6, &EXACT, None).unwrap();
        assert!(case.error(&calibrated) < 0.99 * case.error(&plain), "{form:?}");
        assert!(calibrated.relative_error > 1.001 * plain.relative_error, "{form:?}");
    }
}

#[test]
fn weights_as_metric_give_the_bits_of_a_data_free_run() {
    let case = Case::new(Form::Inputs, (60, 24), 9, 0.1, 5);
    for precision in [PrecisionChoice::Auto, PrecisionChoice::F32, PrecisionChoice::F64] {
        for method in [MethodChoice::Exact, MethodChoice::Randomized] {
            let options = FactorOptions { method, precision, ..EXACT };
            let free = spectrum(&Faer, &case.w, precision).unwrap();
            assert_eq!(spectrum_in(&Faer, &case.w, &Metric::Weights, precision).unwrap(), free);
            let factored = factor(&Faer, &case.w, 5, &options, Some(&free)).unwrap();
            assert_eq!(
                factor_in(&Faer, &case.w, 5, &Metric::Weights, &options, Some(&free)).unwrap(),
                factored
            );
            assert_eq!(factored.metric_error, None);
            if method == MethodChoice::Exact {
                let both = decompose_in(&Faer, &case.w, 5, &Metric::Weights, &options).unwrap();
                assert_eq!(both, (free, factored.factors));
            }
        }
    }
}

#[test]
fn what_saw_nothing_is_factored_as_without_data() {
    let (m, n) = (12, 7);
    let case = Case::new(Form::Inputs, (m, n), 9, 0.1, 5);
    let (inputs, outputs, rows) = (Array2::zeros((n, n)), Array2::zeros((m, m)), vec![1.0; m]);
    let (eye, no_rows) = (Array2::eye(n), vec![0.0; m]);
    for metric in [
        Metric::Inputs { moment: inputs.view(), rows: &rows, blend: 0.1, map: None, root: None },
        Metric::Inputs { moment: eye.view(), rows: &no_rows, blend: 0.0, map: None, root: None },
        Metric::Outputs { moment: outputs.view(), blend: 0.1, map: None },
    ] {
        let free = spectrum(&Faer, &case.w, PrecisionChoice::Auto).unwrap();
        assert_eq!(spectrum_in(&Faer, &case.w, &metric, PrecisionChoice::Auto).unwrap(), free);
        let factored = factor_in(&Faer, &case.w, 3, &metric, &EXACT, None).unwrap();
        assert_eq!(factored, factor(&Faer, &case.w, 3, &EXACT, None).unwrap());
        assert_eq!(decompose_in(&Faer, &case.w, 3, &metric, &EXACT).unwrap().0, free);
    }
}

#[test]
fn zero_weights_and_lonely_directions_have_finite_factors() {
    let (m, n) = (12, 7);
    let weights: Vec<f32> = (0..m * n).map(|i| if i / n == 4 { 0.0 } else { (i % 5) as f32 - 2.0 }).collect();
    let zero = Tensor::from_f32(vec![m, n], Dtype::Bf16, &[0.0; 84]).unwrap();
    let some = Tensor::from_f32(vec![m, n], Dtype::Bf16, &weights).unwrap();
    let one_input = Array2::from_shape_fn((n, n), |place| if place == (2, 2) { 1e-30 } else { 0.0 });
    let one_output = Array2::from_shape_fn((m, m), |place| if place == (4, 4) { 1e30 } else { 0.0 });
    // The only row that counts is zero.
    let rows: Vec<f64> = (0..m).map(|i| if i == 4 { 1e-30 } else { 0.0 }).collect();
    for w in [&zero, &some] {
        for blend in [0.0, 0.1] {
            for metric in [
                Metric::Inputs { moment: one_input.view(), rows: &[1.0; 12], blend, map: None, root: None },
                Metric::Inputs { moment: one_input.view(), rows: &rows, blend, map: None, root: None },
                Metric::Outputs { moment: one_output.view(), blend, map: None },
            ] {
                for method in [MethodChoice::Exact, MethodChoice::Randomized] {
                    for precision in [PrecisionChoice::F32, PrecisionChoice::F64] {
                        let options = FactorOptions { method, precision, ..EXACT };
                        let spectrum = spectrum_in(&Faer, w, &metric, precision).unwrap();
                        let factored = factor_in(&Faer, w, 4, &metric, &options, Some(&spectrum)).unwrap();
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
fn an_unseen_direction_counts_only_through_the_blend() {
    // Only the first input was ever seen; rank 1 keeps its column exactly and drops the rest.
    let w = Tensor::from_f32(vec![3, 3], Dtype::F32, &[1.0, 9.0, 5.0, 2.0, 8.0, 6.0, 3.0, 7.0, 4.0]).unwrap();
    let moment = Array2::from_shape_fn((3, 3), |place| if place == (0, 0) { 6.0 } else { 0.0 });
    let metric =
        |blend| Metric::Inputs { moment: moment.view(), rows: &[1.0; 3], blend, map: None, root: None };
    let seen = spectrum_in(&Faer, &w, &metric(0.0), PrecisionChoice::Auto).unwrap();
    for (value, expected) in seen.sigma().iter().zip([84.0_f64.sqrt(), 0.0, 0.0]) {
        assert!((value - expected).abs() < 1e-12);
    }
    for rank in [1, 3] {
        let factored = factor_in(&Faer, &w, rank, &metric(0.0), &EXACT, None).unwrap();
        for (place, value) in Case::product(&factored).indexed_iter() {
            let expected = [1.0, 2.0, 3.0][place.0] * f64::from(u8::from(place.1 == 0));
            assert!((value - expected).abs() < 1e-6, "{place:?} {value}");
        }
    }
    let factored = factor_in(&Faer, &w, 3, &metric(1e-3), &EXACT, None).unwrap();
    assert!(factored.relative_error < 1e-6);
}

#[test]
fn f32_is_as_good_where_the_metric_is_mild() {
    for form in [Form::Inputs, Form::Outputs] {
        let case = Case::new(form, (300, 120), 400, 0.5, 5);
        let (reference, metric) = (case.optimum(), case.metric());
        let options = FactorOptions { precision: PrecisionChoice::F32, ..EXACT };
        for rank in [10, 60] {
            let (spectrum, both) = decompose_in(&Faer, &case.w, rank, &metric, &options).unwrap();
            let factored = factor_in(&Faer, &case.w, rank, &metric, &options, Some(&spectrum)).unwrap();
            assert_eq!(factored.factors, both);
            assert_eq!(factored.route, Route::Exact { precision: Precision::F32 });
            let (actual, optimum) = (case.error(&factored), reference.relative_error(rank));
            assert!(actual / optimum - 1.0 < 1e-4, "{form:?} {rank}: {actual} for {optimum}");
            assert!((factored.metric_error.unwrap() / actual - 1.0).abs() < 1e-5);
            let alone = spectrum_in(&Faer, &case.w, &metric, PrecisionChoice::F32).unwrap();
            for spectrum in [spectrum, alone] {
                let predicted = spectrum.relative_error(rank);
                assert!(
                    (predicted / optimum - 1.0).abs() < 1e-4,
                    "{form:?} {rank}: {predicted} for {optimum}"
                );
            }
        }
    }
}

#[test]
fn the_sketch_finds_a_falling_spectrum_in_either_metric() {
    for form in [Form::Inputs, Form::Outputs] {
        for shape in [(400, 150), (150, 400)] {
            for (tokens, blend) in [(500, 0.1), (500, 0.0), (40, 0.1), (40, 0.0), (4, 0.0)] {
                let case = Case::new(form, shape, tokens, blend, 7);
                let (metric, reference) = (case.metric(), case.optimum());
                let what = format!("{form:?} {shape:?} {tokens} tokens blend {blend}");
                let options = FactorOptions { method: MethodChoice::Randomized, ..EXACT };
                let factored = factor_in(&Faer, &case.w, 10, &metric, &options, Some(&reference)).unwrap();
                let (actual, optimum) = (case.error(&factored), reference.relative_error(10));
                assert!(actual <= optimum * (1.0 + 1e-4) + 2e-7, "{what}: {actual} for {optimum}");
                let reported = factored.metric_error.unwrap();
                assert!((reported - actual).abs() <= 1e-5 * actual + 1e-7, "{what}: {reported} for {actual}");
                let plain = case.plain_error(&factored);
                assert!((factored.relative_error - plain).abs() <= 1e-6 * plain, "{what}");
                let again = factor_in(&Faer, &case.w, 10, &metric, &options, None).unwrap();
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
    let refusal =
        |metric: Metric<'_>| spectrum_in(&Faer, &w, &metric, PrecisionChoice::Auto).unwrap_err().to_string();
    fn inputs<'a>(moment: ArrayView2<'a, f64>, rows: &'a [f64], blend: f64) -> Metric<'a> {
        Metric::Inputs { moment, rows, blend, map: None, root: None }
    }
    assert_eq!(
        refusal(inputs(two.view(), &[1.0; 2], 0.1)),
        "a moment [2, 2] was given for a matrix [2, 3], where it must be [3, 3]"
    );
    assert_eq!(
        refusal(Metric::Outputs { moment: three.view(), blend: 0.1, map: None }),
        "a moment [3, 3] was given for a matrix [2, 3], where it must be [2, 2]"
    );
    assert_eq!(
        refusal(inputs(three.view(), &[1.0; 3], 0.1)),
        "3 row weights were given for a matrix [2, 3]: one per row is needed"
    );
    assert_eq!(
        refusal(inputs(three.view(), &[1.0, -2.0], 0.1)),
        "row weight 1 is -2: it must be finite and not negative"
    );
    assert_eq!(refusal(inputs(three.view(), &[1.0; 2], 1.5)), "the blend is 1.5: it must lie in 0..=1");
    three[[2, 1]] = f64::NAN;
    assert_eq!(
        refusal(inputs(three.view(), &[1.0; 2], 0.1)),
        "entry [2, 1] of the moment is NaN: every entry must be finite"
    );
}
