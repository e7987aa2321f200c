//! A sweep under way: plans every point, then compresses and verifies those that the config chooses.

use super::points::{Identified, Verification};
use super::rows::{measured, planned};
use crate::args::Verbosity;
use crate::commands::report::{self, Verified};
use crate::commands::shared::{resolve, write_plan};
use crate::exit::{Failure, Result, unwritten};
use crate::grid::{Compress, Sweep};
use crate::progress::{Console, PointProgress};
use lowrank_forward::{Chosen, choose};
use lowrank_model::Progress;
use lowrank_model::plan::Sensitivity;
use lowrank_pipeline::base::InputHashes;
use lowrank_pipeline::compress::{self, Request};
use lowrank_pipeline::planning::{self, Subject};
use lowrank_pipeline::spectra::RunState;
use lowrank_pipeline::sweep::{PlannedPoint, plan_many};
use lowrank_pipeline::workers::Resources;
use lowrank_pipeline::{CalibrationContext, CalibrationText, Interrupt, JobContext, PipelineError};
use lowrank_reader::Checkpoint;
use lowrank_report::place;
use lowrank_sweep::{PointId, Results, Row, Status, front};
use lowrank_verify::{VerifyError, verify_on};
use lowrank_writer::Leftover;
use lowrank_writer::report::BaseModel;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Checkpoints and pages of points, in the folder of the sweep.
const POINTS: &str = "points";

/// A sweep under way.
pub(super) struct Run<'a> {
    pub(super) config: &'a Sweep,
    pub(super) points: &'a [Identified<'a>],
    /// The last point that this run does.
    pub(super) last: usize,
    pub(super) texts: &'a [CalibrationText],
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) subject: &'a Subject,
    pub(super) base: &'a BaseModel,
    pub(super) resources: &'a Resources,
    pub(super) interrupt: &'a Interrupt,
    pub(super) console: &'a Console,
    pub(super) out: &'a Path,
    pub(super) verification: &'a Verification,
    pub(super) results: Mutex<Results>,
}

impl Run<'_> {
    /// A poisoned lock only means that another thread panicked between two whole rows.
    pub(super) fn results(&self) -> std::sync::MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that this run does.
    fn points(&self) -> impl Iterator<Item = &Identified<'_>> {
        self.points.iter().filter(|one| one.point.number <= self.last)
    }

    fn row(&self, one: &Identified<'_>) -> Row {
        Row::new(one.point.number, one.id.clone(), one.point.settings.clone())
    }

    pub(super) fn run(&self, pool: &rayon::ThreadPool, jobs: usize) -> Result<()> {
        self.plan_all(pool, jobs)?;
        self.order()?;
        self.compress_chosen()
    }

    /// Plans every point that has no plan yet.
    fn plan_all(&self, pool: &rayon::ThreadPool, jobs: usize) -> Result<()> {
        // Points that failed are tried again: what was in their way may be gone.
        let open: Vec<&Identified<'_>> = {
            let results = self.results();
            let planned = |one: &&Identified<'_>| {
                results.get(&one.id).is_some_and(|row| row.status != Status::Failed && row.params.is_some())
            };
            self.points().filter(|one| !planned(one)).collect()
        };
        let mut groups: BTreeMap<_, Vec<&Identified<'_>>> = BTreeMap::new();
        for one in open {
            let sensitivity: &str = one.sensitivity.into();
            groups.entry((one.text, sensitivity, one.structures())).or_default().push(one);
        }
        for points in groups.into_values() {
            let Err(error) = self.plan_group(&points, pool, jobs) else { continue };
            if ends_all(&error) {
                return Err(error);
            }
            // What these points are measured by failed: they failed, and the sweep goes on.
            let line = error.to_string();
            for one in points {
                self.results().put(self.row(one).failed(line.clone()))?;
            }
        }
        Ok(())
    }

    /// Plans points that are measured on the same text for the same structures, and compared in the same way.
    fn plan_group(&self, points: &[&Identified<'_>], pool: &rayon::ThreadPool, jobs: usize) -> Result<()> {
        let &Self { checkpoint, base, resources, console: progress, interrupt, .. } = self;
        let &Identified { text, sensitivity, .. } = points[0];
        let own = text.map(|place| self.texts[place].clone());
        let algebra = resources.algebra().map_err(PipelineError::from)?;
        let inputs = InputHashes::known(base.files.clone(), progress);
        let context = JobContext { resources, pool, progress, interrupt };
        let calibration =
            CalibrationContext::new(checkpoint, &inputs, own, points[0].structures(), algebra, context)?;
        let state = RunState { staging: None, scratch: None, interrupt };
        let errors = planning::errors(checkpoint, &calibration, sensitivity, context, state)?;
        let scale = self.scale(text, sensitivity);
        let recipes: Vec<_> = points.iter().map(|one| &one.point.job.recipe).collect();
        progress.start("plan points", points.len() as u64, "points");
        let each = |index: usize, PlannedPoint { plan, took }: PlannedPoint| -> Result<()> {
            let row = self.row(points[index]);
            let row = match plan {
                Ok(plan) => planned(row, &plan, &scale, took),
                Err(error) => row.failed(error),
            };
            self.results().put(row)?;
            progress.advance(1);
            Ok(())
        };
        plan_many(self.subject, &errors, &recipes, jobs, interrupt, &each)?;
        progress.finish();
        Ok(())
    }

    /// In words, what predicted errors are counted in.
    fn scale(&self, text: Option<usize>, sensitivity: Sensitivity) -> String {
        let what = match sensitivity {
            Sensitivity::Measured => "KL, nats per token",
            Sensitivity::Absolute => "Σ‖W−Ŵ‖²",
            Sensitivity::Relative => "Σ‖W−Ŵ‖²/‖W‖²",
        };
        match text {
            None => format!("{what}, by the weights"),
            Some(_) if self.texts.len() < 2 => format!("{what}, calibrated"),
            Some(place) => format!("{what}, calibrated ({})", place + 1),
        }
    }

    /// Marks the front, numbers the rows as the config does, and brings them into its order.
    pub(super) fn order(&self) -> Result<()> {
        let numbers: BTreeMap<&PointId, usize> =
            self.points.iter().map(|one| (&one.id, one.point.number)).collect();
        let mut results = self.results();
        let predicted = |row: &Row| {
            let scale = row.scale.clone().filter(|_| numbers.contains_key(&row.id))?;
            Some((scale, row.id.clone(), (row.params?, row.predicted_error?)))
        };
        let mut all: Vec<(String, PointId, (u64, f64))> =
            results.rows().iter().filter_map(predicted).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let mut on_front: BTreeSet<PointId> = BTreeSet::new();
        for of_scale in all.chunk_by(|a, b| a.0 == b.0) {
            let sizes: Vec<(u64, f64)> = of_scale.iter().map(|(_, _, sizes)| *sizes).collect();
            let best = of_scale.iter().zip(front(&sizes)).filter(|(_, best)| *best);
            on_front.extend(best.map(|((_, id, _), _)| id.clone()));
        }
        results.order(|row| {
            row.point = numbers.get(&row.id).copied().unwrap_or_default();
            row.on_front = on_front.contains(&row.id);
        })?;
        Ok(())
    }

    /// Compresses and verifies what the config chooses, one after another.
    fn compress_chosen(&self) -> Result<()> {
        let chosen: Vec<&Identified<'_>> = {
            let results = self.results();
            let wanted = |row: &Row| match self.config.compress {
                Compress::None => false,
                Compress::All => row.params.is_some(),
                Compress::Pareto => row.on_front,
            };
            let open = |one: &&Identified<'_>| {
                results.get(&one.id).is_some_and(|row| row.status == Status::Planned && wanted(row))
            };
            self.points().filter(open).collect()
        };
        self.tidy()?;
        if chosen.is_empty() {
            return Ok(());
        }
        let engine = choose(self.resources.device).map_err(VerifyError::Forward)?;
        if let Some(why) = &engine.fallback {
            self.console.note(&format!("models run on the CPU: {why}"));
        }
        let folder = self.out.join(POINTS);
        std::fs::create_dir_all(&folder)
            .map_err(|error| unwritten(&folder, "cannot create this folder", &error))?;
        let noted = Mutex::default();
        for (index, one) in chosen.iter().enumerate() {
            self.interrupt.check()?;
            let label = format!("[{}/{}]", index + 1, chosen.len());
            let progress = PointProgress { label, console: self.console, noted: &noted };
            progress.note(&format!("point {}: {}", one.point.number, one.point.label()));
            let row = self.results().get(&one.id).cloned().expect("it was planned");
            let row = match self.compress_one(one, row.clone(), &engine, &progress) {
                Ok(row) => row,
                Err(error) if ends_all(&error) => return Err(error),
                Err(error) => row.failed(error.to_string()),
            };
            self.results().put(row)?;
            self.tidy()?;
        }
        Ok(())
    }

    /// Where the checkpoint of a point lies.
    fn place(&self, id: &PointId) -> PathBuf {
        self.out.join(POINTS).join(id.as_str())
    }

    fn compress_one(
        &self,
        one: &Identified<'_>,
        row: Row,
        engine: &Chosen,
        progress: &PointProgress<'_>,
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

    /// Removes checkpoints that were verified, unless they are to be kept. Renamed first: what bears the name of a point is
    /// whole.
    fn tidy(&self) -> Result<()> {
        if self.config.keep {
            return Ok(());
        }
        for row in self.results().rows().iter().filter(|row| row.status == Status::Verified) {
            let dir = self.place(&row.id);
            let going = dir.with_file_name(format!(".{}.removed", row.id));
            if dir.is_dir() {
                std::fs::rename(&dir, &going).map_err(|error| unwritten(&dir, "cannot remove", &error))?;
            }
            if going.is_dir() {
                std::fs::remove_dir_all(&going)
                    .map_err(|error| unwritten(&going, "cannot remove", &error))?;
            }
        }
        Ok(())
    }
}

/// Whether a failure is that of the whole sweep and not of a point.
fn ends_all(failure: &Failure) -> bool {
    failure.kind().is_stop() || matches!(failure, Failure::Sweep(_))
}
