//! NVIDIA GPUs: found at run time, driven through cudarc, with nothing of CUDA needed to build or to start.
//!
//! | File | Holds |
//! |---|---|
//! | `library.rs` | where CUDA's libraries are looked for |
//! | `device.rs` | a device with its compiled kernels |
//! | `lane.rs` | one stream with its handles; buffers on the device |
//! | `staging.rs` | copies that overlap with computing |
//! | `kernels.cu`, `kernels.rs` | everything that is not a product, and its compiler |
//! | `products.rs` | products by cuBLAS: f32, f64, bf16 in with f32 sums |
//! | `projector.rs` | the upper subspace of a symmetric matrix, by products |
//! | `solver.rs` | eigenvectors and QR by cuSOLVER |
//! | `operations.rs` | the operations of a forward pass |
//! | `measure.rs` | peaks and the time of every step, for benchmarks |
//! | `backend.rs` | [`Cuda`]: the kernels of this crate on a device |
//!
//! Matrices are row-major here as everywhere; cuBLAS and cuSOLVER read columns, so that they see the transpose of
//! each, which the files that call them account for.
//!
//! No other module of the workspace has `unsafe` in it.
#![expect(unsafe_code, reason = "CUDA is a C interface; every block says why it is sound")]

mod backend;
mod device;
mod error;
mod kernels;
mod lane;
mod library;
pub mod measure;
mod operations;
mod products;
mod projector;
mod solver;
mod staging;
#[cfg(test)]
mod tests;

pub use backend::{Cuda, Fallbacks};
pub use device::{CudaDevice, available};
pub use error::{CudaError, NoCuda};
pub use kernels::compile_for_inspection;
pub use lane::{Buffer, Lane};
pub use operations::{DeviceLinear, DeviceMatrix, Positions, Rows, Scores, WeightProducts};
