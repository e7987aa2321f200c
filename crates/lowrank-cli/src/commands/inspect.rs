//! `inspect`: what is in this checkpoint.

use crate::args::Verbosity;
use crate::commands::shared::{open, print_json};
use crate::exit::Result;
use crate::tables::{human_bytes, percent, table};
use clap::Args;
use lowrank_model::display::grouped;
use lowrank_pipeline::inspect::{Inspection, inspect, left_out_line};

/// Flags of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint directory, or org/name in the local Hugging Face cache
    #[arg(value_name = "DIR|ORG/NAME", required_unless_present = "named", conflicts_with = "named")]
    model: Option<String>,
    /// The same, as other commands take it
    #[arg(long = "model", short = 'm', value_name = "DIR|ORG/NAME")]
    named: Option<String>,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// Runs the command.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let model = args.model.as_ref().or(args.named.as_ref()).expect("clap asks for one of them");
    let checkpoint = open(model)?;
    let found = inspect(&checkpoint);
    if args.verbosity.json {
        return print_json(&found);
    }
    print(&found, args.verbosity.verbose);
    Ok(())
}

fn print(found: &Inspection, verbose: bool) {
    println!("{} · {}", found.family, found.layout);
    println!(
        "{} layers × {} experts, {} per token · hidden_size {} · intermediate_size {}",
        found.num_hidden_layers,
        found.num_local_experts,
        found.num_experts_per_tok,
        found.hidden_size,
        found.intermediate_size
    );
    let rows = found.kinds.iter().map(|kind| {
        vec![
            kind.kind.to_owned(),
            grouped(kind.tensors),
            grouped(kind.params),
            percent(kind.params, found.params),
            human_bytes(kind.bytes),
        ]
    });
    let total =
        vec!["all".into(), String::new(), grouped(found.params), String::new(), human_bytes(found.bytes)];
    println!("{}", table(&["kind", "tensors", "parameters", "share", "bytes"], rows.chain([total])));
    for (dtype, elements) in &found.dtypes {
        println!("{dtype}: {} parameters", grouped(*elements));
    }
    if !found.widths.is_empty() {
        let widths = || found.widths.values().filter_map(serde_json::Value::as_u64);
        println!(
            "{} experts keep {} to {} of {} channels.",
            found.widths.len(),
            widths().min().unwrap_or_default(),
            widths().max().unwrap_or_default(),
            found.intermediate_size
        );
    }
    if !found.shared_base_layers.is_empty() {
        println!("The experts of {} layers share a base.", found.shared_base_layers.len());
    }
    if found.ranks.is_empty() && found.widths.is_empty() {
        println!(
            "A compression can remove at most {} parameters; ranks alone (--structures rank) {}, stored as they are by default.",
            grouped(found.params_removable),
            grouped(found.params_removable_by_rank)
        );
    } else if !found.ranks.is_empty() {
        let ranks = || found.ranks.values().filter_map(serde_json::Value::as_u64);
        let (low, high) = (ranks().min(), ranks().max());
        println!(
            "{} expert matrices are factored, ranks {} to {}.",
            found.ranks.len(),
            low.unwrap_or_default(),
            high.unwrap_or_default()
        );
    }
    println!("{} shards", found.shards.len());
    let names: Vec<_> = found.companions.iter().map(|name| name.display().to_string()).collect();
    println!(
        "Carried into an output: {}.",
        if names.is_empty() { "nothing".into() } else { names.join(", ") }
    );
    if let Some(line) = left_out_line(&found.left_out).filter(|_| !verbose) {
        println!("{line}");
    }
    if verbose {
        let shards = found.shards.iter().map(|shard| vec![shard.name.clone(), human_bytes(shard.bytes)]);
        println!("{}", table(&["shard", "bytes"], shards));
        let left_out = found.left_out.iter().map(|left| vec![left.name.clone(), left.what.to_string()]);
        println!("{}", table(&["not carried", "what it is"], left_out));
        let ranks = found.ranks.iter().map(|(id, rank)| vec![id.to_string(), rank.to_string()]);
        println!("{}", table(&["matrix", "rank"], ranks));
        let widths = found.widths.iter().map(|(name, width)| vec![name.clone(), width.to_string()]);
        println!("{}", table(&["narrowed expert", "channels"], widths));
    }
}
