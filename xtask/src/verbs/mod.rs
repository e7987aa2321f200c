//! The verbs; each has its own file.

pub(crate) mod bench;
pub(crate) mod ci;
pub(crate) mod cluster_test;
pub(crate) mod conformance;
pub(crate) mod demo;
pub(crate) mod fixtures;
pub(crate) mod fuzz;
pub(crate) mod gpu_check;
pub(crate) mod lapack;
pub(crate) mod other_cpu;
pub(crate) mod report_test;
pub(crate) mod serve_test;
pub(crate) mod sweep;
pub(crate) mod tidy;
pub(crate) mod torture;
pub(crate) mod use_test;
pub(crate) mod wheel_test;
