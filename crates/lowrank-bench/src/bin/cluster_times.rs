//! Counts how long a cluster of 1 to 256 nodes would take for two models, and which stage bounds it, as Markdown tables:
//! `cargo xtask bench cluster`. Nothing is run.

use lowrank_bench::shapes::{large_models, mixtral};
use lowrank_model::recipe::{Goal, Removal};
use lowrank_model::{ModelConfig, Recipe};
use lowrank_pipeline::compress::costs::{Costs, Machines, Shares, UnitCost, sums, wall_seconds};
use lowrank_pipeline::compress::units::tasks;
use serde_json::Value;
use std::error::Error;

/// Nodes of the clusters.
const NODES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Cores of a node, all given to one task.
const CORES: usize = 32;
/// Bytes per second of one node from and to the shared disk.
const BYTES_PER_SECOND: f64 = 1e9;

fn main() -> Result<(), Box<dyn Error>> {
    let [.., (name, deepseek)] = large_models();
    for (name, config, weight_bytes) in [("Mixtral-8x7B, bf16", mixtral(), 2.0), (name, deepseek, 1.0)] {
        print(name, &config, weight_bytes)?;
    }
    Ok(())
}

/// A stage: its name, units, tasks for each node, and what a unit costs.
struct Row {
    stage: String,
    units: usize,
    tasks_per_node: usize,
    unit: UnitCost,
}

impl Row {
    fn shares(&self, nodes: usize) -> Shares {
        Shares { units: self.units, tasks: tasks(self.units, nodes, self.tasks_per_node) }
    }

    /// `factors-N` for each `factors-3`.
    fn kind(&self) -> String {
        match self.stage.split_once('-') {
            Some((kind, _)) => format!("{kind}-N"),
            None => self.stage.clone(),
        }
    }
}

fn print(name: &str, config: &Value, weight_bytes: f64) -> Result<(), Box<dyn Error>> {
    let config = ModelConfig::from_hf_json(config)?;
    // How many are removed changes no count.
    let recipe = Recipe::new(Goal::Budget(Removal::Params(10_000_000_000)));
    let costs = Costs::new(&config, &recipe, weight_bytes).ok_or("the default calibrates")?;
    let stages = costs.stages().into_iter().map(|(stage, units)| {
        let tasks_per_node = stage.tasks_per_node();
        Row { stage: stage.to_string(), units, tasks_per_node, unit: costs.unit(stage) }
    });
    let publish = Row { stage: "publish".into(), units: 1, tasks_per_node: 1, unit: costs.publish() };
    let rows: Vec<Row> = stages.chain([publish]).collect();
    // In the order of the stages.
    let mut kinds: Vec<String> = Vec::new();
    for kind in rows.iter().map(Row::kind) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    println!("**{name}**: the folder grows to {:.1} TB.\n", costs.folder_bytes() / 1e12);
    println!("| Stage | Units | Core hours | TB read by 1 node; by 256 | Wall on 1 node | on 16 | on 256 |");
    println!("|---|---|---|---|---|---|---|");
    for kind in &kinds {
        let units: usize = of_kind(&rows, kind).map(|row| row.units).sum();
        let sum = |at: usize, nodes: usize| -> f64 {
            of_kind(&rows, kind).map(|row| sums(row.shares(nodes), row.unit)[at]).sum()
        };
        let walls = [1, 16, 256].map(|nodes| hours(wall(of_kind(&rows, kind), nodes))).join(" | ");
        let read = [1, 256].map(|nodes| format!("{:.1}", sum(1, nodes) / 1e12)).join("; ");
        println!("| `{kind}` | {units} | {:.1} | {read} | {walls} |", sum(0, 1) / 3600.0);
    }
    println!("\n| Nodes | Wall | Times faster | What takes longest |");
    println!("|---|---|---|---|");
    let alone = wall(rows.iter(), 1);
    for nodes in NODES {
        let all = wall(rows.iter(), nodes);
        let longest = kinds.iter().map(|kind| (wall(of_kind(&rows, kind), nodes), kind));
        let (seconds, kind) = longest.max_by(|a, b| a.0.total_cmp(&b.0)).ok_or("there are stages")?;
        let share = 100.0 * seconds / all;
        println!("| {nodes} | {} | {:.1} | `{kind}`, {share:.0} % |", hours(all), alone / all);
    }
    println!();
    Ok(())
}

fn of_kind<'a>(rows: &'a [Row], kind: &'a str) -> impl Iterator<Item = &'a Row> {
    rows.iter().filter(move |row| row.kind() == kind)
}

fn wall<'a>(rows: impl Iterator<Item = &'a Row>, nodes: usize) -> f64 {
    let machines = Machines { nodes, cores: CORES, bytes_per_second: BYTES_PER_SECOND };
    rows.map(|row| wall_seconds(row.shares(nodes), row.unit, machines)).sum()
}

fn hours(seconds: f64) -> String {
    format!("{:.2} h", seconds / 3600.0)
}
