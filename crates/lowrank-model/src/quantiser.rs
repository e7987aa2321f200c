//! What an output is quantised by after it is written, and how large it is then.
//!
//! Counted as bitsandbytes (nf4, int8) and torchao (int8, fp8) store: every matrix of attention, experts and dense blocks; not
//! the embedding, the head, norms, biases and routers.

use crate::names::Role;
use crate::params::index_bytes;
use crate::{MatrixShape, Storage};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A quantiser of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Quantiser {
    /// 4 bits and a scale of 32 bits for every 64 weights: bitsandbytes' nf4 without double quantisation
    Nf4,
    /// 8 bits and a scale of 32 bits for every row
    Int8,
    /// 8 bits and a scale of 32 bits for every row
    Fp8,
}

/// Weights that share a scale in nf4.
const NF4_BLOCK: u64 = 64;
const SCALE_BYTES: u64 = 4;

impl fmt::Display for Quantiser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nf4 => "nf4",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        })
    }
}

impl Quantiser {
    /// Every quantiser.
    pub const ALL: [Self; 3] = [Self::Nf4, Self::Int8, Self::Fp8];

    /// Bytes of a matrix [rows, cols].
    pub const fn bytes(self, rows: u64, cols: u64) -> u64 {
        let weights = rows * cols;
        match self {
            Self::Nf4 => weights.div_ceil(2) + SCALE_BYTES * weights.div_ceil(NF4_BLOCK),
            Self::Int8 | Self::Fp8 => weights + SCALE_BYTES * rows,
        }
    }

    /// The most weights of which these bytes are enough, without what [`Quantiser::beyond`] counts.
    pub const fn weights_in(self, bytes: u64) -> u64 {
        match self {
            Self::Nf4 => bytes / (NF4_BLOCK / 2 + SCALE_BYTES) * NF4_BLOCK,
            Self::Int8 | Self::Fp8 => bytes,
        }
    }

    /// What an expert matrix [m, n] takes beyond its weights at most, whatever its rank and its expert's width: scales of rows,
    /// blocks that are not full, an index.
    pub fn beyond(self, shape: MatrixShape, storage: Storage) -> u64 {
        let scales = match self {
            Self::Nf4 => 2 * (1 + NF4_BLOCK / 2 + SCALE_BYTES),
            // u and v have at most m and r rows.
            Self::Int8 | Self::Fp8 => SCALE_BYTES * (shape.rows + shape.short_side()) as u64,
        };
        scales + index_bytes(shape, storage, Some(1))
    }

    /// Whether it quantises a tensor.
    pub const fn takes(role: Role) -> bool {
        match role {
            Role::Attention { .. }
            | Role::Expert(_)
            | Role::SharedBase { .. }
            | Role::SharedExpert { .. }
            | Role::DenseBlock { .. } => true,
            Role::Embedding
            | Role::AttentionBias { .. }
            | Role::Norm(_)
            | Role::NormBias(_)
            | Role::Router { .. }
            | Role::RouterBias { .. }
            | Role::SharedExpertGate { .. }
            | Role::Head
            | Role::HeadBias => false,
        }
    }

    /// Bytes of a matrix with these factors, its index included.
    pub fn bytes_of_factors(self, shape: MatrixShape, storage: Storage, rank: Option<usize>) -> u64 {
        let (m, n) = (shape.rows as u64, shape.cols as u64);
        let factors = match (rank.map(|rank| rank as u64), storage) {
            (None, _) => self.bytes(m, n),
            (Some(r), Storage::Uv) => self.bytes(m, r) + self.bytes(r, n),
            (Some(r), Storage::Pivoted) if n <= m => self.bytes(m, r) + self.bytes(r, n - r),
            (Some(r), Storage::Pivoted) => self.bytes(r, n) + self.bytes(m - r, r),
        };
        factors + index_bytes(shape, storage, rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::stored_params;

    #[test]
    fn what_is_counted_beyond_the_weights_is_enough_for_every_rank() {
        for (rows, cols) in [(448, 128), (128, 448), (37, 21), (14_336, 4096)] {
            let shape = MatrixShape { rows, cols };
            for storage in [Storage::Uv, Storage::Pivoted] {
                for quantiser in Quantiser::ALL {
                    let beyond = quantiser.beyond(shape, storage);
                    let ranks = (1..shape.short_side()).step_by(1 + shape.short_side() / 50).map(Some);
                    for rank in ranks.chain([None]) {
                        let weights = stored_params(shape, storage, rank);
                        let stored = quantiser.bytes_of_factors(shape, storage, rank);
                        // As many weights as fit what is left take no more than there is.
                        let bytes =
                            quantiser.bytes(1, weights) - if quantiser == Quantiser::Nf4 { 0 } else { 4 };
                        assert!(stored <= bytes + beyond, "{shape} {storage:?} {quantiser} {rank:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_fit_the_bytes() {
        for bytes in [0, 35, 36, 37, 1000, 1_000_003] {
            for quantiser in [Quantiser::Nf4, Quantiser::Int8] {
                let weights = quantiser.weights_in(bytes);
                let scales = if quantiser == Quantiser::Nf4 { 0 } else { SCALE_BYTES };
                assert!(quantiser.bytes(1, weights) - scales <= bytes);
            }
        }
        assert_eq!(Quantiser::Nf4.bytes(14_336, 4096), 14_336 * 4096 / 2 + 14_336 * 4096 / 16);
    }
}
