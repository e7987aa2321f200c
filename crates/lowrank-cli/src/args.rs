//! Flags that commands share, typed. Keys of `--config` and of a sweep's config are the same structs, read by serde
//! ([`crate::config`]); [`crate::job`] turns them into a job.

use clap::Args;
use lowrank_model::plan::{Allocation, RankGroups, Sensitivity, Structures};
use lowrank_model::recipe::{
    Bos, ByteSize, CalibrationTarget, FixedRank, Fp8, GateWeight, MethodChoice, ParamCount, Pattern,
    PropagationScope, Removal, SharedExpertsChoice, TextChoice,
};
use lowrank_model::{AlgebraChoice, Device, Dtype, Quantiser, Storage};
use lowrank_pipeline::workers::{CachePlace, Resources};
use serde::de::{DeserializeOwned, Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Flags of `compress` and `plan`, and keys of `--config`.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct JobArgs {
    /// Checkpoint directory, or org/name in the local Hugging Face cache
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    pub(crate) model: Option<String>,
    /// Where the compressed checkpoint goes; must not exist
    #[arg(long, short, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Execute a stored plan
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: Option<PathBuf>,
    /// Take the ranks from a flat JSON map {"module name": rank}
    #[arg(long, value_name = "FILE")]
    pub(crate) ranks: Option<PathBuf>,
    /// Where `plan` and `--dry-run` write the plan [default: plan.json]
    #[arg(long, value_name = "FILE")]
    pub(crate) plan_out: Option<PathBuf>,
    /// Plan only, as `plan` does
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) recipe: RecipeFlags,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) machine: MachineFlags,
    /// Resume an unfinished run of the same job (the default)
    #[arg(long, conflicts_with = "restart")]
    #[serde(skip)]
    pub(crate) resume: bool,
    /// Discard an unfinished run and start again
    #[arg(long)]
    #[serde(skip)]
    pub(crate) restart: bool,
    /// TOML file that holds any of these flags; flags win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) verbosity: Verbosity,
}

/// A flag for every setting of a [`lowrank_model::Recipe`] that can be typed. Defaults are the recipe's.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "What decides the bytes")]
pub(crate) struct RecipeFlags {
    /// Parameters to remove: 10B, 10e9, 10_000_000_000, or a share of the checkpoint: 20%
    #[arg(long, short, value_name = "N|PERCENT")]
    pub(crate) budget: Option<Removal>,
    /// Parameters to leave: 36.7B
    #[arg(long, value_name = "N")]
    pub(crate) target_params: Option<ParamCount>,
    /// Bytes of weights to leave: 74GB, 68.9GiB
    #[arg(long, value_name = "SIZE")]
    pub(crate) target_size: Option<ByteSize>,
    /// What will quantise the output: --target-size is then its size after that, norms, embedding and head unquantised
    #[arg(long, value_name = "HOW")]
    pub(crate) then: Option<Quantiser>,
    /// Ranks and widths are multiples of this, as quantisers and kernels want [default: a 32nd of the short side, as a power of two between 32 and 128; 1 where that side is below 512]
    #[arg(long, value_name = "N")]
    pub(crate) rank_multiple: Option<usize>,
    /// Smallest rank a factored matrix may get [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) min_rank: Option<usize>,
    /// Keep matrices dense whose module name matches; may be repeated
    #[arg(long, value_name = "REGEX")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) keep_dense: Option<Vec<Pattern>>,
    /// Give matrices whose module name matches this rank, whatever the budget; may be repeated, the last match counts
    #[arg(long, value_name = "REGEX=RANK")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) fix_rank: Option<Vec<FixedRank>>,
    /// How errors of different matrices compare [default: measured, without a calibration text relative]
    #[arg(long, value_name = "HOW")]
    pub(crate) sensitivity: Option<Sensitivity>,
    /// How the budget is spread [default: global]
    #[arg(long, value_name = "HOW")]
    pub(crate) allocation: Option<Allocation>,
    /// What may be cut [default: rank,width,base where errors are measured and the allocation is global, else rank]
    #[arg(long, value_name = "WHAT")]
    pub(crate) structures: Option<Structures>,
    /// What shares one choice of width and ranks [default: matrix]
    #[arg(long, value_name = "WHAT")]
    pub(crate) rank_groups: Option<RankGroups>,
    /// Text to measure errors on: .txt or .md, .jsonl or .ndjson with a `text` or a chat (`messages`) in every row, .json (an array of texts or of
    /// token ids), .ids (token ids); may be repeated for equal shares; `none` counts errors by the weights alone [default:
    /// bundled]
    #[arg(long, value_name = "FILE|bundled|none")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) calibrate: Option<Vec<TextChoice>>,
    /// Tokens to calibrate on, spread evenly over the text [default: 65536]
    #[arg(long, value_name = "N")]
    pub(crate) calibration_tokens: Option<usize>,
    /// Tokens of a window of the calibration text; attention does not cross windows [default: 2048 or the positions of the model, for hidden sizes below 1024 256]
    #[arg(long, value_name = "N")]
    pub(crate) calibration_window: Option<usize>,
    /// Whether a window of the calibration text starts with the tokenizer's BOS [default: auto]
    #[arg(long, value_name = "WHEN")]
    pub(crate) bos: Option<Bos>,
    /// Share of the calibration tokens that are those of the whole vocabulary, shuffled, 0 to 1 [default: 0.125]
    #[arg(long, value_name = "SHARE")]
    pub(crate) vocabulary_share: Option<f64>,
    /// How much each routed token counts [default: squared]
    #[arg(long, value_name = "HOW")]
    pub(crate) gate_weight: Option<GateWeight>,
    /// Whose output error is minimised [default: expert]
    #[arg(long, value_name = "WHOSE")]
    pub(crate) calibration_target: Option<CalibrationTarget>,
    /// Share of the identity in the second-moment matrix (shrinkage), 0 to 1 [default: 0.1]
    #[arg(long, value_name = "SHARE", alias = "calibration-blend")]
    pub(crate) shrinkage: Option<f64>,
    /// Tokens to measure sensitivities with [default: 8192, for hidden sizes from 1024 on 2048]
    #[arg(long, value_name = "N")]
    pub(crate) sensitivity_tokens: Option<usize>,
    /// Error propagation: whose errors the factors of a matrix compensate [default: layers]
    #[arg(long, value_name = "SCOPE")]
    pub(crate) propagate: Option<PropagationScope>,
    /// With --propagate: fit each matrix to the original's output on the original's inputs (0), on the compressed model's
    /// inputs (1), or to a mean of both [default: 0]
    #[arg(long, value_name = "SHARE", alias = "propagate-own-share")]
    pub(crate) target_interpolation: Option<f64>,
    /// How factors are stored [default: pivoted]
    #[arg(long, value_name = "FORM", alias = "layout")]
    pub(crate) storage: Option<Storage>,
    /// Dtype of the factors; one that converts them is also stated in the output's config [default: that of each matrix]
    #[arg(long, value_name = "DTYPE", ignore_case = true)]
    pub(crate) dtype: Option<Dtype>,
    /// How factors are computed [default: auto]
    #[arg(long, value_name = "HOW")]
    pub(crate) method: Option<MethodChoice>,
    /// Seed of the randomized method [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// What becomes of an fp8 model's tensors outside the experts [default: keep; with --then widen]
    #[arg(long, value_name = "WHAT")]
    pub(crate) fp8: Option<Fp8>,
    /// What becomes of experts that every token takes [default: keep]
    #[arg(long, value_name = "WHAT")]
    pub(crate) shared_experts: Option<SharedExpertsChoice>,
    /// Longest shard [default: 5GB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_shard_size: Option<ByteSize>,
}

/// What a job may use of this machine.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "This machine")]
pub(crate) struct MachineFlags {
    /// Matrices in flight at once [default: one per core, as memory allows]
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<usize>,
    /// Memory for all workers together: 4GiB [default: three quarters of what is free]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Where measured numbers are kept for later runs, up to 20 GB for Mixtral-8x7B [default: with your other caches]
    #[arg(long, value_name = "DIR|none")]
    pub(crate) cache: Option<String>,
    /// Where the model runs on texts [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<Device>,
    /// Where matrices are decomposed [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) algebra: Option<AlgebraChoice>,
}

impl MachineFlags {
    /// Resources of a job.
    pub(crate) fn resources(&self) -> Resources {
        Resources {
            workers: self.workers.unwrap_or(0),
            memory_bytes: self.memory.map(|size| size.0),
            cache: cache_place(self.cache.as_deref()),
            device: self.device.unwrap_or_default(),
            algebra: self.algebra.unwrap_or_default(),
        }
    }
}

/// Flags of commands that prepare a job of a cluster.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Slurm")]
pub(crate) struct SlurmFlags {
    /// Machines that work at the same time at most; the bytes do not depend on it [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) nodes: Option<u32>,
    /// Give the script to sbatch instead of printing it
    #[arg(long)]
    pub(crate) submit: bool,
    /// Folder on a disk that all machines see, for what they share [default: OUT.cluster]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Option of sbatch for every job, such as --partition=long; may be repeated
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub(crate) sbatch: Vec<String>,
    /// Let machines have CPUs of different kinds: bytes then depend on which did what
    #[arg(long)]
    pub(crate) other_cpu: bool,
}

impl SlurmFlags {
    /// The first flag that was given, if any.
    pub(crate) fn first_given(&self) -> Option<String> {
        let given = given(self);
        let is_given = |(_, value): &(&String, &Value)| value.as_array().is_none_or(|all| !all.is_empty());
        given.iter().find(is_given).map(|(name, _)| format!("--{}", name.replace('_', "-")))
    }
}

/// How much is printed, and as what.
#[derive(Debug, Clone, Copy, Default, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct Verbosity {
    /// Put one machine-readable JSON document on stdout instead of tables
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress and no tables
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Every matrix, shard and rank in the tables
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

/// `--cache`.
pub(crate) fn cache_place(given: Option<&str>) -> CachePlace {
    match given {
        None => CachePlace::Usual,
        Some("none") => CachePlace::Nowhere,
        Some(root) => CachePlace::At(root.into()),
    }
}

/// The flags that were given, by name.
pub(crate) fn given(flags: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(flags) {
        Ok(Value::Object(all)) => {
            all.into_iter().filter(|(_, value)| !value.is_null() && *value != false).collect()
        }
        _ => Map::new(),
    }
}

/// A list; one value is a list of one.
fn one_or_many<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let all = match Value::deserialize(deserializer)? {
        Value::Array(all) => all,
        one => vec![one],
    };
    all.into_iter().map(T::deserialize).collect::<Result<_, _>>().map(Some).map_err(D::Error::custom)
}
