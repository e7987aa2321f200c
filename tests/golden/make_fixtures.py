"""Make the golden fixtures: tiny random checkpoints, one per feature, and transformers' logits for them.

    python tests/golden/make_fixtures.py [FAMILY …]     (needs torch, transformers 5 and safetensors; all, or these families alone)

Every checkpoint lies in tests/fixtures/golden/NAME/, its logits in tests/fixtures/golden/NAME.safetensors:
`ids.S` [T] and `logits.S` [T, V] of sequence S, computed on the CPU in f32 from the stored (bf16) weights.
passage.safetensors holds the tokens of the verifier's bundled passage and the bundled model's perplexity on them.
Weights are larger than a fresh model's, so that logits are of order one and a mistake shows.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM,
    MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, PhimoeConfig, PhimoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM,
    Qwen3MoeConfig, Qwen3MoeForCausalLM,
)

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
GOLDEN = FIXTURES / "golden"
PASSAGE = FIXTURES.parent.parent / "crates/lowrank-text/assets/verification.txt"
HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, VOCAB = 16, 24, 2, 4, 64
LENGTHS = [40, 17]


def config(**changes):
    values = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2,
        max_position_embeddings=128, sliding_window=None, rms_norm_eps=1e-5, initializer_range=0.35,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, rope_theta=10000.0,
    )
    return MixtralConfig(**(values | changes))


def random_model(seed, **changes):
    """A model whose f32 weights are bf16 numbers."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return model


def per_expert_tensors(model):
    """The canonical (transformers v4) tensors of a model, whatever its own spelling."""
    out = {}
    for name, value in model.state_dict().items():
        value = value.detach().to(torch.bfloat16)
        head = name.split(".mlp.")[0].split(".block_sparse_moe.")[0] + ".block_sparse_moe"
        if name.endswith("experts.gate_up_proj"):
            for e in range(EXPERTS):
                w1, w3 = value[e].chunk(2, dim=0)
                out[f"{head}.experts.{e}.w1.weight"], out[f"{head}.experts.{e}.w3.weight"] = w1, w3
        elif name.endswith("experts.down_proj"):
            for e in range(EXPERTS):
                out[f"{head}.experts.{e}.w2.weight"] = value[e]
        else:
            out[name.replace(".mlp.", ".block_sparse_moe.")] = value
    if model.config.tie_word_embeddings:
        out.pop("lm_head.weight", None)
    return {name: value.contiguous().clone() for name, value in sorted(out.items())}


def directory(name):
    path = GOLDEN / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def save(path, tensors, settings, file="model.safetensors", settings_file="config.json"):
    save_file(tensors, path / file, metadata={"format": "pt"})
    (path / file).chmod(0o644)  # safetensors leaves 0600
    (path / settings_file).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def hf_settings(model):
    settings = model.config.to_diff_dict()
    settings |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16"}
    settings["rope_theta"] = model.config.rope_parameters["rope_theta"]  # where transformers 4 looks for it
    settings |= {key: getattr(model.config, key) for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
        "sliding_window", "rms_norm_eps", "tie_word_embeddings", "hidden_act")}
    settings.pop("transformers_version", None)
    return settings


@torch.no_grad()
def golden(name, model, sequences):
    out = {}
    for s, ids in enumerate(sequences):
        out[f"ids.{s}"] = ids
        out[f"logits.{s}"] = model(input_ids=ids[None]).logits[0].float().contiguous()
    save_file(out, GOLDEN / f"{name}.safetensors")
    (GOLDEN / f"{name}.safetensors").chmod(0o644)
    largest = max(value.abs().max().item() for key, value in out.items() if key.startswith("logits"))
    print(f"{name}: logits up to {largest:.2f}")


def random_ids(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def fused(tensors):
    """transformers v5's fused spelling: gate_up_proj [E, 2F, H] holds w1's rows, then w3's."""
    out = {name.replace("block_sparse_moe", "mlp"): value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        def expert(e, w):
            return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"]
        prefix = f"model.layers.{layer}.mlp.experts"
        out[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([expert(e, "w1"), expert(e, "w3")]) for e in range(EXPERTS)])
        out[f"{prefix}.down_proj"] = torch.stack([expert(e, "w2") for e in range(EXPERTS)])
    return out


def consolidated(tensors, heads, kv_heads):
    """Mistral's own spelling, with the rotary pairs of queries and keys side by side."""
    words = [("model.embed_tokens", "tok_embeddings"), ("model.norm", "norm"), ("lm_head", "output"), ("model.", ""),
             ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
             ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"),
             ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
             ("block_sparse_moe", "feed_forward")]

    def interleave(value, count):
        return value.view(count, 2, value.shape[0] // count // 2, -1).transpose(1, 2).reshape(value.shape).contiguous()

    out = {}
    for name, value in tensors.items():
        if "q_proj" in name:
            value = interleave(value, heads)
        elif "k_proj" in name:
            value = interleave(value, kv_heads)
        for ours, mistrals in words:
            name = name.replace(ours, mistrals)
        out[name] = value
    return out


def factored(model, tensors):
    """Our own format: some matrices replaced by u·v, others left dense. Changes the model to u·v (f32) as well."""
    ranks, out = {}, dict(tensors)
    generator = torch.Generator().manual_seed(99)
    parameters = dict(model.named_parameters())
    for layer in range(LAYERS):
        for e in range(EXPERTS):
            for w in ("w1", "w2", "w3"):
                rank = int(torch.randint(0, 9, (1,), generator=generator))
                if rank < 2:
                    continue
                module = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}"
                matrix = out.pop(f"{module}.weight").float()
                u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
                root = sigma[:rank].sqrt()
                u, v = (u[:, :rank] * root).to(torch.bfloat16), (root[:, None] * vt[:rank]).to(torch.bfloat16)
                out[f"{module}.u.weight"], out[f"{module}.v.weight"] = u.contiguous(), v.contiguous()
                ranks[module] = rank
                product = u.float() @ v.float()
                prefix = f"model.layers.{layer}.mlp.experts"
                with torch.no_grad():
                    if w == "w2":
                        parameters[f"{prefix}.down_proj"][e].copy_(product)
                    else:
                        rows = slice(0, INTERMEDIATE) if w == "w1" else slice(INTERMEDIATE, None)
                        parameters[f"{prefix}.gate_up_proj"][e, rows].copy_(product)
    return ranks, out


@torch.no_grad()
def passage(model, windows=16, window=256):
    """The verifier's rule: pieces of 50,000 characters, no special tokens, windows that do not see each other."""
    tokenizer = Tokenizer.from_file(str(FIXTURES / "tiny-mixtral" / "tokenizer.json"))
    text = PASSAGE.read_text()
    pieces = [text[i:i + 50_000] for i in range(0, len(text), 50_000)]
    ids = torch.tensor([i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids])
    x = ids[:windows * window].view(windows, window)
    logits = model(input_ids=x).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    save_file({"ids": ids.to(torch.int16), "windows": torch.tensor([windows, window]),
               "perplexity": loss.exp().reshape(1)}, GOLDEN / "passage.safetensors")
    (GOLDEN / "passage.safetensors").chmod(0o644)
    print(f"passage: {len(ids)} tokens, perplexity of the first {windows * window} {loss.exp():.4f}")


# Other families: small models with a tokenizer, so that a whole compression runs on them.
FAMILY = dict(
    vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=3,
    max_position_embeddings=256, initializer_range=0.25, bos_token_id=1, eos_token_id=2, pad_token_id=None, rope_theta=10000.0,
)
FAMILIES = {
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(
        **FAMILY, intermediate_size=48, moe_intermediate_size=24, num_experts=8, norm_topk_prob=True, head_dim=12)),
    # Experts in the second and fourth layer alone.
    "dense-layers": (Qwen3MoeForCausalLM, Qwen3MoeConfig(
        **FAMILY | dict(num_hidden_layers=4), intermediate_size=40, moe_intermediate_size=24, num_experts=6, head_dim=8,
        decoder_sparse_step=2, mlp_only_layers=[2], tie_word_embeddings=True, attention_bias=True)),
    "qwen2-moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(
        **FAMILY, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=8)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**FAMILY, intermediate_size=24, num_experts=8, clip_qkv=2.0)),
    "glm4-moe": (Glm4MoeForCausalLM, Glm4MoeConfig(
        **FAMILY | dict(num_hidden_layers=3), intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8, n_shared_experts=2,
        n_group=4, topk_group=2, routed_scaling_factor=1.8, head_dim=16, partial_rotary_factor=0.5, use_qk_norm=True,
        attention_bias=True, first_k_dense_replace=1)),
    "deepseek-v3": (DeepseekV3ForCausalLM, DeepseekV3Config(
        **FAMILY | dict(num_hidden_layers=3, num_key_value_heads=4, max_position_embeddings=128), intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8,
        n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12,
        qk_rope_head_dim=8, v_head_dim=10, rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=64, beta_fast=8, beta_slow=1,
            mscale=0.8, mscale_all_dim=1.0))),
    # Without `mscale_all_dim`, of which transformers 4 leaves out a part.
    "deepseek-v2": (DeepseekV2ForCausalLM, DeepseekV2Config(
        **FAMILY | dict(num_hidden_layers=3, num_key_value_heads=4, max_position_embeddings=128), intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8,
        n_shared_experts=2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0, first_k_dense_replace=1,
        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=64, beta_fast=8, beta_slow=1))),
    # No sequence of the tests has more than the 256 positions from which versions of transformers turn by different angles.
    # With the noise that Phi-3.5-MoE was trained with, few logits of so small a router would be near each other.
    "phimoe": (PhimoeForCausalLM, PhimoeConfig(
        **FAMILY | dict(num_experts_per_tok=2, max_position_embeddings=512), intermediate_size=24, num_local_experts=8, attention_bias=True,
        lm_head_bias=True, sliding_window=512, router_jitter_noise=0.2, rope_parameters=dict(
            rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=256, short_factor=[1.0, 1.1, 1.3, 1.7],
            long_factor=[1.1, 2.0, 5.0, 9.0], short_mscale=1.2, long_mscale=1.4))),
}


def family(name, seed):
    model_class, config = FAMILIES[name]
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.to(torch.bfloat16).float())
        biases = [buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
        for bias in biases:
            bias.uniform_(0, 0.3)
    biases = [bias.clone() for bias in biases]
    generator = torch.Generator().manual_seed(seed)
    golden(name, model, [torch.randint(0, config.vocab_size, (length,), generator=generator) for length in (14, 5)])
    path = directory(name)
    model.to(torch.bfloat16)
    for buffer, bias in zip([b for key, b in model.named_buffers() if key.endswith("e_score_correction_bias")], biases):
        buffer.data = bias  # f32, as in the checkpoints of these families
    model.save_pretrained(path)
    settings = json.loads((path / "config.json").read_text())
    # Where transformers 4 looks for them.
    settings |= {"rope_theta": 10000.0}
    settings |= {key: getattr(config, key) for key in ("num_experts",) if hasattr(config, key)}
    rotation = settings["rope_parameters"]
    settings |= {key: rotation[key] for key in ("partial_rotary_factor",) if key in rotation}
    if rotation["rope_type"] != "default":
        settings["rope_scaling"] = {key: value for key, value in rotation.items() if key != "rope_theta"}
    settings.pop("transformers_version", None)
    (path / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FIXTURES / "tiny-mixtral" / file, path / file)
    (path / "model.safetensors").chmod(0o644)


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    asked = sys.argv[1:]
    for seed, name in enumerate(FAMILIES, start=21):
        if not asked or name in asked:
            family(name, seed)
    if asked:
        return
    features = {
        "tied": dict(tie_word_embeddings=True),
        "sliding-window": dict(sliding_window=7),
        "head-dim": dict(head_dim=12, num_attention_heads=3, num_key_value_heads=3),
    }
    for seed, (name, changes) in enumerate(features.items(), start=1):
        model = random_model(seed, **changes)
        save(directory(name), per_expert_tensors(model), hf_settings(model))
        golden(name, model, random_ids(seed))

    model = random_model(11)
    tensors = per_expert_tensors(model)
    save(directory("fused"), fused(tensors), hf_settings(model))
    golden("fused", model, random_ids(11))

    model = random_model(12)
    params = dict(dim=HIDDEN, n_layers=LAYERS, head_dim=8, hidden_dim=INTERMEDIATE, n_heads=2, n_kv_heads=1,
                  norm_eps=1e-5, vocab_size=VOCAB, rope_theta=10000.0,
                  moe=dict(num_experts_per_tok=2, num_experts=EXPERTS))
    save(directory("consolidated"), consolidated(per_expert_tensors(model), 2, 1), params,
         "consolidated.safetensors", "params.json")
    golden("consolidated", model, random_ids(12))

    model = random_model(13)
    ranks, tensors = factored(model, per_expert_tensors(model))
    settings = hf_settings(model) | {
        "architectures": ["LowRankMixtralForCausalLM"], "model_type": "lowrank_mixtral",
        "lowrank_config": {"format": "lowrank-compress", "format_version": 1, "ranks": ranks}}
    save(directory("lowrank"), tensors, settings)
    golden("lowrank", model, random_ids(13))

    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny-mixtral", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    golden("tiny-mixtral", model, [torch.randint(0, 1024, (length,), generator=generator) for length in (32, 11)])
    passage(model)


if __name__ == "__main__":
    main()
