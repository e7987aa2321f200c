//! Python environments under `target/python`: one with torch and the newest transformers, an overlay with the last 4.x that
//! shares its torch, and others for a browser, for benchmarks, for vLLM and for llama.cpp. Each is made once per set of pinned
//! versions.

use crate::shell;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version of transformers that a script uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transformers {
    /// The last of 4.x.
    V4,
    /// The newest 5.x.
    V5,
}

impl Transformers {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V5];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::V4 => "transformers 4",
            Self::V5 => "transformers 5",
        }
    }
}

/// A Python with torch and this version of transformers, which cannot download models.
pub(crate) fn python(transformers: Transformers) -> Result<Command> {
    let mut python = offline(&venv()?);
    if transformers == Transformers::V4 {
        python.env("PYTHONPATH", overlay()?);
    }
    Ok(python)
}

/// An environment's Python, which cannot download models.
fn offline(venv: &Path) -> Command {
    let mut python = shell::command(venv.join("bin/python"));
    python
        .env("HF_HUB_OFFLINE", "1")
        .env("TRANSFORMERS_VERBOSITY", "error")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    // transformers caches remote code by the folder's name. With our own cache we never get a stale copy from elsewhere.
    python.env("HF_HOME", folder().join("hf-home")).env("XDG_CACHE_HOME", folder().join("cache"));
    python
}

/// The same with this repository's own Python package, as it is in the checkout.
pub(crate) fn python_with_package(transformers: Transformers) -> Result<Command> {
    let mut python = python(transformers)?;
    let mut places = vec![shell::root().join("python")];
    if transformers == Transformers::V4 {
        places.push(overlay()?);
    }
    python.env("PYTHONPATH", std::env::join_paths(places)?);
    Ok(python)
}

/// A Python that drives a browser; it does not contain the browser.
pub(crate) fn with_browser_driver() -> Result<Command> {
    let pins = shell::root().join("tests/report/requirements.txt");
    let venv = ensure("browser", &pins, |place| make_venv(place, &pins))?;
    let mut python = shell::command(venv.join("bin/python"));
    python.env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(python)
}

/// A Python with numpy, scipy and torch as a user has them, without OpenBLAS settings from the environment: settings made
/// for another version would slow it down.
pub(crate) fn with_peers() -> Result<Command> {
    let venv = venv()?;
    let pins = shell::root().join("tests/bench/requirements.txt");
    let overlay = ensure("peers", &pins, |place| {
        let mut pip = shell::command(venv.join("bin/pip"));
        pip.args(["install", "--quiet", "--no-deps", "--target"]).arg(place).arg("-r").arg(&pins);
        shell::run(&mut pip)
    })?;
    let mut python = shell::command(venv.join("bin/python"));
    python.env("PYTHONPATH", overlay).env("PYTHONDONTWRITEBYTECODE", "1");
    python.env_remove("OPENBLAS_CORETYPE").env_remove("OPENBLAS_L2_SIZE");
    Ok(python)
}

/// maturin, which builds wheels.
pub(crate) fn maturin() -> Result<Command> {
    let pins = shell::root().join("tests/python/requirements-build.txt");
    let venv = ensure("maturin", &pins, |place| make_venv(place, &pins))?;
    Ok(shell::command(venv.join("bin/maturin")))
}

/// The Python of a new environment with this wheel alone. What it depends on, gigabytes of torch, is taken from the
/// environment of [`python`] and not installed again.
pub(crate) fn with_only(wheel: &Path, place: &Path) -> Result<PathBuf> {
    let dependencies = site_packages(&venv()?)?;
    shell::run(shell::command("python3").arg("-m").arg("venv").arg(place))?;
    let mut pip = shell::command(place.join("bin/pip"));
    shell::run(pip.args(["install", "--quiet", "--no-deps"]).arg(wheel))?;
    let mut pip = shell::command(place.join("bin/pip"));
    let pins = shell::root().join("tests/python/requirements-use.txt");
    shell::run(pip.args(["install", "--quiet", "-r"]).arg(pins))?;
    let link = site_packages(place)?.join("dependencies.pth");
    std::fs::write(&link, format!("{}\n", dependencies.display()))?;
    Ok(place.join("bin/python"))
}

/// A Python with this repository's package and what people use an output with: quantisers, PEFT, lm-eval. torch and
/// transformers are those of [`python`].
pub(crate) fn with_users_tools() -> Result<Command> {
    let dependencies = site_packages(&venv()?)?;
    let pins = shell::root().join("tests/use/requirements.txt");
    let venv = ensure("use", &pins, |place| {
        shell::run(shell::command("python3").arg("-m").arg("venv").arg(place))?;
        let mut pip = shell::command(place.join("bin/pip"));
        shell::run(pip.args(["install", "--quiet", "--no-deps", "-r"]).arg(&pins))?;
        let link = site_packages(place)?.join("dependencies.pth");
        Ok(std::fs::write(link, format!("{}\n", dependencies.display()))?)
    })?;
    let mut python = offline(&venv);
    python.env("PYTHONPATH", shell::root().join("python"));
    Ok(python)
}

/// The Python of an environment with vLLM's CPU build: 6 GB.
pub(crate) fn vllm() -> Result<PathBuf> {
    pinned("vllm", "requirements-vllm.txt")
}

/// The Python of an environment with SGLang: 7 GB.
pub(crate) fn sglang() -> Result<PathBuf> {
    pinned("sglang", "requirements-sglang.txt")
}

/// The Python of an environment with these packages and no others.
fn pinned(name: &str, pins: &str) -> Result<PathBuf> {
    let pins = serving_pins(pins);
    let venv = ensure(name, &pins, |place| {
        shell::run(shell::command("python3").arg("-m").arg("venv").arg(place))?;
        let mut pip = shell::command(place.join("bin/pip"));
        shell::run(pip.args(["install", "--quiet", "--no-deps", "-r"]).arg(&pins))
    })?;
    Ok(venv.join("bin/python"))
}

/// A Python with llama.cpp and transformers, and the folder of llama.cpp's sources. Compiling takes minutes.
pub(crate) fn llama() -> Result<(Command, PathBuf)> {
    let dependencies = site_packages(&venv()?)?;
    let pins = serving_pins("requirements-llama.txt");
    let venv = ensure("llama", &pins, |place| {
        shell::run(shell::command("python3").arg("-m").arg("venv").arg(place))?;
        let pip = |verb: &str| {
            let mut pip = shell::command(place.join("bin/pip"));
            pip.args([verb, "--quiet", "--no-binary", "llama-cpp-python", "-r"]).arg(&pins);
            // Without its part for images.
            pip.env("CMAKE_ARGS", "-DLLAVA_BUILD=OFF");
            pip
        };
        let archives = place.join("archives");
        shell::run(pip("download").arg("--no-deps").arg("--dest").arg(&archives))?;
        shell::run(&mut pip("install"))?;
        let archive = the_only(&archives, |name| name.starts_with("llama_cpp_python"))?;
        let mut unpack = shell::command(place.join("bin/python"));
        shell::run(unpack.args(["-m", "tarfile", "-e"]).arg(archive).arg(place.join("sources")))?;
        let link = site_packages(place)?.join("dependencies.pth");
        Ok(std::fs::write(link, format!("{}\n", dependencies.display()))?)
    })?;
    let sources = the_only(&venv.join("sources"), |_| true)?.join("vendor/llama.cpp");
    Ok((offline(&venv), sources))
}

/// The entry of a folder whose name passes.
fn the_only(folder: &Path, passes: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?.flatten();
    let mut found = entries.filter(|entry| entry.file_name().to_str().is_some_and(&passes));
    Ok(found.next().with_context(|| format!("{}: not what pip writes", folder.display()))?.path())
}

/// The folder of an environment's packages.
fn site_packages(venv: &Path) -> Result<PathBuf> {
    let lib = venv.join("lib");
    let pythons = std::fs::read_dir(&lib).with_context(|| lib.display().to_string())?.flatten();
    let mut found = pythons.map(|python| python.path().join("site-packages")).filter(|place| place.is_dir());
    found.next().with_context(|| format!("{}: no python3.*/site-packages", lib.display()))
}

/// The folder in which torch's wheels install CUDA's libraries.
pub(crate) fn cuda_libraries() -> Result<PathBuf> {
    let folder = site_packages(&venv()?)?.join("nvidia/cu13/lib");
    if !folder.join("libnvrtc.so.13").is_file() {
        bail!("{}: no nvrtc in it", folder.display());
    }
    Ok(folder)
}

fn folder() -> PathBuf {
    shell::target().join("python")
}

fn serving_pins(name: &str) -> PathBuf {
    shell::root().join("tests/serving").join(name)
}

fn pins(name: &str) -> PathBuf {
    shell::root().join("tests/conformance").join(name)
}

/// Makes an environment unless it exists with the same pinned versions.
fn ensure(name: &str, pins: &Path, make: impl FnOnce(&PathBuf) -> Result<()>) -> Result<PathBuf> {
    let place = folder().join(name);
    let stamp = folder().join(format!("{name}.pins"));
    let wanted = std::fs::read_to_string(pins).with_context(|| pins.display().to_string())?;
    if std::fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(place);
    }
    if place.exists() {
        std::fs::remove_dir_all(&place)?;
    }
    std::fs::create_dir_all(folder())?;
    make(&place)?;
    std::fs::write(stamp, wanted)?;
    Ok(place)
}

fn venv() -> Result<PathBuf> {
    let pins = pins("requirements-v5.txt");
    ensure("venv", &pins, |place| make_venv(place, &pins))
}

fn make_venv(place: &Path, pins: &Path) -> Result<()> {
    if Command::new("python3").arg("--version").output().is_err() {
        bail!("python3 is not on PATH: install Python 3.10 or newer with its venv module");
    }
    shell::run(shell::command("python3").arg("-m").arg("venv").arg(place))?;
    let mut pip = shell::command(place.join("bin/pip"));
    shell::run(pip.args(["install", "--quiet", "-r"]).arg(pins))
}

fn overlay() -> Result<PathBuf> {
    let venv = venv()?;
    ensure("transformers-4", &pins("requirements-v4.txt"), |place| {
        let mut pip = shell::command(venv.join("bin/pip"));
        pip.args(["install", "--quiet", "--target"]).arg(place).arg("-r").arg(pins("requirements-v4.txt"));
        shell::run(&mut pip)
    })
}
