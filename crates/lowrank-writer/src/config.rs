//! `config.json` of factored and of dense output, made from the base's.
//!
//! Every key of the base is kept, in its order: the reader refused those that nobody here knows. What changes is what
//! loaders dispatch on.

use crate::WriteError;
use lowrank_model::config::ConfigError;
use lowrank_model::names::Role;
use lowrank_model::{Dtype, MatrixId, ModelConfig, Rotation, Storage, format};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Keys that are rewritten, or that must not survive: `_name_or_path` is a path of somebody's machine, `ranks` is
/// minixtral's flat rank map.
const REPLACED: [&str; 12] = [
    "architectures",
    "model_type",
    "auto_map",
    "torch_dtype",
    "dtype",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "_name_or_path",
    QUANTIZATION_KEY,
    "ranks",
    format::CONFIG_KEY,
];

const QUANTIZATION_KEY: &str = "quantization_config";
/// Modules that are not fp8, of `quantization_config`.
const NOT_FP8_KEY: &str = "modules_to_not_convert";

/// What a config is made from.
#[derive(Debug, Clone)]
pub struct ConfigOf<'a> {
    /// The base's.
    pub base: &'a Value,
    /// The dtype that is stated.
    pub dtype: StatedDtype,
    /// Where the output has tensors as fp8: its modules outside the experts that are not.
    pub fp8: Option<Vec<String>>,
}

impl<'a> ConfigOf<'a> {
    /// Of an output without fp8.
    pub fn new(base: &'a Value, dtype: StatedDtype) -> Self {
        Self { base, dtype, fp8: None }
    }

    /// How weights are quantised: the base's statement, without the experts and what else is not fp8.
    fn quantization(&self, model: &ModelConfig) -> Option<Value> {
        let mut stated = self.base.get(QUANTIZATION_KEY)?.clone();
        let experts = model.matrices().map(|id| {
            let expert = model.family.spelling().expert(id.layer, id.expert);
            let module = expert.rsplit_once('.').filter(|_| !id.is_shared());
            module.map_or(expert.clone(), |(experts, _)| experts.to_owned())
        });
        // A head that is the embedding has no tensor, and is no fp8 module either.
        let head = model.tensor(Role::Head).name;
        let head = head.strip_suffix(".weight").map(str::to_owned).filter(|_| model.tie_word_embeddings);
        let known = stated.get(NOT_FP8_KEY).and_then(Value::as_array).into_iter().flatten();
        let known = known.filter_map(Value::as_str).map(str::to_owned);
        let all: BTreeSet<String> =
            self.fp8.iter().flatten().cloned().chain(head).chain(experts).chain(known).collect();
        stated[NOT_FP8_KEY] = json!(all);
        Some(stated)
    }
}

/// The dtype that a config states. Loaders convert every weight to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatedDtype {
    /// This one.
    Asked(Dtype),
    /// The base's own statement. A base that states none gets this one, if there is one.
    OfBase(Option<Dtype>),
}

impl StatedDtype {
    /// Both keys, each as the base has it. transformers v4 reads `torch_dtype`, v5 reads `dtype`, so one that the base lacks
    /// gets the value of the other.
    fn keys(self, base: &Map<String, Value>) -> Vec<(String, Value)> {
        let named = |dtype: Dtype| Value::from(dtype.torch_name());
        let of_base = |key: &str| base.get(key).filter(|value| !value.is_null()).cloned();
        let value = |key: &str, other: &str| match self {
            Self::Asked(dtype) => Some(named(dtype)),
            Self::OfBase(silent) => of_base(key).or_else(|| of_base(other)).or(silent.map(named)),
        };
        let keys = [("torch_dtype", "dtype"), ("dtype", "torch_dtype")];
        keys.into_iter().filter_map(|(key, other)| Some((key.to_owned(), value(key, other)?))).collect()
    }
}

/// The config of a factored checkpoint: `model_type` of its own, `auto_map`, ranks. `model` has the widths and shared bases that
/// are stored.
pub fn factored(
    of: ConfigOf<'_>,
    model: &ModelConfig,
    ranks: &BTreeMap<MatrixId, usize>,
    storage: Storage,
) -> Result<Value, WriteError> {
    let output = model.family.output();
    let auto_map: Map<String, Value> =
        output.auto_map().map(|(key, class)| (key.to_owned(), Value::from(class))).into_iter().collect();
    let (architectures, model_type) = ([output.architecture()], output.model_type);
    let head = json!({ "architectures": architectures, "model_type": model_type, "auto_map": auto_map });
    let mut config = carry_over(of, model, head)?;
    let ranks: Map<String, Value> =
        ranks.iter().map(|(id, &rank)| (model.module_name(*id), Value::from(rank))).collect();
    let has = format::Has {
        widths: !model.widths.is_empty(),
        shared_bases: !model.shared_bases.is_empty(),
        shared_experts: model.compresses_shared_experts,
    };
    let mut lowrank = json!({
        "format": format::FORMAT,
        "format_version": has.version(),
        "storage": storage,
        "ranks": ranks,
    });
    if has.widths {
        let spelling = model.family.spelling();
        let widths =
            model.widths.iter().map(|(layer, expert, width)| (spelling.expert(layer, expert), width.into()));
        lowrank["widths"] = Value::Object(widths.collect());
    }
    if has.shared_bases {
        lowrank[format::SHARED_BASES_KEY] = json!(model.shared_bases);
    }
    if has.shared_experts {
        lowrank[format::SHARED_EXPERTS_KEY] = true.into();
    }
    config.insert(format::CONFIG_KEY.into(), lowrank);
    Ok(config.into())
}

/// The config of a dense model of the family: any trace of factors is gone.
pub fn dense(of: ConfigOf<'_>, model: &ModelConfig) -> Result<Value, WriteError> {
    let head = json!({
        "architectures": [model.family.output().dense_architecture()],
        "model_type": model.family.model_type(),
    });
    Ok(carry_over(of, model, head)?.into())
}

/// The config of a dense model whose experts all have `width` channels.
pub fn narrow(of: ConfigOf<'_>, model: &ModelConfig, width: usize) -> Result<Value, WriteError> {
    let mut config = dense(of, model)?;
    config[model.family.output().width_key] = width.into();
    Ok(config)
}

fn carry_over(of: ConfigOf<'_>, model: &ModelConfig, head: Value) -> Result<Map<String, Value>, WriteError> {
    let (Value::Object(mut config), Some(base)) = (head, of.base.as_object()) else {
        return Err(ConfigError::NotJson("top level".into()).into());
    };
    for (key, value) in base.iter().filter(|(key, _)| !REPLACED.contains(&key.as_str())) {
        config.insert(key.clone(), value.clone());
    }
    for (key, value) in model.family.also_written(model) {
        config.insert(key.into(), value);
    }
    // transformers v4 reads `torch_dtype` and `rope_theta`, v5 reads `dtype` and `rope_parameters`; a version that finds
    // only the other's key silently takes a default.
    config.extend(of.dtype.keys(base));
    if let Some(stated) = of.fp8.as_ref().and_then(|_| of.quantization(model)) {
        config.insert(QUANTIZATION_KEY.into(), stated);
    }
    config.insert("rope_theta".into(), model.rope_theta.into());
    let mut rotation = model.rotation.to_json();
    if model.rotation != Rotation::Plain {
        config.insert("rope_scaling".into(), rotation.clone());
    }
    rotation["rope_theta"] = model.rope_theta.into();
    if let Some(factor) = model.partial_rotary_factor {
        config.insert("partial_rotary_factor".into(), factor.into());
        rotation["partial_rotary_factor"] = factor.into();
    }
    config.insert("rope_parameters".into(), rotation);
    Ok(config)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use lowrank_model::Projection;

    pub(crate) fn base() -> Value {
        json!({
            "_name_or_path": "/home/someone/model",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_local_experts": 2,
            "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
            "model_type": "mixtral", "dtype": "bfloat16", "task_specific_params": [1, 2],
            "rope_parameters": { "rope_theta": 5e5, "rope_type": "default" },
        })
    }

    fn model() -> ModelConfig {
        ModelConfig::from_hf_json(&base()).unwrap()
    }

    fn ranks() -> BTreeMap<MatrixId, usize> {
        BTreeMap::from([(MatrixId { layer: 0, expert: 1, projection: Projection::Down }, 3)])
    }

    const BF16: StatedDtype = StatedDtype::Asked(Dtype::Bf16);

    #[test]
    fn the_dtype_is_the_one_of_the_base_unless_another_is_asked_for() {
        let of = |torch_dtype: Value, dtype: Value, stated: StatedDtype| {
            let mut base = base();
            (base["torch_dtype"], base["dtype"]) = (torch_dtype, dtype);
            let config = dense(ConfigOf::new(&base, stated), &model()).unwrap();
            [&config["torch_dtype"], &config["dtype"]].map(|value| value.as_str().map(str::to_owned))
        };
        let both = |one: &str, other: &str| [Some(one.to_owned()), Some(other.to_owned())];
        let (none, f16) = (Value::Null, StatedDtype::OfBase(Some(Dtype::F16)));
        assert_eq!(of("float32".into(), none.clone(), f16), both("float32", "float32"));
        assert_eq!(of(none.clone(), "float32".into(), f16), both("float32", "float32"));
        assert_eq!(of("float32".into(), "bfloat16".into(), f16), both("float32", "bfloat16"));
        assert_eq!(of("float32".into(), "bfloat16".into(), BF16), both("bfloat16", "bfloat16"));
        assert_eq!(of(none.clone(), none.clone(), f16), both("float16", "float16"));
        assert_eq!(of(none.clone(), none, StatedDtype::OfBase(None)), [None, None]);
    }

    #[test]
    fn a_factored_config_dispatches_to_its_own_code_and_keeps_the_rest() {
        let config = factored(ConfigOf::new(&base(), BF16), &model(), &ranks(), Storage::Uv).unwrap();
        assert_eq!(config["model_type"], "lowrank_mixtral");
        assert_eq!(config["task_specific_params"], json!([1, 2]));
        assert_eq!(config["torch_dtype"], config["dtype"]);
        assert_eq!(config["rope_theta"], 5e5);
        assert_eq!(
            config["lowrank_config"],
            json!({
                "format": "lowrank-compress", "format_version": 1, "storage": "uv",
                "ranks": { "model.layers.0.block_sparse_moe.experts.1.w2": 3 },
            })
        );
        let auto: Vec<&str> = config["auto_map"].as_object().unwrap().keys().map(String::as_str).collect();
        let asked = ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"];
        assert_eq!(auto, asked);
        assert!(config.get("_name_or_path").is_none());
        assert_eq!(ModelConfig::from_hf_json(&config), ModelConfig::from_hf_json(&base()));
    }

    #[test]
    fn densifying_undoes_factoring() {
        let factored = factored(ConfigOf::new(&base(), BF16), &model(), &ranks(), Storage::Uv).unwrap();
        let undone = dense(ConfigOf::new(&factored, BF16), &model()).unwrap();
        assert_eq!(undone, dense(ConfigOf::new(&base(), BF16), &model()).unwrap());
        assert_eq!(undone["architectures"], json!(["MixtralForCausalLM"]));
        for key in ["lowrank_config", "auto_map", "ranks"] {
            assert!(undone.get(key).is_none(), "{key}");
        }
    }

    #[test]
    fn a_base_that_is_no_object_is_refused() {
        assert!(dense(ConfigOf::new(&json!([]), BF16), &model()).is_err());
    }
}
