"""What is measured of every expert on the calibration text, in f64."""

from dataclasses import dataclass, fields

import torch

FEW_TOKENS = 0.1
"""Routed tokens per feature of the hidden size at which half of a norm is data-free."""


@dataclass
class Moments:
    """Sums over the routed tokens. g is the router weight, h [F] the activations, x [H] the inputs."""

    tokens: float
    h: torch.Tensor
    """Σ g² h hᵀ [F, F]"""
    x: torch.Tensor
    """Σ t x xᵀ [H, H], t the token's Gauss–Newton weight"""
    cross: torch.Tensor
    """Σ t x x̂ᵀ [H, H]; x without error propagation"""
    gate: torch.Tensor
    """Σ g² (silu'(a) b)² [F]: times ‖w2[:, i]‖², the row weights of w1"""
    up: torch.Tensor
    """Σ g² silu(a)² [F], of w3"""

    def __add__(self, other):
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def of_inputs(expert, x, g, changed=None, cap=0.0, activations=True):
    """From inputs x [n, H] of an expert and those of the compressed model, if they differ. `cap` bounds g²‖h‖² of a
    token, in medians. The activations' second moment costs most and can be left out."""
    changed = x if changed is None else changed
    a, b = changed @ expert.w1.T, changed @ expert.w3.T
    s = torch.sigmoid(a)
    act, slope = a * s, s * (1 + a * (1 - s))
    h, g2 = act * b, g**2
    if cap and len(x):
        size = g2 * (h * h).sum(1)
        g2 = g2 * (cap * size.median() / size.clamp(min=1e-30)).clamp(max=1)
    energies = (expert.w2**2).sum(0)
    gate, up = g2[:, None] * (slope * b) ** 2, g2[:, None] * act**2
    t = (gate + up) @ energies
    second = product(h * g2[:, None], h) if activations else torch.zeros(0, 0, dtype=torch.float64)
    weighted = changed * t[:, None]
    return Moments(float(len(x)), second, product(changed, weighted), product(x, weighted), sums(gate), sums(up))


def product(a, b, tokens=2048):
    """Σ a bᵀ over tokens: f32 within 2,048 of them, f64 between."""
    return sum((p.T @ q).double() for p, q in zip(a.split(tokens), b.split(tokens)))


def sums(a):
    return a.sum(0, dtype=torch.float64)


def perturbed(x, share, generator):
    """Inputs of which a share of the energy is replaced by noise: the data-free norm of the activations."""
    noise = torch.randn(x.shape, generator=generator) * x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
    return (1 - share) ** 0.5 * x + share**0.5 * noise


def collect(model, ids, noise=0.0, cap=0.0, batch=16):
    """Moments by layer and expert, and the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    total = [[None] * len(experts) for experts in model.experts]
    for part in ids.split(batch):
        h = model.embed(part)
        for layer, experts in enumerate(model.experts):
            h = model.attention(layer, h)
            x = model.moe_input(layer, h)
            routing = model.route(layer, x)
            for e, (expert, (tokens, g)) in enumerate(zip(experts, routing)):
                inputs = perturbed(x[tokens], noise, generator) if noise else x[tokens]
                m = of_inputs(expert, inputs, g, cap=cap)
                total[layer][e] = m if total[layer][e] is None else total[layer][e] + m
            h = h + model.moe(x, routing, experts).view_as(h)
    return total, ids.numel()


def shrinkage(b, tokens, hidden):
    """More for an expert with few routed tokens."""
    none = FEW_TOKENS * hidden
    return (b * tokens + none) / (tokens + none)


def towards_identity(c, b):
    """The trace is kept; the identity if there is none."""
    eye = torch.eye(len(c), dtype=c.dtype)
    mean = c.diagonal().mean()
    return (1 - b) * c + b * mean * eye if mean > 0 else eye


def with_ridge(c, ridge):
    """Adds ridge · mean diagonal; channels are compared by their weights alone if there are no tokens."""
    eye = torch.eye(len(c), dtype=c.dtype)
    mean = c.diagonal().mean()
    return c + ridge * mean * eye if mean > 0 else eye
