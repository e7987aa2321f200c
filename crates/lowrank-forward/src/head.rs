//! From the last hidden states to logits, one sequence at a time: [T, V] of one sequence is all that is ever held.

use crate::attention::add_bias;
use crate::engine::Project;
use crate::error::ForwardError;
use crate::hidden::Hidden;
use crate::linear::Linear;
use crate::norm::ResidualNorm;

/// Final norm and output matrix, where they compute.
#[derive(Debug)]
pub struct Head<'a> {
    pub(crate) project: Box<dyn Project + 'a>,
    pub(crate) vocab_size: usize,
}

impl Head<'_> {
    /// logits [T, V] of one sequence.
    pub fn logits(&self, hidden: &Hidden, sequence: usize) -> Result<Vec<f32>, ForwardError> {
        self.project.logits(hidden.sequence(sequence))
    }

    /// V.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// The head on the CPU.
#[derive(Debug)]
pub(crate) struct HeadWeights {
    pub(crate) norm: ResidualNorm,
    pub(crate) output: Linear, // [V, H]; the embedding itself when tied
    pub(crate) bias: Vec<f32>, // [V], or empty
}

impl Project for HeadWeights {
    fn logits(&self, h: &[f32]) -> Result<Vec<f32>, ForwardError> {
        let mut x = vec![0.0; h.len()]; // [T, H]
        self.norm.apply(&mut x, h);
        let mut logits = vec![0.0; h.len() / self.output.inputs() * self.output.outputs()];
        self.output.apply(&x, &mut logits);
        add_bias(&mut logits, &self.bias);
        Ok(logits)
    }
}
