//! Keys, names and version of the factored checkpoint format. `docs/format.md` is its prose. What differs from family to
//! family is [`crate::config::Output`].

/// Key in `config.json` that holds format, version and ranks.
pub const CONFIG_KEY: &str = "lowrank_config";
/// `lowrank_config.format`.
pub const FORMAT: &str = "lowrank-compress";
/// `lowrank_config.format_version` of a checkpoint whose experts share a base in some layers.
pub const FORMAT_VERSION_BASES: u64 = 3;
/// Of one without, with narrowed experts.
pub const FORMAT_VERSION_WIDTHS: u64 = 2;
/// Of one with neither: what readers knew before there were widths.
pub const FORMAT_VERSION_RANKS: u64 = 1;
/// `lowrank_config.shared_base_layers`: the layers with a base.
pub const SHARED_BASES_KEY: &str = "shared_base_layers";
/// Which channels of narrowed experts are stored; loaders do not read it.
pub const CHANNELS_FILE: &str = "lowrank_channels.json";
/// Provenance and rank metadata; loaders do not read it.
pub const REPORT_FILE: &str = "lowrank_report.json";
/// Thinned spectra, for people and programs that draw them; loaders do not read it.
pub const SPECTRA_FILE: &str = "lowrank_spectra.json";
/// Length and BLAKE3 of every other file.
pub const MANIFEST_FILE: &str = "lowrank_manifest.json";
/// The index that names the shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the only shard of a checkpoint that has no index.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Hugging Face configuration.
pub const CONFIG_FILE: &str = "config.json";
/// The configuration beside `consolidated*.safetensors`.
pub const PARAMS_FILE: &str = "params.json";

/// Name of shard `k` (from 1) of `n`.
pub fn shard_name(k: usize, n: usize) -> String {
    format!("model-{k:05}-of-{n:05}.safetensors")
}
