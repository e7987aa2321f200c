//! `sweep.json`: what all points of a folder share. Points that differ in it cannot be compared.

use crate::SweepError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// Its file name.
pub const FILE: &str = "sweep.json";
/// Version of this document.
pub const SWEEP_VERSION: u32 = 1;

/// The document. It contains no time, path or host name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultsHeader {
    /// [`SWEEP_VERSION`].
    pub sweep_version: u32,
    /// `lowrank-compress`.
    pub tool: String,
    /// Version of the tool: another version may measure other numbers.
    pub version: String,
    /// Name and files of the base, as in `lowrank_report.json`.
    pub base_model: Value,
    /// Parameters of the base.
    pub params_before: u64,
    /// Bytes of the base's weights.
    pub bytes_before: u64,
    /// The text that points are verified on; absent if no point is compressed.
    pub verification: Option<Value>,
    /// Keys in which the points differ.
    pub axes: Vec<String>,
}

impl ResultsHeader {
    /// Reads a folder's `sweep.json`; `None` if there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>, SweepError> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SweepError::Io { path, action: "read", source }),
        };
        let header = serde_json::from_slice(&text);
        header.map(Some).map_err(|error| SweepError::Broken {
            path,
            line: error.line(),
            what: error.to_string(),
        })
    }

    /// Refuses a folder whose points cannot be compared with those of this run.
    pub(crate) fn check(&self, earlier: &Self, dir: &Path) -> Result<(), SweepError> {
        let files = |header: &Self| header.base_model["files"].clone();
        let other = |what| Err(SweepError::OtherSweep { dir: dir.to_owned(), what });
        if (self.sweep_version, &self.version) != (earlier.sweep_version, &earlier.version) {
            return other("results of another version of this tool");
        }
        if files(self) != files(earlier) {
            return other("another base model");
        }
        match (&self.verification, &earlier.verification) {
            (Some(now), Some(then)) if now != then => other("points verified on another text"),
            _ => Ok(()),
        }
    }
}
