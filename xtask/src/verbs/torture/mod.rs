//! `cargo xtask torture` kills and stops runs on the bundled model and fills their disk, resumes them, and compares the bytes.
//!
//! The tool is built with fail points (`lowrank-failpoint`), so that a run can be killed at every write, flush and rename (a
//! "place"). Three of four runs are killed at a place, and no place comes twice before all have come once; the others are
//! killed at a random moment. One of five starts with an empty cache, and most of these are killed while they measure; the
//! others have all measurements cached. Guarantees and figures: `docs/reliability.md`.

pub(crate) mod bench;
pub(crate) mod dice;
mod disturbances;
pub(crate) mod tmpfs;

use anyhow::{Context, Result};
use bench::{Bench, Cache};
use disturbances::{Counts, Death, disturb};
use std::fs;
use std::time::Instant;
use tmpfs::Tmpfs;

/// Space for the output and for the reserve that the tool asks for.
const TMPFS: &str = "size=48m";
/// One of so many runs has an empty cache.
const COLD: u64 = 5;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of runs to kill or stop
    #[arg(long, default_value_t = 50)]
    pub(crate) runs: u64,
    /// Seed of the random moments and places at which runs are killed
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Places in random order; none comes twice before all have come once.
struct Places(Vec<u64>, usize);

impl Places {
    fn next(&mut self) -> u64 {
        self.1 += 1;
        self.0[(self.1 - 1) % self.0.len()]
    }

    fn met(&self) -> String {
        format!("{} of {}", self.1.min(self.0.len()), self.0.len())
    }
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let bench = &mut Bench::new(args.seed)?;
    let (warm_places, cold_places) = (1..=bench.warm.places, 1..=bench.measuring_places);
    let mut warm = Places(bench.dice.shuffled(warm_places), 0);
    let mut cold = Places(bench.dice.shuffled(cold_places), 0);
    let mut counts = Counts::default();
    let (mut of_warm, mut of_cold) = (0_u64, 0_u64);
    for run in 0..args.runs {
        let (cache, places, turn) = match run % COLD {
            last if last == COLD - 1 => (Cache::Cold, &mut cold, &mut of_cold),
            _ => (Cache::Warm, &mut warm, &mut of_warm),
        };
        *turn += 1;
        let death = if *turn % 4 == 0 { Death::Moment } else { Death::Place(places.next()) };
        disturb(bench, death, cache, &mut counts)
            .with_context(|| format!("run {run} of seed {}, {death:?}, {cache:?} cache", args.seed))?;
        if (run + 1) % 50 == 0 {
            eprintln!("{} of {} runs, {} s", run + 1, args.runs, start.elapsed().as_secs());
        }
    }
    let pairs = disturbances::side_by_side(bench)?;
    let panicked = disturbances::panicking(bench)?;
    let (refused, had_room) = disturbances::disk_full(bench, None)?;
    let small = Tmpfs::mount(bench.work.join("small"), TMPFS);
    let on_tmpfs = small.as_ref().map(|small| disturbances::disk_full(bench, Some(small))).transpose()?;
    drop(small);
    let too_small = disturbances::too_small(bench)?;
    let (without_source, unharmed) = disturbances::vanishing_source(bench)?;
    let forbidden = disturbances::forbidden_output(bench)?;
    fs::remove_dir_all(&bench.work)?;

    let Counts {
        killed_at_a_place,
        killed_at_a_moment,
        terminated,
        ended_before,
        died_after_publication,
        killed_again,
        with_a_cold_cache,
    } = counts;
    println!(
        "torture: {0} of {0} runs ended byte-identical (seed {1}, {2} s)",
        args.runs,
        args.seed,
        start.elapsed().as_secs()
    );
    println!(
        "  SIGKILL at a write, flush or rename: {killed_at_a_place}, of them after publication: {died_after_publication}"
    );
    println!("    places met: {} with a warm cache, {} of measuring", warm.met(), cold.met());
    println!(
        "  SIGKILL at a random moment: {killed_at_a_moment}; SIGTERM: {terminated}; killed a second time: {killed_again}; ended before: {ended_before}"
    );
    println!(
        "  with an empty cache: {with_a_cold_cache}; two at once on one, one of them killed: {pairs} pairs"
    );
    println!("  panics: {panicked} were one line and resumed");
    println!("  disk full, injected: {refused} refused and resumed, {had_room} had room");
    match on_tmpfs {
        Some((refused, had_room)) => {
            println!("  disk full, a real one: {refused} refused and resumed, {had_room} had room")
        }
        None => println!("  disk full, a real one: not tried, this user cannot mount a tmpfs"),
    }
    println!("  disk too small from the start: {too_small} refused, nothing left");
    println!(
        "  source deleted or cut short while running: {without_source} refused and resumed, {unharmed} unharmed"
    );
    println!(
        "  {}: refused, nothing left",
        if forbidden.is_empty() { "forbidden folders: not tried".into() } else { forbidden.join(", ") }
    );
    Ok(())
}
