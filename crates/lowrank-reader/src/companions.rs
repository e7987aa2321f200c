//! The files that belong to a model besides its weights: tokenizer, chat template, generation config, licence.
//!
//! They are copied verbatim. Left out is what the output writes itself (config, index, model card, report), every kind
//! of weights, Python code (it belongs to the class of the input), hidden files, folders, and names that are not UTF-8.

use crate::error::ReadError;
use crate::folder::Folder;
use lowrank_model::format::{CONFIG_FILE, PARAMS_FILE};
use std::path::{Path, PathBuf};

/// Endings of files that hold weights or run as code.
const ENDINGS_LEFT_OUT: [&str; 22] = [
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
    "hdf5",
    "msgpack",
    "npz",
    "npy",
    "pkl",
    "pickle",
    "tflite",
    "ot",
    "mlmodel",
    "nemo",
    "py",
    "pyc",
];

/// Sorted names, relative to the folder. A link out of the folder is refused like one among the weights.
pub(crate) fn list(folder: &Folder) -> Result<Vec<PathBuf>, ReadError> {
    let mut companions = Vec::new();
    for name in folder.names()? {
        if !is_companion(&name) {
            continue;
        }
        match folder.resolve(&name) {
            Ok(Some(_)) => companions.push(name.into()),
            // A folder, or gone since it was listed.
            Ok(None) | Err(ReadError::NotAFile { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(companions)
}

fn is_companion(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let ending = Path::new(&lower).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    !(name.starts_with('.')
        || ENDINGS_LEFT_OUT.contains(&ending)
        || lower.ends_with(".index.json")
        || lower == CONFIG_FILE
        || lower == PARAMS_FILE
        || lower == "readme.md"
        || lower.starts_with("lowrank_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_is_a_companion_and_weights_are_not() {
        for name in [
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "tokenizer_config.json",
            "tekken.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "generation_config.json",
            "LICENSE",
            "USE_POLICY.md",
        ] {
            assert!(is_companion(name), "{name}");
        }
        for name in [
            "config.json",
            "params.json",
            "README.md",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "consolidated.00.pt",
            "model.GGUF",
            ".gitattributes",
            "lowrank_report.json",
            "modeling_lowrank_mixtral.py",
            "configuration_minixtral.py",
        ] {
            assert!(!is_companion(name), "{name}");
        }
    }
}
