//! Every file opens with what it is for, and `unsafe` keeps to its folder.

use crate::shell::{self, output};
use anyhow::Result;
use std::path::Path;

/// Files in which `unsafe` is allowed.
const UNSAFE_FOLDERS: [&str; 1] = ["crates/lowrank-compute/src/cuda/"];

/// Checks every Rust file that is in git.
pub(super) fn check(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let files = output(shell::command("git").args(["ls-files", "*.rs"]))?;
    for file in files.lines() {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        if !text.trim_start().starts_with("//!") {
            broken.push(format!("{file}: does not open with `//!`, saying what it is for"));
        }
        let own = file == "xtask/src/verbs/tidy/sources.rs";
        if !own && !UNSAFE_FOLDERS.iter().any(|folder| file.starts_with(folder)) && text.contains("unsafe {")
        {
            broken.push(format!("{file}: `unsafe` outside of {}", UNSAFE_FOLDERS.join(", ")));
        }
    }
    Ok(())
}
