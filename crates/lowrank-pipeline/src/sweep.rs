//! Many plans from one set of measured errors, several at once, and what makes two of them the same.

use crate::planning::{Errors, Subject, plans_from};
use crate::{CalibrationText, FactorSettings, Goal, Interrupt, PipelineError, PlanSettings};
use lowrank_model::plan::{Allocation, Sensitivity};
use lowrank_model::{Budget, RankPlan, failure};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Everything that decides the ranks but goal and allocation: points that share it share the costly part of their plans.
/// Defaults are spelled out, so that leaving a key open and saying what it would be is the same.
fn choice_key(subject: &Subject, settings: &PlanSettings, sensitivity: Sensitivity) -> Value {
    // Without `..`: a new setting must be looked at here.
    let PlanSettings {
        goal: _,
        rank_multiple: _,
        rank_min,
        sensitivity: _,
        allocation: _,
        calibration: _,
        keep_dense,
        fixed_ranks,
        storage,
        factor_dtype,
    } = settings;
    let mut dense: Vec<String> = keep_dense.iter().map(ToString::to_string).collect();
    dense.sort_unstable();
    dense.dedup();
    json!({
        "rank_multiple": subject.rank_multiple(settings),
        "rank_min": rank_min,
        "sensitivity": sensitivity,
        "storage": storage.unwrap_or_default(),
        "factor_dtype": factor_dtype.unwrap_or(subject.dtype),
        "keep_dense": dense,
        "fix_rank": fixed_ranks.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

/// Everything that decides the tensors of a compression of one model, beside model and version: what a point of a sweep is
/// known by.
pub fn content(
    subject: &Subject,
    settings: &PlanSettings,
    factor: &FactorSettings,
    text: Option<&CalibrationText>,
) -> Value {
    let sensitivity = settings.sensitivity.unwrap_or(match text {
        Some(_) => Sensitivity::Measured,
        None => Sensitivity::default(),
    });
    let goal = match &settings.goal {
        Goal::Budget(budget) => match budget.resolve(subject.before.params, subject.before.bytes) {
            Ok(target) => json!(target),
            // One that cannot be met is known by how it was put.
            Err(_) => json!(format!("{budget:?}")),
        },
        Goal::Ranks(ranks) => json!(ranks),
        Goal::Plan(plan) => json!(plan),
    };
    let FactorSettings { method, seed, shard_bytes_max: _ } = factor;
    json!({
        "goal": goal,
        "allocation": settings.allocation,
        "choices": choice_key(subject, settings, sensitivity),
        "calibration": text.map(CalibrationText::key),
        "propagation": text.map(CalibrationText::propagation),
        "method": method,
        "seed": seed,
    })
}

/// A plan, or the line that says why there is none.
#[derive(Debug)]
pub struct Made {
    /// Without curves ([`Errors::curves`]).
    pub plan: Result<RankPlan, String>,
    /// Its share of the time that its group took.
    pub took: Duration,
}

/// Plans every point, `jobs` at once (0: one per core). `each` is told of one as soon as it is made, from the thread that
/// made it and in no order; the first error that it returns ends the work.
///
/// # Panics
/// If the goal of a point is no budget.
pub fn plan_many<E: From<PipelineError> + Send>(
    subject: &Subject,
    errors: &Errors,
    points: &[&PlanSettings],
    jobs: usize,
    interrupt: &Interrupt,
    each: &(dyn Fn(usize, Made) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, settings) in points.iter().enumerate() {
        let key = choice_key(subject, settings, errors.sensitivity).to_string();
        groups.entry(key).or_default().push(index);
    }
    let groups: Vec<Vec<usize>> = groups.into_values().collect();
    let plan_group = |group: &Vec<usize>| {
        interrupt.check()?;
        let start = Instant::now();
        let wish = |&index: &usize| match points[index].goal {
            Goal::Budget(budget) => (budget, points[index].allocation),
            _ => panic!("only budgets are planned"),
        };
        let wishes: Vec<(Budget, Allocation)> = group.iter().map(wish).collect();
        let plans = plans_from(subject, points[group[0]], &wishes, errors);
        let took = start.elapsed() / group.len() as u32;
        let plans: Vec<Result<RankPlan, String>> = match plans {
            Ok(plans) => plans.into_iter().map(|plan| plan.map_err(|error| failure::chain(&error))).collect(),
            Err(error) => vec![Err(failure::chain(&error)); group.len()],
        };
        group.iter().zip(plans).try_for_each(|(&index, plan)| each(index, Made { plan, took }))
    };
    let threads = rayon::ThreadPoolBuilder::new().num_threads(jobs).build();
    let threads = threads.map_err(|reason| PipelineError::Threads { reason })?;
    threads.install(|| groups.par_iter().with_max_len(1).try_for_each(plan_group))
}
