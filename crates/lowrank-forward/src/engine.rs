//! Where a layer is computed: the seam between the pass, which reads weights and keeps order, and what multiplies.
//!
//! Weights are handed over as they are stored, one block at a time, and hidden states lie on the host in between.

use crate::cpu::Cpu;
use crate::error::ForwardError;
use crate::hidden::Hidden;
use crate::observer::Observer;
use crate::router::Routing;
use lowrank_model::{Dtype, ModelConfig, StoredMatrix, Tensor};
use std::fmt::Debug;

/// Computes the blocks of a layer.
pub trait Engine: Debug + Sync {
    /// What computes, in words, for reports.
    fn describe(&self) -> String;

    /// h += attention(norm(h)), every sequence for itself.
    fn attention(
        &self,
        config: &ModelConfig,
        weights: StoredAttention,
        hidden: &mut Hidden,
    ) -> Result<(), ForwardError>;

    /// x / √(mean(x²) + ε) ∘ weight for every row of states [N, H]; weight `[H]`.
    fn norm(&self, states: &[f32], weight: &[f32], epsilon: f32) -> Result<Vec<f32>, ForwardError>;

    /// Which experts the tokens of an input [N, H] visit; router [E, H].
    fn route(
        &self,
        input: &[f32],
        router: &Tensor,
        experts_per_token: usize,
    ) -> Result<Routing, ForwardError>;

    /// A mixture for several inputs [N, H]; router [E, H].
    fn mixture<'a>(
        &'a self,
        inputs: &[&'a [f32]],
        router: &Tensor,
        experts_per_token: usize,
    ) -> Result<Box<dyn Mixture + 'a>, ForwardError>;

    /// Final norm `[H]` and output matrix [V, H].
    fn head(
        &self,
        norm: Vec<f32>,
        output: Tensor,
        epsilon: f32,
    ) -> Result<Box<dyn Project + '_>, ForwardError>;
}

/// A mixture in the making: experts are added one after another.
pub trait Mixture {
    /// Adds g_e · expert_e(x) for the tokens of every input that visit this (layer, expert).
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
pub struct StoredAttention {
    /// `[H]`
    pub norm: Tensor,
    /// [A·D, H]
    pub query: Tensor,
    /// [G·D, H]
    pub key: Tensor,
    /// [G·D, H]
    pub value: Tensor,
    /// [H, A·D]
    pub output: Tensor,
}

/// Weights of one expert, as stored.
#[derive(Debug, Clone)]
pub struct StoredExpert {
    /// gate, [F, H]
    pub w1: StoredMatrix,
    /// down, [H, F]
    pub w2: StoredMatrix,
    /// up, [F, H]
    pub w3: StoredMatrix,
}

impl StoredExpert {
    /// The same up to the activations; w2 gives zeros, at next to no cost.
    pub fn without_outputs(self, config: &ModelConfig) -> Self {
        let zeros = |shape: Vec<usize>| {
            let values = vec![0.0; shape[0] * shape[1]];
            Tensor::from_f32(shape, Dtype::F32, &values).expect("as many as the shape says")
        };
        let w2 = StoredMatrix::Factored {
            u: zeros(vec![config.hidden_size, 1]),
            v: zeros(vec![1, config.intermediate_size]),
        };
        Self { w2, ..self }
    }
}

/// What the user asked to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or fail.
    Cuda,
}

/// What it will be.
#[derive(Debug)]
pub struct Chosen {
    /// Computes.
    pub engine: Box<dyn Engine>,
    /// Why the CPU was taken where a GPU would have been welcome.
    pub fallback: Option<String>,
}

/// Finds what was asked for.
pub fn choose(device: Device) -> Result<Chosen, ForwardError> {
    let cpu = |fallback| Chosen { engine: Box::new(Cpu), fallback };
    match device {
        Device::Cpu => Ok(cpu(None)),
        Device::Auto => {
            Ok(gpu().map_or_else(|why| cpu(Some(why)), |engine| Chosen { engine, fallback: None }))
        }
        Device::Cuda => gpu()
            .map(|engine| Chosen { engine, fallback: None })
            .map_err(|why| ForwardError::NoDevice { why }),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> Result<Box<dyn Engine>, String> {
    match crate::cuda::CudaEngine::new() {
        Ok(engine) => Ok(Box::new(engine)),
        Err(why) => Err(why.to_string()),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Result<Box<dyn Engine>, String> {
    Err("no CUDA here: this program was built without it".into())
}
