//! Why a plan is refused.

use super::size::Size;
use super::version::contents_of;
use crate::{ElementBytes, MatrixId, MatrixShape, Unit};

/// Why a plan cannot be, or does not fit a model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Not the JSON of a plan.
    #[error("{0}")]
    Json(String),
    /// A setting that no plan can have been made with.
    #[error("`{key}` is {value}, expected {expected}")]
    Setting {
        /// Which.
        key: &'static str,
        /// In the plan.
        value: u64,
        /// What can be.
        expected: &'static str,
    },
    /// Element sizes that no dtype has.
    #[error("{name}: `element_bytes` is {} dense and {} factored, expected 2 or 4", .found.dense, .found.factor)]
    ElementBytes {
        /// Which matrix.
        name: MatrixId,
        /// In the plan.
        found: ElementBytes,
    },
    /// Matrices that cannot be a part of the checkpoint.
    #[error("the dense matrices are larger than the whole checkpoint of {} parameters and {} bytes", .before.params, .before.bytes)]
    LargerThanCheckpoint {
        /// The whole checkpoint.
        before: Size,
    },
    /// A predicted error that no matrix can have.
    #[error("{name}: `relative_error` is {value}, expected a number from 0 to 1")]
    RelativeError {
        /// Which matrix.
        name: MatrixId,
        /// In the plan.
        value: String,
    },
    /// Less goes than the plan says that was asked.
    #[error("the plan says that at least {asked} {unit} were to go, and its rows remove {removed}")]
    TargetMissed {
        /// At least this.
        asked: u64,
        /// Recomputed.
        removed: u64,
        /// What is counted.
        unit: Unit,
    },
    /// A version this program does not know, or that is not of such a plan.
    #[error("`plan_version` is {found}, this program knows {known} of a plan {}", contents_of(*known))]
    Version {
        /// In the plan.
        found: u32,
        /// What it would be.
        known: u32,
    },
    /// The rows are not those of the model.
    #[error("{0} is not an expert matrix of this model, or is in the wrong place")]
    UnknownMatrix(String),
    /// A row is missing.
    #[error("{0} has no row")]
    MissingMatrix(MatrixId),
    /// The row's shape is not the model's.
    #[error("{name} has shape {planned} in the plan and {actual} in the model")]
    Shape {
        /// Which matrix.
        name: MatrixId,
        /// In the plan.
        planned: MatrixShape,
        /// In the model.
        actual: MatrixShape,
    },
    /// Channels that the model does not have, or experts out of order.
    #[error(
        "layer {layer}, expert {expert}: `channels` are not some of the model's {intermediate_size}, or the expert is not in its place"
    )]
    Channels {
        /// Decoder layer.
        layer: usize,
        /// Expert.
        expert: usize,
        /// F of the model.
        intermediate_size: usize,
    },
    /// Layers that can have no base, or have one and narrowed experts.
    #[error(
        "`shared_base_layers`: {layer} is not in its place, or is no layer of this model with two experts or more and all their channels"
    )]
    SharedBase {
        /// Decoder layer.
        layer: usize,
    },
    /// A rank that saves nothing, or is zero.
    #[error(
        "{name} {shape}: rank {rank} is outside 1..={rank_max}, where factors are smaller than the matrix"
    )]
    Rank {
        /// Which matrix.
        name: MatrixId,
        /// Its shape.
        shape: MatrixShape,
        /// The rank.
        rank: usize,
        /// The largest that saves.
        rank_max: usize,
    },
    /// Thinned spectra of something else.
    #[error("`spectra` are not those of the plan's matrices; remove the key to go on without them")]
    Spectra,
    /// The recorded sizes are not what the rows add up to.
    #[error("the plan says {planned} {what} and its rows add up to {actual}")]
    Sum {
        /// What is counted.
        what: &'static str,
        /// In the plan.
        planned: u64,
        /// Recomputed.
        actual: u64,
    },
    /// The plan was made for a checkpoint of another size.
    #[error("the plan was made for a checkpoint of {planned} {what}, this one has {actual}")]
    OtherCheckpoint {
        /// What is counted.
        what: &'static str,
        /// In the plan.
        planned: u64,
        /// Of the checkpoint.
        actual: u64,
    },
}
