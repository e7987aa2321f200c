//! Who the base model is: its public name if it was given by one, and the content of its shards.

use crate::workers::Resources;
use crate::{Interrupt, PipelineError};
use lowrank_cache::{Arrays, Cache};
use lowrank_model::Progress;
use lowrank_reader::{Checkpoint, ReadError};
use lowrank_writer::report::{BaseModel, InputFile};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::Scope;
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
    progress.start(STAGE, bytes(checkpoint), "bytes");
    let files = pool.install(|| {
        hash_shards(checkpoint, cache, &|bytes| {
            progress.advance(bytes);
            interrupt.check()
        })
    })?;
    progress.finish();
    Ok(named(checkpoint, given, files))
}

/// A base of this content: the name it was given by, where that is a public one.
pub(crate) fn named(checkpoint: &Checkpoint, given: &str, files: Vec<InputFile>) -> BaseModel {
    let in_cache = !Path::new(given).is_dir();
    let snapshot = checkpoint.dir().file_name().and_then(|name| name.to_str()).map(str::to_owned);
    // `org/name@revision` names the same model.
    let id = given.split_once('@').map_or(given, |(id, _)| id);
    BaseModel { id: in_cache.then(|| id.to_owned()), revision: snapshot.filter(|_| in_cache), files }
}

/// Refuses an output inside the base's folder, where it would belong to the base from then on.
pub fn check_place(checkpoint: &Checkpoint, out: &Path) -> Result<(), PipelineError> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A folder that is not there is refused elsewhere.
    let (Ok(parent), Ok(model)) = (parent.canonicalize(), checkpoint.dir().canonicalize()) else {
        return Ok(());
    };
    if !parent.starts_with(&model) {
        return Ok(());
    }
    Err(PipelineError::OutInsideModel { out: out.to_owned(), model: checkpoint.dir().to_owned() })
}

/// How the stage is called.
const STAGE: &str = "hash inputs";

fn bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.shards().iter().map(|shard| shard.len_bytes).sum()
}

/// The files of a base, known or still being hashed beside other work: whoever asks first waits.
pub struct InputHashes<'a> {
    known: OnceLock<Vec<InputFile>>,
    /// Until they are known.
    coming: Mutex<Option<Receiver<Told>>>,
    bytes: u64,
    progress: &'a dyn Progress,
}

enum Told {
    /// So many more are hashed.
    Bytes(u64),
    /// The end.
    All(Result<Vec<InputFile>, PipelineError>),
}

/// Why a thread stopped hashing.
enum Ended {
    /// Nobody listens any more.
    Unasked,
    Failed(PipelineError),
}

impl From<ReadError> for Ended {
    fn from(error: ReadError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<PipelineError> for Ended {
    fn from(error: PipelineError) -> Self {
        Self::Failed(error)
    }
}

impl<'a> InputHashes<'a> {
    /// Of files that were hashed already.
    pub fn known(files: Vec<InputFile>, progress: &'a dyn Progress) -> Self {
        Self { known: OnceLock::from(files), coming: Mutex::new(None), bytes: 0, progress }
    }

    /// Hashes in `threads` threads of its own, which end when this is dropped. `then` is told the files before anybody
    /// else is.
    pub(crate) fn begin<'scope>(
        scope: &'scope Scope<'scope, '_>,
        checkpoint: &'scope Checkpoint,
        threads: usize,
        progress: &'a dyn Progress,
        interrupt: &'scope Interrupt,
        then: impl FnOnce(&[InputFile]) -> Result<(), PipelineError> + Send + 'scope,
    ) -> Self {
        let (sender, receiver) = channel();
        scope.spawn(move || {
            let hashed = hash_beside(checkpoint, threads, interrupt, &sender);
            let told = match hashed.and_then(|files| Ok(then(&files).map(|()| files)?)) {
                Err(Ended::Unasked) => return,
                Err(Ended::Failed(error)) => Err(error),
                Ok(files) => Ok(files),
            };
            // Whoever asked may have gone since.
            let _ = sender.send(Told::All(told));
        });
        let coming = Mutex::new(Some(receiver));
        Self { known: OnceLock::new(), coming, bytes: bytes(checkpoint), progress }
    }

    /// The files; waits for the last of them.
    pub fn files(&self) -> Result<&[InputFile], PipelineError> {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(files) = self.known.get() {
            return Ok(files);
        }
        let receiver = coming.take().expect("who is told of a failure does not ask again");
        self.progress.start(STAGE, self.bytes, "bytes");
        let files = receiver.into_iter().find_map(|told| match told {
            Told::Bytes(bytes) => {
                self.progress.advance(bytes);
                None
            }
            Told::All(files) => Some(files),
        });
        let files = files.expect("the thread that hashes tells how it ends")?;
        self.progress.finish();
        Ok(self.known.get_or_init(|| files))
    }
}

fn hash_beside(
    checkpoint: &Checkpoint,
    threads: usize,
    interrupt: &Interrupt,
    sender: &Sender<Told>,
) -> Result<Vec<InputFile>, Ended> {
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|index| format!("hash-{index}"));
    let pool = pool.build().map_err(|reason| PipelineError::Threads { reason })?;
    pool.install(|| {
        hash_shards(checkpoint, None, &|bytes| {
            interrupt.check()?;
            sender.send(Told::Bytes(bytes)).map_err(|_| Ended::Unasked)
        })
    })
}

/// Every shard in the order of their names, each by one thread of the current pool; `tell` hears of bytes as they are
/// hashed, and may end it.
fn hash_shards<E: From<ReadError> + From<PipelineError> + Send>(
    checkpoint: &Checkpoint,
    cache: Option<&Cache>,
    tell: &(dyn Fn(u64) -> Result<(), E> + Sync),
) -> Result<Vec<InputFile>, E> {
    let hash = |name: &str, bytes: u64| -> Result<String, E> {
        let sign = cache.and_then(|cache| Some((cache, sign(&checkpoint.dir().join(name))?)));
        let entry = sign.map(|(cache, sign)| cache.entry(&json!({ "what": "sha256", "of": sign })));
        if let Some(known) = entry.as_ref().and_then(|entry| entry.get(HASH).ok().flatten()) {
            tell(bytes)?;
            return Ok(known.note);
        }
        let hash = checkpoint.shard_sha256(name, &mut |bytes| tell(bytes))?;
        if let Some(entry) = entry {
            let arrays = Arrays { note: hash.clone(), ..Arrays::default() };
            entry
                .put(HASH, &arrays)
                .map_err(lowrank_calibrate::CalibrateError::from)
                .map_err(PipelineError::from)?;
        }
        Ok(hash)
    };
    let files: Result<Vec<InputFile>, E> = checkpoint
        .shards()
        .par_iter()
        .map(|shard| {
            let (name, bytes) = (shard.name.clone(), shard.len_bytes);
            Ok(InputFile { sha256: hash(&name, bytes)?, name, bytes })
        })
        .collect();
    let mut files = files?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
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

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::progress::Silent;

    fn tiny() -> Checkpoint {
        Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral"))
            .unwrap()
    }

    #[test]
    fn hashes_made_beside_other_work_are_those_made_before_it() {
        let (checkpoint, interrupt) = (tiny(), Interrupt::default());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let before = identify(&checkpoint, "org/tiny", &pool, &Silent, &interrupt).unwrap();
        let told = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let then = |files: &[InputFile]| {
                told.lock().unwrap().extend(files.to_vec());
                Ok(())
            };
            let inputs = InputHashes::begin(scope, &checkpoint, 2, &Silent, &interrupt, then);
            assert_eq!(inputs.files().unwrap(), before.files);
            assert_eq!(*told.lock().unwrap(), before.files, "told before anybody else");
            assert_eq!(inputs.files().unwrap(), before.files, "as often as anybody asks");
        });
    }

    #[test]
    fn who_asks_is_told_why_there_are_none() {
        let (checkpoint, interrupt) = (tiny(), Interrupt::default());
        interrupt.handle().store(2, std::sync::atomic::Ordering::Relaxed);
        std::thread::scope(|scope| {
            let inputs = InputHashes::begin(scope, &checkpoint, 1, &Silent, &interrupt, |_| unreachable!());
            assert!(matches!(inputs.files(), Err(PipelineError::Interrupted { signal: 2 })));
        });
        let interrupt = Interrupt::default();
        std::thread::scope(|scope| {
            let then = |_: &[InputFile]| Err(PipelineError::NothingToMeasureOn);
            let inputs = InputHashes::begin(scope, &checkpoint, 1, &Silent, &interrupt, then);
            assert!(matches!(inputs.files(), Err(PipelineError::NothingToMeasureOn)));
        });
    }
}
