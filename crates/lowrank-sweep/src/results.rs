//! The result files of a sweep. A new row is appended. To change or reorder rows, both files are written under a temporary
//! name and renamed. So after a kill at most the last line is incomplete, and its point is run again.

use crate::{PointId, ResultsHeader, Row, SweepError, header};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One row per line.
pub const JSONL: &str = "results.jsonl";
/// One row per line, below a line of column names.
pub const CSV: &str = "results.csv";
/// Locked while a process sweeps.
const LOCK: &str = ".lock";

/// Every row of a folder.
#[derive(Debug)]
pub struct Results {
    dir: PathBuf,
    /// Names of settings; each has a column in the CSV.
    columns: Vec<String>,
    rows: Vec<Row>,
    by_id: BTreeMap<PointId, usize>,
    /// The lock; it ends with the process.
    _lock: File,
}

impl Results {
    /// Makes the folder, or resumes the sweep in it. `columns` are the names that settings may have.
    pub fn open(dir: &Path, header: &ResultsHeader, columns: &[String]) -> Result<Self, SweepError> {
        let io = |path: &Path, action| {
            let path = path.to_owned();
            move |source| SweepError::Io { path, action, source }
        };
        std::fs::create_dir_all(dir).map_err(io(dir, "make"))?;
        let lock_path = dir.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(io(&lock_path, "open"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SweepError::Busy { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(io(&lock_path, "lock")(source)),
        }
        let rows = rows(dir)?;
        let mut header = header.clone();
        match ResultsHeader::read(dir)? {
            Some(earlier) => {
                header.check(&earlier, dir)?;
                // Points that are already verified were verified on that text.
                header.verification = header.verification.or(earlier.verification);
            }
            None if rows.is_empty() => {}
            None => {
                let what = "results and no sweep.json that says what they are of";
                return Err(SweepError::OtherSweep { dir: dir.to_owned(), what });
            }
        }
        let text = serde_json::to_string_pretty(&header).expect("plain values serialise") + "\n";
        replace(&dir.join(header::FILE), text.as_bytes())?;
        let by_id = rows.iter().enumerate().map(|(index, row)| (row.id.clone(), index)).collect();
        let results = Self { dir: dir.to_owned(), columns: columns.to_vec(), rows, by_id, _lock: lock };
        results.write_all()?;
        Ok(results)
    }

    /// All rows, in the order in which they were added, or as [`Self::order`] sorted them.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The row of a point.
    pub fn get(&self, id: &PointId) -> Option<&Row> {
        self.by_id.get(id).map(|&index| &self.rows[index])
    }

    /// Adds a row, or replaces that of the same point.
    pub fn put(&mut self, row: Row) -> Result<(), SweepError> {
        if let Some(&index) = self.by_id.get(&row.id) {
            self.rows[index] = row;
            return self.write_all();
        }
        let (json, csv) = (self.dir.join(JSONL), self.dir.join(CSV));
        append(&json, line(&row).as_bytes())?;
        append(&csv, &self.table(&[&row], false))?;
        self.by_id.insert(row.id.clone(), self.rows.len());
        self.rows.push(row);
        Ok(())
    }

    /// Changes rows in memory, sorts them by point number, and rewrites both files.
    pub fn order(&mut self, change: impl Fn(&mut Row)) -> Result<(), SweepError> {
        self.rows.iter_mut().for_each(change);
        self.rows.sort_by_key(|row| (row.point == 0, row.point));
        self.by_id = self.rows.iter().enumerate().map(|(index, row)| (row.id.clone(), index)).collect();
        self.write_all()
    }

    fn write_all(&self) -> Result<(), SweepError> {
        let text: String = self.rows.iter().map(line).collect();
        replace(&self.dir.join(JSONL), text.as_bytes())?;
        replace(&self.dir.join(CSV), &self.table(&self.rows.iter().collect::<Vec<_>>(), true))
    }

    /// Lines of the CSV: every field except the settings, then one column per setting.
    fn table(&self, rows: &[&Row], with_names: bool) -> Vec<u8> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        let mut write = |cells: Vec<String>| csv.write_record(&cells).expect("memory does not fail");
        if with_names {
            let nothing = Row::new(0, PointId::of(&Value::Null), Default::default());
            let fields = fields(&nothing).into_iter().map(|(name, _)| name);
            write(fields.chain(self.columns.iter().cloned()).collect());
        }
        for row in rows {
            let values = fields(row).into_iter().map(|(_, value)| cell(&value));
            let settings =
                self.columns.iter().map(|name| row.settings.get(name).map_or_else(String::new, cell));
            write(values.chain(settings).collect());
        }
        csv.into_inner().expect("memory does not fail")
    }
}

/// The rows of a folder. A last line without a line break was cut off by a kill and is ignored.
pub fn rows(dir: &Path) -> Result<Vec<Row>, SweepError> {
    let path = dir.join(JSONL);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(SweepError::Io { path, action: "read", source }),
    };
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    let mut rows: Vec<Row> = Vec::new();
    for (index, line) in text[..whole].split_inclusive(|&byte| byte == b'\n').enumerate() {
        let broken = |what: String| SweepError::Broken { path: path.clone(), line: index + 1, what };
        let row: Row = serde_json::from_slice(line).map_err(|error| broken(error.to_string()))?;
        if rows.iter().any(|other| other.id == row.id) {
            return Err(broken(format!("point {} stands twice", row.id)));
        }
        rows.push(row);
    }
    Ok(rows)
}

fn line(row: &Row) -> String {
    serde_json::to_string(row).expect("plain values serialise") + "\n"
}

fn fields(row: &Row) -> Vec<(String, Value)> {
    let Value::Object(fields) = serde_json::to_value(row).expect("plain values serialise") else {
        unreachable!("a row is an object")
    };
    fields.into_iter().filter(|(name, _)| name != "settings").collect()
}

/// A cell of the CSV: empty for null, several values separated by bars.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(cell).collect::<Vec<_>>().join(" | "),
        other => other.to_string(),
    }
}

fn append(path: &Path, bytes: &[u8]) -> Result<(), SweepError> {
    let written =
        OpenOptions::new().append(true).create(true).open(path).and_then(|mut file| file.write_all(bytes));
    written.map_err(|source| SweepError::Io { path: path.to_owned(), action: "write", source })
}

/// Whole or not at all.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), SweepError> {
    lowrank_files::write_whole(path, bytes).map_err(|source| SweepError::Io {
        path: path.to_owned(),
        action: "write",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use serde_json::json;

    fn header() -> ResultsHeader {
        ResultsHeader {
            sweep_version: header::SWEEP_VERSION,
            tool: "lowrank-compress".into(),
            version: "1".into(),
            base_model: json!({ "id": null, "files": [] }),
            params_before: 10,
            bytes_before: 20,
            verification: None,
            axes: vec!["budget".into()],
        }
    }

    fn row(point: usize) -> Row {
        let settings = json!({ "budget": format!("{point}%"), "keep-dense": ["a", "b,\"c\""] });
        let Value::Object(settings) = settings else { unreachable!() };
        Row {
            params: Some(7),
            predicted_error: Some(0.1),
            ..Row::new(point, PointId::of(&json!(point)), settings)
        }
    }

    fn open(dir: &Path) -> Results {
        Results::open(dir, &header(), &["budget", "keep-dense"].map(str::to_owned)).unwrap()
    }

    fn read(dir: &Path, name: &str) -> String {
        std::fs::read_to_string(dir.join(name)).unwrap()
    }

    #[test]
    fn appended_rows_are_those_that_are_read_and_both_files_hold_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = open(dir.path());
        for point in [2, 1] {
            results.put(row(point)).unwrap();
        }
        let appended = (read(dir.path(), JSONL), read(dir.path(), CSV));
        drop(results);
        let mut again = open(dir.path());
        assert_eq!(again.rows(), [row(2), row(1)]);
        assert_eq!((read(dir.path(), JSONL), read(dir.path(), CSV)), appended);
        again.put(row(1).failed("no".into())).unwrap();
        again.order(|row| row.on_front = true).unwrap();
        let [first, second] = again.rows() else { panic!() };
        assert_eq!((first.point, first.status, second.point, second.on_front), (1, Status::Failed, 2, true));
        assert_eq!(rows(dir.path()).unwrap(), again.rows());
        let mut csv = csv::Reader::from_path(dir.path().join(CSV)).unwrap();
        let names = csv.headers().unwrap().clone();
        let place = |wanted: &str| names.iter().position(|name| name == wanted).unwrap();
        let lines: Vec<_> = csv.records().map(Result::unwrap).collect();
        assert_eq!((&lines[0][place("error")], &lines[1][place("error")]), ("no", ""));
        assert_eq!((&lines[0][place("budget")], &lines[0][place("keep-dense")]), ("1%", "a | b,\"c\""));
    }

    #[test]
    fn a_line_torn_at_any_byte_costs_only_its_point() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = open(dir.path());
        results.put(row(1)).unwrap();
        let first = read(dir.path(), JSONL).len();
        results.put(row(2)).unwrap();
        drop(results);
        let whole = std::fs::read(dir.path().join(JSONL)).unwrap();
        for length in first..whole.len() {
            std::fs::write(dir.path().join(JSONL), &whole[..length]).unwrap();
            let mut results = open(dir.path());
            assert_eq!(results.rows(), [row(1)], "cut at {length}");
            results.put(row(2)).unwrap();
            assert_eq!(std::fs::read(dir.path().join(JSONL)).unwrap(), whole);
        }
    }

    #[test]
    fn a_broken_line_within_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = open(dir.path());
        results.put(row(1)).unwrap();
        drop(results);
        let good = read(dir.path(), JSONL);
        for bad in [format!("{{\n{good}"), format!("{good}{good}")] {
            std::fs::write(dir.path().join(JSONL), bad).unwrap();
            let refused = Results::open(dir.path(), &header(), &[]).unwrap_err().to_string();
            assert!(refused.contains("results.jsonl: line "), "{refused}");
        }
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        let verified = |on: &str| Some(json!({ "tokens_blake3": on }));
        for (other, word) in [
            (ResultsHeader { version: "2".into(), ..header() }, "version"),
            (ResultsHeader { base_model: json!({ "files": [1] }), ..header() }, "base model"),
        ] {
            let refused = Results::open(dir.path(), &other, &[]).unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
        // A folder with plans alone accepts a verification.
        drop(
            Results::open(dir.path(), &ResultsHeader { verification: verified("a"), ..header() }, &[])
                .unwrap(),
        );
        let other = ResultsHeader { verification: verified("b"), ..header() };
        let refused = Results::open(dir.path(), &other, &[]).unwrap_err().to_string();
        assert!(refused.contains("text"), "{refused}");
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let held = open(dir.path());
        assert!(matches!(Results::open(dir.path(), &header(), &[]), Err(SweepError::Busy { .. })));
        drop(held);
        drop(open(dir.path()));
    }
}
