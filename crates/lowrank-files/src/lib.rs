//! Small files, read and written safely: nothing is read beyond a limit, and what is written is whole or absent.
//!
//! A leaf, so that every crate can use it. Weights are read and written elsewhere, in blocks.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Before the umask, as files are made everywhere else.
const MODE: u32 = 0o666;

/// Reads a file that has an upper limit, whatever its length is said to be; `None` if it is longer.
///
/// # Errors
/// Those of opening and reading.
pub fn read_at_most(path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    rest_at_most(File::open(path)?, limit_bytes)
}

/// The rest of an open file, likewise.
///
/// # Errors
/// Those of reading.
pub fn rest_at_most(file: impl Read, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= limit_bytes).then_some(bytes))
}

/// Writes a file beside its place and renames it, replacing what is there. File and folder are flushed to the disk before
/// this returns, and a failure leaves what was there.
///
/// # Errors
/// Those of writing, flushing and renaming.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let mut beside = tempfile::Builder::new()
        .prefix(&format!(".{name}~"))
        .permissions(Permissions::from_mode(MODE))
        .tempfile_in(folder)?;
    beside.write_all(bytes)?;
    beside.as_file().sync_all()?;
    beside.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_not_beyond() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "four").unwrap();
        assert_eq!(read_at_most(&path, 4).unwrap().unwrap(), b"four");
        assert_eq!(read_at_most(&path, u64::MAX).unwrap().unwrap(), b"four");
        assert!(read_at_most(&path, 3).unwrap().is_none());
        // Endless, and of length 0 by its metadata.
        assert!(read_at_most(Path::new("/dev/zero"), 1 << 16).unwrap().is_none());
        assert!(read_at_most(&folder.path().join("b"), 4).is_err());
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.json");
        fs::write(&path, "before").unwrap();
        write_whole(&path, b"after").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o600, 0o600);
        let mine = File::create(folder.path().join("other")).unwrap().metadata().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode(), mine.permissions().mode());
        // A folder in its place: refused, and left as it is.
        fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(write_whole(&folder.path().join("taken"), b"x").is_err());
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.filter(|name| name.to_string_lossy().starts_with('.')).count(), 0);
        assert!(write_whole(&folder.path().join("no/such/file"), b"x").is_err());
    }
}
