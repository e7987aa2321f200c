#!/usr/bin/env python3
"""Does our forward pass read every key of a config as transformers does?

    check_configs.py --program target/release/config_logits [--compress target/release/lowrank-compress]
    check_configs.py --program target/release/config_logits --edits N [--seed S] [--stricter]

Without --edits: a table. Every key that the program accepts, with every kind of value that it accepts, is one small random
checkpoint, whose logits must be those of the transformers installed here; so must those of the config that an output would
carry. params.json is compared with the model that mistral-inference builds of it, spelled as a config of transformers.

With --edits N: N random edits of a config (keys deleted, null, of another value or type, unknown, inside rope_parameters;
one to four at once). The outcome is a refusal in one line, or equal logits. Where transformers refuses and we do not, the
reason must be one of RECORDED. --stricter also counts what we refuse and transformers loads.

With --only FAMILY: the table or the edits of one family.

Ends with `N passed, N failed`; the exit status is 1 if any failed.
"""

import argparse
import collections
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

TOLERANCE = 1e-4
MAJOR = int(transformers.__version__.split(".")[0])
ABSENT = object()
PARAMETERS_MAX = 30_000_000
THETA = 500000.0  # no default

# What transformers refuses to load and we read, and why that is right.
RECORDED = [
    (5, r"expected (float|int|bool|str|list|None|.*\|)", "transformers 5 checks the type of a key that changes no logit; 4.57 loads it"),
    (5, r"strides should be multiple of 16 bytes", "the grouped products of transformers 5 need widths of whole 16 bytes; 4.57 runs it"),
    (5, r"divisible by 2", "DeepSeek-V2 takes pairs of f32 entries for complex numbers, which needs even widths; in bf16 it runs"),
    (4, r"divisible by 2", "DeepSeek-V2 takes pairs of f32 entries for complex numbers, which needs even widths; in bf16 it runs"),
    (4, r"'NoneType' object has no attribute 'to_dict'", "4.57 fails where `quantization_config` is null; 5 takes it for absent"),
    (4, r"KeyError: 'factor'", "4.57 needs `factor` in the `rope_scaling` of latent attention; 5 takes the default rotation"),
    (4, r"short_mscale field must be a number", "4.57 needs the amplitudes of Phi-MoE in any `rope_scaling`; 5 takes the default rotation"),
    (4, r"KeyError: None|'rope_type'='None'", "4.57 needs `rope_type` in `rope_scaling`; 5 takes the default rotation"),
]

# Dimensions of the families, and what their layers have that others have not.
MIXTRAL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_local_experts=4, num_experts_per_tok=2, vocab_size=64,
)
OLMOE = dict(
    hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
    num_experts_per_tok=2, vocab_size=64, norm_topk_prob=False, clip_qkv=None, attention_bias=False,
)
QWEN2 = dict(
    hidden_size=32, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=36, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=64, norm_topk_prob=False,
    decoder_sparse_step=1, mlp_only_layers=[],
)
QWEN3 = dict(
    hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=64, norm_topk_prob=True,
    decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False,
)
GLM4 = dict(
    hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, num_experts_per_tok=2,
    first_k_dense_replace=0, routed_scaling_factor=1.5, norm_topk_prob=True, use_qk_norm=False, attention_bias=False,
    vocab_size=64,
)
DEEPSEEK3 = dict(
    hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, num_experts_per_tok=2, first_k_dense_replace=0,
    routed_scaling_factor=1.5, norm_topk_prob=True, attention_bias=False, rope_interleave=True, vocab_size=64,
)
DEEPSEEK2 = {key: value for key, value in DEEPSEEK3.items() if key != "rope_interleave"} | dict(
    norm_topk_prob=False, topk_method="group_limited_greedy",
)
PHIMOE = dict(
    hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    num_experts_per_tok=2, vocab_size=64, router_jitter_noise=0.1, input_jitter_noise=0.0, attention_bias=False, lm_head_bias=False,
)
CLASS_NAMES = {"phimoe": "Phimoe", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "glm4_moe": "Glm4Moe"}


def bases_of(model_type, sizes, window):
    """As transformers 5 saves it, and as 4.57 does."""
    common = dict(
        sizes, model_type=model_type, attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu",
        initializer_range=0.02, max_position_embeddings=128, output_router_logits=False, rms_norm_eps=1e-5,
        router_aux_loss_coef=0.02, tie_word_embeddings=False, use_cache=True,
        architectures=[CLASS_NAMES[model_type] + "ForCausalLM"],
    )
    five = dict(common, dtype="float32", pad_token_id=None, rope_parameters={"rope_theta": THETA, "rope_type": "default"},
                transformers_version="5.23.0")
    if MAJOR == 4:  # which knows no other place
        five["rope_theta"] = THETA
    four = dict(common, rope_theta=10000.0, torch_dtype="float32", transformers_version="4.57.6")
    if model_type == "mixtral":
        five.update(router_jitter_noise=0.0)
    if model_type in ("mixtral", "phimoe"):
        five.update(sliding_window=None)
        four.update(sliding_window=window)
    return [five, four]


PARAMS = dict(
    dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=64,
    rope_theta=10000.0, moe={"num_experts": 4, "num_experts_per_tok": 2},
)

# Values of the keys that a family reads. A key without an entry here fails the table.
DEFAULT = {"rope_type": "default"}
COMMON_VALUES = {
    "architectures": [ABSENT, None, []],
    "auto_map": [{}, {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}],
    "dtype": [ABSENT, None, "float32", "bfloat16", "float16"],
    "torch_dtype": [None, "float32", "bfloat16"],
    "pad_token_id": [None, 0, 63, -1],
    "id2label": [None, {"0": "LABEL_0", "1": "LABEL_1"}],
    "label2id": [None, {"LABEL_0": 0, "LABEL_1": 1}],
    "num_labels": [2, 5],
    "problem_type": [None, "regression"],
    "hidden_size": [16, 48, ABSENT],
    "intermediate_size": [8, 52, ABSENT],
    "num_hidden_layers": [1, 3, ABSENT],
    "num_attention_heads": [2, 8, ABSENT],
    "num_key_value_heads": [1, 4],
    "num_experts_per_tok": [1, 3, 4],
    "vocab_size": [64, 100, ABSENT],
    "max_position_embeddings": [16, 4096, ABSENT],
    "rms_norm_eps": [1e-6, 1e-2, ABSENT],
    "hidden_act": ["silu", "swish", ABSENT],
    "use_sliding_window": [None, False],
    "tie_word_embeddings": [True, False, None, ABSENT],
    "rope_theta": [500000, 5e5],
    "rope_parameters": [None, ABSENT, {}, DEFAULT, {"rope_theta": 5e5}, {**DEFAULT, "rope_theta": 500000},
                        {"type": "default", "rope_theta": 5e5}, {**DEFAULT, "partial_rotary_factor": 1.0},
                        {**DEFAULT, "original_max_position_embeddings": 64}, {**DEFAULT, "factor": 1.0}],
    "rope_scaling": [None, {}, {**DEFAULT, "rope_theta": 5e5}, {"rope_theta": 5e5}, {"type": "default", "rope_theta": 500000}],
    "quantization_config": [ABSENT], "compression_config": [None], "quantization": [None],
    "ranks": [None], "lowrank_config": [None],
}
MIXTRAL_VALUES = {
    "model_type": ["mixtral"], "architectures": [["MixtralForCausalLM"], ABSENT, None, []], "max_position_embeddings": [16, 4096, None, ABSENT],
    "num_key_value_heads": [1, 4, None], "head_dim": [4, 16, None, ABSENT], "num_local_experts": [2, 5, ABSENT],
    "num_experts": [4], "num_experts_per_tok": [1, 3, 4, ABSENT], "sliding_window": [1, 4, 100, None, ABSENT],
}
OLMOE_VALUES = {
    "model_type": ["olmoe"], "num_experts": [2, 5, ABSENT], "num_local_experts": [4], "num_key_value_heads": [1, 4, None, ABSENT],
    "attention_bias": [True, False, ABSENT], "clip_qkv": [0.5, 8.0, None, ABSENT], "norm_topk_prob": [True, False, ABSENT],
}
QWEN_VALUES = {
    "num_experts": [2, 5, ABSENT], "num_local_experts": [4], "norm_topk_prob": [True, False, ABSENT],
    "decoder_sparse_step": [1, 2, ABSENT], "mlp_only_layers": [[], [0], [1], [7], None, ABSENT],
    "moe_intermediate_size": [8, 52, ABSENT], "layer_types": [None, ["full_attention"] * 2, ABSENT],
}
QWEN2_VALUES = QWEN_VALUES | {
    "model_type": ["qwen2_moe"], "head_dim": [8], "qkv_bias": [True, False, ABSENT],
    "shared_expert_intermediate_size": [8, 52, ABSENT],
}
QWEN3_VALUES = QWEN_VALUES | {
    "model_type": ["qwen3_moe"], "head_dim": [4, 16, ABSENT], "attention_bias": [True, False, ABSENT],
}
FLAG = [True, False, ABSENT]
GLM4_VALUES = {
    "model_type": ["glm4_moe"], "n_routed_experts": [16, ABSENT], "num_local_experts": [8], "num_experts": [8],
    "n_shared_experts": [1, 2, ABSENT], "n_group": [2], "topk_group": [1, 3, 4], "routed_scaling_factor": [1.0, 2.5, ABSENT],
    "norm_topk_prob": FLAG, "use_qk_norm": FLAG, "attention_bias": FLAG, "first_k_dense_replace": [0, 1, ABSENT],
    "head_dim": [4, 16, ABSENT], "moe_intermediate_size": [8, 52, ABSENT], "partial_rotary_factor": [0.25, 1.0, ABSENT],
    "num_nextn_predict_layers": [0, 1, ABSENT], "num_mtp_layers": [0, 1],
}
GLM4_TOGETHER = [
    {"n_group": ABSENT, "topk_group": ABSENT, "n_shared_experts": 3, "num_experts_per_tok": 5},
    {"n_group": 1, "topk_group": 1, "n_routed_experts": 4},
    {"partial_rotary_factor": 0.25, "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.25}},
]
DEEPSEEK3_VALUES = {key: GLM4_VALUES[key] for key in GLM4_VALUES if key not in ("use_qk_norm", "partial_rotary_factor", "head_dim")} | {
    "model_type": ["deepseek_v3"], "num_attention_heads": [4], "num_key_value_heads": [4, None], "rope_interleave": FLAG, "q_lora_rank": [8, None, ABSENT],
    "kv_lora_rank": [4, 16, ABSENT], "qk_nope_head_dim": [4, 16, ABSENT], "qk_rope_head_dim": [2, 8, ABSENT], "v_head_dim": [4, 16, ABSENT],
    "head_dim": [4, ABSENT], "qk_head_dim": [12, ABSENT], "first_k_dense_replace": [0, 1],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4, "beta_slow": 0.5}
LATENT_TOGETHER = [
    {"num_attention_heads": 8, "num_key_value_heads": None},
    {"rms_norm_eps": 1e-2, "attention_bias": True, "q_lora_rank": None},
    {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": ABSENT, "rope_theta": 10000.0},
    {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": THETA}, "rope_theta": THETA},
    {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False}, "rope_parameters": ABSENT, "rope_theta": 500.0},
    {"rope_scaling": {**YARN, "mscale": 0.7, "attention_factor": 1.3}, "rope_parameters": ABSENT, "rope_theta": 500.0},
    {"rope_parameters": {**YARN, "rope_theta": THETA, "mscale_all_dim": 1.0}},
]
DEEPSEEK3_TOGETHER = LATENT_TOGETHER + [
    {"first_k_dense_replace": ABSENT, "num_hidden_layers": 4},
    {"rms_norm_eps": 1e-2, "attention_bias": True, "rope_interleave": False},
]
# Not without `vocab_size`: versions of transformers have other defaults.
DEEPSEEK2_VALUES = {
    key: DEEPSEEK3_VALUES[key] for key in DEEPSEEK3_VALUES if key not in ("rope_interleave", "num_nextn_predict_layers", "num_mtp_layers")
} | {
    "model_type": ["deepseek_v2"], "num_key_value_heads": [4, None, ABSENT], "vocab_size": [64, 100], "norm_topk_prob": [False, None, ABSENT],
    "first_k_dense_replace": [0, 1, ABSENT], "n_group": [2, 8], "topk_method": ["greedy", "group_limited_greedy", ABSENT],
}
DEEPSEEK2_TOGETHER = LATENT_TOGETHER + [
    {"topk_method": "greedy", "n_group": ABSENT, "topk_group": ABSENT, "num_experts_per_tok": 7},
    {"topk_method": "greedy", "n_group": None, "topk_group": None},
    {"n_routed_experts": ABSENT, "n_group": 64, "topk_group": 3},
]
PHIMOE_VALUES = {
    "model_type": ["phimoe"], "hidden_size": [32], "num_attention_heads": [4], "num_local_experts": [2, 5, ABSENT], "num_experts": [4], "num_experts_per_tok": [2, ABSENT],
    "num_key_value_heads": [1, 4, None], "head_dim": [8], "attention_bias": FLAG, "lm_head_bias": FLAG, "sliding_window": [1, 4, 100, None, ABSENT],
    "use_sliding_window": [False, None, ABSENT], "router_jitter_noise": [0.0, 0, 0.01, 0.5, ABSENT],
}
# One of the two sequences is longer than 16.
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2], "long_factor": [1.0, 2.5, 4, 8.0], "short_mscale": 1.2, "long_mscale": 1.4,
    "original_max_position_embeddings": 16,
}
ALIKE = {**LONG, "long_factor": LONG["short_factor"]}
PHIMOE_TOGETHER = [
    {"lm_head_bias": True, "tie_word_embeddings": True, "attention_bias": True},
    {"num_key_value_heads": ABSENT, "num_attention_heads": 8, "rope_scaling": None},
    {"num_attention_heads": ABSENT, "num_key_value_heads": ABSENT, "hidden_size": 64, "rope_scaling": None},
    {"hidden_size": 48, "rope_scaling": None},
    {"sliding_window": 4, "use_sliding_window": True},
    {"num_local_experts": 16, "num_experts": 16, "num_experts_per_tok": ABSENT, "router_jitter_noise": 0.3},
    *({"rope_scaling": rotation, "rope_parameters": ABSENT, "rope_theta": 500.0} for rotation in (
        {**LONG, "original_max_position_embeddings": 24}, ALIKE, LONG, {**ALIKE, "factor": 3.0, "attention_factor": 2.0})),
    {"rope_scaling": {**{key: ALIKE[key] for key in ALIKE if key != "rope_type"}, "type": "longrope"}, "rope_parameters": ABSENT, "rope_theta": 1e4},
    {"rope_scaling": ALIKE, "rope_parameters": {**ALIKE, "rope_theta": THETA}, "rope_theta": THETA, "original_max_position_embeddings": 16},
    {"rope_parameters": {**ALIKE, "rope_theta": THETA}},
    {"rope_parameters": {**LONG, "rope_theta": THETA}},
    {"rope_scaling": {**LONG, "long_mscale": 1}, "rope_parameters": ABSENT, "rope_theta": 100.0, "max_position_embeddings": 16, "sliding_window": 6},
]
ROPE_TOGETHER = [
    {"rope_parameters": ABSENT, "rope_scaling": DEFAULT},
    {"rope_parameters": None, "rope_scaling": {"type": "default"}},
    {"rope_parameters": ABSENT, "rope_scaling": {**DEFAULT, "partial_rotary_factor": 1, "factor": 1.0}, "rope_theta": 25000.0},
    {"rope_parameters": {**DEFAULT, "rope_theta": 10000}, "rope_theta": 10000.0},
    {"rope_parameters": ABSENT, "rope_theta": 10000.0},
]
QWEN_TOGETHER = [
    {"mlp_only_layers": [1], "decoder_sparse_step": 2, "num_hidden_layers": 4, "rope_parameters": ABSENT},
    {"num_key_value_heads": ABSENT, "num_attention_heads": ABSENT},
    {"num_experts": ABSENT, "num_experts_per_tok": ABSENT},
    {"rope_parameters": ABSENT, "rope_theta": 25000.0, "tie_word_embeddings": True},
]
# Values that only go together with others.
CONFIG_TOGETHER = [
    {"num_key_value_heads": ABSENT, "num_attention_heads": 8, "head_dim": 4},
    {"num_key_value_heads": ABSENT, "num_attention_heads": ABSENT, "head_dim": None, "hidden_size": 64},
    {"num_local_experts": ABSENT, "num_experts_per_tok": ABSENT},
    {"num_experts": 8, "num_local_experts": ABSENT},
    {"sliding_window": 4, "use_sliding_window": True},
    {"head_dim": None, "hidden_size": 40, "num_attention_heads": 6},
    {"rope_parameters": {"rope_theta": 25000.0}, "rope_theta": 25000.0},
    {"rope_parameters": {**DEFAULT, "rope_theta": 25000.0}, "rope_scaling": {**DEFAULT, "rope_theta": 25000.0}, "rope_theta": 25000.0},
    {"rope_parameters": ABSENT, "rope_theta": 10000.0, "rope_scaling": {"type": "default"}, "sliding_window": 6, "tie_word_embeddings": True},
]
HARMLESS = {
    "Flag": [True, False, None], "Number": [0.5, 3, None], "Text": ["x", None], "TokenIds": [3, [2, 5], None],
    "Any": [None],
}
# Some of the values that are accepted, where all are too many or need other packages.
VALUES_OF = {
    "_attn_implementation": ["eager", "sdpa"], "attn_implementation": ["eager", "sdpa"], "_attn_implementation_internal": ["sdpa"],
    "task_specific_params": [{"x": {"max_length": 5}}], "max_window_layers": [28, 1, None], "sliding_window": [None, 4096, 0],
}
PARAMS_VALUES = {
    "dim": [16, 48], "n_layers": [1, 3], "head_dim": [4, 16], "hidden_dim": [8, 52], "n_heads": [2, 8], "n_kv_heads": [1, 4],
    "norm_eps": [1e-6, 1e-2], "vocab_size": [64, 100], "rope_theta": [1000000, 1e6, None, ABSENT],
    "moe": [{"num_experts": 3, "num_experts_per_tok": 1}, {"num_experts": 4, "num_experts_per_tok": 4},
            {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 0, "route_every_n": 1}],
    "sliding_window": [4, None], "_sliding_window": [5, None], "tied_embeddings": [True, False],
    "max_position_embeddings": [64], "quantization": [None],
}


# Family: bases, values of its own keys, values that go together, default of `rope_theta`.
FAMILIES = {
    "mixtral": (bases_of("mixtral", MIXTRAL, 7), COMMON_VALUES | MIXTRAL_VALUES, CONFIG_TOGETHER, 1e6),
    "olmoe": (bases_of("olmoe", OLMOE, None), COMMON_VALUES | OLMOE_VALUES, QWEN_TOGETHER[2:], 1e4),
    "qwen2_moe": (bases_of("qwen2_moe", QWEN2, None), COMMON_VALUES | QWEN2_VALUES, QWEN_TOGETHER, 1e4),
    "qwen3_moe": (bases_of("qwen3_moe", QWEN3, None), COMMON_VALUES | QWEN3_VALUES, QWEN_TOGETHER, 1e4),
}
FAMILIES["glm4_moe"] = (bases_of("glm4_moe", GLM4, None), COMMON_VALUES | GLM4_VALUES, GLM4_TOGETHER, 1e4)
FAMILIES["deepseek_v3"] = (bases_of("deepseek_v3", DEEPSEEK3, None), COMMON_VALUES | DEEPSEEK3_VALUES, DEEPSEEK3_TOGETHER, 1e4)
FAMILIES["deepseek_v2"] = (bases_of("deepseek_v2", DEEPSEEK2, None), COMMON_VALUES | DEEPSEEK2_VALUES, DEEPSEEK2_TOGETHER, 1e4)
PHIMOE_BASES = bases_of("phimoe", PHIMOE, 7)
# As Microsoft publishes it.
PHIMOE_BASES.append({**PHIMOE_BASES[1], "original_max_position_embeddings": 64, "rope_scaling": {
    **{key: LONG[key] for key in LONG if key != "rope_type"}, "type": "longrope", "original_max_position_embeddings": 64}})
FAMILIES["phimoe"] = (PHIMOE_BASES, COMMON_VALUES | PHIMOE_VALUES, PHIMOE_TOGETHER, 1e6)
BASES = FAMILIES["mixtral"][0]


class Theirs(Exception):
    """transformers, or mistral-inference's rules, do not take this model as it is."""


Sizes = collections.namedtuple(
    "Sizes", "kind h f layers heads kv d experts vocab tied dense_layers dense_width shared biases norms latent head_bias",
    defaults=[(), 0, 0, "", "", None, False],
)


def sizes_of(config):
    """Dimensions as the library sees them."""
    kind, heads, layers = config.model_type, config.num_attention_heads, config.num_hidden_layers
    get = lambda name, default=None: getattr(config, name, default)
    count = "num_local_experts" if kind in ("mixtral", "phimoe") else "num_experts"
    experts = next(get(key) for key in ("n_routed_experts", count) if hasattr(config, key))
    sizes = Sizes(
        kind, config.hidden_size, get("moe_intermediate_size") or config.intermediate_size, layers, heads,
        config.num_key_value_heads, get("head_dim") or config.hidden_size // heads, experts, config.vocab_size,
        bool(config.tie_word_embeddings),
    )
    if kind == "olmoe":
        sizes = sizes._replace(d=config.hidden_size // heads, f=config.intermediate_size, norms="all")
    if kind == "qwen3_moe":
        sizes = sizes._replace(norms="head")
    if kind == "glm4_moe":
        sizes = sizes._replace(
            dense_layers=tuple(range(config.first_k_dense_replace)), dense_width=config.intermediate_size,
            shared=config.n_shared_experts * config.moe_intermediate_size, biases="qkv" if config.attention_bias else "",
            norms="head" if config.use_qk_norm else "",
        )
    if kind.startswith("deepseek"):
        sizes = sizes._replace(
            dense_layers=tuple(range(config.first_k_dense_replace)), dense_width=config.intermediate_size,
            shared=config.n_shared_experts * config.moe_intermediate_size, biases="latent" if config.attention_bias else "",
            d=config.qk_rope_head_dim, latent=(config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim),
        )
    if kind in ("olmoe", "qwen3_moe") and config.attention_bias:
        sizes = sizes._replace(biases="qkvo")
    if kind in ("mixtral", "phimoe"):
        sizes = sizes._replace(f=config.intermediate_size)
    if kind == "phimoe":
        sizes = sizes._replace(biases="qkvo" if config.attention_bias else "", head_bias=bool(config.lm_head_bias))
    if kind.startswith("qwen"):
        dense = tuple(i for i in range(layers) if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step)
        sizes = sizes._replace(dense_layers=dense, dense_width=config.intermediate_size)
    if kind == "qwen2_moe":
        sizes = sizes._replace(shared=config.shared_expert_intermediate_size, biases="qkv" if get("qkv_bias", True) else "")
    return sizes


def latent_shapes(s):
    """Matrices of latent attention."""
    rank, r, fixed, value = s.latent
    queries = s.heads * (fixed + s.d)
    query = {"q_proj": (queries, s.h)} if rank is None else {"q_a_proj": (rank, s.h), "q_b_proj": (queries, rank)}
    return query | {
        "kv_a_proj_with_mqa": (r + s.d, s.h), "kv_b_proj": (s.heads * (fixed + value), r), "o_proj": (s.h, s.heads * value),
    }


def parameters_of(s):
    attention = s.h * s.d * (2 * s.heads + 2 * s.kv)
    if s.latent:
        attention = sum(rows * cols for rows, cols in latent_shapes(s).values())
    return (1 if s.tied else 2) * s.vocab * s.h + s.layers * (
        attention + s.experts * s.h * (1 + 3 * s.f) + 3 * s.h * (s.shared + s.dense_width)
    )


def weights_of(s):
    """Random weights that give logits of order one."""
    g = torch.Generator().manual_seed(5)
    r = lambda *shape: torch.randn(*shape, generator=g) * (1.5 / shape[-1] ** 0.5)
    ones = lambda n: 0.5 + torch.rand(n, generator=g)
    t = {"model.embed_tokens.weight": r(s.vocab, s.h) * (1 if s.tied else 4), "model.norm.weight": ones(s.h)}
    if not s.tied:
        t["lm_head.weight"] = r(s.vocab, s.h)
    if s.head_bias:
        t["lm_head.bias"] = r(s.vocab)
    moe, names = ("block_sparse_moe", ("w1", "w2", "w3")) if s.kind in ("mixtral", "phimoe") else ("mlp", ("gate_proj", "down_proj", "up_proj"))

    def mlp(module, width, names):
        gate, down, up = (f"{module}.{name}.weight" for name in names)
        return {gate: r(width, s.h), down: r(s.h, width) / s.layers**0.5, up: r(width, s.h)}

    def grouped(a):
        widths = {"q": s.heads * s.d, "k": s.kv * s.d, "v": s.kv * s.d, "o": s.h}
        out = {f"{a}{part}_proj.weight": r(widths[part], s.h) for part in "qkv"}
        out[a + "o_proj.weight"] = r(s.h, s.heads * s.d) / s.layers**0.5
        return out | {f"{a}{part}_proj.bias": r(widths[part]) for part in s.biases}

    for layer in range(s.layers):
        p = f"model.layers.{layer}."
        a = p + "self_attn."
        t |= {p + "input_layernorm.weight": ones(s.h), p + "post_attention_layernorm.weight": ones(s.h)}
        if s.latent:
            shapes = latent_shapes(s)
            t |= {f"{a}{name}.weight": r(*shape) for name, shape in shapes.items()}
            t[a + "kv_a_layernorm.weight"] = ones(s.latent[1])
            if "q_a_proj" in shapes:
                t[a + "q_a_layernorm.weight"] = ones(s.latent[0])
            biased = [name for name in shapes if s.biases and name not in ("q_proj", "q_b_proj", "kv_b_proj")]
            t |= {f"{a}{name}.bias": r(shapes[name][0]) for name in biased}
        else:
            t |= grouped(a)
        if s.norms == "head":
            t |= {a + "q_norm.weight": ones(s.d), a + "k_norm.weight": ones(s.d)}
        if s.norms == "all":
            t |= {a + "q_norm.weight": ones(s.heads * s.d), a + "k_norm.weight": ones(s.kv * s.d)}
        if layer in s.dense_layers:
            t |= mlp(p + "mlp", s.dense_width, names)
            continue
        t[p + moe + ".gate.weight"] = r(s.experts, s.h)
        for x in range(s.experts):
            t |= mlp(f"{p}{moe}.experts.{x}", s.f, names)
        if s.kind in ("glm4_moe", "deepseek_v3"):  # 4.57 takes masked scores for 0, 5 for −∞: the same as long as no other is negative
            t[p + "mlp.gate.e_score_correction_bias"] = 0.3 * torch.rand(s.experts, generator=g)
        if s.shared and (s.kind == "glm4_moe" or s.latent):
            t |= mlp(p + "mlp.shared_experts", s.shared, names)
        elif s.shared:
            t |= mlp(p + "mlp.shared_expert", s.shared, names)
            t[p + "mlp.shared_expert_gate.weight"] = r(1, s.h)
    if s.kind == "phimoe":
        norms = [name for name in t if name.endswith("norm.weight")]
        t |= {name.replace(".weight", ".bias"): 0.3 * torch.randn(s.h, generator=g) for name in norms}
    return t


RENAMES = [
    ("model.layers", "layers"), ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
    ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"), ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attention_norm"), ("block_sparse_moe", "feed_forward"), ("model.embed_tokens", "tok_embeddings"),
    ("model.norm", "norm"), ("lm_head", "output"),
]


def as_mistral(weights, d):
    """The same weights under Mistral's names, rotary pairs side by side within a head."""
    out = {}
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            w = w.view(-1, 2, d // 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)
        for a, b in RENAMES:
            name = name.replace(a, b)
        out[name] = w.contiguous()
    return out


def config_of_params(params):
    """The model that mistral-inference builds (`TransformerArgs`, `Transformer`), spelled as a config."""
    dimension = lambda object, key: object[key] if type(object[key]) is int and object[key] > 0 else None
    try:
        moe = params["moe"]
        window, underscored = params.get("sliding_window"), params.get("_sliding_window")
        if window is not None and underscored is not None:
            raise Theirs("both windows")
        config = dict(
            model_type="mixtral", hidden_size=dimension(params, "dim"), num_hidden_layers=dimension(params, "n_layers"),
            head_dim=dimension(params, "head_dim"), intermediate_size=dimension(params, "hidden_dim"),
            num_attention_heads=dimension(params, "n_heads"), num_key_value_heads=dimension(params, "n_kv_heads"),
            rms_norm_eps=float(params["norm_eps"]), vocab_size=dimension(params, "vocab_size"),
            num_local_experts=dimension(moe, "num_experts"), num_experts_per_tok=dimension(moe, "num_experts_per_tok"),
            rope_theta=params.get("rope_theta") or 1000000.0, sliding_window=window if window is not None else underscored,
            tie_word_embeddings=bool(params.get("tied_embeddings")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Theirs(f"{type(error).__name__}: {error}") from None
    if None in [value for key, value in config.items() if key != "sliding_window"]:
        raise Theirs("a dimension that is no count")
    return config


@torch.no_grad()
def their_logits(folder, ids, **options):
    try:
        options = dict(dtype=torch.float32, output_loading_info=True, **options)
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(kind):
                raise Theirs(f"{kind}: {sorted(map(str, info[kind]))[:2]}")
        model.eval()
        rows = []
        for row in ids:
            out = model(input_ids=torch.tensor([row]))
            if not hasattr(out, "logits"):  # `return_dict` false: a tuple, whose logits have three dimensions
                out = next(x for x in out if torch.is_tensor(x) and x.dim() == 3)
                rows.append(out[0].float())
            else:
                rows.append(out.logits[0].float())
        return torch.cat(rows).flatten()
    except Theirs:
        raise
    except Exception as error:  # whatever stops a user stops here
        text = " ".join(str(error).split())
        raise Theirs(f"{type(error).__name__}: {text}") from None


class Run:
    def __init__(self, program, scratch):
        self.scratch, self.cache, self.at = Path(scratch), {}, 0
        g = random.Random(11)
        self.ids = [[g.randrange(MIXTRAL["vocab_size"]) for _ in range(n)] for n in (24, 9)]
        self.program = subprocess.Popen([program, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.counts, self.failures, self.worst = collections.Counter(), [], 0.0
        self.stricter = collections.Counter()

    @functools.cache
    def base_sizes(self, kind):
        base = {key: value for key, value in changed(FAMILIES[kind][0][0], {}).items() if key != "model_type"}
        return sizes_of(AutoConfig.for_model(kind, **base))

    def weights(self, sizes):
        if sizes not in self.cache:
            if len(self.cache) > 8:  # some have a hundred megabytes
                self.cache.clear()
            self.cache[sizes] = weights_of(sizes)
        return self.cache[sizes]

    def folder(self, name, json_name, config, weights):
        folder = self.scratch / f"{self.at}-{name}"
        folder.mkdir()
        (folder / json_name).write_text(json.dumps(config))
        file = "consolidated.safetensors" if json_name == "params.json" else "model.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        return folder

    def ours(self, folder, ids):
        self.program.stdin.write(json.dumps({"folder": str(folder), "ids": ids}) + "\n")
        self.program.stdin.flush()
        answer = self.program.stdout.readline()
        if not answer:
            raise SystemExit(f"the program ended at {folder}: {json.dumps(self.now)}")
        answer = json.loads(answer)
        if "config" in answer:
            file = folder / "logits.f32"
            answer["logits"] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
        return answer

    def effective(self, config, json_name):
        """(config that transformers reads, its dimensions); None where there are none or they are huge."""
        try:
            hf = config_of_params(config) if json_name == "params.json" else config
            folder = self.scratch / f"{self.at}-sizes"
            folder.mkdir()
            if hf.get("num_key_value_heads", 0) is None:  # transformers 5 refuses null, and 4.57 takes the query heads
                hf = {**hf, "num_key_value_heads": hf.get("num_attention_heads", 32)}
            (folder / "config.json").write_text(json.dumps(hf))
            hf = config if json_name == "config.json" else hf
            sizes = sizes_of(AutoConfig.from_pretrained(folder))
            widths = [*sizes[1:9], *(n for n in sizes.latent or () if n is not None)]
            good = all(type(n) is int and n > 0 for n in widths) and all(type(n) is int and n >= 0 for n in sizes[11:13]) and parameters_of(sizes) <= PARAMETERS_MAX
            return hf, sizes if good else None
        except Theirs as error:
            return error, None
        except Exception:
            return config, None

    def check(self, what, config, json_name="config.json", must_accept=False, fitting=True, stricter=False):
        self.at += 1
        self.now = what
        for old in self.scratch.glob(f"{self.at - 1}-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        hf, sizes = self.effective(config, json_name)
        kind = config.get("model_type")
        kind = kind if isinstance(kind, str) and kind in FAMILIES else "mixtral"
        base = self.base_sizes(kind)
        weights = self.weights(sizes if sizes and fitting else base)
        d, vocab = (sizes if sizes and fitting else base).d, (sizes if sizes and fitting else base).vocab
        ids = [[token % vocab for token in row] for row in self.ids]
        if json_name == "params.json":
            if d % 2:
                return
            mine = self.folder("mine", json_name, config, as_mistral(weights, d))
        else:
            mine = self.folder("model", json_name, config, weights)
        answer = self.ours(mine, ids)
        if "refused" in answer:
            line = answer["line"]
            if must_accept:
                return self.fail(what, f"refused: {line}")
            if answer["refused"] not in ("Unsupported", "BrokenCheckpoint") or "\n" in line:
                return self.fail(what, f"refused as {answer['refused']}: {line}")
            self.counts["refused"] += 1
            if stricter and isinstance(hf, dict):
                try:
                    folder = mine if json_name == "config.json" else self.folder("theirs", "config.json", hf, weights)
                    their_logits(folder, ids)
                    self.stricter[re.sub(r"^\S+: ", "", line)[:110]] += 1
                except Theirs:
                    pass
            return None
        if MAJOR == 4 and (known := not_computed_in_4(answer["config"])):
            self.counts[f"recorded: {known}"] += 1
            return None
        if MAJOR == 5 and (known := not_computed_in_5(answer["config"], max(map(len, ids)))):
            self.counts[f"recorded: {known}"] += 1
            return None
        # What an output would carry computes what we compute, in every version.
        carried = self.folder("carried", "config.json", answer["config"], weights)
        theirs = mine
        try:
            if isinstance(hf, Theirs):
                raise hf
            if json_name == "params.json":
                theirs = self.folder("theirs", "config.json", hf, weights)
            pairs = [("the base", their_logits(theirs, ids))]
        except Theirs as error:
            reason = next((why for major, text, why in RECORDED if major == MAJOR and re.search(text, str(error))), None)
            if reason is None:
                return self.fail(what, f"read here, refused there: {error}")
            self.counts[f"recorded: {reason}"] += 1
            return None
        outcome = "equal"
        if MAJOR == 4 and json_name == "config.json" and (known := differs_in_4(config)):
            self.counts[f"recorded: {known}"] += 1
            pairs, outcome = [], None
        try:
            pairs.append(("the carried config", their_logits(carried, ids)))
        except Theirs as error:
            return self.fail(what, f"the carried config does not load: {error}")
        for name, logits in pairs:
            if logits.shape != answer["logits"].shape:
                return self.fail(what, f"{name}: another number of logits")
            difference = (logits - answer["logits"]).abs().max().item()
            if not difference <= TOLERANCE:
                return self.fail(what, f"logits differ from {name} by {difference:.1e}")
            self.worst = max(self.worst, difference)
        if outcome:
            self.counts[outcome] += 1
        return None

    def fail(self, what, why):
        self.failures.append(what)
        print(f"FAILED  {json.dumps(what)}: {why}", flush=True)


def differs_in_4(config):
    """What 4.57 reads otherwise than 5, by which configs of 5 are meant."""
    names = [place.get("rope_type", place.get("type")) for place in (config.get("rope_scaling") or {}, config.get("rope_parameters") or {})]
    if {"yarn", "longrope"} & {*names} and names[0] not in ("yarn", "longrope"):
        return "4.57 does not know a rotation inside `rope_parameters`, and takes the default one"
    for key, default in (("rope_theta", FAMILIES[config["model_type"]][3]), ("partial_rotary_factor", 0.5)):
        places = [config.get(place) for place in ("rope_scaling", "rope_parameters")]
        inside = [place[key] for place in places if isinstance(place, dict) and key in place]
        if inside and inside[0] != config.get(key, default):
            return f"4.57 does not know `{key}` inside `rope_parameters`, and takes its default"
    return None


def not_computed_in_4(config):
    """What no config makes 4.57 compute: 5, and the makers' own code, do."""
    rotation = config.get("rope_scaling") or {}
    if config["model_type"] == "deepseek_v2" and rotation.get("mscale_all_dim") and rotation["factor"] > 1:
        return "4.57 leaves out what `mscale_all_dim` multiplies the scores of DeepSeek-V2 with; 5 and DeepSeek's own code do not"
    return None


def not_computed_in_5(config, tokens):
    """What no config makes 5.23 compute: 4.57, and the makers' own code, do."""
    rotation = config["rope_parameters"]
    if rotation["rope_type"] == "longrope" and tokens > rotation["original_max_position_embeddings"] and rotation["long_factor"] != rotation["short_factor"]:
        return "5.23 turns long texts by `short_factor`; 4.57 and Microsoft's own code turn them by `long_factor`"
    return None


def changed(config, edits):
    config = json.loads(json.dumps(config))
    for key, value in edits.items():
        if value is ABSENT:
            config.pop(key, None)
        else:
            config[key] = value
    return config


def shown(edits):
    return {key: "(absent)" if value is ABSENT else value for key, value in edits.items()}


def values_of(keys, read):
    """Every key with the values that its rule accepts; a key that is read and has no values here is an error."""
    out = {}
    for entry in keys:
        for name in entry["names"]:
            if name in out:  # a family's own list comes before those of all
                continue
            if entry["rule"] == "read":
                out[name] = read[name]
            else:
                all_of_it = entry["values"] if entry["rule"] == "only" else HARMLESS[entry["values"]]
                out[name] = VALUES_OF.get(name, all_of_it)
    return out


def table(run, keys, everywhere, families):
    """Keys that all families share are checked on the first, or on each with `everywhere`."""
    for family in families:
        bases, read, together, _ = FAMILIES[family]
        values = values_of(keys[family]["config"], read)
        if family != "mixtral" and not everywhere:
            values = {key: values[key] for key in values if key in read and key not in COMMON_VALUES or key.startswith("rope")}
        for at, edits in enumerate([{key: value} for key, all_of_it in values.items() for value in all_of_it] + together + ROPE_TOGETHER):
            # Keys of the rotation go with the base of transformers 5; the others with both in turn.
            base = bases[0] if any("rope" in key for key in edits) else bases[at % len(bases)]
            if "sliding" in " ".join(edits) and family in ("mixtral", "phimoe"):
                base = {**base, "sliding_window": None}
            run.check({family: shown(edits)}, changed(base, edits), must_accept=True)
    if "mixtral" not in families:
        return
    values = values_of(keys["mixtral"]["params"], PARAMS_VALUES)
    cases = [{key: value} for key, all_of_it in values.items() for value in all_of_it]
    for edits in cases + [{"sliding_window": 3, "rope_theta": None}]:
        run.check({"params.json": shown(edits)}, changed(PARAMS, edits), "params.json", must_accept=True)


# One of each way in which a config says its shapes.
CLASSES = [
    ("config.json", 0, {}),
    ("config.json", 1, {}),
    ("config.json", 0, {"num_key_value_heads": 4, "head_dim": None, "hidden_act": "swish"}),
    ("config.json", 0, {"num_local_experts": ABSENT, "num_experts_per_tok": ABSENT, "max_position_embeddings": ABSENT}),
    ("config.json", 1, {"tie_word_embeddings": True, "num_experts": 4, "rope_scaling": {"type": "default"}, "use_sliding_window": True}),
    ("params.json", None, {}),
    ("params.json", None, {"_sliding_window": 5, "rope_theta": ABSENT}),
]


def compressed(run, tool):
    """Our logits of an output are transformers' logits of it: its config carries what the base said."""
    for at, (json_name, base, edits) in enumerate(CLASSES):
        run.at += 1
        config = changed(PARAMS if base is None else BASES[base], edits)
        _, sizes = run.effective(config, json_name)
        weights = run.weights(sizes)
        if json_name == "params.json":
            weights = as_mistral(weights, sizes.d)
        model, out = run.folder("base", json_name, config, weights), run.scratch / f"class-{at}"
        words = ["--budget", "20%", "--calibrate", "none", "--cache", "none", "--quiet"]
        subprocess.run([tool, "--model", model, "--out", out, *words], check=True)
        what = {"compressed": json_name, **shown(edits)}
        try:
            difference = (run.ours(out, run.ids)["logits"] - their_logits(out, run.ids, trust_remote_code=True)).abs().max().item()
        except (Theirs, KeyError) as error:
            run.fail(what, f"the output does not load: {error}")
            continue
        if difference <= TOLERANCE:
            run.worst = max(run.worst, difference)
            run.counts["equal"] += 1
        else:
            run.fail(what, f"logits of the output differ by {difference:.1e}")


ANY = [None, True, False, 0, 1, 2, 3, 4, 8, 16, 64, -1, 0.0, 0.5, 1.0, 2.0, 1e-6, 1e4, 1e6, -1.0, "", "x", "silu", "swish",
       "gelu", "default", "float32", [], [1], ["x"], {}, {"a": 1}]
UNKNOWN = ["made_up", "router_scale", "layer_norm_eps", "query_scale", "rope_base", "_private", "n_head", "act_fn", "text_config"]
ROPE = ["rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings", "mrope_section"]
ROPE_VALUES = ["default", "default", "linear", 1.0, 1, 2.0, 1e4, 5e5, 500000, None, 64, 0.5, "x", [2, 2]]


def edit(rng, config, accepted):
    """One random edit in place; returns what it did."""
    kind = rng.choice(["delete", "null", "accepted", "accepted", "accepted", "same", "other", "unknown", "rope"])
    if kind == "unknown":
        key = rng.choice(UNKNOWN)
        config[key] = rng.choice(ANY)
        return key, config[key]
    if kind == "rope":
        place = rng.choice(["rope_parameters", "rope_scaling", "moe"]) if "moe" in config else rng.choice(["rope_parameters", "rope_scaling"])
        inside = config.get(place)
        inside = dict(inside) if isinstance(inside, dict) else {}
        names = ["num_experts", "num_experts_per_tok", "num_shared_experts", "x"] if place == "moe" else ROPE
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(names)
            if rng.random() < 0.2:
                inside.pop(key, None)
            else:
                inside[key] = rng.choice(ROPE_VALUES if place != "moe" else [0, 1, 2, 4, None, "x"])
        config[place] = inside
        return place, inside
    if kind == "delete":
        key = rng.choice(sorted(config))
        config.pop(key)
        return key, "(absent)"
    if kind == "null":
        key = rng.choice(sorted(set(config) | set(accepted)))
        config[key] = None
    elif kind == "accepted":
        key = rng.choice(sorted(accepted))
        value = rng.choice(accepted[key])
        if value is ABSENT:
            config.pop(key, None)
            return key, "(absent)"
        config[key] = value
    else:
        key = rng.choice(sorted(config))
        same = [value for value in ANY if type(value) is type(config[key])]
        config[key] = rng.choice(same if kind == "same" and same else ANY)
    return key, config[key]


def edits(run, keys, count, seed, stricter, families):
    rng = random.Random(seed)
    accepted = {family: values_of(keys[family]["config"], FAMILIES[family][1]) for family in FAMILIES}
    of_params = values_of(keys["mixtral"]["params"], PARAMS_VALUES)
    for _ in range(count):
        is_params = rng.random() < 0.15 and "mixtral" in families
        family = rng.choice([families[0], *families])
        config = json.loads(json.dumps(PARAMS if is_params else rng.choice(FAMILIES[family][0])))
        done = [edit(rng, config, of_params if is_params else accepted[family]) for _ in range(rng.choice([1, 1, 1, 2, 3, 4]))]
        name = "params.json" if is_params else "config.json"
        run.check({name if is_params else family: done}, config, name, fitting=rng.random() < 0.8, stricter=stricter)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--compress", help="the tool, to compress one checkpoint of each shape class")
    parser.add_argument("--everywhere", action="store_true", help="keys that all families share on each of them")
    parser.add_argument("--only", choices=FAMILIES, help="one family")
    parser.add_argument("--edits", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stricter", action="store_true")
    arguments = parser.parse_args()
    keys = json.loads(subprocess.run([arguments.program, "keys"], check=True, capture_output=True, text=True).stdout)
    assert set(keys) == set(FAMILIES), f"families without a table: {set(keys) ^ set(FAMILIES)}"
    families = [arguments.only] if arguments.only else list(FAMILIES)
    # transformers 4 guesses a missing `model_type` from the folder's name, so the name holds no family.
    with tempfile.TemporaryDirectory(prefix="configs-") as scratch:
        run = Run(arguments.program, scratch)
        if arguments.edits is None:
            table(run, keys, arguments.everywhere, families)
            if arguments.compress:
                compressed(run, arguments.compress)
        else:
            edits(run, keys, arguments.edits, arguments.seed, arguments.stricter, families)
    what = "every key and value" if arguments.edits is None else f"{arguments.edits} edits, seed {arguments.seed}"
    print(f"transformers {transformers.__version__}: {what}")
    for name, count in sorted(run.counts.items()):
        print(f"  {count} {name}" + (f", largest difference of a logit {run.worst:.1e}" if name == "equal" else ""))
    for line, count in run.stricter.most_common(40):
        print(f"  stricter, {count}: {line}")
    print(f"{sum(run.counts.values())} passed, {len(run.failures)} failed")
    sys.exit(1 if run.failures else 0)


if __name__ == "__main__":
    main()
