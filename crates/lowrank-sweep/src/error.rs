//! Every way in which the files of a sweep can fail.

use lowrank_model::ErrorKind;
use std::path::PathBuf;

/// Why a sweep's folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The disk.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line that is no row, or a header that is none.
    #[error("{}: line {line}: {what}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Results that cannot be compared with those to come.
    #[error("{}: holds a sweep with {what}", dir.display())]
    OtherSweep {
        /// The folder.
        dir: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// Somebody else is at it.
    #[error("{}: another process is running this sweep; wait for it", dir.display())]
    Busy {
        /// The folder.
        dir: PathBuf,
    },
}

impl SweepError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } => ErrorKind::of_io(source, ErrorKind::InputOutput),
            Self::OtherSweep { .. } | Self::Busy { .. } => ErrorKind::Output,
            Self::Broken { .. } => ErrorKind::BrokenRecord,
        }
    }
}
