//! Why there is no calibration.

use lowrank_cache::CacheError;
use lowrank_forward::ForwardError;
use lowrank_model::{ErrorKind, MatrixId, SHARED_EXPERT};
use lowrank_reader::ReadError;
use lowrank_svd::SvdError;
use lowrank_text::TextError;

/// A calibration that ended early.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The checkpoint.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The text.
    #[error("calibration text")]
    Text(#[from] TextError),
    /// The pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// One matrix' decomposition.
    #[error("{name}")]
    Svd {
        /// Which matrix.
        name: MatrixId,
        /// What went wrong.
        source: SvdError,
    },
    /// What flows through an expert is not finite.
    #[error("layer {layer}, {}: the calibration text gives NaN or infinite activations", shown(*expert))]
    NotFinite {
        /// Decoder layer.
        layer: usize,
        /// Expert of that layer.
        expert: usize,
    },
    /// The logits are not finite, so nothing can be said about sensitivities.
    #[error("the logits are NaN or infinite on the calibration text{}", .spoilt.map_or(String::new(), |Spoilt { layer, half }| format!(" with {half} of layer {layer} at half size")))]
    LogitsNotFinite {
        /// Of the model itself, or with a part of it approximated.
        spoilt: Option<Spoilt>,
    },
    /// Moments that should be in the cache are not.
    #[error(
        "layer {layer}, {}: its moments disappeared from the cache; run the same command again",
        shown(*expert)
    )]
    Absent {
        /// Decoder layer.
        layer: usize,
        /// Expert of that layer.
        expert: usize,
    },
    /// Hidden states that should be in the cache are not.
    #[error(
        "layer {layer}, part {part} of the text: its hidden states are not in the cache; run that part again"
    )]
    NoStates {
        /// Decoder layer.
        layer: usize,
        /// Of the text.
        part: usize,
    },
    /// A piece of a measurement that should be in the cache is not.
    #[error("`{name}` is not in the cache; measure that piece again")]
    NoPiece {
        /// Its file.
        name: String,
    },
    /// Asked to stop.
    #[error("stopped")]
    Stopped,
}

/// A part of a model at half its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spoilt {
    /// Decoder layer.
    pub layer: usize,
    /// Which projection of its experts, or their width.
    pub half: &'static str,
}

/// An expert as messages name it.
fn shown(expert: usize) -> String {
    if expert == SHARED_EXPERT { "shared expert".to_owned() } else { format!("expert {expert}") }
}

impl CalibrateError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(error) => error.kind(),
            Self::Text(error) => error.kind(),
            Self::Forward(error) => error.kind(),
            Self::Cache(error) => error.kind(),
            Self::Svd { source, .. } => source.kind(),
            Self::NotFinite { .. } | Self::LogitsNotFinite { .. } => ErrorKind::BadNumbers,
            Self::Absent { .. } | Self::NoStates { .. } | Self::NoPiece { .. } => ErrorKind::InputOutput,
            Self::Stopped => ErrorKind::Interrupted,
        }
    }
}
