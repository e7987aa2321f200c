# SPDX-License-Identifier: MIT OR Apache-2.0
"""vLLM's classes of compressed models, and the quantization method `lowrank` of their experts.

The routed experts are `LowRankExperts`, those of transformers, on the CPU with compiled products (`cpu_experts`). With tensor parallelism every
rank has the whole of some experts, and a whole shared base, which it multiplies for its own experts alone. vLLM adds up
the ranks' outputs, as it does for experts that are split. Expert parallelism is refused. A shared expert of which a matrix is factored
is the first rank's alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from vllm.model_executor.models.glm4_moe import Glm4MoeForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.olmoe import OlmoeForCausalLM
from vllm.model_executor.models.phimoe import PhiMoEForCausalLM
from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from . import models
from .cpu_experts import CpuExperts, cpu_experts
from .engine_experts import Factors, SharedExpertLinears, empty_experts, without_weights
from .models import lowrank_experts

# The factored experts, within vLLM's module of routed experts.
CHILD = "lowrank"


@register_quantization_config("lowrank")
class LowRankConfig(QuantizationConfig):
    """The method of a model whose config has a `lowrank_config`. `others` is that of its fp8 tensors outside the experts."""

    def __init__(self, config: Any, others: QuantizationConfig | None) -> None:
        super().__init__()
        self.config, self.others = config, others
        self.ranks = lowrank_experts.checked_ranks(config)
        family = next(family for family in models.FAMILIES if family["model_type"] == config.model_type)
        self.names = import_module(f"{models.__name__}.modeling_{family['model_type']}").NAMES

    def get_name(self) -> str:
        return "lowrank"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        raise ValueError("`lowrank` is chosen by the architecture of a compressed checkpoint, not by quantization_config")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return LowRankMethod(self, layer)
        path, _, linear = prefix.rpartition(".")
        if path.rpartition(".")[2] in lowrank_experts.SHARED_EXPERTS:
            gate, down, up = self.names["projections"]
            if any(f"{path}.{name}" in self.ranks for name in (gate, down, up)):
                return SharedExpertMethod(self, path, {"gate_up_proj": (gate, up), "down_proj": (down,)}[linear])
        if self.others is not None:
            return self.others.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def pack(linear: torch.nn.Linear) -> None:
    """Lets vLLM multiply on the CPU, by its own choice of a product for such a matrix; its packed weights replace ours."""
    dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    linear.forward = lambda x: linear.cpu_linear(x.contiguous(), linear.weight, None)  # type: ignore[method-assign]


def pack_all(module: torch.nn.Module) -> None:
    """Packs every matrix of a module that is on the CPU."""
    for linear in [child for child in module.modules() if type(child) is torch.nn.Linear]:
        if linear.weight.device.type == "cpu":
            pack(linear)


class LowRankMethod(FusedMoEMethodBase):
    """The routed experts of a layer."""

    def __init__(self, quantization: LowRankConfig, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.quantization = quantization
        self.experts: CpuExperts | lowrank_experts.LowRankExperts | None = None
        if layer.apply_router_weight_on_input or layer.use_ep:
            raise ValueError("low-rank experts do not support expert parallelism or router weights on inputs")

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        # vLLM's own name of this module may end in other words than the checkpoint's.
        path = layer.layer_name.partition(".experts")[0] + ".experts"
        its = self.quantization
        ranks, own = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        experts = empty_experts(
            lambda: lowrank_experts.LowRankExperts(its.config, its.ranks, path, its.names, num_experts),
            params_dtype,
            [expert for expert in range(num_experts) if expert % ranks != own],
        )
        layer.add_module(CHILD, experts)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        experts = getattr(layer, CHILD)
        lowrank_experts.require_orders(experts, ())
        self.experts = cpu_experts(experts)
        if self.experts is None:
            self.experts = experts
            pack_all(experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.experts(x, topk_ids.long(), topk_weights)


class SharedExpertMethod(LinearMethodBase):
    """Gate and up, or down, of a layer's shared expert."""

    def __init__(self, quantization: LowRankConfig, path: str, names: tuple[str, ...]) -> None:
        self.quantization, self.path, self.names = quantization, path, names
        self.outputs = 0

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        its, self.outputs = self.quantization, output_size
        storage, outputs = lowrank_experts.storage_of(its.config), output_size // len(self.names)
        ranks = [its.ranks.get(f"{self.path}.{name}") for name in self.names if layer.tp_rank == 0]

        def linears() -> SharedExpertLinears:
            made = (lowrank_experts.make_linear(input_size, outputs, rank, storage) for rank in ranks)
            return SharedExpertLinears(self.path, self.names, made)

        layer.add_module(CHILD, without_weights(linears, params_dtype))

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        linears = getattr(layer, CHILD)
        lowrank_experts.require_orders(linears, ())
        pack_all(linears)

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.tp_rank > 0:
            return x.new_zeros(*x.shape[:-1], self.outputs)
        return getattr(layer, CHILD)(x)


class LowRankModel:
    """What a compressed model adds to vLLM's class of the base, which stands behind it in the list of bases."""

    # Keys of the config that vLLM's class does not read, and the values that it computes with.
    FIXED: dict[str, Any] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config, others = vllm_config.model_config.hf_config, vllm_config.quant_config
        if others is not None and not getattr(config, "quantization_config", None):
            raise ValueError("a compressed model cannot be quantized by vLLM as well: leave --quantization out")
        for key, value in self.FIXED.items():
            if getattr(config, key, value) != value:
                found = f"`{key}` is {getattr(config, key)!r} in config.json"
                raise ValueError(f"{found}, which vLLM's class of this family does not read: it computes with {value!r}")
        vllm_config.quant_config = LowRankConfig(config, others)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copies the experts' tensors into their factors; the rest is loaded as the base's."""
        factors = Factors(self)
        loaded = super().load_weights(factors.take(weights))
        factors.require_all()
        return loaded | factors.loaded


class LowRankMixtralForCausalLM(LowRankModel, MixtralForCausalLM):
    """Mixtral."""


class LowRankQwen3MoeForCausalLM(LowRankModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE."""


class LowRankQwen2MoeForCausalLM(LowRankModel, Qwen2MoeForCausalLM):
    """Qwen2-MoE."""

    FIXED = {"qkv_bias": True}


class LowRankOlmoeForCausalLM(LowRankModel, OlmoeForCausalLM):
    """OLMoE."""

    FIXED = {"clip_qkv": None, "norm_topk_prob": False, "rms_norm_eps": 1e-5}


class LowRankGlm4MoeForCausalLM(LowRankModel, Glm4MoeForCausalLM):
    """GLM-4.5."""


class LowRankDeepseekV3ForCausalLM(LowRankModel, DeepseekV3ForCausalLM):
    """DeepSeek-V3."""


class LowRankDeepseekV2ForCausalLM(LowRankModel, DeepseekV2ForCausalLM):
    """DeepSeek-V2."""


class LowRankPhimoeForCausalLM(LowRankModel, PhiMoEForCausalLM):
    """Phi-3.5-MoE."""

    FIXED = {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01}
