//! `sweep`: plans of many points, compression and verification of some, and files that hold what came of each.

use crate::args::{Algebra, JobArgs, TalkArgs};
use crate::commands::report::{self, Verified};
use crate::commands::verify::Device;
use crate::commands::{open, print_json, resolve};
use crate::exit::{Failure, Result, unwritten, usage};
use crate::grid::{AXES, Compress, Point, Sweep, plain};
use crate::progress::{OfPoint, Talk};
use crate::signals;
use crate::tables::table;
use clap::Args;
use lowrank_forward::{Chosen, choose};
use lowrank_model::display::grouped;
use lowrank_model::plan::Sensitivity;
use lowrank_model::{ErrorKind, Progress, RankPlan};
use lowrank_pipeline::base::InputHashes;
use lowrank_pipeline::compress::{self, Request};
use lowrank_pipeline::lens::tokens_hash;
use lowrank_pipeline::memory::Demand;
use lowrank_pipeline::planning::{self, Subject, refuse_factored};
use lowrank_pipeline::spectra::Course;
use lowrank_pipeline::sweep::{Made, content, plan_many};
use lowrank_pipeline::workers::{self, CachePlace, Resources};
use lowrank_pipeline::{CalibrationText, Interrupt, Lens, PipelineError, base};
use lowrank_reader::Checkpoint;
use lowrank_report::{Page, SweepPage, place};
use lowrank_sweep::{PointId, Results, ResultsHeader, Row, Status, front, header};
use lowrank_text::{Passage, TextSource, windows};
use lowrank_verify::{Verdict, VerifyError, VerifyOptions, verify_on};
use lowrank_writer::Leftover;
use lowrank_writer::report::BaseModel;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Flags of `sweep`.
#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    /// TOML file: what all points share, the grid, what is compressed (docs/sweeps.md)
    config: PathBuf,
    /// Folder of the results; a sweep that is there is gone on with [default: sweep]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Checkpoint directory, or org/name in the local Hugging Face cache, instead of the config's
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    model: Option<String>,
    /// Plans made at once [default: one per core]; checkpoints are made one after another
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    jobs: usize,
    /// Only the first N points of the config
    #[arg(long, value_name = "N")]
    max_points: Option<usize>,
    /// Check the config and list its points, but do nothing
    #[arg(long)]
    dry_run: bool,
    /// Matrices in flight at once, while one point is compressed
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Memory for all workers together
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Where measured numbers are kept for later runs
    #[arg(long, value_name = "DIR|none")]
    cache: Option<String>,
    /// Where models run
    #[arg(long, value_name = "auto|cpu|cuda")]
    device: Option<Device>,
    /// Where matrices are decomposed
    #[arg(long, value_name = "cpu|cuda")]
    algebra: Option<Algebra>,
    #[command(flatten)]
    talk: TalkArgs,
}

/// Checkpoints and pages of points, in the folder of the sweep.
const POINTS: &str = "points";

/// Runs the command.
pub(crate) fn run(args: &SweepArgs) -> Result<()> {
    let flags = JobArgs {
        model: args.model.clone(),
        workers: args.workers,
        memory: args.memory.clone(),
        cache: args.cache.clone(),
        device: args.device,
        algebra: args.algebra,
        ..JobArgs::default()
    };
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
    let checkpoint = open(model)?;
    refuse_factored(&checkpoint)?;
    let subject = Subject::of(&checkpoint);
    check_patterns(&config, &subject)?;
    let (texts, points) = identify(&config, &checkpoint, &subject)?;
    let out = args.out.clone().or(config.base.out.clone()).unwrap_or_else(|| "sweep".into());
    let verification = Verification::new(&config, &checkpoint)?;
    if args.dry_run {
        return list(&config, &points, &out, args.talk);
    }
    // A device that is not there fails the sweep, not each of its points.
    resources.algebra().map_err(PipelineError::from)?;
    let interrupt = signals::watch()?;
    let talk = Talk::new(args.talk.quiet);
    let dtype = workers::widest(&checkpoint, None);
    let demand = |one: &Identified<'_>| {
        Demand::plan(checkpoint.config(), dtype, one.point.job.plan.calibration.as_ref())
    };
    let pool = workers::pool(&Demand::of_each(points.iter().map(demand)), &resources)?;
    let base = base::identify_remembered(&checkpoint, model, &pool, &talk, &interrupt, &resources)?;
    let results = Results::open(&out, &header_of(&config, &base, &subject, &verification), &AXES)?;
    let sweep = Run {
        config: &config,
        points: &points,
        last: args.max_points.unwrap_or(usize::MAX),
        texts: &texts,
        checkpoint: &checkpoint,
        subject: &subject,
        base: &base,
        resources: &resources,
        interrupt: &interrupt,
        talk: &talk,
        out: &out,
        verification: &verification,
        results: Mutex::new(results),
    };
    let done = sweep.run(&pool, args.jobs).map_err(|failure| match failure.kind() {
        kind if kind.is_stop() => Failure::new(
            kind,
            format!(
                "stopped; {} holds the finished points, run the same command again to resume",
                out.display()
            ),
        ),
        _ => failure,
    });
    // Also after an early end: what is there is in order and can be looked at.
    let ordered = sweep.order();
    done.and(ordered)?;
    sweep.conclude(args.talk)
}

/// Patterns and ranks against the model; many points share them.
fn check_patterns(config: &Sweep, subject: &Subject) -> Result<()> {
    let mut seen = BTreeSet::new();
    for point in &config.points {
        let plan = &point.job.plan;
        let said = format!("{:?}{:?}{:?}", plan.keep_dense, plan.fixed_ranks, plan.storage);
        if !seen.insert(said) {
            continue;
        }
        subject.choices(plan).map_err(|error| {
            let key = match &error {
                PipelineError::PatternMatchesNothing { key, .. } => key,
                PipelineError::DenseAndFixed { .. } => "keep-dense",
                _ => "fix-rank",
            };
            config.error(point, key, Failure::from(error))
        })?;
    }
    Ok(())
}

/// A point with all that names it.
struct Identified<'a> {
    point: &'a Point,
    id: PointId,
    /// Which of the texts.
    text: Option<usize>,
    sensitivity: Sensitivity,
}

/// Reads every calibration text once, and says which point is which.
fn identify<'a>(
    config: &'a Sweep,
    checkpoint: &Checkpoint,
    subject: &Subject,
) -> Result<(Vec<CalibrationText>, Vec<Identified<'a>>)> {
    let (mut settings, mut texts) = (Vec::new(), Vec::new());
    let mut points: Vec<Identified<'a>> = Vec::new();
    let mut seen: BTreeMap<PointId, usize> = BTreeMap::new();
    for point in &config.points {
        let plan = &point.job.plan;
        let text = match &plan.calibration {
            None => None,
            Some(wanted) => Some(match settings.iter().position(|known| *known == wanted) {
                Some(place) => place,
                None => {
                    let read = CalibrationText::read(checkpoint, wanted);
                    texts.push(read.map_err(|error| config.error(point, "calibrate", Failure::from(error)))?);
                    settings.push(wanted);
                    texts.len() - 1
                }
            }),
        };
        let sensitivity = plan.sensitivity.unwrap_or(match text {
            Some(_) => Sensitivity::Measured,
            None => Sensitivity::default(),
        });
        if text.is_none() && sensitivity == Sensitivity::Measured {
            return Err(config.error(point, "sensitivity", Failure::from(PipelineError::NothingToMeasureOn)));
        }
        let id = PointId::of(&content(subject, plan, &point.job.factor, text.map(|place| &texts[place])));
        if let Some(first) = seen.insert(id.clone(), points.len()) {
            return Err(config.same(points[first].point, point));
        }
        points.push(Identified { point, id, text, sensitivity });
    }
    Ok((texts, points))
}

/// `--dry-run`.
fn list(config: &Sweep, points: &[Identified<'_>], out: &Path, talk: TalkArgs) -> Result<()> {
    let known = lowrank_sweep::results::rows(out)?;
    let status = |id: &PointId| known.iter().find(|row| row.id == *id).map(|row| row.status);
    if talk.json {
        let point = |one: &Identified<'_>| json!({ "point": one.point.number, "id": one.id, "settings": one.point.settings, "status": status(&one.id) });
        return print_json(&json!({ "points": points.iter().map(point).collect::<Vec<_>>() }));
    }
    if talk.quiet {
        return Ok(());
    }
    let axes = config.axes();
    let header: Vec<&str> =
        ["point", "id", "so far"].into_iter().chain(axes.iter().map(String::as_str)).collect();
    let rows = points.iter().map(|one| {
        let status = status(&one.id).map_or("-", Status::as_str);
        let settings = axes.iter().map(|key| one.point.settings.get(key).map_or("-".into(), plain));
        [one.point.number.to_string(), one.id.to_string(), status.into()]
            .into_iter()
            .chain(settings)
            .collect()
    });
    println!("{}", table(&header, rows));
    println!("{} points; nothing was planned.", points.len());
    Ok(())
}

/// What compressed points are run on.
struct Verification {
    options: VerifyOptions,
    /// For the header; absent where nothing is compressed.
    of: Option<serde_json::Value>,
}

impl Verification {
    /// Reads the text, so that one that cannot be used is refused before anything runs.
    fn new(config: &Sweep, checkpoint: &Checkpoint) -> Result<Self> {
        let usual = VerifyOptions::default();
        let keys = &config.verify;
        let options = VerifyOptions {
            text: keys.text.clone().map_or(TextSource::Bundled(Passage::Verification), TextSource::File),
            window: keys.window.unwrap_or(usual.window),
            max_tokens: keys.max_tokens,
            ..usual
        };
        if config.compress == Compress::None {
            return Ok(Self { options, of: None });
        }
        let windows = windows(checkpoint.dir(), &options.text_request()).map_err(VerifyError::Text)?;
        let of = json!({ "text": windows.info, "tokens_blake3": tokens_hash(&windows.sequences) });
        Ok(Self { options, of: Some(of) })
    }
}

fn header_of(
    config: &Sweep,
    base: &BaseModel,
    subject: &Subject,
    verification: &Verification,
) -> ResultsHeader {
    ResultsHeader {
        sweep_version: header::SWEEP_VERSION,
        tool: "lowrank-compress".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        base_model: json!(base),
        params_before: subject.before.params,
        bytes_before: subject.before.bytes,
        verification: verification.of.clone(),
        axes: config.axes(),
    }
}

/// A sweep under way.
struct Run<'a> {
    config: &'a Sweep,
    points: &'a [Identified<'a>],
    /// The last point that this run does.
    last: usize,
    texts: &'a [CalibrationText],
    checkpoint: &'a Checkpoint,
    subject: &'a Subject,
    base: &'a BaseModel,
    resources: &'a Resources,
    interrupt: &'a Interrupt,
    talk: &'a Talk,
    out: &'a Path,
    verification: &'a Verification,
    results: Mutex<Results>,
}

impl Run<'_> {
    /// A poisoned lock only means that another thread panicked between two whole rows.
    fn results(&self) -> std::sync::MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that this run does.
    fn points(&self) -> impl Iterator<Item = &Identified<'_>> {
        self.points.iter().filter(|one| one.point.number <= self.last)
    }

    fn row(&self, one: &Identified<'_>) -> Row {
        Row::new(one.point.number, one.id.clone(), one.point.settings.clone())
    }

    fn run(&self, pool: &rayon::ThreadPool, jobs: usize) -> Result<()> {
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
        let mut lenses: BTreeMap<Option<usize>, BTreeMap<&str, Vec<&Identified<'_>>>> = BTreeMap::new();
        for one in open {
            let seen_so = lenses.entry(one.text).or_default();
            seen_so.entry(sensitivity_name(one.sensitivity)).or_default().push(one);
        }
        for (text, sensitivities) in lenses {
            for points in sensitivities.into_values() {
                let Err(error) = self.plan_seen_so(text, &points, pool, jobs) else { continue };
                if ends_all(&error) {
                    return Err(error);
                }
                // What these points are measured by failed: theirs is the failure, and the sweep goes on.
                let line = error.to_string();
                for one in points {
                    self.results().put(self.row(one).failed(line.clone()))?;
                }
            }
        }
        Ok(())
    }

    /// Plans points that are measured by the same text and compared in the same way.
    fn plan_seen_so(
        &self,
        text: Option<usize>,
        points: &[&Identified<'_>],
        pool: &rayon::ThreadPool,
        jobs: usize,
    ) -> Result<()> {
        let &Self { checkpoint, base, resources, talk, interrupt, .. } = self;
        let own = text.map(|place| self.texts[place].clone());
        let algebra = resources.algebra().map_err(PipelineError::from)?;
        let inputs = InputHashes::known(base.files.clone(), talk);
        let lens = Lens::new(checkpoint, &inputs, own, algebra, resources, pool, talk, interrupt)?;
        let course = Course { staging: None, scratch: None, interrupt };
        let sensitivity = points[0].sensitivity;
        let errors = planning::errors(checkpoint, &lens, Some(sensitivity), pool, talk, course)?;
        let scale = self.scale(text, sensitivity);
        let settings: Vec<_> = points.iter().map(|one| &one.point.job.plan).collect();
        talk.start("plan points", points.len() as u64, "points");
        let each = |index: usize, Made { plan, took }: Made| -> Result<()> {
            let row = self.row(points[index]);
            let row = match plan {
                Ok(plan) => planned(row, &plan, &scale, took),
                Err(error) => row.failed(error),
            };
            self.results().put(row)?;
            talk.advance(1);
            Ok(())
        };
        plan_many(self.subject, &errors, &settings, jobs, interrupt, &each)?;
        talk.finish();
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
    fn order(&self) -> Result<()> {
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
            self.talk.note(&format!("models run on the CPU: {why}"));
        }
        let folder = self.out.join(POINTS);
        std::fs::create_dir_all(&folder)
            .map_err(|error| unwritten(&folder, "cannot create this folder", &error))?;
        let noted = Mutex::default();
        for (index, one) in chosen.iter().enumerate() {
            self.interrupt.check()?;
            let label = format!("[{}/{}]", index + 1, chosen.len());
            let talk = OfPoint { label, talk: self.talk, noted: &noted };
            talk.note(&format!("point {}: {}", one.point.number, one.point.label()));
            let row = self.results().get(&one.id).cloned().expect("it was planned");
            let row = match self.compress_one(one, row.clone(), &engine, &talk) {
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
        talk: &OfPoint<'_>,
    ) -> Result<Row> {
        let (job, dir) = (&one.point.job, self.place(&one.id));
        // A checkpoint is there whole or not at all: this one was finished before a kill.
        let took = if dir.is_dir() {
            None
        } else {
            let request = Request {
                model: &job.model,
                out: &dir,
                plan: &job.plan,
                factor: &job.factor,
                resources: self.resources,
                leftover: Leftover::Resume,
                interrupt: self.interrupt,
                provenance: None,
            };
            let start = Instant::now();
            let done = compress::compress(self.checkpoint, request, talk)?;
            super::compress::write_plan(&place::beside(&dir, "plan.json"), &done.plan)?;
            Some(start.elapsed())
        };
        let start = Instant::now();
        let original = resolve(&job.model)?;
        let verified = verify_on(&*engine.engine, &original, &dir, &self.verification.options, talk)?;
        let file = place::beside(&dir, place::VERIFICATION);
        std::fs::write(&file, verified.to_json())
            .map_err(|error| unwritten(&file, "the verification was not written", &error))?;
        report::leave(&dir, Verified::By(&file), TalkArgs { quiet: true, ..TalkArgs::default() });
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

    /// The page, the summary, and how it ended.
    fn conclude(&self, talk: TalkArgs) -> Result<()> {
        let page = self.out.join(place::REPORT);
        Page::of_sweep(place::name(self.out), SweepPage::read(self.out)?).write(&page)?;
        let results = self.results();
        let rows: Vec<&Row> = results.rows().iter().filter(|row| row.point > 0).collect();
        let count = |status| rows.iter().filter(|row| row.status == status).count();
        if talk.json {
            print_json(&json!({
                "out": self.out,
                "report": page,
                "points": rows.len(),
                "planned": rows.iter().filter(|row| row.params.is_some()).count(),
                "verified": count(Status::Verified),
                "failed": count(Status::Failed),
                "front": rows.iter().filter(|row| row.on_front).map(|row| &row.id).collect::<Vec<_>>(),
            }))?;
        } else if !talk.quiet {
            print_rows(&rows, self.config, talk.verbose);
            println!(
                "{} points: {} planned, {} verified, {} failed.",
                rows.len(),
                rows.iter().filter(|row| row.params.is_some()).count(),
                count(Status::Verified),
                count(Status::Failed)
            );
            println!("Results: {}", self.out.join(lowrank_sweep::results::CSV).display());
            println!("Report: {}", page.display());
        }
        match rows.iter().find(|row| row.status == Status::Failed) {
            None => Ok(()),
            Some(first) => {
                let (failed, all, point) = (count(Status::Failed), rows.len(), first.point);
                let error = first.error.as_deref().unwrap_or_default();
                let line = format!("{failed} of {all} points failed; the first, point {point}: {error}");
                Err(Failure::new(ErrorKind::PointsFailed, line))
            }
        }
    }
}

/// Whether a failure is that of the whole sweep and not of a point.
fn ends_all(failure: &Failure) -> bool {
    failure.kind().is_stop() || matches!(failure, Failure::Sweep(_))
}

fn sensitivity_name(sensitivity: Sensitivity) -> &'static str {
    match sensitivity {
        Sensitivity::Measured => "measured",
        Sensitivity::Absolute => "absolute",
        Sensitivity::Relative => "relative",
    }
}

fn planned(row: Row, plan: &RankPlan, scale: &str, took: Duration) -> Row {
    let factored = plan.matrices.iter().filter(|row| row.rank.is_some()).count();
    Row {
        params: Some(plan.after.params),
        removed_params: Some(plan.removed_params()),
        bytes: Some(plan.after.bytes),
        factored: Some(factored),
        dense: Some(plan.matrices.len() - factored),
        scale: Some(scale.to_owned()),
        predicted_error: plan.optimality.map(|optimality| optimality.objective),
        lower_bound: plan.optimality.map(|optimality| optimality.lower_bound),
        duality_gap: plan.optimality.map(|optimality| optimality.duality_gap),
        plan_seconds: Some(took.as_secs_f64()),
        ..row
    }
}

fn measured(
    row: Row,
    verified: &lowrank_verify::Verification,
    compressing: Option<Duration>,
    verifying: Duration,
) -> Row {
    let logits = verified.outcome.as_ref().and_then(|outcome| outcome.logits);
    let row = Row {
        status: Status::Verified,
        mean_kl: logits.map(|logits| logits.mean_kl),
        mean_kl_error: logits.and_then(|logits| logits.mean_kl_error),
        perplexity_original: logits.map(|logits| logits.perplexity_original),
        perplexity: logits.map(|logits| logits.perplexity_compressed),
        perplexity_ratio: logits.map(|logits| logits.perplexity_ratio),
        perplexity_ratio_error: logits.and_then(|logits| logits.perplexity_ratio_error),
        top1_agreement: logits.map(|logits| logits.top1_agreement),
        top1_error: logits.and_then(|logits| logits.top1_error),
        compress_seconds: compressing.map(|took| took.as_secs_f64()),
        verify_seconds: Some(verifying.as_secs_f64()),
        ..row
    };
    match verified.findings.first().filter(|_| verified.verdict != Verdict::Passed) {
        None => row,
        Some(finding) => row.failed(format!("verification {}: {finding}", verified.verdict)),
    }
}

/// The front, or with `--verbose` every point.
fn print_rows(rows: &[&Row], config: &Sweep, verbose: bool) {
    let axes = config.axes();
    let header = ["point", "parameters", "predicted", "mean KL", "perplexity", "same top-1"];
    let header: Vec<&str> = header.into_iter().chain(axes.iter().map(String::as_str)).collect();
    let shown = rows.iter().filter(|row| verbose || row.on_front || row.status == Status::Verified);
    let number =
        |value: Option<f64>, decimals: usize| value.map_or("-".into(), |value| format!("{value:.decimals$}"));
    let cells = |row: &&&Row| -> Vec<String> {
        let settings = axes.iter().map(|key| row.settings.get(key).map_or("-".into(), plain));
        [
            row.point.to_string(),
            row.params.map_or("failed".into(), grouped),
            row.predicted_error.map_or("-".into(), |error| format!("{error:.4e}")),
            number(row.mean_kl, 5),
            row.perplexity_ratio.map_or("-".into(), |ratio| format!("× {ratio:.4}")),
            row.top1_agreement.map_or("-".into(), |share| format!("{:.2} %", share * 100.0)),
        ]
        .into_iter()
        .chain(settings)
        .collect()
    };
    println!("{}", table(&header, shown.map(|row| cells(&row))));
}
