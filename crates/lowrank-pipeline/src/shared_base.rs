//! Bases that the experts of a layer share, as they are stored, and matrices as what distinguishes them from these.

use crate::PipelineError;
use crate::narrow::Stored;
use crate::round::round;
use lowrank_calibrate::layer_base::mean_of_layer;
use lowrank_compute::blocks::matrix_shape;
use lowrank_compute::{Accumulate, Algebra, Faer, Kernels};
use lowrank_model::names::Role;
use lowrank_model::{Dtype, MatrixId, ModelConfig, Projection, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::residual::relative_error;
use lowrank_svd::{SvdError, difference};
use ndarray::{Array2, ArrayView2};
use std::sync::Arc;

/// The bases of one layer, by projection.
pub(crate) type LayerBases = [Arc<Tensor>; 3];

/// Where bases come from, and how they are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedBases<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// The model of the output.
    pub(crate) config: &'a ModelConfig,
    /// Of factors, where it is not the matrices' own.
    pub(crate) dtype: Option<Dtype>,
}

impl SharedBases<'_> {
    /// Number format of a base: that of its layer's factors.
    pub(crate) fn dtype(&self, layer: usize, projection: Projection) -> Dtype {
        let first = MatrixId { layer, expert: 0, projection };
        self.dtype.unwrap_or_else(|| self.checkpoint.matrix_dtype(first))
    }

    /// The mean of a layer's matrices, rounded.
    pub(crate) fn tensor(&self, layer: usize, projection: Projection) -> Result<Tensor, PipelineError> {
        let spec = self.config.tensor(Role::SharedBase { layer, projection });
        let mean = mean_of_layer(self.checkpoint, layer, projection)?;
        round(&spec.name, spec.shape, self.dtype(layer, projection), &mean.mean())
    }

    /// Those of a layer that has some, each made or read by `one`.
    pub(crate) fn of_layer(
        &self,
        layer: usize,
        one: &dyn Fn(Projection) -> Result<Tensor, PipelineError>,
    ) -> Result<Option<LayerBases>, PipelineError> {
        if !self.config.shared_bases.contains(&layer) {
            return Ok(None);
        }
        let one = |projection| one(projection).map(Arc::new);
        Ok(Some([one(Projection::Gate)?, one(Projection::Down)?, one(Projection::Up)?]))
    }
}

/// W M − B in f32, where the inputs are to be mapped by M first.
pub(crate) fn mapped_difference(w: &Tensor, map: Option<&Array2<f64>>, base: &Tensor) -> Tensor {
    let Some(map) = map else { return difference(w, base) };
    let shape = matrix_shape(w);
    let (values, map) = (w.to_f32(), map.mapv(|value| value as f32));
    let wide = ArrayView2::from_shape((shape.rows, shape.cols), &values).expect("a tensor's own shape");
    let mut mapped = Array2::<f32>::zeros((shape.rows, shape.cols));
    Faer.gemm(wide, map.view(), mapped.view_mut(), Accumulate::Replace);
    let mapped = mapped.as_slice().expect("made in standard order");
    let mapped = Tensor::from_f32(w.shape().to_vec(), Dtype::F32, mapped).expect("its own shape");
    difference(&mapped, base)
}

/// ‖W − B − Ŵ‖ / ‖W‖ of what is stored beside a base.
pub(crate) fn error_beside_base(
    algebra: &Algebra,
    w: &Tensor,
    base: &Tensor,
    stored: &Stored<'_>,
) -> Result<f64, SvdError> {
    let energy =
        |tensor: &Tensor| -> f64 { tensor.to_f32().into_iter().map(|value| f64::from(value).powi(2)).sum() };
    let differing = difference(w, base);
    let (all, of_difference) = (energy(w), energy(&differing));
    let Stored::Factors(factors) = stored else { return Ok(0.0) };
    if all == 0.0 || of_difference == 0.0 {
        return Ok(0.0);
    }
    let shape = matrix_shape(&differing);
    let (error, _) = algebra.run(shape, |backend| relative_error(backend, &differing, factors));
    Ok(error? * (of_difference / all).sqrt())
}

/// A matrix whose factors stand for the difference, with its base.
pub(crate) fn with_base(base: &Arc<Tensor>, difference: StoredMatrix) -> StoredMatrix {
    StoredMatrix::OfBase { base: Arc::clone(base), difference: Box::new(difference) }
}
