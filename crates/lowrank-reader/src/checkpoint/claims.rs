//! What a model asks of the stored tensors, and what lies beside that.

use super::catalog::{Catalog, IgnoredTensor};
use super::run::Run;
use crate::error::ReadError;
use crate::header::HeaderEntry;
use crate::{fp8, others};
use lowrank_model::names::Role;
use lowrank_model::tensors::{RowOrder, Slice};
use lowrank_model::{Dtype, Layout, ModelConfig, PivotOrder};
use std::collections::BTreeSet;

/// Which stored tensors the model has asked for.
pub(super) struct Claims<'a> {
    catalog: &'a Catalog<'a>,
    config: &'a ModelConfig,
    layout: Layout,
    claimed: BTreeSet<String>,
}

impl<'a> Claims<'a> {
    /// None yet.
    pub(super) fn new(catalog: &'a Catalog<'a>, config: &'a ModelConfig, layout: Layout) -> Self {
        Self { catalog, config, layout, claimed: BTreeSet::new() }
    }

    /// Finds a slice and checks the stored tensor it is cut from.
    pub(super) fn claim(&mut self, slice: &Slice) -> Result<Run, ReadError> {
        let catalog = self.catalog;
        let Some((shard, entry)) = catalog.entries.get(&slice.tensor) else {
            return Err(self.missing(&slice.tensor));
        };
        let path = || catalog.shards[*shard].path.clone();
        let tensor = || slice.tensor.clone();
        if entry.dtype == safetensors::Dtype::F8_E4M3
            && let Some(sides) = self.config.fp8_blocks
            && let &[rows, cols] = slice.shape.as_slice()
            && slice.shape == slice.tensor_shape
            && !slice.tensor.ends_with(fp8::SCALES)
        {
            return self.claim_fp8(slice, [rows, cols], sides);
        }
        let Some(dtype) = weight_dtype(entry.dtype) else {
            let found = entry.dtype.to_string();
            return Err(ReadError::WrongDtype { path: path(), tensor: tensor(), found });
        };
        if !entry.shape.iter().copied().eq(slice.tensor_shape.iter().map(|&dimension| dimension as u64)) {
            let (found, expected) = (entry.shape.clone(), slice.tensor_shape.clone());
            return Err(ReadError::WrongShape { path: path(), tensor: tensor(), found, expected });
        }
        self.claimed.insert(tensor());
        Ok(Run {
            shard: *shard,
            begin: entry.begin + slice.first_element * dtype.size_bytes(),
            shape: slice.shape.clone(),
            dtype,
            row_order: slice.row_order,
            stored_name: tensor(),
            scales: None,
        })
    }

    /// A whole fp8 matrix, and the scales that lie beside it.
    fn claim_fp8(&mut self, slice: &Slice, shape: [usize; 2], sides: [usize; 2]) -> Result<Run, ReadError> {
        let (shard, entry) = &self.catalog.entries[&slice.tensor];
        if entry.shape != shape.map(|dimension| dimension as u64) {
            let (path, tensor) = (self.catalog.shards[*shard].path.clone(), slice.tensor.clone());
            let (found, expected) = (entry.shape.clone(), shape.into());
            return Err(ReadError::WrongShape { path, tensor, found, expected });
        }
        let scales = Slice {
            tensor: format!("{}{}", slice.tensor, fp8::SCALES),
            tensor_shape: fp8::scales_shape(shape, sides).into(),
            first_element: 0,
            shape: fp8::scales_shape(shape, sides).into(),
            row_order: RowOrder::Canonical,
        };
        if !self.catalog.entries.contains_key(&scales.tensor) {
            let (path, tensor) = (self.catalog.listing.clone(), scales.tensor);
            return Err(ReadError::MissingTensor { path, tensor });
        }
        let scales = self.claim(&scales)?;
        self.claimed.insert(slice.tensor.clone());
        Ok(Run {
            shard: *shard,
            begin: entry.begin,
            shape: shape.into(),
            dtype: Dtype::Bf16,
            row_order: slice.row_order,
            stored_name: slice.tensor.clone(),
            scales: Some(Box::new(scales)),
        })
    }

    /// Two factors, which have one dtype.
    pub(super) fn factors(&mut self, u: &Slice, v: &Slice) -> Result<(Run, Run), ReadError> {
        let (u, v) = (self.claim(u)?, self.claim(v)?);
        if u.dtype != v.dtype {
            return Err(ReadError::FactorDtypes {
                path: self.catalog.shards[u.shard].path.clone(),
                tensor: u.stored_name,
                found: u.dtype.to_string(),
                expected: v.dtype.to_string(),
            });
        }
        Ok((u, v))
    }

    /// Reads and checks an index of pivots: a few kilobytes that no header can vouch for.
    pub(super) fn order(&mut self, tensor: &str, rank: usize, len: usize) -> Result<PivotOrder, ReadError> {
        let catalog = self.catalog;
        let Some((shard, entry)) = catalog.entries.get(tensor) else { return Err(self.missing(tensor)) };
        let shard = &catalog.shards[*shard];
        let (path, name) = (|| shard.path.clone(), || tensor.to_owned());
        if entry.dtype != safetensors::Dtype::I64 || entry.shape != [len as u64] {
            let found = format!("{} {:?}", entry.dtype, entry.shape);
            return Err(ReadError::NotAnIndex { path: path(), tensor: name(), found, len });
        }
        let mut bytes = vec![0; entry.len_bytes as usize];
        shard.read_exact(entry.begin, &mut bytes, tensor)?;
        self.claimed.insert(name());
        PivotOrder::from_le_bytes(&bytes, rank, len).map_err(|source| ReadError::BadPivots {
            path: path(),
            tensor: name(),
            source,
        })
    }

    /// What is there in place of a missing weight is the more helpful thing to say.
    fn missing(&self, tensor: &str) -> ReadError {
        let entries = &self.catalog.entries;
        let path = |name: &String| self.catalog.shards[entries[name].0].path.clone();
        if let Some(name) = entries.keys().find(|name| is_quantised_name(name)) {
            return ReadError::Quantised { path: path(name), tensor: name.clone() };
        }
        let other = entries.keys().find_map(|name| Some((name, others::what_is(name, self.config)?)));
        let renamed = || others::what_renames(tensor, entries.keys(), self.layout, self.config);
        match other.or_else(renamed) {
            Some((name, what)) => ReadError::OtherTensor { path: path(name), tensor: name.clone(), what },
            None => ReadError::MissingTensor { path: self.catalog.listing.clone(), tensor: tensor.into() },
        }
    }

    /// What the model did not ask for must be known to be harmless.
    pub(super) fn account_for_the_rest(&self) -> Result<Vec<IgnoredTensor>, ReadError> {
        let config = self.config;
        let head = config.locate(self.layout, Role::Head);
        let mut ignored = self.catalog.only_in_index.clone();
        for (name, (shard, entry)) in &self.catalog.entries {
            if self.claimed.contains(name) {
                continue;
            }
            let (path, tensor) = (|| self.catalog.shards[*shard].path.clone(), || name.clone());
            let why = if let Some(why) = config.leaves_out(name) {
                why
            } else if config.tie_word_embeddings && *name == head.tensor {
                if !self.is_copy_of_embedding(*shard, name, entry)? {
                    return Err(ReadError::TiedHeadDiffers { path: path(), tensor: tensor() });
                }
                "a copy of the embedding, to which the config ties it"
            } else if is_quantised_name(name) {
                return Err(ReadError::Quantised { path: path(), tensor: tensor() });
            } else if let Some(what) = others::what_is(name, config) {
                return Err(ReadError::OtherTensor { path: path(), tensor: tensor(), what });
            } else {
                return Err(ReadError::ExtraTensor { path: path(), tensor: tensor() });
            };
            let shard = self.catalog.shards[*shard].name.clone();
            ignored.push(IgnoredTensor { shard, tensor: tensor(), why });
        }
        Ok(ignored)
    }

    /// The one comparison of weights at opening: which of two differing matrices is meant could not be told later.
    fn is_copy_of_embedding(
        &self,
        shard: usize,
        head_name: &str,
        head: &HeaderEntry,
    ) -> Result<bool, ReadError> {
        const BLOCK_BYTES: u64 = 1 << 20;
        let name = self.config.locate(self.layout, Role::Embedding).tensor;
        let Some((embedding_shard, embedding)) = self.catalog.entries.get(&name) else { return Ok(false) };
        if (embedding.dtype, &embedding.shape) != (head.dtype, &head.shape) {
            return Ok(false);
        }
        let mut blocks = [vec![0; BLOCK_BYTES as usize], vec![0; BLOCK_BYTES as usize]];
        for offset in (0..head.len_bytes).step_by(BLOCK_BYTES as usize) {
            let bytes = BLOCK_BYTES.min(head.len_bytes - offset) as usize;
            let [a, b] = &mut blocks;
            self.catalog.shards[shard].read_exact(head.begin + offset, &mut a[..bytes], head_name)?;
            self.catalog.shards[*embedding_shard].read_exact(
                embedding.begin + offset,
                &mut b[..bytes],
                &name,
            )?;
            if a[..bytes] != b[..bytes] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn weight_dtype(dtype: safetensors::Dtype) -> Option<Dtype> {
    match dtype {
        safetensors::Dtype::F32 => Some(Dtype::F32),
        safetensors::Dtype::F16 => Some(Dtype::F16),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// Scales, zero points and packed integers of the usual quantisers.
fn is_quantised_name(name: &str) -> bool {
    const ENDINGS: [&str; 11] = [
        ".qweight",
        ".qzeros",
        ".scales",
        ".g_idx",
        ".weight_packed",
        ".weight_scale",
        ".weight_scale_inv",
        ".weight_zero_point",
        ".input_scale",
        ".absmax",
        ".SCB",
    ];
    ENDINGS.iter().any(|ending| name.ends_with(ending)) || name.contains(".quant_state.")
}
