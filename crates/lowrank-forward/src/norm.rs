//! The norms of the residual stream: before attention, before the experts, before the head.

use crate::math::{layer_norm, rms_norm};
use crate::product::TILE_TOKENS;
use lowrank_model::block::NormKind;
use rayon::prelude::*;

/// One of them.
#[derive(Debug, Clone)]
pub struct ResidualNorm {
    /// What it computes.
    pub kind: NormKind,
    /// `[H]`
    pub weight: Vec<f32>,
    /// `[H]`, or empty if its kind has none.
    pub bias: Vec<f32>,
    /// ε
    pub epsilon: f32,
}

impl ResidualNorm {
    /// out = norm(x) for every row of x [T, H].
    pub fn apply(&self, out: &mut [f32], x: &[f32]) {
        let h = self.weight.len();
        out.chunks_exact_mut(h).zip(x.chunks_exact(h)).for_each(|(out, x)| self.apply_to_row(out, x));
    }

    /// norm(x) for every row of x [N, H], on the threads of the current pool.
    pub fn apply_to_all(&self, x: &[f32]) -> Vec<f32> {
        let h = self.weight.len();
        let mut out = vec![0.0; x.len()];
        out.par_chunks_exact_mut(h)
            .with_min_len(TILE_TOKENS)
            .zip(x.par_chunks_exact(h))
            .for_each(|(out, x)| self.apply_to_row(out, x));
        out
    }

    fn apply_to_row(&self, out: &mut [f32], x: &[f32]) {
        match self.kind {
            NormKind::RootMeanSquare => rms_norm(out, x, &self.weight, self.epsilon),
            NormKind::MeanAndVariance => layer_norm(out, x, &self.weight, &self.bias, self.epsilon),
        }
    }
}
