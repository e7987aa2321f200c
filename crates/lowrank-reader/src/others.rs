//! What people bring that is recognised, and is not a model this program reads: other formats of weights, and tensors of
//! other heads, adapters and wrappers. An error says what is there before it says what is missing.

use crate::error::ReadError;
use crate::folder::Folder;
use lowrank_model::names::Role;
use lowrank_model::{Layout, ModelConfig};

/// What a file of another format is, and how its weights become safetensors.
type Format = (&'static str, &'static str);

const PICKLE: Format = (
    "PyTorch weights (pickle)",
    "load the model in transformers and save it with `save_pretrained`, which writes safetensors",
);
const GGUF: Format = ("weights in llama.cpp's format", "give the original safetensors weights");
const OTHER: Format = (
    "weights of another format",
    "save the model with transformers' `save_pretrained`, which writes safetensors",
);
const SHARDED_TRAINER: Format = (
    "part of a trainer's sharded checkpoint",
    "merge it first (`zero_to_fp32.py` of DeepSpeed, `accelerate merge-weights` of FSDP) and give the merged folder",
);

/// Which other format a file of this name has.
fn format_of(name: &str) -> Option<Format> {
    let lower = name.to_ascii_lowercase();
    if lower.starts_with("zero_pp_rank_") || lower.starts_with("mp_rank_") || lower.ends_with(".distcp") {
        return Some(SHARDED_TRAINER);
    }
    // Of a trainer, beside weights or alone: no weights of a model.
    if ["optimizer.", "scheduler.", "scaler.", "rng_state", "training_args", "adapter_model."]
        .iter()
        .any(|begin| lower.starts_with(begin))
    {
        return None;
    }
    let (_, ending) = lower.rsplit_once('.')?;
    match ending {
        "bin" | "pt" | "pth" => Some(PICKLE),
        "gguf" | "ggml" => Some(GGUF),
        "ckpt" | "onnx" | "h5" | "msgpack" | "npz" | "tflite" | "ot" | "mlmodel" => Some(OTHER),
        _ => None,
    }
}

/// The error for a file that weights were expected in, if its name says that it is of another format.
pub(crate) fn refuse_format(folder: &Folder, name: &str) -> Result<(), ReadError> {
    match format_of(name) {
        None => Ok(()),
        Some((what, advice)) => Err(ReadError::OtherFormat { path: folder.path(name), what, advice }),
    }
}

/// The same by the first bytes of a file that cannot be safetensors, whatever its name.
pub(crate) fn refuse_magic(path: &std::path::Path, first: [u8; 8]) -> Result<(), ReadError> {
    let (what, advice) = match &first {
        [b'P', b'K', 3, 4, ..] => PICKLE,
        [b'G', b'G', b'U', b'F', ..] => GGUF,
        [0x89, b'H', b'D', b'F', ..] => OTHER,
        b"version " => return Err(ReadError::LfsPointer { path: path.into() }),
        [b'<', ..] if first.is_ascii() => return Err(ReadError::WebPage { path: path.into() }),
        [b'{', second, ..] if first.is_ascii() && b"\"\n\r ".contains(second) => {
            return Err(ReadError::WebPage { path: path.into() });
        }
        _ => return Ok(()),
    };
    Err(ReadError::OtherFormat { path: path.into(), what, advice })
}

/// Why a folder has no weights under the names that a loader looks for: other formats, or what lies there instead.
pub(crate) fn instead_of_weights(folder: &Folder, names: &[String], expected: &'static str) -> ReadError {
    if let Some(index) = names.iter().find(|name| name.ends_with(".bin.index.json")) {
        let (what, advice) = PICKLE;
        return ReadError::OtherFormat { path: folder.path(index), what, advice };
    }
    if let Some(error) = names.iter().find_map(|name| refuse_format(folder, name).err()) {
        return error;
    }
    let weights: Vec<String> = names
        .iter()
        .filter(|name| name.ends_with(".safetensors") && !name.starts_with("adapter_"))
        .map(|name| format!("`{name}`"))
        .collect();
    let found = match weights.as_slice() {
        [] => folder_within(folder, names, |name| name.ends_with(".safetensors"))
            .map_or_else(String::new, |inner| format!("; the folder `{inner}` has some: give that one")),
        [one] => format!("; there is {one}, which no loader looks for: rename it if it is the model"),
        [first, ..] => {
            format!("; there are {} files such as {first}, which no loader looks for", weights.len())
        }
    };
    ReadError::NoWeights { dir: folder.dir().into(), expected, found }
}

/// Why a folder has no description of a model.
pub(crate) fn instead_of_config(folder: &Folder) -> ReadError {
    let names = match folder.names() {
        Ok(names) => names,
        Err(error) => return error,
    };
    let has_safetensors = names.iter().any(|name| name.ends_with(".safetensors"));
    let other = names.iter().find_map(|name| refuse_format(folder, name).err());
    if let Some(error) = other.filter(|_| !has_safetensors) {
        return error;
    }
    let found = if has_safetensors {
        "; there are weights: copy the config.json of the model beside them".to_owned()
    } else {
        folder_within(folder, &names, |name| name == "config.json")
            .map_or_else(String::new, |inner| format!("; the folder `{inner}` has one: give that one"))
    };
    ReadError::NoConfig { dir: folder.dir().into(), found }
}

/// The last folder inside this one that holds a file which is asked for: of `checkpoint-500` and `-1000`, the later.
fn folder_within(folder: &Folder, names: &[String], is_asked: impl Fn(&str) -> bool) -> Option<String> {
    let number = |name: &str| {
        let digits = name.rsplit_once(|c: char| !c.is_ascii_digit()).map_or(name, |(_, digits)| digits);
        digits.parse::<u64>().unwrap_or(0)
    };
    let mut inner: Vec<&String> = names
        .iter()
        .filter(|name| !name.starts_with('.') && folder.path(name).is_dir())
        .filter(|name| folder.names_in(name).is_ok_and(|within| within.iter().any(|name| is_asked(name))))
        .collect();
    inner.sort_by_key(|name| number(name));
    inner.last().map(|name| crate::error::clip(name))
}

/// Endings that downloaders give to, or put beside, a file that is not complete.
const UNFINISHED: [&str; 5] = [".aria2", ".incomplete", ".part", ".crdownload", ".tmp"];

/// Refuses a shard that a downloader has not finished: its bytes may be there in full, as zeros.
pub(crate) fn refuse_unfinished(folder: &Folder, names: &[String], shard: &str) -> Result<(), ReadError> {
    let unfinished = UNFINISHED.iter().map(|ending| format!("{shard}{ending}"));
    match unfinished.into_iter().find(|name| names.contains(name)) {
        None => Ok(()),
        Some(name) => Err(ReadError::Unfinished { path: folder.path(&name), shard: shard.into() }),
    }
}

/// What a tensor is that no language model of the family has.
pub(crate) fn what_is(tensor: &str, config: &ModelConfig) -> Option<String> {
    let class = config.family.output().dense_architecture();
    let begins = |begins: &[&str]| {
        begins.iter().any(|begin| {
            tensor
                .strip_prefix(begin)
                .or_else(|| tensor.strip_prefix("model.")?.strip_prefix(begin))
                .is_some()
        })
    };
    let of_part = |parts: &[&str]| tensor.split('.').any(|part| parts.contains(&part));
    if of_part(&[
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "base_layer",
        "lora_magnitude_vector",
    ]) {
        return Some(
            "belongs to a LoRA adapter that is not merged; merge it first (peft: `merge_and_unload`)".into(),
        );
    }
    if begins(&["v_head.", "value_head.", "score.", "reward_head.", "regression_head.", "rm_head."]) {
        return Some(format!(
            "belongs to a value or reward head, which `{class}` does not have; give the language model without it"
        ));
    }
    if begins(&["classifier.", "classification_head.", "qa_outputs."]) {
        return Some(format!("belongs to a classifier, which `{class}` does not have"));
    }
    if begins(&["mtp.", "mtp_", "medusa_head", "eagle", "draft_model."]) {
        return Some(format!(
            "belongs to a head that predicts further tokens, which `{class}` does not have; remove it from the weights"
        ));
    }
    if begins(&["vision_tower.", "vision_model.", "multi_modal_projector.", "vision_encoder.", "visual."]) {
        return Some(format!("belongs to a model of images, which `{class}` is not"));
    }
    None
}

/// What stands before every name of a checkpoint whose model was saved inside of something else, seen by one tensor that
/// is missing under its own name; `names` are those of the checkpoint.
pub(crate) fn what_renames<'a>(
    missing: &str,
    mut names: impl Iterator<Item = &'a String> + Clone,
    layout: Layout,
    config: &ModelConfig,
) -> Option<(&'a String, String)> {
    let is_whole = |before: &str| before.is_empty() || before.ends_with('.');
    let prefixed = names.clone().find_map(|name| {
        let before = name.strip_suffix(missing).filter(|before| !before.is_empty() && is_whole(before))?;
        Some((name, before))
    });
    if let Some((name, before)) = prefixed {
        let by = match before {
            "_orig_mod." => "as torch.compile leaves it",
            "module." => "as DataParallel leaves it",
            "base_model.model." | "base_model." => "as peft leaves it",
            _ => "which is a part of another model or was saved inside a wrapper",
        };
        let what =
            format!("has `{before}` before its name, {by}; save the inner model with `save_pretrained`");
        return Some((name, what));
    }
    let bare = names.clone().find(|name| {
        missing.strip_suffix(name.as_str()).is_some_and(|before| !before.is_empty() && is_whole(before))
    });
    if let Some(name) = bare {
        let class = config.family.output().dense_architecture();
        let what = format!(
            "lacks `{}` before its name, as a model without its head is saved; save the whole `{class}`",
            missing.strip_suffix(name.as_str()).unwrap_or_default()
        );
        return Some((name, what));
    }
    let (own, other, config_file) = if layout == Layout::Consolidated {
        (Layout::Consolidated, Layout::HfPerExpert, "the config.json")
    } else {
        (layout, Layout::Consolidated, "the params.json alone")
    };
    let spelled = |layout| config.locate(layout, Role::Embedding).tensor;
    let other = spelled(other);
    if spelled(own) == missing
        && let Some(name) = names.find(|name| **name == other)
    {
        let what = format!(
            "is spelled as in another format than the model's description; give {config_file} of these weights"
        );
        return Some((name, what));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Layout::{Consolidated, HfPerExpert};

    fn config() -> ModelConfig {
        ModelConfig::from_hf_json(&serde_json::json!({"model_type": "mixtral"})).unwrap()
    }

    #[test]
    fn formats_are_told_by_names_and_training_state_is_no_format() {
        for name in
            ["pytorch_model.bin", "consolidated.00.pth", "Mixtral.Q4_K_M.GGUF", "tf_model.h5", "mp_rank_00"]
        {
            assert!(format_of(name).is_some(), "{name}");
        }
        for name in
            ["optimizer.pt", "training_args.bin", "adapter_model.bin", "tokenizer.model", "bin", "a.txt"]
        {
            assert!(format_of(name).is_none(), "{name}");
        }
    }

    #[test]
    fn parts_of_other_models_are_told_by_their_names() {
        for (name, word) in [
            ("v_head.summary.weight", "value"),
            ("score.weight", "reward"),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA"),
            ("mtp.fc.weight", "further tokens"),
            ("vision_tower.patch.weight", "images"),
        ] {
            let what = what_is(name, &config());
            assert!(what.as_ref().is_some_and(|what| what.contains(word)), "{name}: {what:?}");
        }
        for name in ["model.layers.0.self_attn.q_proj.bias", "model.layers.99.mlp.gate.weight", "scores", "x"]
        {
            assert_eq!(what_is(name, &config()), None, "{name}");
        }
    }

    #[test]
    fn wrappers_are_told_by_one_tensor() {
        let missing = "model.embed_tokens.weight";
        for (layout, missing, stored, word) in [
            (HfPerExpert, missing, "_orig_mod.model.embed_tokens.weight", "torch.compile"),
            (HfPerExpert, missing, "base_model.model.model.embed_tokens.weight", "peft"),
            (HfPerExpert, missing, "model.model.embed_tokens.weight", "`model.`"),
            (HfPerExpert, missing, "embed_tokens.weight", "lacks `model.`"),
            (HfPerExpert, missing, "tok_embeddings.weight", "params.json"),
            (Consolidated, "tok_embeddings.weight", missing, "config.json"),
        ] {
            let names = ["lm_head.weight".to_owned(), stored.to_owned()];
            let (name, what) = what_renames(missing, names.iter(), layout, &config()).expect(stored);
            assert!(name == stored && what.contains(word), "{stored}: {what}");
        }
        let names = ["xmodel.embed_tokens.weight".to_owned(), "lm_head.weight".to_owned()];
        assert_eq!(what_renames(missing, names.iter(), HfPerExpert, &config()), None);
    }
}
