//! From the last hidden states to logits, one sequence at a time: [T, V] of one sequence is all that is ever held.

use crate::hidden::Hidden;
use crate::linear::Linear;
use crate::math::rms_norm;

/// Final norm and output matrix.
#[derive(Debug)]
pub struct Head {
    pub(crate) norm: Vec<f32>, // [H]
    pub(crate) output: Linear, // [V, H]; the embedding itself when tied
    pub(crate) epsilon: f32,
}

impl Head {
    /// logits [T, V] of one sequence.
    pub fn logits(&self, hidden: &Hidden, sequence: usize) -> Vec<f32> {
        let h = hidden.sequence(sequence);
        let width = self.norm.len();
        let mut x = vec![0.0; h.len()]; // [T, H]
        for (x, h) in x.chunks_exact_mut(width).zip(h.chunks_exact(width)) {
            rms_norm(x, h, &self.norm, self.epsilon);
        }
        let mut logits = vec![0.0; h.len() / width * self.vocab_size()];
        self.output.apply(&x, &mut logits);
        logits
    }

    /// V.
    pub fn vocab_size(&self) -> usize {
        self.output.outputs()
    }
}
