//! `densify`: factors multiplied back to plain matrices, in the family's own layout.

use crate::args::Verbosity;
use crate::commands::shared::{open, print_json};
use crate::exit::Result;
use crate::progress::Console;
use crate::tables::human_bytes;
use clap::Args;
use lowrank_model::Dtype;
use lowrank_model::display::grouped;
use lowrank_model::recipe::ByteSize;
use lowrank_pipeline::densify::{DensifySettings, densify};
use lowrank_pipeline::workers::Resources;
use serde_json::json;
use std::path::PathBuf;

/// Flags of `densify`.
#[derive(Debug, Args)]
pub(crate) struct DensifyArgs {
    /// Factored checkpoint
    #[arg(long, short, value_name = "DIR")]
    model: String,
    /// Where the dense checkpoint goes; must not exist
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Dtype of the products [default: that of the factors]
    #[arg(long, value_name = "DTYPE", ignore_case = true)]
    dtype: Option<Dtype>,
    /// Longest shard
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: ByteSize,
    /// Matrices in flight at once [default: one per core, as memory allows]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    workers: usize,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// Runs the command.
pub(crate) fn run(args: &DensifyArgs) -> Result<()> {
    let settings = DensifySettings {
        dtype: args.dtype,
        shard_bytes_max: args.max_shard_size.0,
        resources: Resources { workers: args.workers, ..Resources::default() },
    };
    let checkpoint = open(&args.model)?;
    let published = densify(&checkpoint, &args.out, settings, &Console::new(args.verbosity.quiet))?;
    if args.verbosity.json {
        return print_json(&json!({
            "out": published.path, "params": published.params, "bytes": published.bytes, "shards": published.shards,
        }));
    }
    if !args.verbosity.quiet {
        println!(
            "{}: {} parameters, {}, in the base's names and shapes.\n\
             This saves no memory: it is for runtimes that know no factors.",
            published.path.display(),
            grouped(published.params),
            human_bytes(published.bytes)
        );
    }
    Ok(())
}
