//! Runs other programs, and prints each command line first.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// The folder for everything that is built or downloaded.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A command in the repository's root. The tool does not use the user's cache: it gets one under `target/`, which is empty
/// when this process starts.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let is_tool = Path::new(&program).file_name() == Some(OsStr::new("lowrank-compress"));
    let mut command = Command::new(program);
    command.current_dir(root());
    if is_tool {
        static CACHE: OnceLock<PathBuf> = OnceLock::new();
        let cache = CACHE.get_or_init(|| {
            let cache = target().join("xtask-cache");
            // If the folder does not exist, there is nothing to remove.
            let _ = std::fs::remove_dir_all(&cache);
            cache
        });
        command.env("XDG_CACHE_HOME", cache);
    }
    command
}

/// `cargo` with these arguments.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments);
    cargo
}

/// Runs a command and shows it with its output; an error if the command fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    eprintln!("$ {shown}");
    let status = command.status().with_context(|| format!("cannot start: {shown}"))?;
    if !status.success() {
        bail!("failed ({status}): {shown}");
    }
    Ok(())
}

/// Runs a command and returns its stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.output().with_context(|| format!("cannot start: {shown}"))?;
    if !output.status.success() {
        bail!("failed ({}): {shown}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Installs Debian packages if possible (as root, with apt). Returns whether it did.
pub(crate) fn install_from_debian(packages: &[&str]) -> Result<bool> {
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0"));
    if !root || Command::new("apt-get").arg("--version").output().is_err() {
        return Ok(false);
    }
    run(command("apt-get").args(["update", "-qq"]))?;
    let mut install = command("apt-get");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages);
    run(install.env("DEBIAN_FRONTEND", "noninteractive"))?;
    Ok(true)
}

/// The release build of the tool.
pub(crate) fn lowrank_compress() -> Result<PathBuf> {
    program("lowrank-compress", &[])
}

/// The release build of a program of this workspace, with these features.
pub(crate) fn program(name: &str, features: &[&str]) -> Result<PathBuf> {
    run(release("--bin", name).args(features.iter().flat_map(|feature| ["--features", feature])))?;
    Ok(target().join("release").join(name))
}

/// The release build of an example of this workspace.
pub(crate) fn example(name: &str) -> Result<PathBuf> {
    run(&mut release("--example", name))?;
    Ok(target().join("release/examples").join(name))
}

/// Dependencies get the features that the whole workspace asks for, whatever is built: otherwise they are compiled again for
/// another program.
fn release(kind: &str, name: &str) -> Command {
    cargo(&["build", "--quiet", "--release", "--locked", "--workspace", kind, name])
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
