//! Keys, names and version of the factored checkpoint format. `docs/format.md` is its prose. What differs from family to
//! family is [`crate::config::Output`].

/// Key in `config.json` that holds format, version and ranks.
pub const CONFIG_KEY: &str = "lowrank_config";
/// `lowrank_config.format`.
pub const FORMAT: &str = "lowrank-compress";
/// What a checkpoint has beside ranks: each came with a version of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Has {
    /// Narrowed experts.
    pub widths: bool,
    /// Layers whose routed experts share a base.
    pub shared_bases: bool,
    /// Shared experts among what is compressed.
    pub shared_experts: bool,
}

impl Has {
    /// `lowrank_config.format_version`: the least that knows all of it.
    pub const fn version(self) -> u64 {
        match self {
            Self { shared_experts: true, .. } => 4,
            Self { shared_bases: true, .. } => 3,
            Self { widths: true, .. } => 2,
            Self { .. } => 1,
        }
    }
}

/// `lowrank_config.shared_base_layers`: the layers with a base.
pub const SHARED_BASES_KEY: &str = "shared_base_layers";
/// `lowrank_config.compressed_shared_experts`: true where matrices of shared experts may have ranks; absent elsewhere.
pub const SHARED_EXPERTS_KEY: &str = "compressed_shared_experts";
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
