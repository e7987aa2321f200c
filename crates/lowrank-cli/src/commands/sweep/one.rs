//! One point of a sweep, compressed and verified.

use super::points::{Identified, Verification};
use super::rows::measured;
use crate::args::Verbosity;
use crate::commands::report::{self, Verified};
use crate::commands::shared::{resolve, write_plan};
use crate::exit::{Failure, Result, unwritten};
use crate::progress::Console;
use lowrank_forward::{Chosen, choose};
use lowrank_model::Progress;
use lowrank_pipeline::Interrupt;
use lowrank_pipeline::compress::{self, Request};
use lowrank_pipeline::workers::Resources;
use lowrank_reader::Checkpoint;
use lowrank_report::place;
use lowrank_sweep::{PointId, Row};
use lowrank_verify::{VerifyError, verify_on};
use lowrank_writer::Leftover;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Checkpoints and pages of points, in the folder of the sweep.
const POINTS: &str = "points";

/// What makes and verifies checkpoints of points.
pub(crate) struct Compressing<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) resources: &'a Resources,
    /// The sweep's folder.
    pub(super) out: &'a Path,
    pub(super) verification: &'a Verification,
    pub(super) interrupt: &'a Interrupt,
}

impl Compressing<'_> {
    /// Makes the folder of the points, and chooses where models run.
    pub(crate) fn begin(&self, console: &Console) -> Result<Chosen> {
        let engine = choose(self.resources.device).map_err(VerifyError::Forward)?;
        if let Some(why) = &engine.fallback {
            console.note(&format!("models run on the CPU: {why}"));
        }
        let folder = self.out.join(POINTS);
        std::fs::create_dir_all(&folder)
            .map_err(|error| unwritten(&folder, "cannot create this folder", &error))?;
        Ok(engine)
    }

    /// Where the checkpoint of a point lies.
    pub(super) fn place(&self, id: &PointId) -> PathBuf {
        self.out.join(POINTS).join(id.as_str())
    }

    /// The row of a planned point when it is verified, or has failed; an error is one of the whole sweep.
    pub(crate) fn row_of(
        &self,
        one: &Identified<'_>,
        row: Row,
        engine: &Chosen,
        progress: &dyn Progress,
    ) -> Result<Row> {
        match self.compress_and_verify(one, row.clone(), engine, progress) {
            Ok(row) => Ok(row),
            Err(error) if ends_all(&error) => Err(error),
            Err(error) => Ok(row.failed(error.to_string())),
        }
    }

    fn compress_and_verify(
        &self,
        one: &Identified<'_>,
        row: Row,
        engine: &Chosen,
        progress: &dyn Progress,
    ) -> Result<Row> {
        let (job, dir) = (&one.point.job, self.place(&one.id));
        // A checkpoint is there whole or not at all: this one was finished before a kill.
        let took = if dir.is_dir() {
            None
        } else {
            let request = Request {
                model: &job.model,
                out: &dir,
                recipe: &job.recipe,
                resources: self.resources,
                leftover: Leftover::Resume,
                interrupt: self.interrupt,
                provenance: None,
            };
            let start = Instant::now();
            let done = compress::compress(self.checkpoint, request, progress)?;
            write_plan(&place::beside(&dir, "plan.json"), &done.plan)?;
            Some(start.elapsed())
        };
        let start = Instant::now();
        let original = resolve(&job.model)?;
        let verified = verify_on(&*engine.engine, &original, &dir, &self.verification.options, progress)?;
        let file = place::beside(&dir, place::VERIFICATION);
        std::fs::write(&file, verified.to_json())
            .map_err(|error| unwritten(&file, "the verification was not written", &error))?;
        report::leave(&dir, Verified::By(&file), Verbosity { quiet: true, ..Verbosity::default() });
        Ok(measured(row, &verified, took, start.elapsed()))
    }
}

/// Whether a failure is that of the whole sweep and not of a point.
pub(super) fn ends_all(failure: &Failure) -> bool {
    failure.kind().is_stop() || matches!(failure, Failure::Sweep(_))
}
