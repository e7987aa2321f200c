//! What a model's own description says: family and dimensions, layout, ranks. Decided by `config.json`, else by
//! `params.json`, never by a name.

use crate::error::{ReadError, clip};
use crate::folder::Folder;
use crate::json::parse;
use crate::others;
use lowrank_model::{Layout, MatrixId, ModelConfig, Storage, Widths, format};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The largest `config.json` or `params.json` read; a rank map of 50,000 matrices fits.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// What the description of a model says, before any weight was read.
#[derive(Debug)]
pub struct Description {
    /// Its family and dimensions.
    pub config: ModelConfig,
    /// `config.json` as parsed; absent beside `params.json`.
    pub config_json: Option<Value>,
    /// How its tensors are spelled.
    pub layout: DescribedLayout,
    /// Ranks of the factored matrices.
    pub ranks: BTreeMap<MatrixId, usize>,
    /// How factors are stored.
    pub storage: Storage,
}

/// What the config knows of the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DescribedLayout {
    /// transformers' own; whether experts are fused is only in the tensor names.
    HuggingFace,
    /// This one.
    Known(Layout),
}

/// Reads `config.json`, else `params.json`. Repositories with both hold the weights twice: Hugging Face's win.
pub(crate) fn read(folder: &Folder) -> Result<Description, ReadError> {
    for (name, parse) in [
        (format::CONFIG_FILE, from_hugging_face as fn(&Path, &[u8]) -> _),
        (format::PARAMS_FILE, from_params),
    ] {
        if let Some(json) = folder.read(name, CONFIG_BYTES_MAX)? {
            return parse(&folder.path(name), &json);
        }
    }
    Err(others::instead_of_config(folder))
}

/// Reads `params.json`; `path` serves the messages.
pub fn from_params(path: &Path, json: &[u8]) -> Result<Description, ReadError> {
    let config = ModelConfig::from_params_json(&parse(path, json)?)
        .map_err(|source| ReadError::Config { path: path.into(), source: source.printable() })?;
    let layout = DescribedLayout::Known(Layout::Consolidated);
    Ok(Description { config, config_json: None, layout, ranks: BTreeMap::new(), storage: Storage::Uv })
}

/// Reads `config.json`; `path` serves the messages.
pub fn from_hugging_face(path: &Path, json: &[u8]) -> Result<Description, ReadError> {
    let json = parse(path, json)?;
    let mut config = ModelConfig::from_hf_json(&json)
        .map_err(|source| ReadError::Config { path: path.into(), source: source.printable() })?;
    let model_type = json.get("model_type").and_then(Value::as_str);
    let (layout, ranks, storage) = if model_type == Some(config.family.output().model_type) {
        let lowrank = json.get(format::CONFIG_KEY).unwrap_or(&Value::Null);
        let storage = check_format(path, lowrank)?;
        config = with_shared_experts(path, lowrank.get(format::SHARED_EXPERTS_KEY), config)?;
        config.widths = read_widths(path, lowrank.get("widths"), &config)?;
        config.shared_bases = read_shared_bases(path, lowrank.get(format::SHARED_BASES_KEY), &config)?;
        let ranks = read_ranks(path, "lowrank_config.ranks", lowrank.get("ranks"), &config, storage)?;
        (DescribedLayout::Known(Layout::LowRank), ranks, storage)
    } else if let Some(ranks) = json.get("ranks").filter(|ranks| !ranks.is_null()) {
        let ranks = read_ranks(path, "ranks", Some(ranks), &config, Storage::Uv)?;
        (DescribedLayout::Known(Layout::Minixtral), ranks, Storage::Uv)
    } else {
        (DescribedLayout::HuggingFace, BTreeMap::new(), Storage::Uv)
    };
    Ok(Description { config, config_json: Some(json), layout, ranks, storage })
}

fn check_format(path: &Path, lowrank: &Value) -> Result<Storage, ReadError> {
    let shown = |key: &str| lowrank.get(key).map_or("missing".into(), |found| clip(&found.to_string()));
    if lowrank.get("format").and_then(Value::as_str) != Some(format::FORMAT) {
        return Err(ReadError::ForeignFormat { path: path.into(), found: shown("format") });
    }
    let version = lowrank.get("format_version").and_then(Value::as_u64);
    let has = |key: &str| lowrank.get(key).is_some();
    let known = format::Has {
        widths: has("widths"),
        shared_bases: has(format::SHARED_BASES_KEY),
        shared_experts: has(format::SHARED_EXPERTS_KEY),
    }
    .version();
    if version != Some(known) {
        let found = shown("format_version");
        return Err(ReadError::FormatVersion { path: path.into(), found, known });
    }
    match lowrank.get("storage") {
        None => Ok(Storage::Uv),
        Some(storage) => Storage::deserialize(storage)
            .map_err(|_| ReadError::UnknownStorage { path: path.into(), found: shown("storage") }),
    }
}

/// `lowrank_config.compressed_shared_experts`: true, of a model that has shared experts.
fn with_shared_experts(
    path: &Path,
    said: Option<&Value>,
    config: ModelConfig,
) -> Result<ModelConfig, ReadError> {
    let Some(said) = said else { return Ok(config) };
    let with = config.with_shared_experts(said == &Value::Bool(true));
    if !with.compresses_shared_experts {
        let found = clip(&said.to_string());
        return Err(ReadError::BadSharedExperts { path: path.into(), found });
    }
    Ok(with)
}

/// `lowrank_config.widths`: from the name of an expert to its number of channels.
fn read_widths(path: &Path, map: Option<&Value>, config: &ModelConfig) -> Result<Widths, ReadError> {
    let Some(map) = map else { return Ok(Widths::default()) };
    let bad = |module: &str, found: &Value| ReadError::BadWidth {
        path: path.into(),
        module: clip(module),
        found: clip(&found.to_string()),
        intermediate_size: config.intermediate_size,
    };
    let Some(map) = map.as_object() else { return Err(bad("`widths`", map)) };
    let names = config.expert_names();
    let row = |(module, found): (&String, &Value)| {
        let width = found.as_u64().and_then(|width| usize::try_from(width).ok());
        let width = width.filter(|width| (1..config.intermediate_size).contains(width));
        match (names.get(module.as_str()), width) {
            (Some(&(layer, expert)), Some(width)) => Ok((layer, expert, width)),
            _ => Err(bad(module, found)),
        }
    };
    map.iter().map(row).collect()
}

/// `lowrank_config.shared_base_layers`: layers whose experts share a base, rising.
fn read_shared_bases(
    path: &Path,
    list: Option<&Value>,
    config: &ModelConfig,
) -> Result<BTreeSet<usize>, ReadError> {
    let Some(list) = list else { return Ok(BTreeSet::new()) };
    let bad = |found: &Value| ReadError::BadSharedBase { path: path.into(), found: clip(&found.to_string()) };
    let Some(list) = list.as_array().filter(|list| !list.is_empty()) else { return Err(bad(list)) };
    let mut layers = BTreeSet::new();
    for found in list {
        let layer = found.as_u64().and_then(|layer| usize::try_from(layer).ok());
        let layer = layer.filter(|&layer| layer < config.num_hidden_layers && config.experts_in(layer) > 1);
        let layer = layer
            .filter(|&layer| layers.last().is_none_or(|&last| last < layer))
            .ok_or_else(|| bad(found))?;
        if config.widths.iter().any(|(narrowed, ..)| narrowed == layer) {
            return Err(bad(found));
        }
        layers.insert(layer);
    }
    Ok(layers)
}

fn read_ranks(
    path: &Path,
    key: &'static str,
    map: Option<&Value>,
    config: &ModelConfig,
    storage: Storage,
) -> Result<BTreeMap<MatrixId, usize>, ReadError> {
    let Some(map) = map.and_then(Value::as_object) else {
        return Err(ReadError::NoRankMap { path: path.into(), key });
    };
    let mut ranks = BTreeMap::new();
    for (module, rank) in map {
        // A loader looks for the module's own name, so no other spelling is read here.
        let Some(id) = config.matrix_named(module) else {
            return Err(ReadError::RankOfUnknownMatrix { path: path.into(), module: clip(module) });
        };
        let rank_max = storage.rank_max(config.matrix_shape(id));
        match rank.as_u64() {
            Some(rank) if (1..=rank_max as u64).contains(&rank) => ranks.insert(id, rank as usize),
            _ => {
                return Err(ReadError::BadRank {
                    path: path.into(),
                    module: module.clone(),
                    found: clip(&rank.to_string()),
                    rank_max,
                });
            }
        };
    }
    Ok(ranks)
}
