//! Pass 1: the singular values of every expert matrix, several matrices at once.

use crate::PipelineError;
use lowrank_compute::Faer;
use lowrank_model::{MatrixId, Progress, Spectrum};
use lowrank_reader::{Checkpoint, StoredMatrix};
use lowrank_svd::PrecisionChoice;
use rayon::prelude::*;

/// Spectra of all expert matrices, in stored order. 12.6 MB of singular values for Mixtral-8x7B.
pub fn spectra(
    checkpoint: &Checkpoint,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
) -> Result<Vec<(MatrixId, Spectrum)>, PipelineError> {
    if !checkpoint.ranks().is_empty() {
        return Err(PipelineError::AlreadyFactored(checkpoint.layout()));
    }
    let ids: Vec<MatrixId> = checkpoint.config().matrices().collect();
    progress.start("spectra", ids.len() as u64, "matrices");
    let spectra: Result<Vec<_>, PipelineError> = pool.install(|| {
        ids.par_iter()
            .with_max_len(1)
            .map(|&id| {
                let StoredMatrix::Dense(matrix) = checkpoint.read_matrix(id)? else {
                    return Err(PipelineError::AlreadyFactored(checkpoint.layout()));
                };
                checkpoint.check_finite(&format!("{id}.weight"), &matrix)?;
                let spectrum = lowrank_svd::spectrum(&Faer, &matrix, PrecisionChoice::Auto)
                    .map_err(|source| PipelineError::Svd { name: id, source })?;
                progress.advance(1);
                Ok((id, spectrum))
            })
            .collect()
    });
    progress.finish();
    spectra
}
