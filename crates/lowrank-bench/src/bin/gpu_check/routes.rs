//! The routes to factors, and one run of a decoder layer: what parity and speed share.

use crate::generated::{Layer, unit_norm};
use crate::results::Failure;
use lowrank_compute::Backend;
use lowrank_forward::{Engine, Hidden};
use lowrank_model::{ModelConfig, Spectrum, Tensor};
use lowrank_svd::{MethodChoice, PrecisionChoice, SvdError, SvdOptions};
use std::time::Instant;

/// The ways to factors that are held against each other.
pub(crate) const ROUTES: [(&str, MethodChoice, PrecisionChoice); 4] = [
    ("eigenvectors, f32", MethodChoice::Exact, PrecisionChoice::F32),
    ("eigenvectors, f64", MethodChoice::Exact, PrecisionChoice::F64),
    ("projector, f32", MethodChoice::Projector, PrecisionChoice::F32),
    ("projector, f64", MethodChoice::Projector, PrecisionChoice::F64),
];

pub(crate) fn options((_, method, precision): (&str, MethodChoice, PrecisionChoice)) -> SvdOptions<'static> {
    SvdOptions { method, precision, ..SvdOptions::default() }
}

pub(crate) fn spectrum(
    backend: &dyn Backend,
    w: &Tensor,
    precision: PrecisionChoice,
) -> Result<Spectrum, SvdError> {
    let options = SvdOptions { precision, ..SvdOptions::default() };
    Ok(lowrank_svd::spectrum(backend, w, &options)?.0)
}

/// Seconds of attention and of the MoE block, and its output.
pub(crate) fn run_layer(
    engine: &dyn Engine,
    config: &ModelConfig,
    layer: Layer,
    hidden: &mut Hidden,
) -> Result<([f64; 2], Vec<f32>), Failure> {
    let start = Instant::now();
    engine.attention(config, layer.attention, hidden)?;
    let attention_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let input = engine.norm(hidden.states(), &unit_norm(config))?;
    let inputs = [input.as_slice()];
    let mut moe = engine.moe(&inputs, &layer.router)?;
    for (expert, weights) in layer.experts.into_iter().enumerate() {
        moe.expert((0, expert), weights, &mut ())?;
    }
    let output = moe.outputs()?.remove(0);
    Ok(([attention_s, start.elapsed().as_secs_f64()], output))
}
