//! Running the tool, and copies of the bundled model to break.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The bundled model.
pub(crate) fn tiny_mixtral() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral")
}

/// Result of a run of the tool.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The run succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }

    /// The run failed with this code and one `error:` line that holds all of `parts`.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:#?}");
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "one line, please: {self:#?}");
        assert_eq!(self.stderr.lines().last(), errors.last().copied(), "the error comes last: {self:#?}");
        for part in parts {
            assert!(errors[0].contains(part), "`{part}` is not in `{}`", errors[0]);
        }
    }

    /// stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// Few calibration tokens, because most tests are not about calibration.
pub(crate) const FEW_TOKENS: [&str; 2] = ["--calibration-tokens", "4096"];

/// The arguments of a job, with few calibration tokens unless they set calibration themselves.
pub(crate) fn brief<'a>(words: &[&'a str]) -> Vec<&'a str> {
    let few: &[&str] =
        if words.iter().any(|word| word.starts_with("--calibrat")) { &[] } else { &FEW_TOKENS };
    [words, few].concat()
}

/// The tool, with a cache that is empty when the tests start and that only they use.
pub(crate) fn tool() -> Command {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    let cache = CACHE.get_or_init(|| {
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        let _ = std::fs::remove_dir_all(&cache);
        // Done once for all tests, which would otherwise all do it at the same time.
        let mut first = Command::new(env!("CARGO_BIN_EXE_lowrank-compress"));
        first
            .args(["plan", "--quiet", "--budget", "20%"])
            .args(FEW_TOKENS)
            .arg("--model")
            .arg(tiny_mixtral());
        first.arg("--plan-out").arg(cache.with_extension("json")).env("XDG_CACHE_HOME", &cache);
        assert!(first.status().expect("the tool starts").success());
        cache
    });
    let mut tool = Command::new(env!("CARGO_BIN_EXE_lowrank-compress"));
    tool.env("XDG_CACHE_HOME", cache);
    tool
}

/// Runs `lowrank-compress` with these arguments.
pub(crate) fn run<I: AsRef<std::ffi::OsStr>>(words: impl IntoIterator<Item = I>) -> Outcome {
    outcome(tool().args(words))
}

/// Runs a command of the tool.
pub(crate) fn outcome(tool: &mut Command) -> Outcome {
    let output = tool.output().expect("the tool starts");
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

/// Runs with a model, an output and further arguments.
pub(crate) fn compress(model: &Path, out: &Path, words: &[&str]) -> Outcome {
    let start = ["--model".as_ref(), model.as_os_str(), "--out".as_ref(), out.as_os_str()];
    run(start.into_iter().chain(brief(words).into_iter().map(AsRef::as_ref)))
}

/// A copy of the bundled model that a test may break.
pub(crate) fn copy_of_model(folder: &tempfile::TempDir) -> PathBuf {
    let to = folder.path().join("model");
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(tiny_mixtral()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to
}

/// The index of the bundled model.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The shard that holds a tensor.
pub(crate) fn shard_of(model: &Path, tensor: &str) -> PathBuf {
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model.join(INDEX)).unwrap()).unwrap();
    model.join(index["weight_map"][tensor].as_str().unwrap())
}

/// Sets every number of a 16-bit tensor.
pub(crate) fn poison_all(model: &Path, tensor: &str, bits: u16) {
    let path = shard_of(model, tensor);
    let mut bytes = std::fs::read(&path).unwrap();
    let range = data_range(&bytes, tensor);
    bytes[range].chunks_mut(2).for_each(|number| number.copy_from_slice(&bits.to_le_bytes()));
    std::fs::write(path, bytes).unwrap();
}

/// Every file of a directory, by relative name.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// A JSON document of an output.
pub(crate) fn document(out: &Path, name: &str) -> serde_json::Value {
    serde_json::from_slice(&files(out)[name]).unwrap()
}

/// As a word of a command line.
pub(crate) fn word(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Every tensor of a checkpoint: name → (dtype, shape, bytes), decoded by the safetensors crate.
pub(crate) fn tensors(dir: &Path) -> BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for (name, bytes) in files(dir) {
        if !name.ends_with(".safetensors") {
            continue;
        }
        for (tensor, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
            let entry = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            assert!(all.insert(tensor.to_owned(), entry).is_none(), "{tensor} twice");
        }
    }
    all
}

/// Edits a JSON file in place.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// Byte range of a tensor's data in a shard.
pub(crate) fn data_range(shard: &[u8], tensor: &str) -> std::ops::Range<usize> {
    let header_bytes = u64::from_le_bytes(shard[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&shard[8..8 + header_bytes]).unwrap();
    let offsets = &header[tensor]["data_offsets"];
    let at = |index: usize| 8 + header_bytes + offsets[index].as_u64().unwrap() as usize;
    at(0)..at(1)
}

/// Replaces text of the same length in a shard's header: offsets stay right.
pub(crate) fn edit_header(shard: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(shard).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + header_bytes].to_vec()).unwrap();
    assert!(header.contains(from), "{from}");
    bytes[8..8 + header_bytes].copy_from_slice(header.replacen(from, to, 1).as_bytes());
    std::fs::write(shard, bytes).unwrap();
}
