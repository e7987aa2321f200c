//! What a job will do, and by count how long: `cluster --dry-run`.

use super::folder::PUBLISH;
use crate::args::SlurmFlags;
use crate::exit::Result;
use crate::job::Job;
use crate::tables::{human_bytes, table};
use lowrank_pipeline::compress::costs::{
    Costs, Machines, OPERATIONS_PER_SECOND, Shares, UnitCost, sums, wall_seconds,
};
use lowrank_pipeline::compress::units::{Shape, tasks};
use lowrank_pipeline::workers;
use lowrank_reader::Checkpoint;

/// Bytes per second of one node from and to the shared disk: a modest one.
const BYTES_PER_SECOND: f64 = 1e9;

/// Prints stages with their units, what each needs, and the predicted wall time.
pub(super) fn print(checkpoint: &Checkpoint, job: &Job, shape: Shape, slurm: &SlurmFlags) -> Result<()> {
    let (config, recipe) = (checkpoint.config(), &job.recipe);
    let bytes: u64 = checkpoint.shards().iter().map(|shard| shard.len_bytes).sum();
    let params: u64 = checkpoint.specs().iter().map(lowrank_model::tensors::TensorSpec::elements).sum();
    let weight_bytes = bytes as f64 / params.max(1) as f64;
    let Some(costs) = Costs::new(config, recipe, weight_bytes) else { return Ok(()) };
    let costs = costs.with_shape(shape);
    let cores = cores_of(slurm).or(Some(job.resources.workers).filter(|&workers| workers > 0)).unwrap_or(1);
    let machines =
        Machines { nodes: slurm.nodes.unwrap_or(1) as usize, cores, bytes_per_second: BYTES_PER_SECOND };
    let stages = costs.stages().into_iter().map(|(stage, units)| {
        let tasks = tasks(units, machines.nodes, stage.tasks_per_node());
        (stage.to_string(), Shares { units, tasks }, costs.unit(stage))
    });
    let publish = (PUBLISH.to_owned(), Shares { units: 1, tasks: 1 }, costs.publish());
    let stages: Vec<(String, Shares, UnitCost)> = stages.chain([publish]).collect();
    let row = |(name, shares, unit): &(String, Shares, UnitCost)| {
        vec![
            name.clone(),
            shares.units.to_string(),
            shares.tasks.to_string(),
            format!("{:.1}", unit.core_seconds),
            human_bytes(sums(*shares, *unit)[1] as u64),
            human_bytes((shares.units as f64 * unit.written_bytes) as u64),
            duration(wall_seconds(*shares, *unit, machines)),
        ]
    };
    let titles = ["stage", "units", "tasks", "core s / unit", "reads", "writes", "wall"];
    println!("{}", table(&titles, stages.iter().map(row)));
    let wall: f64 = stages.iter().map(|(_, shares, unit)| wall_seconds(*shares, *unit, machines)).sum();
    let core_seconds: f64 = stages.iter().map(|(_, shares, unit)| sums(*shares, *unit)[0]).sum();
    let [one, more] = costs.memory_bytes(workers::widest(checkpoint, recipe.factor.dtype));
    println!(
        "By count, on {} node{} with {cores} core{} for a task: {} wall, {:.1} core hours, at {:.0} GFLOP/s a core in f32 and {} a second and node from the disk.",
        machines.nodes,
        if machines.nodes == 1 { "" } else { "s" },
        if cores == 1 { "" } else { "s" },
        duration(wall),
        core_seconds / 3600.0,
        OPERATIONS_PER_SECOND / 1e9,
        human_bytes(BYTES_PER_SECOND as u64),
    );
    println!(
        "A task holds at most {} with one worker, {} more with each further one. The folder grows to {}.",
        human_bytes(one),
        human_bytes(more),
        human_bytes(costs.folder_bytes() as u64)
    );
    println!("Nothing was prepared: leave --dry-run out to get the script.");
    Ok(())
}

/// Cores of a task, as options of sbatch say.
fn cores_of(slurm: &SlurmFlags) -> Option<usize> {
    let options = slurm.sbatch.iter();
    options.filter_map(|option| option.strip_prefix("--cpus-per-task=")?.parse().ok()).next_back()
}

/// Hours, minutes and seconds.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes}:{seconds:02} min"),
        (hours, minutes, _) => format!("{hours}:{minutes:02} h"),
    }
}
