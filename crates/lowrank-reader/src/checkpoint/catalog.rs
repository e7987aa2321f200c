//! Every tensor of every shard, held against the index.

use crate::error::ReadError;
use crate::header::{Header, HeaderEntry, TENSORS_MAX};
use crate::index::Index;
use crate::shards::Shard;
use lowrank_model::ModelConfig;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A tensor that is in the files but not in the model. It is neither counted nor carried over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IgnoredTensor {
    /// File name of the shard.
    pub shard: String,
    /// Name in the checkpoint.
    pub tensor: String,
    /// Why it can be left out.
    pub why: &'static str,
}

/// Every tensor of every shard by its stored name.
pub(super) struct Catalog<'a> {
    pub(super) shards: &'a [Shard],
    pub(super) entries: BTreeMap<String, (usize, HeaderEntry)>,
    pub(super) listing: PathBuf,
    /// Tensors that the model does not need, that the index names and no shard has.
    pub(super) only_in_index: Vec<IgnoredTensor>,
}

impl<'a> Catalog<'a> {
    /// Merges the headers and holds them against the index.
    pub(super) fn new(
        shards: &'a [Shard],
        headers: Vec<Header>,
        index: Option<&Index>,
        listing: PathBuf,
        config: &ModelConfig,
    ) -> Result<Self, ReadError> {
        let mut entries: BTreeMap<String, (usize, HeaderEntry)> = BTreeMap::new();
        for (shard, header) in headers.into_iter().enumerate() {
            if entries.len() + header.len() > TENSORS_MAX {
                let path = shards[shard].path.clone();
                return Err(ReadError::TooManyTensors { path, limit: TENSORS_MAX });
            }
            for (tensor, entry) in header {
                let path = || shards[shard].path.clone();
                if let Some((other, _)) = entries.get(&tensor) {
                    let other = shards[*other].name.clone();
                    return Err(ReadError::DuplicateInShards { path: path(), tensor, other });
                }
                entries.insert(tensor, (shard, entry));
            }
        }
        let mut catalog = Self { shards, entries, listing, only_in_index: Vec::new() };
        if let Some(index) = index {
            catalog.agrees_with(index, config)?;
        }
        Ok(catalog)
    }

    /// What the model does not need may lie anywhere or nowhere.
    fn agrees_with(&mut self, index: &Index, config: &ModelConfig) -> Result<(), ReadError> {
        for (tensor, named) in &index.weight_map {
            let found = self.entries.get(tensor).map(|(shard, _)| &self.shards[*shard].name);
            if found == Some(named) {
                continue;
            }
            let tensor = tensor.clone();
            if let Some(why) = config.leaves_out(&tensor) {
                if found.is_none() {
                    self.only_in_index.push(IgnoredTensor { shard: named.clone(), tensor, why });
                }
                continue;
            }
            let path = self.listing.with_file_name(named);
            return Err(match found {
                None => ReadError::IndexedTensorAbsent { path, tensor },
                Some(found) => ReadError::TensorInOtherShard { path, tensor, found_in: found.clone() },
            });
        }
        let unnamed =
            |tensor: &str| !index.weight_map.contains_key(tensor) && config.leaves_out(tensor).is_none();
        match self.entries.iter().find(|(tensor, _)| unnamed(tensor)) {
            Some((tensor, (shard, _))) => Err(ReadError::TensorNotIndexed {
                path: self.shards[*shard].path.clone(),
                tensor: tensor.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Whether experts share tensors.
    pub(super) fn has_fused_experts(&self, config: &ModelConfig) -> bool {
        let fused = config.family.spelling().fused;
        self.entries.keys().any(|name| fused.is_fused(name))
    }
}
