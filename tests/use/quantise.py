"""Quantises models as their users do: `quantise.py MODELS.json RESULTS.json --text FILE --calibrate FILE --work DIR [--only NAME]`.

MODELS.json: `[{"name": ..., "model": folder}]`. Every pair of model and quantiser runs in a process of its own: load and quantise,
perplexity, bytes in memory, save, load again, perplexity again. Prints a table in Markdown. A break without a known reason is an
error.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

WINDOW, TOKENS = 256, 4096
#: Numbers of one quantised group; ranks and widths are in multiples of it where a quantiser wants that.
GROUP = 32


def bitsandbytes(**settings):
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**settings)}


def torchao(config):
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(config)}


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return torchao(Int8WeightOnlyConfig())


def torchao_int4():
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))


def torchao_fp8():
    from torchao.quantization import Float8WeightOnlyConfig

    return torchao(Float8WeightOnlyConfig())


#: What `from_pretrained` is given.
LOADED = {
    "none": dict,
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "torchao fp8": torchao_fp8,
}
#: By llm-compressor, which calibrates.
GPTQ = "llm-compressor GPTQ"
QUANTISERS = [*LOADED, GPTQ]

#: Quantiser, step, words of the message, and why.
KNOWN = [
    ("bitsandbytes nf4", "loads", "block_n", "its product on the CPU wants every number of outputs in multiples of its block"),
    ("bitsandbytes nf4", "loads", "is invalid for input of size", "its product on the CPU wants at least 64 inputs"),
    ("bitsandbytes nf4", "reloads", "otherwise", "weights that its CPU product has packed are saved packed, and read as plain ones"),
    ("torchao int4", "loads", "CONVERSION", "inputs in groups of 32 only: `--rank-multiple 32`"),
    ("torchao int8", "loads", "CONVERSION", "a factor with one input"),
    ("torchao fp8", "loads", "CONVERSION", "a factor with one input"),
    (GPTQ, "loads", "not divisible by group_size", "inputs in groups of 32 only: `--rank-multiple 32`"),
    (
        GPTQ, "reloads", "otherwise",
        "transformers 5 has all experts in one tensor, and does not find those that llm-compressor wrote one by one "
        "(https://github.com/vllm-project/llm-compressor/issues/2939 is of this kind)",
    ),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to measure perplexity on")
    parser.add_argument("--calibrate", type=Path, required=True, help="for the quantisers that calibrate")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=QUANTISERS)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "QUANTISER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        a.results.write_text(json.dumps(measure(a, *a.one)))
        return
    found = []
    for model in json.loads(a.models.read_text()):
        for quantiser in a.only or QUANTISERS:
            row = {"model": model["name"], "quantiser": quantiser, **in_process(a, model["model"], quantiser)}
            print(json.dumps(row), flush=True)
            found.append(row)
            a.results.write_text(json.dumps(found, indent=1))
    unknown = table(found)
    if unknown:
        raise SystemExit("no known reason:\n" + "\n".join(unknown))


def table(rows):
    """Prints what was found; returns the breaks that nothing explains."""
    models, notes, unknown = list(dict.fromkeys(row["model"] for row in rows)), [], []
    print(f"\n| | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    for quantiser in dict.fromkeys(row["quantiser"] for row in rows):
        cells = []
        for row in (row for row in rows if row["quantiser"] == quantiser):
            cell = f"{row['perplexity']:.3f}, {row['bytes'] / 1e6:.1f} MB" if "perplexity" in row else "no"
            step = next((step for step in ("loads", "saves", "reloads") if row.get(step) != "yes"), None)
            if step is not None:
                note = reason(quantiser, step, row.get(step, ""))
                if note is None:
                    unknown.append(f"{row['model']}, {quantiser}, {step}: {row.get(step)}")
                    note = f"{step}: {row.get(step)}"
                if note not in notes:
                    notes.append(note)
                cell += {"loads": "", "saves": ", not saved", "reloads": ", not reloaded"}[step] + f" ({notes.index(note) + 1})"
            cells.append(cell)
        print(f"| {quantiser} | {' | '.join(cells)} |")
    print("\n" + "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)), flush=True)
    return unknown


def reason(quantiser, step, message):
    return next((why for name, at, words, why in KNOWN if (name, at) == (quantiser, step) and words in message), None)


def in_process(a, folder, quantiser):
    """One row, or what it ended with."""
    out = a.work / "row.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, a.models, out, "--text", a.text, "--calibrate", a.calibrate, "--work", a.work]
    done = subprocess.run([*command, "--one", folder, quantiser], capture_output=True, text=True)
    (a.work / "last.log").write_text(done.stdout + done.stderr)
    if out.is_file():
        return json.loads(out.read_text())
    return {"loads": last_line(done.stderr) or f"exit status {done.returncode}"}


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[")]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines or [""])[-1].strip()[:200]


def measure(a, folder, quantiser):
    import lowrank_compress  # noqa: F401  registers the classes
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    saved = a.work / "saved"
    subprocess.run(["rm", "-rf", saved], check=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    started = time.time()
    if quantiser == GPTQ:
        model = gptq(folder, tokenizer, a.calibrate)
    else:
        model = load(folder, **LOADED[quantiser]())
    row = {"loads": "yes", "seconds": round(time.time() - started, 1), "bytes": bytes_of(model)}
    row["perplexity"] = perplexity(model, tokenizer, a.text)
    step = "saves"
    try:
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        row["saves"], step = "yes", "reloads"
        row["stored"] = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        again = load(saved)
        row["perplexity_again"] = perplexity(again, tokenizer, a.text)
        row["reloads"] = "yes" if math.isclose(row["perplexity_again"], row["perplexity"], rel_tol=1e-4) else "otherwise"
    except Exception as error:  # What a library raises is what is asked.
        row[step] = last_line(f"{type(error).__name__}: {error}")
    return row


def load(folder, **settings):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def gptq(folder, tokenizer, text):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    windows = rows(tokenizer, text, 64 * WINDOW)
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]})
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head", "re:.*gate$"])
    model = load(folder)
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, max_seq_length=WINDOW,
        num_calibration_samples=len(windows),
    )
    return model


def rows(tokenizer, file, tokens):
    """Windows that begin with BOS."""
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"][:tokens]
    step = WINDOW - 1
    return [[tokenizer.bos_token_id, *ids[at : at + step]] for at in range(0, len(ids) - step, step)]


def perplexity(model, tokenizer, file):
    import torch

    total = count = 0
    with torch.no_grad():
        for row in rows(tokenizer, file, TOKENS):
            ids = torch.tensor([row])
            logits = model(input_ids=ids).logits.float()
            total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += len(row) - 1
    return math.exp(total / count)


def bytes_of(model):
    """Of parameters and buffers, with those inside of quantised tensors."""
    import torch

    def size(tensor):
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            return sum(size(getattr(tensor, name)) for name in names)
        return tensor.numel() * tensor.element_size()

    parts = {id(tensor): size(tensor) for tensor in [*model.parameters(), *model.buffers()] if isinstance(tensor, torch.Tensor)}
    # bitsandbytes keeps its scales beside the parameter.
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    extra = sum(state.absmax.numel() * state.absmax.element_size() for state in states if state is not None)
    extra += sum(scales.numel() * 4 for p in model.parameters() if (scales := getattr(p, "SCB", None)) is not None)
    return sum(parts.values()) + extra


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
