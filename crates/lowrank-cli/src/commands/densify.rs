//! `densify`: factors multiplied back to a plain Mixtral.

use crate::args::DensifyArgs;
use crate::commands::{open, print_json};
use crate::exit::Result;
use crate::job;
use crate::progress::Talk;
use crate::tables::human_bytes;
use lowrank_model::display::grouped;
use lowrank_pipeline::densify::{DensifySettings, densify};
use lowrank_pipeline::workers::Resources;
use serde_json::json;

/// Runs the command.
pub(crate) fn run(args: &DensifyArgs) -> Result<()> {
    let settings = DensifySettings {
        dtype: args.dtype.as_deref().map(job::dtype).transpose()?,
        shard_bytes_max: job::bytes("--max-shard-size", &args.max_shard_size)?,
        resources: Resources { workers: args.workers, ..Resources::default() },
    };
    let checkpoint = open(&args.model)?;
    let published = densify(&checkpoint, &args.out, settings, &Talk::new(args.talk.quiet))?;
    if args.talk.json {
        return print_json(&json!({
            "out": published.path, "params": published.params, "bytes": published.bytes, "shards": published.shards,
        }));
    }
    if !args.talk.quiet {
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
