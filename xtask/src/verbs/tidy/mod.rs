//! `cargo xtask tidy`: rules of this repository that no compiler knows (`docs/architecture.md`, invariants). One rule, one file.

mod circles;
mod crates;
mod known;
mod messages;
mod paths;
mod sources;
mod syntax;
mod type_names;

use crate::shell;
use anyhow::{Result, bail};

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    let root = shell::root();
    let crates = syntax::workspace(&root)?;
    let mut broken = Vec::new();
    crates::check(&root, &mut broken)?;
    sources::check(&root, &mut broken)?;
    broken.extend(known::except(circles::find(&crates), known::CIRCLES, "import circles"));
    broken.extend(known::except(type_names::find(&crates), known::TYPE_NAMES, "type names"));
    broken.extend(known::except(messages::find(&crates), known::MESSAGES, "messages"));
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    println!("tidy: dependencies, modules, names and messages keep the rules");
    Ok(())
}
