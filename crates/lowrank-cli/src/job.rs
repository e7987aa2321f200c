//! From what was typed to what is meant: flags over `--config`, strings into values, every mistake named here.

use crate::args::{Algebra, JobArgs};
use crate::commands::verify::Device;
use crate::exit::{Failure, Result, usage};
use lowrank_calibrate::{CalibrationSettings, GateWeight, MomentSettings, Propagation, Reach, Target};
use lowrank_model::display::{abridge, clip};
use lowrank_model::plan::{Allocation, Sensitivity};
use lowrank_model::{Budget, Dtype, MatrixId, RankPlan, Storage, budget, ranks};
use lowrank_pipeline::settings::pattern_of;
use lowrank_pipeline::workers::{CachePlace, Resources};
use lowrank_pipeline::{AlgebraChoice, FactorSettings, FixedRank, Goal, PlanSettings};
use lowrank_svd::MethodChoice;
use lowrank_text::{Passage, TextSource};
use lowrank_writer::Leftover;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A validated compression job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) model: String,
    pub(crate) out: Option<PathBuf>,
    pub(crate) plan_out: PathBuf,
    pub(crate) dry_run: bool,
    pub(crate) plan: PlanSettings,
    pub(crate) factor: FactorSettings,
    pub(crate) resources: Resources,
    pub(crate) leftover: Leftover,
}

/// Longest `--config`.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Keys that say what to remove; they exclude each other.
pub(crate) const RANK_SOURCES: [&str; 5] = ["budget", "target-params", "target-size", "plan", "ranks"];

/// The text of a config file.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    let text = String::from_utf8(read_file(path, CONFIG_BYTES_MAX)?);
    text.map_err(|error| usage(format!("{}: {error}", path.display())))
}

/// Flags, with what they leave open taken from `--config`.
pub(crate) fn with_config(flags: JobArgs) -> Result<JobArgs> {
    let Some(path) = flags.config.clone() else { return Ok(flags) };
    let text = read_config(&path)?;
    // Read once as the struct, for the sake of errors that name line and key.
    let _: JobArgs = toml::from_str(&text)
        .map_err(|error| usage(format!("{}: {}", path.display(), one_line(&error, &text))))?;
    let mut merged: toml::Table = toml::from_str(&text).map_err(Failure::bug)?;
    let typed = toml::Table::try_from(&flags).map_err(Failure::bug)?;
    if RANK_SOURCES.iter().any(|key| typed.contains_key(*key)) {
        // A flag that says what to remove replaces the file's way of saying it.
        RANK_SOURCES.iter().for_each(|key| drop(merged.remove(*key)));
    }
    merged.extend(typed);
    let mut args: JobArgs = merged.try_into().map_err(Failure::bug)?;
    args.config = Some(path);
    (args.resume, args.restart) = (flags.resume, flags.restart);
    Ok(args)
}

/// What is wrong with a config, and in which line.
pub(crate) fn one_line(error: &toml::de::Error, text: &str) -> String {
    let message = abridge(error.message().lines().next().unwrap_or("cannot be read"));
    match error.span() {
        Some(span) => format!("line {}: {message}", line_of(text, span.start)),
        None => message,
    }
}

/// The line, from 1, in which a byte stands.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
}

impl Job {
    /// Checks every value; nothing of the checkpoint is touched yet.
    pub(crate) fn new(args: JobArgs) -> Result<Self> {
        let model = args.model.clone().ok_or_else(|| usage("--model is missing: which checkpoint?"))?;
        let plan = PlanSettings {
            goal: goal(&args)?,
            rank_multiple: args.rank_multiple,
            rank_min: args.min_rank.unwrap_or(1),
            sensitivity: match args.sensitivity.as_deref() {
                None => None,
                Some("measured") => Some(Sensitivity::Measured),
                Some("absolute") => Some(Sensitivity::Absolute),
                Some("relative") => Some(Sensitivity::Relative),
                Some(other) => return Err(wrong("--sensitivity", other, "measured, absolute or relative")),
            },
            allocation: flag(
                "--allocation",
                args.allocation.as_deref(),
                "global or uniform",
                Allocation::parse,
            )?
            .unwrap_or_default(),
            calibration: calibration(&args)?,
            keep_dense: each("--keep-dense", &args.keep_dense, pattern_of)?,
            fixed_ranks: each("--fix-rank", &args.fix_rank, FixedRank::from_str)?,
            storage: match args.layout.as_deref() {
                None => None,
                Some(text) => {
                    Some(Storage::parse(text).ok_or_else(|| wrong("--layout", text, "uv or pivoted"))?)
                }
            },
            factor_dtype: args.dtype.as_deref().map(dtype).transpose()?,
        };
        if plan.rank_multiple == Some(0) || plan.rank_min == 0 {
            return Err(usage("--rank-multiple and --min-rank start at 1"));
        }
        let method = match args.method.as_deref() {
            None | Some("auto") => MethodChoice::Auto,
            Some("exact") => MethodChoice::Exact,
            Some("randomized") => MethodChoice::Randomized,
            Some("projector") => MethodChoice::Projector,
            Some(other) => {
                return Err(wrong("--method", other, "auto, exact, projector or randomized"));
            }
        };
        let shard_bytes_max = bytes("--max-shard-size", args.max_shard_size.as_deref().unwrap_or("5GB"))?;
        Ok(Self {
            model,
            out: args.out,
            plan_out: args.plan_out.unwrap_or_else(|| "plan.json".into()),
            dry_run: args.dry_run,
            plan,
            leftover: if args.restart { Leftover::Discard } else { Leftover::Resume },
            factor: FactorSettings { method, seed: args.seed.unwrap_or(0), shard_bytes_max },
            resources: Resources {
                workers: args.workers.unwrap_or(0),
                memory_bytes: args.memory.as_deref().map(|text| bytes("--memory", text)).transpose()?,
                cache: cache_place(args.cache.as_deref()),
                device: args.device.unwrap_or(Device::Auto).into(),
                algebra: match args.algebra {
                    None | Some(Algebra::Cpu) => AlgebraChoice::Cpu,
                    Some(Algebra::Cuda) => AlgebraChoice::Cuda,
                },
            },
        })
    }
}

/// What to calibrate on, and how.
fn calibration(args: &JobArgs) -> Result<Option<CalibrationSettings>> {
    if args.calibrate.iter().any(|text| text == "none") {
        return match args {
            JobArgs { calibration_tokens: None, gate_weight: None, calibration_target: None, .. }
                if args.calibrate.len() == 1
                    && args.calibration_blend.is_none()
                    && args.propagate.is_none()
                    && args.propagate_own_share.is_none()
                    && args.sensitivity_tokens.is_none() =>
            {
                Ok(None)
            }
            _ => {
                Err(usage("--calibrate none excludes other texts and everything that says how to calibrate"))
            }
        };
    }
    let usual = CalibrationSettings::on(texts(&args.calibrate));
    let gate_weight =
        flag("--gate-weight", args.gate_weight.as_deref(), "none, linear or squared", GateWeight::parse)?;
    let target =
        flag("--calibration-target", args.calibration_target.as_deref(), "matrix or expert", Target::parse)?;
    let settings = CalibrationSettings {
        tokens: args.calibration_tokens.unwrap_or(usual.tokens),
        sensitivity_tokens: args.sensitivity_tokens,
        moments: MomentSettings {
            gate_weight: gate_weight.unwrap_or(usual.moments.gate_weight),
            target: target.unwrap_or(usual.moments.target),
        },
        blend: args.calibration_blend.unwrap_or(usual.blend),
        propagation: Propagation {
            reach: flag("--propagate", args.propagate.as_deref(), "none, experts or layers", Reach::parse)?
                .unwrap_or(usual.propagation.reach),
            own_share: args.propagate_own_share.unwrap_or(usual.propagation.own_share),
        },
        ..usual
    };
    if !(0.0..=1.0).contains(&settings.blend) {
        return Err(wrong("--calibration-blend", &settings.blend.to_string(), "a share from 0 to 1"));
    }
    if !(0.0..=1.0).contains(&settings.propagation.own_share) {
        let given = settings.propagation.own_share.to_string();
        return Err(wrong("--propagate-own-share", &given, "a share from 0 to 1"));
    }
    if settings.tokens < 2 || settings.sensitivity_tokens.is_some_and(|tokens| tokens < 2) {
        return Err(usage("--calibration-tokens and --sensitivity-tokens start at 2"));
    }
    Ok(Some(settings))
}

/// Files that were named; the bundled passage where none was.
pub(crate) fn texts(files: &[String]) -> Vec<TextSource> {
    if files.is_empty() {
        return vec![TextSource::Bundled(Passage::Calibration)];
    }
    files.iter().map(|file| TextSource::File(file.into())).collect()
}

pub(crate) fn cache_place(given: Option<&str>) -> CachePlace {
    match given {
        None => CachePlace::Usual,
        Some("none") => CachePlace::Nowhere,
        Some(root) => CachePlace::At(root.into()),
    }
}

fn flag<T>(
    name: &str,
    given: Option<&str>,
    expected: &str,
    parse: fn(&str) -> Option<T>,
) -> Result<Option<T>> {
    given.map(|text| parse(text).ok_or_else(|| wrong(name, text, expected))).transpose()
}

fn goal(args: &JobArgs) -> Result<Goal> {
    let budget = |flag: &str, parsed: Result<Budget, budget::BudgetError>| {
        parsed.map(Goal::Budget).map_err(|error| usage(format!("{flag}: {error}")))
    };
    match (&args.budget, &args.target_params, &args.target_size, &args.plan, &args.ranks) {
        (Some(text), None, None, None, None) => budget("--budget", Budget::parse_removal(text)),
        (None, Some(text), None, None, None) => budget("--target-params", Budget::parse_target_params(text)),
        (None, None, Some(text), None, None) => budget("--target-size", Budget::parse_target_size(text)),
        (None, None, None, Some(path), None) => Ok(Goal::Plan(Box::new(read_plan(path)?))),
        (None, None, None, None, Some(path)) => Ok(Goal::Ranks(read_ranks(path)?)),
        (None, None, None, None, None) => Err(usage(
            "say what to remove with one of --budget, --target-params, --target-size, --plan, --ranks",
        )),
        _ => Err(usage("--budget, --target-params, --target-size, --plan and --ranks exclude each other")),
    }
}

/// A file that a flag names; nothing is read beyond the limit, whatever its length is said to be.
fn read_file(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    let broken = |what: String| usage(format!("{}: {what}", path.display()));
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| broken(error.to_string()))?;
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|error| broken(error.to_string()))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(broken(format!(
            "more than {limit_bytes} bytes, which is too long for what it should be"
        )));
    }
    Ok(bytes)
}

fn read_plan(path: &Path) -> Result<RankPlan> {
    let plan = RankPlan::from_json(&read_file(path, ranks::JSON_BYTES_MAX)?);
    plan.map_err(|error| usage(format!("{}: {error}", path.display())))
}

fn read_ranks(path: &Path) -> Result<BTreeMap<MatrixId, usize>> {
    let ranks = ranks::parse(&read_file(path, ranks::JSON_BYTES_MAX)?);
    ranks.map_err(|error| usage(format!("{}: {error}", path.display())))
}

/// Every value of a flag that may be repeated.
fn each<T>(flag: &str, texts: &[String], parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>> {
    let one = |text: &String| {
        parse(text).map_err(|reason| usage(format!("{flag} `{}`: {}", clip(text), clip(&reason))))
    };
    texts.iter().map(one).collect()
}

pub(crate) fn dtype(text: &str) -> Result<Dtype> {
    Dtype::parse(text).ok_or_else(|| wrong("--dtype", text, "bf16, f16 or f32"))
}

pub(crate) fn bytes(flag: &str, text: &str) -> Result<u64> {
    match budget::parse_bytes(text) {
        Ok(0) => Err(wrong(flag, text, "more than nothing")),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(usage(format!("{flag}: {error}"))),
    }
}

fn wrong(flag: &str, value: &str, expected: &str) -> Failure {
    usage(format!("{flag} is `{}`, expected {expected}", clip(value)))
}
