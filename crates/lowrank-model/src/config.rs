//! What a model is: its dimensions, its block, and the family that spells it ([`Family`]).
//!
//! A family reads the description (`config.json`, `params.json`); every number is checked once, by it and by
//! `ModelConfig::checked`, so that no other crate meets a zero, a huge value or a missing key.

use crate::block::{Block, ExpertGroups, SharedExperts};
use crate::display::clip;
use crate::names::{Role, Spelling, known_buffer};
use crate::rules::Keys;
use crate::widths::expert_shape;
use crate::{ErrorKind, MatrixId, MatrixShape, Projection, Rotation, SHARED_EXPERT, Widths};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Why a model description was refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// The text is not a JSON object.
    #[error("is not a JSON object: {0}")]
    NotJson(String),
    /// `model_type` names something this tool does not know.
    #[error("unknown family: `model_type` is `{found}`{}; known: {known}", shown(architecture))]
    UnknownFamily {
        /// In the file.
        found: String,
        /// The class that the file names, if any.
        architecture: Option<String>,
        /// Every known `model_type`.
        known: String,
    },
    /// A key the model needs is absent.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A key has a value that cannot be.
    #[error("`{key}` is {value}, expected {expected}")]
    Bad {
        /// The key.
        key: String,
        /// What was found.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A value that is right elsewhere, and that nothing here computes.
    #[error("`{key}` is {value}, which this program does not support; it supports {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// What was found.
        value: String,
        /// What would have been accepted.
        supported: String,
    },
    /// Keys that may change what the model computes, for all that is known here.
    #[error(
        "{0}: unknown to this program, which cannot tell whether the model computes something else with it; remove what changes nothing"
    )]
    UnknownKeys(String),
    /// Makers' own description of a model without experts.
    #[error("describes a dense model: there is no `moe`, so no experts to compress")]
    NoExperts,
    /// Weights are quantised.
    #[error(
        "the checkpoint is quantised ({0}); give f32, f16 or bf16 weights, or fp8 with a scale for each block"
    )]
    Quantised(String),
}

impl ConfigError {
    /// A value of the wrong type, or out of range.
    pub(crate) fn bad(key: &str, value: &Value, expected: &'static str) -> Self {
        Self::Bad { key: key.into(), value: value.to_string(), expected }
    }

    /// A value that is right elsewhere.
    pub(crate) fn unsupported(key: &str, value: &Value, supported: &str) -> Self {
        Self::Unsupported { key: key.into(), value: value.to_string(), supported: supported.into() }
    }

    /// The same, with its keys inside an object.
    pub(crate) fn inside(self, object: &str) -> Self {
        match self {
            Self::Bad { key, value, expected } => {
                Self::Bad { key: format!("{object}.{key}"), value, expected }
            }
            Self::Unsupported { key, value, supported } => {
                Self::Unsupported { key: format!("{object}.{key}"), value, supported }
            }
            Self::UnknownKeys(keys) => Self::UnknownKeys(format!("{keys} in `{object}`")),
            other => other,
        }
    }

    /// The same, with every text that a file brought on one short line.
    #[must_use]
    pub fn printable(self) -> Self {
        match self {
            Self::NotJson(text) => Self::NotJson(clip(&text)),
            Self::UnknownFamily { found, architecture, known } => Self::UnknownFamily {
                found: clip(&found),
                architecture: architecture.map(|class| clip(&class)),
                known,
            },
            Self::Bad { key, value, expected } => {
                Self::Bad { key: clip(&key), value: clip(&value), expected }
            }
            Self::Unsupported { key, value, supported } => {
                Self::Unsupported { key: clip(&key), value: clip(&value), supported }
            }
            Self::UnknownKeys(keys) => Self::UnknownKeys(clip(&keys)),
            Self::Quantised(method) => Self::Quantised(clip(&method)),
            Self::Missing(_) | Self::NoExperts => self,
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownFamily { .. }
            | Self::Unsupported { .. }
            | Self::UnknownKeys(_)
            | Self::NoExperts
            | Self::Quantised(_) => ErrorKind::Unsupported,
            Self::NotJson(_) | Self::Missing(_) | Self::Bad { .. } => ErrorKind::BrokenCheckpoint,
        }
    }
}

fn shown(architecture: &Option<String>) -> String {
    architecture.as_ref().map_or_else(String::new, |class| format!(" (`{class}`)"))
}

/// A family of models: everything that is known of it by name. One file a family, below `family/`.
pub trait Family: fmt::Debug + Sync {
    /// Its `model_type` in `config.json`.
    fn model_type(&self) -> &'static str;

    /// What people call it.
    fn title(&self) -> &'static str;

    /// How transformers v4 spells its tensors; our own output too.
    fn spelling(&self) -> &'static Spelling;

    /// What its makers call a tensor in `consolidated*.safetensors`; `None` if they publish no such files.
    fn consolidated_name(&self, _role: Role) -> Option<String> {
        None
    }

    /// Whether a `config.json` is of this family though its `model_type` is nobody's.
    fn claims(&self, _config: &Value) -> bool {
        false
    }

    /// Every key that its `config.json` may have.
    fn config_keys(&self) -> Vec<Keys>;

    /// Every key that its makers' own `params.json` may have; none if they publish no such file.
    fn params_keys(&self) -> Vec<Keys> {
        Vec::new()
    }

    /// Reads `config.json`. The caller has checked `model_type`.
    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError>;

    /// Reads its makers' own `params.json`; `None` if the file is not of this family.
    fn read_params(&'static self, _params: &Value) -> Option<Result<ModelConfig, ConfigError>> {
        None
    }

    /// Classes of Python code beside the weights, as `auto_map` names them, that compute what transformers' own class does.
    fn makers_code(&self) -> &'static [&'static str] {
        &[]
    }

    /// The `config.json` of a model, for inputs that have none: those with a `params.json` alone.
    fn write_config(&self, _config: &ModelConfig) -> Value {
        Value::Null
    }

    /// Keys that an output's `config.json` has beside the base's, for versions of transformers that read others.
    fn also_written(&self, _config: &ModelConfig) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// How its output is written.
    fn output(&self) -> &'static Output;
}

impl PartialEq for dyn Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type() == other.model_type()
    }
}

/// What an output's `config.json` names, and what its Python code has to know.
#[derive(Debug)]
pub struct Output {
    /// `model_type` of a factored checkpoint. Not the family's own: a loader without our code must fail, not fill the
    /// experts with random numbers.
    pub model_type: &'static str,
    /// How the names of transformers' classes begin: `Olmoe` of `OlmoeForCausalLM`.
    pub class: &'static str,
    /// The key of `config.json` that says how wide an expert is inside.
    pub width_key: &'static str,
}

impl Output {
    /// `architectures[0]` of a dense checkpoint.
    pub fn dense_architecture(&self) -> String {
        format!("{}ForCausalLM", self.class)
    }

    /// `architectures[0]` of a factored checkpoint.
    pub fn architecture(&self) -> String {
        format!("LowRank{}ForCausalLM", self.class)
    }

    /// `auto_map` of a factored checkpoint. In this order: vLLM asks for `AutoModel`.
    pub fn auto_map(&self) -> [(&'static str, String); 4] {
        let Self { model_type, class, .. } = self;
        [
            ("AutoConfig", format!("configuration_{model_type}.LowRank{class}Config")),
            ("AutoModel", format!("modeling_{model_type}.LowRank{class}Model")),
            ("AutoModelForCausalLM", format!("modeling_{model_type}.LowRank{class}ForCausalLM")),
            (
                "AutoModelForSequenceClassification",
                format!("modeling_{model_type}.LowRank{class}ForSequenceClassification"),
            ),
        ]
    }
}

/// Dimensions and constants of a model. Shapes: `H` hidden_size, `F` intermediate_size, `E` num_local_experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which family it is of.
    pub family: &'static dyn Family,
    /// What its layers compute.
    pub block: Block,
    /// H, the width of the residual stream.
    pub hidden_size: usize,
    /// F, the inner width of an expert.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// E, experts of a layer that has experts.
    pub num_local_experts: usize,
    /// k, experts per token.
    pub num_experts_per_tok: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// ε inside the norms, of whichever kind.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Share of a head, from its first entry on, that turns with its position; `None` in families that turn all of it.
    pub partial_rotary_factor: Option<f64>,
    /// Its angles and amplitudes.
    pub rotation: Rotation,
    /// Attention window in tokens, if limited.
    pub sliding_window: Option<usize>,
    /// lm_head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// A bias is added to the logits.
    pub head_bias: bool,
    /// Largest size of a number in queries, keys and values, before their rotation; larger ones are cut to it.
    pub clip_qkv: Option<f64>,
    /// Layers behind the last that predict later tokens. Their tensors may be in the files; they are no part of the model.
    pub prediction_layers: usize,
    /// Rows and columns of the blocks that share a scale, where weights may be fp8: they are read as bf16.
    pub fp8_blocks: Option<[usize; 2]>,
    /// Experts that have fewer than F channels. Its config does not say: a factored checkpoint's own metadata does.
    pub widths: Widths,
    /// Layers whose experts share a base: there a factored matrix is the base plus its factors.
    pub shared_bases: BTreeSet<usize>,
    /// The matrices of shared experts are compressed as those of routed ones are.
    pub compresses_shared_experts: bool,
}

impl ModelConfig {
    /// The Hugging Face `config.json` of this model, for inputs that have none.
    pub fn to_hf_json(&self) -> Value {
        self.family.write_config(self)
    }

    /// Everything that the forward pass depends on beside the weights, by name, in words. Left out is what a compression
    /// changes: widths, shared bases, layers behind the last, and how weights are stored.
    pub fn constants(&self) -> Vec<(&'static str, String)> {
        // A new field does not compile until it is here.
        let Self {
            family,
            block,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_local_experts,
            num_experts_per_tok,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            max_position_embeddings,
            rms_norm_eps,
            rope_theta,
            partial_rotary_factor,
            rotation,
            sliding_window,
            tie_word_embeddings,
            head_bias,
            clip_qkv,
            prediction_layers: _,
            fp8_blocks: _,
            widths: _,
            shared_bases: _,
            compresses_shared_experts: _,
        } = self;
        let Block {
            router,
            activation,
            shared_experts,
            moe_layers,
            attention,
            query_key_norm,
            attention_bias,
            norm,
        } = block;
        let with_experts: Vec<usize> =
            (0..*num_hidden_layers).filter(|&layer| moe_layers.contains(layer)).collect();
        let shown = |value: &dyn fmt::Debug| format!("{value:?}");
        vec![
            ("family", family.title().to_owned()),
            ("router", shown(router)),
            ("activation", shown(activation)),
            ("shared_experts", shown(shared_experts)),
            ("layers with experts", shown(&with_experts)),
            ("attention", shown(attention)),
            ("query_key_norm", shown(query_key_norm)),
            ("attention_bias", shown(attention_bias)),
            ("norm", shown(norm)),
            ("hidden_size", shown(hidden_size)),
            ("intermediate_size", shown(intermediate_size)),
            ("num_hidden_layers", shown(num_hidden_layers)),
            ("num_local_experts", shown(num_local_experts)),
            ("num_experts_per_tok", shown(num_experts_per_tok)),
            ("num_attention_heads", shown(num_attention_heads)),
            ("num_key_value_heads", shown(num_key_value_heads)),
            ("head_dim", shown(head_dim)),
            ("vocab_size", shown(vocab_size)),
            ("max_position_embeddings", shown(max_position_embeddings)),
            ("rms_norm_eps", shown(rms_norm_eps)),
            ("rope_theta", shown(rope_theta)),
            ("partial_rotary_factor", shown(partial_rotary_factor)),
            ("rotation", shown(rotation)),
            ("sliding_window", shown(sliding_window)),
            ("tie_word_embeddings", shown(tie_word_embeddings)),
            ("head_bias", shown(head_bias)),
            ("clip_qkv", shown(clip_qkv)),
        ]
    }

    /// Every matrix that is compressed, in stored order: those of routed experts, and those of shared ones if they are, too.
    pub fn matrices(&self) -> impl Iterator<Item = MatrixId> + use<> {
        let (layers, moe_layers) = (self.num_hidden_layers, self.block.moe_layers);
        let experts = self.experts_of_each();
        (0..layers).filter(move |&layer| moe_layers.contains(layer)).flat_map(move |layer| {
            experts.clone().flat_map(move |expert| {
                Projection::ALL.into_iter().map(move |projection| MatrixId { layer, expert, projection })
            })
        })
    }

    /// The experts of a layer whose matrices are compressed: E routed ones, then the shared one if it is, too. None in a layer
    /// without experts.
    pub fn compressed_experts(&self, layer: usize) -> impl Iterator<Item = usize> + use<> {
        let has_some = self.block.moe_layers.contains(layer);
        self.experts_of_each().filter(move |_| has_some)
    }

    /// How many these are in a layer that has some.
    pub fn compressed_experts_per_layer(&self) -> usize {
        self.experts_of_each().count()
    }

    fn experts_of_each(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        (0..self.num_local_experts).chain(self.compresses_shared_experts.then_some(SHARED_EXPERT))
    }

    /// The same model with its shared experts among what is compressed, if it has some and they shall be.
    #[must_use]
    pub fn with_shared_experts(&self, compressed: bool) -> Self {
        let has_some = self.block.shared_experts != SharedExperts::None;
        Self { compresses_shared_experts: compressed && has_some, ..self.clone() }
    }

    /// The first expert matrix: every model that is read has one.
    pub fn first_matrix(&self) -> MatrixId {
        self.matrices().next().expect("a family refuses models without experts")
    }

    /// Routed experts of one layer: E, or 0.
    pub fn experts_in(&self, layer: usize) -> usize {
        if self.block.moe_layers.contains(layer) { self.num_local_experts } else { 0 }
    }

    /// Whether the model has this expert matrix.
    pub fn has(&self, id: MatrixId) -> bool {
        id.layer < self.num_hidden_layers
            && self.block.moe_layers.contains(id.layer)
            && (id.expert < self.num_local_experts || (id.is_shared() && self.compresses_shared_experts))
    }

    /// Shape of an expert matrix, out × in.
    pub fn matrix_shape(&self, id: MatrixId) -> MatrixShape {
        let width = match id.is_shared() {
            true => self.block.shared_experts.width(),
            false => self.widths.of(id.layer, id.expert).unwrap_or(self.intermediate_size),
        };
        expert_shape(id.projection, width, self.hidden_size)
    }

    /// The same model with experts of other widths.
    #[must_use]
    pub fn with_widths(&self, widths: Widths) -> Self {
        Self { widths, ..self.clone() }
    }

    /// The same model with a base that the experts of these layers share.
    #[must_use]
    pub fn with_shared_bases(&self, layers: impl IntoIterator<Item = usize>) -> Self {
        Self { shared_bases: layers.into_iter().collect(), ..self.clone() }
    }

    /// Whether a factored matrix is the base of its layer plus its factors.
    pub fn has_base(&self, id: MatrixId) -> bool {
        self.shared_bases.contains(&id.layer) && !id.is_shared()
    }

    /// Shape of a projection's matrices, out × in, of routed experts with all channels: that of a shared base.
    pub fn full_shape(&self, projection: Projection) -> MatrixShape {
        expert_shape(projection, self.intermediate_size, self.hidden_size)
    }

    /// What its checkpoint calls an expert matrix: the module's canonical name.
    pub fn module_name(&self, id: MatrixId) -> String {
        self.family.spelling().module(id)
    }

    /// What its checkpoint calls every routed expert: layer and expert by name.
    pub fn expert_names(&self) -> BTreeMap<String, (usize, usize)> {
        let gates = self.matrices().filter(|id| id.projection == Projection::Gate && !id.is_shared());
        let spelling = self.family.spelling();
        gates.map(|id| (spelling.expert(id.layer, id.expert), (id.layer, id.expert))).collect()
    }

    /// What people call a projection: its own name, and what it is. `w1 (gate)`.
    pub fn projection_title(&self, projection: Projection) -> String {
        format!("{} ({projection})", self.family.spelling().projections[projection.index()])
    }

    /// The expert matrix of this model that has a module name.
    pub fn matrix_named(&self, module: &str) -> Option<MatrixId> {
        self.family.spelling().parse_module(module).filter(|&id| self.has(id))
    }

    /// Entries of a head that turn with its position.
    pub fn rotary_dim(&self) -> usize {
        // Cut, as `int(head_dim * factor)` of transformers does.
        self.partial_rotary_factor.map_or(self.head_dim, |factor| (self.head_dim as f64 * factor) as usize)
    }

    /// Why a tensor of the files that is none of [`ModelConfig::tensors`] can be left out; `None` if it may be a weight.
    pub fn leaves_out(&self, tensor: &str) -> Option<&'static str> {
        let layer = || tensor.strip_prefix("model.layers.")?.split_once('.')?.0.parse::<usize>().ok();
        let behind = self.num_hidden_layers..self.num_hidden_layers + self.prediction_layers;
        if self.prediction_layers > 0 && layer().is_some_and(|layer| behind.contains(&layer)) {
            return Some("of a layer that predicts later tokens, which no output has");
        }
        known_buffer(tensor)
    }

    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(ConfigError::Bad {
                key: "num_key_value_heads".into(),
                value: self.num_key_value_heads.to_string(),
                expected: "a divisor of `num_attention_heads`",
            });
        }
        if self.num_experts_per_tok > self.num_local_experts {
            return Err(ConfigError::Bad {
                key: "num_experts_per_tok".into(),
                value: self.num_experts_per_tok.to_string(),
                expected: "at most `num_local_experts`",
            });
        }
        // Sizes stay exact in u64 from here on: no weight above 2^40 elements, no more than 2^16 experts in all.
        const ELEMENTS_MAX: u128 = 1 << 40;
        const EXPERTS_MAX: u128 = SHARED_EXPERT as u128;
        let parts = self.block.attention.parts().iter();
        let heads_width = parts.map(|&part| self.attention_shape(part)[0] as u128).max().unwrap_or(0);
        for (key, width) in [
            ("intermediate_size", self.intermediate_size as u128),
            ("vocab_size", self.vocab_size as u128),
            ("num_attention_heads", heads_width),
            ("num_local_experts", self.num_local_experts as u128),
        ] {
            if width * self.hidden_size as u128 > ELEMENTS_MAX {
                let (value, expected) = (width.to_string(), "a weight of at most 2^40 elements");
                return Err(ConfigError::Bad { key: key.into(), value, expected });
            }
        }
        if self.num_hidden_layers as u128 * self.num_local_experts as u128 > EXPERTS_MAX {
            return Err(ConfigError::Bad {
                key: "num_local_experts".into(),
                value: format!("{} in {} layers", self.num_local_experts, self.num_hidden_layers),
                expected: "at most 65536 experts in all",
            });
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::Bad {
                key: "head_dim".into(),
                value: self.head_dim.to_string(),
                expected: "an even number (rotary embedding pairs its halves)",
            });
        }
        let turning = self.rotary_dim();
        if turning == 0 || !turning.is_multiple_of(2) {
            return Err(ConfigError::Bad {
                key: "partial_rotary_factor".into(),
                value: format!("{} of a head of {}", turning, self.head_dim),
                expected: "an even number of entries that turn",
            });
        }
        self.check_router()?;
        Ok(self)
    }

    /// Groups are alike and have as many experts as they score by, and those that are chosen have as many as a token takes.
    fn check_router(&self) -> Result<(), ConfigError> {
        let ExpertGroups { count, chosen, scored_by } = self.block.router.groups;
        let bad = |key: &str, value: usize, expected| {
            Err(ConfigError::Bad { key: key.into(), value: value.to_string(), expected })
        };
        if !self.num_local_experts.is_multiple_of(count) || self.num_local_experts / count < scored_by {
            let expected = match scored_by {
                1 => "a divisor of the number of experts",
                _ => "a divisor of the number of experts, with at least two in a group",
            };
            return bad("n_group", count, expected);
        }
        if chosen > count || self.num_local_experts / count * chosen < self.num_experts_per_tok {
            return bad(
                "topk_group",
                chosen,
                "at most `n_group`, with at least `num_experts_per_tok` experts in all",
            );
        }
        Ok(())
    }
}
