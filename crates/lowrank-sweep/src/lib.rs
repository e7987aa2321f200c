//! What came of the points of a sweep: one row each, in files that are whole after any kill.
//!
//! A leaf: it plans nothing and reads no checkpoint. The command fills it, the report page shows it.
//!
//! ```text
//! DIR/sweep.json      what the points share: base, version, text of the verification
//! DIR/results.jsonl   one row a point; the truth
//! DIR/results.csv     the same, for spreadsheets and pandas
//! ```
//!
//! | Module | Holds |
//! |---|---|
//! | [`row`] | a point: its settings, what is predicted, what was measured, how long it took |
//! | [`header`] | what all points of one folder share |
//! | [`results`] | the files, and going on after a kill |
//! | [`mod@front`] | which points no other beats |

mod error;
pub mod front;
pub mod header;
pub mod results;
pub mod row;

pub use error::SweepError;
pub use front::front;
pub use header::Header;
pub use results::Results;
pub use row::{PointId, Row, Status};
