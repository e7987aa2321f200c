//! The hidden sibling directory in which a checkpoint grows, and the one rename that shows it.
//!
//! `NAME` grows in `.NAME.lowrank-partial` beside it: the same file system, so the last step is a rename, and a reader
//! sees either nothing or everything. The directory itself carries an advisory lock: of two processes that write the
//! same output, the second is refused.

use crate::WriteError;
use rustix::{
    fs::{CWD, FallocateFlags, RenameFlags},
    io::Errno,
};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Component, Path, PathBuf},
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

/// A directory that grows out of sight. Dropped before [`StagingDir::publish`], it is removed.
#[derive(Debug)]
pub struct StagingDir {
    out: PathBuf,
    parent: PathBuf,
    path: PathBuf,
    /// Holds the lock; the directory keeps it through the rename.
    lock: File,
    on_drop: OnDrop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnDrop {
    Remove,
    Leave,
}

impl StagingDir {
    /// Where the output grows.
    pub fn path_for(out: &Path) -> Result<PathBuf, WriteError> {
        let (parent, name) = split(out)?;
        Ok(parent.join(format!(".{name}.lowrank-partial")))
    }

    /// Makes the directory, takes its lock, and empties it of what a killed run left behind.
    pub fn create(out: &Path) -> Result<Self, WriteError> {
        let staging = Self::open(out)?;
        for entry in fs::read_dir(&staging.path).map_err(WriteError::io(&staging.path, "list"))? {
            let entry = entry.map_err(WriteError::io(&staging.path, "list"))?;
            let path = entry.path();
            let is_dir = entry.file_type().map_err(WriteError::io(&path, "look at"))?.is_dir();
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(WriteError::io(&path, "remove what an earlier run left"))?;
        }
        Ok(staging)
    }

    /// Makes or finds the directory and takes its lock; what lies in it stays.
    pub fn open(out: &Path) -> Result<Self, WriteError> {
        check_out(out)?;
        let (parent, _) = split(out)?;
        let path = Self::path_for(out)?;
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
        Ok(Self { out: out.to_owned(), parent, path, lock, on_drop: OnDrop::Remove })
    }

    /// Where the files are for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the directory where it is when dropped: for looking into, or for going on later.
    pub fn keep(&mut self) {
        self.on_drop = OnDrop::Leave;
    }

    /// Makes a file of this length and takes its space from the disk, so that a full disk shows now.
    pub fn allocate(&self, name: &str, bytes: u64) -> Result<File, WriteError> {
        let path = self.path.join(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(WriteError::io(&path, "create"))?;
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
        let path = self.path.join(name);
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
        io::copy(content, &mut file).map_err(WriteError::io(&path, "write"))?;
        file.flush().and_then(|()| file.sync_all()).map_err(WriteError::io(&path, "flush to disk"))
    }

    /// Flushes every folder, then renames to the output's name. The one moment at which the output appears.
    pub fn publish(mut self) -> Result<PathBuf, WriteError> {
        sync_folders(&self.path)?;
        rename_new(&self.path, &self.out)?;
        self.on_drop = OnDrop::Leave;
        sync(&self.parent)?;
        Ok(self.out.clone())
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::Remove {
            // While the lock is held. Nothing can be said from here; a leftover is emptied by the next run.
            let _ = fs::remove_dir_all(&self.path);
        }
        let _ = self.lock.unlock();
    }
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
