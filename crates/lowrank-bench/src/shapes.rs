//! `config.json` of published models, as far as it says shapes.

use serde_json::{Value, json};

/// Mixtral-8x7B.
pub fn mixtral() -> Value {
    json!({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    })
}

/// Models with many small experts.
pub fn large_models() -> [(&'static str, Value); 3] {
    [
        (
            "Qwen3-30B-A3B",
            json!({
                "model_type": "qwen3_moe", "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
                "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
                "num_hidden_layers": 48, "num_key_value_heads": 4, "norm_topk_prob": true, "vocab_size": 151_936,
            }),
        ),
        (
            "GLM-4.5-Air",
            json!({
                "model_type": "glm4_moe", "attention_bias": true, "first_k_dense_replace": 1, "head_dim": 128,
                "hidden_size": 4096, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
                "n_shared_experts": 1, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
                "num_key_value_heads": 8, "vocab_size": 151_552,
            }),
        ),
        // All of its keys are the defaults of its class.
        ("DeepSeek-V3", json!({ "model_type": "deepseek_v3" })),
    ]
}
