"""D²-MoE (github.com/lliai/D2MoE): a mean of the experts weighted by Fisher information, and low-rank differences from it."""

import ast
import os
import sys
from types import SimpleNamespace

import torch
from evaluator import absent, calibration, drive, load, namespace
from transformers.models.mixtral import modeling_mixtral

ABOUT = {
    "settings": "`calib_fisher_info`, `process_scaling_matrix` and `merge_experts` with `merge_method` `fisher` and whitened differences, "
    "each expert its own factors; its pruning of the mean while the model runs, which removes no parameter, is off",
    "patches": [
        "its scripts read Wikitext as they are imported, so only the functions of `get_scale.py` are run, and the driver sums "
        "the second moments of the inputs and counts the routed tokens",
        "its modules for CNNs, plots and data sets, and the packages `datasets` and `torchvision`, are empty",
        "`from transformers.models.mixtral.modeling_mixtral import *` gives all names, as in the transformers of its time",
        "it works in bf16, and so are its results",
    ],
}


def functions(path, *names):
    """Some functions of a script, without running the rest of it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    found = {"torch": torch}
    exec(compile(tree, str(path), "exec"), found)
    return [found[name] for name in names]


@torch.no_grad()
def measure(model, batches):
    """By layer: how often each expert is chosen; by matrix: the second moment of its inputs."""
    counts, moments, hooks = {}, {}, []

    def count(layer):
        def hook(module, _, output):
            chosen = output[1].topk(module.top_k, dim=-1).indices.flatten()
            counts[layer] = counts.get(layer, 0) + chosen.bincount(minlength=module.num_experts)

        return hook

    def add(key):
        def hook(_, inputs, __):
            x = inputs[0].float()
            moments[key] = moments.get(key, 0) + x.T @ x

        return hook

    for at, layer in enumerate(model.model.layers):
        hooks.append(layer.block_sparse_moe.register_forward_hook(count(at)))
        for name, module in layer.named_modules():
            if ".experts." in name and isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_hook(add((at, name))))
    for batch in batches:
        model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return counts, moments


def compress(job):
    os.chdir(job.source)  # its configuration is read from there
    sys.path[:0] = [str(job.source), str(job.source / "model"), str(job.source / "preprocess")]
    absent("datasets", "torchvision", "torchvision.utils")
    namespace("model", job.source / "model")
    modeling_mixtral.__all__ = [name for name in vars(modeling_mixtral) if not name.startswith("__")]
    from config import cfg

    cfg.update(prune_metric="ppwandasp", prune_method="", prune_ratio=0.0, skip_layers=[], test_stage=True)
    from get_fisher import calib_fisher_info, post_process_fisher_info
    from model.merge_mixtral import Merge_MixtralSparseMoeBlock

    (root,) = functions(job.source / "preprocess/get_scale.py", "process_scaling_matrix")
    os.chdir(job.scratch)

    ids = calibration(job)
    model = load(job.model, torch.bfloat16)
    model.config._name_or_path = "original"
    paths = SimpleNamespace(save_path=str(job.scratch), diagonal=False, base_model_path="original")
    # One window a step, as in its script: the square of a gradient over several windows is another quantity.
    stored = calib_fisher_info(model, [{"input_ids": window[None]} for window in ids], use_cache=False, args=paths)
    post_process_fisher_info(stored, paths)
    fisher = torch.load(job.scratch / "fisher_original_processed.pt")
    model.eval()
    counts, moments = measure(model, ids.split(8))
    experts = model.config.num_local_experts
    # Of E experts' parameters one mean and E differences are left: 1 / E + ratio of the differences.
    ratio = 1 - job.budget - 1 / experts
    for at, layer in enumerate(model.model.layers):
        scales = {name: root(moment.double(), name, "cpu").bfloat16() for (of, name), moment in moments.items() if of == at}
        block = Merge_MixtralSparseMoeBlock(
            model.config, share_ratio=1, delta_ratio=ratio, expert_freq=counts[at].tolist(), merge_method="fisher"
        )
        block.merge_experts(layer.block_sparse_moe, svd_scale=scales, hessian=fisher[at], scale_type="svdllm")
        layer.block_sparse_moe = block
    return model, None


drive(compress, ABOUT)
