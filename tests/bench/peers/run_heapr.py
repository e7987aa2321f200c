"""HEAPr (github.com/LLIKKE/HEAPr): scores channels by gradients and activations, and removes the least over all layers."""

import logging
import sys
from types import SimpleNamespace

from evaluator import calibration, drive, load
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe

ABOUT = {
    "settings": "`pruning_global`, global ranking, batches of 8 windows of 256 tokens (its default is 128 windows of 2,048)",
    "patches": [
        "it knows DeepSeek and Qwen only, so the Mixtral's modules get the names of Qwen's (`mlp`, `gate_proj`, `up_proj`, "
        "`down_proj`), and its test for the class of a Qwen block finds Mixtral's",
    ],
}
RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def alias(kind, old, new):
    """Lets a class's forward pass find under its old name what is registered under a new one."""
    setattr(kind, old, property(lambda module: module._modules[new]))


def rename(module, old, new):
    module._modules[new] = module._modules.pop(old)


def compress(job):
    sys.path.insert(0, str(job.source))
    from pruning.pruning_global import pruning_global

    model = load(job.model)
    alias(modeling_mixtral.MixtralDecoderLayer, "block_sparse_moe", "mlp")
    for old, new in RENAMED.items():
        alias(modeling_mixtral.MixtralBlockSparseTop2MLP, old, new)
    for layer in model.model.layers:
        rename(layer, "block_sparse_moe", "mlp")
        for expert in layer.mlp.experts:
            for old, new in RENAMED.items():
                rename(expert, old, new)
    modeling_qwen2_moe.Qwen2MoeSparseMoeBlock = modeling_mixtral.MixtralSparseMoeBlock
    model.config.moe_intermediate_size = model.config.intermediate_size

    ids = calibration(job)
    data = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    args = SimpleNamespace(
        model_name="qwen",
        cali_data="windows",
        cali_nsamples=len(ids),
        cali_batch_size=8,
        compress_ratio=job.budget,
    )
    pruning_global(model, data, model.config, args, logging.getLogger("heapr"))
    return model, None


drive(compress, ABOUT)
