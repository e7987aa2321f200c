"""Copies a checkpoint with its projections in fp8, as DeepSeek stores them: E4M3, and a scale for each block.

    python tests/conformance/make_fp8.py MODEL OUT SIDE

SIDE divides both sides of every projection: transformers reads no other blocks where it has to widen them.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECTION = re.compile(r"(self_attn|mlp|experts|shared_expert)\.(.+\.)?(\w+_proj(_with_mqa)?|w[123])\.weight$")
LARGEST = 448.0


def quantised(weight, side):
    """E4M3 codes and f32 scales, one for each block of [side, side]."""
    rows, cols = weight.shape
    blocks = weight.float().view(rows // side, side, cols // side, side)
    scales = blocks.abs().amax((1, 3)) / LARGEST
    return (blocks / scales[:, None, :, None]).view(rows, cols).to(torch.float8_e4m3fn), scales


def main():
    model, out, side = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {}
    for shard in sorted(model.glob("*.safetensors")):
        for name, weight in load_file(shard).items():
            tensors[name] = weight
            if PROJECTION.search(name):
                tensors[name], tensors[f"{name}_scale_inv"] = quantised(weight, side)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    plain = [name.removesuffix(".weight") for name, weight in tensors.items() if weight.ndim == 2 and weight.dtype == torch.bfloat16]
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [side, side],
        "modules_to_not_convert": plain,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
