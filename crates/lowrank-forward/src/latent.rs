//! Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values of all heads are made of one short latent.
//!
//! ```text
//! c, r = split(Wa x)          c [rkv] the latent, r [R] a key that turns and that all heads share
//! k, v = split(Wb norm(c))    per head: k [Dn] does not turn, v [Dv]
//! q, s = split(Wq x)          per head: q [Dn], s [R] turns; Wq x may go through a latent, too: Wqb norm(Wqa x)
//! scores = (q·k + turn(s)·turn(r)) / √(Dn + R)
//! ```

use crate::attention::{Scores, add_bias, attend, norm_in_place};
use crate::hidden::Hidden;
use crate::linear::Linear;
use crate::math::add_scaled;
use crate::norm::ResidualNorm;
use crate::product::rows;
use crate::rope::{Pairs, Rope};
use lowrank_model::ModelConfig;
use lowrank_model::block::LatentAttention;
use ndarray::s;
use rayon::prelude::*;

/// ε of the norms of latents, whatever the config says of the others: `DeepseekV2RMSNorm` and `DeepseekV3RMSNorm` have it for their default.
const LATENT_EPSILON: f32 = 1e-6;

/// Weights of one layer's attention. Biases are empty where there are none.
#[derive(Debug)]
pub struct LatentWeights {
    /// Of its input.
    pub norm: ResidualNorm,
    /// How queries are made.
    pub query: QueryWeights,
    /// Wa, [rkv + R, H]
    pub down: Linear,
    /// `[rkv + R]`
    pub down_bias: Vec<f32>,
    /// `[rkv]`
    pub latent_norm: Vec<f32>,
    /// Wb, [A·(Dn + Dv), rkv]
    pub up: Linear,
    /// [H, A·Dv]
    pub output: Linear,
    /// `[H]`
    pub output_bias: Vec<f32>,
}

/// Weights that make queries [A·(Dn + R)].
#[derive(Debug)]
pub enum QueryWeights {
    /// One matrix, [A·(Dn + R), H].
    Whole(Linear),
    /// By way of a latent.
    Latent {
        /// [rq, H]
        down: Linear,
        /// `[rq]`
        bias: Vec<f32>,
        /// `[rq]`
        norm: Vec<f32>,
        /// [A·(Dn + R), rq]
        up: Linear,
    },
}

impl QueryWeights {
    /// x [T, H] → [T, A·(Dn + R)]
    fn apply(&self, x: &[f32], tokens: usize) -> Vec<f32> {
        match self {
            Self::Whole(matrix) => product(matrix, x, tokens),
            Self::Latent { down, bias, norm, up } => {
                let mut latent = product(down, x, tokens);
                add_bias(&mut latent, bias);
                norm_in_place(&mut latent, norm, LATENT_EPSILON);
                product(up, &latent, tokens)
            }
        }
    }
}

fn product(matrix: &Linear, x: &[f32], tokens: usize) -> Vec<f32> {
    let mut y = vec![0.0; tokens * matrix.outputs()];
    matrix.apply(x, &mut y);
    y
}

impl LatentWeights {
    /// h += attention(norm(h)), every sequence for itself.
    pub fn run(&self, config: &ModelConfig, shape: LatentAttention, rope: &Rope, hidden: &mut Hidden) {
        hidden.sequences_mut().into_par_iter().for_each(|h| self.run_sequence(config, shape, rope, h));
    }

    /// One sequence: h [T, H].
    fn run_sequence(&self, config: &ModelConfig, shape: LatentAttention, rope: &Rope, h: &mut [f32]) {
        let (heads, turning) = (config.num_attention_heads, config.head_dim);
        let LatentAttention { key_value_rank, fixed_dim: fixed, value_dim, .. } = shape;
        let pairs = if shape.pairs_side_by_side { Pairs::SideBySide } else { Pairs::HalfAHeadApart };
        let tokens = h.len() / config.hidden_size;
        let d = fixed + turning;

        let mut x = vec![0.0; h.len()]; // [T, H]
        self.norm.apply(&mut x, h);
        let mut q = self.query.apply(&x, tokens); // [T, A·(Dn + R)]
        rope.turn_ends(&mut q, (heads, d), pairs);
        let mut compressed = product(&self.down, &x, tokens); // [T, rkv + R]
        add_bias(&mut compressed, &self.down_bias);
        rope.turn_ends(&mut compressed, (1, key_value_rank + turning), pairs);
        let mut latent = Vec::with_capacity(tokens * key_value_rank); // [T, rkv]
        compressed
            .chunks_exact(key_value_rank + turning)
            .for_each(|row| latent.extend_from_slice(&row[..key_value_rank]));
        norm_in_place(&mut latent, &self.latent_norm, LATENT_EPSILON);
        let key_value = product(&self.up, &latent, tokens); // [T, A·(Dn + Dv)]

        let scale = config.rotation.score_scale() / (d as f64).sqrt();
        let scores = Scores { window: None, scale: scale as f32 };
        let (q, key_value) = (rows(&q, heads * d), rows(&key_value, heads * (fixed + value_dim)));
        let turned = rows(&compressed, key_value_rank + turning);
        let turned = turned.slice(s![.., key_value_rank..]); // [T, R]
        let per_head: Vec<Vec<f32>> = (0..heads)
            .into_par_iter()
            .map(|head| {
                let of_head =
                    key_value.slice(s![.., head * (fixed + value_dim)..(head + 1) * (fixed + value_dim)]);
                let (keys, values) = of_head.split_at(ndarray::Axis(1), fixed);
                let keys = ndarray::concatenate![ndarray::Axis(1), keys, turned]; // [T, Dn + R]
                attend(q.slice(s![.., head * d..(head + 1) * d]), keys.view(), values, scores)
            })
            .collect(); // A × [T, Dv]

        let mut mixed = vec![0.0; tokens * heads * value_dim]; // [T, A·Dv]
        for (t, row) in mixed.chunks_exact_mut(heads * value_dim).enumerate() {
            for (out, head) in row.chunks_exact_mut(value_dim).zip(&per_head) {
                out.copy_from_slice(&head[t * value_dim..][..value_dim]);
            }
        }
        self.output.apply(&mixed, &mut x);
        add_bias(&mut x, &self.output_bias);
        add_scaled(h, 1.0, &x);
    }
}
