//! Why a cache does not serve.

use std::path::PathBuf;

/// A cache that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system.
    #[error("{}: cannot {action} this file of the cache: {source}; --cache names another place, --cache none does without", path.display())]
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
