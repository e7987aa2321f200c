//! The hidden directory in which a checkpoint is written, and the one rename that publishes it.
//!
//! The output `NAME` is written in `.NAME.lowrank-partial` beside it. That is on the same file system, so the last step is a
//! rename, and a reader sees either nothing or everything. The directory has an advisory lock: if two processes write the
//! same output, the second is refused.
//!
//! ```text
//! .NAME.lowrank-partial/journal   the finished work, and the job that it belongs to
//! .NAME.lowrank-partial/out/      becomes NAME
//! ```

use crate::WriteError;
use crate::journal::{Finished, JobKey, Journal, Unit};
use lowrank_failpoint as failpoint;
use rustix::{
    fs::{CWD, FallocateFlags, RenameFlags},
    io::Errno,
};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Free space needed in addition to the shards: for documents, tokenizer, directory blocks.
pub const SPACE_SLACK_BYTES: u64 = 32 << 20;

/// Refuses an output that exists or whose parent directory does not. Called before hours of work.
pub fn check_out(out: &Path) -> Result<(), WriteError> {
    let (parent, _) = split(out)?;
    if fs::symlink_metadata(out).is_ok() {
        return Err(WriteError::OutExists { path: out.to_owned() });
    }
    if !parent.is_dir() {
        return Err(WriteError::NoParent { path: parent });
    }
    Ok(())
}

/// Refuses when the file system under `parent` has less than `bytes` and some slack free for this user.
pub fn check_space(parent: &Path, bytes: u64) -> Result<(), WriteError> {
    let stat = rustix::fs::statvfs(parent)
        .map_err(|errno| WriteError::io(parent, "ask for free space")(errno.into()))?;
    // Some network file systems do not report their free space.
    if stat.f_blocks == 0 {
        return Ok(());
    }
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed_bytes = bytes.saturating_add(SPACE_SLACK_BYTES);
    if free_bytes < needed_bytes {
        return Err(WriteError::NoSpace { path: parent.to_owned(), needed_bytes, free_bytes });
    }
    Ok(())
}

/// Parent directory and file name of the output.
fn split(out: &Path) -> Result<(PathBuf, String), WriteError> {
    let name = || WriteError::OutName { path: out.to_owned() };
    let file_name = out.file_name().ok_or_else(name)?.to_str().ok_or_else(name)?;
    let parent = match out.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent, file_name.to_owned()))
}

const JOURNAL: &str = "journal";
const CONTENT: &str = "out";

/// A hidden directory that becomes the output. If it is dropped before [`StagingDir::publish`], it is removed, unless it
/// holds finished work of a job.
#[derive(Debug)]
pub struct StagingDir {
    out: PathBuf,
    parent: PathBuf,
    /// The hidden directory beside the output.
    partial: PathBuf,
    /// The directory inside it that will be renamed to the output.
    content: PathBuf,
    /// The lock on the hidden directory.
    lock: File,
    on_drop: OnDrop,
    /// Absent if no later run may resume from here.
    journal: Option<Arc<Journal>>,
    /// Work that an earlier run of the same job finished.
    finished: Finished,
    /// Whether this run has recorded anything.
    anything_new: AtomicBool,
}

/// Records the job that a staging directory belongs to.
#[derive(Debug)]
pub struct Naming(Option<Arc<Journal>>);

impl Naming {
    /// Records the job. From now on another run of this job can resume the work.
    pub fn job(self, key: &JobKey) -> Result<(), WriteError> {
        self.0.map_or(Ok(()), |journal| journal.job(key))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnDrop {
    Remove,
    Leave,
    LeaveIfBegun,
}

/// What to do with the work of an earlier run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Leftover {
    /// Resume it if it belongs to the same job, otherwise refuse.
    #[default]
    Resume,
    /// Discard it and start from the beginning.
    Discard,
}

impl StagingDir {
    /// The directory in which the output is written.
    pub fn path_for(out: &Path) -> Result<PathBuf, WriteError> {
        let (parent, name) = split(out)?;
        Ok(parent.join(format!(".{name}.lowrank-partial")))
    }

    /// Opens the directory for work that no later run resumes. Takes the lock, and removes what a killed run left behind,
    /// unless that is a job that can be resumed.
    pub fn create(out: &Path) -> Result<Self, WriteError> {
        let staging = Self::lock(out)?;
        if Finished::read(&staging.partial.join(JOURNAL))?.key.is_some() {
            return Err(WriteError::OtherJob { path: staging.partial.clone() });
        }
        staging.emptied()
    }

    /// Opens the directory for a job that resumes earlier work, or that a later run may resume. Computing `key` may take long,
    /// so it is called only if there is a job to compare with. Otherwise the work can be resumed only after
    /// [`StagingDir::naming`].
    pub fn for_job<E: From<WriteError>>(
        out: &Path,
        leftover: Leftover,
        key: impl FnOnce() -> Result<JobKey, E>,
    ) -> Result<Self, E> {
        let mut staging = Self::lock(out)?;
        let journal = staging.partial.join(JOURNAL);
        let finished = Finished::read(&journal)?;
        match &finished.key {
            Some(found) if leftover == Leftover::Resume => {
                if *found != key()? {
                    return Err(WriteError::OtherJob { path: staging.partial.clone() }.into());
                }
                let content = &staging.content;
                fs::create_dir_all(content).map_err(WriteError::io(content, "create"))?;
                staging.journal = Some(Arc::new(Journal::append_to(journal, &finished)?));
                staging.finished = finished;
            }
            _ => {
                staging = staging.emptied()?;
                staging.journal = Some(Arc::new(Journal::append_to(journal, &Finished::default())?));
            }
        }
        staging.on_drop = OnDrop::LeaveIfBegun;
        Ok(staging)
    }

    /// A handle by which any thread can record the job as soon as its key is known.
    pub fn naming(&self) -> Naming {
        Naming(self.journal.clone())
    }

    fn emptied(mut self) -> Result<Self, WriteError> {
        clear(&self.partial, |_| false)?;
        self.on_drop = OnDrop::Remove;
        failpoint::hit().map_err(WriteError::io(&self.content, "create"))?;
        fs::create_dir(&self.content).map_err(WriteError::io(&self.content, "create"))?;
        Ok(self)
    }

    /// Makes or finds the directory and takes its lock; keeps its content.
    fn lock(out: &Path) -> Result<Self, WriteError> {
        check_out(out)?;
        let (parent, _) = split(out)?;
        let path = Self::path_for(out)?;
        failpoint::hit().map_err(WriteError::io(&path, "create"))?;
        match fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made.map_err(WriteError::io(&path, "create"))?,
        }
        let found = fs::symlink_metadata(&path).map_err(WriteError::io(&path, "look at"))?;
        if !found.is_dir() {
            return Err(WriteError::StagingName { path });
        }
        let lock = OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(WriteError::io(&path, "open"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(WriteError::Busy { path }),
            // The file system has no locks. The rename still never replaces anything.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(WriteError::io(&path, "lock")(error)),
        }
        // Its owner may have published or removed it between open and lock. Then we have locked something else.
        let locked = lock.metadata().map_err(WriteError::io(&path, "look at"))?;
        match fs::symlink_metadata(&path) {
            Ok(now) if (now.dev(), now.ino()) == (locked.dev(), locked.ino()) => {}
            _ => return Err(WriteError::Busy { path }),
        }
        Ok(Self {
            out: out.to_owned(),
            parent,
            content: path.join(CONTENT),
            partial: path,
            lock,
            on_drop: OnDrop::Leave,
            journal: None,
            finished: Finished::default(),
            anything_new: AtomicBool::new(false),
        })
    }

    /// The current directory of the output's files.
    pub fn path(&self) -> &Path {
        &self.content
    }

    /// Keeps the directory when dropped, for inspection.
    pub fn keep(&mut self) {
        self.on_drop = OnDrop::Leave;
    }

    /// Removes the directory when dropped, even if some work is finished: it cannot be resumed.
    pub fn discard(&mut self) {
        self.on_drop = OnDrop::Remove;
    }

    /// The hidden directory, if dropping this value leaves work that a later run can resume.
    pub fn resumable(&self) -> Option<&Path> {
        (self.on_drop == OnDrop::LeaveIfBegun && self.has_begun()).then_some(&self.partial)
    }

    fn has_begun(&self) -> bool {
        let begun = self.anything_new.load(Ordering::Relaxed)
            || !self.finished.notes.is_empty()
            || !self.finished.units.is_empty();
        begun && self.journal.as_ref().is_some_and(|journal| journal.is_named())
    }

    /// The result that an earlier run of this job stored under this name.
    pub fn noted(&self, name: &str) -> Option<&str> {
        self.finished.notes.get(name).map(String::as_str)
    }

    /// Number of units (tensors that are recorded together) that an earlier run finished.
    pub fn units_finished(&self) -> usize {
        self.finished.units.len()
    }

    /// Stores a result for a later run of this job.
    pub fn note(&self, name: &str, text: String) -> Result<(), WriteError> {
        let Some(journal) = &self.journal else { return Ok(()) };
        journal.note(name, text)?;
        self.anything_new.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn unit(&self, name: &str) -> Option<&Unit> {
        self.finished.units.get(name)
    }

    pub(crate) fn record_unit(&self, unit: Unit) -> Result<(), WriteError> {
        let Some(journal) = &self.journal else { return Ok(()) };
        journal.unit(unit)?;
        self.anything_new.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Removes everything except shards, and refuses work whose layout differs from that of this run.
    pub(crate) fn settle(&self, layout: &str, is_shard: impl Fn(&str) -> bool) -> Result<(), WriteError> {
        clear(&self.content, is_shard)?;
        match (&self.journal, &self.finished.layout) {
            (Some(_), Some(found)) if found != layout => {
                Err(WriteError::OtherJob { path: self.partial.clone() })
            }
            (Some(journal), None) => journal.layout(layout),
            _ => Ok(()),
        }
    }

    /// Makes a file of this length and allocates its space, so that a full disk shows now. Keeps what an earlier run wrote
    /// into it.
    pub fn allocate(&self, name: &str, bytes: u64) -> Result<File, WriteError> {
        let path = self.content.join(name);
        failpoint::hit().map_err(WriteError::io(&path, "create"))?;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(WriteError::io(&path, "create"))?;
        let found = file.metadata().map_err(WriteError::io(&path, "look at"))?.len();
        if found > bytes {
            file.set_len(0).map_err(WriteError::io(&path, "set the length"))?;
        }
        failpoint::hit().map_err(WriteError::io(&path, "take space for"))?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                file.set_len(bytes).map_err(WriteError::io(&path, "set the length"))?;
            }
            Err(errno) => return Err(WriteError::io(&path, "take space for")(errno.into())),
            Ok(()) => {}
        }
        Ok(file)
    }

    /// Makes a file with this content and flushes it to disk. `name` may contain folders.
    pub fn write_file(&self, name: &Path, content: &mut dyn io::Read) -> Result<(), WriteError> {
        let plain = name.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || name.as_os_str().is_empty() {
            return Err(WriteError::FileName { name: name.to_owned() });
        }
        let path = self.content.join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(WriteError::io(folder, "create"))?;
        }
        // Make a new file instead of `fs::copy`, so that its mode follows the umask and not the source's mode.
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(|source| {
            match source.kind() {
                ErrorKind::AlreadyExists => WriteError::DuplicateFile { name: name.to_owned() },
                _ => WriteError::io(&path, "create")(source),
            }
        })?;
        failpoint::hit().map_err(WriteError::io(&path, "write"))?;
        io::copy(content, &mut file).map_err(WriteError::io(&path, "write"))?;
        failpoint::hit().map_err(WriteError::io(&path, "flush to disk"))?;
        file.flush().and_then(|()| file.sync_all()).map_err(WriteError::io(&path, "flush to disk"))
    }

    /// Flushes every folder, then renames the directory to the output's name. At this moment the output appears.
    pub fn publish(mut self) -> Result<PathBuf, WriteError> {
        sync_folders(&self.content)?;
        failpoint::hit().map_err(WriteError::io(&self.out, "rename the finished output to"))?;
        rename_new(&self.content, &self.out)?;
        // The output is published. Whatever happens now, the journal is no longer needed.
        self.on_drop = OnDrop::Remove;
        failpoint::hit().map_err(WriteError::io(&self.parent, "flush to disk"))?;
        sync(&self.parent)?;
        failpoint::published();
        Ok(self.out.clone())
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        let remove = match self.on_drop {
            OnDrop::Remove => true,
            OnDrop::Leave => false,
            OnDrop::LeaveIfBegun => !self.has_begun(),
        };
        if remove {
            // Remove it while the lock is held. An error cannot be reported from here; the next run removes a leftover.
            let _ = fs::remove_dir_all(&self.partial);
        }
        let _ = self.lock.unlock();
    }
}

/// Bytes of disk that an unfinished run of this output already occupies.
pub fn held_bytes(out: &Path) -> u64 {
    let Ok(partial) = StagingDir::path_for(out) else { return 0 };
    held_bytes_in(&partial.join(CONTENT))
}

pub(crate) fn held_bytes_in(content: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(content) else { return 0 };
    entries.flatten().filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512)).sum()
}

/// Removes the content of a folder, except files with the given names.
fn clear(folder: &Path, stays: impl Fn(&str) -> bool) -> Result<(), WriteError> {
    for entry in fs::read_dir(folder).map_err(WriteError::io(folder, "list"))? {
        let entry = entry.map_err(WriteError::io(folder, "list"))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(WriteError::io(&path, "look at"))?;
        if kind.is_file() && entry.file_name().to_str().is_some_and(&stays) {
            continue;
        }
        let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(WriteError::io(&path, "remove what an earlier run left"))?;
    }
    Ok(())
}

/// Renames without replacing anything: a plain rename would replace an empty directory that appeared meanwhile.
fn rename_new(from: &Path, to: &Path) -> Result<(), WriteError> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(WriteError::OutExists { path: to.to_owned() }),
        // The file system does not support that flag.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            check_out(to)?;
            fs::rename(from, to).map_err(WriteError::io(to, "rename the finished output to"))
        }
        Err(errno) => Err(WriteError::io(to, "rename the finished output to")(errno.into())),
    }
}

fn sync_folders(folder: &Path) -> Result<(), WriteError> {
    for entry in fs::read_dir(folder).map_err(WriteError::io(folder, "list"))? {
        let entry = entry.map_err(WriteError::io(folder, "list"))?;
        if entry.file_type().map_err(WriteError::io(&entry.path(), "look at"))?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    sync(folder)
}

/// Waits until a file or folder is on disk.
pub(crate) fn sync(path: &Path) -> Result<(), WriteError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(WriteError::io(path, "flush to disk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_that_no_disk_has_is_refused_and_none_is_granted() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(check_space(dir.path(), 1 << 60), Err(WriteError::NoSpace { .. })));
        assert!(matches!(check_space(dir.path(), u64::MAX), Err(WriteError::NoSpace { .. })));
        check_space(dir.path(), 0).unwrap();
    }

    #[test]
    fn an_output_that_exists_in_any_form_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        check_out(&out).unwrap();
        std::os::unix::fs::symlink("nowhere", &out).unwrap();
        assert!(matches!(check_out(&out), Err(WriteError::OutExists { .. })));
        fs::remove_file(&out).unwrap();
        fs::create_dir(&out).unwrap();
        assert!(matches!(StagingDir::create(&out), Err(WriteError::OutExists { .. })));
        assert!(matches!(check_out(Path::new("/")), Err(WriteError::OutName { .. })));
        assert!(matches!(check_out(&dir.path().join("no/such")), Err(WriteError::NoParent { .. })));
    }

    #[test]
    fn a_second_writer_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let first = StagingDir::create(&out).unwrap();
        assert!(matches!(StagingDir::create(&out), Err(WriteError::Busy { .. })));
        drop(first);
        StagingDir::create(&out).unwrap();
    }

    #[test]
    fn what_a_killed_run_left_is_cleared_but_only_a_directory_is() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let partial = dir.path().join(".out.lowrank-partial");
        fs::create_dir_all(partial.join("folder")).unwrap();
        fs::write(partial.join("folder/file"), "old").unwrap();
        fs::write(partial.join("shard"), "old").unwrap();
        let staging = StagingDir::create(&out).unwrap();
        assert_eq!(fs::read_dir(staging.path()).unwrap().count(), 0);
        drop(staging);
        assert!(!partial.exists());
        fs::write(&partial, "a file").unwrap();
        assert!(matches!(StagingDir::create(&out), Err(WriteError::StagingName { .. })));
        assert_eq!(fs::read(&partial).unwrap(), b"a file");
    }

    #[test]
    fn a_job_is_gone_on_with_and_another_is_refused_until_it_is_discarded() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let (mine, other) = (JobKey::of(&"mine"), JobKey::of(&"other"));
        let partial = dir.path().join(".out.lowrank-partial");
        let named = |key: &JobKey, leftover| -> Result<StagingDir, WriteError> {
            let staging = StagingDir::for_job(&out, leftover, || Ok::<_, WriteError>(key.clone()))?;
            if staging.units_finished() == 0 && staging.noted("a").is_none() {
                staging.naming().job(key)?;
            }
            Ok(staging)
        };
        // Nothing was finished, so nothing is left.
        drop(named(&mine, Leftover::Resume).unwrap());
        assert!(!partial.exists());
        let staging = named(&mine, Leftover::Resume).unwrap();
        staging.note("a", "1".into()).unwrap();
        drop(staging);
        for refused in [named(&other, Leftover::Resume), StagingDir::create(&out)] {
            assert!(matches!(refused, Err(WriteError::OtherJob { .. })));
        }
        let resumed = named(&mine, Leftover::Resume).unwrap();
        assert_eq!(resumed.noted("a"), Some("1"));
        assert_eq!(resumed.resumable(), Some(partial.as_path()));
        drop(resumed);
        let fresh = named(&mine, Leftover::Discard).unwrap();
        assert_eq!(fresh.noted("a"), None);
        fresh.note("b", "2".into()).unwrap();
        let published = fresh.publish().unwrap();
        assert_eq!(fs::read_dir(published).unwrap().count(), 0);
        assert!(!partial.exists());
    }

    #[test]
    fn work_that_nobody_has_put_a_name_to_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let partial = dir.path().join(".out.lowrank-partial");
        let never = || -> Result<JobKey, WriteError> { panic!("nothing to compare with") };
        let staging = StagingDir::for_job(&out, Leftover::Resume, never).unwrap();
        staging.note("a", "1".into()).unwrap();
        assert_eq!(staging.resumable(), None);
        drop(staging);
        assert!(!partial.exists());
        // The state that a kill leaves.
        let mut staging = StagingDir::for_job(&out, Leftover::Resume, never).unwrap();
        staging.note("a", "1".into()).unwrap();
        staging.keep();
        drop(staging);
        let staging = StagingDir::for_job(&out, Leftover::Resume, never).unwrap();
        assert_eq!(staging.noted("a"), None);
        staging.note("a", "2".into()).unwrap();
        // The job is recorded after its work.
        let mine = JobKey::of(&"mine");
        staging.naming().job(&mine).unwrap();
        assert_eq!(staging.resumable(), Some(partial.as_path()));
        drop(staging);
        let resumed = StagingDir::for_job(&out, Leftover::Resume, || Ok::<_, WriteError>(mine)).unwrap();
        assert_eq!(resumed.noted("a"), Some("2"));
    }

    #[test]
    fn publishing_never_replaces_what_appeared_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let staging = StagingDir::create(&out).unwrap();
        fs::create_dir(&out).unwrap();
        assert!(matches!(staging.publish(), Err(WriteError::OutExists { .. })));
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn names_that_lead_out_of_the_output_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let staging = StagingDir::create(&dir.path().join("out")).unwrap();
        for name in ["../x", "/x", "a/../../x", ""] {
            let written = staging.write_file(Path::new(name), &mut &b"x"[..]);
            assert!(matches!(written, Err(WriteError::FileName { .. })), "{name}");
        }
        staging.write_file(Path::new("folder/file"), &mut &b"x"[..]).unwrap();
        let again = staging.write_file(Path::new("folder/file"), &mut &b"y"[..]);
        assert!(matches!(again, Err(WriteError::DuplicateFile { .. })));
    }
}
