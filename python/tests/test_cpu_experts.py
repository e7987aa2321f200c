"""Compiled products of experts, against those of transformers' classes in f64."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from lowrank_compress import cpu_experts
from lowrank_compress.models import lowrank_experts

NAMES = {"width": "intermediate_size", "projections": ("w1", "w2", "w3")}
PATH = "model.layers.0.block_sparse_moe.experts"
EXPERTS, SLOTS, WIDTH = 8, 2, 47


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_before(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def made(hidden, storage, widths, base=()):
    """Experts with ranks from 1 to 23, each other than its neighbours'; one expert is dense."""
    matrices = itertools.product(range(EXPERTS), NAMES["projections"])
    ranks = {f"{PATH}.{e}.{name}": 1 + (7 * e + 5 * int(name[1])) % 23 for e, name in matrices if e != 3}
    lowrank = {"format": "lowrank-compress", "format_version": 3, "storage": storage, "ranks": ranks}
    lowrank |= {"widths": widths, "shared_base_layers": list(base)}
    config = SimpleNamespace(hidden_size=hidden, intermediate_size=WIDTH, hidden_act="silu", lowrank_config=lowrank)
    experts = lowrank_experts.LowRankExperts(config, ranks, PATH, NAMES, EXPERTS).requires_grad_(False)
    for order in experts.buffers():
        order.copy_(torch.randperm(len(order)))
    return experts


def routed(tokens, hidden):
    draw = [torch.randperm(EXPERTS)[:SLOTS] for _ in range(tokens)]
    return torch.randn(tokens, hidden), torch.stack(draw), torch.softmax(torch.randn(tokens, SLOTS), -1)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("storage", ["uv", "pivoted"])
@pytest.mark.parametrize("hidden", [32, 64])  # below and above the width: pivots lie on the short side
@pytest.mark.parametrize("tokens", [1, 19, 700])
def test_they_equal_those_of_transformers_classes(dtype, error, storage, hidden, tokens):
    torch.manual_seed(tokens)
    experts = made(hidden, storage, {f"{PATH}.{e}": WIDTH - 4 * e for e in range(EXPERTS)}).to(dtype)
    x, index, weights = routed(tokens, hidden)
    x = x.to(dtype)
    with torch.no_grad():
        expected = experts.double().run_chosen(x.double(), index, weights.double())
        call = cpu_experts.cpu_experts(experts.to(dtype))
        assert call is not None
        assert torch.allclose(call(x, index, weights).double(), expected, rtol=0, atol=error * expected.abs().max())


def test_a_graph_may_hold_them_and_the_weights_are_not_kept_twice():
    torch.manual_seed(0)
    experts = made(32, "uv", {})
    call = cpu_experts.cpu_experts(experts)
    assert all(parameter.numel() == 0 for parameter in experts.parameters())
    inputs = routed(5, 32)
    compiled = torch.compile(lambda *inputs: call(*inputs) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), call(*inputs) + 1)


def test_what_would_lead_out_of_memory_is_refused():
    torch.manual_seed(0)
    experts = cpu_experts.cpu_experts(made(32, "uv", {}))
    x, index, weights = routed(5, 32)
    for wrong in (-1, EXPERTS):
        index[3, 1] = wrong
        with pytest.raises(IndexError, match="outside 0 to 7"):
            experts(x, index, weights)
    damaged = made(32, "pivoted", {})
    next(damaged.buffers())[0] = 99
    with pytest.raises(ValueError, match="every index once"):
        cpu_experts.cpu_experts(damaged)


def test_a_shared_base_is_left_to_transformers_classes():
    assert cpu_experts.cpu_experts(made(32, "uv", {}, base=[0])) is None


def test_without_a_compiler_there_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    cpu_experts.compiled_products.cache_clear()
    try:
        with pytest.warns(UserWarning, match="run slower: .*no-compiler could not compile cpu_experts.cpp"):
            assert cpu_experts.cpu_experts(made(32, "uv", {})) is None
    finally:
        cpu_experts.compiled_products.cache_clear()
