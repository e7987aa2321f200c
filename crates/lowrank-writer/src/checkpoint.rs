//! [`CheckpointWriter`]: tensors in any order from any thread, then one publication.

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
use lowrank_model::{ElementType, PivotOrder, Tensor, format};
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

/// A checkpoint that grows in a hidden sibling of its final name.
#[derive(Debug)]
pub struct CheckpointWriter {
    staging: StagingDir,
    layout: ShardLayout,
    /// Claimed by the thread that writes it; every tensor of the layout has an entry.
    written: BTreeMap<String, AtomicBool>,
    /// Tensors that a shard still lacks; every shard of the layout has an entry.
    lacking: BTreeMap<String, AtomicUsize>,
    /// Shards that lack nothing, hashed by the thread that completed them while their bytes are in memory.
    complete: Mutex<BTreeMap<String, ManifestFile>>,
}

/// What now lies at the output, counted from the headers that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The output.
    pub path: PathBuf,
    /// Stored parameters.
    pub params: u64,
    /// Bytes of stored weights.
    pub bytes: u64,
    /// Files of weights.
    pub shards: usize,
}

/// What a tensor of the output holds.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Numbers of the model.
    Weights(&'a Tensor),
    /// The index of a pivoted matrix.
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
    /// Refuses an output that exists or a disk that is too full, then makes the shards at full length, headers included.
    pub fn create(out: &Path, layout: ShardLayout) -> Result<Self, WriteError> {
        Self::grow(StagingDir::create(out)?, layout)
    }

    /// Goes on in a directory that may hold work of an earlier run of the same job.
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

    /// Leaves the unfinished directory in place if this is dropped before [`CheckpointWriter::finish`] is done.
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

    /// What an earlier run of this job noted with this unit, if the bytes that it wrote are still those it wrote.
    /// Then its tensors count as written.
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

    /// What lies in the place of a tensor.
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

    /// Writes tensors that belong together, and only then notes them as finished.
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

    /// The bytes of a tensor are where they belong. Whoever brings the last of a shard hashes it.
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

    /// Begins a tensor that is handed over block by block. It is noted nowhere: to copy a tensor again is cheaper than to
    /// look whether an earlier run's copy is whole.
    pub fn begin(&self, name: &str, dtype: ElementType, shape: &[usize]) -> Result<Growing<'_>, WriteError> {
        let (file, path, begin, end) = self.open(name, dtype, shape)?;
        Ok(Growing { writer: self, name: name.to_owned(), file, path, at: begin, end })
    }

    /// Where every tensor goes.
    pub fn layout(&self) -> &ShardLayout {
        &self.layout
    }

    /// The directory in which the output grows.
    pub fn staging(&self) -> &Path {
        self.staging.path()
    }

    /// Writes one tensor of the layout to its place. From any thread, in any order, once each.
    pub fn write(&self, name: &str, tensor: &Tensor) -> Result<(), WriteError> {
        self.write_content(name, Content::Weights(tensor))?;
        self.arrived(name)
    }

    fn write_content(&self, name: &str, content: Content<'_>) -> Result<(), WriteError> {
        let (file, path, begin, _) = self.open(name, content.dtype(), &content.shape())?;
        put(&file, &path, &content.bytes(), begin)
    }

    /// The file of a tensor, open for writing, with its path and where in it the tensor begins and ends. Once each.
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
        // Opened for each tensor: no limit on open files is met, however many shards there are.
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

    /// Proves that all is there, adds the documents, and publishes. Until the last step nothing is at the output.
    pub fn finish(self, documents: Documents) -> Result<Published, WriteError> {
        let Self { staging, layout, written, complete, .. } = self;
        let mut missing = written.iter().filter(|(_, done)| !done.load(Ordering::Acquire));
        if let Some((name, _)) = missing.next() {
            return Err(WriteError::MissingTensor { name: name.clone(), missing: 1 + missing.count() });
        }
        let size = recount(staging.path(), &layout)?;
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
        documents.write(&staging)?;
        // The disk and the processor at once.
        let (flushed, manifest) = std::thread::scope(|scope| {
            let flushing = scope.spawn(|| flush(&staging, &layout));
            let complete = complete.into_inner().unwrap_or_else(PoisonError::into_inner);
            let manifest = Manifest::beyond(staging.path(), &complete);
            (flushing.join().expect("flushing does not panic"), manifest)
        });
        flushed?;
        let manifest = manifest?;
        staging.write_file(Path::new(format::MANIFEST_FILE), &mut pretty(&manifest).as_slice())?;
        let path = staging.publish()?;
        Ok(Published { path, params: size.params, bytes: size.bytes, shards: layout.shards().len() })
    }
}

/// A tensor on its way to its place.
#[derive(Debug)]
pub struct Growing<'a> {
    writer: &'a CheckpointWriter,
    name: String,
    file: File,
    path: PathBuf,
    /// In the file.
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

    /// All is there.
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
    // Linux begins to write back what it is told to drop, so the last flush has little left to wait for. What is still on
    // its way stays in memory, where it is hashed. Advice: no harm where it is not taken.
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

/// Which bytes go where.
fn fingerprint(layout: &ShardLayout) -> String {
    let mut hasher = blake3::Hasher::new();
    for shard in layout.shards() {
        hasher.update(shard.name.as_bytes()).update(&shard.header);
    }
    hasher.finalize().to_hex().to_string()
}
