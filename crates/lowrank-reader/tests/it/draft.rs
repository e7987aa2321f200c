//! Writes tiny checkpoints of every layout, and lets a test bend them first.
//!
//! Names and packing are spelled out here a second time, on purpose: the reader's tables are what is tested.

use lowrank_model::{Dtype, Layout, ModelConfig, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tempfile::TempDir;

pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SHARD_1: &str = "model-00001-of-00002.safetensors";
pub(crate) const SHARD_2: &str = "model-00002-of-00002.safetensors";
pub(crate) const W1: &str = "model.layers.0.block_sparse_moe.experts.0.w1";

/// A tensor as it will stand in a header, honest or not.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint that is not yet on disk.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    /// Texts by file name: config, companions.
    pub(crate) texts: BTreeMap<String, String>,
    /// Tensors by shard.
    pub(crate) shards: BTreeMap<String, Vec<Raw>>,
    /// (tensor, shard); empty: no index is written.
    pub(crate) index: Vec<(String, String)>,
    /// File name of the index.
    pub(crate) index_file: &'static str,
}

/// Random weights under canonical names.
#[derive(Debug, Clone)]
pub(crate) struct Weights {
    pub(crate) config: ModelConfig,
    pub(crate) dtype: Dtype,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

pub(crate) fn tiny_config() -> ModelConfig {
    ModelConfig::from_hf_json(&json!({
        "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_local_experts": 3, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 16,
    }))
    .unwrap()
}

/// Reproducible values in −1..1 (splitmix64).
pub(crate) fn random_values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

pub(crate) fn random_tensor(seed: u64, shape: &[usize], dtype: Dtype) -> Tensor {
    let values = random_values(seed, shape.iter().product());
    Tensor::from_f32(shape.to_vec(), dtype, &values).unwrap()
}

impl Weights {
    pub(crate) fn random(config: ModelConfig, dtype: Dtype, seed: u64) -> Self {
        let (h, f, e, d) =
            (config.hidden_size, config.intermediate_size, config.num_local_experts, config.head_dim);
        let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let mut shapes = BTreeMap::new();
        shapes.insert("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, h]);
        shapes.insert("model.norm.weight".to_owned(), vec![h]);
        if !config.tie_word_embeddings {
            shapes.insert("lm_head.weight".to_owned(), vec![config.vocab_size, h]);
        }
        for layer in 0..config.num_hidden_layers {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.insert(format!("model.layers.{layer}.{name}.weight"), shape.to_vec());
            };
            add("input_layernorm", &[h]);
            add("post_attention_layernorm", &[h]);
            add("self_attn.q_proj", &[q, h]);
            add("self_attn.k_proj", &[kv, h]);
            add("self_attn.v_proj", &[kv, h]);
            add("self_attn.o_proj", &[h, q]);
            add("block_sparse_moe.gate", &[e, h]);
            for expert in 0..e {
                add(&format!("block_sparse_moe.experts.{expert}.w1"), &[f, h]);
                add(&format!("block_sparse_moe.experts.{expert}.w2"), &[h, f]);
                add(&format!("block_sparse_moe.experts.{expert}.w3"), &[f, h]);
            }
        }
        let tensor = |(at, (name, shape)): (usize, (String, Vec<usize>))| {
            (name, random_tensor(seed ^ ((at as u64) << 32), &shape, dtype))
        };
        let tensors = shapes.into_iter().enumerate().map(tensor).collect();
        Self { config, dtype, tensors }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        self.tensors[name].bytes()
    }

    /// Stored names and bytes in a layout of dense matrices.
    pub(crate) fn stored(&self, layout: Layout) -> Vec<Raw> {
        match layout {
            Layout::HfPerExpert | Layout::LowRank | Layout::Minixtral => {
                self.tensors.iter().map(|(name, tensor)| Raw::new(name, tensor)).collect()
            }
            Layout::HfFused => self.fused(),
            Layout::Consolidated => self.consolidated(),
        }
    }

    fn fused(&self) -> Vec<Raw> {
        let (h, f, e) =
            (self.config.hidden_size, self.config.intermediate_size, self.config.num_local_experts);
        let mut stored = Vec::new();
        for (name, tensor) in &self.tensors {
            if !name.contains(".experts.") {
                stored.push(Raw::new(&name.replace("block_sparse_moe.gate", "mlp.gate"), tensor));
            }
        }
        for layer in 0..self.config.num_hidden_layers {
            let (mut gate_up, mut down) = (Vec::new(), Vec::new());
            for expert in 0..e {
                let matrix = |w: &str| {
                    self.bytes(&format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"))
                };
                gate_up.extend_from_slice(matrix("w1"));
                gate_up.extend_from_slice(matrix("w3"));
                down.extend_from_slice(matrix("w2"));
            }
            let experts = format!("model.layers.{layer}.mlp.experts");
            let gate_up = Tensor::new(vec![e, 2 * f, h], self.dtype, gate_up).unwrap();
            let down = Tensor::new(vec![e, h, f], self.dtype, down).unwrap();
            stored.push(Raw::new(&format!("{experts}.gate_up_proj"), &gate_up));
            stored.push(Raw::new(&format!("{experts}.down_proj"), &down));
        }
        stored
    }

    fn consolidated(&self) -> Vec<Raw> {
        let rename = |name: &str| {
            name.replace("model.layers", "layers")
                .replace("self_attn.q_proj", "attention.wq")
                .replace("self_attn.k_proj", "attention.wk")
                .replace("self_attn.v_proj", "attention.wv")
                .replace("self_attn.o_proj", "attention.wo")
                .replace("post_attention_layernorm", "ffn_norm")
                .replace("input_layernorm", "attention_norm")
                .replace("block_sparse_moe", "feed_forward")
                .replace("model.embed_tokens", "tok_embeddings")
                .replace("model.norm", "norm")
                .replace("lm_head", "output")
        };
        let stored = |(name, tensor): (&String, &Tensor)| {
            let mut raw = Raw::new(&rename(name), tensor);
            if name.contains("q_proj") || name.contains("k_proj") {
                raw.bytes = interleave(tensor, self.config.head_dim);
            }
            raw
        };
        self.tensors.iter().map(stored).collect()
    }
}

/// Row r of a stored head is canonical row (r mod 2)·d/2 + ⌊r/2⌋.
fn interleave(tensor: &Tensor, head_dim: usize) -> Vec<u8> {
    let row_bytes = tensor.bytes().len() / tensor.shape()[0];
    let row = |at: usize| {
        let (head, r) = (at / head_dim, at % head_dim);
        let canonical = head * head_dim + (r % 2) * (head_dim / 2) + r / 2;
        &tensor.bytes()[canonical * row_bytes..(canonical + 1) * row_bytes]
    };
    (0..tensor.shape()[0]).flat_map(row).copied().collect()
}

impl Raw {
    pub(crate) fn new(name: &str, tensor: &Tensor) -> Self {
        Self {
            name: name.into(),
            dtype: tensor.dtype().safetensors_name().into(),
            shape: tensor.shape().to_vec(),
            bytes: tensor.bytes().to_vec(),
        }
    }
}

impl Draft {
    /// An honest checkpoint of the tiny model, in two shards with an index.
    pub(crate) fn of(layout: Layout) -> Self {
        Self::from_weights(&Weights::random(tiny_config(), Dtype::Bf16, 1), layout)
    }

    pub(crate) fn from_weights(weights: &Weights, layout: Layout) -> Self {
        let (config_file, json, index_file, names) = match layout {
            Layout::Consolidated => (
                "params.json",
                params_json(&weights.config),
                "consolidated.safetensors.index.json",
                ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"],
            ),
            _ => ("config.json", weights.config.to_hf_json(), INDEX, [SHARD_1, SHARD_2]),
        };
        let mut draft = Self {
            texts: BTreeMap::from([(config_file.into(), json.to_string())]),
            shards: BTreeMap::new(),
            index: Vec::new(),
            index_file,
        };
        let stored = weights.stored(layout);
        let half = stored.len() / 2;
        for (at, raw) in stored.into_iter().enumerate() {
            draft.add(names[usize::from(at >= half)], raw);
        }
        match layout {
            Layout::LowRank => draft.edit_config(|config| {
                config["model_type"] = json!("lowrank_mixtral");
                config["lowrank_config"] =
                    json!({"format": "lowrank-compress", "format_version": 1, "ranks": {}});
            }),
            Layout::Minixtral => draft.edit_config(|config| config["ranks"] = json!({})),
            _ => {}
        }
        draft
    }

    /// The tiny model with w1 of the first expert stored as factors of rank 3.
    pub(crate) fn factored(layout: Layout) -> (Self, Tensor, Tensor) {
        let mut draft = Self::of(layout);
        let (u, v) = (random_tensor(7, &[12, 3], Dtype::Bf16), random_tensor(8, &[3, 8], Dtype::Bf16));
        draft.remove(&format!("{W1}.weight"));
        let (u_name, v_name) = if layout == Layout::LowRank { ("u", "v") } else { ("1", "0") };
        draft.add(SHARD_1, Raw::new(&format!("{W1}.{u_name}.weight"), &u));
        draft.add(SHARD_2, Raw::new(&format!("{W1}.{v_name}.weight"), &v));
        draft.edit_config(|config| ranks(config)[W1] = json!(3));
        (draft, u, v)
    }

    /// The tiny model with w1 [12, 8] of the first expert stored by three pivot columns.
    pub(crate) fn pivoted(order: [i64; 8]) -> (Self, Tensor, Tensor) {
        let mut draft = Self::of(Layout::LowRank);
        let (basis, table) =
            (random_tensor(7, &[12, 3], Dtype::Bf16), random_tensor(8, &[3, 5], Dtype::Bf16));
        draft.remove(&format!("{W1}.weight"));
        draft.add(SHARD_1, Raw::new(&format!("{W1}.basis.weight"), &basis));
        draft.add(SHARD_2, Raw::new(&format!("{W1}.coefficients.weight"), &table));
        let bytes = order.iter().flat_map(|index| index.to_le_bytes()).collect();
        let order = Raw { name: format!("{W1}.order"), dtype: "I64".into(), shape: vec![8], bytes };
        draft.add(SHARD_2, order);
        draft.edit_config(|config| {
            ranks(config)[W1] = json!(3);
            config["lowrank_config"]["storage"] = json!("pivoted");
        });
        (draft, basis, table)
    }

    /// Adds a tensor to a shard and to the index.
    pub(crate) fn add(&mut self, shard: &str, raw: Raw) {
        self.index.push((raw.name.clone(), shard.into()));
        self.shards.entry(shard.into()).or_default().push(raw);
    }

    /// Takes a tensor out of its shard and of the index; returns it.
    pub(crate) fn remove(&mut self, name: &str) -> Raw {
        self.index.retain(|(tensor, _)| tensor != name);
        let mut removed = None;
        for tensors in self.shards.values_mut() {
            if let Some(at) = tensors.iter().position(|raw| raw.name == name) {
                removed = Some(tensors.remove(at));
            }
        }
        removed.unwrap_or_else(|| panic!("the draft has no {name}"))
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Raw {
        let mut all = self.shards.values_mut().flatten();
        all.find(|raw| raw.name == name).unwrap_or_else(|| panic!("the draft has no {name}"))
    }

    pub(crate) fn edit_config(&mut self, edit: impl FnOnce(&mut Value)) {
        let (_, text) = self.texts.iter_mut().find(|(name, _)| name.ends_with(".json")).unwrap();
        let mut json = serde_json::from_str(text).unwrap();
        edit(&mut json);
        *text = json.to_string();
    }

    pub(crate) fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write_to(folder.path());
        folder
    }

    pub(crate) fn write_to(&self, folder: &std::path::Path) {
        for (name, text) in &self.texts {
            std::fs::write(folder.join(name), text).unwrap();
        }
        for (name, tensors) in &self.shards {
            std::fs::write(folder.join(name), shard_bytes(tensors)).unwrap();
        }
        if !self.index.is_empty() {
            // By hand: a map could not name a tensor twice.
            let pairs: Vec<String> =
                self.index.iter().map(|(t, s)| format!("{}:{}", json!(t), json!(s))).collect();
            let text = format!(r#"{{"metadata":{{"total_size":0}},"weight_map":{{{}}}}}"#, pairs.join(","));
            std::fs::write(folder.join(self.index_file), text).unwrap();
        }
    }
}

/// The rank map of either factored layout.
pub(crate) fn ranks(config: &mut Value) -> &mut Value {
    if config.get("ranks").is_some() { &mut config["ranks"] } else { &mut config["lowrank_config"]["ranks"] }
}

/// A shard whose header says what the tensors say.
pub(crate) fn shard_bytes(tensors: &[Raw]) -> Vec<u8> {
    let mut entries = vec![r#""__metadata__":{"format":"pt"}"#.to_owned()];
    let mut data = Vec::new();
    for raw in tensors {
        let (begin, end) = (data.len(), data.len() + raw.bytes.len());
        let entry = json!({"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [begin, end]});
        entries.push(format!("{}:{entry}", json!(raw.name)));
        data.extend_from_slice(&raw.bytes);
    }
    with_header(&format!("{{{}}}", entries.join(",")), &data)
}

/// Any text as a header before any data.
pub(crate) fn with_header(json: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn params_json(config: &ModelConfig) -> Value {
    json!({
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta, "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "moe": {"num_experts_per_tok": config.num_experts_per_tok, "num_experts": config.num_local_experts},
    })
}

/// Opens a draft that must be refused with this variant, and whose one-line message must hold these parts.
macro_rules! assert_refused {
    ($draft:expr, $variant:pat, $($part:expr),+ $(,)?) => {{
        let folder = $draft.write();
        assert_refused!(in folder.path(), $variant, $($part),+)
    }};
    (in $dir:expr, $variant:pat, $($part:expr),+ $(,)?) => {{
        let error = lowrank_reader::Checkpoint::open($dir).expect_err("the lie was believed");
        let message = lowrank_model::failure::chain(&error);
        assert!(matches!(error, $variant), "{error:?}");
        for part in [$(AsRef::<str>::as_ref(&$part)),+] {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
        assert!(!message.contains('\n'), "{message}");
    }};
}
pub(crate) use assert_refused;
