"""Makes models that servers want and that are not bundled.

    python tests/serving/make_model.py wide OUT MODEL    the wide random Mixtral of tests/bench/serving.py, with MODEL's tokenizer,
                                                         which has no text for the higher ids
    python tests/serving/make_model.py heads OUT MODEL   MODEL with an attention head more, which adds nothing: two workers of
                                                         vLLM cannot share three heads
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from serving import WIDE


def wide(model):
    del model
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**WIDE))


@torch.no_grad()
def heads(model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = loaded.config
    for layer in loaded.model.layers:
        attention, width = layer.self_attn, config.head_dim
        for projection, shape, side in ((attention.q_proj, (width, config.hidden_size), 0), (attention.o_proj, (config.hidden_size, width), 1)):
            added = projection.weight.new_zeros(shape)
            projection.weight = torch.nn.Parameter(torch.cat([projection.weight, added], side))
    config.num_attention_heads += 1
    return loaded


if __name__ == "__main__":
    which, out, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {"wide": wide, "heads": heads}[which](source).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out)
