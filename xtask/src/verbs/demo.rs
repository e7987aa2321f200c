//! `cargo xtask demo` compresses and verifies the bundled model, as a new user would.

use crate::shell::{command, lowrank_compress, root, run as sh, target};
use anyhow::Result;
use std::path::PathBuf;

/// 10,000,000,000 of Mixtral-8x7B's 46,702,792,704 parameters.
const MIXTRAL_SHARE: &str = "21.412%";

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Parameters to remove: a number, or a share such as 20% [default: 21.4 %, what 10 B is of Mixtral-8x7B]
    #[arg(long)]
    budget: Option<String>,
}

/// The bundled model.
pub(crate) fn bundled_model() -> PathBuf {
    root().join("tests/fixtures/tiny-mixtral")
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let tool = lowrank_compress()?;
    let out = target().join("demo/tiny-mixtral-lowrank");
    if out.exists() {
        std::fs::remove_dir_all(&out)?;
    }
    // `--out` must not exist, but its parent folder must.
    std::fs::create_dir_all(target().join("demo"))?;
    let budget = args.budget.as_deref().unwrap_or(MIXTRAL_SHARE);
    let mut compress = command(&tool);
    compress.args(["--budget", budget, "--model"]).arg(bundled_model()).arg("--out").arg(&out);
    sh(&mut compress)?;
    let mut verify = command(&tool);
    verify.args(["verify", "--original"]).arg(bundled_model()).arg("--compressed").arg(&out);
    sh(&mut verify)?;
    println!("\nThe compressed checkpoint: {}", out.display());
    println!("Its report, a page to look at: {}", out.with_extension("report.html").display());
    Ok(())
}
