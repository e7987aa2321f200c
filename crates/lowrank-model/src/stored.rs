//! An expert matrix as a checkpoint holds it: dense, or in one of the two ways to store factors.

use crate::{PivotOrder, PivotSide, Tensor};
use std::sync::Arc;

/// An expert matrix as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredMatrix {
    /// W [m, n].
    Dense(Tensor),
    /// W ≈ u·v.
    Factored {
        /// [m, r]
        u: Tensor,
        /// [r, n]
        v: Tensor,
    },
    /// W ≈ basis · [I T] Π, or Πᵀ [I; T] · basis: see [`crate::pivots`].
    Pivoted {
        /// Which of the two.
        side: PivotSide,
        /// [m, r] or [r, n]
        basis: Tensor,
        /// T: [r, n − r] or [m − r, r]
        coefficients: Tensor,
        /// Π
        order: PivotOrder,
    },
    /// W ≈ B + difference, B shared by the experts of a layer.
    OfBase {
        /// B [m, n]
        base: Arc<Tensor>,
        /// Factors of W − B.
        difference: Box<StoredMatrix>,
    },
}

impl StoredMatrix {
    /// The factors themselves, without a base.
    pub fn factors(&self) -> &Self {
        match self {
            Self::OfBase { difference, .. } => difference.factors(),
            own => own,
        }
    }
}
