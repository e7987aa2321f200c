# SPDX-License-Identifier: MIT OR Apache-2.0
"""Mixtral with low-rank expert matrices: W [out, in] ~= u [out, r] @ v [r, in], or the same by pivots.

Attention, norms, router, embedding and head are transformers' own; only the experts are replaced. The module tree has
the names of the checkpoint in every version of transformers, `model.layers.L.block_sparse_moe.experts.E.w1.{u,v}.weight`
(`{basis,coefficients}.weight` and `order` if pivoted), so no conversion of weights takes place. Two generations are served:

    v4   layer.block_sparse_moe, its forward returns (hidden states, router logits)
    v5   layer.mlp, experts fused in 3-D tensors, its forward returns hidden states
"""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import MixtralForCausalLM, MixtralModel
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from .configuration_lowrank_mixtral import LowRankMixtralConfig, checked_ranks, storage_of


class LowRankLinear(nn.Module):
    """x [.., in] -> u (v x) [.., out]."""

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Linear(in_features, rank, bias=False)
        self.u = nn.Linear(rank, out_features, bias=False)

    def forward(self, x):
        return self.u(self.v(x))


class PivotedLinear(nn.Module):
    """A matrix of rank r as r of its own columns (rows) and the coefficients T that make the others of them.

    The pivots lie on the short side. `order` holds every index of that side once, pivots first:

        in <= out    x -> basis (x_pivots + T x_others)                     basis [out, r], T [r, in - r]
        in > out     y_pivots = basis x, y_others = T y_pivots              basis [r, in],  T [out - r, r]
    """

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivots_on_inputs = in_features <= out_features
        if self.pivots_on_inputs:
            self.coefficients = nn.Linear(in_features - rank, rank, bias=False)
            self.basis = nn.Linear(rank, out_features, bias=False)
        else:
            self.basis = nn.Linear(in_features, rank, bias=False)
            self.coefficients = nn.Linear(rank, out_features - rank, bias=False)
        # A buffer of integers: it is saved, moved and never rounded, and it is no parameter.
        self.register_buffer("order", torch.arange(min(in_features, out_features)))

    def forward(self, x):
        if self.pivots_on_inputs:
            x = x.index_select(-1, self.order)
            return self.basis(x[..., : self.rank] + self.coefficients(x[..., self.rank :]))
        at_pivots = self.basis(x)
        y = torch.cat((at_pivots, self.coefficients(at_pivots)), dim=-1)
        return torch.empty_like(y).index_copy(-1, self.order, y)


LINEARS = {"uv": LowRankLinear, "pivoted": PivotedLinear}


def make_linear(in_features, out_features, rank, storage):
    """Factors for a rank; without one the matrix is dense and its tensor has the base model's name."""
    if rank is None:
        return nn.Linear(in_features, out_features, bias=False)
    return LINEARS[storage](in_features, out_features, rank)


class LowRankExpert(nn.Module):
    """SwiGLU: w2(act(w1 x) * w3 x), each matrix factored or dense on its own."""

    def __init__(self, config, ranks, path):
        super().__init__()
        hidden, inner, storage = config.hidden_size, config.intermediate_size, storage_of(config)
        self.w1 = make_linear(hidden, inner, ranks.get(f"{path}.w1"), storage)  # gate
        self.w2 = make_linear(inner, hidden, ranks.get(f"{path}.w2"), storage)  # down
        self.w3 = make_linear(hidden, inner, ranks.get(f"{path}.w3"), storage)  # up
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        # vLLM's Transformers backend traces one instance of a class, fuses sibling nn.Linear that share an argument,
        # or `act(gate(x)) * up(x)`, and applies that to all instances. Here some are factored and some dense:
        # `contiguous` (a no-op) and `torch.mul` keep the pattern from matching.
        x = x.contiguous()
        return self.w2(torch.mul(self.act_fn(self.w1(x)), self.w3(x)))


class LowRankExperts(nn.Module):
    """The experts of a layer as children named 0 .. E-1.

    Not an nn.ModuleList on purpose: vLLM and SGLang swap any ModuleList (or 3-D parameter) called `experts` for a fused
    kernel that knows no factors.
    """

    def __init__(self, config, ranks, layer_index):
        super().__init__()
        self.num_experts = config.num_local_experts
        for e in range(self.num_experts):
            path = f"model.layers.{layer_index}.block_sparse_moe.experts.{e}"
            self.add_module(str(e), LowRankExpert(config, ranks, path))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states [tokens, hidden]; index and weights [tokens, k] -> [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == e)
            y = getattr(self, str(e))(hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LowRankSparseMoeBlock(MixtralSparseMoeBlock):
    """Router and low-rank experts of one layer. A subclass, because v4 records router logits by that class."""

    def __init__(self, config, ranks, layer_index, gate, returns_logits):
        nn.Module.__init__(self)  # the parent's would build dense experts
        self.top_k, self.jitter_noise = config.num_experts_per_tok, config.router_jitter_noise
        self.gate = gate  # the native router: nn.Linear in v4; in v5 a module that output_router_logits hooks
        self.experts = LowRankExperts(config, ranks, layer_index)
        self.returns_logits = returns_logits

    def forward(self, hidden_states):
        shape = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states = hidden_states * noise
        x = hidden_states.reshape(-1, shape[-1])
        routed = self.gate(x)
        if isinstance(routed, tuple):
            # v5: (logits, weights, index). The first is probabilities in 5.0.0, so only the other two are used.
            _, weights, index = routed
        else:
            weights, index = torch.topk(torch.softmax(routed.float(), dim=-1), self.top_k, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        y = self.experts(x, index, weights.to(x.dtype)).reshape(shape)
        return (y, routed) if self.returns_logits else y


@contextmanager
def narrow_experts(config):
    """While the native class builds itself, its dense experts are one row wide: they are replaced right after, and at
    full width would need the memory that factoring saves."""
    width, config.intermediate_size = config.intermediate_size, 1
    try:
        yield
    finally:
        config.intermediate_size = width


def factor_experts(layers, config):
    """Replaces the expert block of every layer, keeping its router."""
    ranks = checked_ranks(config)
    for index, layer in enumerate(layers):
        v4 = hasattr(layer, "block_sparse_moe")
        native = layer.block_sparse_moe if v4 else layer.mlp
        block = LowRankSparseMoeBlock(config, ranks, index, native.gate, returns_logits=v4)
        if not v4:
            # The native forward calls self.mlp. As a plain attribute it stays out of the module tree, so that each
            # tensor has one name.
            del layer.mlp
            layer.__dict__["mlp"] = block
        layer.block_sparse_moe = block


class LowRankMixtralModel(MixtralModel):
    """The decoder without a head. vLLM builds this one."""

    config_class = LowRankMixtralConfig

    def __init__(self, config):
        checked_ranks(config)
        with narrow_experts(config):
            super().__init__(config)
        factor_experts(self.layers, config)
        self.post_init()


class LowRankMixtralForCausalLM(MixtralForCausalLM):
    """The whole language model."""

    config_class = LowRankMixtralConfig

    def __init__(self, config):
        checked_ranks(config)
        with narrow_experts(config):
            super().__init__(config)
        factor_experts(self.model.layers, config)
        self.post_init()


__all__ = ["LowRankMixtralModel", "LowRankMixtralForCausalLM"]
