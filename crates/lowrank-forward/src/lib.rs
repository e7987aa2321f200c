//! The reference forward pass in f32, written once: the verifier and calibration both run it.
//!
//! Layer-major: every sequence goes through layer i before layer i + 1 is read, and within a layer one expert's
//! weights are in memory at a time, so a model far larger than memory can be run. Dense and factored matrices share
//! one pass ([`Linear`]).
//!
//! ```text
//! tokens ─ embed ─► h [N, H]
//! per layer:   h += Wo · attention(rope(Wq x), rope(Wk x), Wv x)      x = norm(h)            attention.rs
//!              h += Σ_e g_e · w2_e (silu(w1_e x) ∘ w3_e x)            x = norm(h)            moe.rs
//! logits [T, V] = head · norm(h)                                                            head.rs
//! ```
//!
//! Where a layer is computed is an [`Engine`]: the CPU, whose code is in the files named above, or a CUDA device
//! (`cuda.rs`), with the weights as they are stored and the hidden states on the host in between.
//!
//! | Letter | Is |
//! |---|---|
//! | S, T, N | sequences; tokens of one sequence; tokens of all |
//! | H, F, V | hidden_size, intermediate_size, vocab_size |
//! | A, G, D | query heads, key/value heads, head_dim |
//! | E, k | experts, experts per token |
//!
//! **Arithmetic.** Weights are widened from bf16/f16/f32 without loss; everything is f32, except rotary angles (f64,
//! rounded once). The reference is Hugging Face transformers in f32 (`tests/golden/`).
//!
//! **Determinism.** Work is cut into pieces of fixed size, each piece is computed by one task in a fixed order, and no
//! sum is shared between tasks: the bits are the same for any number of threads.
//!
//! The architecture: Jiang et al. (2401.04088); Su et al., *RoFormer* (2104.09864); Zhang and
//! Sennrich, *RMSNorm* (1910.07467); Ba et al., *LayerNorm* (1607.06450); Shazeer, *GLU variants* (2002.05202).

pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod distribution;
pub mod engine;
pub mod error;
pub mod head;
pub mod hidden;
pub mod latent;
pub mod linear;
pub mod math;
pub mod model;
pub mod moe;
pub mod norm;
pub mod observer;
pub mod product;
pub mod rope;
pub mod router;

pub use cpu::Cpu;
pub use device::{Chosen, choose};
pub use engine::{Engine, StoredExpert};
pub use error::ForwardError;
pub use head::Head;
pub use hidden::Hidden;
pub use linear::{Linear, Matrix};
pub use lowrank_model::Device;
pub use model::Forward;
pub use observer::{ExpertBatch, MoeBlock, Observer};
pub use router::Routing;
