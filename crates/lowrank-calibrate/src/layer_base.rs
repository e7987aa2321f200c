//! The base of a layer's experts, the mean of their matrices, and spectra of what distinguishes a matrix from it.

use crate::CalibrateError;
use crate::weights::dense;
use lowrank_compute::{Algebra, product_in_strips, product_with_symmetric};
use lowrank_model::{Dtype, MatrixId, MatrixShape, Projection, Spectrum, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::{MatrixMean, Metric, SvdOptions, difference};
use ndarray::{Array2, ArrayView2};

/// A base costs an E-th of a layer's parameters and spares what its E experts have in common. None is considered where the mean
/// cosine between their down matrices is below so many E-ths: at 0.34 between eight experts, 2.7, a base lost by far
/// (`docs/research/widths.md`).
const LEAST_COSINE_BY_EXPERTS: f64 = 3.5;

/// The mean of a layer's matrices.
pub fn mean_of_layer(
    checkpoint: &Checkpoint,
    layer: usize,
    projection: Projection,
) -> Result<MatrixMean, CalibrateError> {
    let config = checkpoint.config();
    let mut mean = MatrixMean::new(config.full_shape(projection));
    for expert in 0..config.experts_in(layer) {
        let id = MatrixId { layer, expert, projection };
        let w = dense(checkpoint, id)?;
        mean.add(&w).map_err(|source| CalibrateError::Svd { name: id, source })?;
    }
    Ok(mean)
}

/// Before it is rounded: in f32.
pub(crate) fn base_tensor(mean: &MatrixMean, shape: MatrixShape) -> Tensor {
    Tensor::from_f32(vec![shape.rows, shape.cols], Dtype::F32, &mean.mean())
        .expect("a mean has its matrices' shape")
}

/// The base of a layer's down matrices in f32; `None` where the layer can have none, or none could pay.
pub(crate) fn down_base(checkpoint: &Checkpoint, layer: usize) -> Result<Option<Tensor>, CalibrateError> {
    let config = checkpoint.config();
    let dtype = |expert, projection| checkpoint.matrix_dtype(MatrixId { layer, expert, projection });
    let experts = config.experts_in(layer);
    let of_one_dtype = Projection::ALL
        .into_iter()
        .all(|projection| (0..experts).all(|expert| dtype(expert, projection) == dtype(0, projection)));
    if experts < 2 || !of_one_dtype {
        return Ok(None);
    }
    let mean = mean_of_layer(checkpoint, layer, Projection::Down)?;
    let may_pay = mean.mean_cosine() * experts as f64 >= LEAST_COSINE_BY_EXPERTS;
    Ok(may_pay.then(|| base_tensor(&mean, config.full_shape(Projection::Down))))
}

/// The spectrum of the outputs of W₂ − B₂ on the text, in sums over its tokens; of its weights where no token is routed.
pub(crate) fn down_difference(
    algebra: &Algebra,
    id: MatrixId,
    w2: &Tensor,
    base: &Tensor,
    moment: ArrayView2<'_, f64>,
    shrinkage: Option<f64>,
) -> Result<Spectrum, CalibrateError> {
    let own = difference(w2, base);
    let MatrixShape { rows, cols } = lowrank_compute::blocks::matrix_shape(&own);
    let Some(shrinkage) = shrinkage else { return spectrum(algebra, id, &own, Metric::Weights) };
    let second_moment = {
        let values = own.to_f32().into_iter().map(f64::from).collect();
        let wide = Array2::from_shape_vec((rows, cols), values).expect("[H, F]");
        let all: Vec<usize> = (0..cols).collect();
        let image = product_with_symmetric(wide.view(), moment, &all, 1.0);
        product_in_strips(image.view(), wide.t())
    };
    spectrum(algebra, id, &own, Metric::Outputs { second_moment: &second_moment, shrinkage, map: None })
}

pub(crate) fn spectrum(
    algebra: &Algebra,
    id: MatrixId,
    w: &Tensor,
    metric: Metric<'_>,
) -> Result<Spectrum, CalibrateError> {
    let options = SvdOptions { metric, ..SvdOptions::default() }.for_matrix(id);
    let shape = lowrank_compute::blocks::matrix_shape(w);
    let (found, _) = algebra.run(shape, |backend| lowrank_svd::spectrum(backend, w, &options));
    Ok(found.map_err(|source| CalibrateError::Svd { name: id, source })?.0)
}

pub(crate) fn of_sigma(id: MatrixId, sigma: Vec<f64>) -> Result<Spectrum, CalibrateError> {
    Spectrum::new(sigma).map_err(|source| CalibrateError::Svd { name: id, source: source.into() })
}
