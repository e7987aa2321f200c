//! Against spectra of the whole matrix, and against residuals of the very factors that the bound speaks of.

use super::*;
use crate::options::SvdOptions;
use crate::randomized::generator;
use crate::test_support::{uniform, wide};
use lowrank_compute::Faer;
use lowrank_model::Dtype;

const F: usize = 24;
const H: usize = 10;

fn tensor(rows: usize, cols: usize, seed: u64) -> Tensor {
    let values = uniform(rows, cols, &mut generator(seed, 3));
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Tensor::from_f32(vec![rows, cols], Dtype::F32, &values).unwrap()
}

fn moment(size: usize, seed: u64) -> Array2<f64> {
    let rows = uniform(3 * size, size, &mut generator(seed, 4));
    rows.t().dot(&rows)
}

fn order() -> Vec<usize> {
    (0..F).map(|i| i * 7 % F).collect()
}

#[test]
fn at_full_width_the_errors_are_those_of_the_spectrum() {
    let (w, moment) = (tensor(F, H, 1), moment(H, 2));
    let row_weights: Vec<f64> = (0..F).map(|i| 0.2 + (i as f64 * 0.7).sin().abs()).collect();
    let metric = Metric::Inputs {
        second_moment: &moment,
        row_weights: &row_weights,
        shrinkage: 0.1,
        map: None,
        root: None,
    };
    let options = SvdOptions { metric, ..SvdOptions::default() };
    let (spectrum, _) = crate::spectrum(&Faer, &w, &options).unwrap();
    let found = narrowed_inputs(&Faer, &w, &metric, &order(), &[F]).unwrap();
    for (error, expected) in found[0].iter().zip(spectrum.tail_energies()) {
        assert!((error - expected).abs() <= 1e-6 * spectrum.energy(), "{error} {expected}");
    }
}

#[test]
fn errors_of_a_width_are_those_of_its_rows_of_the_whole_factors() {
    let w = tensor(F, H, 5);
    let rank = 4;
    let found = narrowed_inputs(&Faer, &w, &Metric::Weights, &order(), &[6, 15]).unwrap();
    let dense = wide(&w);
    let kernels: &dyn Kernels<f64> = &Faer;
    let vectors = kernels.eigh(dense.t().dot(&dense), rank).unwrap().vectors;
    let residual = &dense - &dense.dot(&vectors).dot(&vectors.t());
    for (tails, width) in found.iter().zip([6, 15]) {
        let rows = residual.select(ndarray::Axis(0), &order()[..width]);
        let expected = rows.iter().map(|value| value * value).sum::<f64>();
        assert!((tails[rank] - expected).abs() < 1e-9, "{width}: {} {expected}", tails[rank]);
        assert!(tails[H].abs() < 1e-12 && tails.len() == H + 1);
    }
}

#[test]
fn errors_of_outputs_are_those_of_a_projection_of_the_fitted_outputs() {
    let (w2, rank, width) = (tensor(H, F, 7), 3, 11);
    let channels = Channels::<f64>::new(&w2, moment(F, 8).view(), 0.03).unwrap();
    let found = narrowed_outputs(&Faer, &channels, &[width, F]).unwrap();
    let kernels: &dyn Kernels<f64> = &Faer;
    let output_moment = |width: usize| {
        let (outputs, scale) = channels.outputs();
        let outputs = outputs.slice(ndarray::s![.., ..width]).to_owned() * scale.sqrt();
        outputs.dot(&outputs.t())
    };
    let whole = output_moment(F);
    let vectors = kernels.eigh(whole, rank).unwrap().vectors;
    for (tails, width) in found.iter().zip([width, F]) {
        let outputs = output_moment(width);
        let kept = vectors.t().dot(&outputs).dot(&vectors).diag().sum();
        let expected = outputs.diag().sum() - kept;
        assert!((tails[rank] - expected).abs() < 1e-9 * outputs.diag().sum(), "{width}");
    }
}

#[test]
fn one_decomposition_gives_what_two_give() {
    let (w, moment) = (tensor(F, H, 11), moment(H, 12));
    let row_weights: Vec<f64> = (0..F).map(|i| 0.1 + (i as f64 * 0.9).sin().abs()).collect();
    let (map, root) = (None, None);
    let inputs =
        Metric::Inputs { second_moment: &moment, row_weights: &row_weights, shrinkage: 0.2, map, root };
    for metric in [inputs, Metric::Weights] {
        let options = SvdOptions { metric, ..SvdOptions::default() };
        let (spectrum, factors, tails) =
            crate::decompose_narrowed(&Faer, &w, 4, &options, &order(), &[5, 16]).unwrap();
        let (expected_spectrum, expected) = crate::decompose(&Faer, &w, 4, &options).unwrap();
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        spectrum.sigma().iter().zip(expected_spectrum.sigma()).for_each(|(a, b)| near(*a, *b));
        factors.u.iter().zip(&expected.u).for_each(|(a, b)| near(f64::from(*a), f64::from(*b)));
        factors.v.iter().zip(&expected.v).for_each(|(a, b)| near(f64::from(*a), f64::from(*b)));
        let apart = narrowed_inputs(&Faer, &w, &metric, &order(), &[5, 16]).unwrap();
        tails.iter().flatten().zip(apart.iter().flatten()).for_each(|(a, b)| near(*a, *b));
    }
}
