//! [`CheckpointWriter`]: tensors in any order from any thread, then one publication.

use crate::{
    Documents, ShardLayout, WriteError, check_out, check_space,
    layout::{PlacedTensor, Shard},
    recount::recount,
    staging::{self, StagingDir},
};
use lowrank_model::{ElementType, PivotOrder, Tensor, format};
use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// A checkpoint that grows in a hidden sibling of its final name.
#[derive(Debug)]
pub struct CheckpointWriter {
    staging: StagingDir,
    layout: ShardLayout,
    /// Claimed by the thread that writes it; every tensor of the layout has an entry.
    written: BTreeMap<String, AtomicBool>,
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

impl CheckpointWriter {
    /// Refuses an output that exists or a disk that is too full, then makes the shards at full length, headers included.
    pub fn create(out: &Path, layout: ShardLayout) -> Result<Self, WriteError> {
        check_out(out)?;
        let staging = StagingDir::create(out)?;
        check_space(staging.path(), layout.disk_bytes())?;
        for shard in layout.shards() {
            let file = staging.allocate(&shard.name, shard.file_bytes())?;
            let path = staging.path().join(&shard.name);
            file.write_all_at(&shard.header, 0).map_err(WriteError::io(&path, "write"))?;
        }
        let written = layout
            .shards()
            .iter()
            .flat_map(|shard| &shard.tensors)
            .map(|placed| (placed.tensor.name.clone(), AtomicBool::new(false)))
            .collect();
        Ok(Self { staging, layout, written })
    }

    /// Leaves the unfinished directory in place if this is dropped before [`CheckpointWriter::finish`] is done.
    pub fn keep(&mut self) {
        self.staging.keep();
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
        self.write_bytes(name, tensor.dtype().into(), tensor.shape(), tensor.bytes())
    }

    /// Writes the index of a pivoted matrix.
    pub fn write_order(&self, name: &str, order: &PivotOrder) -> Result<(), WriteError> {
        self.write_bytes(name, ElementType::Index, &[order.all().len()], &order.to_le_bytes())
    }

    fn write_bytes(
        &self,
        name: &str,
        dtype: ElementType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), WriteError> {
        let (shard, placed) = self.place(name, dtype, shape)?;
        if self.written[name].swap(true, Ordering::AcqRel) {
            return Err(WriteError::WrittenTwice { name: name.into() });
        }
        // Opened for each tensor: no limit on open files is met, however many shards there are.
        let path = self.staging.path().join(&shard.name);
        let file = OpenOptions::new().write(true).open(&path).map_err(WriteError::io(&path, "open"))?;
        file.write_all_at(bytes, shard.header.len() as u64 + placed.begin)
            .map_err(WriteError::io(&path, "write"))
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
        let Self { staging, layout, written } = self;
        let mut missing = written.iter().filter(|(_, done)| !done.load(Ordering::Acquire));
        if let Some((name, _)) = missing.next() {
            return Err(WriteError::MissingTensor { name: name.clone(), missing: 1 + missing.count() });
        }
        for shard in layout.shards() {
            staging::sync(&staging.path().join(&shard.name))?;
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
        let path = staging.publish()?;
        Ok(Published { path, params: size.params, bytes: size.bytes, shards: layout.shards().len() })
    }
}
