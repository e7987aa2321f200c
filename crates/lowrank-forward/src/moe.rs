//! The MoE block: y = Σ_e g_e · w2_e (silu(w1_e x) ∘ w3_e x) over the k experts of a token.
//!
//! Tokens of one expert are gathered, so that each of its matrices is multiplied once with many of them.

use crate::linear::Linear;
use crate::math::{add_scaled, swiglu};
use crate::observer::{ExpertBatch, Observer};
use crate::product::TILE_TOKENS;
use crate::router::Routing;
use rayon::prelude::*;

/// Tokens gathered at a time: bounds the [n, F] activations that the observer is shown.
pub const BATCH_TOKENS: usize = 8 * TILE_TOKENS;

/// Weights of one expert.
#[derive(Debug)]
pub struct ExpertWeights {
    /// gate, [F, H]
    pub gate: Linear,
    /// down, [H, F]
    pub down: Linear,
    /// up, [F, H]
    pub up: Linear,
}

/// Buffers that one expert after another fills.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    x: Vec<f32>,           // [n, H]
    gate: Vec<f32>,        // [n, F]
    up: Vec<f32>,          // [n, F]
    activations: Vec<f32>, // [n, F]
    y: Vec<f32>,           // [n, H]
}

impl ExpertWeights {
    /// Adds g_e · expert_e(x) of its routed tokens to `output` [N, H].
    pub(crate) fn add_to(
        &self,
        (layer, expert): (usize, usize),
        input: &[f32], // [N, H]
        routing: &Routing,
        output: &mut [f32], // [N, H]
        scratch: &mut Scratch,
        observer: &mut dyn Observer,
    ) {
        let (h, f) = (self.gate.inputs(), self.gate.outputs());
        let (tokens, weights) = routing.routed_tokens(expert);
        for (tokens, weights) in tokens.chunks(BATCH_TOKENS).zip(weights.chunks(BATCH_TOKENS)) {
            let n = tokens.len();
            scratch.x.resize(n * h, 0.0);
            scratch.gate.resize(n * f, 0.0);
            scratch.up.resize(n * f, 0.0);
            scratch.activations.resize(n * f, 0.0);
            scratch.y.resize(n * h, 0.0);
            let Scratch { x, gate, up, activations, y } = &mut *scratch;
            (
                tokens.par_chunks(TILE_TOKENS),
                x.par_chunks_mut(TILE_TOKENS * h),
                gate.par_chunks_mut(TILE_TOKENS * f),
                up.par_chunks_mut(TILE_TOKENS * f),
                activations.par_chunks_mut(TILE_TOKENS * f),
                y.par_chunks_mut(TILE_TOKENS * h),
            )
                .into_par_iter()
                .for_each(|(tokens, x, gate, up, activations, y)| {
                    for (x, &token) in x.chunks_exact_mut(h).zip(tokens) {
                        x.copy_from_slice(&input[token * h..][..h]);
                    }
                    self.gate.apply(x, gate);
                    self.up.apply(x, up);
                    activations.copy_from_slice(gate);
                    swiglu(activations, up);
                    self.down.apply(activations, y);
                });
            scatter(output, h, tokens, weights, y);
            observer.expert(&ExpertBatch { layer, expert, tokens, weights, x, gate, up, activations, y });
        }
    }
}

/// `output[token] += weight · y`, a task per run of output rows. `tokens` rises, so each task finds its own.
fn scatter(output: &mut [f32], h: usize, tokens: &[usize], weights: &[f32], y: &[f32]) {
    output.par_chunks_mut(TILE_TOKENS * h).enumerate().for_each(|(chunk, output)| {
        let first = chunk * TILE_TOKENS;
        let start = tokens.partition_point(|&token| token < first);
        let end = tokens.partition_point(|&token| token < first + TILE_TOKENS);
        for row in start..end {
            let at = (tokens[row] - first) * h;
            add_scaled(&mut output[at..at + h], weights[row], &y[row * h..][..h]);
        }
    });
}
