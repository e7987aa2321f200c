//! The results of a sweep: one row per point, in files that stay valid after any kill.
//!
//! This crate plans nothing and reads no checkpoint. The `sweep` command adds rows, and the report page shows them.
//!
//! ```text
//! DIR/sweep.json      what the points share: base, version, text to verify on
//! DIR/results.jsonl   one row per point; the authoritative file
//! DIR/results.csv     the same rows, for spreadsheets and pandas
//! ```
//!
//! | Module | Holds |
//! |---|---|
//! | [`row`] | a point: its settings, predicted and measured errors, and times |
//! | [`header`] | what all points of one folder share |
//! | [`results`] | the files, and resuming after a kill |
//! | [`mod@front`] | the Pareto front |

mod error;
pub mod front;
pub mod header;
pub mod results;
pub mod row;

pub use error::SweepError;
pub use front::front;
pub use header::ResultsHeader;
pub use results::Results;
pub use row::{PointId, Row, Status};
