//! `cargo xtask bench WHAT`: benchmarks, and the checkpoints that they use. Each has its own file.

mod cluster;
mod document;
pub(crate) mod fidelity;
pub(crate) mod forward;
pub(crate) mod peers;
pub(crate) mod speed;
pub(crate) mod sweep;
pub(crate) mod synth;

use anyhow::Result;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum What {
    /// Measure what every method loses on the bundled models, at several budgets, on texts that calibration did not see; write docs/fidelity.md
    Fidelity(fidelity::Args),
    /// Make 1,000 plans of Mixtral-8x7B from generated spectra; measure time and peak memory
    Sweep(sweep::Args),
    /// Count how long clusters of 1 to 256 nodes would take for two models, and which stage bounds them; runs nothing
    Cluster,
    /// Generate a checkpoint with the dimensions of Mixtral-8x7B
    Synth(synth::Args),
    /// Measure the time and memory of one matrix (ours, numpy, scipy, torch) and of whole runs; write docs/benchmarks.md
    Speed(speed::Args),
    /// Compare the speed of our forward pass with that of transformers on the same tokens
    Forward(forward::Args),
    /// Run published programs beside ours on the bundled models, from clones that you make; write docs/research/peers.md
    Peers(peers::Args),
}

/// Runs this verb.
pub(crate) fn run(what: &What) -> Result<()> {
    match what {
        What::Fidelity(args) => fidelity::run(args),
        What::Sweep(args) => sweep::run(args),
        What::Cluster => cluster::run(),
        What::Synth(args) => synth::run(args),
        What::Speed(args) => speed::run(args),
        What::Forward(args) => forward::run(args),
        What::Peers(args) => peers::run(args),
    }
}
