//! Chooses the engine: the CPU, or a GPU that is found at run time.

use crate::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::cuda::CudaEngine;
use crate::engine::Engine;
use crate::error::ForwardError;
use lowrank_model::Device;

/// The engine that was found.
#[derive(Debug)]
pub struct Chosen {
    /// The engine.
    pub engine: Box<dyn Engine>,
    /// Why the CPU was taken although a GPU was allowed.
    pub fallback: Option<String>,
}

/// Opens the engine of a device. An error only if a GPU was demanded and there is none.
pub fn choose(device: Device) -> Result<Chosen, ForwardError> {
    let cpu = |fallback| Chosen { engine: Box::new(Cpu), fallback };
    match device {
        Device::Cpu => Ok(cpu(None)),
        Device::Auto => {
            Ok(gpu().map_or_else(|why| cpu(Some(why)), |engine| Chosen { engine, fallback: None }))
        }
        Device::Cuda => gpu()
            .map(|engine| Chosen { engine, fallback: None })
            .map_err(|why| ForwardError::NoDevice { why }),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> Result<Box<dyn Engine>, String> {
    match CudaEngine::new() {
        Ok(engine) => Ok(Box::new(engine)),
        Err(why) => Err(why.to_string()),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Result<Box<dyn Engine>, String> {
    Err("no CUDA here: this program was built without it".into())
}
