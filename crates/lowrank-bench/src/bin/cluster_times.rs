//! Counts how long a cluster of 1 to 256 nodes would take for two models, and which stage bounds it, as Markdown tables:
//! `cargo xtask bench cluster`. Nothing is run.

use lowrank_bench::shapes::{large_models, mixtral};
use lowrank_model::recipe::{Goal, Removal};
use lowrank_model::{ModelConfig, Recipe};
use lowrank_pipeline::compress::costs::{BYTES_PER_SECOND, Costs, Machines, StageCost};
use serde_json::Value;
use std::error::Error;

/// Nodes of the clusters.
const NODES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Cores of a node, all given to one task.
const CORES: usize = 32;

fn main() -> Result<(), Box<dyn Error>> {
    let [.., (name, deepseek)] = large_models();
    for (name, config, weight_bytes) in [("Mixtral-8x7B, bf16", mixtral(), 2.0), (name, deepseek, 1.0)] {
        print(name, &config, weight_bytes)?;
    }
    Ok(())
}

/// `factors-N` for each `factors-3`.
fn kind(stage: &StageCost) -> String {
    match stage.name.split_once('-') {
        Some((kind, _)) => format!("{kind}-N"),
        None => stage.name.clone(),
    }
}

fn print(name: &str, config: &Value, weight_bytes: f64) -> Result<(), Box<dyn Error>> {
    let config = ModelConfig::from_hf_json(config)?;
    // How many are removed changes no count.
    let recipe = Recipe::new(Goal::Budget(Removal::Params(10_000_000_000)));
    let costs = Costs::new(&config, &recipe, weight_bytes).ok_or("the default calibrates")?;
    let on = |nodes: usize| costs.stages(nodes);
    // In the order of the stages.
    let mut kinds: Vec<String> = Vec::new();
    for kind in on(1).iter().map(kind) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let of_kind = |wanted: &str, nodes: usize| -> Vec<StageCost> {
        on(nodes).into_iter().filter(|stage| kind(stage) == wanted).collect()
    };
    println!("**{name}**: the folder grows to {:.1} TB.\n", costs.folder_bytes() / 1e12);
    println!("| Stage | Units | Core hours | TB read by 1 node; by 256 | Wall on 1 node | on 16 | on 256 |");
    println!("|---|---|---|---|---|---|---|");
    for kind in &kinds {
        let alone = of_kind(kind, 1);
        let units: usize = alone.iter().map(|stage| stage.units).sum();
        let core_hours = alone.iter().map(StageCost::core_seconds).sum::<f64>() / 3600.0;
        let read = [1, 256].map(|nodes| of_kind(kind, nodes).iter().map(StageCost::read_bytes).sum::<f64>());
        let read = read.map(|bytes| format!("{:.1}", bytes / 1e12)).join("; ");
        let walls = [1, 16, 256].map(|nodes| hours(wall(&of_kind(kind, nodes), nodes))).join(" | ");
        println!("| `{kind}` | {units} | {core_hours:.1} | {read} | {walls} |");
    }
    println!("\n| Nodes | Wall | Times faster | What takes longest |");
    println!("|---|---|---|---|");
    let alone = wall(&on(1), 1);
    for nodes in NODES {
        let all = wall(&on(nodes), nodes);
        let longest = kinds.iter().map(|kind| (wall(&of_kind(kind, nodes), nodes), kind));
        let (seconds, kind) = longest.max_by(|a, b| a.0.total_cmp(&b.0)).ok_or("there are stages")?;
        let share = 100.0 * seconds / all;
        println!("| {nodes} | {} | {:.1} | `{kind}`, {share:.0} % |", hours(all), alone / all);
    }
    println!();
    Ok(())
}

fn wall(stages: &[StageCost], nodes: usize) -> f64 {
    let machines = Machines { nodes, cores: CORES, bytes_per_second: BYTES_PER_SECOND };
    stages.iter().map(|stage| stage.wall_seconds(machines)).sum()
}

fn hours(seconds: f64) -> String {
    format!("{:.2} h", seconds / 3600.0)
}
