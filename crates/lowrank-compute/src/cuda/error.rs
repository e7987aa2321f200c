//! Why there is no device, and why a device failed.

use cudarc::cublas::result::CublasError;
use cudarc::cusolver::result::CusolverError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// Why no CUDA device can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no CUDA here: {why}")]
pub struct NoCuda {
    /// One line.
    pub why: String,
}

/// Why a device could not compute.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The device's memory is full.
    #[error("CUDA: the device has too little free memory ({context})")]
    OutOfMemory {
        /// What was being done.
        context: &'static str,
    },
    /// A library refused.
    #[error("CUDA: {context}: {message}")]
    Library {
        /// What was being done.
        context: &'static str,
        /// What the library said.
        message: String,
    },
    /// The kernels did not compile.
    #[error("CUDA: the kernels do not compile: {log}")]
    Compile {
        /// The compiler's log, on one line.
        log: String,
    },
    /// An iteration did not settle, or was given numbers it cannot work with.
    #[error("CUDA: {context} did not converge (info {info})")]
    NoConvergence {
        /// What was being done.
        context: &'static str,
        /// What cuSOLVER reported.
        info: i32,
    },
}

/// Gives a library's status the name of what was being done.
pub(super) trait During<T> {
    fn during(self, context: &'static str) -> Result<T, CudaError>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, context: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { context },
            // The name and not the description: asking for the latter calls the driver again.
            code => CudaError::Library { context, message: format!("{code:?}") },
        })
    }
}

impl<T> During<T> for Result<T, CublasError> {
    fn during(self, context: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| match error.0 {
            cudarc::cublas::sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => {
                CudaError::OutOfMemory { context }
            }
            code => CudaError::Library { context, message: format!("{code:?}") },
        })
    }
}

impl<T> During<T> for Result<T, CusolverError> {
    fn during(self, context: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| match error.0 {
            cudarc::cusolver::sys::cusolverStatus_t::CUSOLVER_STATUS_ALLOC_FAILED => {
                CudaError::OutOfMemory { context }
            }
            code => CudaError::Library { context, message: format!("{code:?}") },
        })
    }
}
