//! `cargo xtask bench WHAT`: measurements whose figures stand in `docs/`. One file per subject.

pub(crate) mod fidelity;

use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// What every method keeps of the bundled models at several budgets, on texts that were not calibrated on
    Fidelity(fidelity::Args),
}

/// The verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Fidelity(args) => fidelity::run(args),
    }
}
