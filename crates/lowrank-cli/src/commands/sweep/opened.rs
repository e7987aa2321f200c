//! A sweep that is checked against its model, before anything runs.

use super::args::SweepArgs;
use super::one::Compressing;
use super::points::{Identified, Verification, check_patterns, identify};
use crate::args::JobArgs;
use crate::commands::shared::open_base;
use crate::exit::{Result, unwritten, usage};
use crate::grid::{Compress, Sweep};
use lowrank_pipeline::planning::{Subject, refuse_factored};
use lowrank_pipeline::workers::{CachePlace, Resources};
use lowrank_pipeline::{CalibrationText, Interrupt, base};
use lowrank_reader::Checkpoint;
use lowrank_sweep::{ResultsHeader, Row, Status, header};
use lowrank_writer::report::BaseModel;
use serde_json::json;
use std::path::Path;

/// A sweep that is checked against its model, before anything runs.
pub(crate) struct Opened<'a> {
    pub(super) config: &'a Sweep,
    /// The last point of the config that is wanted.
    last: usize,
    pub(super) texts: &'a [CalibrationText],
    pub(super) points: &'a [Identified<'a>],
    pub(crate) model: &'a str,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(super) subject: &'a Subject,
    pub(crate) resources: &'a Resources,
    pub(crate) out: &'a Path,
    verification: &'a Verification,
}

/// Opens a sweep.
pub(crate) fn opened<R>(args: &SweepArgs, act: impl FnOnce(&Opened<'_>) -> Result<R>) -> Result<R> {
    let (model, machine) = (args.model.clone(), args.machine.clone());
    let flags = JobArgs { model, machine, ..JobArgs::default() };
    let config = Sweep::read(&args.config, &flags)?;
    if args.max_points == Some(0) {
        return Err(usage("--max-points starts at 1"));
    }
    let first = &config.points[0];
    let mut resources = first.job.resources.clone();
    // Points share what is measured, also where nothing is to be kept.
    let run_cache = tempfile::tempdir()
        .map_err(|error| unwritten(&std::env::temp_dir(), "cannot create a folder", &error))?;
    if resources.cache == CachePlace::Nowhere {
        resources.cache = CachePlace::At(run_cache.path().to_owned());
    }
    let model = &first.job.model;
    let checkpoint = open_base(model, &first.job.recipe)?;
    refuse_factored(&checkpoint)?;
    let subject = Subject::of(&checkpoint);
    check_patterns(&config, &subject)?;
    let (texts, points) = identify(&config, &checkpoint, &subject)?;
    let out = args.out.clone().or(config.shared.out.clone()).unwrap_or_else(|| "sweep".into());
    base::check_place(&checkpoint, &out)?;
    let verification = Verification::new(&config, &checkpoint)?;
    act(&Opened {
        config: &config,
        last: args.max_points.unwrap_or(usize::MAX),
        texts: &texts,
        points: &points,
        model,
        checkpoint: &checkpoint,
        subject: &subject,
        resources: &resources,
        out: &out,
        verification: &verification,
    })
}

impl Opened<'_> {
    /// What makes and verifies checkpoints of points.
    pub(crate) fn compressing<'a>(&'a self, interrupt: &'a Interrupt) -> Compressing<'a> {
        let Self { checkpoint, resources, out, verification, .. } = *self;
        Compressing { checkpoint, resources, out, verification, interrupt }
    }

    /// Those that this sweep does.
    pub(crate) fn points(&self) -> impl Iterator<Item = &Identified<'_>> {
        self.points.iter().filter(|one| one.point.number <= self.last)
    }

    /// Whether the config wants a planned point to be compressed and verified.
    pub(crate) fn wants(&self, row: &Row) -> bool {
        row.status == Status::Planned
            && match self.config.compress {
                Compress::None => false,
                Compress::All => row.params.is_some(),
                Compress::Pareto => row.on_front,
            }
    }

    /// Whether points may be compressed at all.
    pub(crate) fn compresses(&self) -> bool {
        self.config.compress != Compress::None
    }

    pub(super) fn header(&self, base: &BaseModel) -> ResultsHeader {
        ResultsHeader {
            sweep_version: header::SWEEP_VERSION,
            tool: "lowrank-compress".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            base_model: json!(base),
            params_before: self.subject.before.params,
            bytes_before: self.subject.before.bytes,
            verification: self.verification.of.clone(),
            axes: self.config.differing(),
        }
    }
}
