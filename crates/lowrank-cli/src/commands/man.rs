//! `man`: manual pages, made from the help texts.

use crate::cli::Cli;
use crate::exit::{Result, unwritten};
use clap::CommandFactory;
use std::path::Path;

/// Runs the command.
pub(crate) fn run(dir: &Path) -> Result<()> {
    let written = std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir));
    written.map_err(|error| unwritten(dir, "the manual pages could not be written", &error))?;
    println!("Manual pages: {} and one for each command", dir.join("lowrank-compress.1").display());
    Ok(())
}
