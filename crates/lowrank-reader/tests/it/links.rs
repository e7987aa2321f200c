//! Symbolic links, special files, and files that change while they are open.

use crate::draft::{Draft, INDEX, SHARD_1, SHARD_2, Weights, assert_refused, tiny_config};
use lowrank_model::{Dtype, Layout};
use lowrank_reader::{Checkpoint, ReadError};
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Moves a file elsewhere and leaves a link to it.
fn replace_by_link(file: &Path, target: &Path) {
    fs::rename(file, target).unwrap();
    symlink(target, file).unwrap();
}

/// A snapshot as the Hugging Face cache keeps it: every file a link to `../../blobs/…`.
fn cached(root: &Path) -> PathBuf {
    let model = root.join("models--org--tiny");
    let (snapshot, blobs) = (model.join("snapshots").join("0a1b2c"), model.join("blobs"));
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.texts.insert("tokenizer.json".into(), "{}".into());
    draft.write_to(&snapshot);
    for (at, entry) in fs::read_dir(&snapshot).unwrap().map(Result::unwrap).enumerate() {
        fs::rename(entry.path(), blobs.join(at.to_string())).unwrap();
        symlink(format!("../../blobs/{at}"), entry.path()).unwrap();
    }
    snapshot
}

#[test]
fn a_snapshot_of_the_hugging_face_cache_opens() {
    let root = tempfile::tempdir().unwrap();
    let snapshot = cached(root.path());
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    let weights = Weights::random(tiny_config(), Dtype::Bf16, 1);
    for spec in checkpoint.specs() {
        assert_eq!(checkpoint.read_tensor(spec).unwrap(), weights.tensors[&spec.name]);
    }
    assert_eq!(checkpoint.companions(), [PathBuf::from("tokenizer.json")]);

    let link = root.path().join("link");
    symlink(&snapshot, &link).unwrap();
    Checkpoint::open(&link).unwrap();
}

#[test]
fn weights_are_followed_wherever_they_lie() {
    let (root, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // A blob that was moved to another disk.
    let snapshot = cached(root.path());
    let blob = fs::canonicalize(snapshot.join(SHARD_1)).unwrap();
    replace_by_link(&blob, &disk.path().join("moved"));
    Checkpoint::open(&snapshot).unwrap();
    // A shard of a plain folder.
    let folder = Draft::of(Layout::HfPerExpert).write();
    replace_by_link(&folder.path().join(SHARD_2), &disk.path().join("2.safetensors"));
    Checkpoint::open(folder.path()).unwrap();
    // What is there is read as safetensors and as nothing else.
    fs::write(disk.path().join("2.safetensors"), "root:x:0:0:root:/root:/bin/bash").unwrap();
    assert_refused!(in folder.path(), ReadError::HeaderTooLarge { .. }, SHARD_2);
}

#[test]
fn a_download_of_an_older_hub_links_into_its_cache() {
    let (root, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for entry in fs::read_dir(cached(root.path())).unwrap().map(Result::unwrap) {
        symlink(fs::canonicalize(entry.path()).unwrap(), folder.path().join(entry.file_name())).unwrap();
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.companions(), [PathBuf::from("tokenizer.json")]);
}

#[test]
fn a_cached_repository_may_be_moved_and_linked() {
    let (root, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    cached(root.path());
    replace_by_link(&root.path().join("models--org--tiny"), &disk.path().join("tiny"));
    Checkpoint::open(&root.path().join("models--org--tiny").join("snapshots").join("0a1b2c")).unwrap();
}

#[test]
fn blobs_that_repositories_share_are_the_caches_own() {
    let root = tempfile::tempdir().unwrap();
    let snapshot = cached(root.path());
    let shared = root.path().join("blobs").join("ab");
    fs::create_dir_all(&shared).unwrap();
    let blob = fs::canonicalize(snapshot.join("tokenizer.json")).unwrap();
    replace_by_link(&blob, &shared.join("abcd"));
    assert_refused!(in &snapshot, ReadError::LeavesFolder { .. }, "tokenizer.json");
    fs::write(root.path().join("blobs").join(".huggingface-shared-blobs"), "1\n").unwrap();
    Checkpoint::open(&snapshot).unwrap();
}

#[test]
fn links_that_leave_the_folder() {
    for name in ["config.json", INDEX, "tokenizer.json", "generation_config.json"] {
        let mut draft = Draft::of(Layout::HfPerExpert);
        draft.texts.insert("tokenizer.json".into(), "{}".into());
        draft.texts.insert("generation_config.json".into(), "{}".into());
        let (folder, elsewhere) = (draft.write(), tempfile::tempdir().unwrap());
        replace_by_link(&folder.path().join(name), &elsewhere.path().join("secret"));
        assert_refused!(in folder.path(), ReadError::LeavesFolder { .. }, name, "secret");
    }
}

#[test]
fn links_of_files_that_are_not_the_models_stop_nothing() {
    let folder = Draft::of(Layout::HfPerExpert).write();
    for (name, target) in [
        ("imatrix.dat", "/nowhere"),
        ("NOTES.md", "/etc/hostname"),
        ("runs", "runs"),
        ("LICENSE", "/nowhere"),
    ] {
        symlink(target, folder.path().join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names: Vec<_> = checkpoint.left_out().iter().map(|left| left.name.as_str()).collect();
    assert_eq!(names, ["LICENSE", "NOTES.md", "imatrix.dat", "runs"]);
}

#[test]
fn links_within_the_folder_are_followed() {
    let folder = Draft::of(Layout::HfPerExpert).write();
    fs::create_dir(folder.path().join("store")).unwrap();
    replace_by_link(&folder.path().join(SHARD_1), &folder.path().join("store").join("1"));
    Checkpoint::open(folder.path()).unwrap();
}

#[test]
fn a_link_to_nothing() {
    let folder = Draft::of(Layout::HfPerExpert).write();
    fs::remove_file(folder.path().join(SHARD_1)).unwrap();
    symlink("nowhere", folder.path().join(SHARD_1)).unwrap();
    assert_refused!(in folder.path(), ReadError::DanglingLink { .. }, SHARD_1);
    fs::remove_file(folder.path().join(SHARD_1)).unwrap();
    symlink(SHARD_1, folder.path().join(SHARD_1)).unwrap();
    assert_refused!(in folder.path(), ReadError::Io { .. }, SHARD_1);
}

#[test]
fn what_is_no_file_is_not_opened() {
    let folder = Draft::of(Layout::HfPerExpert).write();
    fs::remove_file(folder.path().join(SHARD_1)).unwrap();
    fs::create_dir(folder.path().join(SHARD_1)).unwrap();
    assert_refused!(in folder.path(), ReadError::NotAFile { .. }, SHARD_1);

    let folder = Draft::of(Layout::HfPerExpert).write();
    fs::remove_file(folder.path().join(SHARD_2)).unwrap();
    let _socket = UnixListener::bind(folder.path().join(SHARD_2)).unwrap();
    assert_refused!(in folder.path(), ReadError::NotAFile { .. }, SHARD_2);
}

#[test]
fn a_model_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    assert_refused!(in &folder.path().join("absent"), ReadError::Io { .. }, "absent");
    fs::write(folder.path().join("file"), "").unwrap();
    assert_refused!(in &folder.path().join("file"), ReadError::NotAFolder { .. }, "file");
    assert_refused!(in folder.path(), ReadError::NoConfig { .. }, "config.json");
}

#[test]
fn a_shard_that_shrinks_while_it_is_open() {
    let folder = Draft::of(Layout::HfPerExpert).write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let last = checkpoint.specs().iter().find(|spec| spec.name == "model.norm.weight").unwrap();
    let path = folder.path().join(SHARD_2);
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
    for error in [
        checkpoint.read_tensor(last).unwrap_err(),
        checkpoint.shard_sha256::<ReadError>(SHARD_2, &mut |_| Ok(())).unwrap_err(),
    ] {
        assert!(matches!(error, ReadError::Shrank { .. }), "{error:?}");
        assert!(error.to_string().contains(SHARD_2), "{error}");
    }
    let message = checkpoint.read_tensor(last).unwrap_err().to_string();
    assert!(message.contains("model.norm.weight"), "{message}");
}

#[test]
fn a_shard_that_is_unlinked_while_it_is_open_can_still_be_read() {
    let folder = Draft::of(Layout::HfPerExpert).write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    fs::remove_file(folder.path().join(SHARD_2)).unwrap();
    for spec in checkpoint.specs() {
        checkpoint.read_tensor(spec).unwrap();
    }
}
