"""SVD-LLM (github.com/AIoT-MLSys-Lab/SVD-LLM): whitens each matrix by its inputs and truncates all at one ratio."""

import sys
from types import SimpleNamespace

import torch
from evaluator import absent, calibration, drive, load

ABOUT = {
    "settings": "`profle_svdllm` and `whitening` (its step 1, without updates)",
    "patches": [
        "it knows dense models only, so each expert is given to `whitening` as the MLP of one layer of a Mistral, and "
        "attention is left as it is",
        "the package `datasets`, which it imports, is empty",
    ],
}
RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Layer(torch.nn.Module):
    """One expert as the MLP of a layer."""

    def __init__(self, expert):
        super().__init__()
        self.mlp = torch.nn.Module()
        for old, new in RENAMED.items():
            setattr(self.mlp, new, getattr(expert, old))


def compress(job):
    sys.path.insert(0, str(job.source))
    absent("datasets")
    from SVDLLM import profle_svdllm, whitening

    model = load(job.model)
    batches = [{"input_ids": batch} for batch in calibration(job).split(8)]
    roots = profle_svdllm("mistral", model, batches, "cpu")
    places = [(layer, expert) for layer in range(len(roots)) for expert in range(model.config.num_local_experts)]
    blocks = [layer.block_sparse_moe for layer in model.model.layers]
    layers = [Layer(blocks[layer].experts[expert]) for layer, expert in places]
    of_expert = lambda layer, expert, old: roots[layer][f"block_sparse_moe.experts.{expert}.{old}"]
    profile = {
        at: {f"mlp.{new}": of_expert(layer, expert, old) for old, new in RENAMED.items()}
        for at, (layer, expert) in enumerate(places)
    }
    dense = SimpleNamespace(model=SimpleNamespace(layers=layers), config=model.config, eval=lambda: None)
    whitening("mistral", dense, profile, 1 - job.budget, "cpu")
    for at, (layer, expert) in enumerate(places):
        blocks[layer].experts[expert] = layers[at].mlp
    return model, None


drive(compress, ABOUT)
