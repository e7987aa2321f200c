//! Every way in which a job can fail.

use lowrank_calibrate::CalibrateError;
use lowrank_compute::NoDevice;
use lowrank_forward::ForwardError;
use lowrank_model::{Dtype, Layout, MatrixId, Storage, budget::BudgetError, plan::PlanError};
use lowrank_reader::ReadError;
use lowrank_svd::SvdError;
use lowrank_svd::allocate::AllocateError;
use lowrank_writer::WriteError;

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
    #[error("{name}: {source}")]
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
    #[error("plan: {0}")]
    Plan(#[from] PlanError),
    /// The calibration.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// Linear algebra on a device that is not there.
    #[error(transparent)]
    NoDevice(#[from] NoDevice),
    /// Sensitivities that were asked for and cannot be measured.
    #[error("--sensitivity measured needs a text to measure on; drop --calibrate none")]
    NothingToMeasureOn,
    /// A plan for another way to store factors.
    #[error(
        "--layout {asked}: the plan was made for {planned}, which costs other parameters; make a new plan"
    )]
    PlanStorage {
        /// By the flag.
        asked: Storage,
        /// By the plan.
        planned: Storage,
    },
    /// A plan for numbers of another size.
    #[error(
        "the plan counts {planned} bytes for a number of a {what}, this run stores {actual}; give the --dtype that the plan was made with, or make a new plan"
    )]
    PlanDtype {
        /// `matrix` or `factor`.
        what: &'static str,
        /// By the plan.
        planned: u64,
        /// By checkpoint and flags.
        actual: u64,
    },
    /// Compressing what is compressed already.
    #[error("the checkpoint holds {0}; give the original, or `densify` this one first")]
    AlreadyFactored(Layout),
    /// Densifying what is dense already.
    #[error("the checkpoint holds no factors ({0}): there is nothing to densify")]
    NotFactored(Layout),
    /// A pattern that matches nothing is a typing error.
    #[error(
        "{flag} `{pattern}` matches no expert matrix; names look like model.layers.0.block_sparse_moe.experts.0.w1"
    )]
    PatternMatchesNothing {
        /// Where it was given.
        flag: &'static str,
        /// What was given.
        pattern: String,
    },
    /// A rank that saves nothing, or is zero.
    #[error(
        "--fix-rank `{pattern}={rank}`: {name} can have ranks from 1 to {rank_max} as {storage}; beyond, factors are no smaller than the matrix"
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
    #[error("--keep-dense `{pattern}` keeps {name} dense, and --fix-rank gives it a rank; drop one of them")]
    DenseAndFixed {
        /// What was given.
        pattern: String,
        /// The first such matrix.
        name: MatrixId,
    },
    /// Rounding to a narrower dtype left its range.
    #[error("{tensor}: a value does not fit {dtype}; choose another --dtype")]
    Overflow {
        /// The tensor that was to be written.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// Not even one worker fits.
    #[error(
        "{stage}: one worker needs {needed_bytes} bytes of memory and {allowed_bytes} are allowed; raise --memory"
    )]
    TooLittleMemory {
        /// What needs most.
        stage: &'static str,
        /// For one worker.
        needed_bytes: u64,
        /// By the flag, or free.
        allowed_bytes: u64,
    },
    /// A number of threads that no machine serves.
    #[error("--workers is {asked}, expected at most {most}")]
    TooManyWorkers {
        /// By the flag.
        asked: usize,
        /// What can be.
        most: usize,
    },
    /// Asked to stop.
    #[error("stopped by signal {signal} ({}) before the end; nothing was published", if *.signal == 2 { "SIGINT" } else { "SIGTERM" })]
    Interrupted {
        /// Its number.
        signal: usize,
    },
    /// Metadata from which a run cannot be repeated.
    #[error("{}: {what}", path.display())]
    Unrepeatable {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The system gave no threads.
    #[error("cannot start worker threads: {source}")]
    Threads {
        /// What rayon said.
        source: rayon::ThreadPoolBuildError,
    },
}

impl PipelineError {
    /// Whether the same run may succeed later, so that its finished work is worth keeping: it was stopped, or a disk, a
    /// cache or a device failed it. A refused input is not.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Interrupted { .. } => true,
            Self::Write(error) => matches!(error, WriteError::Io { .. } | WriteError::NoSpace { .. }),
            Self::Read(error) => read_is_passing(error),
            Self::Calibrate(error) => match error {
                CalibrateError::Cache(_) | CalibrateError::Absent { .. } => true,
                CalibrateError::Read(error) | CalibrateError::Forward(ForwardError::Read(error)) => {
                    read_is_passing(error)
                }
                CalibrateError::Forward(error) => matches!(error, ForwardError::Device { .. }),
                _ => false,
            },
            _ => false,
        }
    }
}

fn read_is_passing(error: &ReadError) -> bool {
    matches!(error, ReadError::Io { .. } | ReadError::TensorIo { .. } | ReadError::Shrank { .. })
}
