//! Where the numbers of a tensor lie.

use lowrank_model::Dtype;
use lowrank_model::tensors::RowOrder;

/// A contiguous run of bytes of one shard.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) shard: usize,
    /// First byte in the file.
    pub(super) begin: u64,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: Dtype,
    pub(super) row_order: RowOrder,
    /// Name of the tensor it is taken from.
    pub(super) stored_name: String,
    /// Where its scales are, if it is stored as fp8; `dtype` is then what it is read as.
    pub(super) scales: Option<Box<Run>>,
}

impl Run {
    /// Numbers.
    pub(super) fn elements(&self) -> u64 {
        self.shape.iter().map(|&dimension| dimension as u64).product()
    }

    /// Of what it is read as.
    pub(super) fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size_bytes()
    }
}
