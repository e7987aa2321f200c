# SPDX-License-Identifier: MIT OR Apache-2.0
"""The experts of a layer on the CPU, for engines: one call multiplies with a matrix of all experts, whatever their ranks and widths.

The products are C++ (cpu_experts.cpp), compiled for this machine when a model is loaded for the first time. Engines need a C++
compiler for their own compiled graphs, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import library

from .models import lowrank_experts

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 300
LANES = 16
# How the C++ code numbers what it can multiply with.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
NO_PIVOTS, PIVOTS_ON_INPUTS, PIVOTS_ON_OUTPUTS = range(3)


class Matrix(ctypes.Structure):
    """The C++ code's `Matrix`. All zero: an expert that another rank has."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "rank", "pivots")),
        *((name, ctypes.c_void_p) for name in ("first", "second", "order")),
    ]


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank-compress"


@cache
def compiled_products() -> ctypes.CDLL | None:
    """The compiled products; None, after a warning, without a compiler that can make them."""
    compiler = os.environ.get("CXX", "g++")
    try:
        # What the compiler says of itself names the processor that `native` stands for.
        target = subprocess.run(
            [compiler, *FLAGS, "-E", "-v", "-x", "c++", os.devnull],
            capture_output=True, check=True, timeout=COMPILE_SECONDS,
        )  # fmt: skip
        key = hashlib.sha256(target.stderr + SOURCE.read_bytes()).hexdigest()[:16]
        made = cache_folder() / f"cpu-experts-{key}.so"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=made.parent) as folder:
                new = Path(folder) / made.name
                subprocess.run(
                    [compiler, *FLAGS, "-o", new, SOURCE], capture_output=True, check=True, timeout=COMPILE_SECONDS
                )
                new.replace(made)
        found = ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        warnings.warn(
            f"low-rank experts run slower: {compiler} could not compile {SOURCE.name} ({error}) {said.decode(errors='replace')[-500:]}",
            stacklevel=2,
        )
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    found.lowrank_gate_up.restype = integer
    found.lowrank_gate_up.argtypes = [integer, pointer, pointer, integer, pointer, integer, integer, *[pointer] * 3]
    found.lowrank_down.restype = None
    found.lowrank_down.argtypes = [integer, pointer, integer, pointer, integer, integer, *[pointer] * 3, integer]
    return found


def packed(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] as [ceil(out / 16), in, 16], which the C++ code reads in one go."""
    rows = -weight.shape[0] % LANES
    blocks = torch.nn.functional.pad(weight.detach(), (0, 0, 0, rows)).view(-1, LANES, weight.shape[1])
    return blocks.transpose(1, 2).contiguous()


class CpuExperts:
    """The experts of a layer. Their weights move here: a packed matrix takes the place of each."""

    def __init__(self, experts: lowrank_experts.LowRankExperts, compiled: ctypes.CDLL) -> None:
        self.compiled, self.key = compiled, experts.key
        BY_KEY[self.key] = self
        self.dtype = next(experts.parameters()).dtype
        self.kept: list[torch.Tensor] = []
        first = next(expert for expert in children(experts) if isinstance(expert, lowrank_experts.LowRankExpert))
        self.activation = first.act_fn
        self.gate, self.down, self.up = (
            (Matrix * len(experts))(*(self.matrix(getattr(expert, name, None)) for expert in children(experts)))
            for name in first.names
        )
        self.channels = max(matrix.outputs for matrix in self.gate)

    def matrix(self, linear: torch.nn.Module | None) -> Matrix:
        """What the C++ code needs of a matrix."""
        if isinstance(linear, torch.nn.Linear):
            inputs, outputs = linear.in_features, linear.out_features
            return Matrix(inputs, outputs, 0, NO_PIVOTS, None, self.take(linear), None)
        if isinstance(linear, lowrank_experts.LowRankLinear):
            pivots, first, second, order = NO_PIVOTS, linear.v, linear.u, None
        elif isinstance(linear, lowrank_experts.PivotedLinear):
            pivots = PIVOTS_ON_INPUTS if linear.pivots_on_inputs else PIVOTS_ON_OUTPUTS
            first, second = linear.coefficients, linear.basis
            if not linear.pivots_on_inputs:
                first, second = second, first
            self.kept.append(linear.order)
            order = address_of(linear.order)
        else:
            return Matrix()
        return Matrix(linear.in_features, linear.out_features, linear.rank, pivots, self.take(first), self.take(second), order)

    def take(self, linear: torch.nn.Linear) -> int:
        """The address of a packed weight. The linear keeps nothing."""
        self.kept.append(packed(linear.weight))
        linear.weight = torch.nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        return self.kept[-1].data_ptr()

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, hidden]; index and weights [tokens, k] -> [tokens, hidden]. A graph holds this as one operator."""
        return torch.ops.lowrank_compress.cpu_experts(hidden, index, weights, self.key)

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the operator does."""
        x = hidden.contiguous().float()
        index, weights = index.contiguous().long(), weights.contiguous().float()
        count, slots = index.shape
        kind, experts = DTYPES[self.dtype], len(self.gate)
        gates, ups = x.new_empty(2, count * slots * self.channels).unbind()
        used = self.compiled.lowrank_gate_up(
            kind, self.gate, self.up, experts, x.data_ptr(), count, slots, index.data_ptr(), gates.data_ptr(), ups.data_ptr()
        )
        if used < 0:
            raise IndexError(f"a router chose an expert outside 0 to {experts - 1}")
        activations = self.activation(gates[:used]).mul_(ups[:used])
        output = torch.empty_like(x)
        self.compiled.lowrank_down(
            kind, self.down, experts, activations.data_ptr(), count, slots, index.data_ptr(), weights.data_ptr(),
            output.data_ptr(), x.shape[1],
        )  # fmt: skip
        return output.to(hidden.dtype)


def address_of(order: torch.Tensor) -> int:
    """The address of an index by which the C++ code reads and writes, without a check of its own."""
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError("an `order` of the checkpoint does not hold every index once")
    return order.data_ptr()


def children(experts: lowrank_experts.LowRankExperts) -> Iterator[torch.nn.Module]:
    """Every expert of a layer, in their order."""
    return (experts[expert] for expert in range(len(experts)))


def cpu_experts(experts: lowrank_experts.LowRankExperts) -> CpuExperts | None:
    """The same experts by compiled products; None where others serve better: another device, a shared base, or a processor
    with units for products of bf16."""
    weight = next(experts.parameters(), None)
    if weight is None or weight.device.type != "cpu" or weight.dtype not in DTYPES or experts.shared_base is not None:
        return None
    if weight.dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False):
        return None
    compiled = compiled_products()
    return None if compiled is None else CpuExperts(experts, compiled)


# The experts that the operator below knows: a graph holds strings and tensors.
BY_KEY: WeakValueDictionary[str, CpuExperts] = WeakValueDictionary()
OPERATORS = library.Library("lowrank_compress", "FRAGMENT")
OPERATORS.define("cpu_experts(Tensor hidden, Tensor index, Tensor weights, str key) -> Tensor")
OPERATORS.impl("cpu_experts", lambda hidden, index, weights, key: BY_KEY[key].run(hidden, index, weights), "CPU")
library.register_fake(
    "lowrank_compress::cpu_experts", lambda hidden, index, weights, key: torch.empty_like(hidden), lib=OPERATORS
)
