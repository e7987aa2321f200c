//! A checkpoint out of a seed: ordinary shapes, names and files, weights whose spectra look trained.
//!
//! An expert matrix is a noise floor with a power-law head, W = N + Σₖ aₖ bₖᵀ with ‖aₖ‖ ∝ (k+1)^-α, rounded to bf16; floor,
//! head and α differ from matrix to matrix, so that an allocation has something to choose. σ₁/σₙ stays below 100, as it
//! does in trained experts, so both precisions can be measured. All other weights are noise, and norms are 1: the model
//! runs and knows nothing.

use anyhow::{Context, Result};
use lowrank_compute::{Accumulate, Faer, Kernels};
use lowrank_model::names::Role;
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{Dtype, ModelConfig, Tensor, format};
use lowrank_writer::{OutputTensor, ShardLayout, StagingDir};
use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What to write.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Synth {
    /// Must not exist.
    pub(crate) out: PathBuf,
    /// Decoder layers.
    pub(crate) layers: usize,
    /// H
    pub(crate) hidden_size: usize,
    /// F
    pub(crate) intermediate_size: usize,
    /// In a layer.
    pub(crate) experts: usize,
    /// Rows of embedding and head.
    pub(crate) vocab_size: usize,
    /// Of all random numbers.
    pub(crate) seed: u64,
    /// A folder with a tokenizer of at most as many tokens.
    pub(crate) tokenizer: PathBuf,
    /// Longest shard.
    pub(crate) shard_bytes_max: u64,
}

const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
/// Rows that are generated at once.
const BLOCK_ROWS: usize = 512;
/// Components of the head per column of the short side: one in this many.
const SHORT_SIDE_PER_HEAD: usize = 8;
/// Standard deviations: of an expert's noise floor, and of any other weight.
const FLOOR: f32 = 0.0173;
const ELSEWHERE: f32 = 0.02;
/// Of an entry of the first component of the head.
const HEAD: f32 = 0.0033;

impl Synth {
    /// `config.json` of the smallest description.
    fn described(&self) -> Value {
        let head_dim = 128.min(self.hidden_size / 4);
        let num_attention_heads = self.hidden_size / head_dim;
        json!({
            "model_type": "mixtral",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_local_experts": self.experts,
            "num_experts_per_tok": 2,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_attention_heads / 4,
            "head_dim": head_dim,
            "vocab_size": self.vocab_size,
        })
    }

    /// Generates on all cores; the bytes depend on the seed and the dimensions alone.
    pub(crate) fn run(&self) -> Result<Value> {
        let config =
            ModelConfig::from_hf_json(&self.described()).context("these dimensions make no model")?;
        let mut config_json = config.to_hf_json();
        config_json["dtype"] = Dtype::Bf16.torch_name().into();
        config_json["torch_dtype"] = Dtype::Bf16.torch_name().into();
        let specs = config.tensors();
        let tensors = specs.iter().map(|spec| OutputTensor {
            name: spec.name.clone(),
            dtype: Dtype::Bf16.into(),
            shape: spec.shape.clone(),
        });
        let layout = ShardLayout::new(tensors.collect(), self.shard_bytes_max)?;
        if let Some(parent) = self.out.parent() {
            std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        lowrank_writer::check_out(&self.out)?;
        let staging = StagingDir::create(&self.out)?;
        lowrank_writer::check_space(staging.path(), layout.disk_bytes())?;
        let mut files = Vec::new();
        for shard in layout.shards() {
            let file = staging.allocate(&shard.name, shard.file_bytes())?;
            file.write_all_at(&shard.header, 0)?;
            files.push((shard.name.as_str(), shard.header.len() as u64, file));
        }
        specs.par_iter().enumerate().with_max_len(1).try_for_each(|(stream, spec)| -> Result<()> {
            let (shard, placed) = layout.find(&spec.name).context("every tensor has a place")?;
            let place = files.iter().find(|(name, ..)| *name == shard.name);
            let (_, header, file) = place.context("every shard has a file")?;
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(stream as u64);
            write_tensor(spec, rng, file, header + placed.begin)
        })?;
        for (_, _, file) in files {
            file.sync_all()?;
        }
        staging.write_file(Path::new(format::INDEX_FILE), &mut layout.index_json().as_slice())?;
        let config_text = serde_json::to_vec_pretty(&config_json)?;
        staging.write_file(Path::new(format::CONFIG_FILE), &mut config_text.as_slice())?;
        for name in TOKENIZER_FILES {
            let path = self.tokenizer.join(name);
            let mut file = File::open(&path).with_context(|| path.display().to_string())?;
            staging.write_file(Path::new(name), &mut file)?;
        }
        let size = layout.size();
        staging.publish()?;
        Ok(json!({ "params": size.params, "bytes": size.bytes, "shards": layout.shards().len() }))
    }
}

fn write_tensor(spec: &TensorSpec, mut rng: ChaCha8Rng, file: &File, offset: u64) -> Result<()> {
    let cols = *spec.shape.last().context("every tensor has a dimension")?;
    let rows = spec.shape.iter().product::<usize>() / cols;
    let head = match spec.role {
        Role::Expert(_) => Some(Head::draw(rows, cols, &mut rng)),
        _ => None,
    };
    for first in (0..rows).step_by(BLOCK_ROWS) {
        let count = BLOCK_ROWS.min(rows - first);
        let values = match (&head, spec.role) {
            (Some(head), _) => head.rows(count, &mut rng),
            (None, Role::Norm(_)) => Array2::ones((count, cols)),
            (None, _) => noise(count, cols, ELSEWHERE, &mut rng),
        };
        let values = values.as_slice().context("made in row-major order")?;
        let block = Tensor::from_f32(vec![count, cols], Dtype::Bf16, values)?;
        file.write_all_at(block.bytes(), offset + (first * cols * 2) as u64)?;
    }
    Ok(())
}

/// The power-law part of an expert matrix, and its floor.
struct Head {
    floor: f32,
    /// Scale of each aₖ; these are drawn with the rows.
    sizes: Vec<f32>,
    /// bₖᵀ, [head, n].
    b: Array2<f32>,
}

impl Head {
    fn draw(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Self {
        let count = (rows.min(cols) / SHORT_SIDE_PER_HEAD).max(1);
        let mut unit = || (rng.next_u32() >> 8) as f32 / (1 << 24) as f32;
        let floor = FLOOR * (0.8 + 0.4 * unit());
        let size = HEAD * (0.7 + 0.6 * unit());
        let alpha = 0.5 + 0.2 * unit();
        let sizes = (0..count).map(|k| size * (k as f32 + 1.0).powf(-alpha)).collect();
        Self { floor, sizes, b: noise(count, cols, 1.0, rng) }
    }

    /// The next rows of W.
    fn rows(&self, count: usize, rng: &mut ChaCha8Rng) -> Array2<f32> {
        let mut a = noise(count, self.sizes.len(), 1.0, rng);
        for mut row in a.rows_mut() {
            row.iter_mut().zip(&self.sizes).for_each(|(value, size)| *value *= size);
        }
        let mut w = noise(count, self.b.ncols(), self.floor, rng);
        let kernels: &dyn Kernels<f32> = &Faer;
        kernels.gemm(a.view(), self.b.view(), w.view_mut(), Accumulate::Add);
        w
    }
}

/// Sums of four uniform numbers, near enough to normal, of this standard deviation.
fn noise(rows: usize, cols: usize, deviation: f32, rng: &mut ChaCha8Rng) -> Array2<f32> {
    // Four bytes sum to a mean of 510 and a variance of 4 (256² − 1)/12.
    let scale = deviation / (4.0_f32 * 65_535.0 / 12.0).sqrt();
    let mut bytes = vec![0; rows * cols * 4];
    rng.fill_bytes(&mut bytes);
    let sum = |four: &[u8; 4]| four.iter().map(|&byte| i16::from(byte)).sum::<i16>();
    let values = bytes.as_chunks().0.iter().map(|four| scale * f32::from(sum(four) - 510)).collect();
    Array2::from_shape_vec((rows, cols), values).expect("four bytes for each entry")
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::{MatrixId, Projection, StoredMatrix};
    use lowrank_reader::Checkpoint;
    use lowrank_svd::{PrecisionChoice, SvdOptions};

    fn small(out: PathBuf, seed: u64) -> Synth {
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
        let (layers, hidden_size, intermediate_size, vocab_size) = (1, 128, 448, 1024);
        let (experts, shard_bytes_max) = (8, 1 << 20);
        Synth {
            out,
            layers,
            hidden_size,
            intermediate_size,
            experts,
            vocab_size,
            seed,
            tokenizer,
            shard_bytes_max,
        }
    }

    #[test]
    fn a_reader_opens_it_and_spectra_have_a_head_and_a_floor() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |name: &str, seed| {
            let out = folder.path().join(name);
            small(out.clone(), seed).run().unwrap();
            let checkpoint = Checkpoint::open(&out).unwrap();
            let id = MatrixId { layer: 0, expert: 7, projection: Projection::Down };
            let StoredMatrix::Dense(matrix) = checkpoint.read_matrix(id).unwrap() else { panic!("dense") };
            matrix
        };
        let matrix = bytes("a", 1);
        assert_eq!(matrix, bytes("b", 1));
        assert_ne!(matrix, bytes("c", 2));
        let options = SvdOptions { precision: PrecisionChoice::F64, ..SvdOptions::default() };
        let (spectrum, _) = lowrank_svd::spectrum(&Faer, &matrix, &options).unwrap();
        let sigma = spectrum.sigma();
        // The floor of a 128×448 matrix of noise lies between 0.0173·(√448 ∓ √128), give or take its draw.
        let edges = [0.8 * 0.0173 * 9.0, 1.2 * 0.0173 * 33.5];
        assert!(sigma[127] > edges[0] && sigma[20] < edges[1], "{sigma:?}");
        assert!(sigma[0] > 1.2 * sigma[10] && sigma[0] < 100.0 * sigma[127], "{sigma:?}");
    }
}
