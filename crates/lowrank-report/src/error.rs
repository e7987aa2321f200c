//! Every way in which making a page can fail.

use lowrank_model::ErrorKind;
use std::path::PathBuf;

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The directory holds no compressed checkpoint.
    #[error("{}: no {file} in it; give the output of `lowrank-compress`, or the folder of a `sweep`", dir.display())]
    NotACheckpoint {
        /// What was given.
        dir: PathBuf,
        /// What it lacks.
        file: &'static str,
    },
    /// The files of a sweep.
    #[error(transparent)]
    Sweep(#[from] lowrank_sweep::SweepError),
    /// A file that is there cannot be read.
    #[error("{}: cannot read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A document that is not what its name says.
    #[error("{}: is not valid", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A document that contradicts the checkpoint.
    #[error("{}: belongs to another checkpoint than {}; {remedy}", path.display(), dir.display())]
    OtherCheckpoint {
        /// The document.
        path: PathBuf,
        /// The checkpoint.
        dir: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// The page cannot be written.
    #[error("{}: the report was not written", path.display())]
    Write {
        /// The page.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ReportError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotACheckpoint { .. } => ErrorKind::NoModel,
            Self::Sweep(error) => error.kind(),
            Self::Read { .. } => ErrorKind::InputOutput,
            Self::Document { .. } | Self::OtherCheckpoint { .. } => ErrorKind::BrokenRecord,
            Self::Write { source, .. } => ErrorKind::of_io(source, ErrorKind::Output),
        }
    }
}
