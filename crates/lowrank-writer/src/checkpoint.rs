//! [`CheckpointWriter`] takes tensors in any order from any thread, and then publishes the checkpoint in one step.

use crate::{
    Documents, ShardLayout, WriteError, check_space,
    documents::pretty,
    journal::{Unit, WrittenTensor},
    layout::{PlacedTensor, Shard},
    manifest::{Manifest, ManifestFile},
    recount::recount,
    staging::{self, StagingDir},
};
use lowrank_failpoint as failpoint;
use lowrank_model::{ElementType, PivotOrder, Tensor, format, plan::Size};
use rustix::fs::Advice;
use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{File, OpenOptions},
    num::NonZeroU64,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// A checkpoint that is written in a hidden directory beside its final name.
#[derive(Debug)]
pub struct CheckpointWriter {
    staging: StagingDir,
    layout: ShardLayout,
    /// Whether a thread has begun to write the tensor; every tensor of the layout has an entry.
    written: BTreeMap<String, AtomicBool>,
    /// Number of tensors that a shard still lacks; every shard of the layout has an entry.
    lacking: BTreeMap<String, AtomicUsize>,
    /// Hashes of complete shards. The thread that completes a shard hashes it, while its bytes are still in memory.
    complete: Mutex<BTreeMap<String, ManifestFile>>,
}

/// The published output, counted from the headers that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its path.
    pub path: PathBuf,
    /// Stored parameters.
    pub params: u64,
    /// Bytes of stored weights.
    pub bytes: u64,
    /// Files of weights.
    pub shards: usize,
}

/// Kind of content of an output tensor.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Weights of the model.
    Weights(&'a Tensor),
    /// Index of a pivoted matrix.
    Order(&'a PivotOrder),
}

impl Content<'_> {
    fn dtype(self) -> ElementType {
        match self {
            Self::Weights(tensor) => tensor.dtype().into(),
            Self::Order(_) => ElementType::Index,
        }
    }

    fn shape(self) -> Vec<usize> {
        match self {
            Self::Weights(tensor) => tensor.shape().to_vec(),
            Self::Order(order) => vec![order.all().len()],
        }
    }

    fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Weights(tensor) => Cow::Borrowed(tensor.bytes()),
            Self::Order(order) => Cow::Owned(order.to_le_bytes()),
        }
    }
}

impl CheckpointWriter {
    /// Creates the shards at full length, headers included. Refuses an output that exists and a disk without enough space.
    pub fn create(out: &Path, layout: ShardLayout) -> Result<Self, WriteError> {
        Self::grow(StagingDir::create(out)?, layout)
    }

    /// As [`CheckpointWriter::create`], in a directory that may hold work of an earlier run of the same job.
    pub fn grow(staging: StagingDir, layout: ShardLayout) -> Result<Self, WriteError> {
        let is_shard = |name: &str| layout.shards().iter().any(|shard| shard.name == name);
        staging.settle(&fingerprint(&layout), is_shard)?;
        let held = staging::held_bytes_in(staging.path());
        check_space(staging.path(), layout.disk_bytes().saturating_sub(held))?;
        for shard in layout.shards() {
            let file = staging.allocate(&shard.name, shard.file_bytes())?;
            let path = staging.path().join(&shard.name);
            failpoint::hit().map_err(WriteError::io(&path, "write"))?;
            file.write_all_at(&shard.header, 0).map_err(WriteError::io(&path, "write"))?;
        }
        let written = layout
            .shards()
            .iter()
            .flat_map(|shard| &shard.tensors)
            .map(|placed| (placed.tensor.name.clone(), AtomicBool::new(false)))
            .collect();
        let lacking =
            layout.shards().iter().map(|shard| (shard.name.clone(), shard.tensors.len().into())).collect();
        Ok(Self { staging, layout, written, lacking, complete: Mutex::default() })
    }

    /// Keeps the unfinished directory if this value is dropped before [`CheckpointWriter::finish`] returns.
    pub fn keep(&mut self) {
        self.staging.keep();
    }

    /// See [`StagingDir::discard`].
    pub fn discard(&mut self) {
        self.staging.discard();
    }

    /// See [`StagingDir::resumable`].
    pub fn resumable(&self) -> Option<&Path> {
        self.staging.resumable()
    }

    /// The note that an earlier run of this job stored with this unit, if the bytes on disk are still the ones it wrote.
    /// The unit's tensors then count as written.
    pub fn finished(&self, unit: &str) -> Result<Option<&str>, WriteError> {
        let Some(unit) = self.staging.unit(unit) else { return Ok(None) };
        for WrittenTensor { name, blake3 } in &unit.tensors {
            if self.layout.find(name).is_none() {
                return Ok(None);
            }
            let bytes = self.read(name)?;
            if blake3::hash(&bytes).to_hex().as_str() != blake3 {
                return Ok(None);
            }
        }
        for WrittenTensor { name, .. } in &unit.tensors {
            if self.written[name].swap(true, Ordering::AcqRel) {
                return Err(WriteError::WrittenTwice { name: name.clone() });
            }
            self.arrived(name)?;
        }
        Ok(Some(&unit.note))
    }

    /// The bytes on disk at the place of a tensor.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, WriteError> {
        let (shard, placed) =
            self.layout.find(name).ok_or_else(|| WriteError::UnknownTensor { name: name.into() })?;
        let path = self.staging.path().join(&shard.name);
        let file = File::open(&path).map_err(WriteError::io(&path, "open"))?;
        let mut bytes = vec![0; (placed.end - placed.begin) as usize];
        file.read_exact_at(&mut bytes, shard.header.len() as u64 + placed.begin)
            .map_err(WriteError::io(&path, "read"))?;
        Ok(bytes)
    }

    /// Writes tensors that belong together, and then records them as finished.
    pub fn write_unit(
        &self,
        unit: &str,
        tensors: &[(&str, Content<'_>)],
        note: String,
    ) -> Result<(), WriteError> {
        for &(name, content) in tensors {
            self.write_content(name, content)?;
        }
        let hashed = |&(name, content): &(&str, Content<'_>)| WrittenTensor {
            name: name.to_owned(),
            blake3: blake3::hash(&content.bytes()).to_hex().to_string(),
        };
        let written = tensors.iter().map(hashed).collect();
        self.staging.record_unit(Unit { name: unit.to_owned(), tensors: written, note })?;
        tensors.iter().try_for_each(|(name, _)| self.arrived(name))
    }

    /// Marks a tensor as written. The thread that writes the last tensor of a shard hashes the shard.
    fn arrived(&self, name: &str) -> Result<(), WriteError> {
        let (shard, _) =
            self.layout.find(name).ok_or_else(|| WriteError::UnknownTensor { name: name.into() })?;
        if self.lacking[&shard.name].fetch_sub(1, Ordering::AcqRel) == 1 {
            let hashed = ManifestFile::of(self.staging.path(), shard.name.clone())?;
            let mut complete = self.complete.lock().unwrap_or_else(PoisonError::into_inner);
            complete.insert(shard.name.clone(), hashed);
        }
        Ok(())
    }

    /// Begins a tensor that is written block by block. The journal does not record it: copying a tensor again costs less than
    /// checking whether an earlier run's copy is complete.
    pub fn begin(&self, name: &str, dtype: ElementType, shape: &[usize]) -> Result<Growing<'_>, WriteError> {
        let (file, path, begin, end) = self.open(name, dtype, shape)?;
        Ok(Growing { writer: self, name: name.to_owned(), file, path, at: begin, end })
    }

    /// The place of every tensor.
    pub fn layout(&self) -> &ShardLayout {
        &self.layout
    }

    /// The directory in which the output is written.
    pub fn staging(&self) -> &Path {
        self.staging.path()
    }

    /// Writes one tensor of the layout to its place. Threads may write tensors in any order, but each tensor only once.
    pub fn write(&self, name: &str, tensor: &Tensor) -> Result<(), WriteError> {
        self.write_content(name, Content::Weights(tensor))?;
        self.arrived(name)
    }

    fn write_content(&self, name: &str, content: Content<'_>) -> Result<(), WriteError> {
        let (file, path, begin, _) = self.open(name, content.dtype(), &content.shape())?;
        put(&file, &path, &content.bytes(), begin)
    }

    /// The file of a tensor, open for writing, with its path and the tensor's range of bytes. Once per tensor.
    fn open(
        &self,
        name: &str,
        dtype: ElementType,
        shape: &[usize],
    ) -> Result<(File, PathBuf, u64, u64), WriteError> {
        let (shard, placed) = self.place(name, dtype, shape)?;
        if self.written[name].swap(true, Ordering::AcqRel) {
            return Err(WriteError::WrittenTwice { name: name.into() });
        }
        // Opened for each tensor, so that the number of shards never reaches the limit on open files.
        let path = self.staging.path().join(&shard.name);
        let file = OpenOptions::new().write(true).open(&path).map_err(WriteError::io(&path, "open"))?;
        let header = shard.header.len() as u64;
        Ok((file, path, header + placed.begin, header + placed.end))
    }

    fn place(
        &self,
        name: &str,
        dtype: ElementType,
        shape: &[usize],
    ) -> Result<(&Shard, &PlacedTensor), WriteError> {
        let (shard, placed) =
            self.layout.find(name).ok_or_else(|| WriteError::UnknownTensor { name: name.into() })?;
        let planned = &placed.tensor;
        if planned.shape != shape {
            return Err(WriteError::Shape {
                name: name.into(),
                planned: planned.shape.clone(),
                found: shape.to_vec(),
            });
        }
        if planned.dtype != dtype {
            return Err(WriteError::Dtype { name: name.into(), planned: planned.dtype, found: dtype });
        }
        Ok((shard, placed))
    }

    /// Checks that every tensor is written, adds the documents, and publishes. Until the last step the output does not exist.
    /// After an error that a second run would meet again, nothing is left to resume.
    pub fn finish(mut self, documents: Documents) -> Result<Published, WriteError> {
        let size = match self.make_ready(documents) {
            Ok(size) => size,
            Err(error) => {
                if !error.kind().is_passing() {
                    self.discard();
                }
                return Err(error);
            }
        };
        let Self { staging, layout, .. } = self;
        let path = staging.publish()?;
        Ok(Published { path, params: size.params, bytes: size.bytes, shards: layout.shards().len() })
    }

    /// Everything but the last step; returns what the headers on disk hold.
    fn make_ready(&mut self, documents: Documents) -> Result<Size, WriteError> {
        let Self { staging, layout, written, complete, .. } = self;
        let mut missing = written.iter().filter(|(_, done)| !done.load(Ordering::Acquire));
        if let Some((name, _)) = missing.next() {
            return Err(WriteError::MissingTensor { name: name.clone(), missing: 1 + missing.count() });
        }
        let size = recount(staging.path(), layout)?;
        if let Some(promised) = documents.promised {
            for (what, promised, found) in
                [("parameters", promised.params, size.params), ("bytes", promised.bytes, size.bytes)]
            {
                if promised != found {
                    return Err(WriteError::Promise { what, promised, found });
                }
            }
        }
        staging.write_file(Path::new(format::INDEX_FILE), &mut layout.index_json().as_slice())?;
        documents.write(staging)?;
        // Flush and hash at the same time: one uses the disk, the other the processor.
        let (flushed, manifest) = std::thread::scope(|scope| {
            let flushing = scope.spawn(|| flush(staging, layout));
            let complete = complete.get_mut().unwrap_or_else(PoisonError::into_inner);
            let manifest = Manifest::beyond(staging.path(), complete);
            (flushing.join().expect("flushing does not panic"), manifest)
        });
        flushed?;
        let manifest = manifest?;
        staging.write_file(Path::new(format::MANIFEST_FILE), &mut pretty(&manifest).as_slice())?;
        Ok(size)
    }
}

/// A tensor that is being written block by block.
#[derive(Debug)]
pub struct Growing<'a> {
    writer: &'a CheckpointWriter,
    name: String,
    file: File,
    path: PathBuf,
    /// Position in the file.
    at: u64,
    end: u64,
}

impl Growing<'_> {
    /// Writes the next bytes.
    pub fn write(&mut self, block: &[u8]) -> Result<(), WriteError> {
        if block.len() as u64 > self.end - self.at {
            return Err(WriteError::Length { name: self.name.clone() });
        }
        put(&self.file, &self.path, block, self.at)?;
        self.at += block.len() as u64;
        Ok(())
    }

    /// Ends the tensor; all its bytes must be written.
    pub fn finish(self) -> Result<(), WriteError> {
        if self.at != self.end {
            return Err(WriteError::Length { name: self.name });
        }
        self.writer.arrived(&self.name)
    }
}

fn put(file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
    failpoint::hit().map_err(WriteError::io(path, "write"))?;
    file.write_all_at(bytes, offset).map_err(WriteError::io(path, "write"))?;
    // Linux begins to write back a range that it is advised to drop, so the last flush has little left to write. Until it is
    // written, the range stays in memory, where it is hashed. A system that ignores this advice does no harm.
    let _ = rustix::fs::fadvise(file, offset, NonZeroU64::new(bytes.len() as u64), Advice::DontNeed);
    Ok(())
}

/// Waits until every shard is on disk.
fn flush(staging: &StagingDir, layout: &ShardLayout) -> Result<(), WriteError> {
    for shard in layout.shards() {
        failpoint::hit().map_err(WriteError::io(staging.path(), "flush to disk"))?;
        staging::sync(&staging.path().join(&shard.name))?;
    }
    Ok(())
}

/// Hash of the layout: of the place of every byte.
fn fingerprint(layout: &ShardLayout) -> String {
    let mut hasher = blake3::Hasher::new();
    for shard in layout.shards() {
        hasher.update(shard.name.as_bytes()).update(&shard.header);
    }
    hasher.finalize().to_hex().to_string()
}
