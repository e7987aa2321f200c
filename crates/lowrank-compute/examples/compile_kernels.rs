//! Compiles the GPU kernels to PTX with the nvrtc of a folder, without a GPU: `compile_kernels FOLDER [OUT.ptx]`.
//!
//! The folder is, for one, `site-packages/nvidia/cu13/lib` of a Python environment with `nvidia-cuda-nvrtc`.

use std::error::Error;
use std::path::Path;

/// Ampere, Ada, Hopper, Blackwell.
const CAPABILITIES: [(i32, i32); 4] = [(8, 0), (8, 9), (9, 0), (10, 0)];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: compile_kernels FOLDER [OUT.ptx]")?;
    let out = arguments.next();
    for (major, minor) in CAPABILITIES {
        let ptx = lowrank_compute::cuda::compile_for_inspection(Path::new(&folder), (major, minor))?;
        let entries = ptx.lines().filter(|line| line.contains(".entry ")).count();
        if entries == 0 {
            return Err(format!("sm_{major}{minor}: the PTX holds no kernel").into());
        }
        println!("compute capability {major}.{minor}: {entries} kernels, {} bytes of PTX", ptx.len());
        if let Some(out) = &out {
            std::fs::write(out, ptx)?;
        }
    }
    Ok(())
}
