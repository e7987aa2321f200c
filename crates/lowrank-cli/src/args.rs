//! The command line as it is typed: strings and options, nothing checked yet. [`crate::job`] turns it into values.
//!
//! [`JobArgs`] is read twice, from flags by clap and from `--config` by serde, so that the file holds any flag.

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  lowrank-compress --budget 10B --model mistralai/Mixtral-8x7B-Instruct-v0.1 --out mixtral-36b
  lowrank-compress plan --budget 20% --model ./mixtral
  lowrank-compress sweep configs/sweep-mixtral.toml --out sweep
  lowrank-compress inspect ./mixtral
  lowrank-compress verify --original ./mixtral --compressed ./mixtral-36b
Exit codes: docs/exit-codes.md";

/// Makes a Mixture-of-Experts checkpoint smaller by low-rank factors of its expert matrices, without retraining.
#[derive(Debug, Parser)]
#[command(name = "lowrank-compress", version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress a checkpoint (what the bare command does)
    Compress(Box<JobArgs>),
    /// Choose the ranks, print them and write plan.json, but compress nothing
    Plan(Box<JobArgs>),
    /// Say what is in a checkpoint: layout, parameters by kind, dtypes, shards
    Inspect(InspectArgs),
    /// Multiply factors back to the base's names and shapes, for runtimes that know no factors (saves no memory)
    Densify(DensifyArgs),
    /// Check a compressed checkpoint against its original, and measure what it lost
    Verify(crate::commands::verify::VerifyArgs),
    /// Make a compressed checkpoint again from its own metadata, and compare every byte
    Reproduce(crate::commands::reproduce::ReproduceArgs),
    /// Plan many points of a grid, compress and verify the best, and show what they cost
    Sweep(crate::commands::sweep::SweepArgs),
    /// Make one HTML file that shows what was removed, where it was cut and what it cost
    Report(crate::commands::report::ReportArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Flags of `compress` and `plan`, and keys of `--config`.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct JobArgs {
    /// Checkpoint directory, or org/name in the local Hugging Face cache
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// Where the compressed checkpoint goes; must not exist
    #[arg(long, short, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) out: Option<PathBuf>,
    /// Parameters to remove: 10B, 10e9, 10_000_000_000, or a share of the checkpoint: 20%
    #[arg(long, short, value_name = "N|PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) budget: Option<String>,
    /// Parameters to be left: 36.7B
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_params: Option<String>,
    /// Bytes of weights to be left: 74GB, 68.9GiB
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_size: Option<String>,
    /// Execute a stored plan
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) plan: Option<PathBuf>,
    /// Take the ranks from a flat JSON map {"module name": rank}
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ranks: Option<PathBuf>,
    /// Where the plan is written by `plan` and `--dry-run` [default: plan.json]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) plan_out: Option<PathBuf>,
    /// Plan only, as `plan` does
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) dry_run: bool,
    /// Ranks are multiples of this; tensor cores like 8, 32 or 64 [default: 8 where the short side is at least 1024, else 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rank_multiple: Option<usize>,
    /// Smallest rank a factored matrix may get [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min_rank: Option<usize>,
    /// Leave matrices dense whose module name matches; may be repeated
    #[arg(long, value_name = "REGEX")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) keep_dense: Vec<String>,
    /// Give matrices whose module name matches a rank, whatever the budget; may be repeated, the last that matches counts
    #[arg(long, value_name = "REGEX=RANK")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) fix_rank: Vec<String>,
    /// How factors are stored: by pivots, or as u·v, the same matrices in more parameters [default: pivoted]
    #[arg(long, value_name = "pivoted|uv")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) layout: Option<String>,
    /// Text that shows what the experts are used for: .txt, .jsonl with a `text` field, token ids (.json, .ids); may be
    /// repeated for equal shares; or none [default: a bundled passage]
    #[arg(long, value_name = "FILE|none")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) calibrate: Vec<String>,
    /// Tokens to calibrate on, spread over the text [default: 65536]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibration_tokens: Option<usize>,
    /// What a token counts by the router's weight [default: squared]
    #[arg(long, value_name = "none|linear|squared")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gate_weight: Option<String>,
    /// Whose output is to stay what it was: each matrix' own, or its expert's [default: expert]
    #[arg(long, value_name = "matrix|expert")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibration_target: Option<String>,
    /// Share of the data-free norm that is blended into the measured one, 0 to 1 [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibration_blend: Option<f64>,
    /// How much of the compression before a matrix its factors make good: none; that of its expert, w2 is fitted to the
    /// factors of w1 and w3; or that of all layers before, in order, which takes longest [default: layers]
    #[arg(long, value_name = "none|experts|layers")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) propagate: Option<String>,
    /// With --propagate: share of what the compressed model makes itself in what is wanted of it, 0 to 1 [default: 0]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) propagate_own_share: Option<f64>,
    /// Tokens to measure sensitivities with [default: 8192, for hidden sizes from 1024 on 2048]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sensitivity_tokens: Option<usize>,
    /// How errors of different matrices compare [default: measured on the calibration text, without one relative]
    #[arg(long, value_name = "measured|absolute|relative")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sensitivity: Option<String>,
    /// Ranks where they serve most, or one rank for all, the baseline [default: global]
    #[arg(long, value_name = "global|uniform")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) allocation: Option<String>,
    /// How factors are computed [default: auto: randomized only where the rank is a small part of the short side]
    #[arg(long, value_name = "auto|exact|projector|randomized")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<String>,
    /// Seed of the randomized method [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    /// Dtype of the factors [default: that of the matrix]
    #[arg(long, value_name = "bf16|f16|f32")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dtype: Option<String>,
    /// Longest shard [default: 5GB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_shard_size: Option<String>,
    /// Matrices in flight at once [default: one per core, as memory allows]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) workers: Option<usize>,
    /// Memory for all workers together: 4GiB [default: three quarters of what is free]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<String>,
    /// Where measured numbers are kept for later runs, up to 17 GB for Mixtral-8x7B [default: with your other caches]
    #[arg(long, value_name = "DIR|none")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cache: Option<String>,
    /// Where the model runs on the calibration text [default: auto: a GPU if there is one]
    #[arg(long, value_name = "auto|cpu|cuda")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<crate::commands::verify::Device>,
    /// Where matrices are decomposed: cpu for the same bytes on every machine, cuda for those of this machine's GPU
    /// [default: cpu]
    #[arg(long, value_name = "cpu|cuda")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) algebra: Option<Algebra>,
    /// Go on where an earlier run of the same job stopped (this is what happens anyway)
    #[arg(long, conflicts_with = "restart")]
    #[serde(skip)]
    pub(crate) resume: bool,
    /// Discard what an earlier run left unfinished and begin anew
    #[arg(long)]
    #[serde(skip)]
    pub(crate) restart: bool,
    /// TOML file that holds any of these flags; flags win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    // Not a flattened `TalkArgs`: serde's flattening loses the line of a misspelt key.
    /// Put one machine-readable JSON document on stdout instead of tables
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) json: bool,
    /// No progress and no tables
    #[arg(long, short)]
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) quiet: bool,
    /// Every matrix in the tables
    #[arg(long, short)]
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) verbose: bool,
}

/// Where matrices are decomposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Algebra {
    /// The CPU.
    Cpu,
    /// A GPU, or fail.
    Cuda,
}

impl JobArgs {
    /// How much is said.
    pub(crate) fn talk(&self) -> TalkArgs {
        TalkArgs { json: self.json, quiet: self.quiet, verbose: self.verbose }
    }
}

/// How much is said, and to whom.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct TalkArgs {
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

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint directory, or org/name in the local Hugging Face cache
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) talk: TalkArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DensifyArgs {
    /// Factored checkpoint
    #[arg(long, short, value_name = "DIR")]
    pub(crate) model: String,
    /// Where the dense checkpoint goes; must not exist
    #[arg(long, short, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Dtype of the products [default: that of the factors]
    #[arg(long, value_name = "bf16|f16|f32")]
    pub(crate) dtype: Option<String>,
    /// Longest shard
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub(crate) max_shard_size: String,
    /// Matrices in flight at once [default: one per core, as memory allows]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) workers: usize,
    #[command(flatten)]
    pub(crate) talk: TalkArgs,
}

fn is_false(flag: &bool) -> bool {
    !flag
}
