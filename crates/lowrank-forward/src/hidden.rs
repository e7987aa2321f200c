//! The residual stream of all sequences, one after another.

/// h [N, H], row-major; sequence s occupies the rows `offsets[s]..offsets[s + 1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Hidden {
    pub(crate) states: Vec<f32>,
    pub(crate) offsets: Vec<usize>,
    pub(crate) hidden_size: usize,
}

impl Hidden {
    /// States of sequences of these lengths, one after another.
    ///
    /// # Panics
    /// If there are not as many states as the lengths add up to.
    pub fn new(states: Vec<f32>, lengths: &[usize], hidden_size: usize) -> Self {
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        assert_eq!(states.len(), offsets[lengths.len()] * hidden_size);
        Self { states, offsets, hidden_size }
    }

    /// N, tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.states.len() / self.hidden_size
    }

    /// S, sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// h [N, H] of all sequences.
    pub fn states(&self) -> &[f32] {
        &self.states
    }

    /// h [T, H] of one sequence.
    pub fn sequence(&self, sequence: usize) -> &[f32] {
        &self.states[self.offsets[sequence] * self.hidden_size..self.offsets[sequence + 1] * self.hidden_size]
    }

    /// T of the longest sequence.
    pub fn longest(&self) -> usize {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    /// h [T, H] of every sequence, each to be changed by its own task.
    pub(crate) fn sequences_mut(&mut self) -> Vec<&mut [f32]> {
        let mut rest = self.states.as_mut_slice();
        let mut parts = Vec::with_capacity(self.offsets.len() - 1);
        for pair in self.offsets.windows(2) {
            let (part, tail) = rest.split_at_mut((pair[1] - pair[0]) * self.hidden_size);
            parts.push(part);
            rest = tail;
        }
        parts
    }
}
