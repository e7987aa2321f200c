//! The command line as a whole: which commands there are.

use crate::args::JobArgs;
use crate::commands::{
    cluster::ClusterArgs, densify::DensifyArgs, inspect::InspectArgs, report::ReportArgs,
    reproduce::ReproduceArgs, sweep::SweepArgs, verify::VerifyArgs,
};
use crate::exit::{Result, usage};
use crate::home;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};
use lowrank_model::display::abridge;

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
    /// Print the script that compresses a checkpoint on several machines of a Slurm cluster, or submit it
    Cluster(Box<ClusterArgs>),
    /// Show what is in a checkpoint: layout, parameters by kind, dtypes, shards
    Inspect(InspectArgs),
    /// Multiply factors back to the base's names and shapes, for runtimes that know no factors (saves no memory)
    Densify(DensifyArgs),
    /// Check a compressed checkpoint against its original, and measure what it lost
    Verify(VerifyArgs),
    /// Make a compressed checkpoint again from its own metadata, and compare every byte
    Reproduce(ReproduceArgs),
    /// Plan many points of a grid, compress and verify the best, and show what they cost
    Sweep(SweepArgs),
    /// Make one HTML file that shows what was removed, where it was cut and what it cost
    Report(ReportArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages: one of the program and one of each command
    Man {
        /// Directory for them, such as ~/.local/share/man/man1
        dir: std::path::PathBuf,
    },
}

/// Reads the command line; a mistake in it is one line.
pub(crate) fn parse() -> Result<Cli> {
    Cli::try_parse_from(home::expand_words(std::env::args_os())?).map_err(|error| {
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            error.exit();
        }
        let text = error.render().to_string();
        // The first paragraph says what is wrong; usage and tips follow it.
        let first = text.split("\n\n").next().unwrap_or_default();
        let line = first.trim_start_matches("error: ").split_whitespace().collect::<Vec<_>>().join(" ");
        let line = abridge(&line);
        usage(match error.get(ContextKind::SuggestedArg) {
            Some(ContextValue::String(name)) => format!("{line}; did you mean {name}?"),
            _ => line,
        })
    })
}
