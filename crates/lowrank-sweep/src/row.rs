//! One point of a sweep. Flat, so that a table program opens it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// What a point is known by: its content, so that a sweep that is changed and run again finds what it has done.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PointId(String);

/// Hexadecimal digits of an id: enough for millions of points.
const ID_DIGITS: usize = 12;

impl PointId {
    /// Of everything that decides what comes of the point.
    pub fn of(content: &Value) -> Self {
        Self(blake3::hash(content.to_string().as_bytes()).to_hex()[..ID_DIGITS].to_owned())
    }

    /// As a file is named by it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far a point has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Ranks were chosen.
    Planned,
    /// It was compressed, and measured on a text.
    Verified,
    /// See its error.
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

/// A point and what is known of it. What is absent was not done, or did not succeed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number in the config, from 1; 0 if the config no longer has it.
    pub point: usize,
    /// By content.
    pub id: PointId,
    /// How far it has come.
    pub status: Status,
    /// One line, if it failed.
    pub error: Option<String>,
    /// What the config says of it, under the names of flags.
    pub settings: Map<String, Value>,
    /// Parameters that are left.
    pub params: Option<u64>,
    /// Parameters that went.
    pub removed_params: Option<u64>,
    /// Bytes of weights that are left.
    pub bytes: Option<u64>,
    /// Expert matrices that were factored.
    pub factored: Option<usize>,
    /// Expert matrices that stay dense.
    pub dense: Option<usize>,
    /// In what the predicted error is counted. Only points that share this can be compared by it.
    pub scale: Option<String>,
    /// Σ s·‖W − Ŵ‖² over the matrices.
    pub predicted_error: Option<f64>,
    /// No plan of this size can be below.
    pub lower_bound: Option<f64>,
    /// (predicted error − lower bound) / lower bound.
    pub duality_gap: Option<f64>,
    /// Whether no point of the same scale beats it, by size and predicted error ([`mod@crate::front`]).
    pub on_front: bool,
    /// Mean KL(original ‖ compressed), nats per token.
    pub mean_kl: Option<f64>,
    /// Its standard error.
    pub mean_kl_error: Option<f64>,
    /// Of the original.
    pub perplexity_original: Option<f64>,
    /// Of the compressed.
    pub perplexity: Option<f64>,
    /// Compressed over original.
    pub perplexity_ratio: Option<f64>,
    /// Its standard error.
    pub perplexity_ratio_error: Option<f64>,
    /// Share of positions where both rank the same token first.
    pub top1_agreement: Option<f64>,
    /// Its standard error.
    pub top1_error: Option<f64>,
    /// Wall time of choosing the ranks; points that share the costly part share its time.
    pub plan_seconds: Option<f64>,
    /// Wall time of compressing; absent if it was finished before a kill.
    pub compress_seconds: Option<f64>,
    /// Wall time of verifying.
    pub verify_seconds: Option<f64>,
}

impl Row {
    /// A point of which nothing is known yet.
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

    /// The same point, failed.
    #[must_use]
    pub fn failed(self, error: String) -> Self {
        Self { status: Status::Failed, error: Some(error), ..self }
    }
}
