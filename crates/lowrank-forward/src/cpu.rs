//! The CPU as an engine: hands each block to the file that holds it.

use crate::attention::AttentionWeights;
use crate::engine::{
    Engine, ExpertSum, Project, StoredAttention, StoredExpert, StoredGrouped, StoredLatent, StoredQuery,
    StoredRouter,
};
use crate::error::ForwardError;
use crate::head::HeadWeights;
use crate::hidden::Hidden;
use crate::latent::{LatentWeights, QueryWeights};
use crate::linear::{Linear, Matrix};
use crate::moe::{ExpertWeights, Scratch};
use crate::norm::ResidualNorm;
use crate::observer::Observer;
use crate::product::tokens_times_weight;
use crate::rope::Rope;
use crate::router::Routing;
use lowrank_model::{ModelConfig, StoredMatrix, Tensor};

/// Computes in f32 on the threads of the current rayon pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Engine for Cpu {
    fn describe(&self) -> String {
        "CPU, f32".into()
    }

    fn attention(
        &self,
        config: &ModelConfig,
        weights: StoredAttention,
        hidden: &mut Hidden,
    ) -> Result<(), ForwardError> {
        let rope = Rope::new(config, hidden.longest());
        match weights {
            StoredAttention::Grouped(weights) => grouped(*weights).run(config, &rope, hidden),
            StoredAttention::Latent(weights) => {
                let shape = weights.shape;
                latent(*weights).run(config, shape, &rope, hidden);
            }
        }
        Ok(())
    }

    fn norm(&self, states: &[f32], norm: &ResidualNorm) -> Result<Vec<f32>, ForwardError> {
        Ok(norm.apply_to_all(states))
    }

    fn route(&self, input: &[f32], router: &StoredRouter) -> Result<Routing, ForwardError> {
        let gate = Matrix::widened(&router.weights); // [E, H]
        let mut logits = vec![0.0; input.len() / gate.cols * gate.rows]; // [N, E]
        tokens_times_weight(&mut logits, input, &gate.values, gate.cols, gate.rows);
        Ok(router.choose(logits))
    }

    fn moe<'a>(
        &'a self,
        inputs: &[&'a [f32]],
        router: &StoredRouter,
    ) -> Result<Box<dyn ExpertSum + 'a>, ForwardError> {
        let route = |input: &&[f32]| self.route(input, router);
        Ok(Box::new(CpuExpertSum {
            inputs: inputs.to_vec(),
            routings: inputs.iter().map(route).collect::<Result<_, _>>()?,
            outputs: inputs.iter().map(|input| vec![0.0; input.len()]).collect(),
            scratch: Scratch::default(),
        }))
    }

    fn head(
        &self,
        norm: ResidualNorm,
        output: Tensor,
        bias: Vec<f32>,
    ) -> Result<Box<dyn Project + '_>, ForwardError> {
        Ok(Box::new(HeadWeights { norm, output: Linear::Dense(Matrix::widened(&output)), bias }))
    }
}

/// By value: the bytes of each matrix go as soon as it is widened.
fn wide(stored: Tensor) -> Linear {
    Linear::Dense(Matrix::widened(&stored))
}

fn bias(stored: Option<Tensor>) -> Vec<f32> {
    stored.map_or_else(Vec::new, |bias| bias.to_f32())
}

fn grouped(weights: StoredGrouped) -> AttentionWeights {
    AttentionWeights {
        norm: weights.norm,
        query: wide(weights.query),
        key: wide(weights.key),
        value: wide(weights.value),
        output: wide(weights.output),
        biases: weights.biases.map(bias),
        norms: weights.norms.map_or_else(Default::default, |norms| norms.map(|norm| norm.to_f32())),
    }
}

fn latent(weights: StoredLatent) -> LatentWeights {
    let [query_bias, down_bias, output_bias] = weights.biases.map(bias);
    LatentWeights {
        norm: weights.norm,
        query: match weights.query {
            StoredQuery::Whole(matrix) => QueryWeights::Whole(wide(matrix)),
            StoredQuery::Latent { down, norm, up } => {
                QueryWeights::Latent { down: wide(down), bias: query_bias, norm: norm.to_f32(), up: wide(up) }
            }
        },
        down: wide(weights.down),
        down_bias,
        latent_norm: weights.latent_norm.to_f32(),
        up: wide(weights.up),
        output: wide(weights.output),
        output_bias,
    }
}

struct CpuExpertSum<'a> {
    inputs: Vec<&'a [f32]>,
    routings: Vec<Routing>,
    outputs: Vec<Vec<f32>>,
    scratch: Scratch,
}

impl ExpertSum for CpuExpertSum<'_> {
    fn expert(
        &mut self,
        place: (usize, usize),
        weights: StoredExpert,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let wide = |stored: StoredMatrix| Linear::from(&stored);
        let weights =
            ExpertWeights { gate: wide(weights.gate), down: wide(weights.down), up: wide(weights.up) };
        for ((input, routing), output) in self.inputs.iter().zip(&self.routings).zip(&mut self.outputs) {
            weights.add_to(place, input, routing, output, &mut self.scratch, observer);
        }
        Ok(())
    }

    fn outputs(self: Box<Self>) -> Result<Vec<Vec<f32>>, ForwardError> {
        Ok(self.outputs)
    }
}
