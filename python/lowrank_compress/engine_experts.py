# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the engines' classes of compressed models share: experts without weights, and the way of a checkpoint's factors into them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch

from .models import lowrank_experts

Weights = Iterable[tuple[str, torch.Tensor]]
Module = TypeVar("Module", bound=torch.nn.Module)


class Elsewhere(torch.nn.Module):
    """An expert that another rank has."""

    def forward(self, x: torch.Tensor, add_base: Any = None) -> torch.Tensor:
        return torch.zeros_like(x)


class SharedExpertLinears(torch.nn.Module):
    """Some matrices of a shared expert, each factored or dense, under their names in the checkpoint."""

    def __init__(self, path: str, names: Collection[str], linears: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.path, self.names = path, tuple(names)
        for name, linear in zip(names, linears, strict=False):  # another rank has none
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.names], dim=-1)


def without_weights(make: Callable[[], Module], dtype: torch.dtype) -> Module:
    """A module of factors on the device of the moment, without weights."""
    device = torch.empty(0).device
    with torch.device("meta"):
        module = make()
    module.to(dtype).to_empty(device=device).requires_grad_(False)
    for order in module.buffers():
        order.fill_(lowrank_experts.NOT_LOADED)
    return module


def empty_experts(
    make: Callable[[], lowrank_experts.LowRankExperts], dtype: torch.dtype, elsewhere: Collection[int] = ()
) -> lowrank_experts.LowRankExperts:
    """The experts of a layer on the device of the moment, without weights. Those `elsewhere` take no memory."""

    def made() -> lowrank_experts.LowRankExperts:
        experts = make()
        for expert in elsewhere:
            experts.add_module(str(expert), Elsewhere())
        return experts

    return without_weights(made, dtype)


class Factors:
    """The tensors of all factored experts in a model, routed and shared."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.places: dict[str, tuple[str, torch.Tensor]] = {}
        elsewhere: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, lowrank_experts.LowRankExperts):
                path = module.key.partition("#")[0]
                elsewhere += [f"{path}.{e}." for e in range(len(module)) if isinstance(module[e], Elsewhere)]
            elif isinstance(module, SharedExpertLinears):
                path = module.path
                elsewhere += [f"{path}.{child}." for child in module.names if not hasattr(module, child)]
            else:
                continue
            for tensor, value in module.state_dict(keep_vars=True).items():
                self.places[f"{path}.{tensor}"] = (f"{name}.{tensor}", value)
        self.not_here = tuple(elsewhere)
        self.missing, self.loaded = set(self.places), set[str]()

    def take(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies the experts' tensors; yields the others."""
        for name, tensor in weights:
            if name not in self.places:
                if not name.startswith(self.not_here):
                    yield name, tensor
                continue
            place, value = self.places[name]
            if value.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, config.json says {tuple(value.shape)}")
            value.data.copy_(tensor)
            self.missing.discard(name)
            self.loaded.add(place)

    def require_all(self) -> None:
        if self.missing:
            more = len(self.missing) - 1
            raise ValueError(f"{min(self.missing)} is missing from the checkpoint, and {more} more tensors of experts")
