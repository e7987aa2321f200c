//! `org/name` in the local Hugging Face cache, read as huggingface_hub reads it. Nothing is ever downloaded.
//!
//! `<cache>/models--org--name/refs/REVISION` holds the name of a folder below `snapshots/`, a commit; the revision is `main`
//! unless `org/name@REVISION` names a branch, a tag or a commit. A model that was downloaded by its commit has no ref: then
//! its only whole snapshot is meant. A ref that names a snapshot without weights, as it is left by tools that fetched only
//! the tokenizer, is refused, and the line names the whole snapshots.
//!
//! | Where a cache is looked for, in this order | |
//! |---|---|
//! | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE` | the cache |
//! | `HF_HOME` | `hub` in it |
//! | `XDG_CACHE_HOME` | `huggingface/hub` in it |
//! | `HOME` | `.cache/huggingface/hub` in it |
//! | `TRANSFORMERS_CACHE`, `PYTORCH_TRANSFORMERS_CACHE`, `PYTORCH_PRETRAINED_BERT_CACHE` | further caches, which transformers 4 uses |

use crate::error::{ReadError, clip};
use crate::index::{INDEX_BYTES_MAX, Index};
use lowrank_model::format::{CONFIG_FILE, INDEX_FILE, PARAMS_FILE};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// A folder as it is, else the snapshot of `org/name` or `org/name@revision`. `variable` reads the environment.
pub(crate) fn resolve(model: &str, variable: &dyn Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, ReadError> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.into());
    }
    if path.exists() {
        return Err(ReadError::NotAFolder { path: path.into() });
    }
    let (name, revision) = model.split_once('@').map_or((model, None), |(name, rest)| (name, Some(rest)));
    let parts: Vec<&str> = name.split('/').collect();
    let is_name = parts.len() <= 2 && parts.iter().all(|part| is_repository_name(part));
    if !is_name || revision.is_some_and(|revision| !is_revision(revision)) {
        return Err(ReadError::NoSuchModel { model: clip(model) });
    }
    let caches = cache_folders(variable);
    let folder = format!("models--{}", parts.join("--"));
    let repositories = caches.iter().map(|cache| cache.join(&folder));
    let Some(first) = repositories.clone().next() else {
        return Err(ReadError::NoCache { model: model.into() });
    };
    let Some(repository) = repositories.into_iter().find(|repository| repository.is_dir()) else {
        return Err(ReadError::NotCached { model: model.into(), looked: first });
    };
    snapshot_in(&repository, model, name, revision)
}

/// The snapshot that is meant, of a repository in the cache.
fn snapshot_in(
    repository: &Path,
    model: &str,
    name: &str,
    revision: Option<&str>,
) -> Result<PathBuf, ReadError> {
    let unusable =
        |why: String| ReadError::NoWholeSnapshot { model: model.into(), looked: repository.into(), why };
    let snapshots = repository.join("snapshots");
    let reference = revision.unwrap_or("main");
    let commit = match read_reference(&repository.join("refs").join(reference))? {
        Some(commit) => Some(commit),
        // A commit needs no ref.
        None => revision.filter(|revision| snapshots.join(revision).is_dir()).map(str::to_owned),
    };
    let whole = || {
        let mut whole: Vec<String> = fs::read_dir(&snapshots)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|commit| is_whole(&snapshots.join(commit)))
            .collect();
        whole.sort();
        whole
    };
    let offer = |whole: &[String]| match whole {
        [] => format!("fetch it with `hf download {name}`"),
        whole => {
            let named: Vec<_> = whole.iter().map(|commit| format!("`{name}@{commit}`")).collect();
            format!(
                "give {}, which {} whole",
                named.join(" or "),
                if whole.len() == 1 { "is" } else { "are" }
            )
        }
    };
    let Some(commit) = commit else {
        let whole = whole();
        return match (&whole[..], revision) {
            ([only], None) => Ok(snapshots.join(only)),
            (_, None) => Err(unusable(format!("there is no refs/main in it: {}", offer(&whole)))),
            (_, Some(revision)) => {
                Err(unusable(format!("it holds no revision `{}`: {}", clip(revision), offer(&whole))))
            }
        };
    };
    let snapshot = snapshots.join(&commit);
    if holds_weights(&snapshot) {
        return Ok(snapshot);
    }
    let state = if snapshot.is_dir() { "holds no weights" } else { "is not there" };
    Err(unusable(format!("snapshot {commit}, which `{reference}` names, {state}: {}", offer(&whole()))))
}

/// Whether there is a file of weights of any format; what is wrong with them is for others to say.
fn holds_weights(snapshot: &Path) -> bool {
    const ENDINGS: [&str; 6] = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5"];
    let Ok(entries) = fs::read_dir(snapshot) else { return false };
    entries.flatten().any(|entry| {
        entry.file_name().to_str().is_some_and(|name| ENDINGS.iter().any(|ending| name.ends_with(ending)))
    })
}

/// Whether a snapshot has a config and every shard that its index names, or weights without an index.
fn is_whole(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    if !(has(CONFIG_FILE) || has(PARAMS_FILE)) || !holds_weights(snapshot) {
        return false;
    }
    let path = snapshot.join(INDEX_FILE);
    let Ok(json) = crate::folder::read_at_most(&path, INDEX_BYTES_MAX) else { return true };
    Index::parse(&path, &json).is_ok_and(|index| index.shards().iter().all(|shard| has(shard)))
}

/// In the order of huggingface_hub, then that of transformers 4. Empty variables count as unset.
fn cache_folders(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.as_os_str().is_empty());
    let home = set("HOME");
    let folder = |name: &str| Some(expanded(set(name)?, home.as_deref(), &set));
    let hub = folder("HF_HUB_CACHE")
        .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(folder("HF_HOME")?.join("hub")))
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface").join("hub")))
        .or_else(|| Some(home.as_ref()?.join(".cache").join("huggingface").join("hub")));
    let older = ["TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE"];
    hub.into_iter().chain(older.iter().find_map(|name| folder(name))).collect()
}

/// `~`, `$NAME` and `${NAME}` as Python's `expanduser` and `expandvars` replace them; what is not set stays as it is.
fn expanded(value: PathBuf, home: Option<&Path>, set: &dyn Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let value = match (value.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => value,
    };
    let Some(mut rest) = value.to_str().filter(|text| text.contains('$')) else { return value };
    let mut text = String::new();
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let after = &rest[1..];
        let (name, len) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some((name, _)) => (name, name.len() + 3),
            None => {
                let end =
                    after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(after.len());
                (&after[..end], end + 1)
            }
        };
        match set(name).as_deref().and_then(Path::to_str) {
            Some(value) => text.push_str(value),
            None => text.push_str(&rest[..len]),
        }
        rest = &rest[len..];
    }
    (text + rest).into()
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

/// A branch, a tag, a commit or `refs/pr/1`, and no way out of the folder of refs.
fn is_revision(text: &str) -> bool {
    text.split('/').all(is_repository_name)
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
        fs::write(snapshot.join("model.safetensors"), "").unwrap();
        snapshot
    }

    /// The environment with one cache.
    fn only(cache: &Path) -> impl Fn(&str) -> Option<PathBuf> + use<> {
        let cache = cache.to_path_buf();
        move |name| (name == "HF_HUB_CACHE").then(|| cache.clone())
    }

    /// Puts a file into a snapshot, which is made if it is not there.
    fn put(cache: &Path, commit: &str, name: &str, text: &str) -> PathBuf {
        let snapshot = cache.join("models--org--name").join("snapshots").join(commit);
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join(name), text).unwrap();
        snapshot
    }

    /// A snapshot that can be opened as far as names say.
    fn put_whole(cache: &Path, commit: &str) -> PathBuf {
        put(cache, commit, "config.json", "{}");
        put(cache, commit, "model.safetensors", "")
    }

    #[test]
    fn each_variable_is_honoured_in_order() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        let order: [(&str, &str, &str); 7] = [
            ("PYTORCH_TRANSFORMERS_CACHE", "f", "f"),
            ("TRANSFORMERS_CACHE", "e", "e"),
            ("HOME", "d", "d/.cache/huggingface/hub"),
            ("XDG_CACHE_HOME", "c", "c/huggingface/hub"),
            ("HF_HOME", "~/b", "d/b/hub"),
            ("HUGGINGFACE_HUB_CACHE", "${HOME}/g/$ABSENT", "d/g/$ABSENT"),
            ("HF_HUB_CACHE", "a", "a"),
        ];
        // Each variable set beside those before it: the later in this list wins.
        for set in 1..=order.len() {
            let snapshot = cache_with_snapshot(&root.join(order[set - 1].2));
            let variable = |name: &str| {
                let (_, value, _) = order[..set].iter().find(|(variable, _, _)| *variable == name)?;
                Some(if value.starts_with(['~', '$']) { value.into() } else { root.join(value) })
            };
            assert_eq!(resolve("org/name", &variable).unwrap(), snapshot);
        }
    }

    #[test]
    fn a_model_that_was_never_downloaded_says_where_it_was_looked_for() {
        let temporary = tempfile::tempdir().unwrap();
        let error = resolve("org/name", &only(temporary.path())).unwrap_err();
        assert!(matches!(error, ReadError::NotCached { .. }));
        let expected = temporary.path().join("models--org--name");
        assert!(error.to_string().contains(expected.to_str().unwrap()), "{error}");
        assert!(matches!(resolve("org/name", &|_| None), Err(ReadError::NoCache { .. })));
    }

    #[test]
    fn a_ref_that_climbs_out_of_the_cache_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        cache_with_snapshot(temporary.path());
        let cache = only(temporary.path());
        let reference = temporary.path().join("models--org--name/refs/main");
        for lie in ["../../..", "/etc", "", "a b"] {
            fs::write(&reference, lie).unwrap();
            assert!(matches!(resolve("org/name", &cache), Err(ReadError::BadRef { .. })), "{lie}");
        }
        fs::write(&reference, "ffff").unwrap();
        assert!(matches!(resolve("org/name", &cache), Err(ReadError::NoWholeSnapshot { .. })));
    }

    #[test]
    fn a_snapshot_without_a_ref_is_used_if_it_is_the_only_whole_one() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        let cache = only(root);
        put(root, "aaaa", "config.json", "{}");
        let refused = resolve("org/name", &cache).unwrap_err().to_string();
        assert!(refused.contains("no refs/main") && refused.contains("hf download org/name"), "{refused}");
        // A shard that the index names was not fetched.
        put(
            root,
            "bbbb",
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        );
        put(root, "bbbb", "config.json", "{}");
        put(root, "bbbb", "1.safetensors", "");
        let snapshot = put_whole(root, "cccc");
        assert_eq!(resolve("org/name", &cache).unwrap(), snapshot);
        put(root, "bbbb", "2.safetensors", "");
        let refused = resolve("org/name", &cache).unwrap_err().to_string();
        assert!(refused.contains("`org/name@bbbb` or `org/name@cccc`, which are whole"), "{refused}");
    }

    #[test]
    fn a_ref_to_a_snapshot_without_weights_is_refused_with_the_whole_ones() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        let cache = only(root);
        let older = put_whole(root, "aaaa");
        put(root, "ffff", "tokenizer.json", "{}");
        let refs = root.join("models--org--name/refs");
        fs::create_dir_all(&refs).unwrap();
        fs::write(refs.join("main"), "ffff").unwrap();
        let refused = resolve("org/name", &cache).unwrap_err().to_string();
        assert!(refused.contains("ffff") && refused.contains("give `org/name@aaaa`"), "{refused}");
        assert_eq!(resolve("org/name@aaaa", &cache).unwrap(), older);
    }

    #[test]
    fn a_revision_is_a_branch_a_tag_or_a_commit() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        let cache = only(root);
        let (one, two) = (put_whole(root, "aaaa"), put_whole(root, "bbbb"));
        let refs = root.join("models--org--name/refs");
        fs::create_dir_all(refs.join("refs/pr")).unwrap();
        for (name, commit) in [("main", "aaaa"), ("v0.1", "bbbb"), ("refs/pr/1", "bbbb")] {
            fs::write(refs.join(name), format!("{commit}\n")).unwrap();
        }
        for (model, snapshot) in [
            ("org/name", &one),
            ("org/name@v0.1", &two),
            ("org/name@refs/pr/1", &two),
            ("org/name@bbbb", &two),
        ] {
            assert_eq!(resolve(model, &cache).unwrap(), *snapshot, "{model}");
        }
        let refused = resolve("org/name@v9", &cache).unwrap_err().to_string();
        assert!(refused.contains("no revision `v9`"), "{refused}");
        for model in ["org/name@", "org/name@../x", "org/name@a//b", "@main"] {
            assert!(matches!(resolve(model, &cache), Err(ReadError::NoSuchModel { .. })), "{model}");
        }
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
