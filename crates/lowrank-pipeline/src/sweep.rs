//! Many plans from one set of measured errors, several at once.

use crate::planning::{Errors, Subject, plans_from, sorted_patterns};
use crate::{Interrupt, PipelineError};
use lowrank_model::plan::Allocation;
use lowrank_model::recipe::PlanSettings;
use lowrank_model::{RankPlan, Recipe, failure};
use rayon::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Everything that decides the ranks but goal and allocation: points that share it share the costly part of their plans.
fn shared_key(resolved: &Recipe) -> String {
    let keep_dense = sorted_patterns(&resolved.plan.keep_dense);
    let plan = PlanSettings { allocation: Allocation::default(), keep_dense, ..resolved.plan.clone() };
    json!([plan, resolved.factor.storage, resolved.factor.dtype]).to_string()
}

/// A plan, or the line that says why there is none.
#[derive(Debug)]
pub struct PlannedPoint {
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
    points: &[&Recipe],
    jobs: usize,
    interrupt: &Interrupt,
    each: &(dyn Fn(usize, PlannedPoint) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, recipe) in points.iter().enumerate() {
        groups.entry(shared_key(&subject.resolve(recipe))).or_default().push(index);
    }
    let groups: Vec<Vec<usize>> = groups.into_values().collect();
    let plan_group = |group: &Vec<usize>| {
        interrupt.check()?;
        let start = Instant::now();
        let recipes: Vec<&Recipe> = group.iter().map(|&index| points[index]).collect();
        let plans = plans_from(subject, &recipes, errors);
        let took = start.elapsed() / group.len() as u32;
        let plans: Vec<Result<RankPlan, String>> = match plans {
            Ok(plans) => plans.into_iter().map(|plan| plan.map_err(|error| failure::chain(&error))).collect(),
            Err(error) => vec![Err(failure::chain(&error)); group.len()],
        };
        group.iter().zip(plans).try_for_each(|(&index, plan)| each(index, PlannedPoint { plan, took }))
    };
    let threads = rayon::ThreadPoolBuilder::new().num_threads(jobs).build();
    let threads = threads.map_err(|reason| PipelineError::Threads { reason })?;
    threads.install(|| groups.par_iter().with_max_len(1).try_for_each(plan_group))
}
