//! `cargo xtask tidy`: rules of the house that no compiler knows (`docs/architecture.md`, invariants).

use crate::shell::{self, cargo, output};
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// (crate, what it must never depend on, why)
const FORBIDDEN: [(&str, &[&str], &str); 4] = [
    (
        "lowrank-verify",
        &["lowrank-svd", "lowrank-writer", "lowrank-pipeline"],
        "a bug must not verify itself",
    ),
    ("lowrank-writer", &["lowrank-reader"], "a bug must not verify itself"),
    ("lowrank-forward", &["lowrank-svd", "lowrank-writer"], "the reference stands alone"),
    ("lowrank-model", &["rayon", "faer", "ndarray", "clap"], "the leaf is values and pure functions"),
];

/// (library, the only crates of ours that may know it)
const RESERVED: [(&str, &[&str]); 5] = [
    ("faer", &["lowrank-compute"]),
    ("ndarray-linalg", &["lowrank-compute"]),
    ("cudarc", &["lowrank-compute"]),
    ("indicatif", &["lowrank-cli"]),
    ("clap", &["lowrank-cli", "xtask"]),
];

/// Files in which `unsafe` is allowed.
const UNSAFE_ROOMS: [&str; 1] = ["crates/lowrank-compute/src/cuda/"];

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    let mut broken = Vec::new();
    dependencies(&mut broken)?;
    sources(&shell::root(), &mut broken)?;
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    println!("tidy: dependencies and sources keep the rules");
    Ok(())
}

fn dependencies(broken: &mut Vec<String>) -> Result<()> {
    let metadata = output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps", "--locked"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let normal = package["dependencies"].as_array().into_iter().flatten().filter(|d| d["kind"].is_null());
        let names = normal.filter_map(|d| d["name"].as_str()).map(str::to_owned).collect();
        direct.insert(package["name"].as_str().unwrap_or_default().to_owned(), names);
    }
    for (name, forbidden, why) in FORBIDDEN {
        let reached = reach(&direct, name);
        for other in forbidden.iter().filter(|other| reached.contains(**other)) {
            broken.push(format!("{name} depends on {other}: {why}"));
        }
    }
    for (library, allowed) in RESERVED {
        for (name, _) in
            direct.iter().filter(|(name, d)| d.contains(library) && !allowed.contains(&name.as_str()))
        {
            broken.push(format!("{name} depends on {library}, which only {} may know", allowed.join(", ")));
        }
    }
    Ok(())
}

/// Everything of ours, and directly below, that a crate depends on.
fn reach(direct: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut queue = vec![from.to_owned()];
    while let Some(name) = queue.pop() {
        for next in direct.get(&name).into_iter().flatten() {
            if seen.insert(next.clone()) {
                queue.push(next.clone());
            }
        }
    }
    seen
}

fn sources(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let files = output(shell::command("git").args(["ls-files", "*.rs"]))?;
    for file in files.lines() {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        if !text.trim_start().starts_with("//!") {
            broken.push(format!("{file}: does not open with `//!`, saying what it is for"));
        }
        let own = file == "xtask/src/verbs/tidy.rs";
        if !own && !UNSAFE_ROOMS.iter().any(|room| file.starts_with(room)) && text.contains("unsafe {") {
            broken.push(format!("{file}: `unsafe` outside of its room"));
        }
    }
    Ok(())
}
