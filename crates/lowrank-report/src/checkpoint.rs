//! The documents of one checkpoint, checked against each other, and what is derived from them for the page.

use crate::ReportError;
use crate::cards::{GpuRoom, cards};
use crate::place;
use lowrank_model::params::stored_params;
use lowrank_model::widths::expert_shape;
use lowrank_model::{MatrixId, MatrixShape, Projection, SpectrumCurves, Widths, format};
use lowrank_writer::CompressionReport;
use lowrank_writer::report::MatrixReport;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

/// What the page shows of a checkpoint. The documents are there as they were found, unknown keys too.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckpointPage {
    /// `lowrank_report.json`.
    pub report: Value,
    /// What `verify` said, if it was asked.
    pub verification: Option<Value>,
    /// `lowrank_spectra.json`, if the ranks were chosen from spectra.
    pub spectra: Option<Value>,
    /// Which cards hold the weights.
    pub cards: Vec<GpuRoom>,
    /// Sums over the experts of each layer.
    pub layers: Vec<Layer>,
    /// What the relative errors are errors of, see [`CompressionReport::error_basis`].
    pub error_basis: String,
}

/// The experts of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Layer {
    /// Decoder layer.
    pub layer: usize,
    /// Parameters of its expert matrices before.
    pub params_before: u64,
    /// And after.
    pub params_after: u64,
    /// Root mean square of ‖W − Ŵ‖ / ‖W‖ over them; 0 for those left dense.
    pub weight_error: f64,
}

impl CheckpointPage {
    /// Reads the documents in a checkpoint, but not what lies beside it.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        let path = dir.join(format::REPORT_FILE);
        let Some((mut report, typed)) = document::<CompressionReport>(&path)? else {
            return Err(ReportError::NotACheckpoint { dir: dir.to_owned(), file: format::REPORT_FILE });
        };
        // Reports of older versions have names alone, which the page does not read.
        for (row, typed) in report["matrices"].as_array_mut().into_iter().flatten().zip(&typed.matrices) {
            let named = serde_json::to_value(&typed.matrix).expect("a name and numbers serialise");
            if let (Some(row), Value::Object(named)) = (row.as_object_mut(), named) {
                row.extend(named);
            }
        }
        let path = dir.join(format::SPECTRA_FILE);
        let spectra = match document::<SpectrumCurves>(&path)? {
            None => None,
            Some((value, curves)) => {
                let short_side = typed.matrices.first().map_or(0, |row| row.shape[0].min(row.shape[1]));
                let routed = typed.matrices.iter().filter(|row| !row.matrix.id.is_shared());
                let names: Vec<&str> = routed.map(|row| row.matrix.name.as_str()).collect();
                if !curves.fits(names.into_iter(), short_side) {
                    let remedy = "compress again, or remove that file";
                    return Err(ReportError::OtherCheckpoint { path, dir: dir.to_owned(), remedy });
                }
                Some(value)
            }
        };
        Ok(Self {
            report,
            verification: None,
            spectra,
            cards: cards(typed.before.bytes, typed.after.bytes),
            layers: layers(&typed),
            error_basis: typed.error_basis(),
        })
    }

    /// Adds what `verify` left beside the checkpoint, or in `file`; nothing if it was not asked yet.
    pub fn with_verification(mut self, dir: &Path, file: Option<&Path>) -> Result<Self, ReportError> {
        let path = file.map_or_else(|| place::beside(dir, place::VERIFICATION), Path::to_owned);
        match document::<lowrank_verify::Verification>(&path)? {
            None if file.is_some() => {
                return Err(ReportError::Read { path, source: ErrorKind::NotFound.into() });
            }
            None => {}
            Some((value, typed)) => {
                if !self.is_about(&typed) {
                    let remedy = "verify again, or remove that file";
                    return Err(ReportError::OtherCheckpoint { path, dir: dir.to_owned(), remedy });
                }
                self.verification = Some(value);
            }
        }
        Ok(self)
    }

    /// Whether a verification can be of this checkpoint: it saw the same errors recorded, at the same places.
    fn is_about(&self, verification: &lowrank_verify::Verification) -> bool {
        let Some(files) = &verification.files else { return true };
        let recorded: BTreeMap<&str, Option<f64>> =
            files.factored.iter().map(|row| (row.name.as_str(), row.recorded_error)).collect();
        self.report["matrices"].as_array().into_iter().flatten().all(|row| {
            let name = row["name"].as_str().unwrap_or_default();
            match recorded.get(name) {
                None => row["rank"].is_null(),
                Some(None) => true,
                Some(error) => *error == row["relative_error"].as_f64(),
            }
        })
    }

    /// `org/name, 21.41 % of its parameters removed`.
    pub(crate) fn subtitle(&self) -> String {
        let base = self.report["base_model"]["id"].as_str().unwrap_or("A model");
        let count = |key: &str| self.report[key]["params"].as_u64().unwrap_or_default();
        let (before, after) = (count("before"), count("after"));
        let share = 100.0 * before.saturating_sub(after) as f64 / before.max(1) as f64;
        format!("{base} with low-rank experts: {share:.2} % of its parameters removed")
    }
}

fn layers(report: &CompressionReport) -> Vec<Layer> {
    let widths: Widths = report.experts.iter().map(|row| (row.layer, row.expert, row.width)).collect();
    let mut all: BTreeMap<usize, Vec<(u64, u64, f64)>> = BTreeMap::new();
    for row in &report.matrices {
        let shape = MatrixShape { rows: row.shape[0], cols: row.shape[1] };
        let MatrixId { layer, expert, projection } = row.matrix.id;
        let hidden_size = if projection == Projection::Down { shape.rows } else { shape.cols };
        let narrowed =
            widths.of(layer, expert).map_or(shape, |width| expert_shape(projection, width, hidden_size));
        let stored = |shape, rank| stored_params(shape, report.storage, rank);
        let sums = (stored(shape, None), stored(narrowed, row.rank), row.relative_error * row.relative_error);
        all.entry(row.matrix.id.layer).or_default().push(sums);
    }
    let of_base = |layer: usize| -> u64 {
        let is_first = |row: &&MatrixReport| (row.matrix.id.layer, row.matrix.id.expert) == (layer, 0);
        let first =
            report.matrices.iter().filter(is_first).filter(|_| report.shared_base_layers.contains(&layer));
        first.map(|row| row.shape[0] as u64 * row.shape[1] as u64).sum()
    };
    all.into_iter()
        .map(|(layer, rows)| Layer {
            layer,
            params_before: rows.iter().map(|row| row.0).sum(),
            params_after: rows.iter().map(|row| row.1).sum::<u64>() + of_base(layer),
            weight_error: (rows.iter().map(|row| row.2).sum::<f64>() / rows.len() as f64).sqrt(),
        })
        .collect()
}

/// A JSON document as it is and as it is meant; `None` if there is no such file.
fn document<T: DeserializeOwned>(path: &Path) -> Result<Option<(Value, T)>, ReportError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(source) => return Err(ReportError::Read { path: path.to_owned(), source }),
    };
    let broken = |source| ReportError::Document { path: path.to_owned(), source };
    let typed = serde_json::from_slice(&text).map_err(broken)?;
    Ok(Some((serde_json::from_slice(&text).map_err(broken)?, typed)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const W1: &str = "model.layers.0.block_sparse_moe.experts.0.w1";
    const W2: &str = "model.layers.0.block_sparse_moe.experts.0.w2";

    fn report() -> Value {
        json!({
            "report_version": 1, "tool": "lowrank-compress", "version": "0.1.0",
            "base_model": { "id": "org/base", "revision": null, "files": [] },
            "budget": null,
            "before": { "params": 1000, "bytes": 2000 }, "after": { "params": 750, "bytes": 1500 },
            "storage": "uv",
            "settings": {
                "method": "auto", "precision": "auto", "seed": 0, "sensitivity": "relative", "rank_multiple": 1,
                "rank_min": 1, "keep_dense": [], "factor_dtype": "bf16", "shard_bytes_max": 5000,
            },
            "optimality": null,
            "matrices": [
                { "name": W1, "shape": [16, 8], "rank": 3, "relative_error": 0.3, "excess_over_optimum": null, "route": "exact" },
                { "name": W2, "shape": [8, 16], "rank": null, "relative_error": 0.0, "excess_over_optimum": null, "route": "dense" },
            ],
            "calibration": {
                "texts": [], "tokens": 7, "window": 7, "tokens_blake3": "", "gate_weight": "squared", "target": "expert",
                "blend": 0.1, "sensitivity_tokens": null, "engine": "CPU, f32", "tokens_per_expert": [[7]],
                "unrouted_experts": [], "kl_at_half": null, "sensitivity": null,
            },
        })
    }

    fn verification(error: f64) -> Value {
        let matrix = json!({ "name": W1, "shape": [16, 8], "rank": 3, "relative_error": error, "recorded_error": error });
        let size = json!({ "params": 1, "bytes": 2 });
        json!({
            "verification_version": 1, "verdict": "passed", "findings": [], "outcome": null,
            "files": {
                "original": size, "compressed": size, "budget": null, "untouched_tensors": 0, "factored": [matrix], "dense_matrices": 1,
            },
            "thresholds": { "max_kl": null, "max_perplexity_increase": null, "min_top1": null, "max_layer_error": null },
        })
    }

    fn checkpoint() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("out");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(format::REPORT_FILE), report().to_string()).unwrap();
        (folder, dir)
    }

    #[test]
    fn layers_are_summed_and_unknown_keys_are_kept() {
        let (_folder, dir) = checkpoint();
        let page = CheckpointPage::read(&dir).unwrap();
        let [layer] = page.layers[..] else { panic!("{:?}", page.layers) };
        assert_eq!((layer.params_before, layer.params_after), (256, 3 * 24 + 128));
        assert!((layer.weight_error - 0.3 / 2_f64.sqrt()).abs() < 1e-15);
        assert_eq!(page.report["calibration"]["tokens_per_expert"], json!([[7]]));
        let place = ["layer", "expert", "projection"].map(|key| page.report["matrices"][1][key].clone());
        assert_eq!(place, [json!(0), json!(0), json!("down")]);
        assert_eq!(page.subtitle(), "org/base with low-rank experts: 25.00 % of its parameters removed");
    }

    #[test]
    fn errors_of_calibrated_matrices_are_of_stored_values() {
        let (_folder, dir) = checkpoint();
        let basis = || CheckpointPage::read(&dir).unwrap().error_basis;
        assert_eq!(basis(), "before rounding to the stored number format");
        let mut calibrated = report();
        calibrated["matrices"][0]["calibrated_error"] = json!(0.2);
        std::fs::write(dir.join(format::REPORT_FILE), calibrated.to_string()).unwrap();
        assert_eq!(basis(), "of the stored values");
    }

    #[test]
    fn a_verification_of_another_checkpoint_is_refused() {
        let (folder, dir) = checkpoint();
        let read = || CheckpointPage::read(&dir).unwrap();
        assert_eq!(read().with_verification(&dir, None).unwrap().verification, None);
        let file = folder.path().join("out.verification.json");
        std::fs::write(&file, verification(0.3).to_string()).unwrap();
        assert!(read().with_verification(&dir, None).unwrap().verification.is_some());
        std::fs::write(&file, verification(0.31).to_string()).unwrap();
        let refused = read().with_verification(&dir, None).unwrap_err();
        assert!(matches!(refused, ReportError::OtherCheckpoint { .. }), "{refused}");
        let named = read().with_verification(&dir, Some(&folder.path().join("none.json")));
        assert!(matches!(named, Err(ReportError::Read { .. })));
    }

    #[test]
    fn what_is_no_checkpoint_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let refused = CheckpointPage::read(folder.path()).unwrap_err();
        assert!(refused.to_string().contains("no lowrank_report.json"), "{refused}");
        std::fs::write(folder.path().join(format::REPORT_FILE), "{}").unwrap();
        assert!(matches!(CheckpointPage::read(folder.path()), Err(ReportError::Document { .. })));
    }

    #[test]
    fn spectra_of_other_matrices_are_refused() {
        let (_folder, dir) = checkpoint();
        let spectra = |names: [&str; 2]| {
            let rows = names.map(|name| json!({ "name": name, "sigma": [2.0, 1.0] }));
            let text = json!({ "spectra_version": 1, "index": [1, 8], "matrices": rows }).to_string();
            std::fs::write(dir.join(format::SPECTRA_FILE), text).unwrap();
            CheckpointPage::read(&dir)
        };
        assert!(spectra([W1, W2]).unwrap().spectra.is_some());
        assert!(matches!(spectra([W2, W1]), Err(ReportError::OtherCheckpoint { .. })));
    }
}
