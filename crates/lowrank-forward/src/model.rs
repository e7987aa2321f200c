//! The pass itself: embed, then layer by layer, then logits. Weights are read when they are needed and dropped after.

use crate::attention::AttentionWeights;
use crate::error::ForwardError;
use crate::head::Head;
use crate::hidden::Hidden;
use crate::linear::{Linear, Matrix};
use crate::math::{add_scaled, rms_norm};
use crate::moe::{ExpertWeights, Scratch};
use crate::observer::{MoeBlock, Observer};
use crate::product::{TILE_TOKENS, tokens_times_weight};
use crate::rope::Rope;
use crate::router::Routing;
use lowrank_model::{MatrixId, ModelConfig, Projection, Tensor, names};
use lowrank_reader::Checkpoint;
use rayon::prelude::*;

/// A checkpoint that can be run. Holds no weights.
#[derive(Debug)]
pub struct Forward<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
}

impl<'a> Forward<'a> {
    /// Takes an opened checkpoint, dense or factored.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, config: checkpoint.config() }
    }

    /// Dimensions of the model.
    pub fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// Rows of the embedding: S sequences of tokens → h [N, H].
    pub fn embed<T: AsRef<[u32]>>(&self, sequences: &[T]) -> Result<Hidden, ForwardError> {
        let (v, h) = (self.config.vocab_size, self.config.hidden_size);
        let table = self.tensor(names::EMBEDDING)?; // [V, H]
        let mut offsets = vec![0];
        let mut states = Vec::new();
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
        let weights = AttentionWeights {
            norm: self.layer_tensor(layer, "input_layernorm")?.to_f32(),
            query: self.dense(layer, "self_attn.q_proj")?,
            key: self.dense(layer, "self_attn.k_proj")?,
            value: self.dense(layer, "self_attn.v_proj")?,
            output: self.dense(layer, "self_attn.o_proj")?,
        };
        let rope = Rope::new(self.config.rope_theta, self.config.head_dim, hidden.longest());
        weights.run(self.config, &rope, hidden);
        Ok(())
    }

    /// What the mixture of a layer is fed: norm(h) [N, H].
    pub fn moe_input(&self, layer: usize, hidden: &Hidden) -> Result<Vec<f32>, ForwardError> {
        let norm = self.layer_tensor(layer, "post_attention_layernorm")?.to_f32();
        let (h, epsilon) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let mut input = vec![0.0; hidden.states.len()];
        input
            .par_chunks_exact_mut(h)
            .with_min_len(TILE_TOKENS)
            .zip(hidden.states.par_chunks_exact(h))
            .for_each(|(x, state)| rms_norm(x, state, &norm, epsilon));
        Ok(input)
    }

    /// The mixture of a layer for several inputs [N, H], reading each expert once; → as many outputs [N, H].
    /// The observer sees the experts' batches of every input.
    pub fn moe(
        &self,
        layer: usize,
        inputs: &[&[f32]],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>, ForwardError> {
        let routings = inputs.iter().map(|input| self.route(layer, input)).collect::<Result<Vec<_>, _>>()?;
        let mut outputs: Vec<Vec<f32>> = inputs.iter().map(|input| vec![0.0; input.len()]).collect();
        let mut scratch = Scratch::default();
        for expert in 0..self.config.num_local_experts {
            let weights = self.expert(layer, expert)?;
            for ((input, routing), output) in inputs.iter().zip(&routings).zip(&mut outputs) {
                weights.add_to((layer, expert), input, routing, output, &mut scratch, observer);
            }
        }
        Ok(outputs)
    }

    /// Which experts the tokens of an input [N, H] visit.
    pub fn route(&self, layer: usize, input: &[f32]) -> Result<Routing, ForwardError> {
        let gate = self.tensor(&names::router(layer))?.to_f32(); // [E, H]
        let (e, h) = (self.config.num_local_experts, self.config.hidden_size);
        let mut logits = vec![0.0; input.len() / h * e]; // [N, E]
        tokens_times_weight(&mut logits, input, &gate, h, e);
        Ok(Routing::new(logits, e, self.config.num_experts_per_tok))
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

    /// Final norm and output matrix.
    pub fn head(&self) -> Result<Head, ForwardError> {
        let output = if self.config.tie_word_embeddings { names::EMBEDDING } else { names::HEAD };
        Ok(Head {
            norm: self.tensor(names::FINAL_NORM)?.to_f32(),
            output: Linear::Dense(Matrix::widened(&self.tensor(output)?)),
            epsilon: self.config.rms_norm_eps as f32,
        })
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

    fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights, ForwardError> {
        let read = |projection| -> Result<Linear, ForwardError> {
            Ok(Linear::from(&self.checkpoint.read_matrix(MatrixId { layer, expert, projection })?))
        };
        Ok(ExpertWeights { w1: read(Projection::W1)?, w2: read(Projection::W2)?, w3: read(Projection::W3)? })
    }

    fn dense(&self, layer: usize, module: &str) -> Result<Linear, ForwardError> {
        Ok(Linear::Dense(Matrix::widened(&self.layer_tensor(layer, module)?)))
    }

    fn layer_tensor(&self, layer: usize, module: &str) -> Result<Tensor, ForwardError> {
        self.tensor(&names::layer_tensor(layer, module))
    }

    fn tensor(&self, name: &str) -> Result<Tensor, ForwardError> {
        let spec = self.checkpoint.specs().iter().find(|spec| spec.name == name);
        let spec = spec.ok_or_else(|| ForwardError::MissingTensor { tensor: name.into() })?;
        Ok(self.checkpoint.read_tensor(spec)?)
    }
}
