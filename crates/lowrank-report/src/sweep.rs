//! The points of a sweep, and the values that the page derives from them.

use crate::{ReportError, cards, place};
use lowrank_sweep::results::rows;
use lowrank_sweep::{ResultsHeader, Row, Status, front, header};
use serde::Serialize;
use std::path::Path;

/// Pages of compressed points, below the folder of the sweep.
const POINTS: &str = "points";

/// The data of a sweep's page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepPage {
    /// `sweep.json`.
    pub header: ResultsHeader,
    /// `results.jsonl`.
    pub rows: Vec<Row>,
    /// Derived values, one per row.
    pub derived: Vec<Derived>,
}

/// Values derived from a row and the other rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Derived {
    /// Memory of the smallest GPU that holds its weights.
    pub smallest_card_gb: Option<u64>,
    /// Whether it is on the Pareto front of size and mean KL ([`mod@lowrank_sweep::front`]).
    pub on_measured_front: bool,
    /// Path of its own page, relative to the sweep's.
    pub page: Option<String>,
}

impl SweepPage {
    /// Whether a folder holds a sweep.
    pub fn is_there(dir: &Path) -> bool {
        dir.join(header::FILE).is_file()
    }

    /// Reads the folder of a sweep.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        let Some(header) = ResultsHeader::read(dir)? else {
            return Err(ReportError::NotACheckpoint { dir: dir.to_owned(), file: header::FILE });
        };
        let rows = rows(dir)?;
        let measured: Vec<(usize, (u64, f64))> = rows
            .iter()
            .enumerate()
            .filter(|(_, row)| row.status == Status::Verified)
            .filter_map(|(index, row)| Some((index, (row.params?, row.mean_kl?))))
            .collect();
        let points: Vec<(u64, f64)> = measured.iter().map(|(_, point)| *point).collect();
        let mut best = vec![false; rows.len()];
        for ((index, _), on_front) in measured.iter().zip(front(&points)) {
            best[*index] = on_front;
        }
        let derived = rows.iter().zip(best).map(|(row, on_measured_front)| {
            let page = format!("{POINTS}/{}.{}", row.id, place::REPORT);
            Derived {
                smallest_card_gb: row.bytes.and_then(cards::smallest),
                on_measured_front,
                page: dir.join(&page).is_file().then_some(page),
            }
        });
        Ok(Self { derived: derived.collect(), header, rows })
    }

    /// `24 points of org/name, 7 of them verified`.
    pub(crate) fn subtitle(&self) -> String {
        let base = self.header.base_model["id"].as_str().unwrap_or("a model");
        let verified = self.rows.iter().filter(|row| row.status == Status::Verified).count();
        format!("Sweep of {base}: {} points, {verified} of them verified", self.rows.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_sweep::{PointId, Results};
    use serde_json::json;

    #[test]
    fn the_measured_front_is_of_verified_points_alone() {
        let folder = tempfile::tempdir().unwrap();
        let header = ResultsHeader {
            sweep_version: header::SWEEP_VERSION,
            tool: "lowrank-compress".into(),
            version: "1".into(),
            base_model: json!({ "id": "org/base", "files": [] }),
            params_before: 100,
            bytes_before: 200,
            verification: None,
            axes: Vec::new(),
        };
        let mut results = Results::open(folder.path(), &header, &[]).unwrap();
        let row = |point: usize, params, mean_kl, status| {
            let row = Row::new(point, PointId::of(&json!(point)), Default::default());
            Row { params: Some(params), bytes: Some(20_000_000_000), mean_kl, status, ..row }
        };
        results.put(row(1, 50, Some(0.2), Status::Verified)).unwrap();
        results.put(row(2, 60, Some(0.3), Status::Verified)).unwrap();
        results.put(row(3, 70, Some(0.1), Status::Verified)).unwrap();
        results.put(row(4, 40, None, Status::Planned)).unwrap();
        std::fs::create_dir(folder.path().join(POINTS)).unwrap();
        let page = format!("{POINTS}/{}.report.html", results.rows()[0].id);
        std::fs::write(folder.path().join(&page), "").unwrap();
        let read = SweepPage::read(folder.path()).unwrap();
        let fronts: Vec<bool> = read.derived.iter().map(|one| one.on_measured_front).collect();
        assert_eq!(fronts, [true, false, true, false]);
        assert_eq!(read.derived[0].page, Some(page));
        assert_eq!((read.derived[1].page.as_ref(), read.derived[1].smallest_card_gb), (None, Some(24)));
        assert_eq!(read.subtitle(), "Sweep of org/base: 4 points, 3 of them verified");
        assert!(SweepPage::is_there(folder.path()) && !SweepPage::is_there(&folder.path().join(POINTS)));
    }
}
