//! `cargo xtask gpu-check` collects, in one folder, everything that a machine with a GPU needs to check and measure this
//! repository. With `--without-gpu` it runs the checks of the GPU code that need no GPU.

use crate::python;
use crate::shell::{cargo, command, lowrank_compress, output, program, root, run as sh, target};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Largest folder that may be copied to another machine.
const FOLDER_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Run the checks that need no GPU: compile the kernels to PTX, and run everything on a device emulated by the CPU
    #[arg(long)]
    without_gpu: bool,
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.without_gpu { without_gpu() } else { collect().map(drop) }
}

/// The check that CI runs.
pub(crate) fn without_gpu() -> Result<()> {
    let nvrtc = python::cuda_libraries()?;
    sh(&mut cargo(&["build", "--quiet", "--locked", "--workspace", "--example", "compile_kernels"]))?;
    sh(command(target().join("debug/examples/compile_kernels")).arg(nvrtc))?;

    if Command::new("c++").arg("--version").output().is_err() {
        println!("the emulated device is skipped: no C++ compiler (c++) on PATH");
        return Ok(());
    }
    let emulator = target().join("cuda-emulator");
    sh(command(root().join("crates/lowrank-compute/tests/cuda-emulator/build.sh")).arg(&emulator))?;
    let emulated = |command: &mut Command| {
        command.env("LD_LIBRARY_PATH", &emulator).env("LOWRANK_CUDA_LIBS", &emulator);
        sh(command)
    };
    // The tests that need a device are ignored elsewhere; here they run, and fail where there is none.
    for TestBinary { package, path, .. } in test_binaries()? {
        if ["lowrank-compute", "lowrank-forward"].contains(&package.as_str()) {
            let mut test = command(path);
            test.args(["--quiet", "--include-ignored"]).current_dir(root().join("crates").join(package));
            emulated(&mut test)?;
        }
    }
    // Run the folder as it would run elsewhere: without a device it must say so, with one it must finish.
    let script = collect()?.join("run.sh");
    let status = Command::new(&script).arg("--small").env("LOWRANK_CUDA_LIBS", "").status()?;
    if !matches!(status.code(), Some(0 | 3)) {
        bail!("{} ended with {status}", script.display());
    }
    emulated(Command::new(&script).arg("--small"))
}

/// Builds and collects the folder; returns its path.
fn collect() -> Result<PathBuf> {
    let folder = target().join("gpu-check");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    copy(&lowrank_compress()?, &folder.join("lowrank-compress"))?;
    copy(&program("gpu_check", &[])?, &folder.join("gpu_check"))?;
    let tests = test_binaries()?;
    for (target, program) in [("lowrank_compute", "suite-compute"), ("golden", "suite-forward")] {
        let test = tests.iter().find(|test| test.target == target);
        copy(&test.with_context(|| format!("no test binary {target}"))?.path, &folder.join(program))?;
    }
    // Strip debug information. Without binutils it stays in, and the limit on the size decides.
    let programs = ["lowrank-compress", "gpu_check", "suite-compute", "suite-forward"];
    let _ = command("strip").args(programs.map(|program| folder.join(program))).status();
    let fixtures = root().join("tests/fixtures");
    for name in ["tiny-mixtral", "golden"] {
        copy_folder(&fixtures.join(name), &folder.join("fixtures").join(name))?;
    }
    copy(&root().join("xtask/src/verbs/gpu_check.sh"), &folder.join("run.sh"))?;

    let bytes = size(&folder)?;
    if bytes > FOLDER_BYTES_MAX {
        bail!("{} holds {bytes} bytes, more than the {FOLDER_BYTES_MAX} that may travel", folder.display());
    }
    println!("{} ({} MiB): copy it to a machine with a GPU and start run.sh", folder.display(), bytes >> 20);
    Ok(folder)
}

/// What `cargo test` runs.
struct TestBinary {
    package: String,
    target: String,
    path: PathBuf,
}

/// Builds the test binaries of the workspace as `cargo test --workspace` does, so that CI need not build them twice.
fn test_binaries() -> Result<Vec<TestBinary>> {
    let build = ["test", "--locked", "--workspace", "--no-run", "--message-format", "json"];
    let messages = output(&mut cargo(&build))?;
    let binary = |line| -> Option<TestBinary> {
        let message: Value = serde_json::from_str(line).ok()?;
        // Examples are built beside the tests.
        message["profile"]["test"].as_bool().filter(|&is_test| is_test)?;
        let path = message["executable"].as_str()?.into();
        let folder = Path::new(message["manifest_path"].as_str()?).parent()?.file_name()?;
        let target = message["target"]["name"].as_str()?.to_owned();
        Some(TestBinary { package: folder.to_str()?.to_owned(), target, path })
    };
    Ok(messages.lines().filter_map(binary).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).with_context(|| format!("{} → {}", from.display(), to.display()))?;
    Ok(())
}

/// Copies a folder and everything in it.
pub(super) fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            copy(&entry.path(), &target)?;
        }
    }
    Ok(())
}

fn size(folder: &Path) -> Result<u64> {
    std::fs::read_dir(folder)?
        .map(|entry| {
            let entry = entry?;
            if entry.file_type()?.is_dir() { size(&entry.path()) } else { Ok(entry.metadata()?.len()) }
        })
        .sum()
}
