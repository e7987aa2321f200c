//! How ranks are chosen, and how errors compare.

use crate::Projection;
use serde::{Deserialize, Serialize};

/// How errors of different matrices compare: the weight s of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Sensitivity {
    /// s = 1: ‖W − Ŵ‖²
    Absolute,
    /// s = 1 / ‖W‖²: the share of its own energy that a matrix loses
    #[default]
    Relative,
    /// s = KL at the end of the model per unit of the matrix' calibrated error, measured on the calibration text
    Measured,
}

/// How the budget is spread over matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Allocation {
    /// Ranks where they reduce the error most
    #[default]
    Global,
    /// One rank for all matrices: the baseline
    Uniform,
}

/// What shares one choice of width and ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum RankGroups {
    /// Nothing: each expert has its own width, and each of its matrices its own rank
    #[default]
    Matrix,
    /// All experts of a layer: one width, and one rank for each of gate, down and up, as fused kernels want
    Layer,
}

/// What a plan may cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Structures {
    /// Ranks of matrices
    #[default]
    Rank,
    /// Widths of experts: channels go, and w2 (down) is fitted to those that stay
    Width,
    /// A width for every expert, and ranks of what stays of its matrices
    #[serde(rename = "rank,width")]
    #[cfg_attr(feature = "clap", value(name = "rank,width"))]
    RankWidth,
    /// Ranks of matrices, or in some layers of what distinguishes an expert's matrices from a base that all its experts share
    #[serde(rename = "rank,base")]
    #[cfg_attr(feature = "clap", value(name = "rank,base"))]
    RankBase,
    /// In each layer either widths and ranks, or a shared base and ranks
    #[serde(rename = "rank,width,base")]
    #[cfg_attr(feature = "clap", value(name = "rank,width,base"))]
    RankWidthBase,
}

impl Structures {
    /// Whether matrices may be factored.
    pub const fn has_ranks(self) -> bool {
        !matches!(self, Self::Width)
    }

    /// Whether experts may be narrowed.
    pub const fn has_widths(self) -> bool {
        matches!(self, Self::Width | Self::RankWidth | Self::RankWidthBase)
    }

    /// Whether the experts of a layer may share a base.
    pub const fn has_bases(self) -> bool {
        matches!(self, Self::RankBase | Self::RankWidthBase)
    }

    /// Whether errors are computed from the activations' second moment.
    pub const fn need_activations(self) -> bool {
        self.has_widths() || self.has_bases()
    }
}

/// What errors of one layer's gate, down and up projections, in this order, do to the logits: measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerSensitivity {
    /// KL(original ‖ group at half its size), nats per token.
    pub kl: [f64; 3],
    /// KL per unit of calibrated error.
    pub sensitivity: [f64; 3],
    /// Of its experts' widths, where experts may be narrowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<WidthSensitivity>,
}

/// What errors of the widths of one layer's experts do to the logits: measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WidthSensitivity {
    /// KL(original ‖ all experts of the layer at half their width), nats per token.
    pub kl: f64,
    /// KL per unit of calibrated error.
    pub sensitivity: f64,
}

impl LayerSensitivity {
    /// s of a projection.
    pub fn of(&self, projection: Projection) -> f64 {
        self.sensitivity[projection.index()]
    }

    /// s of a width; where that was not measured, that of down, since both are errors of the experts' outputs.
    pub fn of_width(&self) -> f64 {
        self.width.map_or(self.of(Projection::Down), |width| width.sensitivity)
    }
}
