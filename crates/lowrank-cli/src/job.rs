//! From flags to a job: what to do, the recipe, and what may be used of this machine.

use crate::args::{JobArgs, given};
use crate::config::{GOALS, read_file};
use crate::exit::{Result, usage};
use lowrank_model::recipe::{Goal, TextChoice};
use lowrank_model::{MatrixId, RankPlan, Recipe, ranks};
use lowrank_pipeline::Interrupt;
use lowrank_pipeline::compress::Request;
use lowrank_pipeline::workers::Resources;
use lowrank_writer::Leftover;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A validated compression job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) model: String,
    pub(crate) out: Option<PathBuf>,
    pub(crate) plan_out: PathBuf,
    pub(crate) dry_run: bool,
    pub(crate) recipe: Recipe,
    pub(crate) resources: Resources,
    pub(crate) leftover: Leftover,
}

impl Job {
    /// Checks every value; nothing of the checkpoint is touched yet.
    pub(crate) fn new(args: JobArgs) -> Result<Self> {
        let model = args.model.clone().ok_or_else(|| usage("--model is missing: which checkpoint?"))?;
        Ok(Self {
            model,
            recipe: recipe(&args)?,
            resources: args.machine.resources(),
            out: args.out,
            plan_out: args.plan_out.unwrap_or_else(|| "plan.json".into()),
            dry_run: args.dry_run,
            leftover: if args.restart { Leftover::Discard } else { Leftover::Resume },
        })
    }

    /// What the pipeline is asked for.
    pub(crate) fn request<'a>(&'a self, out: &'a Path, interrupt: &'a Interrupt) -> Request<'a> {
        let Self { model, recipe, resources, leftover, .. } = self;
        Request { model, out, recipe, resources, leftover: *leftover, interrupt, provenance: None }
    }
}

/// The defaults, with the settings that were given laid over them.
fn recipe(args: &JobArgs) -> Result<Recipe> {
    let mut settings = given(&args.recipe);
    let all = given(args);
    match GOALS.iter().filter(|goal| all.contains_key(**goal)).count() {
        1 => {}
        0 => {
            let flags = "--budget, --target-params, --target-size, --plan, --ranks";
            return Err(usage(format!("say what to remove with one of {flags}")));
        }
        _ => {
            let flags = "--budget, --target-params, --target-size, --plan and --ranks";
            return Err(usage(format!("{flags} exclude each other")));
        }
    }
    if args.recipe.calibrate.iter().flatten().any(|text| *text == TextChoice::None) {
        let how = Recipe::calibration_keys().into_iter().filter(|key| settings.contains_key(key));
        if args.recipe.calibrate.iter().flatten().count() > 1 || how.count() > 1 {
            let what = "--calibrate none excludes other texts and everything that says how to calibrate";
            return Err(usage(what));
        }
    }
    let given_ranks = match (&args.plan, &args.ranks) {
        (Some(path), _) => Some(Goal::Plan(Box::new(read_plan(path)?))),
        (None, Some(path)) => Some(Goal::Ranks(read_ranks(path)?)),
        (None, None) => None,
    };
    if given_ranks.is_some() {
        settings.insert("ranks".into(), json!({}));
    }
    let mut recipe =
        Recipe::deserialize(Value::Object(settings)).map_err(|error| usage(error.to_string()))?;
    recipe.validate().map_err(|error| usage(format!("--{error}")))?;
    recipe.goal = given_ranks.unwrap_or(recipe.goal);
    Ok(recipe)
}

fn read_plan(path: &Path) -> Result<RankPlan> {
    let json = read_file(path, ranks::JSON_BYTES_MAX)?;
    RankPlan::from_json(&json).map_err(|error| match ranks::parse(&json) {
        Ok(_) => usage(format!("{}: is a rank map, not a plan; give it with --ranks", path.display())),
        Err(_) => usage(format!("{}: {error}", path.display())),
    })
}

fn read_ranks(path: &Path) -> Result<BTreeMap<MatrixId, usize>> {
    let json = read_file(path, ranks::JSON_BYTES_MAX)?;
    let ranks = ranks::parse(&json).map_err(|error| match RankPlan::from_json(&json) {
        Ok(_) => usage(format!("{}: is a plan, not a rank map; give it with --plan", path.display())),
        Err(_) => usage(format!("{}: {error}", path.display())),
    })?;
    if ranks.is_empty() {
        return Err(usage(format!("{}: names no matrix, so nothing would be compressed", path.display())));
    }
    Ok(ranks)
}
