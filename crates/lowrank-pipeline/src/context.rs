//! What every stage of a job needs beside its input.

use crate::Interrupt;
use crate::workers::Resources;
use lowrank_model::Progress;

/// Threads, places, progress, and whether to stop.
#[derive(Clone, Copy)]
pub struct JobContext<'a> {
    /// What may be used; decides no byte but for device and algebra.
    pub resources: &'a Resources,
    /// One thread per matrix in flight.
    pub pool: &'a rayon::ThreadPool,
    /// How far it is.
    pub progress: &'a dyn Progress,
    /// Asked before each unit of work.
    pub interrupt: &'a Interrupt,
}
