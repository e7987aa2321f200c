//! What a compressed checkpoint says about itself in `lowrank_report.json` and in its index.
//!
//! Decoded with types of our own, so that a mistake in the writer's types cannot hide itself. Unknown keys are left to
//! later versions.

use lowrank_model::plan::Size;
use lowrank_model::{Storage, StoredMatrix, Unit, failure, format};
use lowrank_reader::index::INDEX_BYTES_MAX;
use lowrank_reader::read_at_most;
use serde::Deserialize;
use std::path::Path;

/// The versions that this decoder knows: they agree in all that is read here.
pub const REPORT_VERSIONS: std::ops::RangeInclusive<u64> = 1..=3;

/// `lowrank_report.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Record {
    /// Version of the document.
    pub report_version: u64,
    /// What was compressed.
    pub base_model: RecordedBase,
    /// What was asked; absent when ranks were given.
    pub budget: Option<RecordedBudget>,
    /// The whole checkpoint before.
    pub before: Size,
    /// The whole checkpoint after.
    pub after: Size,
    /// How factors are stored.
    pub storage: Storage,
    /// What the factors were fitted to; absent without calibration.
    #[serde(default)]
    pub calibration: Option<Calibration>,
    /// Experts that keep some of their channels; the others keep all.
    #[serde(default)]
    pub experts: Vec<RecordedExpert>,
    /// Layers whose experts share a base.
    #[serde(default)]
    pub shared_base_layers: Vec<usize>,
    /// One row per expert matrix.
    pub matrices: Vec<RecordedMatrix>,
}

/// One narrowed expert.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RecordedExpert {
    /// Decoder layer.
    pub layer: usize,
    /// Expert.
    pub expert: usize,
    /// Channels that stay.
    pub width: usize,
}

/// What the factors were fitted to.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Calibration {
    /// Visits by layer and expert.
    #[serde(default)]
    pub tokens_per_expert: Vec<Vec<u64>>,
}

/// The files that were compressed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RecordedBase {
    /// Every file that was read.
    #[serde(default)]
    pub files: Vec<RecordedFile>,
}

/// One file of the base.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RecordedFile {
    /// Relative name.
    pub name: String,
    /// Lower-case hex.
    pub sha256: String,
}

/// The budget.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RecordedBudget {
    /// What is counted.
    pub unit: Unit,
    /// Remove at least this.
    pub asked: u64,
    /// What is said to be removed.
    pub removed: u64,
}

/// One expert matrix.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RecordedMatrix {
    /// Canonical module name.
    pub name: String,
    /// [m, n]
    pub shape: [u64; 2],
    /// Absent: left dense.
    pub rank: Option<u64>,
    /// ‖W − u·v‖ / ‖W‖: before rounding to the stored dtype, or of what is stored if calibrated.
    pub relative_error: f64,
    /// In the norm of the calibration; absent without one.
    #[serde(default)]
    pub calibrated_error: Option<f64>,
    /// max |T| of a pivoted matrix, before rounding.
    #[serde(default)]
    pub largest_coefficient: Option<f64>,
    /// What rounding a pivoted matrix cost, of ‖Ŵ‖.
    #[serde(default)]
    pub round_trip_error: Option<f64>,
}

/// The longest report that is read; that of 65,536 experts is shorter.
const REPORT_BYTES_MAX: u64 = 256 << 20;

/// Reads the record; the text says what is wrong with it.
pub fn read_record(dir: &Path) -> Result<Record, String> {
    let text = read_at_most(&dir.join(format::REPORT_FILE), REPORT_BYTES_MAX)
        .map_err(|error| failure::chain(&error))?;
    let record: Record = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if !REPORT_VERSIONS.contains(&record.report_version) {
        return Err(format!(
            "`report_version` is {}, this program reads {} to {}",
            record.report_version,
            REPORT_VERSIONS.start(),
            REPORT_VERSIONS.end()
        ));
    }
    Ok(record)
}

/// `metadata` of `model.safetensors.index.json`; `None` where there is no index or it has no such key.
pub fn read_index_totals(dir: &Path) -> (Option<u64>, Option<u64>) {
    #[derive(Deserialize, Default)]
    struct Metadata {
        total_size: Option<u64>,
        total_parameters: Option<u64>,
    }
    #[derive(Deserialize)]
    struct Index {
        #[serde(default)]
        metadata: Metadata,
    }
    let index = read_at_most(&dir.join(format::INDEX_FILE), INDEX_BYTES_MAX).ok();
    let index = index.and_then(|text| serde_json::from_slice::<Index>(&text).ok());
    index.map_or((None, None), |index| (index.metadata.total_size, index.metadata.total_parameters))
}

/// How much more than is expected of many numbers the rounding of few may cost: with one number in a factor all of it can
/// be off by u in the worst direction, (2u)² = 4u² for u·v, and what is left to chance falls with √N.
pub fn chance(stored: &StoredMatrix) -> f64 {
    let factors = match stored {
        StoredMatrix::Dense(w) => vec![w],
        StoredMatrix::Factored { u, v } => vec![u, v],
        StoredMatrix::Pivoted { basis, coefficients, .. } => vec![basis, coefficients],
        StoredMatrix::OfBase { difference, .. } => return chance(difference),
    };
    let fewest = factors.iter().map(|factor| factor.elements()).filter(|&elements| elements > 0).min();
    1.0 + 3.0 / (fewest.unwrap_or(1) as f64).sqrt()
}

/// How far the recomputed error may lie from the recorded one, as a bound on the difference of their squares.
///
/// The recorded error e is that of the factors before they were rounded to their dtype of unit roundoff u. Rounding
/// adds δu·v + u·δv. At the optimum the residual is orthogonal to both, so the squares add; an element's rounding
/// error is spread evenly over at most ±u of it, so each term has at most u²/3 of ‖u·v‖² ≤ ‖W‖². Together 2u²/3;
/// `rounding` = u² leaves room for chance, and [`chance`] for few numbers. (Seen for bf16 on trained weights: 0.36 u².) That of pivoted storage is
/// [`crate::factors::rounding_energy`] as a share of ‖W‖². The rest is the arithmetic of the recorded number: 1e-5 of e²,
/// as it may come from an f32 spectrum, and 1e-10 where e itself is rounding.
pub fn squared_error_tolerance(recorded: f64, rounding: f64) -> f64 {
    rounding + 1e-5 * recorded * recorded + 1e-10
}
