//! Who the base model is: its public name if it was given by one, and the content of its shards.

use crate::{Interrupt, PipelineError};
use lowrank_model::Progress;
use lowrank_reader::Checkpoint;
use lowrank_writer::report::{BaseModel, InputFile};
use rayon::prelude::*;

/// Hashes every shard, several at once. A path never gets into the result.
pub fn identify(
    checkpoint: &Checkpoint,
    given: &str,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<BaseModel, PipelineError> {
    let shards = checkpoint.shards();
    progress.start("hash inputs", shards.iter().map(|shard| shard.len_bytes).sum(), "bytes");
    let files: Result<Vec<InputFile>, PipelineError> = pool.install(|| {
        shards
            .par_iter()
            .map(|shard| {
                interrupt.check()?;
                let sha256 = checkpoint.shard_sha256(&shard.name, &mut |bytes| progress.advance(bytes))?;
                Ok(InputFile { name: shard.name.clone(), bytes: shard.len_bytes, sha256 })
            })
            .collect()
    });
    let mut files = files?;
    progress.finish();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let in_cache = !std::path::Path::new(given).is_dir();
    let snapshot = checkpoint.dir().file_name().and_then(|name| name.to_str()).map(str::to_owned);
    Ok(BaseModel { id: in_cache.then(|| given.to_owned()), revision: snapshot.filter(|_| in_cache), files })
}
