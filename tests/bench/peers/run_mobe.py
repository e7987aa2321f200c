"""MoBE (github.com/inclusionAI/MoBE): gate and up matrices as a product of an own matrix and a mixture of shared bases, trained
to resemble the weights; it reads no text."""

import json
import sys

from evaluator import NotRun, drive, load
from safetensors.torch import load_file, save_file

EPOCHS = 10_000
ABOUT = {
    "settings": f"`train.py` with its SiLU and learning rate and {EPOCHS:,} epochs, as its README has; it leaves w2 as it is, so w1 and w3 "
    "carry the whole budget; one basis for four experts as its README has, or for two where the inner dimension would exceed the shorter side",
    "patches": [
        "its matrices are wider than tall and Mixtral's are not, so it gets them transposed",
        "weights are stored under the names of Qwen",
    ],
}
RENAMED = {"w1": "gate_proj", "w3": "up_proj"}


def shape(job, rows, columns, experts):
    """Number of bases and inner dimension by which w1 and w3 lose 3/2 of the budget."""
    kept = (1 - 1.5 * job.budget) * experts * rows * columns
    for bases in (experts // 4, experts // 2):
        inner = int((kept - experts * bases) / (experts * rows + bases * columns))
        if 1 <= inner <= rows:
            return bases, inner
    raise NotRun("no number of bases fits the budget")


def compress(job):
    sys.path.insert(0, str(job.source))
    import train

    model = load(job.model)
    blocks = [layer.block_sparse_moe for layer in model.model.layers]
    experts = model.config.num_local_experts
    rows, columns = model.config.hidden_size, model.config.intermediate_size
    bases, inner = shape(job, rows, columns, experts)
    tensors = {
        f"model.layers.{at}.mlp.experts.{expert}.{new}.weight": getattr(block.experts[expert], old).weight.data.T.contiguous()
        for at, block in enumerate(blocks)
        for expert in range(experts)
        for old, new in RENAMED.items()
    }
    save_file(tensors, job.scratch / "model.safetensors")
    index = job.scratch / "index.json"
    index.write_text(json.dumps({"weight_map": {name: "model.safetensors" for name in tensors}}))
    left = job.expert_params
    for old, new in RENAMED.items():
        arguments = {
            "index_path": index,
            "base_dir": job.scratch,
            "save_path": job.scratch,
            "num_hidden_layers": len(blocks),
            "num_matrices": experts,
            "rows_per_matrix": rows,
            "cols": columns,
            "num_epochs": EPOCHS,
            "batch_size": experts,
            "num_B": bases,
            "truncation": inner,
            "end_layer": len(blocks),
            "matrix_type": new,
        }
        sys.argv = ["train.py"] + [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        train.main()
        for at, block in enumerate(blocks):
            found = load_file(job.scratch / f"model_layers_{at}_mlp_{new}_weight.safetensors")
            for expert in range(experts):
                getattr(block.experts[expert], old).weight.data = found[f"experts_{expert}_{new}_weight"].T.contiguous()
            left -= experts * rows * columns - experts * rows * inner - bases * inner * columns - experts * bases
    return model, left


drive(compress, ABOUT)
