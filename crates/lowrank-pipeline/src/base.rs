//! Who the base model is: its public name if it was given by one, and the content of its shards.

use crate::workers::Resources;
use crate::{Interrupt, PipelineError};
use lowrank_cache::{Arrays, Cache};
use lowrank_model::Progress;
use lowrank_reader::Checkpoint;
use lowrank_writer::report::{BaseModel, InputFile};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// A file that changed less than this long ago may change again without its time of change showing it.
const SETTLED: Duration = Duration::from_secs(2);

/// Hashes every shard, several at once. A path never gets into the result.
pub fn identify(
    checkpoint: &Checkpoint,
    given: &str,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<BaseModel, PipelineError> {
    identify_with(checkpoint, given, pool, progress, interrupt, None)
}

/// As [`identify`], but a shard that was hashed before and has the same path, length, inode and time of change is not
/// read again: good enough to find what is cached, not to certify what was compressed.
pub fn identify_remembered(
    checkpoint: &Checkpoint,
    given: &str,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    interrupt: &Interrupt,
    resources: &Resources,
) -> Result<BaseModel, PipelineError> {
    identify_with(checkpoint, given, pool, progress, interrupt, Some(&resources.cache()?))
}

fn identify_with(
    checkpoint: &Checkpoint,
    given: &str,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    interrupt: &Interrupt,
    cache: Option<&Cache>,
) -> Result<BaseModel, PipelineError> {
    let shards = checkpoint.shards();
    progress.start("hash inputs", shards.iter().map(|shard| shard.len_bytes).sum(), "bytes");
    let files: Result<Vec<InputFile>, PipelineError> = pool.install(|| {
        shards
            .par_iter()
            .map(|shard| {
                interrupt.check()?;
                let sign = cache.and_then(|cache| Some((cache, sign(&checkpoint.dir().join(&shard.name))?)));
                let entry = sign.map(|(cache, sign)| cache.entry(&json!({ "what": "sha256", "of": sign })));
                let known = entry.as_ref().and_then(|entry| entry.get(HASH).ok().flatten());
                let sha256 = match known {
                    Some(known) => {
                        progress.advance(shard.len_bytes);
                        known.note
                    }
                    None => {
                        let hash =
                            checkpoint.shard_sha256(&shard.name, &mut |bytes| progress.advance(bytes))?;
                        if let Some(entry) = entry {
                            let arrays = Arrays { note: hash.clone(), ..Arrays::default() };
                            entry.put(HASH, &arrays).map_err(lowrank_calibrate::CalibrateError::from)?;
                        }
                        hash
                    }
                };
                Ok(InputFile { name: shard.name.clone(), bytes: shard.len_bytes, sha256 })
            })
            .collect()
    });
    let mut files = files?;
    progress.finish();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let in_cache = !Path::new(given).is_dir();
    let snapshot = checkpoint.dir().file_name().and_then(|name| name.to_str()).map(str::to_owned);
    Ok(BaseModel { id: in_cache.then(|| given.to_owned()), revision: snapshot.filter(|_| in_cache), files })
}

/// The file of an entry that holds a hash, as its note.
const HASH: &str = "sha256";

/// What changes when a file is changed; `None` where that cannot be said.
fn sign(path: &Path) -> Option<Value> {
    use std::os::unix::fs::MetadataExt;
    let path = path.canonicalize().ok()?;
    let metadata = path.metadata().ok()?;
    let age = SystemTime::now().duration_since(metadata.modified().ok()?).ok()?;
    (age > SETTLED).then(|| {
        let changed = (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec());
        json!({ "path": path, "bytes": metadata.len(), "inode": (metadata.dev(), metadata.ino()), "changed": changed })
    })
}
