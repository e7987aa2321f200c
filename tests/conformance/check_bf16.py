#!/usr/bin/env python3
"""Does pivoted storage lose more than u·v where numbers are bf16?

    check_bf16.py --base DIR --pivoted DIR --uv DIR --text FILE

Two factored checkpoints of the same ranks and the same matrices, stored in two ways. Both run in bf16, as people load them,
and are compared with the base in f32: mean KL over the same tokens. Exits 1 if the pivoted one is further away. CPU, offline.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()

WINDOWS, TOKENS = 32, 128
# One set of tokens: the difference of two means has an error of its own.
TOLERANCE = 1.03


@torch.no_grad()
def log_probabilities(path, dtype, windows):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True).eval()
    return torch.cat([model(window[None]).logits[0].double().log_softmax(-1) for window in windows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "pivoted", "uv", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    ranks = [json.loads((path / "config.json").read_text())["lowrank_config"]["ranks"] for path in (args.pivoted, args.uv)]
    if ranks[0] != ranks[1]:
        sys.exit("FAIL  the two checkpoints have other ranks")
    text = args.text.read_text()[: 16 * WINDOWS * TOKENS]
    ids = Tokenizer.from_file(str(args.base / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    windows = torch.tensor(ids[: WINDOWS * TOKENS]).view(WINDOWS, TOKENS)
    p = log_probabilities(args.base, torch.float32, windows)
    divergence = lambda path, dtype: (p.exp() * (p - log_probabilities(path, dtype, windows))).sum(-1).mean().item()
    pivoted, uv = (divergence(path, torch.bfloat16) for path in (args.pivoted, args.uv))
    exact = divergence(args.pivoted, torch.float32)
    good = pivoted <= TOLERANCE * uv
    print(f"{'ok   ' if good else 'FAIL '} KL to the base in bf16: pivoted {pivoted:.4e}, u·v {uv:.4e}; pivoted in f32 {exact:.4e}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
