//! What crates may depend on, and that each says in `docs/architecture.md` why it is one.

use crate::shell::{cargo, output};
use anyhow::{Context, Result};
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
    ("lowrank-model", &["rayon", "faer", "ndarray"], "the leaf is values and pure functions"),
];

/// (library, the only crates of ours that may know it)
const RESERVED: [(&str, &[&str]); 5] = [
    ("faer", &["lowrank-compute"]),
    ("ndarray-linalg", &["lowrank-compute"]),
    ("cudarc", &["lowrank-compute"]),
    ("indicatif", &["lowrank-cli"]),
    ("clap", &["lowrank-cli", "lowrank-model", "xtask"]),
];

/// Checks the dependencies of every package, and the tables of the architecture page.
pub(super) fn check(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let metadata = output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps", "--locked"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let normal = package["dependencies"].as_array().into_iter().flatten().filter(|d| d["kind"].is_null());
        let names = normal.filter_map(|d| d["name"].as_str()).map(str::to_owned).collect();
        direct.insert(package["name"].as_str().unwrap_or_default().to_owned(), names);
    }
    dependencies(&direct, broken);
    const PAGE: &str = "docs/architecture.md";
    let page = std::fs::read_to_string(root.join(PAGE)).context(PAGE)?;
    let unexplained = unexplained(direct.keys().map(String::as_str), &page);
    broken.extend(unexplained.map(|name| format!("{name}: no table of {PAGE} says why it is a crate")));
    Ok(())
}

fn dependencies(direct: &BTreeMap<String, BTreeSet<String>>, broken: &mut Vec<String>) {
    for (name, forbidden, why) in FORBIDDEN {
        let reached = reach(direct, name);
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

/// Crates that are in no row of a table.
fn unexplained<'a>(names: impl Iterator<Item = &'a str>, page: &str) -> impl Iterator<Item = &'a str> {
    names.filter(move |name| {
        let quoted = format!("`{name}`");
        !page.lines().any(|line| line.starts_with('|') && line.contains(&quoted))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_that_depends_on_what_it_must_not_know_is_found_however_far_it_is() {
        let direct = |edges: &[(&str, &[&str])]| -> BTreeMap<String, BTreeSet<String>> {
            edges
                .iter()
                .map(|(from, to)| ((*from).into(), to.iter().map(|to| (*to).into()).collect()))
                .collect()
        };
        let mut broken = Vec::new();
        dependencies(&direct(&[("lowrank-verify", &["a"]), ("a", &["serde"])]), &mut broken);
        assert_eq!(broken, [""; 0]);
        dependencies(&direct(&[("lowrank-verify", &["a"]), ("a", &["lowrank-svd", "faer"])]), &mut broken);
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken[0].starts_with("lowrank-verify depends on lowrank-svd"), "{broken:?}");
        assert!(broken[1].starts_with("a depends on faer"), "{broken:?}");
    }

    #[test]
    fn a_crate_that_no_table_names_is_found() {
        let page = "`a` is a crate\n| `b` | does b |\n| c | `ab` |\n";
        assert_eq!(unexplained(["a", "b", "c"].into_iter(), page).collect::<Vec<_>>(), ["a", "c"]);
    }
}
