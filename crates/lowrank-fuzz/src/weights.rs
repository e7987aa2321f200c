//! Fuzz targets for the documents that describe weights: safetensors header, index, config.

use crate::outcome::{refused, sign};
use lowrank_model::{ModelConfig, Widths};
use lowrank_reader::ReadError;
use lowrank_reader::family::{self, Description};
use lowrank_reader::header::{self, Header, LENGTH_BYTES};
use lowrank_reader::index::Index;
use safetensors::SafeTensors;
use std::path::Path;

/// Files up to this length are made in memory, so that the `safetensors` crate can read them too.
const MADE_BYTES_MAX: u64 = 1 << 20;

/// The input as a whole file, and as the JSON of a header whose file has the length that the header implies.
pub(crate) fn header(bytes: &[u8]) -> u64 {
    let path = Path::new("f.safetensors");
    let mut signs = 0;
    if let Some((length, rest)) = bytes.split_first_chunk() {
        let file_bytes = bytes.len() as u64;
        signs = match header::json_len(path, *length, file_bytes) {
            Err(error) => refused(error),
            Ok(json_bytes) => of_header(header::parse(path, &rest[..json_bytes as usize], file_bytes), bytes),
        };
    }
    let without_data = LENGTH_BYTES + bytes.len() as u64;
    let mut file_bytes = without_data;
    // The error for the first tensor out of range says where it ends. Lengthen the file until it fits or another error comes.
    for _ in 0..16 {
        match header::parse(path, bytes, file_bytes) {
            Err(ReadError::TruncatedShard { end_bytes, .. }) if end_bytes > file_bytes => {
                file_bytes = end_bytes
            }
            found => {
                let made = if file_bytes <= MADE_BYTES_MAX { file_of(bytes, file_bytes) } else { Vec::new() };
                return signs ^ of_header(found, &made).rotate_left(1);
            }
        }
    }
    signs
}

/// A file with this header.
pub(crate) fn file_of(json: &[u8], file_bytes: u64) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json);
    file.resize(file_bytes as usize, 0);
    file
}

/// Checks that an accepted header covers the file without gap and overlap, and that the `safetensors` crate accepts it too.
fn of_header(found: Result<Header, ReadError>, file: &[u8]) -> u64 {
    let header = match found {
        Err(error) => return refused(error),
        Ok(header) => header,
    };
    let mut ranges: Vec<(u64, u64)> =
        header.values().map(|entry| (entry.begin, entry.begin + entry.len_bytes)).collect();
    ranges.sort_unstable();
    assert!(ranges.is_sorted_by(|a, b| a.1 == b.0), "a gap or an overlap");
    if !file.is_empty() {
        assert!(
            ranges.last().is_none_or(|last| last.1 == file.len() as u64),
            "the end of the file is not covered"
        );
        let reference =
            SafeTensors::deserialize(file).expect("the format's own crate accepts what we accept");
        assert_eq!(reference.len(), header.len());
        for (name, view) in reference.iter() {
            let entry = &header[name];
            let (begin, end) = (entry.begin as usize, (entry.begin + entry.len_bytes) as usize);
            assert_eq!(&file[begin..end], view.data());
            assert!(entry.shape.iter().map(|&d| d as usize).eq(view.shape().iter().copied()));
        }
    }
    sign("header") ^ ranges.len().min(8) as u64
}

/// Parses an index.
pub(crate) fn index(bytes: &[u8]) -> u64 {
    match Index::parse(Path::new("i.json"), bytes) {
        Err(error) => refused(error),
        Ok(index) => {
            for shard in index.shards() {
                let joined = Path::new("folder").join(shard);
                assert_eq!(joined.parent(), Some(Path::new("folder")), "{shard:?} leaves its folder");
                assert_eq!(joined.components().count(), 2, "{shard:?} leaves its folder");
            }
            sign("index")
        }
    }
}

/// Parses `config.json` and `params.json`.
pub(crate) fn config(bytes: &[u8]) -> u64 {
    let path = Path::new("c.json");
    of_description(family::from_hugging_face(path, bytes))
        ^ of_description(family::from_params(path, bytes)).rotate_left(1)
}

fn of_description(found: Result<Description, ReadError>) -> u64 {
    let described = match found {
        Err(error) => return refused(error),
        Ok(described) => described,
    };
    let config = &described.config;
    // Families that are published with a `config.json` alone have none made up.
    let made_up = config.to_hf_json();
    if !made_up.is_null() {
        let base = config.with_shared_experts(false).with_widths(Widths::default()).with_shared_bases([]);
        assert_eq!(ModelConfig::from_hf_json(&made_up), Ok(base));
    }
    let mut params = 0_u64;
    for spec in config.tensors() {
        let elements = spec.shape.iter().try_fold(1_u64, |product, &d| product.checked_mul(d as u64));
        params = elements.and_then(|elements| params.checked_add(elements)).expect("counts stay exact");
    }
    for (id, &rank) in &described.ranks {
        let shape = config.matrix_shape(*id);
        assert!(rank >= 1 && rank <= described.storage.rank_max(shape), "{id}: rank {rank} of {shape}");
    }
    sign(&format!("{:?} {}", described.layout, described.ranks.len().min(2)))
}
