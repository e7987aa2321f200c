//! How many matrices are in flight: one per worker, as many as the memory allows.

use crate::PipelineError;
use lowrank_cache::Cache;
use lowrank_calibrate::CalibrateError;
use lowrank_compute::{Algebra, AlgebraChoice, NoDevice};
use lowrank_forward::Device;
use lowrank_model::{MatrixShape, ModelConfig, Projection};
use std::path::PathBuf;

/// Most workers that can be asked for; each is a thread.
pub const WORKERS_MAX: usize = 1024;

/// Threads, memory and places a job may use.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    /// Most matrices in flight; 0: one per core.
    pub workers: usize,
    /// Memory that all workers together may take; `None`: three quarters of what is available.
    pub memory_bytes: Option<u64>,
    /// Where measured numbers are kept for later runs.
    pub cache: CachePlace,
    /// Where a model runs that is calibrated on.
    pub device: Device,
    /// Where matrices are decomposed; decides bits, so nothing but the user chooses it.
    pub algebra: AlgebraChoice,
}

/// Where measured numbers are kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CachePlace {
    /// With the user's other caches.
    #[default]
    Usual,
    /// In this folder.
    At(PathBuf),
    /// Nowhere beyond the run.
    Nowhere,
}

impl Resources {
    /// Opens what decomposes matrices.
    pub fn algebra(&self) -> Result<Algebra, NoDevice> {
        Algebra::open(self.algebra)
    }

    /// Opens the cache.
    pub(crate) fn cache(&self) -> Result<Cache, CalibrateError> {
        match (&self.cache, Cache::default_root()) {
            (CachePlace::At(root), _) => Ok(Cache::at(root)),
            (CachePlace::Usual, Some(root)) => Ok(Cache::at(&root)),
            (CachePlace::Usual, None) | (CachePlace::Nowhere, _) => Ok(Cache::temporary()?),
        }
    }
}

/// What one worker needs for one matrix at worst: the stored bytes, its Gram matrix with eigenvectors and workspace in
/// f64, and the factors in f32 and rounded.
pub fn worker_bytes(shape: MatrixShape, element_bytes: u64) -> u64 {
    let (m, n) = (shape.rows as u64, shape.cols as u64);
    let short = m.min(n);
    let stored = m * n * element_bytes;
    let gram_and_vectors = 4 * short * short * 8;
    let factors = short * (m + n) * 6;
    stored + gram_and_vectors + factors.min(2 * m * n * 4)
}

/// A pool sized so that its workers fit the memory.
pub fn pool(config: &ModelConfig, resources: &Resources) -> Result<rayon::ThreadPool, PipelineError> {
    let per_worker = worker_bytes(config.matrix_shape(Projection::W1), 4);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = if resources.workers == 0 { cores } else { resources.workers };
    if wanted > WORKERS_MAX {
        return Err(PipelineError::TooManyWorkers { asked: wanted, most: WORKERS_MAX });
    }
    let memory_bytes = resources.memory_bytes.or_else(|| available_memory_bytes().map(|bytes| bytes / 4 * 3));
    let fit = match memory_bytes {
        None => wanted,
        Some(bytes) => usize::try_from(bytes / per_worker).unwrap_or(usize::MAX),
    };
    if fit == 0 {
        return Err(PipelineError::TooLittleMemory {
            needed_bytes: per_worker,
            allowed_bytes: memory_bytes.unwrap_or_default(),
        });
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(wanted.min(fit))
        .thread_name(|index| format!("matrix-{index}"))
        .build()
        .map_err(|source| PipelineError::Threads { source })
}

/// `MemAvailable` of Linux; elsewhere unknown.
fn available_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_workers_than_machines_have_cores_are_refused() {
        let config = ModelConfig::from_hf_json(&serde_json::json!({
            "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_local_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "vocab_size": 8,
        }))
        .unwrap();
        for workers in [WORKERS_MAX + 1, usize::MAX] {
            let refused = pool(&config, &Resources { workers, ..Resources::default() });
            assert!(matches!(refused, Err(PipelineError::TooManyWorkers { .. })), "{workers}");
        }
    }

    #[test]
    fn a_mixtral_worker_needs_about_one_gigabyte() {
        let bytes = worker_bytes(MatrixShape { rows: 14336, cols: 4096 }, 2);
        assert!((800_000_000..1_300_000_000).contains(&bytes), "{bytes}");
    }
}
