# SPDX-License-Identifier: MIT OR Apache-2.0
"""A compressed Mixtral in SGLang: its own class of the base, whose routed experts are `LowRankExperts`, those of transformers,
on the CPU with compiled products (`cpu_experts`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.models.mixtral import MixtralForCausalLM
from sglang.srt.runtime_context import get_parallel

from ..cpu_experts import CpuExperts, cpu_experts
from ..engine_experts import Factors, empty_experts
from ..models import lowrank_experts
from ..models.modeling_lowrank_mixtral import NAMES


class RoutedExperts(lowrank_experts.LowRankExperts):
    """The experts of a layer, called as SGLang calls its own."""

    compiled: CpuExperts | None = None

    def forward(self, hidden_states: torch.Tensor, topk_output: Any) -> torch.Tensor:
        call = self.compiled or super().forward
        return call(hidden_states, topk_output.topk_ids.long(), topk_output.topk_weights)


class LowRankMixtralForCausalLM(MixtralForCausalLM):
    """Mixtral."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        if quant_config is not None:
            raise ValueError("a compressed model cannot be quantized by SGLang as well: leave --quantization out")
        if get_parallel().tp_size > 1:
            raise ValueError("low-rank experts in SGLang do not support tensor parallelism: leave --tp-size out")
        ranks = lowrank_experts.checked_ranks(config)
        with lowrank_experts.narrow_experts(config, NAMES):
            super().__init__(config, quant_config, prefix)
        for index, layer in enumerate(self.model.layers):
            path = f"model.layers.{index}.{NAMES['moe']}.experts"
            layer.block_sparse_moe.experts = empty_experts(
                lambda path=path: RoutedExperts(config, ranks, path, NAMES, config.num_local_experts),
                torch.get_default_dtype(),
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies the experts' tensors into their factors; the rest is loaded as the base's."""
        factors = Factors(self)
        super().load_weights(factors.take(weights))
        factors.require_all()
        lowrank_experts.require_orders(self, ())
        for layer in self.model.layers:
            experts = layer.block_sparse_moe.experts
            experts.compiled = cpu_experts(experts)


EntryClass = LowRankMixtralForCausalLM
