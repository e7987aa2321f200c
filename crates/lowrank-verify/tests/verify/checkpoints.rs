//! A small original and its compressed form, made without the crates that the verifier checks.
//!
//! Experts are u·v plus noise, u and v known, so that no decomposition is needed; errors are summed plainly.

use half::bf16;
use lowrank_model::names::Role;
use lowrank_model::{KeptChannels, MatrixId, ModelConfig, Projection, params};
use lowrank_verify::{Depth, TextSource, Verification, VerifyOptions, verify};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub(crate) const RANK: usize = 3;
/// Layer and expert of [`Pair::narrowed`].
pub(crate) const NARROWED: (usize, usize) = (1, 1);
/// Its channels, of 12.
pub(crate) const KEPT: [usize; 5] = [0, 2, 3, 7, 11];
const SHARD: &str = "model-00001-of-00001.safetensors";

/// A tensor: shape and bf16 values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Values {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<bf16>,
}

/// A folder's content before it is written, open to mutation.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    pub(crate) tensors: BTreeMap<String, Values>,
    pub(crate) config: Value,
    pub(crate) report: Option<Value>,
    /// `lowrank_channels.json`.
    pub(crate) channels: Option<Value>,
    pub(crate) total_parameters: u64,
}

/// Original and compressed, and where they are written.
pub(crate) struct Pair {
    pub(crate) original: Folder,
    pub(crate) compressed: Folder,
    root: TempDir,
}

fn config() -> ModelConfig {
    let json = json!({
        "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_local_experts": 3, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 32, "rope_theta": 1e4, "rms_norm_eps": 1e-5
    });
    ModelConfig::from_hf_json(&json).unwrap()
}

/// Up of every last expert stays dense.
pub(crate) fn is_factored(id: MatrixId) -> bool {
    !(id.expert == 2 && id.projection == Projection::Up)
}

pub(crate) fn matrix(layer: usize, expert: usize, projection: Projection) -> MatrixId {
    MatrixId { layer, expert, projection }
}

pub(crate) fn module_name(id: MatrixId) -> String {
    config().module_name(id)
}

pub(crate) fn factor_names(id: MatrixId) -> (String, String) {
    config().factor_names(id)
}

fn random(rng: &mut ChaCha8Rng, shape: &[usize], scale: f32) -> Values {
    let values =
        (0..shape.iter().product()).map(|_| bf16::from_f32(rng.random_range(-scale..scale))).collect();
    Values { shape: shape.to_vec(), values }
}

/// u·v [m, n] in f64.
fn product(u: &Values, v: &Values) -> Vec<f64> {
    let (m, r, n) = (u.shape[0], u.shape[1], v.shape[1]);
    let at = |x: &Values, i: usize, j: usize| x.values[i * x.shape[1] + j].to_f64();
    (0..m * n).map(|e| (0..r).map(|k| at(u, e / n, k) * at(v, k, e % n)).sum()).collect()
}

fn relative_error(w: &Values, u: &Values, v: &Values) -> f64 {
    let (mut lost, mut energy) = (0.0, 0.0);
    for (w, approximation) in w.values.iter().zip(product(u, v)) {
        lost += (w.to_f64() - approximation).powi(2);
        energy += w.to_f64().powi(2);
    }
    (lost / energy).sqrt()
}

impl Folder {
    fn params(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.values.len() as u64).sum()
    }

    /// Swaps two tensors' values; both keep their names.
    pub(crate) fn swap(&mut self, a: &str, b: &str) {
        let (first, second) = (self.tensors[a].clone(), self.tensors[b].clone());
        self.tensors.insert(a.into(), second);
        self.tensors.insert(b.into(), first);
    }

    pub(crate) fn report(&mut self) -> &mut Value {
        self.report.as_mut().unwrap()
    }

    /// The report's row of a matrix.
    pub(crate) fn row(&mut self, id: MatrixId) -> &mut Value {
        let rows = self.report()["matrices"].as_array_mut().unwrap();
        rows.iter_mut().find(|row| row["name"] == module_name(id)).unwrap()
    }

    fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        let bytes: BTreeMap<&String, Vec<u8>> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                (name, tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect())
            })
            .collect();
        let views: BTreeMap<&String, TensorView<'_>> = bytes
            .iter()
            .map(|(name, bytes)| {
                let shape = self.tensors[*name].shape.clone();
                (*name, TensorView::new(Dtype::BF16, shape, bytes).unwrap())
            })
            .collect();
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        std::fs::write(dir.join(SHARD), serialize(views, Some(metadata)).unwrap()).unwrap();
        let index = json!({
            "metadata": {"total_size": 2 * self.params(), "total_parameters": self.total_parameters},
            "weight_map": self.tensors.keys().map(|name| (name.clone(), json!(SHARD))).collect::<serde_json::Map<_, _>>(),
        });
        let text = |value: &Value| serde_json::to_string_pretty(value).unwrap();
        std::fs::write(dir.join("model.safetensors.index.json"), text(&index)).unwrap();
        std::fs::write(dir.join("config.json"), text(&self.config)).unwrap();
        if let Some(report) = &self.report {
            std::fs::write(dir.join("lowrank_report.json"), text(report)).unwrap();
        }
        if let Some(channels) = &self.channels {
            std::fs::write(dir.join("lowrank_channels.json"), text(channels)).unwrap();
        }
    }
}

impl Pair {
    /// A true pair.
    pub(crate) fn new() -> Self {
        let config = config();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let (mut original, mut compressed) = (BTreeMap::new(), BTreeMap::new());
        let (mut ranks, mut rows) = (serde_json::Map::new(), Vec::new());
        for spec in config.tensors() {
            let Role::Expert(id) = spec.role else {
                let values = random(&mut rng, &spec.shape, 1.0);
                original.insert(spec.name.clone(), values.clone());
                compressed.insert(spec.name, values);
                continue;
            };
            let (m, n) = (spec.shape[0], spec.shape[1]);
            let (u, v) = (random(&mut rng, &[m, RANK], 1.0), random(&mut rng, &[RANK, n], 1.0));
            let noise = random(&mut rng, &[m, n], 0.2);
            let values = product(&u, &v).into_iter().zip(&noise.values);
            let values = values.map(|(w, noise)| bf16::from_f64(w + noise.to_f64())).collect();
            let w = Values { shape: vec![m, n], values };
            let factored = is_factored(id);
            let error = if factored { relative_error(&w, &u, &v) } else { 0.0 };
            rows.push(json!({
                "name": config.module_name(id), "shape": [m, n], "rank": factored.then_some(RANK),
                "relative_error": error, "excess_over_optimum": null, "route": "by hand",
            }));
            if factored {
                let (u_name, v_name) = config.factor_names(id);
                compressed.insert(u_name, u);
                compressed.insert(v_name, v);
                ranks.insert(config.module_name(id), json!(RANK));
            } else {
                compressed.insert(spec.name.clone(), w.clone());
            }
            original.insert(spec.name, w);
        }
        let folder = |tensors, config| {
            let mut folder = Folder { tensors, config, report: None, channels: None, total_parameters: 0 };
            folder.total_parameters = folder.params();
            folder
        };
        let original = folder(original, config.to_hf_json());
        let mut lowrank = config.to_hf_json();
        lowrank["model_type"] = json!("lowrank_mixtral");
        lowrank["architectures"] = json!(["LowRankMixtralForCausalLM"]);
        lowrank["lowrank_config"] =
            json!({"format": "lowrank-compress", "format_version": 1, "ranks": ranks});
        let mut compressed = folder(compressed, lowrank);

        let root = tempfile::tempdir().unwrap();
        original.write(&root.path().join("original"));
        let shard = std::fs::read(root.path().join("original").join(SHARD)).unwrap();
        let sha256: String = Sha256::digest(&shard).iter().map(|byte| format!("{byte:02x}")).collect();
        let (before, after) = (original.params(), compressed.params());
        compressed.report = Some(json!({
            "report_version": 1, "tool": "by hand", "version": "0", "storage": "uv",
            "base_model": {"id": null, "revision": null, "files": [{"name": SHARD, "bytes": shard.len(), "sha256": sha256}]},
            "budget": {"unit": "params", "asked": 100, "removed": before - after, "overshoot": before - after - 100},
            "before": {"params": before, "bytes": 2 * before}, "after": {"params": after, "bytes": 2 * after},
            "matrices": rows,
        }));
        // The pair must be what it says before anything is changed.
        let shape = config.matrix_shape(config.first_matrix());
        assert!(
            params::stored_params(shape, params::Storage::Uv, Some(RANK)) < (shape.rows * shape.cols) as u64
        );
        Self { original, compressed, root }
    }

    /// A true pair, of which the expert of [`NARROWED`] keeps the channels [`KEPT`], its gate and up as factors or rows of
    /// the original, its down as columns that were fitted to something.
    pub(crate) fn narrowed() -> Self {
        let mut pair = Self::new();
        let (layer, expert) = NARROWED;
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        for projection in Projection::ALL {
            let id = matrix(layer, expert, projection);
            let name = format!("{}.weight", module_name(id));
            let w = pair.original.tensors[&name].clone();
            let (rows, cols) = (w.shape[0], w.shape[1]);
            let kept_value = |row: usize, col: usize| match projection {
                Projection::Down => w.values[row * cols + KEPT[col]],
                _ => w.values[KEPT[row] * cols + col],
            };
            let shape = match projection {
                Projection::Down => [rows, KEPT.len()],
                _ => [KEPT.len(), cols],
            };
            let mut values: Vec<bf16> =
                (0..shape[0] * shape[1]).map(|e| kept_value(e / shape[1], e % shape[1])).collect();
            if projection == Projection::Down {
                values.iter_mut().for_each(|value| {
                    *value = bf16::from_f64(value.to_f64() + rng.random_range(-0.3..0.3));
                });
            }
            // All of W, with zeros for what went.
            let (mut lost, mut energy) = (0.0, 0.0);
            for (e, value) in w.values.iter().enumerate() {
                let (row, col) = (e / cols, e % cols);
                let (channel, other) = if projection == Projection::Down { (col, row) } else { (row, col) };
                let stored = KEPT.iter().position(|&kept| kept == channel).map_or(0.0, |at| {
                    let (row, col) = if projection == Projection::Down { (other, at) } else { (at, other) };
                    values[row * shape[1] + col].to_f64()
                });
                lost += (value.to_f64() - stored).powi(2);
                energy += value.to_f64().powi(2);
            }
            let (u, v) = factor_names(id);
            pair.compressed.tensors.remove(&u);
            pair.compressed.tensors.remove(&v);
            pair.compressed.tensors.insert(name, Values { shape: shape.to_vec(), values });
            let ranks = pair.compressed.config["lowrank_config"]["ranks"].as_object_mut().unwrap();
            ranks.remove(&module_name(id));
            let row = pair.compressed.row(id);
            row["rank"] = json!(null);
            row["relative_error"] = json!((lost / energy).sqrt());
        }
        let name = config().family.spelling().expert(layer, expert);
        pair.compressed.config["lowrank_config"]["format_version"] = json!(2);
        pair.compressed.config["lowrank_config"]["widths"] = json!({ &name: KEPT.len() });
        let channels = KeptChannels::new(&KEPT, config().intermediate_size);
        pair.compressed.channels = Some(json!({ &name: channels }));
        pair.compressed.report()["experts"] =
            json!([{ "layer": layer, "expert": expert, "width": KEPT.len(), "relative_error": 0.1 }]);
        let (before, after) = (pair.original.params(), pair.compressed.params());
        pair.compressed.total_parameters = after;
        let report = pair.compressed.report();
        report["after"] = json!({"params": after, "bytes": 2 * after});
        report["budget"]["removed"] = json!(before - after);
        pair
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes both and verifies, on tokens of its own.
    pub(crate) fn verify(&self, depth: Depth) -> Verification {
        let ids = self.path("ids.json");
        let sequence = |seed: u32| -> Vec<u32> { (0..24).map(|i| (i * i * 7 + seed) % 32).collect() };
        std::fs::write(&ids, serde_json::to_string(&[sequence(1), sequence(5), sequence(9)]).unwrap())
            .unwrap();
        let options =
            VerifyOptions { depth, text: TextSource::File(ids), window: 12, ..VerifyOptions::default() };
        self.verify_with(&options)
    }

    pub(crate) fn verify_with(&self, options: &VerifyOptions) -> Verification {
        let (original, compressed) = (self.path("original"), self.path("compressed"));
        self.original.write(&original);
        self.compressed.write(&compressed);
        verify(&original, &compressed, options, &lowrank_model::progress::Silent).unwrap()
    }
}
