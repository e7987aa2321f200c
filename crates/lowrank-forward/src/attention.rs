//! Grouped-query attention with rotary positions, a causal mask and an optional sliding window.

use crate::hidden::Hidden;
use crate::linear::Linear;
use crate::math::{add_scaled, rms_norm, softmax};
use crate::norm::ResidualNorm;
use crate::product::{one_tile, rows};
use crate::rope::Rope;
use lowrank_model::ModelConfig;
use ndarray::{ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

/// How scores become shares.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scores {
    /// Query i sees the keys j ≤ i, and of those the last `window`: j > i − window.
    pub(crate) window: Option<usize>,
    /// What each is multiplied with.
    pub(crate) scale: f32,
}

/// Queries whose scores are computed together.
const QUERY_BLOCK: usize = 128;

/// Weights of one layer's attention.
#[derive(Debug)]
pub struct AttentionWeights {
    /// Of its input.
    pub norm: ResidualNorm,
    /// [A·D, H]
    pub query: Linear,
    /// [G·D, H]
    pub key: Linear,
    /// [G·D, H]
    pub value: Linear,
    /// [H, A·D]
    pub output: Linear,
    /// What is added to the products for query, key, value and output; empty where nothing is.
    pub biases: [Vec<f32>; 4],
    /// RMSNorm of queries and keys: of each head, or of all together where the weights are as long; empty without a norm.
    pub norms: [Vec<f32>; 2],
}

impl AttentionWeights {
    /// h += attention(norm(h)), every sequence for itself.
    pub fn run(&self, config: &ModelConfig, rope: &Rope, hidden: &mut Hidden) {
        hidden.sequences_mut().into_par_iter().for_each(|h| self.run_sequence(config, rope, h));
    }

    /// One sequence: h [T, H].
    fn run_sequence(&self, config: &ModelConfig, rope: &Rope, h: &mut [f32]) {
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (hidden_size, d) = (config.hidden_size, config.head_dim);
        let tokens = h.len() / hidden_size;

        let mut x = vec![0.0; h.len()]; // [T, H]
        self.norm.apply(&mut x, h);
        let mut q = vec![0.0; tokens * heads * d]; // [T, A·D]
        let mut k = vec![0.0; tokens * kv_heads * d]; // [T, G·D]
        let mut v = vec![0.0; tokens * kv_heads * d]; // [T, G·D]
        self.query.apply(&x, &mut q);
        self.key.apply(&x, &mut k);
        self.value.apply(&x, &mut v);
        let [query_bias, key_bias, value_bias, output_bias] = &self.biases;
        add_bias(&mut q, query_bias);
        add_bias(&mut k, key_bias);
        add_bias(&mut v, value_bias);
        let [query_norm, key_norm] = &self.norms;
        norm_in_place(&mut q, query_norm, config.rms_norm_eps as f32);
        norm_in_place(&mut k, key_norm, config.rms_norm_eps as f32);
        if let Some(limit) = config.clip_qkv {
            let limit = limit as f32;
            [&mut q, &mut k, &mut v].into_iter().flatten().for_each(|value| *value = clip(*value, limit));
        }
        rope.turn(&mut q, heads);
        rope.turn(&mut k, kv_heads);

        let (q, k, v) = (rows(&q, heads * d), rows(&k, kv_heads * d), rows(&v, kv_heads * d));
        // A / G query heads share one key/value head.
        let group = heads / kv_heads;
        let scores = Scores { window: config.sliding_window, scale: (1.0 / (d as f64).sqrt()) as f32 };
        let per_head: Vec<Vec<f32>> = (0..heads)
            .into_par_iter()
            .map(|head| {
                let columns = |head: usize| s![.., head * d..(head + 1) * d];
                let (of_query, of_key) = (columns(head), columns(head / group));
                attend(q.slice(of_query), k.slice(of_key), v.slice(of_key), scores)
            })
            .collect(); // A × [T, D]

        let mut mixed = vec![0.0; tokens * heads * d]; // [T, A·D]
        for (t, row) in mixed.chunks_exact_mut(heads * d).enumerate() {
            for (out, head) in row.chunks_exact_mut(d).zip(&per_head) {
                out.copy_from_slice(&head[t * d..][..d]);
            }
        }
        self.output.apply(&mixed, &mut x);
        add_bias(&mut x, output_bias);
        add_scaled(h, 1.0, &x);
    }
}

/// Adds a bias to every row, if there is one.
pub(crate) fn add_bias(rows: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        rows.chunks_exact_mut(bias.len()).for_each(|row| add_scaled(row, 1.0, bias));
    }
}

/// RMSNorm of every run of as many values as there are weights, if there are any.
pub(crate) fn norm_in_place(values: &mut [f32], weights: &[f32], epsilon: f32) {
    if weights.is_empty() {
        return;
    }
    let mut before = vec![0.0; weights.len()];
    for run in values.chunks_exact_mut(weights.len()) {
        before.copy_from_slice(run);
        rms_norm(run, &before, weights, epsilon);
    }
}

/// To [−limit, limit]; NaN stays NaN.
fn clip(value: f32, limit: f32) -> f32 {
    if value > limit {
        limit
    } else if value < -limit {
        -limit
    } else {
        value
    }
}

/// softmax(scale · q kᵀ) v of one head: q, k [T, D], v [T, Dv] → [T, Dv].
pub(crate) fn attend(
    q: ArrayView2<'_, f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    Scores { window, scale }: Scores,
) -> Vec<f32> {
    let (tokens, d) = (q.nrows(), v.ncols());
    let first_seen = |i: usize| window.map_or(0, |window| (i + 1).saturating_sub(window));
    let mut out = vec![0.0; tokens * d]; // [T, Dv]
    let mut scores = Vec::new(); // [queries, keys]
    for (block, out) in out.chunks_mut(QUERY_BLOCK * d).enumerate() {
        let first_query = block * QUERY_BLOCK;
        let queries = out.len() / d;
        // No query of this block sees a key outside first_key..end_key.
        let (first_key, end_key) = (first_seen(first_query), first_query + queries);
        let keys = end_key - first_key;
        scores.clear();
        scores.resize(queries * keys, 0.0);
        one_tile(
            ArrayViewMut2::from_shape((queries, keys), &mut scores).expect("queries × keys"),
            q.slice(s![first_query..end_key, ..]),
            k.slice(s![first_key..end_key, ..]).reversed_axes(),
        );
        for (row, i) in scores.chunks_exact_mut(keys).zip(first_query..) {
            let (hidden_past, rest) = row.split_at_mut(first_seen(i) - first_key);
            let (seen, future) = rest.split_at_mut(i + 1 - first_seen(i));
            hidden_past.fill(0.0);
            future.fill(0.0);
            for score in seen.iter_mut() {
                *score *= scale;
            }
            softmax(seen);
        }
        one_tile(
            ArrayViewMut2::from_shape((queries, d), out).expect("queries × Dv"),
            rows(&scores, keys),
            v.slice(s![first_key..end_key, ..]),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in f64.
    fn reference(q: &[f32], k: &[f32], v: &[f32], d: usize, window: usize) -> Vec<f64> {
        let tokens = q.len() / d;
        let mut out = vec![0.0; tokens * d];
        for i in 0..tokens {
            let seen: Vec<usize> = (0..=i).filter(|&j| i - j < window).collect();
            let scores: Vec<f64> = seen
                .iter()
                .map(|&j| (0..d).map(|c| f64::from(q[i * d + c]) * f64::from(k[j * d + c])).sum::<f64>())
                .map(|dot| (dot / (d as f64).sqrt()).exp())
                .collect();
            let total: f64 = scores.iter().sum();
            for (&j, score) in seen.iter().zip(&scores) {
                for c in 0..d {
                    out[i * d + c] += score / total * f64::from(v[j * d + c]);
                }
            }
        }
        out
    }

    #[test]
    fn blocks_and_windows_equal_the_definition() {
        let (tokens, d) = (300, 6);
        let values = |phase: f32| -> Vec<f32> {
            (0..tokens * d).map(|i| (i as f32 * 0.37 + phase).sin() * 2.0).collect()
        };
        let (q, k, v) = (values(0.0), values(1.0), values(2.0));
        let as_matrix = |x| rows(x, d);
        for window in [None, Some(1), Some(5), Some(128), Some(200), Some(1000)] {
            let scores = Scores { window, scale: (1.0 / (d as f64).sqrt()) as f32 };
            let got = attend(as_matrix(&q), as_matrix(&k), as_matrix(&v), scores);
            let expected = reference(&q, &k, &v, d, window.unwrap_or(usize::MAX));
            for (got, expected) in got.iter().zip(expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-5, "window {window:?}");
            }
        }
    }
}
