//! A cache of measurements for later runs: arrays of numbers in files, found by a hash of what they depend on.
//!
//! An [`Entry`] is a folder. Its name is the hash of everything that its numbers depend on, so an entry is never out of date.
//! Each file in it is a safetensors file that contains the hash of its numbers. It is written under a temporary name and then
//! renamed, so it is complete or absent. Several processes may share a cache. You may delete any part of it while no run is
//! in progress.
//!
//! ```text
//! ROOT/KEY/NAME.safetensors      __metadata__: { "note": text of the writer, "blake3": hash of the numbers }
//! ```

mod error;

pub use error::CacheError;

use lowrank_failpoint as failpoint;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// A folder of entries.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    /// Deleted when the value is dropped.
    _temporary: Option<tempfile::TempDir>,
}

/// The files of one key.
#[derive(Debug, Clone)]
pub struct Entry {
    dir: PathBuf,
}

/// Numbers of one array; reading gives the same bits that were written.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// In another format, which the reader knows.
    Bytes(Vec<u8>),
}

/// Content of one file: arrays by name, and a note.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Arrays {
    /// By name.
    pub arrays: BTreeMap<String, Numbers>,
    /// Any text, usually JSON.
    pub note: String,
}

impl Cache {
    /// A cache in a folder. The first `put` creates the folder.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned(), _temporary: None }
    }

    /// A cache in a temporary folder that is deleted when the value is dropped.
    pub fn temporary() -> Result<Self, CacheError> {
        let dir = tempfile::Builder::new().prefix("lowrank-").tempdir();
        let dir =
            dir.map_err(|source| CacheError::Io { path: std::env::temp_dir(), action: "make", source })?;
        Ok(Self { root: dir.path().to_owned(), _temporary: Some(dir) })
    }

    /// The default folder: `$XDG_CACHE_HOME/lowrank-compress`, or else `~/.cache/lowrank-compress`.
    pub fn default_root() -> Option<PathBuf> {
        let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || std::env::home_dir().filter(|home| home.is_absolute()).map(|home| home.join(".cache"));
        given.or_else(home).map(|root| root.join("lowrank-compress"))
    }

    /// The entry for a key. `key` must name everything that the numbers depend on.
    pub fn entry(&self, key: &serde_json::Value) -> Entry {
        let hash = blake3::hash(key.to_string().as_bytes()).to_hex();
        Entry { dir: self.root.join(&hash[..32]) }
    }
}

impl Entry {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.safetensors"))
    }

    /// Whether a file with this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.path(name).is_file()
    }

    /// Stores arrays under a name.
    pub fn put(&self, name: &str, content: &Arrays) -> Result<(), CacheError> {
        let path = self.path(name);
        let failed = |action| {
            let path = path.clone();
            move |source| CacheError::Io { path, action, source }
        };
        fs::create_dir_all(&self.dir).map_err(failed("make"))?;
        let bytes: Vec<(&String, Dtype, usize, Vec<u8>)> = content
            .arrays
            .iter()
            .map(|(name, numbers)| match numbers {
                Numbers::F32(values) => {
                    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    (name, Dtype::F32, values.len(), bytes)
                }
                Numbers::F64(values) => {
                    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    (name, Dtype::F64, values.len(), bytes)
                }
                Numbers::Bytes(bytes) => (name, Dtype::U8, bytes.len(), bytes.clone()),
            })
            .collect();
        let hash = hash_of(bytes.iter().map(|(name, _, _, bytes)| (name.as_str(), bytes.as_slice())));
        let views = bytes.iter().map(|(name, dtype, len, bytes)| {
            let view = TensorView::new(*dtype, vec![*len], bytes).expect("as many bytes as numbers");
            (name.as_str(), view)
        });
        let metadata =
            HashMap::from([("note".to_owned(), content.note.clone()), ("blake3".to_owned(), hash)]);
        let file = safetensors::serialize(views, Some(metadata)).expect("names are distinct");
        failpoint::hit().map_err(failed("write"))?;
        let prefix = format!(".{name}~");
        let beside = tempfile::Builder::new().prefix(&prefix).tempfile_in(&self.dir);
        let mut beside = beside.map_err(failed("write"))?;
        failpoint::hit().map_err(failed("write"))?;
        std::io::Write::write_all(&mut beside, &file).map_err(failed("write"))?;
        failpoint::hit().map_err(failed("rename"))?;
        match beside.persist(&path) {
            // Another process stored the file first and removed our temporary file as a leftover. The key is the same, so
            // the numbers are the same.
            Err(error) if error.error.kind() == ErrorKind::NotFound && path.is_file() => {}
            persisted => drop(persisted.map_err(|error| failed("rename")(error.error))?),
        }
        self.sweep(&prefix);
        Ok(())
    }

    /// Removes temporary files that killed runs left of a file that is complete now.
    fn sweep(&self, prefix: &str) {
        for left in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if left.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()) {
                // Another process may remove it first. A leftover that stays does no harm.
                let _ = fs::remove_file(left.path());
            }
        }
    }

    /// The note stored under a name, without a look at the arrays; `None` if there is none.
    pub fn note(&self, name: &str) -> Result<Option<String>, CacheError> {
        let path = self.path(name);
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = fs::File::open(&path)?;
            let mut len = [0; 8];
            file.read_exact(&mut len)?;
            let mut header = Vec::new();
            file.take(u64::from_le_bytes(len)).read_to_end(&mut header)?;
            Ok(header)
        };
        let header = match read() {
            Ok(header) => header,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(CacheError::Damaged { path });
            }
            Err(source) => return Err(CacheError::Io { path, action: "read", source }),
        };
        let header: Option<serde_json::Value> = serde_json::from_slice(&header).ok();
        let note = header.and_then(|header| Some(header["__metadata__"]["note"].as_str()?.to_owned()));
        note.map(Some).ok_or(CacheError::Damaged { path })
    }

    /// The arrays stored under a name; `None` if there are none.
    pub fn get(&self, name: &str) -> Result<Option<Arrays>, CacheError> {
        let path = self.path(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CacheError::Io { path, action: "read", source }),
        };
        Arrays::parse(&bytes).map(Some).ok_or(CacheError::Damaged { path })
    }
}

/// Hash of names, lengths and numbers, in the order of the names.
fn hash_of<'a>(parts: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, bytes) in parts {
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
    hasher.finalize().to_hex().to_string()
}

impl Arrays {
    /// Parses a file of the cache; `None` if it is damaged.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
        let metadata = header.metadata().as_ref()?;
        let file = SafeTensors::deserialize(bytes).ok()?;
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let hash = hash_of(tensors.iter().map(|(name, view)| (name.as_str(), view.data())));
        if metadata.get("blake3") != Some(&hash) {
            return None;
        }
        let mut arrays = BTreeMap::new();
        for (name, view) in tensors {
            let numbers = match view.dtype() {
                Dtype::F32 => {
                    Numbers::F32(view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
                }
                Dtype::F64 => {
                    Numbers::F64(view.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
                }
                Dtype::U8 => Numbers::Bytes(view.data().to_vec()),
                _ => return None,
            };
            arrays.insert(name, numbers);
        }
        Some(Self { arrays, note: metadata.get("note")?.clone() })
    }

    /// Removes and returns an array of f64.
    pub fn take_f64(&mut self, name: &str) -> Option<Vec<f64>> {
        match self.arrays.remove(name)? {
            Numbers::F64(values) => Some(values),
            _ => None,
        }
    }

    /// Removes and returns an array of f32.
    pub fn take_f32(&mut self, name: &str) -> Option<Vec<f32>> {
        match self.arrays.remove(name)? {
            Numbers::F32(values) => Some(values),
            _ => None,
        }
    }

    /// Removes and returns an array in another format.
    pub fn take_bytes(&mut self, name: &str) -> Option<Vec<u8>> {
        match self.arrays.remove(name)? {
            Numbers::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn some() -> Arrays {
        let mut arrays = Arrays { note: "{\"tokens\":3}".into(), ..Arrays::default() };
        arrays.arrays.insert("b".into(), Numbers::F64(vec![0.1, -0.0, f64::MIN_POSITIVE]));
        arrays.arrays.insert("a".into(), Numbers::F32(vec![1.5, f32::MAX]));
        arrays.arrays.insert("none".into(), Numbers::F64(Vec::new()));
        arrays.arrays.insert("other".into(), Numbers::Bytes(vec![0, 255, 7]));
        arrays
    }

    #[test]
    fn numbers_read_back_to_the_same_bits_under_their_key_alone() {
        let cache = Cache::temporary().unwrap();
        let entry = cache.entry(&json!({"model": 1}));
        assert!(!entry.has("x") && entry.get("x").unwrap().is_none());
        entry.put("x", &some()).unwrap();
        let again = Cache::at(&cache.root).entry(&json!({"model": 1}));
        assert!(again.has("x"));
        assert_eq!(again.get("x").unwrap(), Some(some()));
        assert_eq!((again.note("x").unwrap(), again.note("y").unwrap()), (Some(some().note), None));
        assert!(!cache.entry(&json!({"model": 2})).has("x"));
        // Nothing is left beside the file.
        assert_eq!(fs::read_dir(&entry.dir).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_run_left_goes_when_the_file_is_whole() {
        let cache = Cache::temporary().unwrap();
        let entry = cache.entry(&json!(0));
        entry.put("inputs-000-001", &some()).unwrap();
        for (left, stays) in [(".inputs-000-001~x7Qa", false), (".inputs-000-010~x7Qa", true)] {
            let left = entry.dir.join(left);
            fs::write(&left, "torn").unwrap();
            assert_eq!(entry.get("inputs-000-001").unwrap(), Some(some()));
            entry.put("inputs-000-001", &some()).unwrap();
            assert_eq!(left.exists(), stays, "{}", left.display());
        }
    }

    #[test]
    fn many_that_write_the_same_file_all_succeed_and_leave_one() {
        let cache = Cache::temporary().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let entry = cache.entry(&json!(0));
                    for _ in 0..50 {
                        entry.put("x", &some()).unwrap();
                        assert_eq!(entry.get("x").unwrap(), Some(some()));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(cache.entry(&json!(0)).dir).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_named_and_not_believed() {
        let cache = Cache::temporary().unwrap();
        let entry = cache.entry(&json!(0));
        entry.put("x", &some()).unwrap();
        let good = fs::read(entry.path("x")).unwrap();
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for bad in [&flipped[..], &good[..good.len() - 1], b"", b"no file of ours"] {
            fs::write(entry.path("x"), bad).unwrap();
            assert!(matches!(entry.get("x"), Err(CacheError::Damaged { .. })), "{} bytes", bad.len());
        }
    }

    #[test]
    fn a_temporary_cache_goes_with_its_value() {
        let cache = Cache::temporary().unwrap();
        let root = cache.root.clone();
        cache.entry(&json!(0)).put("x", &some()).unwrap();
        drop(cache);
        assert!(!root.exists());
    }
}
