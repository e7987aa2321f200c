//! The model's folder: files are opened by plain name, and never outside it.
//!
//! Symbolic links that leave the folder are refused, with one exception: in the Hugging Face cache,
//! `models--org--name/snapshots/<sha>/file` links to `models--org--name/blobs/<hash>`.

use crate::error::ReadError;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

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
    /// `blobs` of the cache, when this is one of its snapshots.
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
            .filter(|model| {
                model.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"models--"))
            })
            .and_then(|model| fs::canonicalize(model.join("blobs")).ok());
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
        let inside = target.starts_with(&self.root);
        let blob = self.blobs.as_deref().is_some_and(|blobs| target.parent() == Some(blobs));
        if !inside && !blob {
            return Err(ReadError::LeavesFolder { path, target });
        }
        // Asked before opening: opening a pipe would wait for its writer.
        if !fs::metadata(&target).map_err(io)?.is_file() {
            return Err(ReadError::NotAFile { path });
        }
        Ok(Some(target))
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
        let io = |source| ReadError::Io { path: self.dir.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io)? {
            if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}
