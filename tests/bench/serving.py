"""Times decode and prefill of the transformers that is installed here: an original and compressed ones, in turns, in f32.

    python tests/bench/serving.py wide --old DIR
    python tests/bench/serving.py DIR DIR ... --threads 1

The first DIR is the original, and every other line says its tokens per second divided by the original's. `wide` makes a random
Mixtral (1024/3584, 8 experts, 2 layers) and outputs of random factors beside it: u·v and pivoted, a fifth smaller, with one rank
for all or one for each matrix. Products take as long as those of real weights. `--old DIR` adds the outputs with another version
of `lowrank_experts.py` and `modeling_*.py`, from DIR. Decoding is one step on a cache of `--context` tokens, prefill is
`--prompt` tokens; both at batch 1 and 16. Medians of `--repeats` turns. `--clock cpu` counts the CPU seconds
of this process, for a machine that others use at the same time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

SCRATCH = tempfile.TemporaryDirectory(prefix="lowrank-serving-")
os.environ.update(HF_HOME=SCRATCH.name, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import jinja2
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MixtralConfig, MixtralForCausalLM

transformers.utils.logging.disable_progress_bar()
ASSETS = Path(__file__).parents[2] / "crates/lowrank-writer/assets/python"
WIDE = dict(hidden_size=1024, intermediate_size=3584, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
            num_attention_heads=16, num_key_value_heads=4, head_dim=64, vocab_size=4096, max_position_embeddings=4096)
# Ranks that leave four fifths of an expert's parameters, and how far those of one matrix lie from them.
RANK = {"uv": 640, "pivoted": 752}
SPREAD = 96


def code(family, old):
    """The Python files beside an output: those of the checkout, or those of an output."""
    if old:
        return {file.name: file.read_text() for file in old.glob("*.py")}
    fill = lambda name: jinja2.Template((ASSETS / name).read_text(), keep_trailing_newline=True).render(family)
    kind = family["model_type"]
    return {
        f"modeling_{kind}.py": fill("modeling.py.jinja"),
        f"configuration_{kind}.py": fill("configuration.py.jinja"),
        "lowrank_experts.py": (ASSETS / "lowrank_experts.py").read_text(),
    }


def wide(folder, old):
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**WIDE)).save_pretrained(folder / "original")
    family = next(it for it in json.loads((ASSETS / "families.json").read_text()) if it["class"] == "Mixtral")
    names = [folder / "original"]
    for storage in ("uv", "pivoted"):
        for ranks in ("equal", "unequal"):
            draw = torch.Generator().manual_seed(1)
            rank = lambda: RANK[storage] + (
                0 if ranks == "equal" else 8 * int(torch.randint(-SPREAD // 8, SPREAD // 8 + 1, (), generator=draw))
            )
            config = json.loads((folder / "original/config.json").read_text()) | {
                "model_type": family["model_type"],
                "auto_map": {
                    "AutoConfig": "configuration_lowrank_mixtral.LowRankMixtralConfig",
                    "AutoModelForCausalLM": "modeling_lowrank_mixtral.LowRankMixtralForCausalLM",
                },
                "lowrank_config": {"format": "lowrank-compress", "format_version": 1, "storage": storage, "ranks": {
                    f"model.layers.{layer}.block_sparse_moe.experts.{e}.{name}": rank()
                    for layer in range(WIDE["num_hidden_layers"]) for e in range(WIDE["num_local_experts"])
                    for name in ("w1", "w2", "w3")
                }},
            }
            for label, source in (("new", None), ("old", old)):
                if label == "old" and not old:
                    continue
                out = folder / f"{storage}, {ranks} ranks, {label}"
                out.mkdir()
                (out / "config.json").write_text(json.dumps(config))
                for name, text in code(family, source).items():
                    (out / name).write_text(text)
                names.append(out)
    return names


def load(path, random):
    if random:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
        for name, buffer in model.named_buffers():
            if name.endswith(".order"):
                buffer.copy_(torch.randperm(len(buffer)))
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def decode(model, batch, arguments):
    """A function that decodes a token for every sequence. The routed experts differ from step to step."""
    draw = torch.Generator().manual_seed(2)
    cache = DynamicCache(config=model.config)
    tokens = lambda length: torch.randint(model.config.vocab_size, (batch, length), generator=draw)
    model(tokens(arguments.context), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def run():
        for _ in range(arguments.steps):
            model(tokens(1), past_key_values=cache, use_cache=True)
        cache.crop(-arguments.steps)
        draw.manual_seed(3)

    return run, batch * arguments.steps


def prefill(model, batch, arguments):
    ids = torch.randint(model.config.vocab_size, (batch, arguments.prompt), generator=torch.Generator().manual_seed(4))

    @torch.no_grad()
    def run():
        model(ids, use_cache=False)

    return run, ids.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the original and outputs, or `wide`")
    parser.add_argument("--old", type=Path, help="an output whose Python files to compare with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="tokens that a turn decodes")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    random = arguments.models == ["wide"]
    paths = wide(Path(SCRATCH.name), arguments.old) if random else [Path(it) for it in arguments.models]
    models = {path.name: load(path, random and index > 0) for index, path in enumerate(paths)}
    rows = []
    for phase in (decode, prefill):
        for batch in arguments.batches:
            runs = {name: phase(model, batch, arguments) for name, model in models.items()}
            seconds = {name: [] for name in runs}
            for turn in range(arguments.repeats + 1):  # the first is not counted: what is set up at the first use
                for name, (run, _) in runs.items():
                    start = clock()
                    run()
                    if turn:
                        seconds[name].append(clock() - start)
            base = None
            for name, (_, tokens) in runs.items():
                speed = tokens / statistics.median(seconds[name])
                base = base or speed
                row = {"phase": phase.__name__, "batch": batch, "model": name, "tokens_per_s": round(speed, 1),
                       "ratio": round(speed / base, 3)}
                rows.append(row)
                if not arguments.json:
                    print(f"{row['phase']:8} {batch:3}  {name:36} {speed:10.1f} tokens/s {speed / base:6.2f}", flush=True)
    version = f"transformers {transformers.__version__}, torch {torch.__version__}, {arguments.threads} threads, {arguments.clock} seconds"
    print(json.dumps({"version": version, "rows": rows}) if arguments.json else version)


if __name__ == "__main__":
    main()
