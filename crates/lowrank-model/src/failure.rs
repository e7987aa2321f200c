//! Kinds of failure, one per row of `docs/exit-codes.md`. Every library error gives its kind in an exhaustive match beside
//! its definition; the command line gives each kind its exit code. How an error is printed with its causes is here, too.

use crate::display::abridge;
use std::error::Error;
use std::io;

/// What kind of failure an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// This program is at fault.
    Bug,
    /// A setting, or a file that a setting names, cannot be used.
    Usage,
    /// There is no model where one was expected.
    NoModel,
    /// The model is of a kind that this program does not handle.
    Unsupported,
    /// The checkpoint contradicts itself or its format.
    BrokenCheckpoint,
    /// A number is NaN, infinite, or does not fit its dtype.
    BadNumbers,
    /// No choice of ranks meets the budget.
    BudgetImpossible,
    /// The output cannot be created where it was asked for.
    Output,
    /// Too little disk space or memory.
    NoRoom,
    /// Reading or writing failed.
    InputOutput,
    /// The compressed checkpoint did not pass its verification.
    VerificationMissed,
    /// A second run gave other bytes.
    NotReproduced,
    /// Some points of a sweep failed.
    PointsFailed,
    /// A file that an earlier run left is damaged, or another version wrote it.
    BrokenRecord,
    /// A GPU failed while it computed.
    DeviceFailed,
    /// SIGINT stopped the run.
    Interrupted,
    /// SIGTERM stopped the run.
    Terminated,
}

impl ErrorKind {
    /// Whether the same run may succeed later, so that its finished work is kept.
    pub const fn is_passing(self) -> bool {
        match self {
            Self::Output
            | Self::NoRoom
            | Self::InputOutput
            | Self::DeviceFailed
            | Self::Interrupted
            | Self::Terminated => true,
            Self::Bug
            | Self::Usage
            | Self::NoModel
            | Self::Unsupported
            | Self::BrokenCheckpoint
            | Self::BadNumbers
            | Self::BudgetImpossible
            | Self::VerificationMissed
            | Self::NotReproduced
            | Self::PointsFailed
            | Self::BrokenRecord => false,
        }
    }

    /// Whether a signal stopped the run.
    pub const fn is_stop(self) -> bool {
        matches!(self, Self::Interrupted | Self::Terminated)
    }

    /// The kind of a file that could not be read or written; `otherwise` where neither permission nor space is missing.
    pub fn of_io(error: &io::Error, otherwise: Self) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::Output,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoRoom,
            _ => otherwise,
        }
    }
}

/// An error and its causes, joined by ": ". An error that has a source does not repeat it in its own message. Causes may
/// quote foreign text and are shortened.
pub fn chain(error: &dyn Error) -> String {
    let (mut line, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        line += ": ";
        line += &abridge(&error.to_string());
        cause = error.source();
    }
    line
}
