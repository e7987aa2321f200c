//! One point of a sweep (one combination of settings). The row is flat, so that spreadsheets and pandas can read it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// Identifies a point by its settings, so that a changed sweep recognises the points that it has already run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PointId(String);

/// Hexadecimal digits of an id: enough for millions of points.
const ID_DIGITS: usize = 12;

impl PointId {
    /// The id of everything that decides the point's result.
    pub fn of(content: &Value) -> Self {
        Self(blake3::hash(content.to_string().as_bytes()).to_hex()[..ID_DIGITS].to_owned())
    }

    /// As text, for file names.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// State of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Ranks were chosen.
    Planned,
    /// It was compressed, and verified on a text.
    Verified,
    /// It failed; the row has the error.
    Failed,
}

impl Status {
    /// The spelling in the files.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Verified => "verified",
            Self::Failed => "failed",
        }
    }
}

/// A point and its results. A field is absent if its step was not run, or failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number in the config, from 1; 0 if the config no longer has it.
    pub point: usize,
    /// Hash of the settings.
    pub id: PointId,
    /// State of the point.
    pub status: Status,
    /// One line, if the point failed.
    pub error: Option<String>,
    /// Its settings in the config, under the names of flags.
    pub settings: Map<String, Value>,
    /// Parameters after compression.
    pub params: Option<u64>,
    /// Parameters that were removed.
    pub removed_params: Option<u64>,
    /// Bytes of weights after compression.
    pub bytes: Option<u64>,
    /// Expert matrices that were factored.
    pub factored: Option<usize>,
    /// Expert matrices that stay dense.
    pub dense: Option<usize>,
    /// What the predicted error is counted in. Predicted errors can be compared only between points with the same scale.
    pub scale: Option<String>,
    /// Σ s·‖W − Ŵ‖² over the matrices.
    pub predicted_error: Option<f64>,
    /// No plan of this size can have a smaller predicted error.
    pub lower_bound: Option<f64>,
    /// (predicted error − lower bound) / lower bound.
    pub duality_gap: Option<f64>,
    /// Whether it is on the Pareto front of size and predicted error of its scale ([`mod@crate::front`]).
    pub on_front: bool,
    /// Mean KL(original ‖ compressed), nats per token.
    pub mean_kl: Option<f64>,
    /// Its standard error.
    pub mean_kl_error: Option<f64>,
    /// Perplexity of the original.
    pub perplexity_original: Option<f64>,
    /// Perplexity of the compressed model.
    pub perplexity: Option<f64>,
    /// Perplexity of the compressed model divided by that of the original.
    pub perplexity_ratio: Option<f64>,
    /// Its standard error.
    pub perplexity_ratio_error: Option<f64>,
    /// Share of positions where both rank the same token first.
    pub top1_agreement: Option<f64>,
    /// Its standard error.
    pub top1_error: Option<f64>,
    /// Wall time of planning. Points that share the expensive part share its time.
    pub plan_seconds: Option<f64>,
    /// Wall time of compressing; absent if a killed run had already finished it.
    pub compress_seconds: Option<f64>,
    /// Wall time of verifying.
    pub verify_seconds: Option<f64>,
}

impl Row {
    /// A point without results.
    pub fn new(point: usize, id: PointId, settings: Map<String, Value>) -> Self {
        Self {
            point,
            id,
            status: Status::Planned,
            error: None,
            settings,
            params: None,
            removed_params: None,
            bytes: None,
            factored: None,
            dense: None,
            scale: None,
            predicted_error: None,
            lower_bound: None,
            duality_gap: None,
            on_front: false,
            mean_kl: None,
            mean_kl_error: None,
            perplexity_original: None,
            perplexity: None,
            perplexity_ratio: None,
            perplexity_ratio_error: None,
            top1_agreement: None,
            top1_error: None,
            plan_seconds: None,
            compress_seconds: None,
            verify_seconds: None,
        }
    }

    /// The same point, marked as failed.
    #[must_use]
    pub fn failed(self, error: String) -> Self {
        Self { status: Status::Failed, error: Some(error), ..self }
    }
}
