//! Every way in which a job can fail.

use lowrank_calibrate::CalibrateError;
use lowrank_compute::NoDevice;
use lowrank_model::{Dtype, ErrorKind, Layout, MatrixId, Storage, budget::BudgetError, plan::PlanError};
use lowrank_reader::ReadError;
use lowrank_svd::SvdError;
use lowrank_svd::allocate::AllocateError;
use lowrank_writer::WriteError;
use std::path::PathBuf;

/// Why a job ended early. Nothing was published.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The input.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The output.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// One matrix' decomposition.
    #[error("{name}")]
    Svd {
        /// Which matrix.
        name: MatrixId,
        /// What went wrong.
        source: SvdError,
    },
    /// The ranks.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The wish.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A plan that came from a file.
    #[error("the plan cannot be used")]
    Plan(#[from] PlanError),
    /// The calibration.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// Linear algebra on a device that is not there.
    #[error(transparent)]
    NoDevice(#[from] NoDevice),
    /// Sensitivities that were asked for and cannot be measured.
    #[error("measuring sensitivities needs a calibration text")]
    NothingToMeasureOn,
    /// Widths or shared bases without a text.
    #[error(
        "widths and shared bases are measured on, and fitted to, a calibration text, with measured sensitivities"
    )]
    StructuresNotMeasured,
    /// Shared bases where all experts, or those of a layer, are to be equal.
    #[error("shared bases go with choices of their own for every matrix, and with the global allocation")]
    SharedBasesAndEqualExperts,
    /// One width for all experts, and ranks.
    #[error("the uniform allocation gives every expert one width, and no ranks beside it")]
    UniformWidths,
    /// A plan for another way to store factors.
    #[error(
        "the plan counts factors stored as {planned}, this run stores them as {asked}, which takes other numbers of parameters"
    )]
    PlanStorage {
        /// By the settings.
        asked: Storage,
        /// By the plan.
        planned: Storage,
    },
    /// A plan for numbers of another size.
    #[error("the plan counts {planned} bytes for each number of {what}{name}, this run stores {actual}")]
    PlanDtype {
        /// Empty for the dense matrix, or words that say that its factors are meant.
        what: &'static str,
        /// Which matrix.
        name: MatrixId,
        /// By the plan.
        planned: u64,
        /// By checkpoint and settings.
        actual: u64,
    },
    /// Compressing what is compressed already.
    #[error("the checkpoint holds {0}; give the original, or `densify` this one first")]
    AlreadyFactored(Layout),
    /// An output that would become a part of its own base.
    #[error(
        "{}: lies inside the model's folder ({}); choose a place outside it",
        out.display(),
        model.display()
    )]
    OutInsideModel {
        /// What was asked for.
        out: std::path::PathBuf,
        /// The base's folder.
        model: std::path::PathBuf,
    },
    /// Densifying what is dense already.
    #[error("the checkpoint holds no factors ({0}): there is nothing to densify")]
    NotFactored(Layout),
    /// A pattern that matches nothing is a typing error.
    #[error("{key} `{pattern}` matches no expert matrix; names look like {example}")]
    PatternMatchesNothing {
        /// The setting, `keep-dense` or `fix-rank`.
        key: &'static str,
        /// What was given.
        pattern: String,
        /// Name of a module.
        example: String,
    },
    /// A rank that saves nothing, or is zero.
    #[error(
        "fix-rank `{pattern}={rank}`: {name} can have ranks from 1 to {rank_max} as {storage}, above which factors are no smaller than the matrix"
    )]
    FixedRank {
        /// What was given.
        pattern: String,
        /// The rank.
        rank: usize,
        /// The first matrix that cannot have it.
        name: MatrixId,
        /// How its factors are stored.
        storage: Storage,
        /// The largest that saves.
        rank_max: usize,
    },
    /// Two wishes for one matrix.
    #[error("keep-dense `{pattern}` keeps {name} dense, and fix-rank gives it a rank")]
    DenseAndFixed {
        /// What was given.
        pattern: String,
        /// The first such matrix.
        name: MatrixId,
    },
    /// Rounding to a narrower dtype left its range.
    #[error("{tensor}: a value does not fit {dtype}")]
    Overflow {
        /// The tensor that was to be written.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// Not even one worker fits.
    #[error("{stage}: one worker needs {needed_bytes} bytes of memory and {allowed_bytes} are allowed")]
    TooLittleMemory {
        /// What needs most.
        stage: &'static str,
        /// For one worker.
        needed_bytes: u64,
        /// By the settings, or free.
        allowed_bytes: u64,
    },
    /// A number of threads that no machine serves.
    #[error("{asked} workers were asked for, at most {most} are possible")]
    TooManyWorkers {
        /// By the settings.
        asked: usize,
        /// What can be.
        most: usize,
    },
    /// Asked to stop.
    #[error("signal {signal} ({}) stopped the run; nothing was published", if *.signal == 2 { "SIGINT" } else { "SIGTERM" })]
    Interrupted {
        /// Its number.
        signal: usize,
    },
    /// What an earlier run left cannot be used.
    #[error("{}: {what}", path.display())]
    Record {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A folder that is no output of this program.
    #[error("{}: does not exist, so the folder is no output of this program", path.display())]
    NotAnOutput {
        /// The file that every output has.
        path: PathBuf,
    },
    /// A model has fewer positions than a window has tokens.
    #[error("a calibration window of {window} tokens is longer than the {positions} positions of the model")]
    WindowTooLong {
        /// Tokens of a window.
        window: usize,
        /// Of the model.
        positions: usize,
    },
    /// A run is to be repeated on other texts than it was calibrated on.
    #[error("{}: the run was calibrated on {names}, and the texts given now are others", path.display())]
    OtherTexts {
        /// The report.
        path: PathBuf,
        /// The texts that it names.
        names: String,
    },
    /// An output cannot be read.
    #[error("{}: cannot read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A shard that is not the one that other machines see.
    #[error("{}: is not the file that this job was begun with", path.display())]
    OtherShard {
        /// The shard.
        path: PathBuf,
    },
    /// The system gave no threads.
    #[error("cannot start worker threads: {reason}")]
    Threads {
        /// What rayon said.
        reason: rayon::ThreadPoolBuildError,
    },
}

impl PipelineError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(error) => error.kind(),
            Self::Write(error) => error.kind(),
            Self::Svd { source, .. } => source.kind(),
            Self::Allocate(error) => error.kind(),
            Self::Budget(error) => error.kind(),
            Self::Calibrate(error) => error.kind(),
            Self::Plan(_)
            | Self::NoDevice(_)
            | Self::NothingToMeasureOn
            | Self::StructuresNotMeasured
            | Self::SharedBasesAndEqualExperts
            | Self::UniformWidths
            | Self::OtherTexts { .. }
            | Self::WindowTooLong { .. }
            | Self::TooManyWorkers { .. }
            | Self::PatternMatchesNothing { .. }
            | Self::FixedRank { .. }
            | Self::DenseAndFixed { .. }
            | Self::PlanStorage { .. }
            | Self::PlanDtype { .. } => ErrorKind::Usage,
            Self::OutInsideModel { .. } => ErrorKind::Output,
            Self::AlreadyFactored(_) | Self::NotFactored(_) => ErrorKind::Unsupported,
            Self::Overflow { .. } => ErrorKind::BadNumbers,
            Self::TooLittleMemory { .. } | Self::Threads { .. } => ErrorKind::NoRoom,
            Self::Interrupted { signal: 15 } => ErrorKind::Terminated,
            Self::Interrupted { .. } => ErrorKind::Interrupted,
            Self::Record { .. } | Self::OtherShard { .. } => ErrorKind::BrokenRecord,
            Self::NotAnOutput { .. } => ErrorKind::NoModel,
            Self::Io { .. } => ErrorKind::InputOutput,
        }
    }
}
