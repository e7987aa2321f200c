//! `lowrank_manifest.json`: length and BLAKE3 hash of every other file of the output, computed from the files on disk.

use crate::WriteError;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

/// Version of this document.
pub const MANIFEST_VERSION: u32 = 1;

/// The document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub manifest_version: u32,
    /// Every file but this one, sorted by name.
    pub files: Vec<ManifestFile>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Path relative to the output, with `/`.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Lower-case hex.
    pub blake3: String,
}

impl Manifest {
    /// Reads and hashes all files under a directory except its manifest, several at once.
    pub fn of(dir: &Path) -> Result<Self, WriteError> {
        Self::beyond(dir, &BTreeMap::new())
    }

    /// As [`Manifest::of`], but does not read files again that were hashed after they were finished.
    pub(crate) fn beyond(dir: &Path, known: &BTreeMap<String, ManifestFile>) -> Result<Self, WriteError> {
        let mut names = Vec::new();
        collect(dir, "", &mut names)?;
        names.sort();
        let hashed = names.into_par_iter().with_max_len(1).map(|name| match known.get(&name) {
            Some(known) => Ok(known.clone()),
            None => ManifestFile::of(dir, name),
        });
        Ok(Self { manifest_version: MANIFEST_VERSION, files: hashed.collect::<Result<_, WriteError>>()? })
    }
}

impl ManifestFile {
    /// Reads and hashes one file.
    pub(crate) fn of(dir: &Path, name: String) -> Result<Self, WriteError> {
        let (bytes, blake3) = hash_file(&dir.join(&name))?;
        Ok(Self { name, bytes, blake3 })
    }
}

fn collect(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<(), WriteError> {
    for entry in fs::read_dir(folder).map_err(WriteError::io(folder, "list"))? {
        let entry = entry.map_err(WriteError::io(folder, "list"))?;
        let path = entry.path();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().map_err(WriteError::io(&path, "look at"))?.is_dir() {
            collect(&path, &format!("{name}/"), names)?;
        } else if name != lowrank_model::format::MANIFEST_FILE {
            names.push(name);
        }
    }
    Ok(())
}

fn hash_file(path: &Path) -> Result<(u64, String), WriteError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(WriteError::io(path, "open"))?;
    hasher.update_reader(file).map_err(WriteError::io(path, "read"))?;
    Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_but_the_manifest_is_listed_by_content() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        for name in ["b", "a", "folder/c", lowrank_model::format::MANIFEST_FILE] {
            fs::write(dir.path().join(name), "abc").unwrap();
        }
        let manifest = Manifest::of(dir.path()).unwrap();
        let names: Vec<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "folder/c"]);
        // The test vector of "abc" that b3sum prints.
        let abc = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85";
        assert!(manifest.files.iter().all(|file| file.bytes == 3 && file.blake3 == abc));
    }
}
