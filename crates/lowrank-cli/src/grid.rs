//! The config of a sweep: settings that all points share, a grid of those in which they differ, and single points. Keys are
//! those of `--config`; every mistake is named with file and line before anything runs.

use crate::args::{JobArgs, given};
use crate::config::{self, GOALS, Located, Source};
use crate::exit::{Failure, Result, usage};
use crate::job::Job;
use lowrank_model::display::abridge;
use lowrank_model::recipe::Bos;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::DeValue;

/// Keys of a job that a sweep has no use for.
const NO_KEYS: [&str; 4] = ["plan", "ranks", "plan-out", "dry-run"];
/// The most points of one sweep.
const POINTS_MAX: usize = 100_000;

/// A config, read and checked as far as that goes without the model.
#[derive(Debug)]
pub(crate) struct Sweep {
    file: PathBuf,
    /// What all points share.
    pub(crate) shared: JobArgs,
    pub(crate) points: Vec<Point>,
    pub(crate) compress: Compress,
    /// Whether checkpoints stay when they have been verified.
    pub(crate) keep: bool,
    pub(crate) verify: VerifyKeys,
    /// Settings in which points may differ.
    pub(crate) axes: Vec<String>,
    /// The lines of the shared keys.
    shared_lines: BTreeMap<String, usize>,
}

/// One point.
#[derive(Debug)]
pub(crate) struct Point {
    /// From 1, in the order of the config.
    pub(crate) number: usize,
    /// Its own settings and the shared ones, as far as points may differ in them.
    pub(crate) settings: Map<String, Value>,
    pub(crate) job: Job,
    /// The lines of its own keys.
    lines: BTreeMap<String, usize>,
    /// Its line as a whole.
    line: usize,
}

/// Which points are compressed and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compress {
    None,
    All,
    /// The Pareto front of each scale.
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
    /// As `verify --bos`.
    pub(crate) bos: Bos,
    /// As `verify --max-tokens`.
    pub(crate) max_tokens: Option<usize>,
}

/// Own settings of a point, and the line of the whole.
type Own = (Vec<(String, Located)>, usize);

/// A key of the grid and the values to try.
type Axis = (String, Vec<Located>);

/// A config being read.
struct Reader<'a> {
    source: Source<'a>,
    axes: Vec<String>,
}

impl Sweep {
    /// Reads a config; `flags` are laid over what all points share.
    pub(crate) fn read(file: &Path, flags: &JobArgs) -> Result<Self> {
        let text = config::read(file)?;
        let reader = Reader { source: Source { file, text: &text }, axes: config::axes() };
        let source = &reader.source;
        let parsed = source.parse()?;
        let mut shared: BTreeMap<String, Located> = BTreeMap::new();
        let (mut compress, mut keep, mut verify) = (Compress::None, false, VerifyKeys::default());
        let mut grid: Option<(Vec<Axis>, usize)> = None;
        let mut singles: Vec<Own> = Vec::new();
        for (key, line, value) in source.entries(parsed.get_ref()) {
            match key {
                "compress" => compress = reader.compress(value)?,
                "keep" => {
                    let read = value.get_ref().as_bool();
                    keep = read.ok_or_else(|| source.error(line, "`keep` is true or false"))?;
                }
                "verify" => verify = reader.verify(value)?,
                "grid" => grid = Some((reader.grid(value)?, line)),
                "point" => singles = reader.points(value)?,
                name => {
                    let (name, value) = reader.setting(name, source.value(value)?)?;
                    shared.insert(name, value);
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
                if let Some(other) = shared.get(key) {
                    let what =
                        format!("`{key}` is in [grid] and, in line {}, for all points: keep one", other.line);
                    return Err(source.error(values[0].line, what));
                }
            }
            let of_all = shared.iter().map(|(key, value)| (key.as_str(), value.line));
            let of_grid = axes.iter().map(|(key, values)| (key.as_str(), values[0].line));
            reader.one_goal(of_all.chain(of_grid))?;
            own = reader.product(axes, line)?;
        }
        own.extend(singles);
        let lines = shared.iter().map(|(key, value)| (key.clone(), value.line)).collect();
        let shared = shared.into_iter().map(|(key, value)| (key, value.value)).collect();
        let shared = config::overlaid(shared, given(flags));
        let points = own.into_iter().enumerate().map(|(index, own)| reader.point(index + 1, &shared, own));
        Ok(Self {
            file: file.to_owned(),
            points: points.collect::<Result<_>>()?,
            shared: config::flags_of(shared)?,
            compress,
            keep,
            verify,
            axes: reader.axes,
            shared_lines: lines,
        })
    }

    /// A mistake that shows only with the model, at the line of a point's key.
    pub(crate) fn error(&self, point: &Point, key: &str, what: impl std::fmt::Display) -> Failure {
        let line = point.lines.get(key).or_else(|| self.shared_lines.get(key)).unwrap_or(&point.line);
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

    /// Keys in which points differ.
    pub(crate) fn differing(&self) -> Vec<String> {
        let differs = |key: &&String| {
            let first = self.points[0].settings.get(*key);
            self.points.iter().any(|point| point.settings.get(*key) != first)
        };
        self.axes.iter().filter(differs).cloned().collect()
    }
}

impl Point {
    /// `budget 20%, storage uv`: its own settings.
    pub(crate) fn label(&self) -> String {
        let own = self.settings.iter().filter(|(key, _)| self.lines.contains_key(*key));
        own.map(|(key, value)| format!("{key} {}", plain(value))).collect::<Vec<_>>().join(", ")
    }
}

/// A setting without quotes.
pub(crate) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) if all.is_empty() => "none".into(),
        Value::Array(all) => all.iter().map(plain).collect::<Vec<_>>().join(" | "),
        other => other.to_string(),
    }
}

impl Reader<'_> {
    /// A setting that all points may share.
    fn setting(&self, key: &str, value: Located) -> Result<(String, Located)> {
        if NO_KEYS.contains(&key) {
            return Err(self.source.error(value.line, format_args!("`{key}` is no key of a sweep")));
        }
        self.source.setting(key, value)
    }

    /// A setting in which points may differ.
    fn axis(&self, key: &str, value: Located) -> Result<(String, Located)> {
        let line = value.line;
        let (name, value) = self.setting(key, value)?;
        if self.axes.contains(&name) {
            return Ok((name, value));
        }
        let all = self.axes.join(", ");
        Err(self.source.error(line, format_args!("points cannot differ in `{key}`, only in {all}")))
    }

    /// Several ways to say what to remove.
    fn one_goal<'k>(&self, keys: impl Iterator<Item = (&'k str, usize)>) -> Result<()> {
        let mut found: Vec<(&str, usize)> = keys.filter(|(key, _)| GOALS.contains(key)).collect();
        found.sort_by_key(|(_, line)| *line);
        match found[..] {
            [(first, before), (second, line), ..] => {
                let what =
                    format!("`{second}` contradicts `{first}` in line {before}: both say what to remove");
                Err(self.source.error(line, what))
            }
            _ => Ok(()),
        }
    }

    fn compress(&self, value: &Spanned<DeValue<'_>>) -> Result<Compress> {
        match value.get_ref() {
            DeValue::Boolean(true) => Ok(Compress::All),
            DeValue::Boolean(false) => Ok(Compress::None),
            DeValue::String(text) if text == "pareto" => Ok(Compress::Pareto),
            _ => Err(self.source.error(self.source.line(value), "`compress` is true, false or \"pareto\"")),
        }
    }

    fn verify(&self, value: &Spanned<DeValue<'_>>) -> Result<VerifyKeys> {
        let source = &self.source;
        let table = value.get_ref().as_table();
        let table = table.ok_or_else(|| source.error(source.line(value), "`verify` is a table: [verify]"))?;
        let mut whole = Map::new();
        for (key, _, value) in source.entries(table) {
            let Located { value, line } = source.value(value)?;
            let alone = Map::from_iter([(key.to_owned(), value.clone())]);
            let read = VerifyKeys::deserialize(Value::Object(alone)).map_err(|error| {
                source.error(line, format_args!("`{key}`: {}", abridge(&error.to_string())))
            })?;
            if read.window.is_some_and(|window| window < 2) || read.max_tokens == Some(0) {
                return Err(source.error(line, format_args!("`{key}` is too small")));
            }
            whole.insert(key.to_owned(), value);
        }
        VerifyKeys::deserialize(Value::Object(whole)).map_err(Failure::bug)
    }

    fn grid(&self, value: &Spanned<DeValue<'_>>) -> Result<Vec<Axis>> {
        let source = &self.source;
        let table = value.get_ref().as_table();
        let table = table.ok_or_else(|| source.error(source.line(value), "`grid` is a table: [grid]"))?;
        if table.is_empty() {
            return Err(source.error(source.line(value), "[grid] is empty: say in what points differ"));
        }
        let mut axes: Vec<Axis> = Vec::new();
        for (key, line, values) in source.entries(table) {
            let Some(values) = values.get_ref().as_array().filter(|values| !values.is_empty()) else {
                let what = format!("`{key}` in [grid] is a list of the values to try, and not empty");
                return Err(source.error(line, what));
            };
            let (mut name, mut read) = (String::new(), Vec::<Located>::new());
            for value in values {
                let (flag, value) = self.axis(key, source.value(value)?)?;
                if read.iter().any(|before| before.value == value.value) {
                    let what = format_args!("`{key}` in [grid] has {} twice", value.value);
                    return Err(source.error(value.line, what));
                }
                name = flag;
                read.push(value);
            }
            axes.push((name, read));
        }
        Ok(axes)
    }

    fn points(&self, value: &Spanned<DeValue<'_>>) -> Result<Vec<Own>> {
        let source = &self.source;
        let Some(tables) = value.get_ref().as_array() else {
            return Err(source.error(source.line(value), "`point` is a list of tables: [[point]]"));
        };
        let mut points = Vec::new();
        for table in tables {
            let line = source.line(table);
            let Some(table) = table.get_ref().as_table().filter(|table| !table.is_empty()) else {
                return Err(source.error(line, "[[point]] is empty: say in what it differs"));
            };
            let own = source.entries(table).into_iter();
            let own = own.map(|(key, _, value)| self.axis(key, source.value(value)?));
            let own: Vec<(String, Located)> = own.collect::<Result<_>>()?;
            self.one_goal(own.iter().map(|(key, value)| (key.as_str(), value.line)))?;
            points.push((own, line));
        }
        Ok(points)
    }

    /// Every combination; the last axis varies fastest.
    fn product(&self, axes: Vec<Axis>, line: usize) -> Result<Vec<Own>> {
        let count = axes.iter().try_fold(1_usize, |count, (_, values)| count.checked_mul(values.len()));
        if count.is_none_or(|count| count > POINTS_MAX) {
            return Err(self.source.error(line, format_args!("[grid] has more than {POINTS_MAX} points")));
        }
        let mut points: Vec<Vec<(String, Located)>> = vec![Vec::new()];
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

    fn point(&self, number: usize, shared: &Map<String, Value>, (own, line): Own) -> Result<Point> {
        let lines = own.iter().map(|(key, value)| (key.clone(), value.line)).collect();
        let own = own.into_iter().map(|(key, value)| (key, value.value)).collect();
        let all = config::overlaid(shared.clone(), own);
        let setting = |key: &String| Some((key.clone(), all.get(key)?.clone()));
        let settings = self.axes.iter().filter_map(setting).collect();
        let job = config::flags_of(all)
            .and_then(Job::new)
            .map_err(|error| self.source.error(line, format_args!("point {number}: {error}")))?;
        Ok(Point { number, settings, job, lines, line })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::RecipeFlags;
    use clap::{Args, Command};
    use std::collections::BTreeSet;

    #[test]
    fn every_flag_of_a_recipe_is_an_axis_or_decides_files_alone() {
        let command = RecipeFlags::augment_args(Command::new("compress"));
        let flags: BTreeSet<String> =
            command.get_arguments().filter_map(|flag| flag.get_long()).map(str::to_owned).collect();
        let axes =
            config::axes().into_iter().chain(["fp8", "max-shard-size", "shared-experts"].map(str::to_owned));
        assert_eq!(flags, axes.collect());
    }

    #[test]
    fn every_setting_of_a_recipe_has_a_flag() {
        let of_files = ["remove", "ranks", "plan"].map(str::to_owned);
        let axes: BTreeSet<String> = config::axes().into_iter().chain(of_files).collect();
        assert_eq!(axes, lowrank_model::Recipe::keys().into_iter().collect());
    }
}
