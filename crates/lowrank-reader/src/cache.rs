//! `org/name` in the local Hugging Face cache. Nothing is ever downloaded.
//!
//! `<cache>/models--org--name/refs/main` holds the name of a folder below `snapshots/`.

use crate::error::{ReadError, clip};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// A folder as it is, else the newest snapshot of `org/name`. `variable` reads the environment.
pub(crate) fn resolve(model: &str, variable: &dyn Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, ReadError> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.into());
    }
    if path.exists() {
        return Err(ReadError::NotAFolder { path: path.into() });
    }
    let parts: Vec<&str> = model.split('/').collect();
    if parts.len() > 2 || !parts.iter().all(|part| is_repository_name(part)) {
        return Err(ReadError::NoSuchModel { model: clip(model) });
    }
    let Some(cache) = cache_folder(variable) else {
        return Err(ReadError::NoCache { model: model.into() });
    };
    let repository = cache.join(format!("models--{}", parts.join("--")));
    let reference = repository.join("refs").join("main");
    let Some(sha) = read_reference(&reference)? else {
        return Err(ReadError::NotCached { model: model.into(), looked: reference });
    };
    let snapshot = repository.join("snapshots").join(&sha);
    if !snapshot.is_dir() {
        return Err(ReadError::NotCached { model: model.into(), looked: snapshot });
    }
    Ok(snapshot)
}

/// The order of huggingface_hub. Empty variables count as unset.
fn cache_folder(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let home = variable("HOME").filter(|value| !value.as_os_str().is_empty());
    let folder = |name: &str| {
        let value = variable(name).filter(|value| !value.as_os_str().is_empty())?;
        match (value.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => Some(home.join(rest)),
            _ => Some(value),
        }
    };
    folder("HF_HUB_CACHE")
        .or_else(|| Some(folder("HF_HOME")?.join("hub")))
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface").join("hub")))
        .or_else(|| Some(home.as_ref()?.join(".cache").join("huggingface").join("hub")))
}

/// The commit that a ref names; `None` when there is no such ref.
fn read_reference(path: &Path) -> Result<Option<String>, ReadError> {
    const BYTES_MAX: u64 = 256;
    let io = |source| ReadError::Io { path: path.into(), source };
    let file = match File::open(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        other => other.map_err(io)?,
    };
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text).map_err(io)?;
    let text = String::from_utf8_lossy(&text);
    let sha = text.trim();
    if sha.is_empty() || !sha.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(ReadError::BadRef { path: path.into(), found: clip(sha) });
    }
    Ok(Some(sha.into()))
}

/// What the Hub allows: letters, digits, `-`, `_`, `.`; not a dot at either end.
fn is_repository_name(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && !part.ends_with('.')
        && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A cache with one snapshot of `org/name`; returns the snapshot.
    fn cache_with_snapshot(cache: &Path) -> PathBuf {
        let repository = cache.join("models--org--name");
        let snapshot = repository.join("snapshots").join("0123abcd");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs").join("main"), "0123abcd").unwrap();
        snapshot
    }

    #[test]
    fn each_variable_is_honoured_in_order() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        let order: [(&str, &str, &str); 4] = [
            ("HOME", "d", "d/.cache/huggingface/hub"),
            ("XDG_CACHE_HOME", "c", "c/huggingface/hub"),
            ("HF_HOME", "~/b", "d/b/hub"),
            ("HF_HUB_CACHE", "a", "a"),
        ];
        // Each variable set beside those before it: the later in this list wins.
        for set in 1..=order.len() {
            let snapshot = cache_with_snapshot(&root.join(order[set - 1].2));
            let variable = |name: &str| {
                let (_, value, _) = order[..set].iter().find(|(variable, _, _)| *variable == name)?;
                Some(if value.starts_with('~') { value.into() } else { root.join(value) })
            };
            assert_eq!(resolve("org/name", &variable).unwrap(), snapshot);
        }
    }

    #[test]
    fn a_model_that_was_never_downloaded_says_where_it_was_looked_for() {
        let temporary = tempfile::tempdir().unwrap();
        let cache = |name: &str| (name == "HF_HUB_CACHE").then(|| temporary.path().to_path_buf());
        let error = resolve("org/name", &cache).unwrap_err();
        assert!(matches!(error, ReadError::NotCached { .. }));
        let expected = temporary.path().join("models--org--name/refs/main");
        assert!(error.to_string().contains(expected.to_str().unwrap()), "{error}");
        assert!(matches!(resolve("org/name", &|_| None), Err(ReadError::NoCache { .. })));
    }

    #[test]
    fn a_ref_that_climbs_out_of_the_cache_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        cache_with_snapshot(temporary.path());
        let cache = |name: &str| (name == "HF_HUB_CACHE").then(|| temporary.path().to_path_buf());
        let reference = temporary.path().join("models--org--name/refs/main");
        for lie in ["../../..", "/etc", "", "a b"] {
            fs::write(&reference, lie).unwrap();
            assert!(matches!(resolve("org/name", &cache), Err(ReadError::BadRef { .. })), "{lie}");
        }
        fs::write(&reference, "ffff").unwrap();
        assert!(matches!(resolve("org/name", &cache), Err(ReadError::NotCached { .. })));
    }

    #[test]
    fn names_that_are_no_repository_are_not_looked_up() {
        for name in ["../x", "a/b/c", "/nowhere/at/all", "", "a//b", "a/..", "a b"] {
            assert!(matches!(resolve(name, &|_| None), Err(ReadError::NoSuchModel { .. })), "{name}");
        }
        let temporary = tempfile::NamedTempFile::new().unwrap();
        let file = temporary.path().to_str().unwrap();
        assert!(matches!(resolve(file, &|_| None), Err(ReadError::NotAFolder { .. })));
        assert_eq!(resolve(".", &|_| None).unwrap(), Path::new("."));
    }
}
