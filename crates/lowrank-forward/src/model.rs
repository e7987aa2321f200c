//! The pass itself: embedding, then layer by layer, then logits. It reads weights when it needs them and drops them after.

use crate::cpu::Cpu;
use crate::engine::{
    Engine, StoredAttention, StoredExpert, StoredGrouped, StoredLatent, StoredQuery, StoredRouter,
};
use crate::error::ForwardError;
use crate::head::Head;
use crate::hidden::Hidden;
use crate::math::{add_scaled, dot, sigmoid};
use crate::norm::ResidualNorm;
use crate::observer::{ExpertBatch, MoeBlock, Observer};
use crate::product::TILE_TOKENS;
use crate::router::Routing;
use lowrank_model::block::{Activation, Attention, LatentAttention, QueryKeyNorm, Router, SharedExperts};
use lowrank_model::names::{AttentionPart, NormPlace, Role};
use lowrank_model::{Dtype, MatrixId, ModelConfig, Projection, SHARED_EXPERT, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;
use rayon::prelude::*;

/// A checkpoint that can be run. Holds no weights.
#[derive(Debug)]
pub struct Forward<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    engine: &'a dyn Engine,
}

impl<'a> Forward<'a> {
    /// Takes an opened checkpoint, dense or factored, to be run on the CPU.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self::on(checkpoint, &Cpu)
    }

    /// Takes an opened checkpoint, dense or factored, to be run on an engine.
    pub fn on(checkpoint: &'a Checkpoint, engine: &'a dyn Engine) -> Self {
        Self { checkpoint, config: checkpoint.config(), engine }
    }

    /// What it reads.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Dimensions of the model.
    pub fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// Rows of the embedding: S sequences of tokens → h [N, H].
    pub fn embed<T: AsRef<[u32]>>(&self, sequences: &[T]) -> Result<Hidden, ForwardError> {
        let (v, h) = (self.config.vocab_size, self.config.hidden_size);
        let table = self.tensor(Role::Embedding)?; // [V, H]
        let mut offsets = vec![0];
        let tokens: usize = sequences.iter().map(|tokens| tokens.as_ref().len()).sum();
        let mut states = Vec::with_capacity(tokens * h);
        for (sequence, tokens) in sequences.iter().enumerate() {
            let tokens = tokens.as_ref();
            if tokens.is_empty() {
                return Err(ForwardError::EmptySequence { sequence });
            }
            for (position, &token) in tokens.iter().enumerate() {
                if token as usize >= v {
                    return Err(ForwardError::TokenOutsideVocabulary {
                        sequence,
                        position,
                        token,
                        vocab_size: v,
                    });
                }
                let at = states.len();
                states.resize(at + h, 0.0);
                table.widen(token as usize * h, &mut states[at..]);
            }
            offsets.push(states.len() / h);
        }
        Ok(Hidden { states, offsets, hidden_size: h })
    }

    /// One decoder layer for all sequences, in place.
    pub fn layer(
        &self,
        layer: usize,
        hidden: &mut Hidden,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        self.attention(layer, hidden)?;
        let input = self.moe_input(layer, hidden)?;
        let output = self.moe(layer, &[&input], observer)?.remove(0);
        observer.block(&MoeBlock { layer, input: &input, output: &output });
        self.add(hidden, &output);
        Ok(())
    }

    /// First half of a layer: h += attention(norm(h)).
    pub fn attention(&self, layer: usize, hidden: &mut Hidden) -> Result<(), ForwardError> {
        let weights = match self.config.block.attention {
            Attention::Grouped => StoredAttention::Grouped(Box::new(self.grouped_attention(layer)?)),
            Attention::Latent(shape) => {
                StoredAttention::Latent(Box::new(self.latent_attention(layer, shape)?))
            }
        };
        self.engine.attention(self.config, weights, hidden)
    }

    fn attention_bias(&self, layer: usize, part: AttentionPart) -> Result<Option<Tensor>, ForwardError> {
        let there = self.config.block.attention_bias.has(part);
        there.then(|| self.tensor(Role::AttentionBias { layer, part })).transpose()
    }

    fn latent_attention(&self, layer: usize, shape: LatentAttention) -> Result<StoredLatent, ForwardError> {
        let part = |part| self.tensor(Role::Attention { layer, part });
        let bias = |part| self.attention_bias(layer, part);
        Ok(StoredLatent {
            shape,
            norm: self.residual_norm(NormPlace::Attention { layer })?,
            query: match shape.query_rank {
                None => StoredQuery::Whole(part(AttentionPart::Query)?),
                Some(_) => StoredQuery::Latent {
                    down: part(AttentionPart::QueryDown)?,
                    norm: self.tensor(Role::Norm(NormPlace::QueryLatent { layer }))?,
                    up: part(AttentionPart::QueryUp)?,
                },
            },
            down: part(AttentionPart::LatentDown)?,
            latent_norm: self.tensor(Role::Norm(NormPlace::Latent { layer }))?,
            up: part(AttentionPart::LatentUp)?,
            output: part(AttentionPart::Output)?,
            biases: [
                shape.query_rank.map_or(Ok(None), |_| bias(AttentionPart::QueryDown))?,
                bias(AttentionPart::LatentDown)?,
                bias(AttentionPart::Output)?,
            ],
        })
    }

    fn grouped_attention(&self, layer: usize) -> Result<StoredGrouped, ForwardError> {
        let block = self.config.block;
        let part = |part| self.tensor(Role::Attention { layer, part });
        let norms = match block.query_key_norm {
            QueryKeyNorm::None => None,
            QueryKeyNorm::PerHead | QueryKeyNorm::AllHeads => Some([
                self.tensor(Role::Norm(NormPlace::Query { layer }))?,
                self.tensor(Role::Norm(NormPlace::Key { layer }))?,
            ]),
        };
        let mut biases = [const { None }; 4];
        for (bias, part) in biases.iter_mut().zip(AttentionPart::GROUPED) {
            *bias = self.attention_bias(layer, part)?;
        }
        Ok(StoredGrouped {
            norm: self.residual_norm(NormPlace::Attention { layer })?,
            query: part(AttentionPart::Query)?,
            key: part(AttentionPart::Key)?,
            value: part(AttentionPart::Value)?,
            output: part(AttentionPart::Output)?,
            biases,
            norms,
        })
    }

    /// The input of a layer's MoE block: norm(h) [N, H].
    pub fn moe_input(&self, layer: usize, hidden: &Hidden) -> Result<Vec<f32>, ForwardError> {
        self.moe_input_of(layer, &hidden.states)
    }

    /// As [`Forward::moe_input`], for rows [n, H] of some tokens.
    pub fn moe_input_of(&self, layer: usize, rows: &[f32]) -> Result<Vec<f32>, ForwardError> {
        self.engine.norm(rows, &self.residual_norm(NormPlace::Experts { layer })?)
    }

    /// The MoE block of a layer for several inputs [N, H], reading each expert once; → as many outputs [N, H]. In a layer
    /// without experts, the one block that it has.
    /// The observer sees the experts' batches of every input.
    pub fn moe(
        &self,
        layer: usize,
        inputs: &[&[f32]],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>, ForwardError> {
        self.moe_of(layer, inputs, observer, |expert| self.expert(layer, expert))
    }

    /// As [`Forward::moe`], with experts from elsewhere: to try a layer with other matrices.
    pub fn moe_of<E: From<ForwardError>>(
        &self,
        layer: usize,
        inputs: &[&[f32]],
        observer: &mut dyn Observer,
        mut expert_of: impl FnMut(usize) -> Result<StoredExpert, E>,
    ) -> Result<Vec<Vec<f32>>, E> {
        let Activation::Silu = self.config.block.activation;
        if self.config.experts_in(layer) == 0 {
            let run = |input: &&[f32]| self.expert_on(layer, self.dense_block(layer)?, input, &mut ());
            return Ok(inputs.iter().map(run).collect::<Result<_, _>>()?);
        }
        let mut sum = self.engine.moe(inputs, &self.router(layer)?)?;
        for expert in 0..self.config.num_local_experts {
            sum.expert((layer, expert), expert_of(expert)?, observer)?;
        }
        let mut outputs = sum.outputs()?;
        if self.config.compresses_shared_experts {
            self.add_shared_to(layer, inputs, &mut outputs, expert_of(SHARED_EXPERT)?, observer)?;
        } else if self.config.block.shared_experts != SharedExperts::None {
            self.add_shared_to(layer, inputs, &mut outputs, self.expert(layer, SHARED_EXPERT)?, &mut ())?;
        }
        Ok(outputs)
    }

    /// Runs one expert on the tokens of an input [N, H] that the router sends to it, or all for a shared one, for what an observer
    /// sees of it.
    pub fn watch_expert(
        &self,
        (layer, expert): (usize, usize),
        input: &[f32],
        weights: StoredExpert,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let Activation::Silu = self.config.block.activation;
        if expert == SHARED_EXPERT {
            let mut observer = AsShared { weights: &self.shared_weights(layer, input)?, observer };
            return self.expert_on(layer, weights, input, &mut observer).map(drop);
        }
        let mut sum = self.engine.moe(&[input], &self.router(layer)?)?;
        sum.expert((layer, expert), weights, observer)
    }

    /// Adds the output of a layer's shared expert, if it has one that is not compressed, to the sum [N, H] of the others'.
    pub fn add_kept_shared(
        &self,
        layer: usize,
        hidden: &Hidden,
        output: &mut [f32],
    ) -> Result<(), ForwardError> {
        if self.config.block.shared_experts == SharedExperts::None || self.config.compresses_shared_experts {
            return Ok(());
        }
        let input = self.moe_input(layer, hidden)?;
        self.add_shared_to(layer, &[&input], &mut [output], self.expert(layer, SHARED_EXPERT)?, &mut ())
    }

    /// The block of a layer without experts.
    fn dense_block(&self, layer: usize) -> Result<StoredExpert, ForwardError> {
        let read = |projection| {
            let spec = self.config.tensor(Role::DenseBlock { layer, projection });
            Ok::<_, ForwardError>(StoredMatrix::Dense(self.checkpoint.read_tensor(&spec)?))
        };
        Ok(StoredExpert {
            gate: read(Projection::Gate)?,
            down: read(Projection::Down)?,
            up: read(Projection::Up)?,
        })
    }

    /// output += g · expert(x) for every row x of each input [N, H], g the weights of the shared expert.
    fn add_shared_to(
        &self,
        layer: usize,
        inputs: &[&[f32]],
        outputs: &mut [impl AsMut<[f32]>],
        expert: StoredExpert,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let h = self.config.hidden_size;
        for (input, output) in inputs.iter().zip(outputs) {
            let weights = self.shared_weights(layer, input)?;
            let mut observer = AsShared { weights: &weights, observer };
            let y = self.expert_on(layer, expert.clone(), input, &mut observer)?; // [N, H]
            let rows = output.as_mut().par_chunks_exact_mut(h).zip(y.par_chunks_exact(h));
            rows.zip(&weights)
                .with_min_len(TILE_TOKENS)
                .for_each(|((output, y), &weight)| add_scaled(output, weight, y));
        }
        Ok(())
    }

    /// What the output of a layer's shared expert is multiplied by, for every row x of an input [N, H]: σ(g·x) with a gate, else 1.
    pub fn shared_weights(&self, layer: usize, input: &[f32]) -> Result<Vec<f32>, ForwardError> {
        let h = self.config.hidden_size;
        if !self.config.block.shared_experts.has_gate() {
            return Ok(vec![1.0; input.len() / h]);
        }
        let gate = self.tensor(Role::SharedExpertGate { layer })?.to_f32(); // [H]
        let rows = input.par_chunks_exact(h).with_min_len(TILE_TOKENS);
        Ok(rows.map(|x| sigmoid(dot(&gate, x))).collect())
    }

    /// y = w2 (silu(w1 x) ∘ w3 x) for every row x of `rows` [n, H], whichever expert a router would choose; → [n, H].
    /// To the observer it is expert 0 of its layer, of router weight 1.
    pub fn expert_on(
        &self,
        layer: usize,
        weights: StoredExpert,
        rows: &[f32],
        observer: &mut dyn Observer,
    ) -> Result<Vec<f32>, ForwardError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let h = self.config.hidden_size;
        let weights_of_one = Tensor::from_f32(vec![1, h], Dtype::F32, &vec![0.0; h]);
        let router = StoredRouter {
            weights: weights_of_one.expect("one row of h numbers"),
            bias: None,
            rule: Router::softmax(true),
            experts_per_token: 1,
        };
        let mut sum = self.engine.moe(&[rows], &router)?;
        sum.expert((layer, 0), weights, observer)?;
        Ok(sum.outputs()?.remove(0))
    }

    /// The experts that the router chooses for every token of an input [N, H].
    /// None in a layer without experts.
    pub fn route(&self, layer: usize, input: &[f32]) -> Result<Routing, ForwardError> {
        if self.config.experts_in(layer) == 0 {
            return Ok(Routing::default());
        }
        self.engine.route(input, &self.router(layer)?)
    }

    /// Second half of a layer: h += output [N, H].
    pub fn add(&self, hidden: &mut Hidden, output: &[f32]) {
        let run = TILE_TOKENS * self.config.hidden_size;
        hidden
            .states
            .par_chunks_mut(run)
            .zip(output.par_chunks(run))
            .for_each(|(state, output)| add_scaled(state, 1.0, output));
    }

    /// A norm of the residual stream.
    fn residual_norm(&self, place: NormPlace) -> Result<ResidualNorm, ForwardError> {
        let kind = self.config.block.norm;
        let bias = kind.has_bias().then(|| self.tensor(Role::NormBias(place))).transpose()?;
        Ok(ResidualNorm {
            kind,
            weight: self.tensor(Role::Norm(place))?.to_f32(),
            bias: bias.map_or_else(Vec::new, |bias| bias.to_f32()),
            epsilon: self.config.rms_norm_eps as f32,
        })
    }

    /// Final norm and output matrix.
    pub fn head(&self) -> Result<Head<'a>, ForwardError> {
        let output = if self.config.tie_word_embeddings { Role::Embedding } else { Role::Head };
        let bias = self.config.head_bias.then(|| self.tensor(Role::HeadBias)).transpose()?;
        let bias = bias.map_or_else(Vec::new, |bias| bias.to_f32());
        let project = self.engine.head(self.residual_norm(NormPlace::Head)?, self.tensor(output)?, bias)?;
        Ok(Head { project, vocab_size: self.config.vocab_size })
    }

    /// All layers: tokens → the last hidden states.
    pub fn run<T: AsRef<[u32]>>(
        &self,
        sequences: &[T],
        observer: &mut dyn Observer,
    ) -> Result<Hidden, ForwardError> {
        let mut hidden = self.embed(sequences)?;
        for layer in 0..self.config.num_hidden_layers {
            self.layer(layer, &mut hidden, observer)?;
        }
        Ok(hidden)
    }

    /// The matrices of one expert, routed or shared, as they are stored.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<StoredExpert, ForwardError> {
        let read = |projection| self.checkpoint.read_matrix(MatrixId { layer, expert, projection });
        Ok(StoredExpert {
            gate: read(Projection::Gate)?,
            down: read(Projection::Down)?,
            up: read(Projection::Up)?,
        })
    }

    fn router(&self, layer: usize) -> Result<StoredRouter, ForwardError> {
        let weights = self.tensor(Role::Router { layer })?; // [E, H]
        let (rule, experts_per_token) = (self.config.block.router, self.config.num_experts_per_tok);
        let bias = rule.has_bias().then(|| self.tensor(Role::RouterBias { layer })).transpose()?; // [E]
        Ok(StoredRouter { weights, bias, rule, experts_per_token })
    }

    fn tensor(&self, role: Role) -> Result<Tensor, ForwardError> {
        Ok(self.checkpoint.read_tensor(&self.config.tensor(role))?)
    }
}

/// Shows an observer the tokens of a shared expert, with what its outputs are multiplied by, `[N]`.
struct AsShared<'a> {
    weights: &'a [f32],
    observer: &'a mut dyn Observer,
}

impl Observer for AsShared<'_> {
    fn sees_experts(&self) -> bool {
        self.observer.sees_experts()
    }

    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        // Every token is its own, in order.
        let weights = &self.weights[batch.tokens[0]..][..batch.tokens.len()];
        self.observer.expert(&ExpertBatch { expert: SHARED_EXPERT, weights, ..*batch });
    }
}
