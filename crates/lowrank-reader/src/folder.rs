//! The model's folder: which files may be read, and where links may lead.
//!
//! | A link to | is followed |
//! |---|---|
//! | a file in the folder | always |
//! | a blob of a Hugging Face cache: `models--org--name/blobs/…`, or the cache's shared blobs | always: snapshots, and folders of older `--local-dir` downloads, hold such links |
//! | anywhere else | for `*.safetensors` only: weights on another disk |
//!
//! What is not safetensors is refused elsewhere, so a foreign folder cannot make the tool copy or show a file of the
//! user's: every other file is read as text or carried verbatim into the output.

use crate::error::ReadError;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A file that huggingface_hub puts into the folder of blobs that all repositories of a cache share.
const SHARED_BLOBS_MARKER: &str = ".huggingface-shared-blobs";

/// Reads a file that has an upper limit, whatever its length is said to be.
pub fn read_at_most(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, ReadError> {
    let file = File::open(path).map_err(|source| ReadError::Io { path: path.into(), source })?;
    read_open(path, file, limit_bytes)
}

fn read_open(path: &Path, file: File, limit_bytes: u64) -> Result<Vec<u8>, ReadError> {
    let read = lowrank_files::rest_at_most(file, limit_bytes);
    let bytes = read.map_err(|source| ReadError::Io { path: path.into(), source })?;
    bytes.ok_or_else(|| ReadError::FileTooLarge { path: path.into(), limit_bytes })
}

/// A folder that exists.
#[derive(Debug)]
pub(crate) struct Folder {
    /// As the user gave it: messages use it.
    dir: PathBuf,
    /// Without links.
    root: PathBuf,
    /// `blobs` beside `snapshots`, when this is a snapshot; the repository's folder may have any name.
    blobs: Option<PathBuf>,
}

impl Folder {
    pub(crate) fn open(dir: &Path) -> Result<Self, ReadError> {
        let root = fs::canonicalize(dir).map_err(|source| ReadError::Io { path: dir.into(), source })?;
        if !root.is_dir() {
            return Err(ReadError::NotAFolder { path: dir.into() });
        }
        let blobs = root
            .parent()
            .filter(|snapshots| snapshots.file_name() == Some(OsStr::new("snapshots")))
            .and_then(Path::parent)
            .and_then(|repository| fs::canonicalize(repository.join("blobs")).ok());
        Ok(Self { dir: dir.into(), root, blobs })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path that messages name.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The file behind a name, links resolved; `None` when there is nothing of that name.
    pub(crate) fn resolve(&self, name: &str) -> Result<Option<PathBuf>, ReadError> {
        let path = self.path(name);
        let io = |source| ReadError::Io { path: self.path(name), source };
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
            Ok(_) => {}
        }
        let target = match fs::canonicalize(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(ReadError::DanglingLink { path });
            }
            other => other.map_err(io)?,
        };
        if !self.may_be_read(name, &target) {
            return Err(ReadError::LeavesFolder { path, target });
        }
        // Asked before opening: opening a pipe would wait for its writer.
        if !fs::metadata(&target).map_err(io)?.is_file() {
            return Err(ReadError::NotAFile { path });
        }
        Ok(Some(target))
    }

    /// The rule of this module for a file whose links end at `target`.
    fn may_be_read(&self, name: &str, target: &Path) -> bool {
        target.starts_with(&self.root)
            || self.blobs.as_deref().is_some_and(|blobs| target.parent() == Some(blobs))
            || is_blob(target)
            || name.ends_with(".safetensors")
    }

    /// Opens a file; `None` when there is nothing of that name.
    pub(crate) fn open_file(&self, name: &str) -> Result<Option<File>, ReadError> {
        let Some(target) = self.resolve(name)? else { return Ok(None) };
        match File::open(target) {
            Ok(file) => Ok(Some(file)),
            Err(source) => Err(ReadError::Io { path: self.path(name), source }),
        }
    }

    /// Reads a text file that has an upper limit; `None` when there is nothing of that name.
    pub(crate) fn read(&self, name: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, ReadError> {
        let Some(file) = self.open_file(name)? else { return Ok(None) };
        read_open(&self.path(name), file, limit_bytes).map(Some)
    }

    /// Names of everything in the folder, sorted; names that are not UTF-8 belong to no model and are left out.
    pub(crate) fn names(&self) -> Result<Vec<String>, ReadError> {
        self.names_in("")
    }

    /// As [`Folder::names`], of a folder in this one.
    pub(crate) fn names_in(&self, folder: &str) -> Result<Vec<String>, ReadError> {
        let io = |source| ReadError::Io { path: self.path(folder), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(self.root.join(folder)).map_err(io)? {
            if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// Whether a path without links is a blob of a Hugging Face cache: `models--org--name/blobs/HASH`, or
/// `blobs/XX/HASH` where the cache shares blobs.
fn is_blob(target: &Path) -> bool {
    let named = |folder: &Path, name: &str| folder.file_name() == Some(OsStr::new(name));
    let Some(folder) = target.parent() else { return false };
    let repository = folder.parent().and_then(Path::file_name);
    if named(folder, "blobs")
        && repository.is_some_and(|name| name.as_encoded_bytes().starts_with(b"models--"))
    {
        return true;
    }
    folder.parent().is_some_and(|shared| named(shared, "blobs") && shared.join(SHARED_BLOBS_MARKER).is_file())
}
