//! How many parameters a matrix costs: the one count, used by budgets, plans, writer and verifier.

use crate::{MatrixShape, Unit};
use serde::{Deserialize, Serialize};

/// How a matrix W [m, n] of rank r is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Storage {
    /// Two factors u [m, r] and v [r, n]: r·(m + n) parameters
    Uv,
    /// Interpolative decomposition: r of the matrix' rows or columns and the coefficients of the others, r·(m + n − r)
    /// parameters, the same matrix
    #[default]
    Pivoted,
}

impl Storage {
    /// The largest rank that a matrix can be stored at.
    pub const fn rank_max(self, shape: MatrixShape) -> usize {
        let short = if shape.rows < shape.cols { shape.rows } else { shape.cols };
        match self {
            Self::Uv => short,
            // At full rank nothing is left to be made of pivots.
            Self::Pivoted => short - 1,
        }
    }
}

/// Bytes of one entry of the index of a pivoted matrix: i64, the only integer that every version of torch indexes with.
pub const INDEX_ELEMENT_BYTES: u64 = 8;

/// Bytes of a matrix' index. It says where weights belong and holds none: it counts as bytes, not as parameters.
pub fn index_bytes(shape: MatrixShape, storage: Storage, rank: Option<usize>) -> u64 {
    match (storage, rank) {
        (Storage::Pivoted, Some(_)) => shape.short_side() as u64 * INDEX_ELEMENT_BYTES,
        _ => 0,
    }
}

/// Parameters of a matrix stored dense (`rank` absent) or at a rank. Exact; cannot overflow for checked dimensions.
pub fn stored_params(shape: MatrixShape, storage: Storage, rank: Option<usize>) -> u64 {
    let (m, n) = (shape.rows as u64, shape.cols as u64);
    match (rank.map(|r| r as u64), storage) {
        (None, _) => m * n,
        (Some(r), Storage::Uv) => r * (m + n),
        (Some(r), Storage::Pivoted) => r * (m + n - r),
    }
}

/// The largest rank that saves at least one parameter; 0 when none does.
pub fn rank_max_saving(shape: MatrixShape, storage: Storage) -> usize {
    let dense = stored_params(shape, storage, None);
    let r = match storage {
        Storage::Uv => ((dense - 1) / (shape.rows + shape.cols) as u64) as usize,
        // r(m+n−r) = mn at r = min(m, n), and grows until there.
        Storage::Pivoted => shape.short_side() - 1,
    };
    r.min(shape.short_side())
}

/// Of the short side of a matrix, from which ranks and widths are in multiples.
const MULTIPLES_FROM: usize = 512;
/// Steps between no rank and all of them; finer ones remove the same error within a few thousandths.
const STEPS: usize = 32;
/// Groups that quantisers and kernels take whole.
const MULTIPLES: std::ops::RangeInclusive<usize> = 32..=128;

/// Multiples that ranks and widths are of where a recipe does not say, by the short side of the matrices: the 32nd part of it,
/// as a power of two and between 32 and 128; 1 below a short side of 512.
pub fn usual_multiple(short_side: usize) -> usize {
    if short_side < MULTIPLES_FROM {
        return 1;
    }
    (1 << (short_side / STEPS).ilog2()).clamp(*MULTIPLES.start(), *MULTIPLES.end())
}

/// What a stored matrix costs, in the unit the budget is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostModel {
    /// How factored matrices are stored.
    pub storage: Storage,
    /// What is counted.
    pub unit: Unit,
    /// Bytes of one element of a matrix left dense.
    pub dense_element_bytes: u64,
    /// Bytes of one element of a factor.
    pub factor_element_bytes: u64,
}

/// Element sizes of one matrix, in a checkpoint whose matrices have several dtypes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ElementBytes {
    /// Of the matrix left dense.
    pub dense: u64,
    /// Of its factors.
    pub factor: u64,
}

impl CostModel {
    /// What a base costs that the experts of a layer share: a dense matrix in the dtype of factors.
    pub fn of_shared_base(&self, shape: MatrixShape) -> u64 {
        let params = stored_params(shape, self.storage, None);
        match self.unit {
            Unit::Params => params,
            Unit::Bytes => params * self.factor_element_bytes,
        }
    }

    /// The element sizes that it counts with.
    pub const fn element_bytes(&self) -> ElementBytes {
        ElementBytes { dense: self.dense_element_bytes, factor: self.factor_element_bytes }
    }

    /// The cost model of a matrix that has element sizes of its own.
    #[must_use]
    pub fn with(self, own: Option<ElementBytes>) -> Self {
        let ElementBytes { dense, factor } = own.unwrap_or(self.element_bytes());
        Self { dense_element_bytes: dense, factor_element_bytes: factor, ..self }
    }

    /// Cost of a matrix at a rank, or dense.
    pub fn cost(&self, shape: MatrixShape, rank: Option<usize>) -> u64 {
        let params = stored_params(shape, self.storage, rank);
        match (self.unit, rank) {
            (Unit::Params, _) => params,
            (Unit::Bytes, None) => params * self.dense_element_bytes,
            (Unit::Bytes, Some(_)) => {
                params * self.factor_element_bytes + index_bytes(shape, self.storage, rank)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIXTRAL: MatrixShape = MatrixShape { rows: 14336, cols: 4096 };

    #[test]
    fn multiples_are_powers_of_two_that_leave_enough_steps() {
        let sides =
            [(128, 1), (511, 1), (512, 32), (768, 32), (1408, 32), (2048, 64), (4096, 128), (65_536, 128)];
        for (short_side, multiple) in sides {
            assert_eq!(usual_multiple(short_side), multiple, "{short_side}");
        }
    }

    #[test]
    fn mixtral_break_even_is_3185() {
        assert_eq!(rank_max_saving(MIXTRAL, Storage::Uv), 3185);
        assert_eq!(rank_max_saving(MIXTRAL, Storage::Pivoted), 4095);
    }

    #[test]
    fn the_largest_saving_rank_saves_and_the_next_does_not() {
        for (rows, cols) in [(448, 128), (128, 448), (1, 7), (2, 2), (7, 1), (14336, 4096)] {
            let shape = MatrixShape { rows, cols };
            for storage in [Storage::Uv, Storage::Pivoted] {
                let r = rank_max_saving(shape, storage);
                let dense = stored_params(shape, storage, None);
                if r > 0 {
                    assert!(stored_params(shape, storage, Some(r)) < dense, "{shape} {storage:?}");
                }
                if r < shape.short_side() {
                    assert!(stored_params(shape, storage, Some(r + 1)) >= dense, "{shape} {storage:?}");
                }
            }
        }
    }
}
