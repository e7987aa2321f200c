//! The config of a sweep: settings that all points share, a grid of those in which they differ, and single points. Keys are
//! those of `--config`; every mistake is named with file and line before anything runs.

use crate::args::JobArgs;
use crate::exit::{Failure, Result, usage};
use crate::job::{self, Job, RANK_SOURCES, line_of};
use lowrank_model::display::abridge;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// Keys in which points may differ: everything that decides the bytes.
pub(crate) const AXES: [&str; 21] = [
    "budget",
    "target-params",
    "target-size",
    "rank-multiple",
    "min-rank",
    "keep-dense",
    "fix-rank",
    "layout",
    "calibrate",
    "calibration-tokens",
    "gate-weight",
    "calibration-target",
    "calibration-blend",
    "propagate",
    "propagate-own-share",
    "sensitivity-tokens",
    "sensitivity",
    "allocation",
    "method",
    "seed",
    "dtype",
];
/// Keys whose value is a list; one string is a list of one.
const LISTS: [&str; 3] = ["keep-dense", "fix-rank", "calibrate"];
/// Keys of a job that a sweep has no use for.
const NO_KEYS: [&str; 4] = ["plan", "ranks", "plan-out", "dry-run"];
/// The most points of one sweep.
const POINTS_MAX: usize = 100_000;

/// A config, read and checked as far as that goes without the model.
#[derive(Debug)]
pub(crate) struct Sweep {
    file: PathBuf,
    pub(crate) base: JobArgs,
    pub(crate) points: Vec<Point>,
    pub(crate) compress: Compress,
    /// Whether checkpoints stay when they have been verified.
    pub(crate) keep: bool,
    pub(crate) verify: VerifyKeys,
    /// Where the keys of the base stand.
    base_lines: BTreeMap<String, usize>,
}

/// One point.
#[derive(Debug)]
pub(crate) struct Point {
    /// From 1, in the order of the config.
    pub(crate) number: usize,
    /// Its own settings and the shared ones, as far as points may differ in them.
    pub(crate) settings: serde_json::Map<String, serde_json::Value>,
    pub(crate) job: Job,
    /// Where its own keys stand.
    lines: BTreeMap<String, usize>,
    /// Where it stands as a whole.
    line: usize,
}

/// Which points are compressed and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compress {
    None,
    All,
    /// Those that no other of their scale beats.
    Pareto,
}

/// `[verify]`: what compressed points are run on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct VerifyKeys {
    /// As `verify --text`.
    pub(crate) text: Option<PathBuf>,
    /// As `verify --window`.
    pub(crate) window: Option<usize>,
    /// As `verify --max-tokens`.
    pub(crate) max_tokens: Option<usize>,
}

/// A value and the line that it stands in.
#[derive(Debug, Clone)]
struct Stands {
    value: Value,
    line: usize,
}

/// Own keys of a point, and the line of the whole.
type Own = (Vec<(String, Stands)>, usize);

/// A key of the grid and the values to try.
type Axis = (String, Vec<Stands>);

/// The text of a config.
struct Source<'a> {
    file: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn error(&self, line: usize, what: impl std::fmt::Display) -> Failure {
        usage(format!("{}: line {line}: {what}", self.file.display()))
    }

    fn line<T>(&self, spanned: &Spanned<T>) -> usize {
        line_of(self.text, spanned.span().start)
    }

    /// The tables of the config keep order and lines, not types; a value is read again by its own text.
    fn value(&self, value: &Spanned<DeValue<'_>>) -> Result<Stands> {
        let line = self.line(value);
        let again = Value::deserialize(toml::de::ValueDeserializer::from(value.clone()));
        let value = again.map_err(|error| self.error(line, abridge(error.message())))?;
        Ok(Stands { value, line })
    }

    /// A table's keys in the order of the file.
    fn entries(&self, table: &DeTable<'_>) -> Result<Vec<(String, Stands)>> {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let stands = |(key, value): (&Spanned<_>, _)| {
            let key: &std::borrow::Cow<'_, str> = key.get_ref();
            Ok((key.to_string(), self.value(value)?))
        };
        entries.into_iter().map(stands).collect()
    }

    /// Whether a key exists and its value can be meant, as far as that can be said of one alone.
    fn check(&self, key: &str, stands: &Stands) -> Result<()> {
        if NO_KEYS.contains(&key) {
            return Err(self.error(stands.line, format_args!("`{key}` is no key of a sweep")));
        }
        let alone = Table::from_iter([(key.to_owned(), stands.value.clone())]);
        let args: Result<JobArgs, _> = alone.try_into();
        let args = args.map_err(|error: toml::de::Error| {
            let message = error.message().lines().next().unwrap_or_default().to_owned();
            self.error(stands.line, format_args!("`{key}`: {}", abridge(&message)))
        })?;
        let budget = if RANK_SOURCES.contains(&key) { args.budget.clone() } else { Some("1%".into()) };
        let model = Some("-".into());
        Job::new(JobArgs { model, budget, ..args }).map(drop).map_err(|error| self.error(stands.line, error))
    }

    /// A key of a point, as [`Source::check`].
    fn check_axis(&self, key: &str, stands: &Stands) -> Result<()> {
        if AXES.contains(&key) {
            return self.check(key, stands);
        }
        let all = AXES.join(", ");
        Err(self.error(stands.line, format_args!("points cannot differ in `{key}`, only in {all}")))
    }

    /// Several ways to say what goes.
    fn one_source<'k>(&self, keys: impl Iterator<Item = (&'k str, usize)>) -> Result<()> {
        let mut found: Vec<(&str, usize)> = keys.filter(|(key, _)| RANK_SOURCES.contains(key)).collect();
        found.sort_by_key(|(_, line)| *line);
        match found[..] {
            [(first, before), (second, line), ..] => {
                let what =
                    format!("`{second}` contradicts `{first}` in line {before}: both say what to remove");
                Err(self.error(line, what))
            }
            _ => Ok(()),
        }
    }
}

/// One string where a list is expected.
fn listed(key: &str, value: Value) -> Value {
    match value {
        Value::String(text) if LISTS.contains(&key) => Value::Array(vec![Value::String(text)]),
        other => other,
    }
}

impl Sweep {
    /// Reads a config; `flags` are laid over what all points share.
    pub(crate) fn read(file: &Path, flags: &JobArgs) -> Result<Self> {
        let text = job::read_config(file)?;
        let source = Source { file, text: &text };
        let parsed = DeTable::parse(&text)
            .map_err(|error| usage(format!("{}: {}", file.display(), job::one_line(&error, &text))))?;
        let table = parsed.get_ref();
        let mut base: BTreeMap<String, Stands> = BTreeMap::new();
        let (mut compress, mut keep, mut verify) = (Compress::None, false, VerifyKeys::default());
        let mut grid: Option<(Vec<Axis>, usize)> = None;
        let mut singles: Vec<Own> = Vec::new();
        for (key, value) in table {
            let line = source.line(key);
            match key.get_ref().as_ref() {
                "compress" => compress = read_compress(&source, value)?,
                "keep" => {
                    keep = value
                        .get_ref()
                        .as_bool()
                        .ok_or_else(|| source.error(line, "`keep` is true or false"))?;
                }
                "verify" => verify = read_verify(&source, value)?,
                "grid" => grid = Some((read_grid(&source, value)?, line)),
                "point" => singles = read_points(&source, value)?,
                name => {
                    let Stands { value, line } = source.value(value)?;
                    let stands = Stands { value: listed(name, value), line };
                    source.check(name, &stands)?;
                    base.insert(name.to_owned(), stands);
                }
            }
        }
        if grid.is_none() && singles.is_empty() {
            let what = "no points: say in [grid] or [[point]] in what they differ";
            return Err(usage(format!("{}: {what}", file.display())));
        }
        let mut own = Vec::new();
        if let Some((axes, line)) = grid {
            for (key, values) in &axes {
                if let Some(shared) = base.get(key) {
                    let what = format!(
                        "`{key}` stands in [grid] and, in line {}, for all points: keep one",
                        shared.line
                    );
                    return Err(source.error(values[0].line, what));
                }
            }
            let shared = base.iter().map(|(key, stands)| (key.as_str(), stands.line));
            source
                .one_source(shared.chain(axes.iter().map(|(key, values)| (key.as_str(), values[0].line))))?;
            own = product(&source, axes, line)?;
        }
        own.extend(singles);
        let mut shared: Table =
            base.iter().map(|(key, stands)| (key.clone(), stands.value.clone())).collect();
        shared.extend(Table::try_from(flags).expect("flags are plain values"));
        let all: JobArgs = shared.clone().try_into().expect("every key was read before");
        let points = own.into_iter().enumerate().map(|(index, own)| point(&source, index + 1, &shared, own));
        Ok(Self {
            file: file.to_owned(),
            points: points.collect::<Result<_>>()?,
            base: all,
            compress,
            keep,
            verify,
            base_lines: base.into_iter().map(|(key, stands)| (key, stands.line)).collect(),
        })
    }

    /// A mistake that shows only with the model, at the line of a point's key.
    pub(crate) fn error(&self, point: &Point, key: &str, what: impl std::fmt::Display) -> Failure {
        let line = point.lines.get(key).or_else(|| self.base_lines.get(key)).unwrap_or(&point.line);
        usage(format!("{}: line {line}: {what}", self.file.display()))
    }

    /// Two points that are one.
    pub(crate) fn same(&self, first: &Point, again: &Point) -> Failure {
        // If they say different things that mean the same: where the second says it.
        let differs = |key: &&String| first.settings.get(*key) != again.settings.get(*key);
        let key = again.lines.keys().find(differs).cloned().unwrap_or_default();
        let what = format!("point {} is point {} again: {}", again.number, first.number, again.label());
        self.error(again, &key, what)
    }

    /// Keys in which points differ, in the order of [`AXES`].
    pub(crate) fn axes(&self) -> Vec<String> {
        let differs = |key: &&&str| {
            let first = self.points[0].settings.get(**key);
            self.points.iter().any(|point| point.settings.get(**key) != first)
        };
        AXES.iter().filter(differs).map(|&key| key.to_owned()).collect()
    }
}

impl Point {
    /// `budget 20%, layout uv`: what it says of itself.
    pub(crate) fn label(&self) -> String {
        let mut said: Vec<String> = Vec::new();
        for (key, value) in &self.settings {
            if self.lines.contains_key(key) {
                said.push(format!("{key} {}", plain(value)));
            }
        }
        said.join(", ")
    }
}

/// A setting without quotes.
pub(crate) fn plain(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(all) if all.is_empty() => "none".into(),
        serde_json::Value::Array(all) => all.iter().map(plain).collect::<Vec<_>>().join(" | "),
        other => other.to_string(),
    }
}

fn read_compress(source: &Source<'_>, value: &Spanned<DeValue<'_>>) -> Result<Compress> {
    match value.get_ref() {
        DeValue::Boolean(true) => Ok(Compress::All),
        DeValue::Boolean(false) => Ok(Compress::None),
        DeValue::String(text) if text == "pareto" => Ok(Compress::Pareto),
        _ => Err(source.error(source.line(value), "`compress` is true, false or \"pareto\"")),
    }
}

fn read_verify(source: &Source<'_>, value: &Spanned<DeValue<'_>>) -> Result<VerifyKeys> {
    let table = value.get_ref().as_table();
    let table = table.ok_or_else(|| source.error(source.line(value), "`verify` is a table: [verify]"))?;
    let mut whole = Table::new();
    for (key, Stands { value, line }) in source.entries(table)? {
        let alone = Table::from_iter([(key.clone(), value.clone())]);
        let read: Result<VerifyKeys, _> = alone.try_into();
        let read = read.map_err(|error: toml::de::Error| {
            source.error(line, format_args!("`{key}`: {}", abridge(error.message())))
        })?;
        if read.window.is_some_and(|window| window < 2) || read.max_tokens == Some(0) {
            return Err(source.error(line, format_args!("`{key}` is too small")));
        }
        whole.insert(key, value);
    }
    Ok(whole.try_into().expect("every key was read before"))
}

fn read_grid(source: &Source<'_>, value: &Spanned<DeValue<'_>>) -> Result<Vec<Axis>> {
    let table = value.get_ref().as_table();
    let table = table.ok_or_else(|| source.error(source.line(value), "`grid` is a table: [grid]"))?;
    if table.is_empty() {
        return Err(source.error(source.line(value), "[grid] is empty: say in what points differ"));
    }
    let mut axes = Vec::new();
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, values) in entries {
        let (name, line) = (key.get_ref().as_ref(), source.line(key));
        if !AXES.contains(&name) {
            source.check_axis(name, &Stands { value: Value::Boolean(true), line })?;
        }
        let Some(values) = values.get_ref().as_array().filter(|values| !values.is_empty()) else {
            let what = format!("`{name}` in [grid] is a list of the values to try, and not empty");
            return Err(source.error(line, what));
        };
        let mut read: Vec<Stands> = Vec::new();
        for value in values {
            let Stands { value, line } = source.value(value)?;
            let stands = Stands { value: listed(name, value), line };
            source.check_axis(name, &stands)?;
            if read.iter().any(|before| before.value == stands.value) {
                return Err(source.error(line, format_args!("`{name}` in [grid] has {} twice", stands.value)));
            }
            read.push(stands);
        }
        axes.push((name.to_owned(), read));
    }
    Ok(axes)
}

fn read_points(source: &Source<'_>, value: &Spanned<DeValue<'_>>) -> Result<Vec<Own>> {
    let Some(tables) = value.get_ref().as_array() else {
        return Err(source.error(source.line(value), "`point` is a list of tables: [[point]]"));
    };
    let mut points = Vec::new();
    for table in tables {
        let line = source.line(table);
        let Some(table) = table.get_ref().as_table().filter(|table| !table.is_empty()) else {
            return Err(source.error(line, "[[point]] is empty: say in what it differs"));
        };
        let mut own = source.entries(table)?;
        for (key, stands) in &mut own {
            stands.value = listed(key, stands.value.clone());
            source.check_axis(key, stands)?;
        }
        source.one_source(own.iter().map(|(key, stands)| (key.as_str(), stands.line)))?;
        points.push((own, line));
    }
    Ok(points)
}

/// Every combination; the last axis varies fastest.
fn product(source: &Source<'_>, axes: Vec<Axis>, line: usize) -> Result<Vec<Own>> {
    let count = axes.iter().try_fold(1_usize, |count, (_, values)| count.checked_mul(values.len()));
    if count.is_none_or(|count| count > POINTS_MAX) {
        return Err(source.error(line, format_args!("[grid] has more than {POINTS_MAX} points")));
    }
    let mut points: Vec<Vec<(String, Stands)>> = vec![Vec::new()];
    for (key, values) in axes {
        let longer = points.iter().flat_map(|point| {
            let key = &key;
            values.iter().map(move |value| {
                let mut point = point.clone();
                point.push((key.clone(), value.clone()));
                point
            })
        });
        points = longer.collect();
    }
    Ok(points.into_iter().map(|point| (point, line)).collect())
}

fn point(source: &Source<'_>, number: usize, shared: &Table, (own, line): Own) -> Result<Point> {
    let mut merged = shared.clone();
    if own.iter().any(|(key, _)| RANK_SOURCES.contains(&key.as_str())) {
        RANK_SOURCES.iter().for_each(|key| drop(merged.remove(*key)));
    }
    let lines = own.iter().map(|(key, stands)| (key.clone(), stands.line)).collect();
    merged.extend(own.into_iter().map(|(key, stands)| (key, stands.value)));
    let settings = AXES
        .iter()
        .filter_map(|&key| Some((key.to_owned(), merged.get(key)?)))
        .map(|(key, value)| (key, serde_json::to_value(value).expect("plain values")))
        .collect();
    let args: JobArgs = merged.try_into().expect("every key was read before");
    let job = Job::new(args).map_err(|error| source.error(line, format_args!("point {number}: {error}")))?;
    Ok(Point { number, settings, job, lines, line })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, Command};
    use std::collections::BTreeSet;

    /// Flags that hold for a whole sweep, or have no meaning in one.
    const NO_AXES: [&str; 18] = [
        "model",
        "out",
        "plan",
        "ranks",
        "plan-out",
        "dry-run",
        "max-shard-size",
        "workers",
        "memory",
        "cache",
        "device",
        "algebra",
        "resume",
        "restart",
        "config",
        "json",
        "quiet",
        "verbose",
    ];

    #[test]
    fn every_flag_is_an_axis_or_known_to_be_none() {
        let command = JobArgs::augment_args(Command::new("compress"));
        let flags: BTreeSet<&str> = command.get_arguments().filter_map(|flag| flag.get_long()).collect();
        assert_eq!(flags, AXES.into_iter().chain(NO_AXES).collect());
    }
}
