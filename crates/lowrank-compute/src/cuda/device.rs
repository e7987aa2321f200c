//! A device, its context and its compiled kernels.

use super::error::{CudaError, During, NoCuda};
use super::kernels::{Product, compile};
use super::library;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, sys};
use cudarc::nvrtc::Ptx;
use std::ffi::CStr;
use std::sync::{Arc, OnceLock};

/// The first device that CUDA shows; `CUDA_VISIBLE_DEVICES` chooses another.
const ORDINAL: usize = 0;

/// A CUDA device that is ready to compute.
#[derive(Debug)]
pub struct CudaDevice {
    pub(super) context: Arc<CudaContext>,
    pub(super) functions: Functions,
    name: String,
    capability: (i32, i32),
    memory_bytes: usize,
    libraries: &'static str,
}

/// The device of this process, opened on the first call, or why there is none.
pub fn available() -> Result<Arc<CudaDevice>, NoCuda> {
    // Never dropped, so that no destructor meets a driver that has shut down already.
    static DEVICE: OnceLock<Result<Arc<CudaDevice>, NoCuda>> = OnceLock::new();
    DEVICE.get_or_init(|| CudaDevice::open().map(Arc::new)).clone()
}

impl CudaDevice {
    fn open() -> Result<Self, NoCuda> {
        let libraries = library::load()?;
        let why = |error: CudaError| NoCuda { why: error.to_string() };
        let devices = CudaContext::device_count().during("asking the driver for devices").map_err(why)?;
        if devices == 0 {
            return Err(NoCuda { why: "the driver shows no device".into() });
        }
        let device = || -> Result<Self, CudaError> {
            let context = CudaContext::new(ORDINAL).during("opening the device")?;
            // SAFETY: a buffer is used on the stream that it was made on and on no other (`Buffer::pointer` asserts it),
            // so there is nothing to synchronise between streams.
            unsafe { context.disable_event_tracking() };
            let name = context.name().during("reading the device's name")?;
            let capability = context.compute_capability().during("reading the compute capability")?;
            let memory_bytes = context.total_mem().during("reading the size of memory")?;
            keep_freed_memory(&context);
            let functions = Functions::load(&module(&context, capability)?)?;
            Ok(Self { context, functions, name, capability, memory_bytes, libraries })
        };
        device().map_err(why)
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where CUDA's libraries came from.
    pub fn libraries(&self) -> &'static str {
        self.libraries
    }

    /// Name, compute capability and memory, on one line.
    pub fn describe(&self) -> String {
        let (major, minor) = self.capability;
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        format!("{}, compute capability {major}.{minor}, {gib:.0} GiB", self.name)
    }

    /// Name and compute capability: what bits depend on.
    pub fn identity(&self) -> String {
        let (major, minor) = self.capability;
        format!("{}, compute capability {major}.{minor}", self.name)
    }

    /// Memory that nobody uses at the moment.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        let (free, _) = self.context.mem_get_info().during("reading the size of free memory")?;
        Ok(free as u64)
    }
}

/// Lets the allocator keep what was freed, instead of returning it to the system at every synchronisation. Only speed
/// depends on it.
fn keep_freed_memory(context: &CudaContext) {
    if !context.has_async_alloc() {
        return;
    }
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the device is open; `pool` is written before it is used, and the attribute is a 64-bit unsigned integer.
    unsafe {
        if sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()) == sys::CUresult::CUDA_SUCCESS {
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let _ = sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast());
        }
    }
}

/// Machine code for the device where this nvrtc knows it; else assembler of an older architecture, for the driver to
/// translate.
fn module(context: &Arc<CudaContext>, capability: (i32, i32)) -> Result<Arc<CudaModule>, CudaError> {
    /// Ampere, which every nvrtc of CUDA 12 and 13 knows.
    const OLDER: (i32, i32) = (8, 0);
    match compile(capability, Product::Cubin) {
        Ok(code) => context.load_module(Ptx::from_binary(code)).during("loading the kernels"),
        Err(_) => {
            let text = compile(capability.min(OLDER), Product::Ptx)?;
            let text = CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy().into_owned();
            context.load_module(Ptx::from_src(text)).during("loading the kernels")
        }
    }
}

macro_rules! functions {
    ($($name:ident),* $(,)?) => {
        /// The kernels of `kernels.cu`.
        #[derive(Debug)]
        pub(super) struct Functions {
            $(pub(super) $name: CudaFunction,)*
        }

        impl Functions {
            fn load(module: &Arc<CudaModule>) -> Result<Self, CudaError> {
                Ok(Self {
                    $($name: module
                        .load_function(stringify!($name))
                        .during(concat!("finding the kernel ", stringify!($name)))?,)*
                })
            }
        }

        #[cfg(test)]
        pub(super) const FUNCTION_NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

functions! {
    widen_f32_f32,
    widen_f16_f32,
    widen_bf16_f32,
    widen_f32_f64,
    widen_f16_f64,
    widen_bf16_f64,
    narrow_f64_f32,
    narrow_f32_bf16,
    mirror_lower_f32,
    mirror_lower_f64,
    affine_f32,
    affine_f64,
    diagonal_f32,
    diagonal_f64,
    rms_norm,
    rope,
    attention_softmax,
    swiglu,
    gather_rows,
    scatter_add_rows,
    add,
}
