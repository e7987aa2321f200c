//! Generated inputs: sizes, a matrix, a decoder layer, hidden states.

use lowrank_compute::{Accumulate, Faer, Kernels};
use lowrank_forward::Hidden;
use lowrank_forward::engine::{StoredAttention, StoredExpert, StoredGrouped, StoredRouter};
use lowrank_forward::norm::ResidualNorm;
use lowrank_model::{Dtype, ModelConfig, StoredMatrix, Tensor};
use ndarray::Array2;
use serde_json::json;

/// Sizes of what is generated.
pub(crate) struct Sizes {
    pub(crate) matrix: (usize, usize),
    pub(crate) rank: usize,
    pub(crate) peak: usize,
    pub(crate) tokens: usize,
    pub(crate) window: usize,
    /// Threads at once; calibrated routes on the second number alone.
    pub(crate) lanes: &'static [usize],
    pub(crate) config: ModelConfig,
}

pub(crate) fn sizes(small: bool) -> Sizes {
    let mixtral = ModelConfig::from_hf_json(&json!({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000,
    }))
    .expect("the dimensions of a real model");
    if !small {
        // Rank 2479: what removing 10 B of an 8x7B model's parameters comes to.
        return Sizes {
            matrix: (14336, 4096),
            rank: 2479,
            peak: 8192,
            tokens: 4096,
            window: 256,
            lanes: &[1, 8, 4, 2],
            config: mixtral,
        };
    }
    let config = ModelConfig {
        hidden_size: 64,
        intermediate_size: 96,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 8,
        ..mixtral
    };
    Sizes { matrix: (120, 80), rank: 40, peak: 64, tokens: 64, window: 16, lanes: &[1, 3], config }
}

/// xorshift64: quick, and good enough for weights.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    /// Uniform in [-1, 1).
    pub(crate) fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Like a trained expert: a noise floor and a power-law head, in bf16.
pub(crate) fn generated((rows, cols): (usize, usize), seed: u64) -> Tensor {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut draw =
        |rows, cols, scale: f32| Array2::from_shape_simple_fn((rows, cols), || scale * noise.next());
    let head = rows.min(cols) / 8;
    let (mut a, b) = (draw(rows, head, 1.0), draw(head, cols, 1.0));
    for (k, mut column) in a.columns_mut().into_iter().enumerate() {
        column *= 0.01 * (k as f32 + 1.0).powf(-0.6);
    }
    let mut w = draw(rows, cols, 0.03);
    let kernels: &dyn Kernels<f32> = &Faer;
    kernels.gemm(a.view(), b.view(), w.view_mut(), Accumulate::Add);
    Tensor::from_f32(vec![rows, cols], Dtype::Bf16, w.as_slice().expect("row-major")).expect("fits its shape")
}

/// Noise of the size that keeps the variance of what passes through.
pub(crate) fn weights(rows: usize, cols: usize, seed: u64) -> Tensor {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let scale = (3.0 / cols as f32).sqrt();
    let bytes = (0..rows * cols)
        .flat_map(|_| (((scale * noise.next()).to_bits() >> 16) as u16).to_le_bytes())
        .collect();
    Tensor::new(vec![rows, cols], Dtype::Bf16, bytes).expect("as many as the shape says")
}

pub(crate) struct Layer {
    pub(crate) attention: StoredAttention,
    pub(crate) router: StoredRouter,
    pub(crate) experts: Vec<StoredExpert>,
}

/// A norm whose weights change nothing.
pub(crate) fn unit_norm(config: &ModelConfig) -> ResidualNorm {
    let (weight, epsilon) = (vec![1.0; config.hidden_size], config.rms_norm_eps as f32);
    ResidualNorm { kind: config.block.norm, weight, bias: Vec::new(), epsilon }
}

pub(crate) fn layer(config: &ModelConfig) -> Layer {
    let (h, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let dense = |rows, cols, seed| StoredMatrix::Dense(weights(rows, cols, seed));
    Layer {
        attention: StoredAttention::Grouped(Box::new(StoredGrouped {
            norm: unit_norm(config),
            query: weights(q, h, 2),
            key: weights(kv, h, 3),
            value: weights(kv, h, 4),
            output: weights(h, q, 5),
            biases: [const { None }; 4],
            norms: None,
        })),
        router: StoredRouter {
            weights: weights(config.num_local_experts, h, 6),
            bias: None,
            rule: config.block.router,
            experts_per_token: config.num_experts_per_tok,
        },
        experts: (0..config.num_local_experts as u64)
            .map(|e| StoredExpert {
                gate: dense(f, h, 10 + 3 * e),
                down: dense(h, f, 11 + 3 * e),
                up: dense(f, h, 12 + 3 * e),
            })
            .collect(),
    }
}

pub(crate) fn states(config: &ModelConfig, tokens: usize, window: usize) -> Hidden {
    let mut noise = Noise(77);
    let values = (0..tokens * config.hidden_size).map(|_| noise.next()).collect();
    Hidden::new(values, &vec![window; tokens / window], config.hidden_size)
}
