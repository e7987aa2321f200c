//! What keeps the verifier from working. A checkpoint that lies is not an error but a finding.

use lowrank_forward::ForwardError;
use lowrank_model::ErrorKind;
use lowrank_reader::ReadError;
use lowrank_text::TextError;
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
    /// The original holds factors: it cannot be what was compressed.
    #[error(
        "{}: the original holds factors, so it is no original; perhaps the two checkpoints were exchanged",
        path.display()
    )]
    FactoredOriginal {
        /// What was given.
        path: PathBuf,
    },
    /// The compressed checkpoint is a plain one: there is nothing to verify.
    #[error(
        "{}: nothing in it is factored, so there is nothing to verify; give the checkpoint that `compress` wrote, not the \
         original or a dense copy",
        path.display()
    )]
    NothingFactored {
        /// What was given.
        path: PathBuf,
    },
    /// There is no folder to verify.
    #[error("{}: there is no such folder", path.display())]
    NoFolder {
        /// What was given.
        path: PathBuf,
    },
    /// There is no usable text.
    #[error(transparent)]
    Text(#[from] TextError),
}

impl VerifyError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(error) => error.kind(),
            Self::Forward(error) => error.kind(),
            Self::NoFolder { .. } => ErrorKind::NoModel,
            Self::FactoredOriginal { .. } | Self::NothingFactored { .. } => ErrorKind::Usage,
            Self::Text(error) => error.kind(),
        }
    }
}
