//! TOML files that hold flags: every key is checked for itself, so that a mistake is named with file and line.

use crate::args::{JobArgs, RecipeFlags, given};
use crate::exit::{Failure, Result, usage};
use crate::home;
use clap::{Args, Command};
use lowrank_model::Recipe;
use lowrank_model::display::abridge;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Longest config file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Keys that say what to remove; they exclude each other.
pub(crate) const GOALS: [&str; 5] = ["budget", "target-params", "target-size", "plan", "ranks"];
/// Flags that are no keys of files.
const NO_KEYS: [&str; 3] = ["config", "resume", "restart"];

/// The text of a config file.
pub(crate) struct Source<'a> {
    pub(crate) file: &'a Path,
    pub(crate) text: &'a str,
}

/// A value and the line it is in.
#[derive(Debug, Clone)]
pub(crate) struct Located {
    pub(crate) value: Value,
    pub(crate) line: usize,
}

/// Reads the text of a config file.
pub(crate) fn read(path: &Path) -> Result<String> {
    let text = String::from_utf8(read_file(path, CONFIG_BYTES_MAX)?);
    text.map_err(|error| usage(format!("{}: {error}", path.display())))
}

/// A file that a flag names; nothing is read beyond the limit, whatever its length is said to be.
pub(crate) fn read_file(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    let broken = |what: String| usage(format!("{}: {what}", path.display()));
    let read = lowrank_files::read_at_most(path, limit_bytes).map_err(|error| broken(error.to_string()))?;
    let Some(mut bytes) = read else {
        return Err(broken(format!("is longer than {limit_bytes} bytes, the limit for such a file")));
    };
    // Some editors begin a file with UTF-8's byte order mark.
    if bytes.starts_with("\u{feff}".as_bytes()) {
        bytes.drain(.."\u{feff}".len());
    }
    Ok(bytes)
}

impl<'a> Source<'a> {
    /// Parses the file.
    pub(crate) fn parse(&self) -> Result<Spanned<DeTable<'a>>> {
        DeTable::parse(self.text).map_err(|error| {
            let message = abridge(error.message().lines().next().unwrap_or("cannot be read"));
            match error.span() {
                Some(span) => self.error(self.line_of(span.start), message),
                None => usage(format!("{}: {message}", self.file.display())),
            }
        })
    }

    /// An error at a line.
    pub(crate) fn error(&self, line: usize, what: impl std::fmt::Display) -> Failure {
        usage(format!("{}: line {line}: {what}", self.file.display()))
    }

    /// The line, from 1, of a key or a value.
    pub(crate) fn line<T>(&self, spanned: &Spanned<T>) -> usize {
        self.line_of(spanned.span().start)
    }

    fn line_of(&self, at: usize) -> usize {
        1 + self.text.as_bytes()[..at.min(self.text.len())].iter().filter(|&&byte| byte == b'\n').count()
    }

    /// A value as JSON.
    pub(crate) fn value(&self, value: &Spanned<DeValue<'_>>) -> Result<Located> {
        let line = self.line(value);
        let read = toml::Value::deserialize(toml::de::ValueDeserializer::from(value.clone()));
        let mut read = read.map_err(|error| self.error(line, abridge(error.message())))?;
        home::expand_values(&mut read).map_err(|error| self.error(line, error))?;
        Ok(Located { value: json!(read), line })
    }

    /// A table's keys in the order of the file.
    pub(crate) fn entries<'t>(
        &self,
        table: &'t DeTable<'_>,
    ) -> Vec<(&'t str, usize, &'t Spanned<DeValue<'t>>)> {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        entries.into_iter().map(|(key, value)| (key.get_ref().as_ref(), self.line(key), value)).collect()
    }

    /// One key with its value, under the name of its flag; refused if there is no such flag or it cannot have this value.
    pub(crate) fn setting(&self, key: &str, value: Located) -> Result<(String, Located)> {
        let Located { value, line } = value;
        let name = flag_name(JobArgs::augment_args, key).filter(|name| !NO_KEYS.contains(&name.as_str()));
        let name = name.ok_or_else(|| self.error(line, format_args!("unknown key `{}`", abridge(key))))?;
        let wrong = |error: serde_json::Error| {
            self.error(line, format_args!("`{key}`: {}", abridge(&error.to_string())))
        };
        let alone = Map::from_iter([(name.clone(), value.clone())]);
        let args = JobArgs::deserialize(Value::Object(alone)).map_err(wrong)?;
        let mut recipe = given(&args.recipe);
        // One value where a list is expected is a list by now.
        let list = recipe.get(&name).filter(|value| value.is_array()).cloned();
        if !GOALS.iter().any(|goal| recipe.contains_key(*goal)) {
            recipe.insert("ranks".into(), json!({}));
        }
        let recipe = Recipe::deserialize(Value::Object(recipe)).map_err(wrong)?;
        recipe.validate().map_err(|error| self.error(line, error))?;
        Ok((name, Located { value: list.unwrap_or(value), line }))
    }
}

/// The flag that a name or an earlier name of it means.
fn flag_name(flags: fn(Command) -> Command, name: &str) -> Option<String> {
    let command = flags(Command::new("flags"));
    let mut all = command.get_arguments();
    let is_meant = |flag: &&clap::Arg| {
        flag.get_long() == Some(name) || flag.get_all_aliases().unwrap_or_default().contains(&name)
    };
    all.find(is_meant)?.get_long().map(str::to_owned)
}

/// Settings in which the points of a sweep may differ: those that decide tensors, in the recipe's order.
pub(crate) fn axes() -> Vec<String> {
    let is_flag = |key: &String| flag_name(RecipeFlags::augment_args, key).is_some();
    Recipe::keys().into_iter().filter(is_flag).collect()
}

/// Settings over others. One that says what to remove replaces another way of saying it.
pub(crate) fn overlaid(mut below: Map<String, Value>, above: Map<String, Value>) -> Map<String, Value> {
    if GOALS.iter().any(|goal| above.contains_key(*goal)) {
        below.retain(|key, _| !GOALS.contains(&key.as_str()));
    }
    below.extend(above);
    below
}

/// Settings as flags.
pub(crate) fn flags_of(settings: Map<String, Value>) -> Result<JobArgs> {
    JobArgs::deserialize(Value::Object(settings)).map_err(Failure::bug)
}

/// Flags, with what they leave open taken from `--config`.
pub(crate) fn with_config(flags: JobArgs) -> Result<JobArgs> {
    let Some(file) = flags.config.clone() else { return Ok(flags) };
    let text = read(&file)?;
    let source = Source { file: &file, text: &text };
    let parsed = source.parse()?;
    let mut settings = Map::new();
    for (key, _, value) in source.entries(parsed.get_ref()) {
        let (name, Located { value, line }) = source.setting(key, source.value(value)?)?;
        if settings.insert(name, value).is_some() {
            return Err(source.error(line, format_args!("`{key}` is given twice, under two names")));
        }
    }
    let merged = flags_of(overlaid(settings, given(&flags)))?;
    Ok(JobArgs { config: flags.config, resume: flags.resume, restart: flags.restart, ..merged })
}
