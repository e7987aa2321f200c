//! Reads the written headers back from disk and counts them, before anything is published.
//!
//! [`ShardLayout`] decided what to write. This module takes nothing from it except file names: it parses the headers on disk
//! with its own code, and compares.

use crate::{ShardLayout, WriteError, layout::Shard};
use lowrank_model::plan::Size;
use serde::Deserialize;
use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Counts parameters and bytes from the headers under `dir`, and checks every one against the layout.
pub fn recount(dir: &Path, layout: &ShardLayout) -> Result<Size, WriteError> {
    let mut size = Size { params: 0, bytes: 0 };
    for shard in layout.shards() {
        let found = recount_shard(&dir.join(&shard.name), shard)?;
        size.params += found.params;
        size.bytes += found.bytes;
    }
    Ok(size)
}

fn recount_shard(path: &Path, shard: &Shard) -> Result<Size, WriteError> {
    let differs = |what: String| WriteError::ReadBack { path: path.to_owned(), what };
    let mut file = File::open(path).map_err(WriteError::io(path, "open"))?;
    let file_bytes = file.metadata().map_err(WriteError::io(path, "look at"))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(WriteError::io(path, "read"))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > file_bytes.saturating_sub(8) {
        return Err(differs(format!("its header claims {header_bytes} bytes of {file_bytes}")));
    }
    let mut json = vec![0; header_bytes as usize];
    file.read_exact(&mut json).map_err(WriteError::io(path, "read"))?;
    let mut header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&json).map_err(|error| differs(format!("its header is not JSON: {error}")))?;
    if header.remove("__metadata__") != Some(serde_json::json!({ "format": "pt" })) {
        return Err(differs("its metadata is not {\"format\":\"pt\"}".into()));
    }

    let mut size = Size { params: 0, bytes: 0 };
    for placed in &shard.tensors {
        let name = &placed.tensor.name;
        let entry = header.remove(name).ok_or_else(|| differs(format!("`{name}` is absent")))?;
        let Entry { dtype, shape, data_offsets: (begin, end) } =
            serde_json::from_value(entry).map_err(|error| differs(format!("`{name}`: {error}")))?;
        let planned: Vec<u64> = placed.tensor.shape.iter().map(|&dimension| dimension as u64).collect();
        let same = dtype == placed.tensor.dtype.safetensors_name()
            && shape == planned
            && (begin, end) == (placed.begin, placed.end);
        let params: u64 = shape.iter().product();
        if !same || end - begin != params * placed.tensor.dtype.size_bytes() {
            return Err(differs(format!("`{name}` is {dtype} {shape:?} at {begin}..{end}")));
        }
        // The index of a pivoted matrix and the scales of fp8 count as bytes but not as parameters.
        if placed.tensor.dtype.is_weight() {
            size.params += params;
        }
        size.bytes += end - begin;
    }
    if let Some(name) = header.keys().next() {
        return Err(differs(format!("`{name}` is not part of it")));
    }
    // Tensors lie without gaps from 0, so their sum is where the file must end.
    let expected = 8 + header_bytes + size.bytes;
    if file_bytes != expected {
        return Err(differs(format!("it has {file_bytes} bytes instead of {expected}")));
    }
    Ok(size)
}
