//! Pivoted storage: which side the pivots lie on, which shapes follow, and the order that is stored beside the factors.
//!
//! Any Ŵ [m, n] of rank r is r of its own columns and a table that makes the others of them (Cheng, Gimbutas, Martinsson
//! and Rokhlin, 2005; for neural networks PIFA, arXiv 2501.19090):
//!
//! ```text
//! inputs  (n ≤ m)   Ŵ = basis · [I T] Π      basis [m, r] = Ŵ's pivot columns,  coefficients T [r, n − r]
//! outputs (m < n)   Ŵ = Πᵀ [I; T] · basis    basis [r, n] = Ŵ's pivot rows,     coefficients T [m − r, r]
//! ```
//!
//! r(m + n − r) numbers instead of r(m + n), and the same matrix. The pivots lie on the short side.

use crate::{MatrixShape, params::INDEX_ELEMENT_BYTES};

/// The side of W that the pivots lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PivotSide {
    /// Columns: Ŵ = basis · [I T] Π.
    Inputs,
    /// Rows: Ŵ = Πᵀ [I; T] · basis.
    Outputs,
}

impl PivotSide {
    /// The short side; inputs when W is square.
    pub fn of(shape: MatrixShape) -> Self {
        if shape.rows < shape.cols { Self::Outputs } else { Self::Inputs }
    }
}

/// [basis, coefficients] of a pivoted matrix.
pub fn factor_shapes(shape: MatrixShape, rank: usize) -> [[usize; 2]; 2] {
    let MatrixShape { rows: m, cols: n } = shape;
    match PivotSide::of(shape) {
        PivotSide::Inputs => [[m, rank], [rank, n - rank]],
        PivotSide::Outputs => [[rank, n], [m - rank, rank]],
    }
}

/// Π: every index of the short side once, first the r pivots, then the others, both rising.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PivotOrder {
    order: Vec<u32>,
    rank: usize,
}

/// What is wrong with an order.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PivotError {
    /// Not one entry per index.
    #[error("{found} entries for {expected} indices")]
    Length {
        /// Entries.
        found: usize,
        /// Short side of the matrix.
        expected: usize,
    },
    /// An index that the matrix does not have.
    #[error("entry {entry} is {index}, beyond the {len} indices of the short side")]
    OutOfRange {
        /// Position in the order.
        entry: usize,
        /// What stands there.
        index: i64,
        /// Short side of the matrix.
        len: usize,
    },
    /// Pivots, or the others, do not rise.
    #[error("entry {entry} is {index}, not above the one before it")]
    NotRising {
        /// Position in the order.
        entry: usize,
        /// What stands there.
        index: i64,
    },
    /// An index is both a pivot and not one.
    #[error("index {index} stands twice")]
    Twice {
        /// Which.
        index: i64,
    },
}

impl PivotOrder {
    /// Completes pivots, in any order, of a side of `len`.
    ///
    /// # Panics
    /// If a pivot is out of range or stands twice.
    pub fn of_pivots(pivots: &[usize], len: usize) -> Self {
        let mut is_pivot = vec![false; len];
        for &pivot in pivots {
            assert!(!std::mem::replace(&mut is_pivot[pivot], true), "pivot {pivot} stands twice");
        }
        let others = (0..len).filter(|&index| !is_pivot[index]);
        let order =
            (0..len).filter(|&index| is_pivot[index]).chain(others).map(|index| index as u32).collect();
        Self { order, rank: pivots.len() }
    }

    /// Reads the stored tensor: little-endian i64.
    pub fn from_le_bytes(bytes: &[u8], rank: usize, len: usize) -> Result<Self, PivotError> {
        let (entries, rest) = bytes.as_chunks::<{ INDEX_ELEMENT_BYTES as usize }>();
        if entries.len() != len || !rest.is_empty() || rank > len {
            return Err(PivotError::Length { found: entries.len(), expected: len });
        }
        let mut order = Vec::with_capacity(len);
        let mut seen = vec![false; len];
        for (entry, bytes) in entries.iter().enumerate() {
            let index = i64::from_le_bytes(*bytes);
            let Some(known) = usize::try_from(index).ok().filter(|&known| known < len) else {
                return Err(PivotError::OutOfRange { entry, index, len });
            };
            if std::mem::replace(&mut seen[known], true) {
                return Err(PivotError::Twice { index });
            }
            if entry != 0 && entry != rank && order.last().is_some_and(|&before| known as u32 <= before) {
                return Err(PivotError::NotRising { entry, index });
            }
            order.push(known as u32);
        }
        Ok(Self { order, rank })
    }

    /// As stored.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        self.order.iter().flat_map(|&index| i64::from(index).to_le_bytes()).collect()
    }

    /// r
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// All indices, pivots first.
    pub fn all(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.order.iter().map(|&index| index as usize)
    }

    /// The pivots, rising.
    pub fn pivots(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.order[..self.rank].iter().map(|&index| index as usize)
    }

    /// The others, rising.
    pub fn others(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.order[self.rank..].iter().map(|&index| index as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Storage, params::stored_params};

    #[test]
    fn the_shapes_hold_as_many_numbers_as_the_plan_counts() {
        for (rows, cols) in [(14336, 4096), (4096, 14336), (7, 7), (2, 9)] {
            let shape = MatrixShape { rows, cols };
            for rank in [1, shape.short_side() / 2, shape.short_side() - 1] {
                let held: usize = factor_shapes(shape, rank).iter().map(|[a, b]| a * b).sum();
                assert_eq!(held as u64, stored_params(shape, Storage::Pivoted, Some(rank)), "{shape} {rank}");
            }
        }
    }

    #[test]
    fn an_order_reads_back() {
        let order = PivotOrder::of_pivots(&[4, 1, 5], 6);
        assert_eq!(order.all().collect::<Vec<_>>(), [1, 4, 5, 0, 2, 3]);
        assert_eq!(order.pivots().collect::<Vec<_>>(), [1, 4, 5]);
        assert_eq!(order.others().collect::<Vec<_>>(), [0, 2, 3]);
        assert_eq!(PivotOrder::from_le_bytes(&order.to_le_bytes(), 3, 6), Ok(order));
    }

    #[test]
    fn an_order_that_is_none_is_refused() {
        let read = |order: &[i64]| {
            let bytes: Vec<u8> = order.iter().flat_map(|index| index.to_le_bytes()).collect();
            PivotOrder::from_le_bytes(&bytes, 2, 4)
        };
        assert!(read(&[1, 3, 0, 2]).is_ok());
        assert_eq!(read(&[1, 3, 0]), Err(PivotError::Length { found: 3, expected: 4 }));
        assert_eq!(read(&[1, 4, 0, 2]), Err(PivotError::OutOfRange { entry: 1, index: 4, len: 4 }));
        assert_eq!(read(&[-1, 3, 0, 2]), Err(PivotError::OutOfRange { entry: 0, index: -1, len: 4 }));
        assert_eq!(read(&[3, 1, 0, 2]), Err(PivotError::NotRising { entry: 1, index: 1 }));
        assert_eq!(read(&[1, 2, 0, 2]), Err(PivotError::Twice { index: 2 }));
    }
}
