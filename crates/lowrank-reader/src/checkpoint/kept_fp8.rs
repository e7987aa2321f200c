//! Tensors that are fp8 in the files: which of them an output keeps so, and how they are read, stored and widened.

use super::{BLOCK_BYTES, Checkpoint, Run};
use crate::error::ReadError;
use crate::fp8::{self, Blocks};
use lowrank_model::names::Role;
use lowrank_model::tensors::{RowOrder, TensorSpec};
use lowrank_model::{Dtype, Tensor};

/// The scales of an fp8 tensor, as an output has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fp8Scales {
    /// Beside that of the tensor.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// One for every block.
    pub shape: Vec<usize>,
}

impl Fp8Scales {
    /// Bytes of the scales.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&dimension| dimension as u64).product::<u64>() * self.dtype.size_bytes()
    }
}

impl Checkpoint {
    /// The same with every fp8 tensor taken as bf16, not the expert matrices alone.
    #[must_use]
    pub fn widened(mut self) -> Self {
        self.keeps_fp8 = false;
        self.size = self.counted();
        self
    }

    /// The runs of a tensor that goes into an output as fp8, and of its scales. Expert matrices never do: quantisers of whole layers
    /// could not tell them from factors.
    fn fp8_scales(&self, spec: &TensorSpec) -> Option<(&Run, &Run)> {
        let run = self.dense.get(&spec.name)?;
        let goes =
            self.keeps_fp8 && !matches!(spec.role, Role::Expert(_)) && run.row_order == RowOrder::Canonical;
        run.scales.as_deref().filter(|_| goes).map(|scales| (run, scales))
    }

    /// The scales of a tensor that goes into an output as fp8; `None` if it goes there as what it is read as.
    pub fn kept_fp8(&self, spec: &TensorSpec) -> Option<Fp8Scales> {
        let (_, scales) = self.fp8_scales(spec)?;
        Some(Fp8Scales {
            name: format!("{}{}", spec.name, fp8::SCALES),
            dtype: scales.dtype,
            shape: scales.shape.clone(),
        })
    }

    /// Modules of two-dimensional weights outside the experts that are not fp8 in an output; `None` if nothing is.
    pub fn modules_without_fp8(&self) -> Option<Vec<String>> {
        let matrices = self.specs.iter().filter(|spec| spec.shape.len() == 2);
        let outside = matrices.filter(|spec| !matches!(spec.role, Role::Expert(_)));
        let (kept, others): (Vec<_>, Vec<_>) = outside.partition(|spec| self.fp8_scales(spec).is_some());
        let module = |spec: &TensorSpec| spec.name.strip_suffix(".weight").map(str::to_owned);
        (!kept.is_empty()).then(|| others.into_iter().filter_map(module).collect())
    }

    /// Gives the elements of a tensor that goes into an output as fp8, block by block, and refuses what
    /// [`Checkpoint::read_in_blocks`] refuses. Its scales are returned.
    ///
    /// # Panics
    /// If it does not go there as fp8.
    pub fn read_fp8_in_blocks<E: From<ReadError>>(
        &self,
        spec: &TensorSpec,
        take: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Tensor, E> {
        let (run, scales) = self.fp8_scales(spec).expect("its scales are kept");
        let mut done = 0;
        self.stream_fp8(run, scales, &mut |stored, wide| {
            self.refuse_non_finite(spec, run, done, wide)?;
            done += wide.len() as u64;
            take(stored)
        })?;
        Ok(self.read(scales)?)
    }

    /// Gives whole rows of an fp8 matrix, as they are stored and widened.
    pub(super) fn stream_fp8<E: From<ReadError>>(
        &self,
        run: &Run,
        scales: &Run,
        take: &mut impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let sides = self.config.fp8_blocks.expect("runs have scales where the config has blocks");
        let blocks = Blocks { sides, scales: self.read(scales)?.to_f32() };
        let (rows, cols) = (run.shape[0], run.shape[1]);
        let rows_at_once = (BLOCK_BYTES as usize / cols.max(1)).max(1);
        let mut stored = vec![0; rows_at_once.min(rows) * cols];
        for first in (0..rows).step_by(rows_at_once) {
            let stored = &mut stored[..rows_at_once.min(rows - first) * cols];
            let begin = run.begin + (first * cols) as u64;
            self.shards[run.shard].read_exact(begin, stored, &run.stored_name)?;
            take(stored, &blocks.widen(first, cols, stored))?;
        }
        Ok(())
    }
}
