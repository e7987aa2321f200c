//! `cargo xtask bench WHAT`: measurements, and what they are made on. One of them, one file.

pub(crate) mod forward;
pub(crate) mod synth;

use anyhow::Result;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum What {
    /// Write a generated checkpoint of true Mixtral-8x7B dimensions
    Synth(synth::Args),
    /// Our forward pass against transformers' on the same tokens
    Forward(forward::Args),
}

/// The verb.
pub(crate) fn run(what: &What) -> Result<()> {
    match what {
        What::Synth(args) => synth::run(args),
        What::Forward(args) => forward::run(args),
    }
}
