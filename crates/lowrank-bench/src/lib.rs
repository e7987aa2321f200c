//! What the benchmark programs of this crate share. The programs:
//!
//! | Program | Measures | Started by |
//! |---|---|---|
//! | `lowrank-bench` | one job in JSON: a generated checkpoint, a matrix, a compression, a plan | `cargo xtask bench` |
//! | `throughput` | the forward pass | `cargo xtask bench forward` |
//! | `sweep_plans` | 1,000 plans of an 8x7B model | `cargo xtask bench sweep` |
//! | `plan_shapes` | a plan of each of three larger models | 〃 |
//! | `cluster_times` | nothing: counts how long a cluster would take for two models | `cargo xtask bench cluster` |
//! | `prune_experts` | expert pruning, to compare with | `cargo xtask bench fidelity` |
//! | `gpu_check` | parity with the CPU and speed on a GPU | the folder of `cargo xtask gpu-check` |

pub mod meter;
pub mod shapes;
pub mod spectra;
