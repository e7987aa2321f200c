//! What keeps the verifier from working. A checkpoint that lies is not an error but a finding.

use lowrank_forward::ForwardError;
use lowrank_reader::ReadError;
use std::path::PathBuf;

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The original cannot be opened, or a file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The forward pass could not be run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// There is no folder to verify.
    #[error("{}: there is no such folder", path.display())]
    NoFolder {
        /// What was given.
        path: PathBuf,
    },
    /// A text or token file could not be read.
    #[error("{}: {source}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A text file of a kind that is not known.
    #[error("{}: give a .txt, a .jsonl (`text` field), or token ids as .json or .ids", path.display())]
    TextKind {
        /// The file.
        path: PathBuf,
    },
    /// A text or token file that does not hold what its ending says.
    #[error("{}: {what}", path.display())]
    TextContent {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// The tokenizer is absent or unusable.
    #[error("{}: {what}; give token ids (.json, .ids) instead of text", path.display())]
    Tokenizer {
        /// `tokenizer.json`.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Too little text to predict anything.
    #[error("the text has {tokens} tokens; at least 2 are needed to predict one from another")]
    TooShort {
        /// How many there are.
        tokens: usize,
    },
    /// A window in which nothing can be predicted.
    #[error("the window is {window} tokens; at least 2 are needed to predict one from another")]
    Window {
        /// What was asked for.
        window: usize,
    },
}
