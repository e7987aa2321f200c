//! Weights of the model that is measured.

use crate::CalibrateError;
use lowrank_model::{MatrixId, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;

/// An expert matrix W [m, n], whose values are finite.
pub(crate) fn dense(checkpoint: &Checkpoint, id: MatrixId) -> Result<Tensor, CalibrateError> {
    let StoredMatrix::Dense(w) = checkpoint.read_matrix(id)? else {
        unreachable!("a factored checkpoint is refused before it is calibrated")
    };
    checkpoint.check_matrix_finite(id, &w)?;
    Ok(w)
}
