//! The verifier on checkpoints that are true and on checkpoints that lie.

mod bundled;
mod checkpoints;
mod mutations;
mod widths;
