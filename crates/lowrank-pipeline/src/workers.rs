//! How many workers a job has: as many as were asked for and as the memory allows.

use crate::PipelineError;
use crate::memory::Demand;
use lowrank_cache::Cache;
use lowrank_calibrate::CalibrateError;
use lowrank_compute::{Algebra, NoDevice};
use lowrank_model::{AlgebraChoice, Device, Dtype};
use lowrank_reader::Checkpoint;
use std::path::PathBuf;

/// Most workers that can be asked for; each is a thread.
pub const WORKERS_MAX: usize = 1024;

/// Threads, memory and places a job may use.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    /// Most matrices in flight; 0: one per core.
    pub workers: usize,
    /// Memory that the job may take; `None`: three quarters of what is available.
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

/// A pool of as many workers as were asked for and fit the memory.
pub fn pool(demand: &Demand, resources: &Resources) -> Result<rayon::ThreadPool, PipelineError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = if resources.workers == 0 { cores } else { resources.workers };
    if wanted > WORKERS_MAX {
        return Err(PipelineError::TooManyWorkers { asked: wanted, most: WORKERS_MAX });
    }
    let memory_bytes = resources.memory_bytes.or_else(|| available_memory_bytes().map(|bytes| bytes / 4 * 3));
    let workers = memory_bytes.map_or(wanted, |bytes| demand.workers(wanted, bytes));
    if workers == 0 {
        let stage = demand.peak(1);
        return Err(PipelineError::TooLittleMemory {
            stage: stage.name,
            needed_bytes: stage.bytes(1),
            allowed_bytes: memory_bytes.unwrap_or_default(),
        });
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(workers)
        .thread_name(|index| format!("matrix-{index}"))
        .build()
        .map_err(|reason| PipelineError::Threads { reason })
}

/// The widest dtype of the weights of a checkpoint, and of factors to come.
pub fn widest(checkpoint: &Checkpoint, factors: Option<Dtype>) -> Dtype {
    let stored = checkpoint.specs().iter().filter_map(|spec| checkpoint.dtype(&spec.name));
    stored.chain(factors).max_by_key(|dtype| dtype.size_bytes()).unwrap_or(Dtype::F32)
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
    use lowrank_model::recipe::Goal;
    use lowrank_model::{ModelConfig, Recipe};

    #[test]
    fn more_workers_than_machines_have_cores_are_refused() {
        let config = ModelConfig::from_hf_json(&serde_json::json!({
            "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_local_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "vocab_size": 8,
        }))
        .unwrap();
        for workers in [WORKERS_MAX + 1, usize::MAX] {
            let recipe = Recipe::new(Goal::Ranks(Default::default()));
            let demand = Demand::compress(&config, Dtype::Bf16, &recipe);
            let refused = pool(&demand, &Resources { workers, ..Resources::default() });
            assert!(matches!(refused, Err(PipelineError::TooManyWorkers { .. })), "{workers}");
        }
    }
}
