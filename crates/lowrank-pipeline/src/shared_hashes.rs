//! The content of a base's shards, as the units of one job agreed on it: hashed once, and recognised by every machine.

use crate::PipelineError;
use lowrank_cache::{Arrays, Cache, Entry};
use lowrank_calibrate::CalibrateError;
use lowrank_reader::Checkpoint;
use lowrank_writer::report::InputFile;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Blocks of a shard that its fingerprint reads.
const BLOCKS: u64 = 64;
/// Bytes of a block.
const BLOCK_BYTES: u64 = 4096;

/// Where they lie.
#[derive(Debug)]
pub(crate) struct SharedHashes(Entry);

/// What is known of a shard.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Shard {
    #[serde(flatten)]
    file: InputFile,
    fingerprint: String,
}

impl SharedHashes {
    /// Of a base whose shards have these names.
    pub(crate) fn new(checkpoint: &Checkpoint, cache: &Cache) -> Self {
        let names: Vec<&str> = checkpoint.shards().iter().map(|shard| shard.name.as_str()).collect();
        Self(cache.entry(&json!({ "what": "shards", "config": checkpoint.config_json(), "names": names })))
    }

    fn name(shard: usize) -> String {
        format!("shard-{shard:05}")
    }

    /// Hashes a shard.
    pub(crate) fn put(&self, checkpoint: &Checkpoint, shard: usize) -> Result<(), PipelineError> {
        if self.0.has(&Self::name(shard)) {
            return Ok(());
        }
        let info = &checkpoint.shards()[shard];
        let fingerprint = fingerprint(&checkpoint.dir().join(&info.name))?;
        let sha256 = checkpoint.shard_sha256(&info.name, &mut |_| Ok::<_, PipelineError>(()))?;
        let file = InputFile { name: info.name.clone(), bytes: info.len_bytes, sha256 };
        let note = serde_json::to_string(&Shard { file, fingerprint }).expect("plain text serialises");
        let arrays = Arrays { note, ..Arrays::default() };
        Ok(self.0.put(&Self::name(shard), &arrays).map_err(CalibrateError::from)?)
    }

    /// All shards, of which this machine sees the same content.
    pub(crate) fn all(&self, checkpoint: &Checkpoint) -> Result<Vec<InputFile>, PipelineError> {
        let one = |(at, info): (usize, &lowrank_reader::ShardInfo)| {
            let name = Self::name(at);
            let note = self.0.note(&name).map_err(CalibrateError::from)?;
            let found: Option<Shard> = note.and_then(|note| serde_json::from_str(&note).ok());
            let Shard { file, fingerprint: expected } = found.ok_or(CalibrateError::NoPiece { name })?;
            let path = checkpoint.dir().join(&info.name);
            match info.len_bytes == file.bytes && fingerprint(&path)? == expected {
                true => Ok(file),
                false => Err(PipelineError::OtherShard { path }),
            }
        };
        let files: Result<Vec<InputFile>, PipelineError> =
            checkpoint.shards().iter().enumerate().map(one).collect();
        let mut files = files?;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }
}

/// Hash of a file's length and of blocks that are spread evenly over it: tells another file in milliseconds.
fn fingerprint(path: &Path) -> Result<String, PipelineError> {
    let failed = |source| PipelineError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    let mut block = [0; BLOCK_BYTES as usize];
    for at in 0..BLOCKS {
        let start = len.saturating_sub(BLOCK_BYTES) * at / (BLOCKS - 1);
        let read = (len - start).min(BLOCK_BYTES) as usize;
        file.read_exact_at(&mut block[..read], start).map_err(failed)?;
        hasher.update(&block[..read]);
    }
    Ok(hasher.finalize().to_hex().to_string())
}
