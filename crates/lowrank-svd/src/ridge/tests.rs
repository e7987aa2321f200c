//! Reduced-rank regression on the activations themselves: with the given ones as columns of Z and the wanted ones as columns of Y, the best W of rank r misses ‖Y − Y Q Qᵀ‖² + Σ_{i>r} σᵢ(Y Q)², where Q is an orthonormal basis of the rows of Z.

use super::*;
use crate::linalg::energy_of;
use crate::randomized::generator;
use crate::residual::{relative_error, residual_energy, wide};
use crate::test_support::{decompose_in, factor_in, spectrum_in, uniform};
use crate::{MethodChoice, Metric, PrecisionChoice, SvdOptions};
use lowrank_compute::Faer;
use lowrank_model::{Dtype, Spectrum};
use ndarray::{Axis, concatenate};

struct Case {
    w: Tensor,
    wide: Array2<f64>,
    rows: Vec<f64>,
    /// x or z, and x̂ or ẑ, as columns.
    original: Array2<f64>,
    changed: Array2<f64>,
    shrinkage: f64,
}

impl Case {
    fn new((m, n): (usize, usize), tokens: usize, shrinkage: f64, seed: u64) -> Self {
        let mut rng = generator(seed, 4);
        let mut uniform = |rows, cols| uniform(rows, cols, &mut rng);
        let weights: Vec<f32> = uniform(m, n).iter().map(|&value| value as f32).collect();
        let mut original = uniform(n, tokens);
        for (k, mut row) in original.rows_mut().into_iter().enumerate() {
            row *= 30.0 * 0.9_f64.powi(k as i32);
        }
        // Turned, scaled and with noise of its own.
        let turn = Array2::eye(n) * 0.8 + 0.1 * uniform(n, n);
        let changed = turn.dot(&original) + 0.3 * uniform(n, tokens);
        Self {
            w: Tensor::from_f32(vec![m, n], Dtype::F32, &weights).unwrap(),
            wide: Array2::from_shape_vec((m, n), weights.iter().map(|&w| f64::from(w)).collect()).unwrap(),
            rows: (0..m).map(|i| if i == 3 { 0.0 } else { 0.5 + (i % 4) as f64 }).collect(),
            original,
            changed,
            shrinkage,
        }
    }

    /// [√(1−b) X, √(b·prior) I]
    fn stacked(&self, seen: &Array2<f64>, prior: f64) -> Array2<f64> {
        let eye = Array2::eye(seen.nrows());
        concatenate![Axis(1), (1.0 - self.shrinkage).sqrt() * seen, (self.shrinkage * prior).sqrt() * eye]
    }

    fn weighted(&self, mut matrix: Array2<f64>) -> Array2<f64> {
        for (mut row, d) in matrix.rows_mut().into_iter().zip(&self.rows) {
            row *= d.sqrt();
        }
        matrix
    }
}

/// The error that no rank avoids, and the singular values of the rest.
fn regression(wanted: &Array2<f64>, given: &Array2<f64>) -> (f64, Vec<f64>) {
    let kernels: &dyn Kernels<f64> = &Faer;
    let q = kernels.thin_qr(given.t().to_owned()).unwrap();
    let fitted = wanted.dot(&q);
    let unavoidable = energy_of(&(wanted - &fitted.dot(&q.t())));
    (unavoidable, kernels.singular_values(fitted).unwrap())
}

fn check(
    case: &Case,
    metric: &Metric<'_>,
    wanted: &Array2<f64>,
    given: &Array2<f64>,
    regressor: &Array2<f64>,
    what: &str,
) {
    let (unavoidable, sigma) = regression(wanted, regressor);
    let short = case.wide.nrows().min(case.wide.ncols());
    let reference = Spectrum::new(sigma[..short].to_vec()).unwrap();
    let spectrum = spectrum_in(&case.w, metric, PrecisionChoice::Auto);
    let total = energy_of(wanted);
    for (value, expected) in spectrum.tail_energies().iter().zip(reference.tail_energies()) {
        assert!((value - expected).abs() < 1e-9 * expected + 1e-12 * total, "{what}: {value} for {expected}");
    }
    for rank in [1, short / 2, short] {
        for method in [MethodChoice::Exact, MethodChoice::Randomized] {
            let options = SvdOptions { method, power_iterations: 30, ..SvdOptions::default() };
            let factored = factor_in(&case.w, rank, metric, &options, None);
            let (u, v) = wide(&factored.factors);
            let product = u.dot(&v);
            let missed = match metric {
                Metric::Inputs { .. } => case.weighted(product.dot(given)),
                _ => product.dot(given),
            };
            let missed = energy_of(&(wanted - &missed));
            let optimum = unavoidable + reference.tail_energies()[rank];
            // Rounding v leaves the rows that outputs of W have, to first order in ε.
            let slack = if method == MethodChoice::Exact { 1e-7 } else { 1e-6 };
            assert!(
                missed <= optimum * (1.0 + slack) + 1e-13 * total,
                "{what} rank {rank} {method}: {missed} for {optimum}"
            );
            let share = (missed - unavoidable) / reference.energy();
            let reported = factored.metric_error.unwrap().powi(2);
            assert!((reported - share).abs() < 2e-9, "{what} rank {rank} {method}: {reported} for {share}");
            let relative = (energy_of(&(&case.wide - &product)) / energy_of(&case.wide)).sqrt();
            assert!((factored.relative_error - relative).abs() < 1e-7 * relative, "{what}");
        }
    }
    let (both, _) = decompose_in(&case.w, 2, metric, &SvdOptions::default());
    assert!((both.energy() / spectrum.energy() - 1.0).abs() < 1e-12);
}

#[test]
fn factors_fitted_to_changed_inputs_solve_the_regression() {
    for shape in [(20, 12), (12, 20)] {
        for (tokens, shrinkage) in [(150, 0.0), (150, 0.1), (7, 0.1)] {
            let case = Case::new(shape, tokens, shrinkage, 1);
            let moment = case.changed.dot(&case.changed.t());
            let cross = case.original.dot(&case.changed.t());
            let (map, root) =
                ridge_map(&Faer, cross.view(), moment.view(), shrinkage, ShrinkageTarget::Identity).unwrap();
            let prior = moment.diag().sum() / shape.1 as f64;
            let given = case.stacked(&case.changed, prior);
            let wanted = case.weighted(case.wide.dot(&case.stacked(&case.original, prior)));
            let (row_weights, map) = (&case.rows, Some(&map));
            let metric = |root| Metric::Inputs { second_moment: &moment, row_weights, shrinkage, map, root };
            let [with, without] = [root.as_ref(), None]
                .map(|root| factor_in(&case.w, 3, &metric(root), &SvdOptions::default(), None));
            assert_eq!(with, without);
            check(
                &case,
                &metric(root.as_ref()),
                &wanted,
                &given,
                &given,
                &format!("{shape:?} {tokens} tokens shrinkage {shrinkage}"),
            );
        }
    }
}

#[test]
fn factors_fitted_to_changed_outputs_solve_the_regression() {
    for (tokens, shrinkage) in [(150, 0.0), (150, 0.1), (7, 0.1)] {
        let case = Case::new((12, 20), tokens, shrinkage, 2);
        let (y, y_changed) = (case.wide.dot(&case.original), case.wide.dot(&case.changed));
        let moment = y_changed.dot(&y_changed.t());
        let cross = y.dot(&y_changed.t());
        let (map, _) =
            ridge_map(&Faer, cross.view(), moment.view(), shrinkage, ShrinkageTarget::GramOf(&case.w))
                .unwrap();
        let prior = moment.diag().sum() / energy_of(&case.wide);
        let given = case.stacked(&case.changed, prior);
        let wanted = case.wide.dot(&case.stacked(&case.original, prior));
        let metric = Metric::Outputs { second_moment: &moment, shrinkage, map: Some(&map) };
        // Only what a map of W's own outputs can reach.
        let regressor = case.wide.dot(&given);
        check(&case, &metric, &wanted, &given, &regressor, &format!("{tokens} tokens shrinkage {shrinkage}"));
    }
}

#[test]
fn a_large_matrix_is_projected_and_measured_in_f32() {
    const RANK: usize = 60;
    let (m, n) = (1100, 1040);
    let case = Case::new((m, n), 1200, 0.1, 5);
    let moment = case.changed.dot(&case.changed.t());
    let cross = case.original.dot(&case.changed.t());
    let (map, root) = ridge_map(&Faer, cross.view(), moment.view(), 0.1, ShrinkageTarget::Identity).unwrap();
    let (row_weights, root) = (&case.rows, root.as_ref());
    let metric =
        Metric::Inputs { second_moment: &moment, row_weights, shrinkage: 0.1, map: Some(&map), root };
    let factored = factor_in(&case.w, RANK, &metric, &SvdOptions::default(), None);
    // Enough is missed for the projection to be in f32, and that costs nothing.
    let optimum = spectrum_in(&case.w, &metric, PrecisionChoice::F64).relative_error(RANK);
    assert!(optimum.powi(2) > 1e-2, "{optimum}");
    assert!((factored.metric_error.unwrap() / optimum - 1.0).abs() < 1e-6, "for {optimum}");
    let (u, v) = wide::<f64>(&factored.factors);
    let product = u.dot(&v);
    let shrunk = &moment * (0.9 * n as f64 / moment.diag().sum()) + 0.1 * Array2::<f64>::eye(n);
    let energy_in_metric = |matrix: Array2<f64>| {
        let matrix = case.weighted(matrix);
        (&matrix * &matrix.dot(&shrunk)).sum()
    };
    let wanted = case.wide.dot(&map);
    let expected = (energy_in_metric(&wanted - &product) / energy_in_metric(wanted)).sqrt();
    assert!((factored.metric_error.unwrap() / expected - 1.0).abs() < 1e-6);
    let missed = energy_of(&(&case.wide - &product));
    let expected = (missed / energy_of(&case.wide)).sqrt();
    for told in [factored.relative_error, relative_error(&Faer, &case.w, &factored.factors).unwrap()] {
        assert!((told / expected - 1.0).abs() < 1e-6, "{told} for {expected}");
    }
    assert!((residual_energy(&Faer, &case.w, &factored.factors) / missed - 1.0).abs() < 1e-12);
}

#[test]
fn unchanged_activations_need_no_map() {
    let case = Case::new((20, 12), 150, 0.1, 3);
    let moment = case.original.dot(&case.original.t());
    let (map, _) = ridge_map(&Faer, moment.view(), moment.view(), 0.1, ShrinkageTarget::Identity).unwrap();
    assert!(energy_of(&(map - Array2::<f64>::eye(12))) < 1e-20);
    // More outputs than inputs: the moment is singular, and the map keeps what W can give.
    let outputs = case.wide.dot(&moment).dot(&case.wide.t());
    for (shrinkage, what) in [(0.0, outputs.view()), (0.1, outputs.view())] {
        let (map, _) = ridge_map(&Faer, what, what, shrinkage, ShrinkageTarget::GramOf(&case.w)).unwrap();
        assert!(energy_of(&(map.dot(&case.wide) - &case.wide)) < 1e-12);
    }
    let zero = Array2::zeros((12, 12));
    let (map, _) = ridge_map(&Faer, zero.view(), zero.view(), 0.1, ShrinkageTarget::Identity).unwrap();
    assert_eq!(map, Array2::<f64>::eye(12));
}

#[test]
fn moments_of_other_sizes_are_refused() {
    let case = Case::new((20, 12), 9, 0.1, 3);
    let (small, large) = (Array2::eye(12), Array2::eye(20));
    for (cross, moment, prior) in [
        (&large, &small, ShrinkageTarget::Identity),
        (&small, &large, ShrinkageTarget::GramOf(&case.w)),
        (&large, &small, ShrinkageTarget::GramOf(&case.w)),
    ] {
        let error = ridge_map(&Faer, cross.view(), moment.view(), 0.1, prior).unwrap_err();
        assert!(matches!(error, SvdError::MetricShape { .. }), "{error}");
    }
}
