# SPDX-License-Identifier: MIT OR Apache-2.0
"""Configuration of a Mixtral whose expert matrices are stored as low-rank factors.

`config.lowrank_config` holds the format, its version, how factors are stored, and the rank of every factored matrix:

    {"format": "lowrank-compress", "format_version": 1, "storage": "uv",
     "ranks": {"model.layers.0.block_sparse_moe.experts.0.w1": 2464, ...}}

`storage` is "uv" (two factors u @ v) or "pivoted" (some of the matrix's own columns or rows, and coefficients that make
the others of them). A matrix without a rank is dense. Everything else is a plain Mixtral configuration.
"""

from transformers import MixtralConfig

FORMAT = "lowrank-compress"
FORMAT_VERSIONS = (1,)
STORAGES = ("uv", "pivoted")


def checked_ranks(config):
    """The rank map, or a ValueError when this code does not know how the checkpoint is stored."""
    lowrank = getattr(config, "lowrank_config", None)
    if not lowrank or lowrank.get("format") != FORMAT:
        raise ValueError("config.json has no `lowrank_config` of lowrank-compress: these are not low-rank factors")
    version, storage = lowrank.get("format_version"), lowrank.get("storage", "uv")
    if version not in FORMAT_VERSIONS:
        raise ValueError(f"`lowrank_config.format_version` is {version!r}, this code knows {FORMAT_VERSIONS}")
    if storage not in STORAGES:
        raise ValueError(f"`lowrank_config.storage` is {storage!r}, this code knows {STORAGES}")
    return lowrank["ranks"]


def storage_of(config):
    """How factors are stored, of a config that `checked_ranks` accepts."""
    return config.lowrank_config.get("storage", "uv")


class LowRankMixtralConfig(MixtralConfig):
    """MixtralConfig plus `lowrank_config`.

    The `model_type` is its own on purpose: under `mixtral`, transformers v4 without remote code would fill the experts
    with random numbers and only warn.
    """

    model_type = "lowrank_mixtral"

    # Sharding plans, read by transformers v5. Factored experts are never fused, so the base's expert entries must go.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }
    base_model_ep_plan = {}


__all__ = ["LowRankMixtralConfig"]
