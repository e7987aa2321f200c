//! `cargo xtask bench WHAT`: measurements, and what they are made on. One of them, one file.

mod document;
pub(crate) mod fidelity;
pub(crate) mod forward;
pub(crate) mod speed;
pub(crate) mod sweep;
pub(crate) mod synth;

use anyhow::Result;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum What {
    /// What every method keeps of the bundled models at several budgets, on texts that were not calibrated on
    Fidelity(fidelity::Args),
    /// 1,000 plans of Mixtral-8x7B from generated spectra: time and peak memory
    Sweep(sweep::Args),
    /// Write a generated checkpoint of true Mixtral-8x7B dimensions
    Synth(synth::Args),
    /// Measure what a matrix costs here and elsewhere, how runs scale, and what bounds them; write docs/benchmarks.md
    Speed(speed::Args),
    /// Our forward pass against transformers' on the same tokens
    Forward(forward::Args),
}

/// The verb.
pub(crate) fn run(what: &What) -> Result<()> {
    match what {
        What::Fidelity(args) => fidelity::run(args),
        What::Sweep(args) => sweep::run(args),
        What::Synth(args) => synth::run(args),
        What::Speed(args) => speed::run(args),
        What::Forward(args) => forward::run(args),
    }
}
