#!/usr/bin/env python3
"""Does our forward pass read every key of a config as transformers does?

    check_configs.py --program target/release/config_logits [--compress target/release/lowrank-compress]
    check_configs.py --program target/release/config_logits --edits N [--seed S] [--stricter]

Without --edits: a table. Every key that the program accepts, with every kind of value that it accepts, is one small random
checkpoint, whose logits must be those of the transformers installed here; so must those of the config that an output would
carry. params.json is compared with the model that mistral-inference builds of it, spelled as a config of transformers.

With --edits N: N random edits of a config (keys deleted, null, of another value or type, unknown, inside rope_parameters;
one to four at once). The outcome is a refusal in one line, or equal logits. Where transformers refuses and we do not, the
reason must be one of RECORDED. --stricter also counts what we refuse and transformers loads.

Ends with `N passed, N failed`; the exit status is 1 if any failed.
"""

import argparse
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

TOLERANCE = 1e-4
MAJOR = int(transformers.__version__.split(".")[0])
ABSENT = object()
PARAMETERS_MAX = 30_000_000

# What transformers refuses to load and we read, and why that is right.
RECORDED = [
    (5, r"expected (float|int|bool|str|list|None|.*\|)", "transformers 5 checks the type of a key that changes no logit; 4.57 loads it"),
    (5, r"strides should be multiple of 16 bytes", "the grouped products of transformers 5 need widths of whole 16 bytes; 4.57 runs it"),
    (4, r"'NoneType' object has no attribute 'to_dict'", "4.57 fails where `quantization_config` is null; 5 takes it for absent"),
    (4, r"KeyError: None", "4.57 needs `rope_type` in `rope_scaling`; 5 takes the default rotation"),
]

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_local_experts=4, num_experts_per_tok=2, vocab_size=64,
)
# As transformers 5 saves it, and as 4.57 does.
BASES = [
    dict(
        SIZES, architectures=["MixtralForCausalLM"], attention_dropout=0.0, bos_token_id=1, dtype="float32", eos_token_id=2,
        hidden_act="silu", initializer_range=0.02, max_position_embeddings=128, model_type="mixtral",
        output_router_logits=False, pad_token_id=None, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, router_aux_loss_coef=0.02,
        router_jitter_noise=0.0, sliding_window=None, tie_word_embeddings=False, transformers_version="5.23.0",
        use_cache=True,
    ),
    dict(
        SIZES, architectures=["MixtralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
        hidden_act="silu", initializer_range=0.02, max_position_embeddings=128, model_type="mixtral",
        output_router_logits=False, rms_norm_eps=1e-5, rope_theta=10000.0, router_aux_loss_coef=0.02, sliding_window=7,
        tie_word_embeddings=False, torch_dtype="float32", transformers_version="4.57.6", use_cache=True,
    ),
]
PARAMS = dict(
    dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=64,
    rope_theta=10000.0, moe={"num_experts": 4, "num_experts_per_tok": 2},
)

# Values of the keys that a family reads. A key without an entry here fails the table.
DEFAULT = {"rope_type": "default"}
CONFIG_VALUES = {
    "model_type": ["mixtral"],
    "architectures": [ABSENT, None, [], ["MixtralForCausalLM"]],
    "auto_map": [{}, {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}],
    "dtype": [ABSENT, None, "float32", "bfloat16", "float16"],
    "torch_dtype": [None, "float32", "bfloat16"],
    "pad_token_id": [None, 0, 63, -1],
    "id2label": [None, {"0": "LABEL_0", "1": "LABEL_1"}],
    "label2id": [None, {"LABEL_0": 0, "LABEL_1": 1}],
    "num_labels": [2, 5],
    "problem_type": [None, "regression"],
    "hidden_size": [16, 48, ABSENT],
    "intermediate_size": [8, 52, ABSENT],
    "num_hidden_layers": [1, 3, ABSENT],
    "num_attention_heads": [2, 8, ABSENT],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [4, 16, None, ABSENT],
    "num_local_experts": [2, 5, ABSENT],
    "num_experts": [4],
    "num_experts_per_tok": [1, 3, 4, ABSENT],
    "vocab_size": [64, 100, ABSENT],
    "max_position_embeddings": [16, 4096, None, ABSENT],
    "rms_norm_eps": [1e-6, 1e-2, ABSENT],
    "hidden_act": ["silu", "swish", ABSENT],
    "sliding_window": [1, 4, 100, None, ABSENT],
    "use_sliding_window": [None, False],
    "tie_word_embeddings": [True, False, None, ABSENT],
    "rope_theta": [1000000, 1e6],
    "rope_parameters": [None, ABSENT, {}, DEFAULT, {"rope_theta": 5e5}, {**DEFAULT, "rope_theta": 10000},
                        {"type": "default", "rope_theta": 1e6}, {**DEFAULT, "partial_rotary_factor": 1.0},
                        {**DEFAULT, "original_max_position_embeddings": 64}, {**DEFAULT, "factor": 1.0}],
    "rope_scaling": [None, {}, DEFAULT, {"type": "default"}, {**DEFAULT, "rope_theta": 1e6}, {"rope_theta": 1e6},
                     {**DEFAULT, "partial_rotary_factor": 1, "factor": 1.0}],
    "quantization_config": [ABSENT], "compression_config": [None], "quantization": [None],
    "ranks": [None], "lowrank_config": [None],
}
# Values that only go together with others.
CONFIG_TOGETHER = [
    {"num_key_value_heads": ABSENT, "num_attention_heads": 8, "head_dim": 4},
    {"num_key_value_heads": ABSENT, "num_attention_heads": ABSENT, "head_dim": None, "hidden_size": 64},
    {"num_local_experts": ABSENT, "num_experts_per_tok": ABSENT},
    {"num_experts": 8, "num_local_experts": ABSENT},
    {"sliding_window": 4, "use_sliding_window": True},
    {"head_dim": None, "hidden_size": 40, "num_attention_heads": 6},
    {"rope_parameters": ABSENT, "rope_theta": 10000.0},
    {"rope_parameters": {"rope_theta": 25000.0}, "rope_theta": 25000.0},
    {"rope_parameters": {**DEFAULT, "rope_theta": 25000.0}, "rope_scaling": {**DEFAULT, "rope_theta": 25000.0}, "rope_theta": 25000.0},
    {"rope_parameters": ABSENT, "rope_theta": 10000.0, "rope_scaling": {"type": "default"}, "sliding_window": 6, "tie_word_embeddings": True},
]
HARMLESS = {
    "Flag": [True, False, None], "Number": [0.5, 3, None], "Text": ["x", None], "TokenIds": [3, [2, 5], None],
    "Any": [None],
}
HARMLESS_OF = {
    "_attn_implementation": ["eager", "sdpa"], "attn_implementation": ["eager", "sdpa"], "_attn_implementation_internal": ["sdpa"],
    "task_specific_params": [{"x": {"max_length": 5}}],
}
PARAMS_VALUES = {
    "dim": [16, 48], "n_layers": [1, 3], "head_dim": [4, 16], "hidden_dim": [8, 52], "n_heads": [2, 8], "n_kv_heads": [1, 4],
    "norm_eps": [1e-6, 1e-2], "vocab_size": [64, 100], "rope_theta": [1000000, 1e6, None, ABSENT],
    "moe": [{"num_experts": 3, "num_experts_per_tok": 1}, {"num_experts": 4, "num_experts_per_tok": 4},
            {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 0, "route_every_n": 1}],
    "sliding_window": [4, None], "_sliding_window": [5, None], "tied_embeddings": [True, False],
    "max_position_embeddings": [64], "quantization": [None],
}


class Theirs(Exception):
    """transformers, or mistral-inference's rules, do not take this model as it is."""


def sizes_of(config):
    """Dimensions as the library sees them."""
    heads = config.num_attention_heads
    return (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads, config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads, config.num_local_experts, config.vocab_size,
        bool(config.tie_word_embeddings),
    )


def parameters_of(h, f, layers, heads, kv, d, experts, vocab, tied):
    return (1 if tied else 2) * vocab * h + layers * (h * d * (2 * heads + 2 * kv) + experts * h * (1 + 3 * f) + 2 * h) + h


def weights_of(h, f, layers, heads, kv, d, experts, vocab, tied):
    """Random weights that give logits of order one, and attention that is not flat."""
    g = torch.Generator().manual_seed(5)
    r = lambda *shape: torch.randn(*shape, generator=g) * (1.5 / shape[-1] ** 0.5)
    sharp = 2 if layers < 8 else 1  # in a deep model, rounding grows with it
    ones = lambda n: 0.5 + torch.rand(n, generator=g)
    t = {"model.embed_tokens.weight": r(vocab, h) * 4, "model.norm.weight": ones(h)}
    if not tied:
        t["lm_head.weight"] = r(vocab, h)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        t |= {
            p + "input_layernorm.weight": ones(h), p + "post_attention_layernorm.weight": ones(h),
            p + "self_attn.q_proj.weight": r(heads * d, h) * sharp, p + "self_attn.k_proj.weight": r(kv * d, h) * sharp,
            p + "self_attn.v_proj.weight": r(kv * d, h), p + "self_attn.o_proj.weight": r(h, heads * d) / layers**0.5,
            p + "block_sparse_moe.gate.weight": r(experts, h),
        }
        for x in range(experts):
            q = p + f"block_sparse_moe.experts.{x}."
            t |= {q + "w1.weight": r(f, h), q + "w2.weight": r(h, f) / layers**0.5, q + "w3.weight": r(f, h)}
    return t


RENAMES = [
    ("model.layers", "layers"), ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
    ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"), ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attention_norm"), ("block_sparse_moe", "feed_forward"), ("model.embed_tokens", "tok_embeddings"),
    ("model.norm", "norm"), ("lm_head", "output"),
]


def as_mistral(weights, d):
    """The same weights under Mistral's names, rotary pairs side by side within a head."""
    out = {}
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            w = w.view(-1, 2, d // 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)
        for a, b in RENAMES:
            name = name.replace(a, b)
        out[name] = w.contiguous()
    return out


def config_of_params(params):
    """The model that mistral-inference builds (`TransformerArgs`, `Transformer`), spelled as a config."""
    dimension = lambda object, key: object[key] if type(object[key]) is int and object[key] > 0 else None
    try:
        moe = params["moe"]
        window, underscored = params.get("sliding_window"), params.get("_sliding_window")
        if window is not None and underscored is not None:
            raise Theirs("both windows")
        config = dict(
            model_type="mixtral", hidden_size=dimension(params, "dim"), num_hidden_layers=dimension(params, "n_layers"),
            head_dim=dimension(params, "head_dim"), intermediate_size=dimension(params, "hidden_dim"),
            num_attention_heads=dimension(params, "n_heads"), num_key_value_heads=dimension(params, "n_kv_heads"),
            rms_norm_eps=float(params["norm_eps"]), vocab_size=dimension(params, "vocab_size"),
            num_local_experts=dimension(moe, "num_experts"), num_experts_per_tok=dimension(moe, "num_experts_per_tok"),
            rope_theta=params.get("rope_theta") or 1000000.0, sliding_window=window if window is not None else underscored,
            tie_word_embeddings=bool(params.get("tied_embeddings")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Theirs(f"{type(error).__name__}: {error}") from None
    if None in [value for key, value in config.items() if key != "sliding_window"]:
        raise Theirs("a dimension that is no count")
    return config


@torch.no_grad()
def their_logits(folder, ids, **options):
    try:
        options = dict(dtype=torch.float32, output_loading_info=True, **options)
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(kind):
                raise Theirs(f"{kind}: {sorted(map(str, info[kind]))[:2]}")
        model.eval()
        rows = []
        for row in ids:
            out = model(input_ids=torch.tensor([row]))
            if not hasattr(out, "logits"):  # `return_dict` false: a tuple, whose logits have three dimensions
                out = next(x for x in out if torch.is_tensor(x) and x.dim() == 3)
                rows.append(out[0].float())
            else:
                rows.append(out.logits[0].float())
        return torch.cat(rows).flatten()
    except Theirs:
        raise
    except Exception as error:  # whatever stops a user stops here
        text = " ".join(str(error).split())
        raise Theirs(f"{type(error).__name__}: {text}") from None


class Run:
    def __init__(self, program, scratch):
        self.scratch, self.cache, self.at = Path(scratch), {}, 0
        g = random.Random(11)
        self.ids = [[g.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in (24, 9)]
        self.program = subprocess.Popen([program, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.counts, self.failures, self.worst = collections.Counter(), [], 0.0
        self.stricter = collections.Counter()

    def weights(self, sizes):
        if sizes not in self.cache:
            if len(self.cache) > 40:
                self.cache.clear()
            self.cache[sizes] = weights_of(*sizes)
        return self.cache[sizes]

    def folder(self, name, json_name, config, weights):
        folder = self.scratch / f"{self.at}-{name}"
        folder.mkdir()
        (folder / json_name).write_text(json.dumps(config))
        file = "consolidated.safetensors" if json_name == "params.json" else "model.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        return folder

    def ours(self, folder, ids):
        self.program.stdin.write(json.dumps({"folder": str(folder), "ids": ids}) + "\n")
        self.program.stdin.flush()
        answer = self.program.stdout.readline()
        if not answer:
            raise SystemExit(f"the program ended at {folder}: {json.dumps(self.now)}")
        answer = json.loads(answer)
        if "config" in answer:
            file = folder / "logits.f32"
            answer["logits"] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
        return answer

    def effective(self, config, json_name):
        """(config that transformers reads, its dimensions); None where there are none or they are huge."""
        try:
            hf = config_of_params(config) if json_name == "params.json" else config
            folder = self.scratch / f"{self.at}-sizes"
            folder.mkdir()
            if hf.get("num_key_value_heads", 0) is None:  # transformers 5 refuses null, and 4.57 takes the query heads
                hf = {**hf, "num_key_value_heads": hf.get("num_attention_heads", 32)}
            (folder / "config.json").write_text(json.dumps(hf))
            hf = config if json_name == "config.json" else hf
            sizes = sizes_of(AutoConfig.from_pretrained(folder))
            good = all(type(n) is int and n > 0 for n in sizes[:-1]) and parameters_of(*sizes) <= PARAMETERS_MAX
            return hf, sizes if good else None
        except Theirs as error:
            return error, None
        except Exception:
            return config, None

    def check(self, what, config, json_name="config.json", must_accept=False, fitting=True, stricter=False):
        self.at += 1
        self.now = what
        for old in self.scratch.glob(f"{self.at - 1}-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        hf, sizes = self.effective(config, json_name)
        base = sizes_of(AutoConfig.for_model("mixtral", **{k: v for k, v in SIZES.items()}))
        weights = self.weights(sizes if sizes and fitting else base)
        *_, d, _, vocab, _ = sizes if sizes and fitting else base
        ids = [[token % vocab for token in row] for row in self.ids]
        if json_name == "params.json":
            if d % 2:
                return
            mine = self.folder("mine", json_name, config, as_mistral(weights, d))
        else:
            mine = self.folder("model", json_name, config, weights)
        answer = self.ours(mine, ids)
        if "refused" in answer:
            line = answer["line"]
            if must_accept:
                return self.fail(what, f"refused: {line}")
            if answer["refused"] not in ("Unsupported", "BrokenCheckpoint") or "\n" in line:
                return self.fail(what, f"refused as {answer['refused']}: {line}")
            self.counts["refused"] += 1
            if stricter and isinstance(hf, dict):
                try:
                    folder = mine if json_name == "config.json" else self.folder("theirs", "config.json", hf, weights)
                    their_logits(folder, ids)
                    self.stricter[re.sub(r"^\S+: ", "", line)[:110]] += 1
                except Theirs:
                    pass
            return None
        # What an output would carry computes what we compute, in every version.
        carried = self.folder("carried", "config.json", answer["config"], weights)
        theirs = mine
        try:
            if isinstance(hf, Theirs):
                raise hf
            if json_name == "params.json":
                theirs = self.folder("theirs", "config.json", hf, weights)
            pairs = [("the base", their_logits(theirs, ids))]
        except Theirs as error:
            reason = next((why for major, text, why in RECORDED if major == MAJOR and re.search(text, str(error))), None)
            if reason is None:
                return self.fail(what, f"read here, refused there: {error}")
            self.counts[f"recorded: {reason}"] += 1
            return None
        outcome = "equal"
        if MAJOR == 4 and json_name == "config.json" and differs_in_theta(config):
            self.counts["recorded: 4.57 does not know `rope_theta` inside `rope_parameters`, and takes its default"] += 1
            pairs, outcome = [], None
        try:
            pairs.append(("the carried config", their_logits(carried, ids)))
        except Theirs as error:
            return self.fail(what, f"the carried config does not load: {error}")
        for name, logits in pairs:
            if logits.shape != answer["logits"].shape:
                return self.fail(what, f"{name}: another number of logits")
            difference = (logits - answer["logits"]).abs().max().item()
            if not difference <= TOLERANCE:
                return self.fail(what, f"logits differ from {name} by {difference:.1e}")
            self.worst = max(self.worst, difference)
        if outcome:
            self.counts[outcome] += 1
        return None

    def fail(self, what, why):
        self.failures.append(what)
        print(f"FAILED  {json.dumps(what)}: {why}", flush=True)


def differs_in_theta(config):
    """Whether only 5 finds the value of `rope_theta`."""
    inside = [
        config[key]["rope_theta"] for key in ("rope_scaling", "rope_parameters")
        if isinstance(config.get(key), dict) and "rope_theta" in config[key]
    ]
    return bool(inside) and inside[0] != config.get("rope_theta", 1e6)


def changed(config, edits):
    config = json.loads(json.dumps(config))
    for key, value in edits.items():
        if value is ABSENT:
            config.pop(key, None)
        else:
            config[key] = value
    return config


def shown(edits):
    return {key: "(absent)" if value is ABSENT else value for key, value in edits.items()}


def values_of(keys, read):
    """Every key with the values that its rule accepts; a key that is read and has no values here is an error."""
    out = {}
    for entry in keys:
        for name in entry["names"]:
            if entry["rule"] == "read":
                out[name] = read[name]
            elif entry["rule"] == "only":
                out[name] = entry["values"]
            else:
                out[name] = HARMLESS_OF.get(name, HARMLESS[entry["values"]])
    return out


def table(run, keys):
    tables = [
        ("config.json", BASES, values_of(keys["config"], CONFIG_VALUES), CONFIG_TOGETHER),
        ("params.json", [PARAMS], values_of(keys["params"], PARAMS_VALUES), [{"sliding_window": 3, "rope_theta": None}]),
    ]
    for json_name, bases, values, together in tables:
        cases = [{key: value} for key, all_of_it in values.items() for value in all_of_it] + together
        for at, edits in enumerate(cases):
            # Keys of the rotation go with the base of transformers 5; the others with both in turn.
            base = bases[0] if any("rope" in key for key in edits) else bases[at % len(bases)]
            if "sliding" in " ".join(edits):
                base = {**base, "sliding_window": None}
            run.check({json_name: shown(edits)}, changed(base, edits), json_name, must_accept=True)


# One of each way in which a config says its shapes.
CLASSES = [
    ("config.json", 0, {}),
    ("config.json", 1, {}),
    ("config.json", 0, {"num_key_value_heads": 4, "head_dim": None, "hidden_act": "swish"}),
    ("config.json", 0, {"num_local_experts": ABSENT, "num_experts_per_tok": ABSENT, "max_position_embeddings": ABSENT}),
    ("config.json", 1, {"tie_word_embeddings": True, "num_experts": 4, "rope_scaling": {"type": "default"}, "use_sliding_window": True}),
    ("params.json", None, {}),
    ("params.json", None, {"_sliding_window": 5, "rope_theta": ABSENT}),
]


def compressed(run, tool):
    """Our logits of an output are transformers' logits of it: its config carries what the base said."""
    for at, (json_name, base, edits) in enumerate(CLASSES):
        run.at += 1
        config = changed(PARAMS if base is None else BASES[base], edits)
        _, sizes = run.effective(config, json_name)
        weights = run.weights(sizes)
        if json_name == "params.json":
            weights = as_mistral(weights, sizes[5])
        model, out = run.folder("base", json_name, config, weights), run.scratch / f"class-{at}"
        words = ["--budget", "20%", "--calibrate", "none", "--cache", "none", "--quiet"]
        subprocess.run([tool, "--model", model, "--out", out, *words], check=True)
        what = {"compressed": json_name, **shown(edits)}
        try:
            difference = (run.ours(out, run.ids)["logits"] - their_logits(out, run.ids, trust_remote_code=True)).abs().max().item()
        except (Theirs, KeyError) as error:
            run.fail(what, f"the output does not load: {error}")
            continue
        if difference <= TOLERANCE:
            run.worst = max(run.worst, difference)
            run.counts["equal"] += 1
        else:
            run.fail(what, f"logits of the output differ by {difference:.1e}")


ANY = [None, True, False, 0, 1, 2, 3, 4, 8, 16, 64, -1, 0.0, 0.5, 1.0, 2.0, 1e-6, 1e4, 1e6, -1.0, "", "x", "silu", "swish",
       "gelu", "default", "float32", [], [1], ["x"], {}, {"a": 1}]
UNKNOWN = ["made_up", "router_scale", "layer_norm_eps", "query_scale", "rope_base", "_private", "n_head", "act_fn", "text_config"]
ROPE = ["rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings", "mrope_section"]
ROPE_VALUES = ["default", "linear", 1.0, 1, 2.0, 1e4, 1e6, 1000000, None, 64, 0.5, "x", [2, 2]]


def edit(rng, config, accepted):
    """One random edit in place; returns what it did."""
    kind = rng.choice(["delete", "null", "accepted", "accepted", "accepted", "same", "other", "unknown", "rope"])
    if kind == "unknown":
        key = rng.choice(UNKNOWN)
        config[key] = rng.choice(ANY)
        return key, config[key]
    if kind == "rope":
        place = rng.choice(["rope_parameters", "rope_scaling", "moe"]) if "moe" in config else rng.choice(["rope_parameters", "rope_scaling"])
        inside = config.get(place)
        inside = dict(inside) if isinstance(inside, dict) else {}
        names = ["num_experts", "num_experts_per_tok", "num_shared_experts", "x"] if place == "moe" else ROPE
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(names)
            if rng.random() < 0.2:
                inside.pop(key, None)
            else:
                inside[key] = rng.choice(ROPE_VALUES if place != "moe" else [0, 1, 2, 4, None, "x"])
        config[place] = inside
        return place, inside
    if kind == "delete":
        key = rng.choice(sorted(config))
        config.pop(key)
        return key, "(absent)"
    if kind == "null":
        key = rng.choice(sorted(set(config) | set(accepted)))
        config[key] = None
    elif kind == "accepted":
        key = rng.choice(sorted(accepted))
        value = rng.choice(accepted[key])
        if value is ABSENT:
            config.pop(key, None)
            return key, "(absent)"
        config[key] = value
    else:
        key = rng.choice(sorted(config))
        same = [value for value in ANY if type(value) is type(config[key])]
        config[key] = rng.choice(same if kind == "same" and same else ANY)
    return key, config[key]


def edits(run, keys, count, seed, stricter):
    rng = random.Random(seed)
    accepted = values_of(keys["config"], CONFIG_VALUES)
    of_params = values_of(keys["params"], PARAMS_VALUES)
    for _ in range(count):
        is_params = rng.random() < 0.15
        config = json.loads(json.dumps(PARAMS if is_params else rng.choice(BASES)))
        done = [edit(rng, config, of_params if is_params else accepted) for _ in range(rng.choice([1, 1, 1, 2, 3, 4]))]
        name = "params.json" if is_params else "config.json"
        run.check({name: done}, config, name, fitting=rng.random() < 0.8, stricter=stricter)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--compress", help="the tool, to compress one checkpoint of each shape class")
    parser.add_argument("--edits", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stricter", action="store_true")
    arguments = parser.parse_args()
    keys = json.loads(subprocess.run([arguments.program, "keys"], check=True, capture_output=True, text=True).stdout)["mixtral"]
    # transformers 4 guesses a missing `model_type` from the folder's name, so the name holds no family.
    with tempfile.TemporaryDirectory(prefix="configs-") as scratch:
        run = Run(arguments.program, scratch)
        if arguments.edits is None:
            table(run, keys)
            if arguments.compress:
                compressed(run, arguments.compress)
        else:
            edits(run, keys, arguments.edits, arguments.seed, arguments.stricter)
    what = "every key and value" if arguments.edits is None else f"{arguments.edits} edits, seed {arguments.seed}"
    print(f"transformers {transformers.__version__}: {what}")
    for name, count in sorted(run.counts.items()):
        print(f"  {count} {name}" + (f", largest difference of a logit {run.worst:.1e}" if name == "equal" else ""))
    for line, count in run.stricter.most_common(40):
        print(f"  stricter, {count}: {line}")
    print(f"{sum(run.counts.values())} passed, {len(run.failures)} failed")
    sys.exit(1 if run.failures else 0)


if __name__ == "__main__":
    main()
