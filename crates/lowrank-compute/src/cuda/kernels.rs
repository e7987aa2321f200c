//! Compiling `kernels.cu` with nvrtc.

use super::error::{CudaError, NoCuda};
use super::library;
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString};
use std::path::Path;

/// Threads of a block, in every kernel.
pub(super) const THREADS: u32 = 256;

pub(super) const SOURCE: &str = include_str!("kernels.cu");

/// What nvrtc is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    /// Assembler that the driver translates. A driver older than nvrtc refuses it.
    Ptx,
    /// Machine code of exactly this architecture.
    Cubin,
}

/// Kernels for a compute capability (major, minor).
pub(super) fn compile((major, minor): (i32, i32), product: Product) -> Result<Vec<u8>, CudaError> {
    let kind = match product {
        Product::Ptx => "compute",
        Product::Cubin => "sm",
    };
    let options = [
        format!("--gpu-architecture={kind}_{major}{minor}"),
        format!("-DTHREADS={THREADS}"),
        "--std=c++17".to_owned(),
    ];
    let library = |error: result::NvrtcError| CudaError::Library {
        context: "nvrtc",
        message: format!("{:?}", error.0),
    };
    let source = CString::new(SOURCE).expect("the source holds no NUL");
    let program = result::create_program(&source, Some(c"kernels.cu")).map_err(library)?;
    let compiled = (|| {
        // SAFETY: the program was just created and is destroyed below, after its last use.
        unsafe { result::compile_program(program, &options) }.map_err(|_| {
            // SAFETY: as above.
            let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
            let bytes: Vec<u8> = log.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
            let text = String::from_utf8_lossy(&bytes);
            CudaError::Compile { log: text.split_whitespace().collect::<Vec<_>>().join(" ") }
        })?;
        match product {
            Product::Ptx => {
                // SAFETY: as above.
                let text = unsafe { result::get_ptx(program) }.map_err(library)?;
                // The driver reads up to the NUL at its end.
                Ok(text.into_iter().map(|byte| byte as u8).collect())
            }
            Product::Cubin => {
                let mut size = 0;
                // SAFETY: as above; `size` is written.
                unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }.result().map_err(library)?;
                let mut code = vec![0_u8; size];
                // SAFETY: as above; `code` has the size that was asked for.
                unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result().map_err(library)?;
                Ok(code)
            }
        }
    })();
    // SAFETY: created above, used no more.
    unsafe { result::destroy_program(program) }.map_err(library)?;
    compiled
}

/// PTX of all kernels for a compute capability, with nvrtc from a folder: a check that needs no device.
pub fn compile_for_inspection(nvrtc: &Path, capability: (i32, i32)) -> Result<String, String> {
    library::load_compiler(nvrtc).map_err(|NoCuda { why }| why)?;
    let ptx = compile(capability, Product::Ptx).map_err(|error| error.to_string())?;
    let text = CStr::from_bytes_until_nul(&ptx).map_err(|error| error.to_string())?;
    Ok(text.to_string_lossy().into_owned())
}

/// Names of the kernels, as the source has them.
#[cfg(test)]
pub(super) fn names() -> Vec<&'static str> {
    let functions = SOURCE.split("__global__ void ").skip(1);
    let named = functions.filter_map(|rest| rest.split('(').next()).filter(|name| *name != "name");
    const MACROS: [&str; 4] = ["WIDEN(", "MIRROR(", "AFFINE(", "DIAGONAL("];
    let macros = SOURCE
        .lines()
        .filter_map(|line| MACROS.iter().find_map(|name| line.strip_prefix(name))?.split(',').next());
    named.chain(macros).collect()
}
