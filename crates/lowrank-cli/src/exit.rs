//! Which failure ends with which exit code: the one table, in prose in `docs/exit-codes.md`.

use lowrank_cache::CacheError;
use lowrank_calibrate::CalibrateError;
use lowrank_forward::ForwardError;
use lowrank_model::budget::BudgetError;
use lowrank_model::config::ConfigError;
use lowrank_pipeline::PipelineError;
use lowrank_reader::ReadError;
use lowrank_report::ReportError;
use lowrank_svd::SvdError;
use lowrank_svd::allocate::AllocateError;
use lowrank_sweep::SweepError;
use lowrank_verify::VerifyError;
use lowrank_writer::WriteError;
use std::process::ExitCode;

/// Kinds of failure; the number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Failure {
    Unexpected = 1,
    Usage = 2,
    NoModel = 3,
    Unsupported = 4,
    BrokenCheckpoint = 5,
    BadNumbers = 6,
    BudgetImpossible = 7,
    Output = 8,
    NoRoom = 9,
    InputOutput = 10,
    VerificationMissed = 11,
    NotReproduced = 12,
    PointsFailed = 13,
    Interrupted = 130,
    Terminated = 143,
}

/// A flag, a config key or a file named by one cannot be.
#[derive(Debug)]
pub(crate) struct Usage(String);

/// A small file that a command writes could not be written.
#[derive(Debug)]
pub(crate) struct Output(String);

/// The verdict was no.
#[derive(Debug)]
pub(crate) struct VerificationMissed(pub(crate) String);

/// A second run gave other bytes.
#[derive(Debug)]
pub(crate) struct NotReproduced(pub(crate) String);

/// Some points of a sweep failed; the others are done.
#[derive(Debug)]
pub(crate) struct PointsFailed(pub(crate) String);

macro_rules! message_error {
    ($($name:ident),*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl std::error::Error for $name {}
    )*};
}
message_error!(Usage, Output, VerificationMissed, NotReproduced, PointsFailed);

impl Usage {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl Output {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// The whole chain in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let text = error.chain().next().map(ToString::to_string).unwrap_or_default();
    // Messages of the library crates hold their causes already; only `context` adds a link of its own.
    let text = match error.downcast_ref::<Output>() {
        Some(output) if output.0 != text => format!("{text}: {output}"),
        _ => text,
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    // Names of files may hold anything; a terminal must not obey them.
    line.chars().map(|c| if c.is_control() { c.escape_debug().to_string() } else { c.into() }).collect()
}

/// The exit code of a failure.
pub(crate) fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(failure(error) as u8)
}

fn failure(error: &anyhow::Error) -> Failure {
    if error.is::<Usage>() {
        Failure::Usage
    } else if error.is::<Output>() {
        Failure::Output
    } else if error.is::<VerificationMissed>() {
        Failure::VerificationMissed
    } else if error.is::<NotReproduced>() {
        Failure::NotReproduced
    } else if error.is::<PointsFailed>() {
        Failure::PointsFailed
    } else if let Some(error) = error.downcast_ref::<SweepError>() {
        of_sweep(error)
    } else if let Some(error) = error.downcast_ref::<PipelineError>() {
        of_pipeline(error)
    } else if let Some(error) = error.downcast_ref::<ReadError>() {
        of_read(error)
    } else if let Some(error) = error.downcast_ref::<ReportError>() {
        of_report(error)
    } else if let Some(error) = error.downcast_ref::<VerifyError>() {
        of_verify(error)
    } else {
        Failure::Unexpected
    }
}

fn of_sweep(error: &SweepError) -> Failure {
    match error {
        SweepError::Io { source, .. } => of_io(source),
        SweepError::Broken { .. } | SweepError::OtherSweep { .. } | SweepError::Busy { .. } => {
            Failure::Output
        }
    }
}

fn of_report(error: &ReportError) -> Failure {
    match error {
        ReportError::NotACheckpoint { .. } => Failure::NoModel,
        ReportError::Document { .. } | ReportError::OtherCheckpoint { .. } => Failure::BrokenCheckpoint,
        ReportError::Sweep(error) => of_sweep(error),
        ReportError::Read { .. } => Failure::InputOutput,
        ReportError::Write { .. } => Failure::Output,
    }
}

fn of_verify(error: &VerifyError) -> Failure {
    match error {
        VerifyError::Read(error) => of_read(error),
        VerifyError::Forward(error) => of_forward(error),
        VerifyError::NoFolder { .. } => Failure::NoModel,
        VerifyError::Text(_) => Failure::Usage,
    }
}

fn of_svd(error: &SvdError) -> Failure {
    match error {
        SvdError::NotFinite { .. } | SvdError::Overflow { .. } | SvdError::Negative { .. } => {
            Failure::BadNumbers
        }
        SvdError::Rank { .. } | SvdError::Blend { .. } => Failure::Usage,
        SvdError::NotAMatrix { .. }
        | SvdError::OtherSpectrum { .. }
        | SvdError::MetricShape { .. }
        | SvdError::MetricNotFinite { .. }
        | SvdError::RowWeights { .. }
        | SvdError::RowWeight { .. }
        | SvdError::Compute(_) => Failure::Unexpected,
    }
}

fn of_calibrate(error: &CalibrateError) -> Failure {
    match error {
        CalibrateError::Read(error) => of_read(error),
        CalibrateError::Text(_) => Failure::Usage,
        CalibrateError::Forward(error) => of_forward(error),
        CalibrateError::Svd { source, .. } => of_svd(source),
        CalibrateError::NotFinite { .. } | CalibrateError::LogitsNotFinite { .. } => Failure::BadNumbers,
        CalibrateError::Cache(CacheError::Io { source, .. }) => of_io(source),
        CalibrateError::Cache(CacheError::Damaged { .. }) | CalibrateError::Absent { .. } => {
            Failure::InputOutput
        }
        CalibrateError::Stopped => Failure::Unexpected,
    }
}

fn of_forward(error: &ForwardError) -> Failure {
    match error {
        ForwardError::Read(error) => of_read(error),
        ForwardError::MissingTensor { .. } => Failure::BrokenCheckpoint,
        ForwardError::Device { .. } => Failure::Unexpected,
        _ => Failure::Usage,
    }
}

fn of_io(error: &std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => Failure::Output,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Failure::NoRoom,
        _ => Failure::InputOutput,
    }
}

fn of_pipeline(error: &PipelineError) -> Failure {
    match error {
        PipelineError::Read(error) => of_read(error),
        PipelineError::Write(error) => of_write(error),
        PipelineError::Svd { source, .. } => of_svd(source),
        PipelineError::Allocate(error) => of_allocate(error),
        PipelineError::Budget(BudgetError::Syntax { .. } | BudgetError::Zero) => Failure::Usage,
        PipelineError::Budget(BudgetError::NothingToDo { .. }) => Failure::BudgetImpossible,
        PipelineError::Calibrate(error) => of_calibrate(error),
        PipelineError::Plan(_)
        | PipelineError::NoDevice(_)
        | PipelineError::NothingToMeasureOn
        | PipelineError::TooManyWorkers { .. }
        | PipelineError::PatternMatchesNothing { .. }
        | PipelineError::FixedRank { .. }
        | PipelineError::DenseAndFixed { .. }
        | PipelineError::PlanStorage { .. }
        | PipelineError::PlanDtype { .. } => Failure::Usage,
        PipelineError::AlreadyFactored(_) | PipelineError::NotFactored(_) => Failure::Unsupported,
        PipelineError::Overflow { .. } => Failure::BadNumbers,
        PipelineError::Interrupted { signal: 15 } => Failure::Terminated,
        PipelineError::Interrupted { .. } => Failure::Interrupted,
        PipelineError::Unrepeatable { .. } => Failure::BrokenCheckpoint,
        PipelineError::TooLittleMemory { .. } | PipelineError::Threads { .. } => Failure::NoRoom,
    }
}

fn of_read(error: &ReadError) -> Failure {
    use ReadError as E;
    match error {
        E::NotCached { .. }
        | E::NoSuchModel { .. }
        | E::NotAFolder { .. }
        | E::NoCache { .. }
        | E::BadRef { .. }
        | E::NoConfig { .. } => Failure::NoModel,
        E::Config { source: ConfigError::UnknownFamily(_) | ConfigError::Quantised(_), .. }
        | E::ForeignFormat { .. }
        | E::FormatVersion { .. }
        | E::UnknownStorage { .. }
        | E::UnknownDtype { .. }
        | E::WrongDtype { .. }
        | E::Quantised { .. } => Failure::Unsupported,
        E::NotFinite { .. } => Failure::BadNumbers,
        E::Io { .. } | E::TensorIo { .. } | E::Shrank { .. } => Failure::InputOutput,
        E::IsFactored { .. } | E::UnknownTensor { .. } => Failure::Unexpected,
        _ => Failure::BrokenCheckpoint,
    }
}

fn of_write(error: &WriteError) -> Failure {
    use WriteError as E;
    match error {
        E::OutExists { .. }
        | E::OutName { .. }
        | E::NoParent { .. }
        | E::Busy { .. }
        | E::StagingName { .. }
        | E::OtherJob { .. } => Failure::Output,
        E::NoSpace { .. } => Failure::NoRoom,
        E::Io { source, .. } => of_io(source),
        E::ReadBack { .. } => Failure::InputOutput,
        E::ShardBytesZero | E::HeaderTooLarge { .. } => Failure::Usage,
        E::Config(_) => Failure::BrokenCheckpoint,
        E::EmptyLayout
        | E::TensorName { .. }
        | E::DuplicateTensor { .. }
        | E::Overflow { .. }
        | E::UnknownTensor { .. }
        | E::Shape { .. }
        | E::Dtype { .. }
        | E::Length { .. }
        | E::WrittenTwice { .. }
        | E::MissingTensor { .. }
        | E::Promise { .. }
        | E::DuplicateFile { .. }
        | E::FileName { .. } => Failure::Unexpected,
    }
}

fn of_allocate(error: &AllocateError) -> Failure {
    match error {
        AllocateError::Infeasible { .. } => Failure::BudgetImpossible,
        _ => Failure::Usage,
    }
}
