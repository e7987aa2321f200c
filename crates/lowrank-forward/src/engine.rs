//! The interface between the pass, which reads weights and keeps order, and the processor that computes a layer.
//!
//! An engine gets weights as they are stored, one block at a time. Between blocks, hidden states are on the host.

use crate::error::ForwardError;
use crate::hidden::Hidden;
use crate::norm::ResidualNorm;
use crate::observer::Observer;
use crate::router::{Choice, Routing};
use lowrank_model::block::{LatentAttention, NormKind, Router};
use lowrank_model::{Dtype, ModelConfig, StoredMatrix, Tensor};
use std::fmt::Debug;

/// Computes the blocks of a layer.
pub trait Engine: Debug + Sync {
    /// Names the processor and its precision, for reports.
    fn describe(&self) -> String;

    /// h += attention(norm(h)), every sequence for itself.
    fn attention(
        &self,
        config: &ModelConfig,
        weights: StoredAttention,
        hidden: &mut Hidden,
    ) -> Result<(), ForwardError>;

    /// norm(x) for every row x of states [N, H].
    fn norm(&self, states: &[f32], norm: &ResidualNorm) -> Result<Vec<f32>, ForwardError>;

    /// The experts that a router chooses for every token of an input [N, H].
    fn route(&self, input: &[f32], router: &StoredRouter) -> Result<Routing, ForwardError>;

    /// Starts the MoE block of a layer for several inputs [N, H].
    fn moe<'a>(
        &'a self,
        inputs: &[&'a [f32]],
        router: &StoredRouter,
    ) -> Result<Box<dyn ExpertSum + 'a>, ForwardError>;

    /// Final norm, output matrix [V, H], and what is added to the logits, `[V]` or empty.
    fn head(
        &self,
        norm: ResidualNorm,
        output: Tensor,
        bias: Vec<f32>,
    ) -> Result<Box<dyn Project + '_>, ForwardError>;
}

/// The output of an MoE block, Σ_e g_e · expert_e(x), to which experts are added one after another.
pub trait ExpertSum {
    /// Adds g_e · expert_e(x) of one (layer, expert) for the tokens of every input that are routed to it.
    fn expert(
        &mut self,
        place: (usize, usize),
        weights: StoredExpert,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError>;

    /// Σ_e g_e · expert_e(x), [N, H] for every input.
    fn outputs(self: Box<Self>) -> Result<Vec<Vec<f32>>, ForwardError>;
}

/// The last step: h [T, H] → logits [T, V].
pub trait Project: Debug {
    /// Of one sequence.
    fn logits(&self, h: &[f32]) -> Result<Vec<f32>, ForwardError>;
}

/// Weights of one layer's attention, as stored.
#[derive(Debug, Clone)]
pub enum StoredAttention {
    /// With a matrix for keys and one for values.
    Grouped(Box<StoredGrouped>),
    /// With latents.
    Latent(Box<StoredLatent>),
}

/// Weights of attention by latents, as stored.
#[derive(Debug, Clone)]
pub struct StoredLatent {
    /// Its widths.
    pub shape: LatentAttention,
    /// Of its input.
    pub norm: ResidualNorm,
    /// Down to the latent, its norm, and up from it; or one matrix.
    pub query: StoredQuery,
    /// [r + D, H]
    pub down: Tensor,
    /// `[r]`
    pub latent_norm: Tensor,
    /// [A·(Dn + Dv), r]
    pub up: Tensor,
    /// [H, A·Dv]
    pub output: Tensor,
    /// What is added to the queries' latent, to the other, and to the output.
    pub biases: [Option<Tensor>; 3],
}

/// Weights that make queries from a layer's input, as stored.
#[derive(Debug, Clone)]
pub enum StoredQuery {
    /// [A·(Dn + D), H]
    Whole(Tensor),
    /// By way of a latent.
    Latent {
        /// [rq, H]
        down: Tensor,
        /// `[rq]`
        norm: Tensor,
        /// [A·(Dn + D), rq]
        up: Tensor,
    },
}

/// Weights of attention without latents, as stored.
#[derive(Debug, Clone)]
pub struct StoredGrouped {
    /// Of its input.
    pub norm: ResidualNorm,
    /// [A·D, H]
    pub query: Tensor,
    /// [G·D, H]
    pub key: Tensor,
    /// [G·D, H]
    pub value: Tensor,
    /// [H, A·D]
    pub output: Tensor,
    /// What is added to the four products, in their order.
    pub biases: [Option<Tensor>; 4],
    /// Norms of queries and keys.
    pub norms: Option<[Tensor; 2]>,
}

impl StoredGrouped {
    /// Whether there is nothing but RMSNorm and four products.
    pub fn is_plain(&self) -> bool {
        self.norm.kind == NormKind::RootMeanSquare
            && self.norms.is_none()
            && self.biases.iter().all(Option::is_none)
    }
}

/// The router of one layer, as stored.
#[derive(Debug, Clone)]
pub struct StoredRouter {
    /// [E, H]
    pub weights: Tensor,
    /// `[E]`, if its rule has one.
    pub bias: Option<Tensor>,
    /// How its logits become weights.
    pub rule: Router,
    /// k
    pub experts_per_token: usize,
}

impl StoredRouter {
    /// The choice of every token, from the logits [N, E].
    pub fn choose(&self, logits: Vec<f32>) -> Routing {
        let bias = self.bias.as_ref().map_or_else(Vec::new, Tensor::to_f32);
        Routing::new(
            logits,
            self.weights.shape()[0],
            &Choice { rule: self.rule, bias, experts_per_token: self.experts_per_token },
        )
    }
}

/// Weights of one expert, as stored.
#[derive(Debug, Clone)]
pub struct StoredExpert {
    /// gate, [F, H]
    pub gate: StoredMatrix,
    /// down, [H, F]
    pub down: StoredMatrix,
    /// up, [F, H]
    pub up: StoredMatrix,
}

impl StoredExpert {
    /// The same expert of this width with a down matrix of zeros: for callers that need activations and no outputs.
    pub fn without_outputs(self, hidden_size: usize, width: usize) -> Self {
        let zeros = |shape: Vec<usize>| {
            let values = vec![0.0; shape[0] * shape[1]];
            Tensor::from_f32(shape, Dtype::F32, &values).expect("as many as the shape says")
        };
        let down = StoredMatrix::Factored { u: zeros(vec![hidden_size, 1]), v: zeros(vec![1, width]) };
        Self { down, ..self }
    }
}
