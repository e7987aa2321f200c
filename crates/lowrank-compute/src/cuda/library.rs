//! Finding CUDA's libraries at run time.
//!
//! cudarc opens them by name, which finds what the loader knows or what is loaded already. So they are opened here first,
//! by absolute path, all from one folder, and stay open. Looked for in this order:
//!
//! 1. `LOWRANK_CUDA_LIBS`, a folder; if set, nothing else is tried
//! 2. the loader's own path (`LD_LIBRARY_PATH`, `ldconfig`)
//! 3. `/usr/local/cuda/lib64`
//! 4. the wheels of the `python3` on PATH: `site-packages/nvidia/cu13/lib`
//!
//! The driver, `libcuda`, comes with the device and is left to the loader.

use super::NoCuda;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names the folder of CUDA's libraries.
const VARIABLE: &str = "LOWRANK_CUDA_LIBS";

/// Whether a library can be done without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing works without.
    Always,
    /// The others need it if it is there.
    IfThere,
}

/// (name, its versions in CUDA 13 and 12, need), each after those it depends on.
const LIBRARIES: [(&str, [&str; 2], Need); 6] = [
    ("libnvrtc.so", ["13", "12"], Need::Always),
    ("libcublasLt.so", ["13", "12"], Need::Always),
    ("libcublas.so", ["13", "12"], Need::Always),
    ("libnvJitLink.so", ["13", "12"], Need::IfThere),
    ("libcusparse.so", ["12", "12"], Need::IfThere),
    ("libcusolver.so", ["12", "11"], Need::Always),
];

/// Opens the libraries once for the whole process; → where they came from.
pub(super) fn load() -> Result<&'static str, NoCuda> {
    static LOADED: OnceLock<Result<String, NoCuda>> = OnceLock::new();
    LOADED.get_or_init(search).as_deref().map_err(Clone::clone)
}

fn search() -> Result<String, NoCuda> {
    let driver = DRIVER.iter().any(|name| open(Path::new(name)).map(std::mem::forget).is_some());
    // SAFETY: opens libcuda by name, which runs its initialisers, as any program of the driver's does.
    if !driver || !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(NoCuda { why: "the NVIDIA driver (libcuda.so.1) is not installed".into() });
    }
    if let Some(folder) = std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty()) {
        let folder = PathBuf::from(folder);
        return match open_all(Some(&folder)) {
            Ok(()) => Ok(folder.display().to_string()),
            Err(missing) => Err(NoCuda { why: format!("{VARIABLE}={} has no {missing}", folder.display()) }),
        };
    }
    let mut missing = match open_all(None) {
        Ok(()) => return Ok("the loader's path".into()),
        Err(missing) => missing,
    };
    let mut folders = vec![PathBuf::from("/usr/local/cuda/lib64")];
    folders.extend(python_wheels());
    for folder in &folders {
        if !folder.is_dir() {
            continue;
        }
        match open_all(Some(folder)) {
            Ok(()) => return Ok(folder.display().to_string()),
            Err(name) => missing = name,
        }
    }
    let tried: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    Err(NoCuda {
        why: format!(
            "there is a driver, but {missing} is neither on the loader's path nor in {}; set {VARIABLE} to its folder",
            tried.join(" nor in ")
        ),
    })
}

const DRIVER: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Opens all libraries of one folder (or of the loader's path) and keeps them open; or none of them, and says which is missing.
fn open_all(folder: Option<&Path>) -> Result<(), String> {
    let place = |name: &str| folder.map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
    let mut opened = Vec::new();
    // nvrtc opens these by name while it compiles.
    if let Some(folder) = folder {
        opened.extend(builtins(folder).iter().filter_map(|path| open(path)));
    }
    for (name, versions, need) in LIBRARIES {
        let found = versions.iter().find_map(|version| open(&place(&format!("{name}.{version}"))));
        if found.is_none() && need == Need::Always {
            return Err(format!("{name}.{}", versions[0]));
        }
        opened.extend(found);
    }
    // Never closed: cudarc holds their functions for the rest of the process.
    opened.into_iter().for_each(std::mem::forget);
    Ok(())
}

fn open(path: &Path) -> Option<Library> {
    // SAFETY: opening a library runs its initialisers; these are NVIDIA's, or what the user put in their place.
    unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_GLOBAL) }.ok()
}

/// `libnvrtc-builtins.so.*` of a folder.
fn builtins(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so"))
        })
        .collect();
    found.sort();
    found
}

/// Where pip puts CUDA 13 for the `python3` on PATH.
fn python_wheels() -> Option<PathBuf> {
    let script = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let output =
        Command::new("python3").args(["-c", script]).output().ok().filter(|run| run.status.success())?;
    let packages = String::from_utf8(output.stdout).ok()?;
    Some(Path::new(packages.trim()).join("nvidia/cu13/lib"))
}

/// Opens nvrtc alone, from this folder: compiling needs neither a driver nor a device.
pub(super) fn load_compiler(folder: &Path) -> Result<(), NoCuda> {
    let mut opened: Vec<Library> = builtins(folder).iter().filter_map(|path| open(path)).collect();
    let (name, versions, _) = LIBRARIES[0];
    let Some(nvrtc) = versions.iter().find_map(|version| open(&folder.join(format!("{name}.{version}"))))
    else {
        return Err(NoCuda { why: format!("{} has no {name}.{}", folder.display(), versions[0]) });
    };
    opened.push(nvrtc);
    opened.into_iter().for_each(std::mem::forget);
    Ok(())
}
