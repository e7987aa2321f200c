"""REAP (github.com/CerebrasResearch/reap): removes whole experts by their router-weighted mean output norm."""

import sys
from types import SimpleNamespace

import torch
from evaluator import BATCH, absent, calibration, drive, experts_to_keep, load

ABOUT = {
    "settings": "`MoETransformerObserver` and `prune` with `prune_method` `reap`, router weights renormalised; whole experts, "
    "to the nearest ratio",
    "patches": ["its modules for data, clustering, evaluation and command lines, which `prune.py` imports, are empty"],
}


def compress(job):
    sys.path.insert(0, str(job.source / "src"))
    absent("reap.main", "reap.args", "reap.data", "reap.cluster", "reap.eval")
    from reap.observer import MixtralMoEObserverHookConfig, MoETransformerObserver
    from reap.prune import prune

    model = load(job.model)
    kept = experts_to_keep(job, model.config.num_local_experts, model.config.num_experts_per_tok)
    hooks = MixtralMoEObserverHookConfig(renormalize_router_weights=True, record_pruning_metrics_only=True)
    observer = MoETransformerObserver(model, hook_config=hooks)
    with torch.no_grad():
        for batch in calibration(job).split(BATCH):
            model(input_ids=batch)
    state = observer.report_state()
    observer.close_hooks()
    settings = SimpleNamespace(prune_method="reap", perserve_super_experts=False, perserve_outliers=False)
    out = job.scratch / "pruned"
    prune(state, model, settings, model.config.num_local_experts - kept, out)
    return load(out), None


drive(compress, ABOUT)
