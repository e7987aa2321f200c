//! Why a cache does not serve.

use lowrank_model::ErrorKind;
use std::path::PathBuf;

/// A cache that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system.
    #[error("{}: cannot {action} this file of the cache", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// make, read, write or rename.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The numbers are not those that were written.
    #[error("{}: this file of the cache is damaged; delete it and run again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
    },
}

impl CacheError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } => ErrorKind::of_io(source, ErrorKind::InputOutput),
            Self::Damaged { .. } => ErrorKind::InputOutput,
        }
    }
}
