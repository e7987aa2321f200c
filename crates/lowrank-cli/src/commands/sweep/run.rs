//! A sweep under way: plans every point, then compresses and verifies those that the config chooses.

use super::one::{Compressing, ends_all};
use super::opened::Opened;
use super::points::Identified;
use super::rows::planned;
use crate::args::Verbosity;
use crate::exit::{Result, unwritten};
use crate::progress::{Console, PointProgress};
use crate::signals;
use lowrank_model::Progress;
use lowrank_model::plan::Sensitivity;
use lowrank_pipeline::base::InputHashes;
use lowrank_pipeline::memory::Demand;
use lowrank_pipeline::planning;
use lowrank_pipeline::spectra::RunState;
use lowrank_pipeline::sweep::{PlannedPoint, plan_many};
use lowrank_pipeline::{CalibrationContext, JobContext, PipelineError, base, workers};
use lowrank_sweep::{PointId, Results, Row, Status, front};
use lowrank_writer::report::BaseModel;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

/// A sweep under way.
pub(crate) struct Run<'a> {
    pub(super) sweep: &'a Opened<'a>,
    pub(super) base: &'a BaseModel,
    pub(super) compressing: Compressing<'a>,
    pub(super) console: &'a Console,
    pub(super) results: Mutex<Results>,
}

impl Run<'_> {
    /// With what runs it.
    pub(crate) fn with<R>(
        sweep: &Opened<'_>,
        verbosity: Verbosity,
        act: impl FnOnce(&Run<'_>, &rayon::ThreadPool) -> Result<R>,
    ) -> Result<R> {
        let Opened { checkpoint, resources, out, model, .. } = *sweep;
        // A device that is not there fails the sweep, not each of its points.
        resources.algebra().map_err(PipelineError::from)?;
        let interrupt = signals::watch()?;
        let console = Console::new(verbosity.quiet);
        let dtype = workers::widest(checkpoint, None);
        let demand = |one: &Identified<'_>| Demand::plan(checkpoint.config(), dtype, &one.point.job.recipe);
        let pool = workers::pool(&Demand::of_each(sweep.points.iter().map(demand)), resources)?;
        let base = base::identify_remembered(checkpoint, model, &pool, &console, &interrupt, resources)?;
        let results = Results::open(out, &sweep.header(&base), &sweep.config.axes)?;
        let compressing = sweep.compressing(&interrupt);
        let (base, console) = (&base, &console);
        let run = Run { sweep, base, compressing, console, results: Mutex::new(results) };
        act(&run, &pool)
    }
    /// A poisoned lock only means that another thread panicked between two whole rows.
    pub(crate) fn results(&self) -> std::sync::MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(crate) fn plan_all(&self, pool: &rayon::ThreadPool, jobs: usize) -> Result<()> {
        // Points that failed are tried again: what was in their way may be gone.
        let open: Vec<&Identified<'_>> = {
            let results = self.results();
            let planned = |one: &&Identified<'_>| {
                results.get(&one.id).is_some_and(|row| row.status != Status::Failed && row.params.is_some())
            };
            self.sweep.points().filter(|one| !planned(one)).collect()
        };
        let mut groups: BTreeMap<_, Vec<&Identified<'_>>> = BTreeMap::new();
        for one in open {
            groups.entry(one.measured_like()).or_default().push(one);
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
        let &Self { sweep, base, console: progress, ref compressing, .. } = self;
        let (&Opened { checkpoint, resources, .. }, interrupt) = (sweep, compressing.interrupt);
        let &Identified { text, sensitivity, .. } = points[0];
        let own = text.map(|place| sweep.texts[place].clone());
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
        plan_many(sweep.subject, &errors, &recipes, jobs, interrupt, &each)?;
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
            Some(_) if self.sweep.texts.len() < 2 => format!("{what}, calibrated"),
            Some(place) => format!("{what}, calibrated ({})", place + 1),
        }
    }

    /// Marks the front, numbers the rows as the config does, and brings them into its order.
    pub(crate) fn order(&self) -> Result<()> {
        let numbers: BTreeMap<&PointId, usize> =
            self.sweep.points.iter().map(|one| (&one.id, one.point.number)).collect();
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
            let open = |one: &&Identified<'_>| results.get(&one.id).is_some_and(|row| self.sweep.wants(row));
            self.sweep.points().filter(open).collect()
        };
        self.tidy()?;
        if chosen.is_empty() {
            return Ok(());
        }
        let engine = self.compressing.begin(self.console)?;
        let noted = Mutex::default();
        for (index, one) in chosen.iter().enumerate() {
            self.compressing.interrupt.check()?;
            let label = format!("[{}/{}]", index + 1, chosen.len());
            let progress = PointProgress { label, console: self.console, noted: &noted };
            progress.note(&format!("point {}: {}", one.point.number, one.point.label()));
            let row = self.results().get(&one.id).cloned().expect("it was planned");
            self.results().put(self.compressing.row_of(one, row, &engine, &progress)?)?;
            self.tidy()?;
        }
        Ok(())
    }

    /// Removes checkpoints that were verified, unless they are to be kept. Renamed first: what bears the name of a point is
    /// whole.
    pub(crate) fn tidy(&self) -> Result<()> {
        if self.sweep.config.keep {
            return Ok(());
        }
        for row in self.results().rows().iter().filter(|row| row.status == Status::Verified) {
            let dir = self.compressing.place(&row.id);
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
