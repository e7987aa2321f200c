//! Every way a forward pass can fail.

use lowrank_model::ErrorKind;
use lowrank_reader::ReadError;

/// Why the model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The weights could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A token that has no embedding.
    #[error(
        "token {token} at position {position} of sequence {sequence} is outside the vocabulary of {vocab_size}; were the tokens made by another model's tokenizer?"
    )]
    TokenOutsideVocabulary {
        /// Which sequence.
        sequence: usize,
        /// Where in it.
        position: usize,
        /// The token.
        token: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A sequence without tokens.
    #[error("sequence {sequence} has no tokens")]
    EmptySequence {
        /// Which sequence.
        sequence: usize,
    },
    /// A device was asked for and there is none.
    #[error("{why}")]
    NoDevice {
        /// Why not.
        why: String,
    },
    /// A device failed in the middle.
    #[error("{message}")]
    Device {
        /// What it said.
        message: String,
    },
}

impl ForwardError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(error) => error.kind(),
            Self::TokenOutsideVocabulary { .. } | Self::EmptySequence { .. } | Self::NoDevice { .. } => {
                ErrorKind::Usage
            }
            Self::Device { .. } => ErrorKind::DeviceFailed,
        }
    }
}
