//! The place of every tensor: shards, their exact headers, and the index. A pure value; this module writes nothing.
//!
//! A shard is `[header length: u64 LE][header: JSON, padded with spaces to 8 bytes][data]`, and holds
//! `{"format":"pt"}` as its only metadata. The list of tensors determines every byte.

use crate::WriteError;
use lowrank_model::{ElementType, display::clip, format, plan::Size};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// A tensor of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Number format.
    pub dtype: ElementType,
    /// Dimensions.
    pub shape: Vec<usize>,
}

impl OutputTensor {
    /// Product of the dimensions, if it can be counted.
    fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1_u64, |product, &dimension| product.checked_mul(dimension as u64))
    }

    fn bytes(&self) -> Option<u64> {
        self.elements()?.checked_mul(self.dtype.size_bytes())
    }
}

/// A tensor and its place in a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTensor {
    /// The tensor.
    pub tensor: OutputTensor,
    /// First byte, counted from the start of the data.
    pub begin: u64,
    /// One past its last byte.
    pub end: u64,
}

/// One file of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// File name.
    pub name: String,
    /// The first bytes of the file: length, JSON, padding.
    pub header: Vec<u8>,
    /// In the order of their bytes.
    pub tensors: Vec<PlacedTensor>,
}

impl Shard {
    /// Bytes of tensors.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |placed| placed.end)
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes()
    }
}

/// The place of every tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardLayout {
    shards: Vec<Shard>,
    /// name → (shard, position in the shard)
    places: BTreeMap<String, (usize, usize)>,
}

/// The limit of the safetensors format.
const HEADER_BYTES_MAX: usize = 100_000_000;
/// The longest name that readers take.
const NAME_BYTES_MAX: usize = 1024;
/// Data starts at a multiple of this.
const ALIGNMENT: usize = 8;

impl ShardLayout {
    /// Fills shards in the given order; a new one begins where the next tensor would exceed `shard_bytes_max` bytes of
    /// tensors. A tensor larger than that gets a shard of its own.
    pub fn new(tensors: Vec<OutputTensor>, shard_bytes_max: u64) -> Result<Self, WriteError> {
        if shard_bytes_max == 0 {
            return Err(WriteError::ShardBytesZero);
        }
        let mut groups: Vec<Vec<OutputTensor>> = Vec::new();
        let (mut used, mut total) = (0_u64, 0_u64);
        for tensor in tensors {
            let is_name = (1..=NAME_BYTES_MAX).contains(&tensor.name.len())
                && !tensor.name.contains(char::is_control)
                && tensor.name != "__metadata__";
            if !is_name {
                return Err(WriteError::TensorName { name: clip(&tensor.name) });
            }
            // If the total does not overflow, no sum below does.
            let counted = tensor.bytes().and_then(|bytes| Some((bytes, total.checked_add(bytes)?)));
            let Some((bytes, new_total)) = counted.filter(|&(_, total)| total <= i64::MAX as u64) else {
                return Err(WriteError::Overflow { name: tensor.name, shape: tensor.shape });
            };
            total = new_total;
            match groups.last_mut() {
                Some(group) if used + bytes <= shard_bytes_max => {
                    used += bytes;
                    group.push(tensor);
                }
                _ => {
                    used = bytes;
                    groups.push(vec![tensor]);
                }
            }
        }
        if groups.is_empty() {
            return Err(WriteError::EmptyLayout);
        }
        let count = groups.len();
        let shards = groups
            .into_iter()
            .enumerate()
            .map(|(index, group)| shard(format::shard_name(index + 1, count), group))
            .collect::<Result<Vec<_>, _>>()?;
        let mut places = BTreeMap::new();
        for (s, shard) in shards.iter().enumerate() {
            for (t, placed) in shard.tensors.iter().enumerate() {
                let name = &placed.tensor.name;
                if places.insert(name.clone(), (s, t)).is_some() {
                    return Err(WriteError::DuplicateTensor { name: name.clone() });
                }
            }
        }
        Ok(Self { shards, places })
    }

    /// The files, in order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The shard and the place of a tensor.
    pub fn find(&self, name: &str) -> Option<(&Shard, &PlacedTensor)> {
        let &(shard, tensor) = self.places.get(name)?;
        let shard = &self.shards[shard];
        Some((shard, &shard.tensors[tensor]))
    }

    /// Parameters and bytes of all tensors. The index of a pivoted matrix counts only as bytes.
    pub fn size(&self) -> Size {
        let placed = || self.shards.iter().flat_map(|shard| &shard.tensors);
        Size {
            params: placed()
                .filter(|p| p.tensor.dtype.is_weight())
                .map(|p| (p.end - p.begin) / p.tensor.dtype.size_bytes())
                .sum(),
            bytes: placed().map(|p| p.end - p.begin).sum(),
        }
    }

    /// Bytes of all shard files, headers included.
    pub fn disk_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::file_bytes).sum()
    }

    /// `model.safetensors.index.json`. Loaders need the metadata key, and the Hub shows its `total_parameters`.
    pub fn index_json(&self) -> Vec<u8> {
        let size = self.size();
        let weight_map: Map<String, Value> = self
            .places
            .iter()
            .map(|(name, &(shard, _))| (name.clone(), Value::from(self.shards[shard].name.as_str())))
            .collect();
        crate::documents::pretty(&json!({
            "metadata": { "total_parameters": size.params, "total_size": size.bytes },
            "weight_map": weight_map,
        }))
    }
}

fn shard(name: String, mut tensors: Vec<OutputTensor>) -> Result<Shard, WriteError> {
    // Wide elements first keeps every tensor aligned to its own element; the sort is stable.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size_bytes()));
    let mut at = 0;
    let placed: Vec<PlacedTensor> = tensors
        .into_iter()
        .map(|tensor| {
            let begin = at;
            at += tensor.bytes().expect("counted before");
            PlacedTensor { tensor, begin, end: at }
        })
        .collect();
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    for PlacedTensor { tensor, begin, end } in &placed {
        let entry = json!({
            "dtype": tensor.dtype.safetensors_name(),
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        });
        if header.insert(tensor.name.clone(), entry).is_some() {
            return Err(WriteError::DuplicateTensor { name: tensor.name.clone() });
        }
    }
    let mut json = Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
    if json.len() > HEADER_BYTES_MAX {
        return Err(WriteError::HeaderTooLarge { shard: name, bytes: json.len() });
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(Shard { name, header, tensors: placed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> OutputTensor {
        OutputTensor { name: name.into(), dtype: dtype.into(), shape: shape.into() }
    }

    #[test]
    fn shards_fill_in_order_and_a_giant_stands_alone() {
        let sizes = [("a", 40), ("b", 60), ("c", 1), ("giant", 500), ("d", 99)];
        let tensors = sizes.map(|(name, elements)| tensor(name, Dtype::Bf16, &[elements])).to_vec();
        let layout = ShardLayout::new(tensors, 200).unwrap();
        let names: Vec<Vec<&str>> = layout
            .shards()
            .iter()
            .map(|shard| shard.tensors.iter().map(|placed| placed.tensor.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["giant"], vec!["d"]]);
        assert_eq!(layout.shards()[3].name, "model-00004-of-00004.safetensors");
        assert_eq!(layout.size(), Size { params: 700, bytes: 1400 });
    }

    #[test]
    fn a_single_shard_is_numbered_and_indexed_too() {
        let layout = ShardLayout::new(vec![tensor("a", Dtype::F32, &[2, 3])], 1 << 30).unwrap();
        assert_eq!(layout.shards()[0].name, "model-00001-of-00001.safetensors");
        let index: Value = serde_json::from_slice(&layout.index_json()).unwrap();
        assert_eq!(index["metadata"], json!({ "total_parameters": 6, "total_size": 24 }));
        assert_eq!(index["weight_map"], json!({ "a": "model-00001-of-00001.safetensors" }));
    }

    #[test]
    fn the_header_is_exactly_these_bytes() {
        let tensors = vec![tensor("n", Dtype::Bf16, &[3]), tensor("w", Dtype::F32, &[2, 1])];
        let layout = ShardLayout::new(tensors, 1000).unwrap();
        let header = &layout.shards()[0].header;
        let json = concat!(
            r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"#,
            r#""n":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}"#
        );
        let padded = json.len().next_multiple_of(8);
        assert_eq!(header[..8], (padded as u64).to_le_bytes());
        assert_eq!(std::str::from_utf8(&header[8..]).unwrap(), format!("{json:<padded$}"));
    }

    #[test]
    fn what_cannot_be_laid_out_is_refused() {
        let one = |name: &str, shape: &[usize]| vec![tensor(name, Dtype::F32, shape)];
        assert!(matches!(ShardLayout::new(vec![], 1), Err(WriteError::EmptyLayout)));
        assert!(matches!(ShardLayout::new(one("a", &[1]), 0), Err(WriteError::ShardBytesZero)));
        for name in ["", "__metadata__", "a\nb", "\u{1b}[2J", &"x".repeat(1025)] {
            let refused = ShardLayout::new(one(name, &[1]), 1).unwrap_err();
            assert!(matches!(refused, WriteError::TensorName { .. }), "{refused}");
            assert!(!refused.to_string().contains(char::is_control), "{refused:?}");
        }
        assert!(matches!(ShardLayout::new(one("a", &[usize::MAX, 2]), 1), Err(WriteError::Overflow { .. })));
        assert!(matches!(ShardLayout::new(one("a", &[1 << 61]), 1), Err(WriteError::Overflow { .. })));
        for shard_bytes_max in [4, 1000] {
            let twice = [one("a", &[1]), one("a", &[1])].concat();
            assert!(matches!(
                ShardLayout::new(twice, shard_bytes_max),
                Err(WriteError::DuplicateTensor { .. })
            ));
        }
    }
}
