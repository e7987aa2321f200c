//! The files beside the weights: which of them an output needs, and which are left out.
//!
//! The rule is what loaders read, not how a name ends. Carried verbatim are the files that `AutoTokenizer`,
//! `AutoProcessor` and `GenerationConfig` of transformers look for (the lists are those of transformers 4.57 and 5), what
//! mistral-common reads, Python files that a tokenizer or a processor names as its own code, and the licence. So a file
//! that somebody or this tool adds to the folder later changes no output. Everything else is left out and named.

use crate::error::ReadError;
use crate::folder::Folder;
use lowrank_model::format::{CONFIG_FILE, PARAMS_FILE};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

/// Files that a loader looks for by this name.
const READ_BY_LOADERS: [&str; 27] = [
    // GenerationConfig
    "generation_config.json",
    // AutoTokenizer: every class, then the vocabularies of single ones.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "dict.txt",
    "entity_vocab.json",
    "byte_maps.json",
    // AutoProcessor
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    // mistral-common
    "tekken.json",
];

/// Where `AutoTokenizer` and `AutoProcessor` look for named chat templates, `*.jinja`.
const TEMPLATE_FOLDER: &str = "additional_chat_templates";

/// Configs that name Python files by `auto_map`.
const NAME_CODE: [&str; 4] = [
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
];

/// The longest config or Python file that is searched for names of further files.
const TEXT_BYTES_MAX: u64 = 8 << 20;
/// Python files that a tokenizer may name.
const CODE_FILES_MAX: usize = 64;

/// What a LoRA adapter says of itself.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Something in the folder that is neither the model nor carried into an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Its name; a folder's ends with `/`.
    pub name: String,
    /// What it is.
    pub what: LeftOutKind,
}

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOutKind {
    /// A LoRA adapter.
    Adapter,
    /// Weights other than those of this model.
    OtherWeights,
    /// State of an optimiser, a scheduler or a trainer.
    TrainingState,
    /// Python code that no tokenizer names.
    Code,
    /// A folder.
    Folder,
    /// A file that no loader reads.
    ReadByNoLoader,
}

impl fmt::Display for LeftOutKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adapter => "LoRA adapter",
            Self::OtherWeights => "other weights",
            Self::TrainingState => "training state",
            Self::Code => "code that no tokenizer names",
            Self::Folder => "folder",
            Self::ReadByNoLoader => "read by no loader",
        })
    }
}

/// The files beside the weights.
#[derive(Debug)]
pub(crate) struct Beside {
    /// Sorted names, relative to the folder.
    pub(crate) companions: Vec<PathBuf>,
    /// Sorted by name.
    pub(crate) left_out: Vec<LeftOut>,
    /// Whether there is an adapter with its weights, which transformers attaches where peft is installed.
    pub(crate) adapter: bool,
}

/// Sorts all that is in the folder; `is_model` knows the files that hold the weights. A companion that is a link out of
/// the folder is refused like one among the weights, unless it is only a licence; links of other files are not followed.
pub(crate) fn list(folder: &Folder, is_model: &dyn Fn(&str) -> bool) -> Result<Beside, ReadError> {
    let names = folder.names()?;
    let code = code_of_tokenizers(folder)?;
    let mut beside = Beside { companions: Vec::new(), left_out: Vec::new(), adapter: has_adapter(&names) };
    for name in names {
        if is_model(&name) || is_written_anew(&name) || name.starts_with('.') {
            continue;
        }
        if name == TEMPLATE_FOLDER {
            let templates = folder.names_in(TEMPLATE_FOLDER).unwrap_or_default();
            for template in templates.into_iter().filter(|template| template.ends_with(".jinja")) {
                let template = format!("{TEMPLATE_FOLDER}/{template}");
                if is_file(folder, &template)? {
                    beside.companions.push(template.into());
                }
            }
            continue;
        }
        let carried = if is_read_by_loaders(&name) || code.contains(&name) {
            is_file(folder, &name)?
        } else {
            is_licence(&name) && is_file(folder, &name).unwrap_or(false)
        };
        if carried {
            beside.companions.push(name.into());
        } else {
            let what = kind_of(&name, folder.path(&name).is_dir());
            let name = if what == LeftOutKind::Folder { format!("{name}/") } else { name };
            beside.left_out.push(LeftOut { name, what });
        }
    }
    beside.companions.sort();
    Ok(beside)
}

/// Refuses a folder with an adapter and no model.
pub(crate) fn refuse_lone_adapter(folder: &Folder) -> Result<(), ReadError> {
    let names = folder.names()?;
    let has = |name: &str| names.iter().any(|other| other == name);
    if !has(ADAPTER_CONFIG) || has(CONFIG_FILE) || has(PARAMS_FILE) {
        return Ok(());
    }
    let config = folder.read(ADAPTER_CONFIG, TEXT_BYTES_MAX).ok().flatten().unwrap_or_default();
    let config: Value = serde_json::from_slice(&config).unwrap_or_default();
    let base = config.get("base_model_name_or_path").and_then(Value::as_str).map(crate::error::clip);
    Err(ReadError::LoneAdapter { path: folder.path(ADAPTER_CONFIG), base })
}

/// The adapter's config, for messages.
pub(crate) fn adapter_config(folder: &std::path::Path) -> PathBuf {
    folder.join(ADAPTER_CONFIG)
}

fn has_adapter(names: &[String]) -> bool {
    let weights = |name: &String| name.starts_with("adapter_model.");
    names.iter().any(|name| name == ADAPTER_CONFIG) && names.iter().any(weights)
}

/// Whether this is the name of a file to carry; a folder of that name, or nothing, is not.
fn is_file(folder: &Folder, name: &str) -> Result<bool, ReadError> {
    match folder.resolve(name) {
        Ok(found) => Ok(found.is_some()),
        Err(ReadError::NotAFile { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a loader of transformers or mistral-common looks for a file of this name.
pub fn is_read_by_loaders(name: &str) -> bool {
    let versioned = |rest: &str| {
        rest.strip_prefix(".v").is_some_and(|rest| rest.chars().all(|c| c.is_ascii_alphanumeric()))
    };
    READ_BY_LOADERS.contains(&name)
        || name.strip_prefix("tokenizer.model").is_some_and(versioned)
        || (name.starts_with("tokenizer.") && name.ends_with(".json"))
        || name.ends_with(".tiktoken")
        || name
            .strip_prefix(TEMPLATE_FOLDER)
            .is_some_and(|rest| rest.starts_with('/') && rest.ends_with(".jinja"))
}

/// A licence must go wherever the weights go; no loader reads it.
fn is_licence(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let (stem, ending) = lower.split_once('.').unwrap_or((&lower, ""));
    let named = ["license", "licence", "copying", "notice", "use_policy", "acceptable_use_policy"];
    named.iter().any(|begin| stem.starts_with(begin)) && ["", "txt", "md", "rst", "pdf"].contains(&ending)
}

/// What every output writes itself.
fn is_written_anew(name: &str) -> bool {
    [CONFIG_FILE, PARAMS_FILE, "README.md"].contains(&name)
        || name.starts_with("lowrank_")
        || name.starts_with("configuration_lowrank_")
        || name.starts_with("modeling_lowrank_")
}

/// Python files that the configs of tokenizer and processors name, and those that these import from beside them.
fn code_of_tokenizers(folder: &Folder) -> Result<BTreeSet<String>, ReadError> {
    let mut next = Vec::new();
    for config in NAME_CODE {
        let Some(json) = folder.read(config, TEXT_BYTES_MAX).ok().flatten() else { continue };
        let json: Value = serde_json::from_slice(&json).unwrap_or_default();
        let classes =
            json.get("auto_map").and_then(Value::as_object).into_iter().flat_map(|map| map.values());
        for class in classes.flat_map(|class| match class {
            Value::Array(classes) => classes.iter().collect(),
            class => vec![class],
        }) {
            // `org/name--module.Class` lies elsewhere.
            let class = class.as_str().filter(|class| !class.contains("--"));
            next.extend(class.and_then(|class| class.rsplit_once('.')).map(|(module, _)| module.to_owned()));
        }
    }
    let mut code = BTreeSet::new();
    while let Some(module) = next.pop() {
        let file = format!("{module}.py");
        let plain = module.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !plain || is_written_anew(&file) || code.len() == CODE_FILES_MAX || code.contains(&file) {
            continue;
        }
        let Some(text) = folder.read(&file, TEXT_BYTES_MAX)? else { continue };
        next.extend(String::from_utf8_lossy(&text).lines().filter_map(imported).map(str::to_owned));
        code.insert(file);
    }
    Ok(code)
}

/// The module that a line of Python imports from beside its file: `from .module import …`.
fn imported(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let rest = line.strip_prefix("from").or_else(|| line.strip_prefix("import"))?;
    rest.trim_start().strip_prefix('.')?.split_whitespace().next()
}

fn kind_of(name: &str, is_folder: bool) -> LeftOutKind {
    let lower = name.to_ascii_lowercase();
    let ending = lower.rsplit_once('.').map_or("", |(_, ending)| ending);
    let begins = |begins: &[&str]| begins.iter().any(|begin| lower.starts_with(begin));
    if is_folder {
        LeftOutKind::Folder
    } else if begins(&["adapter_"]) {
        LeftOutKind::Adapter
    } else if begins(&[
        "optimizer.",
        "scheduler.",
        "scaler.",
        "rng_state",
        "trainer_state",
        "training_args",
        "events.out",
    ]) {
        LeftOutKind::TrainingState
    } else if ["py", "pyc"].contains(&ending) {
        LeftOutKind::Code
    } else if lower.ends_with(".index.json") || WEIGHTS.contains(&ending) {
        LeftOutKind::OtherWeights
    } else {
        LeftOutKind::ReadByNoLoader
    }
}

/// Endings of files that hold weights.
const WEIGHTS: [&str; 16] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "onnx",
    "onnx_data",
    "h5",
    "msgpack",
    "npz",
    "tflite",
    "ot",
    "mlmodel",
    "nemo",
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// What becomes of a folder with these files, of which none holds the weights.
    fn sorted(files: &[(&str, &str)]) -> (Vec<String>, Vec<(String, LeftOutKind)>) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let beside = list(&Folder::open(dir.path()).unwrap(), &|_| false).unwrap();
        let companions = beside.companions.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
        (companions, beside.left_out.into_iter().map(|LeftOut { name, what }| (name, what)).collect())
    }

    #[test]
    fn what_loaders_read_is_carried_and_what_they_do_not_read_is_named() {
        let carried = [
            "LICENSE",
            "NOTICE.txt",
            "USE_POLICY.md",
            "added_tokens.json",
            "additional_chat_templates/rag.jinja",
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "chat_template.json",
            "generation_config.json",
            "preprocessor_config.json",
            "qwen.tiktoken",
            "special_tokens_map.json",
            "tekken.json",
            "tokenizer.4.0.0.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "tokenizer_config.json",
            "vocab.txt",
        ];
        let left_out = [
            ("2024.report.html", LeftOutKind::ReadByNoLoader),
            ("adapter_config.json", LeftOutKind::Adapter),
            ("calibration.jsonl", LeftOutKind::ReadByNoLoader),
            ("consolidated.00.pth", LeftOutKind::OtherWeights),
            ("imatrix.dat", LeftOutKind::ReadByNoLoader),
            ("modeling_other.py", LeftOutKind::Code),
            ("optimizer.pt", LeftOutKind::TrainingState),
            ("original/", LeftOutKind::Folder),
            ("out.verification.json", LeftOutKind::ReadByNoLoader),
            ("plan.json", LeftOutKind::ReadByNoLoader),
            ("pytorch_model.bin.index.json", LeftOutKind::OtherWeights),
            ("rng_state_0.pth", LeftOutKind::TrainingState),
            ("train.log", LeftOutKind::ReadByNoLoader),
            ("trainer_state.json", LeftOutKind::TrainingState),
        ];
        let anew = [
            "config.json",
            "README.md",
            "lowrank_report.json",
            ".gitattributes",
            "modeling_lowrank_mixtral.py",
        ];
        let mut files: Vec<(&str, &str)> = carried.iter().chain(&anew).map(|name| (*name, "")).collect();
        files.extend(
            left_out
                .iter()
                .map(|(name, _)| (name.strip_suffix('/').map_or(*name, |_| "original/params.json"), "")),
        );
        files.push(("additional_chat_templates/notes.txt", ""));
        let (companions, named) = sorted(&files);
        assert_eq!(companions, carried);
        assert_eq!(named, left_out.map(|(name, what)| (name.to_owned(), what)));
    }

    #[test]
    fn a_tokenizers_own_code_comes_along_and_no_other() {
        let config = r#"{"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", null], "AutoProcessor": "org/other--processing_y.Y"}}"#;
        let (companions, named) = sorted(&[
            ("tokenizer_config.json", config),
            (
                "tokenization_x.py",
                "import json\nfrom .words import split\n  from .absent import z\nfrom .. import a\n",
            ),
            ("words.py", "from .tokenization_x import XTokenizer\nfrom ..evil import b\n"),
            ("processing_y.py", ""),
            ("modeling_x.py", ""),
        ]);
        assert_eq!(companions, ["tokenization_x.py", "tokenizer_config.json", "words.py"]);
        let code = |name: &str| (name.to_owned(), LeftOutKind::Code);
        assert_eq!(named, [code("modeling_x.py"), code("processing_y.py")]);
    }

    #[test]
    fn links_are_followed_where_loaders_would_follow_them_and_nowhere_else() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let open = || list(&Folder::open(dir.path()).unwrap(), &|_| false);
        symlink("/nowhere/imatrix.dat", dir.path().join("imatrix.dat")).unwrap();
        symlink(elsewhere.path(), dir.path().join("notes.md")).unwrap();
        symlink(elsewhere.path(), dir.path().join("LICENSE")).unwrap();
        symlink("runs", dir.path().join("runs")).unwrap();
        let beside = open().unwrap();
        assert!(beside.companions.is_empty(), "{beside:?}");
        let names: Vec<_> = beside.left_out.iter().map(|left| left.name.as_str()).collect();
        assert_eq!(names, ["LICENSE", "imatrix.dat", "notes.md", "runs"]);
        symlink(elsewhere.path(), dir.path().join("tokenizer.model")).unwrap();
        assert!(matches!(open(), Err(ReadError::LeavesFolder { .. })));
    }

    #[test]
    fn an_adapter_is_recognised_with_its_weights_and_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = || Folder::open(dir.path()).unwrap();
        let adapter = || list(&folder(), &|_| false).unwrap().adapter;
        refuse_lone_adapter(&folder()).unwrap();
        fs::write(dir.path().join("adapter_config.json"), r#"{"base_model_name_or_path": "org/base"}"#)
            .unwrap();
        assert!(!adapter());
        let refused = refuse_lone_adapter(&folder()).unwrap_err().to_string();
        assert!(refused.contains("org/base") && refused.contains("merge"), "{refused}");
        fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(adapter());
        refuse_lone_adapter(&folder()).unwrap();
    }
}
