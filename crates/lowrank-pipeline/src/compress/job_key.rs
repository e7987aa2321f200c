//! What an unfinished run is known by: everything that decides the bytes of its tensors.

use super::Request;
use crate::{CalibrationText, Goal};
use lowrank_compute::Algebra;
use lowrank_reader::Checkpoint;
use lowrank_writer::JobKey;
use lowrank_writer::report::InputFile;
use serde_json::{Value, json};

/// Everything that decides the bytes of the tensors. The rest of the output is made anew at the end of every run.
pub(super) fn job_key(job: &Value, files: &[InputFile]) -> JobKey {
    JobKey::of(&json!({ "job": job, "files": files }))
}

/// As far as it is known without a look at the weights.
pub(super) fn job(
    checkpoint: &Checkpoint,
    text: Option<&CalibrationText>,
    algebra: &Algebra,
    request: &Request<'_>,
) -> Value {
    let Request { plan, factor, .. } = request;
    let goal = match &plan.goal {
        Goal::Budget(budget) => json!({ "budget": format!("{budget:?}") }),
        Goal::Ranks(ranks) => json!({ "ranks": ranks }),
        Goal::Plan(plan) => json!({ "plan": plan }),
    };
    json!({
        "job": "compress",
        "version": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "config": checkpoint.config_json(),
        "goal": goal,
        "rank_multiple": plan.rank_multiple,
        "rank_min": plan.rank_min,
        "sensitivity": plan.sensitivity,
        "allocation": plan.allocation,
        "calibration": text.map(CalibrationText::key),
        "propagation": text.map(CalibrationText::propagation),
        "device": format!("{:?}", request.resources.device),
        "algebra": algebra.identity(),
        "keep_dense": plan.keep_dense.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "fix_rank": plan.fixed_ranks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "factor_dtype": plan.factor_dtype,
        "storage": plan.storage,
        "method": factor.method,
        "seed": factor.seed,
        "shard_bytes_max": factor.shard_bytes_max,
    })
}
