//! Every way in which writing can fail.

use lowrank_model::{ElementType, ErrorKind};
use std::path::{Path, PathBuf};

/// Why a checkpoint was not written. Each is one line that says what, where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The output is there already.
    #[error("{}: already exists", path.display())]
    OutExists {
        /// The output.
        path: PathBuf,
    },
    /// The output has no name of its own (`/`, `..`).
    #[error("{}: cannot be an output directory; give a path that ends in a new name", path.display())]
    OutName {
        /// The output.
        path: PathBuf,
    },
    /// The directory that is to hold the output is not there.
    #[error("{}: no such directory; create it first", path.display())]
    NoParent {
        /// The parent of the output.
        path: PathBuf,
    },
    /// Another process writes the same output.
    #[error("{}: another process is writing this output", path.display())]
    Busy {
        /// The staging directory.
        path: PathBuf,
    },
    /// The staging name is taken by something that is no directory.
    #[error("{}: is in the way of the unfinished output; remove it", path.display())]
    StagingName {
        /// The staging directory.
        path: PathBuf,
    },
    /// The unfinished work of another job.
    #[error("{}: holds unfinished work of other inputs, settings or version", path.display())]
    OtherJob {
        /// The staging directory.
        path: PathBuf,
    },
    /// Not enough free disk.
    #[error("{}: {free_bytes} bytes are free and {needed_bytes} are needed", path.display())]
    NoSpace {
        /// The directory that was looked at.
        path: PathBuf,
        /// What is needed.
        needed_bytes: u64,
        /// What is there.
        free_bytes: u64,
    },
    /// The system refused.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint of nothing.
    #[error("there is no tensor to write")]
    EmptyLayout,
    /// Shards that may hold nothing.
    #[error("the maximal shard size is 0 bytes; give at least 1")]
    ShardBytesZero,
    /// A name that cannot stand in a header.
    #[error("tensor `{name}`: this name cannot be written")]
    TensorName {
        /// The name.
        name: String,
    },
    /// A name given twice.
    #[error("tensor `{name}`: listed twice")]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// Dimensions whose product leaves 64 bits.
    #[error("tensor `{name}`: shape {shape:?} has more bytes than can be counted")]
    Overflow {
        /// The name.
        name: String,
        /// The dimensions.
        shape: Vec<usize>,
    },
    /// A header that no loader would read.
    #[error("{shard}: its header would have {bytes} bytes, loaders take 100000000")]
    HeaderTooLarge {
        /// The shard.
        shard: String,
        /// Length of its header.
        bytes: usize,
    },
    /// A tensor that is not in the layout.
    #[error("tensor `{name}`: is not part of this checkpoint")]
    UnknownTensor {
        /// The name.
        name: String,
    },
    /// A tensor of another shape than planned.
    #[error("tensor `{name}`: has shape {found:?}, the plan says {planned:?}")]
    Shape {
        /// The name.
        name: String,
        /// In the layout.
        planned: Vec<usize>,
        /// As given.
        found: Vec<usize>,
    },
    /// More or fewer bytes than planned were given.
    #[error("tensor `{name}`: was given more or fewer bytes than planned")]
    Length {
        /// The name.
        name: String,
    },
    /// A tensor of another dtype than planned.
    #[error("tensor `{name}`: is {found}, the plan says {planned}")]
    Dtype {
        /// The name.
        name: String,
        /// In the layout.
        planned: ElementType,
        /// As given.
        found: ElementType,
    },
    /// A tensor given twice.
    #[error("tensor `{name}`: was written before")]
    WrittenTwice {
        /// The name.
        name: String,
    },
    /// The end came before the last tensor.
    #[error("tensor `{name}`: was never written; missing in all: {missing}")]
    MissingTensor {
        /// The first missing.
        name: String,
        /// How many.
        missing: usize,
    },
    /// A shard on disk that is not what was planned.
    #[error("{}: read back after writing, {what}; the disk or this program is at fault", path.display())]
    ReadBack {
        /// The shard.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// The counts that were promised are not the counts on disk.
    #[error("the written headers hold {found} {what}, the plan promised {promised}; nothing was published")]
    Promise {
        /// `parameters` or `bytes`.
        what: &'static str,
        /// By the plan.
        promised: u64,
        /// Counted from the written headers.
        found: u64,
    },
    /// Two files of the same name.
    #[error("{}: two sources for this file of the output", name.display())]
    DuplicateFile {
        /// Relative to the output.
        name: PathBuf,
    },
    /// A file name that leads out of the output.
    #[error("{}: not a plain relative file name", name.display())]
    FileName {
        /// As given.
        name: PathBuf,
    },
    /// A base configuration that cannot be carried over.
    #[error("config.json of the base model")]
    Config(#[from] lowrank_model::config::ConfigError),
}

impl WriteError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OutExists { .. }
            | Self::OutName { .. }
            | Self::NoParent { .. }
            | Self::Busy { .. }
            | Self::StagingName { .. }
            | Self::OtherJob { .. } => ErrorKind::Output,
            Self::NoSpace { .. } => ErrorKind::NoRoom,
            Self::Io { source, .. } => ErrorKind::of_io(source, ErrorKind::InputOutput),
            Self::ReadBack { .. } => ErrorKind::InputOutput,
            Self::ShardBytesZero | Self::HeaderTooLarge { .. } => ErrorKind::Usage,
            Self::Config(error) => error.kind(),
            Self::EmptyLayout
            | Self::TensorName { .. }
            | Self::DuplicateTensor { .. }
            | Self::Overflow { .. }
            | Self::UnknownTensor { .. }
            | Self::Shape { .. }
            | Self::Dtype { .. }
            | Self::Length { .. }
            | Self::WrittenTwice { .. }
            | Self::MissingTensor { .. }
            | Self::Promise { .. }
            | Self::DuplicateFile { .. }
            | Self::FileName { .. } => ErrorKind::Bug,
        }
    }

    /// For `map_err`: names the path and the attempt.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), action, source }
    }
}
