#!/usr/bin/env python3
"""Does `torch.compile` take the MoE block and the whole model as one graph, with the same numbers and gradients?

    check_compiled.py DIR

DIR is a factored checkpoint. For transformers 5: in version 4 the block's own forward asks how many tokens an expert gets.
The graph is run by torch's `aot_eager`, so that nothing but the graph is tested. CPU, offline.
"""

import argparse
import copy
import sys
from pathlib import Path

from check_checkpoint import Checks, load, require  # first: it sets what transformers reads when it is imported

import torch
import transformers


def graph(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")


def moe_block(model):
    return next(module for module in model.modules() if hasattr(module, "experts"))


def check_block(model):
    block = moe_block(model)
    compiled = graph(block)
    with torch.no_grad():
        for tokens in (1, 2, 37):  # one graph: a number of tokens is no constant of it
            x = torch.randn(2, tokens, model.config.hidden_size)
            difference = (compiled(x) - block(x)).abs().max().item()
            require(difference <= 1e-5, f"{tokens} tokens: outputs differ by {difference:.2e}")


def check_gradients(model):
    block = moe_block(model)
    twin = copy.deepcopy(block)
    require(twin.experts.key != block.experts.key, "a copy is compiled as what it was copied from")
    compiled = graph(twin)
    x = torch.randn(2, 37, model.config.hidden_size, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    block(x).square().sum().backward()
    compiled(y).square().sum().backward()
    pairs = [(x.grad, y.grad)] + [(p.grad, q.grad) for p, q in zip(block.parameters(), twin.parameters()) if p.grad is not None]
    model.zero_grad()
    difference = max((p - q).abs().max().item() for p, q in pairs)
    require(difference <= 1e-4, f"gradients differ by {difference:.2e}")
    return f"{len(pairs)} gradients"


@torch.no_grad()
def check_model(model):
    ids = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    difference = (graph(model)(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max().item()
    require(difference <= 1e-4, f"logits differ by {difference:.2e}")


@torch.no_grad()
def check_captured(model):
    """What a CUDA graph runs instead: every expert on all tokens."""
    block = moe_block(model)
    x = torch.randn(37, model.config.hidden_size)
    _, weights, index = block.gate(x)
    difference = (block.experts.run_all(x, index, weights) - block.experts(x, index, weights)).abs().max().item()
    require(difference <= 1e-5, f"outputs differ by {difference:.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", type=Path, metavar="DIR", help="factored checkpoint")
    model = load(parser.parse_args().compressed, trust_remote_code=True)
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    check = Checks()
    check("the MoE block is one graph", check_block, model)
    check("gradients through the graph are equal", check_gradients, model)
    check("the whole model is one graph", check_model, model)
    check("every expert on all tokens gives the same", check_captured, model)
    print(f"{check.passed} passed, {check.failed} failed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
