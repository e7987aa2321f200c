//! What tests of several modules share: spectrum and factors in a norm, and references that take no Gram matrix.

use crate::{Factored, Factors, Metric, PrecisionChoice, SvdOptions};
use crate::{decompose, factor, spectrum};
use lowrank_compute::{Faer, Kernels};
use lowrank_model::{Spectrum, Tensor};
use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;

pub(crate) fn spectrum_in(w: &Tensor, metric: &Metric<'_>, precision: PrecisionChoice) -> Spectrum {
    let options = SvdOptions { metric: *metric, precision, ..SvdOptions::default() };
    spectrum(&Faer, w, &options).unwrap().0
}

pub(crate) fn plain_spectrum(w: &Tensor, precision: PrecisionChoice) -> Spectrum {
    spectrum_in(w, &Metric::Weights, precision)
}

pub(crate) fn factor_in<'a>(
    w: &Tensor,
    rank: usize,
    metric: &Metric<'a>,
    options: &SvdOptions<'a>,
    spectrum: Option<&'a Spectrum>,
) -> Factored {
    factor(&Faer, w, rank, &SvdOptions { metric: *metric, spectrum, ..*options }).unwrap()
}

pub(crate) fn plain_factor<'a>(
    w: &Tensor,
    rank: usize,
    options: &SvdOptions<'a>,
    spectrum: Option<&'a Spectrum>,
) -> Factored {
    factor_in(w, rank, &Metric::Weights, options, spectrum)
}

pub(crate) fn decompose_in<'a>(
    w: &Tensor,
    rank: usize,
    metric: &Metric<'a>,
    options: &SvdOptions<'a>,
) -> (Spectrum, Factors) {
    decompose(&Faer, w, rank, &SvdOptions { metric: *metric, ..*options }).unwrap()
}

/// Uniform in [-1, 1).
pub(crate) fn uniform(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Array2<f64> {
    Array2::from_shape_simple_fn((rows, cols), || f64::from(rng.next_u32()) / 2.0_f64.powi(31) - 1.0)
}

pub(crate) fn wide(w: &Tensor) -> Array2<f64> {
    Array2::from_shape_vec((w.shape()[0], w.shape()[1]), w.to_f32()).unwrap().mapv(f64::from)
}

/// By a direct SVD in f64.
pub(crate) fn direct_spectrum(w: &Tensor) -> Spectrum {
    let kernels: &dyn Kernels<f64> = &Faer;
    Spectrum::new(kernels.singular_values(wide(w)).unwrap()).unwrap()
}
