"""Makes models that servers want and that are not bundled.

    python tests/serving/make_model.py wide OUT MODEL    the wide random Mixtral of tests/bench/serving.py, with MODEL's tokenizer,
                                                         which has no text for the higher ids
    python tests/serving/make_model.py heads OUT MODEL   MODEL with an attention head more, which adds nothing: two workers of
                                                         vLLM cannot share three heads
    python tests/serving/make_model.py family OUT MODEL  random weights in the family of MODEL, a small one, with sides that vLLM's
                                                         attention takes
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from serving import WIDE

# Sides that vLLM's attention takes, and what vLLM's classes of OLMoE and Phi-MoE do not read as they compute it.
SETTINGS = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96,
                moe_intermediate_size=64, shared_expert_intermediate_size=80, max_position_embeddings=512,
                clip_qkv=None, router_jitter_noise=0.01)  # fmt: skip


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


def family(model):
    config = AutoConfig.from_pretrained(model)
    for key, value in SETTINGS.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if config.rope_parameters["rope_type"] == "longrope":
        factors = [1.0 + pair / 4 for pair in range(SETTINGS["head_dim"] // 2)]
        config.rope_parameters |= {"short_factor": factors, "long_factor": factors}
        # vLLM turns all texts by the long factors where it serves longer ones than these.
        config.original_max_position_embeddings = config.max_position_embeddings
        config.rope_parameters["original_max_position_embeddings"] = config.max_position_embeddings
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


if __name__ == "__main__":
    which, out, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    made = {"wide": wide, "heads": heads, "family": family}[which](source)
    made.save_pretrained(out)
    if made.config.model_type == "phimoe":
        # As in the published config, by which vLLM finds its class.
        text = (out / "config.json").read_text()
        (out / "config.json").write_text(text.replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out)
