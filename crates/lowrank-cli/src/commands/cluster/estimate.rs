//! What a job will do, and by count how long: `cluster --dry-run`.

use crate::args::SlurmFlags;
use crate::exit::Result;
use crate::job::Job;
use crate::tables::{human_bytes, table};
use lowrank_pipeline::compress::costs::{
    BYTES_PER_SECOND, Costs, Machines, OPERATIONS_PER_SECOND, StageCost,
};
use lowrank_pipeline::compress::units::Shape;
use lowrank_pipeline::workers;
use lowrank_reader::Checkpoint;

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
    let stages = costs.stages(machines.nodes);
    let row = |stage: &StageCost| {
        vec![
            stage.name.clone(),
            stage.units.to_string(),
            stage.tasks.to_string(),
            format!("{:.1}", stage.unit.core_seconds),
            human_bytes(stage.read_bytes() as u64),
            human_bytes(stage.written_bytes() as u64),
            duration(stage.wall_seconds(machines)),
        ]
    };
    let titles = ["stage", "units", "tasks", "core s / unit", "reads", "writes", "wall"];
    println!("{}", table(&titles, stages.iter().map(row)));
    let wall: f64 = stages.iter().map(|stage| stage.wall_seconds(machines)).sum();
    let core_seconds: f64 = stages.iter().map(StageCost::core_seconds).sum();
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
