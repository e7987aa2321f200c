//! The hidden sibling directory in which a checkpoint grows, and the one rename that shows it.
//!
//! `NAME` grows in `.NAME.lowrank-partial` beside it: the same file system, so the last step is a rename, and a reader
//! sees either nothing or everything. The directory itself carries an advisory lock: of two processes that write the
//! same output, the second is refused.
//!
//! ```text
//! .NAME.lowrank-partial/journal   what is finished, and of which job
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

/// Free space asked for beyond the shards: documents, tokenizer, directory blocks.
pub const SPACE_SLACK_BYTES: u64 = 32 << 20;

/// Refuses an output that exists, or cannot: to be asked before hours of work.
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
    // Some network file systems do not say.
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

/// A directory that grows out of sight. Dropped before [`StagingDir::publish`], it is removed, unless it belongs to a
/// job of which something is finished.
#[derive(Debug)]
pub struct StagingDir {
    out: PathBuf,
    parent: PathBuf,
    /// The hidden sibling.
    partial: PathBuf,
    /// What will be renamed.
    content: PathBuf,
    /// Held on the hidden sibling.
    lock: File,
    on_drop: OnDrop,
    /// Absent: nobody will go on from here.
    journal: Option<Arc<Journal>>,
    /// By an earlier run of the same job.
    finished: Finished,
    /// By this run.
    anything_new: AtomicBool,
}

/// Says whose work a staging directory holds.
#[derive(Debug)]
pub struct Naming(Option<Arc<Journal>>);

impl Naming {
    /// From here on another run of this job can go on.
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
    /// Go on from it if it belongs to the same job, else refuse.
    #[default]
    Resume,
    /// Begin anew.
    Discard,
}

impl StagingDir {
    /// Where the output grows.
    pub fn path_for(out: &Path) -> Result<PathBuf, WriteError> {
        let (parent, name) = split(out)?;
        Ok(parent.join(format!(".{name}.lowrank-partial")))
    }

    /// For work that nobody goes on from: takes the lock and empties the directory of what a killed run left behind,
    /// unless that is a job that can be resumed.
    pub fn create(out: &Path) -> Result<Self, WriteError> {
        let staging = Self::lock(out)?;
        if Finished::read(&staging.partial.join(JOURNAL))?.key.is_some() {
            return Err(WriteError::OtherJob { path: staging.partial.clone() });
        }
        staging.emptied()
    }

    /// For a job that another run may go on from, or that goes on itself. `key` may take long to find and is asked for
    /// only if there is a job to compare it with; otherwise nobody can go on from here before [`StagingDir::naming`].
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

    /// For saying whose work this is once that is known, from any thread.
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

    /// Makes or finds the directory and takes its lock; what lies in it stays.
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
            // A file system without locks: the rename still never replaces anything.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(WriteError::io(&path, "lock")(error)),
        }
        // Between open and lock, its owner may have published or removed it: then the lock is on something else now.
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

    /// Where the files are for now.
    pub fn path(&self) -> &Path {
        &self.content
    }

    /// Leaves the directory where it is when dropped, for looking into.
    pub fn keep(&mut self) {
        self.on_drop = OnDrop::Leave;
    }

    /// Removes the directory when dropped, whatever is finished: nobody can go on from it.
    pub fn discard(&mut self) {
        self.on_drop = OnDrop::Remove;
    }

    /// The hidden directory, if dropping this leaves work that a later run goes on from.
    pub fn resumable(&self) -> Option<&Path> {
        (self.on_drop == OnDrop::LeaveIfBegun && self.has_begun()).then_some(&self.partial)
    }

    fn has_begun(&self) -> bool {
        let begun = self.anything_new.load(Ordering::Relaxed)
            || !self.finished.notes.is_empty()
            || !self.finished.units.is_empty();
        begun && self.journal.as_ref().is_some_and(|journal| journal.is_named())
    }

    /// What an earlier run of this job noted under this name.
    pub fn noted(&self, name: &str) -> Option<&str> {
        self.finished.notes.get(name).map(String::as_str)
    }

    /// How many tensors' worth of work, factored or copied, an earlier run finished.
    pub fn units_finished(&self) -> usize {
        self.finished.units.len()
    }

    /// Keeps a result for a later run of this job.
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

    /// Makes sure that the bytes finished so far lie where this run would put them, and clears away what else there is.
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

    /// Makes a file of this length and takes its space from the disk, so that a full disk shows now. What an earlier
    /// run wrote into it stays.
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

    /// Makes a file with this content, on disk when this returns. `name` may have folders.
    pub fn write_file(&self, name: &Path, content: &mut dyn io::Read) -> Result<(), WriteError> {
        let plain = name.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || name.as_os_str().is_empty() {
            return Err(WriteError::FileName { name: name.to_owned() });
        }
        let path = self.content.join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(WriteError::io(folder, "create"))?;
        }
        // A new file, not `fs::copy`: the mode follows the umask, whatever it was at the source.
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

    /// Flushes every folder, then renames to the output's name. The one moment at which the output appears.
    pub fn publish(mut self) -> Result<PathBuf, WriteError> {
        sync_folders(&self.content)?;
        failpoint::hit().map_err(WriteError::io(&self.out, "rename the finished output to"))?;
        rename_new(&self.content, &self.out)?;
        // Published: whatever happens from here on, the journal is of no more use.
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
            // While the lock is held. Nothing can be said from here; a leftover is emptied by the next run.
            let _ = fs::remove_dir_all(&self.partial);
        }
        let _ = self.lock.unlock();
    }
}

/// Bytes of disk that an unfinished run of this output holds already.
pub fn held_bytes(out: &Path) -> u64 {
    let Ok(partial) = StagingDir::path_for(out) else { return 0 };
    held_bytes_in(&partial.join(CONTENT))
}

pub(crate) fn held_bytes_in(content: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(content) else { return 0 };
    entries.flatten().filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512)).sum()
}

/// Removes what is in a folder, except files whose name is to stay.
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

/// Renames without ever replacing: a plain rename would swallow an empty directory that appeared meanwhile.
fn rename_new(from: &Path, to: &Path) -> Result<(), WriteError> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(WriteError::OutExists { path: to.to_owned() }),
        // File systems without that flag.
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
        // Nothing finished: nothing is left.
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
        // As a kill leaves it.
        let mut staging = StagingDir::for_job(&out, Leftover::Resume, never).unwrap();
        staging.note("a", "1".into()).unwrap();
        staging.keep();
        drop(staging);
        let staging = StagingDir::for_job(&out, Leftover::Resume, never).unwrap();
        assert_eq!(staging.noted("a"), None);
        staging.note("a", "2".into()).unwrap();
        // Named after what it holds was noted.
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
