//! `inspect`: what is in this checkpoint.

use crate::planning::Subject;
use lowrank_model::Progress;
use lowrank_model::display::clip;
use lowrank_model::names::Role;
use lowrank_model::plan::Structures;
use lowrank_model::{ElementType, Layout, ModelConfig, Storage};
use lowrank_reader::{Checkpoint, Fp8Scales, LeftOut};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Sums over the tensors of one kind.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Kind {
    /// What the tensors are for.
    pub kind: &'static str,
    /// How many, under canonical names; a factored matrix counts as two, a pivoted one as three.
    pub tensors: u64,
    /// Their parameters.
    pub params: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// One shard.
#[derive(Debug, Clone, Serialize)]
pub struct ShardSize {
    /// File name.
    pub name: String,
    /// Length of the file.
    pub bytes: u64,
}

/// What `inspect` prints.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Model family.
    pub family: &'static str,
    /// How tensors are spelled and packed.
    pub layout: Layout,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Experts per layer.
    pub num_local_experts: usize,
    /// Experts per token.
    pub num_experts_per_tok: usize,
    /// H.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Stored parameters.
    pub params: u64,
    /// Bytes of weights.
    pub bytes: u64,
    /// The most parameters that can be removed with the default settings: every expert at the smallest width.
    pub params_removable: u64,
    /// The most that ranks alone can remove: every dense matrix at the smallest rank.
    pub params_removable_by_rank: u64,
    /// By purpose.
    pub kinds: Vec<Kind>,
    /// Elements by dtype.
    pub dtypes: BTreeMap<&'static str, u64>,
    /// Files that hold weights.
    pub shards: Vec<ShardSize>,
    /// Ranks of matrices that are factored already, by module name and in stored order.
    pub ranks: serde_json::Map<String, serde_json::Value>,
    /// Channels of experts that have fewer than F, by module name and in stored order.
    pub widths: serde_json::Map<String, serde_json::Value>,
    /// Layers whose experts share a base.
    pub shared_base_layers: Vec<usize>,
    /// Files that an output gets verbatim.
    pub companions: Vec<PathBuf>,
    /// What else is in the folder, and goes into no output.
    pub left_out: Vec<LeftOut>,
}

/// Tells a run what its output does not get of the base's folder.
pub(crate) fn tell_left_out(checkpoint: &Checkpoint, progress: &dyn Progress) {
    if let Some(line) = left_out_line(checkpoint.left_out()) {
        progress.note(&line);
    }
}

/// What is left out, in one line; `None` if nothing is.
pub fn left_out_line(left_out: &[LeftOut]) -> Option<String> {
    const NAMES_MAX: usize = 8;
    let mut names: Vec<String> =
        left_out.iter().take(NAMES_MAX).map(|left| format!("{} ({})", clip(&left.name), left.what)).collect();
    if left_out.len() > NAMES_MAX {
        names.push(format!("{} more", left_out.len() - NAMES_MAX));
    }
    (!names.is_empty()).then(|| format!("not carried into the output: {}", names.join(", ")))
}

/// Counts from headers alone.
pub fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let config: &ModelConfig = checkpoint.config();
    let mut kinds: BTreeMap<&'static str, Kind> = BTreeMap::new();
    let mut dtypes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut ranks = serde_json::Map::new();
    let (mut params_removable, mut params_removable_by_rank) = (0, 0);
    let subject = Subject::of(checkpoint);
    for spec in checkpoint.specs() {
        let (dtype, tensors, params, bytes) = match spec.role {
            Role::Expert(id) => {
                let shape = config.matrix_shape(id);
                let rank = checkpoint.rank(id);
                let storage = checkpoint.storage();
                let count = |rank| lowrank_model::params::stored_params(shape, storage, rank);
                if rank.is_none() {
                    params_removable += subject.most_removable(id, Structures::Width);
                    params_removable_by_rank += subject.most_removable(id, Structures::Rank);
                }
                ranks.extend(rank.map(|rank| (config.module_name(id), rank.into())));
                let tensors = match (rank, storage) {
                    (None, _) => 1,
                    (Some(_), Storage::Uv) => 2,
                    (Some(_), Storage::Pivoted) => 3,
                };
                let (dtype, params) = (checkpoint.matrix_dtype(id), count(rank));
                let index_bytes = lowrank_model::params::index_bytes(shape, storage, rank);
                let bytes = params * dtype.size_bytes() + index_bytes;
                (dtype.safetensors_name(), tensors, params, bytes)
            }
            _ => {
                let Some(dtype) = checkpoint.dtype(&spec.name) else { continue };
                let (params, scales) = (spec.elements(), checkpoint.kept_fp8(spec));
                let dtype = scales.as_ref().map_or(ElementType::from(dtype), |_| ElementType::Fp8);
                let bytes = params * dtype.size_bytes() + scales.as_ref().map_or(0, Fp8Scales::bytes);
                (dtype.safetensors_name(), 1 + u64::from(scales.is_some()), params, bytes)
            }
        };
        let kind = kinds.entry(spec.role.label()).or_default();
        kind.kind = spec.role.label();
        kind.tensors += tensors;
        kind.params += params;
        kind.bytes += bytes;
        *dtypes.entry(dtype).or_default() += params;
    }
    let mut kinds: Vec<Kind> = kinds.into_values().collect();
    kinds.sort_by_key(|kind| std::cmp::Reverse(kind.params));
    let size = checkpoint.size();
    Inspection {
        family: config.family.model_type(),
        layout: checkpoint.layout(),
        num_hidden_layers: config.num_hidden_layers,
        num_local_experts: config.num_local_experts,
        num_experts_per_tok: config.num_experts_per_tok,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        params: size.params,
        bytes: size.bytes,
        params_removable,
        params_removable_by_rank,
        kinds,
        dtypes,
        shards: checkpoint
            .shards()
            .iter()
            .map(|shard| ShardSize { name: shard.name.clone(), bytes: shard.len_bytes })
            .collect(),
        ranks,
        shared_base_layers: config.shared_bases.iter().copied().collect(),
        widths: config
            .widths
            .iter()
            .map(|(layer, expert, width)| (config.family.spelling().expert(layer, expert), width.into()))
            .collect(),
        companions: checkpoint.companions().to_vec(),
        left_out: checkpoint.left_out().to_vec(),
    }
}
