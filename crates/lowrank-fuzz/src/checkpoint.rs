//! Fuzz target for a whole checkpoint folder: config, index and headers that may contradict each other.

use crate::outcome::{refused, sign};
use crate::weights::file_of;
use lowrank_reader::{Checkpoint, ReadError};
use std::cell::RefCell;
use std::fs;
use tempfile::TempDir;

/// Separates the parts of an input: config, then one header per shard.
const SEPARATOR: &str = "\n---\n";
/// Longest shard that the target creates.
const SHARD_BYTES_MAX: u64 = 1 << 20;
/// Largest number of shards.
const SHARDS_MAX: usize = 3;

/// Makes a folder of these parts, opens it, and reads every tensor that it lists.
pub(crate) fn checkpoint(bytes: &[u8]) -> u64 {
    thread_local!(static FOLDER: RefCell<TempDir> = RefCell::new(tempfile::tempdir().expect("a folder")));
    FOLDER.with_borrow(|folder| in_folder(bytes, folder))
}

fn in_folder(bytes: &[u8], folder: &TempDir) -> u64 {
    let dir = folder.path();
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split(SEPARATOR);
    let config = parts.next().unwrap_or_default();
    let name = if config.contains("\"moe\"") { "params.json" } else { "config.json" };
    fs::write(dir.join(name), config).expect("a file");
    let headers: Vec<&str> = parts.take(SHARDS_MAX).collect();
    for (at, header) in headers.iter().enumerate() {
        let shard = match (name, headers.len()) {
            ("params.json", 1) => "consolidated.safetensors".to_owned(),
            (_, 1) => "model.safetensors".to_owned(),
            _ => format!("consolidated.{at:02}.safetensors"),
        };
        let claimed = length_of(header);
        fs::write(dir.join(shard), file_of(header.as_bytes(), claimed)).expect("a file");
    }
    let outcome = match Checkpoint::open(dir) {
        Err(error) => refused(error),
        Ok(checkpoint) => read_all(&checkpoint),
    };
    for entry in fs::read_dir(dir).expect("a folder").flatten() {
        fs::remove_file(entry.path()).expect("a file of ours");
    }
    outcome
}

/// The file length that the header implies, up to a limit.
fn length_of(json: &str) -> u64 {
    let mut file_bytes = 8 + json.len() as u64;
    for _ in 0..64 {
        match lowrank_reader::header::parse("x".as_ref(), json.as_bytes(), file_bytes) {
            Err(ReadError::TruncatedShard { end_bytes, .. })
                if end_bytes > file_bytes && end_bytes <= SHARD_BYTES_MAX =>
            {
                file_bytes = end_bytes;
            }
            _ => break,
        }
    }
    file_bytes
}

fn read_all(checkpoint: &Checkpoint) -> u64 {
    let mut elements = 0;
    for spec in checkpoint.specs() {
        match checkpoint.read_tensor(spec) {
            Ok(tensor) => {
                assert_eq!(tensor.shape(), spec.shape, "{}", spec.name);
                elements += tensor.elements() as u64;
            }
            Err(ReadError::IsFactored { .. }) => {}
            Err(error) => panic!("{}: validated, and cannot be read: {error}", spec.name),
        }
    }
    for id in checkpoint.config().matrices() {
        checkpoint.read_matrix(id).expect("validated when opened");
    }
    assert!(elements <= checkpoint.size().params, "more is read than is counted");
    sign(&format!("{:?}", checkpoint.layout()))
}
