//! Why there is no calibration.

use lowrank_cache::CacheError;
use lowrank_forward::ForwardError;
use lowrank_model::MatrixId;
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
    #[error("calibration text: {0}")]
    Text(#[from] TextError),
    /// The pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// One matrix' decomposition.
    #[error("{name}: {source}")]
    Svd {
        /// Which matrix.
        name: MatrixId,
        /// What went wrong.
        source: SvdError,
    },
    /// What flows through an expert is not finite.
    #[error(
        "layer {layer}, expert {expert}: NaN or infinite activations on the calibration text; --calibrate none does without"
    )]
    NotFinite {
        /// Decoder layer.
        layer: usize,
        /// Expert of that layer.
        expert: usize,
    },
    /// The logits are not finite, so nothing can be said about sensitivities.
    #[error("the logits are NaN or infinite on the calibration text{}; --calibrate none does without", .spoilt.map_or(String::new(), |(layer, projection)| format!(" with {} of layer {layer} at half size", projection.as_str())))]
    LogitsNotFinite {
        /// Of the model itself, or with one (layer, projection) approximated.
        spoilt: Option<(usize, lowrank_model::Projection)>,
    },
    /// Moments that should be in the cache are not.
    #[error(
        "layer {layer}, expert {expert}: its moments went from the cache while they were needed; run again"
    )]
    Absent {
        /// Decoder layer.
        layer: usize,
        /// Expert of that layer.
        expert: usize,
    },
    /// Asked to stop.
    #[error("stopped")]
    Stopped,
}
