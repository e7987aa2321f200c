//! `cargo xtask bench WHAT`: measurements whose figures stand in `docs/benchmarks.md`. One of them, one file.

pub(crate) mod sweep;

use anyhow::Result;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum What {
    /// 1,000 plans of Mixtral-8x7B from generated spectra: time and peak memory
    Sweep(sweep::Args),
}

/// The verb.
pub(crate) fn run(what: &What) -> Result<()> {
    match what {
        What::Sweep(args) => sweep::run(args),
    }
}
