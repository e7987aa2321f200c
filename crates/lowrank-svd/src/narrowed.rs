//! Errors of every rank of what stays of an expert's matrices at several widths, from one eigenbasis of each whole matrix.
//!
//! The rank-r factors of a narrowed matrix are taken as those of the whole one without the dropped channels. With V [H, H] the
//! eigenvectors of the whole matrix in its norm, all eigenvalues, and channels in their order:
//!
//! | Matrix | P | Squared error of rank r at width k |
//! |---|---|---|
//! | gate, up | D^½ W S V [F, H], S Sᵀ = C̃ | Σ_{i<k} Σ_{j≥r} Pᵢⱼ² |
//! | down | Vᵀ W₂ L [H, F], from [`Channels`] | Σ_{j<k} Σ_{i≥r} Pᵢⱼ² |
//!
//! These bound the least errors from above and are exact at k = F. `docs/research/widths.md` says what the bound costs.

use crate::channels::Channels;
use crate::error::SvdError;
use crate::inputs::{Inputs, scale_rows};
use crate::linalg::product;
use crate::metric::{Metric, largest_row_weight};
use crate::moment::{UnitMoment, check_shrinkage};
use crate::root::Root;
use crate::stats::weight_stats;
use lowrank_compute::blocks::for_each_block;
use lowrank_compute::{Backend, Kernels, Real, Side, product_in_strips};
use lowrank_model::{MatrixShape, Tensor};
use ndarray::{Array2, ArrayView2};

/// Of gate or up [F, H] in the norm [`Metric::Inputs`], without a map: for each width, which rise, the squared errors of rank
/// 0..=H. `order`: all F channels by falling importance. In a norm that vanishes, that of the weights.
///
/// # Errors
/// Those of [`crate::spectrum()`].
pub(crate) fn narrowed_inputs(
    backend: &dyn Backend,
    w: &Tensor,
    metric: &Metric<'_>,
    order: &[usize],
    widths: &[usize],
) -> Result<Vec<Vec<f64>>, SvdError> {
    let kernels: &dyn Kernels<f64> = backend;
    let shape = weight_stats(w)?.shape;
    let mut image = Array2::zeros((shape.rows, shape.cols));
    for_each_block(w, Side::Cols, |first, block: ArrayView2<'_, f64>| {
        image.slice_mut(ndarray::s![first..first + block.nrows(), ..]).assign(&block);
    });
    let mut scale = 1.0;
    if let Metric::Inputs { second_moment, row_weights, shrinkage, .. } = *metric {
        check_shrinkage(shrinkage)?;
        let moment = UnitMoment::new(second_moment.view(), shape.cols, shape)?;
        if let (Some(moment), Some(largest)) = (moment, largest_row_weight(row_weights, shape)?) {
            let row_roots: Vec<f64> = row_weights.iter().map(|d| (d / largest).sqrt()).collect();
            let inputs = Inputs::new(moment, shrinkage, Vec::new(), None);
            let root: Root<f64> = Root::of(kernels, inputs.second_moment)?;
            scale_rows(&mut image, 0, &row_roots, 1);
            image = product(kernels, image.view(), root.root::<f64>().view()); // [F, k]
            scale = inputs.scale * largest;
        }
    }
    let mut gram = Array2::zeros((image.ncols(), image.ncols()));
    kernels.gram_add(&mut gram, image.view());
    let vectors = kernels.eigh(gram, image.ncols())?.vectors;
    let p = product(kernels, image.view(), vectors.view());
    Ok(tails_of_inputs(&p, scale, shape, order, widths))
}

/// Of P [F, k] over a scale.
pub(crate) fn tails_of_inputs<T: Real>(
    p: &Array2<T>,
    scale: f64,
    shape: MatrixShape,
    order: &[usize],
    widths: &[usize],
) -> Vec<Vec<f64>> {
    let tails = tails_of_widths(
        order.iter().map(|&channel| p.row(channel).mapv(Real::as_f64).to_vec()),
        p.ncols(),
        widths,
    );
    padded(scaled(tails, scale), shape.cols + 1)
}

/// Of down: for each width, which rise, the squared errors of rank 0..=H, in the units of the second moment of the activations.
///
/// # Errors
/// A decomposition fails.
pub fn narrowed_outputs<T: Real>(
    kernels: &dyn Kernels<T>,
    channels: &Channels<T>,
    widths: &[usize],
) -> Result<Vec<Vec<f64>>, SvdError> {
    let (outputs, scale) = channels.outputs();
    let hidden_size = outputs.nrows();
    let vectors = kernels.eigh(product_in_strips(outputs, outputs.t()), hidden_size)?.vectors;
    let p = product_in_strips(outputs.t(), vectors.view()); // [F, H]
    let rows = p.rows().into_iter().map(|row| row.mapv(Real::as_f64).to_vec());
    Ok(scaled(tails_of_widths(rows, hidden_size, widths), scale))
}

/// Σ over the first k rows of their squares beyond each column, for each width k.
fn tails_of_widths(rows: impl Iterator<Item = Vec<f64>>, columns: usize, widths: &[usize]) -> Vec<Vec<f64>> {
    let (mut sums, mut found) = (vec![0.0; columns], Vec::with_capacity(widths.len()));
    let mut wanted = widths.iter().peekable();
    for (k, row) in rows.enumerate() {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value * value);
        while wanted.next_if_eq(&&(k + 1)).is_some() {
            let mut tails = vec![0.0; columns + 1];
            for (r, sum) in sums.iter().enumerate().rev() {
                tails[r] = tails[r + 1] + sum;
            }
            found.push(tails);
        }
    }
    found
}

fn scaled(mut tails: Vec<Vec<f64>>, scale: f64) -> Vec<Vec<f64>> {
    tails.iter_mut().flatten().for_each(|error| *error *= scale);
    tails
}

/// A singular norm has fewer columns than ranks: beyond them there is no error.
fn padded(mut tails: Vec<Vec<f64>>, len: usize) -> Vec<Vec<f64>> {
    tails.iter_mut().for_each(|tails| tails.resize(len, 0.0));
    tails
}

#[cfg(test)]
mod tests;
