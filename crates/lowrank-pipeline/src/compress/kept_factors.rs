//! Matrices of a job that other processes made, in the cache until they are written.

use super::tensors::Work;
use crate::PipelineError;
use crate::stored::{FactoredMatrix, Piece};
use lowrank_cache::{Arrays, Entry, Numbers};
use lowrank_calibrate::CalibrateError;
use lowrank_model::{ElementType, MatrixId, PivotOrder, Tensor};
use lowrank_writer::report::MatrixOutcome;
use serde::{Deserialize, Serialize};

/// Those of one job.
#[derive(Debug)]
pub(super) struct KeptFactors(Entry);

/// What stands beside the numbers of a matrix.
#[derive(Serialize, Deserialize)]
struct Note {
    outcome: MatrixOutcome,
    /// Whether it was made in the metric of its spectrum.
    is_alone: bool,
}

impl KeptFactors {
    fn name(id: MatrixId) -> String {
        format!("factors-{id}")
    }

    /// Keeps a matrix, its factors as they will be stored.
    pub(super) fn put(
        &self,
        id: MatrixId,
        FactoredMatrix { pieces, outcome }: &FactoredMatrix,
        is_alone: bool,
    ) -> Result<(), PipelineError> {
        let note = Note { outcome: outcome.clone(), is_alone };
        let note = serde_json::to_string(&note).expect("plain numbers and text serialise");
        let mut arrays = Arrays { note, ..Arrays::default() };
        for (at, (_, piece)) in pieces.iter().enumerate() {
            let numbers = match piece {
                Piece::Weights(tensor) => Numbers::Bytes(tensor.bytes().to_vec()),
                Piece::Order(order) => Numbers::F64(order.all().map(|index| index as f64).collect()),
            };
            arrays.arrays.insert(at.to_string(), numbers);
        }
        Ok(self.0.put(&Self::name(id), &arrays).map_err(CalibrateError::from)?)
    }

    /// Whether a matrix is there.
    pub(super) fn has(&self, id: MatrixId) -> bool {
        self.0.has(&Self::name(id))
    }

    /// A matrix, and whether it was made in the metric of its spectrum; `None` if it is not there.
    pub(super) fn get(
        &self,
        work: &Work<'_>,
        id: MatrixId,
    ) -> Result<Option<(FactoredMatrix, bool)>, PipelineError> {
        let name = Self::name(id);
        let Some(mut arrays) = self.0.get(&name).map_err(CalibrateError::from)? else { return Ok(None) };
        let damaged = || CalibrateError::NoPiece { name: name.clone() };
        let Note { outcome, is_alone } = serde_json::from_str(&arrays.note).map_err(|_| damaged())?;
        let (shape, rank) = (work.config.matrix_shape(id), work.ranks.get(&id).copied());
        let mut pieces = Vec::new();
        for (at, tensor) in work.format(id).output_tensors(id, shape, rank).into_iter().enumerate() {
            let piece = match tensor.dtype {
                ElementType::Index => {
                    let order = arrays.take_f64(&at.to_string()).ok_or_else(damaged)?;
                    let bytes: Vec<u8> =
                        order.into_iter().flat_map(|index| (index as i64).to_le_bytes()).collect();
                    let order = PivotOrder::from_le_bytes(&bytes, rank.unwrap_or(0), shape.short_side());
                    Piece::Order(order.map_err(|_| damaged())?)
                }
                ElementType::Weight(dtype) => {
                    let bytes = arrays.take_bytes(&at.to_string()).ok_or_else(damaged)?;
                    Piece::Weights(Tensor::new(tensor.shape, dtype, bytes).map_err(|_| damaged())?)
                }
                ElementType::Fp8 | ElementType::Scale(_) => return Err(damaged().into()),
            };
            pieces.push((tensor.name, piece));
        }
        Ok(Some((FactoredMatrix { pieces, outcome }, is_alone)))
    }
}

impl Work<'_> {
    /// Where they lie.
    pub(super) fn kept_factors(&self) -> Result<KeptFactors, PipelineError> {
        Ok(KeptFactors(self.calibration.entry_of_job("stored factors", self.job)?))
    }
}
