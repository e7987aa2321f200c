//! The journal records the finished work of a run, so that another run can resume it. Records are lines that are appended
//! and never rewritten.
//!
//! A line is `BLAKE3 JSON`, with the hash of the JSON. Reading stops at the first invalid line: a line that a kill cut off,
//! and everything after it, is ignored. The journal is not flushed to disk. A record counts only if the bytes that it
//! describes are on disk, so after a power cut the worst case is that some work is repeated.

use crate::WriteError;
use lowrank_failpoint as failpoint;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Hash of everything that decides the bytes of an output. Two runs with the same key may share work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobKey(String);

impl JobKey {
    /// The key of the job that this value describes.
    pub fn of(description: &impl Serialize) -> Self {
        let text = serde_json::to_vec(description).expect("string keys and finite depth always serialise");
        Self(blake3::hash(&text).to_hex().to_string())
    }
}

/// A tensor that is written to its shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WrittenTensor {
    pub(crate) name: String,
    pub(crate) blake3: String,
}

/// Tensors that are computed and written together, and a note about them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unit {
    pub(crate) name: String,
    pub(crate) tensors: Vec<WrittenTensor>,
    pub(crate) note: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Record {
    /// The job that the work belongs to. Without this line, at any position, the work belongs to no job.
    Job(JobKey),
    /// Hash of the layout of the shards, known as soon as the plan is.
    Layout(String),
    /// Any other result to keep.
    Note {
        name: String,
        text: String,
    },
    Unit(Unit),
}

/// Content of a journal.
#[derive(Debug, Default)]
pub struct Finished {
    pub(crate) key: Option<JobKey>,
    pub(crate) layout: Option<String>,
    pub(crate) notes: BTreeMap<String, String>,
    pub(crate) units: BTreeMap<String, Unit>,
    /// Length of the lines that hold.
    good_bytes: u64,
}

impl Finished {
    /// Reads up to the first invalid line; a missing journal is empty.
    pub(crate) fn read(path: &Path) -> Result<Self, WriteError> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            read => read.map_err(WriteError::io(path, "read"))?,
        };
        Ok(Self::parse(&bytes))
    }

    /// Parses the valid lines, up to the first invalid one.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut finished = Self::default();
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            let Some(record) = parse(line) else { break };
            finished.good_bytes += line.len() as u64;
            match record {
                Record::Job(key) => finished.key = Some(key),
                Record::Layout(layout) => finished.layout = Some(layout),
                Record::Note { name, text } => drop(finished.notes.insert(name, text)),
                Record::Unit(unit) => drop(finished.units.insert(unit.name.clone(), unit)),
            }
        }
        finished
    }

    /// Length of the lines that hold.
    pub fn good_bytes(&self) -> u64 {
        self.good_bytes
    }
}

fn parse(line: &[u8]) -> Option<Record> {
    let line = line.strip_suffix(b"\n")?;
    let (hash, json) = line.split_at_checked(blake3::OUT_LEN * 2)?;
    let json = json.strip_prefix(b" ")?;
    (blake3::hash(json).to_hex().as_bytes() == hash).then(|| serde_json::from_slice(json).ok())?
}

/// The journal of this run, open for appending.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    named: AtomicBool,
}

impl Journal {
    /// Continues after the last valid line.
    pub(crate) fn append_to(path: PathBuf, finished: &Finished) -> Result<Self, WriteError> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(WriteError::io(&path, "open"))?;
        file.set_len(finished.good_bytes).map_err(WriteError::io(&path, "cut a torn line off"))?;
        Ok(Self { path, file: Mutex::new(file), named: finished.key.is_some().into() })
    }

    pub(crate) fn job(&self, key: &JobKey) -> Result<(), WriteError> {
        self.append(&Record::Job(key.clone()))?;
        self.named.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether it names the job that the work belongs to.
    pub(crate) fn is_named(&self) -> bool {
        self.named.load(Ordering::Acquire)
    }

    pub(crate) fn layout(&self, layout: &str) -> Result<(), WriteError> {
        self.append(&Record::Layout(layout.to_owned()))
    }

    pub(crate) fn note(&self, name: &str, text: String) -> Result<(), WriteError> {
        self.append(&Record::Note { name: name.to_owned(), text })
    }

    pub(crate) fn unit(&self, unit: Unit) -> Result<(), WriteError> {
        self.append(&Record::Unit(unit))
    }

    fn append(&self, record: &Record) -> Result<(), WriteError> {
        let json = serde_json::to_string(record).expect("records have string keys");
        let line = format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex());
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        write_in_two(&mut file, line.as_bytes()).map_err(WriteError::io(&self.path, "write"))
    }
}

/// Writes a line in two halves, so that a test can kill the run between them. One more system call per matrix costs nothing.
fn write_in_two(file: &mut File, line: &[u8]) -> io::Result<()> {
    let (head, tail) = line.split_at(line.len() / 2);
    failpoint::hit()?;
    file.write_all(head)?;
    failpoint::hit()?;
    file.write_all(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str) -> Unit {
        let tensors = vec![WrittenTensor { name: format!("{name}.weight"), blake3: "00".into() }];
        Unit { name: name.into(), tensors, note: "seen".into() }
    }

    #[test]
    fn a_torn_or_changed_line_and_all_after_it_never_happened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let key = JobKey::of(&"a job");
        let journal = Journal::append_to(path.clone(), &Finished::default()).unwrap();
        journal.job(&key).unwrap();
        journal.note("spectrum", "[1.5]".into()).unwrap();
        let before_last = fs::metadata(&path).unwrap().len();
        journal.unit(unit("a")).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in before_last as usize..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let finished = Finished::read(&path).unwrap();
            assert_eq!((finished.key.as_ref(), finished.units.len()), (Some(&key), 0), "cut at {cut}");
            assert_eq!(finished.good_bytes, before_last);
        }
        let finished = Finished::read(&path).unwrap();
        Journal::append_to(path.clone(), &finished).unwrap().unit(unit("b")).unwrap();
        let finished = Finished::read(&path).unwrap();
        assert_eq!(finished.units.keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!(finished.notes["spectrum"], "[1.5]");

        let mut changed = whole;
        changed[100] ^= 1;
        fs::write(&path, changed).unwrap();
        assert!(Finished::read(&path).unwrap().units.is_empty());
    }

    #[test]
    fn keys_follow_content() {
        assert_eq!(JobKey::of(&("a", 1)), JobKey::of(&("a", 1)));
        assert_ne!(JobKey::of(&("a", 1)), JobKey::of(&("a", 2)));
    }
}
