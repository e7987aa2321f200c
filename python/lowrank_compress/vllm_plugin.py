# SPDX-License-Identifier: MIT OR Apache-2.0
"""vLLM's plugin: `vllm serve OUT` without remote code, by vLLM's own class of the base, whose routed experts are factored.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Attention, scheduler and everything but the
routed experts are vLLM's own.
"""

from __future__ import annotations

from . import models


def architectures() -> dict[str, str]:
    """Architectures of compressed checkpoints, and the classes that serve them."""
    names = [f"LowRank{family['class']}ForCausalLM" for family in models.FAMILIES]
    return {name: f"lowrank_compress.vllm_models:{name}" for name in names}


def register() -> None:
    from vllm import ModelRegistry

    from . import vllm_models  # registers the quantization method

    del vllm_models
    known = ModelRegistry.get_supported_archs()
    for architecture, name in architectures().items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, name)
