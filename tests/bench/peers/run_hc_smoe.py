"""HC-SMoE (github.com/wazenmai/HC-SMoE): clusters experts by their outputs and merges each cluster into one."""

import sys

import torch
from evaluator import absent, calibration, drive, experts_to_keep, load

ABOUT = {
    "settings": "`ExpertsGrouperForMixtral` with `expert-output`, hierarchical clustering, average linkage, and merging weighted by "
    "frequency, as in its script for Mixtral; whole experts, to the nearest ratio, every one of which the router still chooses among 8",
    "patches": [
        "tensors that it sends to a GPU stay on the CPU",
        "its modules for evaluation, and the packages `sklearn` and `scipy`, which other methods of its use, are empty",
    ],
}


def compress(job):
    sys.path.insert(0, str(job.source))
    absent("sklearn", "sklearn.preprocessing", "scipy", "scipy.stats", "hcsmoe.evaluation")
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    from hcsmoe.merging.grouping_mixtral import ExpertsGrouperForMixtral, merge_by_groups_with_usage_weighted

    model = load(job.model)
    kept = experts_to_keep(job, model.config.num_local_experts, 1)
    batches = [{"input_ids": batch} for batch in calibration(job).split(8)]
    grouper = ExpertsGrouperForMixtral(
        config=model.config, similarity_base="expert-output", cluster="hierarchical", linkage="average"
    )
    grouper.compute_all_usages(model, batches)
    grouper.cluster_experts(model=model, dataloader=batches, num_groups=kept)
    model = merge_by_groups_with_usage_weighted(model, grouper=grouper, merging_layers=list(range(len(model.model.layers))))
    return model, None


drive(compress, ABOUT)
