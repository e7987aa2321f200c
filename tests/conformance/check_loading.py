#!/usr/bin/env python3
"""Does a factored checkpoint load the same on every path, and does a path that loses a tensor fail?

    check_loading.py DIR [DIR ...]

The reference takes its tensors straight from the shards, without any loader. Every way to load DIR, with transformers and
with accelerate (plain, low memory, meta device, offloaded to the CPU and to disk), must give the reference's logits. A
checkpoint without one `order` must be refused, or fail when it runs. CPU, offline.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from check_checkpoint import SCRATCH, Checks, require  # first: it sets what transformers reads when it is imported

import accelerate
import torch
import transformers
from accelerate.utils import modeling
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

transformers.utils.logging.disable_progress_bar()
modeling.is_tqdm_available = lambda: False
logging.getLogger("accelerate").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")

LOGITS_TOLERANCE = 1e-5
FAILURES = (ValueError, IndexError, RuntimeError, KeyError, AttributeError)


def folder():
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))


def tensors(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return {name: tensor for shard in set(index["weight_map"].values()) for name, tensor in load_file(path / shard).items()}


def named(path):
    """All tensors of the model: one that is tied is stored once."""
    found = tensors(path)
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


def built(path, auto=AutoModelForCausalLM):
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    return auto.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()


def reference(path):
    model = built(path)
    model.load_state_dict(named(path), strict=True)
    return model


def from_pretrained(path, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(path, trust_remote_code=True, dtype=torch.float32, **options).eval()


def device_map(path, where, names=None):
    """The named modules (or every layer) at `where`, the rest on the CPU."""
    layers = AutoConfig.from_pretrained(path, trust_remote_code=True).num_hidden_layers
    modules = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    modules += [f"model.layers.{layer}" for layer in range(layers)]
    names = [f"model.layers.{layer}" for layer in range(layers)] if names is None else names
    return {module: where if module in names else "cpu" for module in modules}


def offloaded_to_disk(path, names=None, **options):
    return from_pretrained(path, device_map=device_map(path, "disk", names), offload_folder=folder(), **options)


def cpu_offload(path):
    return accelerate.cpu_offload(from_pretrained(path), execution_device="cpu", offload_buffers=True)


def cpu_offload_without_buffers(path):
    return accelerate.cpu_offload(from_pretrained(path), execution_device="cpu")


def disk_offload(path, **options):
    return accelerate.disk_offload(from_pretrained(path), folder(), execution_device="cpu", **options)


def empty(path):
    with accelerate.init_empty_weights():
        model = built(path)
    model.tie_weights()
    return model


def load_and_dispatch(path, where=None, **options):
    """accelerate's own loader, on a model whose weights are on the meta device."""
    index = path / "model.safetensors.index.json"
    options.setdefault("device_map", device_map(path, where) if where else {"": "cpu"})
    return accelerate.load_checkpoint_and_dispatch(
        empty(path), index, dtype=torch.float32, offload_folder=folder(), **options
    )


def assigned(path):
    with torch.device("meta"):
        model = built(path)
    model.load_state_dict({name: widened(tensor) for name, tensor in named(path).items()}, strict=True, assign=True)
    return with_rotary(model, path)


def emptied(path):
    """As FSDP and others do: on meta, then on a device with arbitrary contents, then loaded."""
    with torch.device("meta"):
        model = built(path)
    model.to_empty(device="cpu")
    model.load_state_dict(named(path), strict=True)
    return with_rotary(model, path)


def widened(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def with_rotary(model, path):
    """The frequencies are in no checkpoint: the caller of such a path computes them anew."""
    model.model.rotary_emb = built(path).model.rotary_emb
    return model


def saved(path, load=from_pretrained):
    again = folder()
    load(path).save_pretrained(again)
    return from_pretrained(again)


@torch.no_grad()
def logits_of(model, batch):
    return model(batch).logits.float()


def check_same(load, path, expected, batch):
    difference = (logits_of(load(path), batch) - expected).abs().max().item()
    require(difference <= LOGITS_TOLERANCE, f"logits differ by {difference:.2e}")
    return f"logits within {difference:.0e}"


@torch.no_grad()
def check_headless(path, batch, hidden, **options):
    difference = (from_pretrained(path, AutoModel, **options)(batch).last_hidden_state - hidden).abs().max().item()
    require(difference <= LOGITS_TOLERANCE, f"hidden states differ by {difference:.2e}")


@torch.no_grad()
def check_classifier(path, batch, hidden):
    model = from_pretrained(path, AutoModelForSequenceClassification, num_labels=3)
    row, last = batch[:1], hidden[:1, -1]
    require(type(model).__name__.endswith("ForSequenceClassification"), type(model).__name__)
    difference = (model(row).logits - model.score(last)).abs().max().item()
    require(difference <= LOGITS_TOLERANCE, f"scores differ by {difference:.2e}")
    again = folder()
    model.save_pretrained(again)
    reloaded = from_pretrained(again, AutoModelForSequenceClassification)
    kept = reloaded.state_dict()
    differing = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, kept[name])]
    require(not differing, f"saved and loaded again, {len(differing)} tensors differ, first {differing[:1]}")
    # Products of the same numbers at other addresses may be rounded otherwise.
    difference = (reloaded(row).logits - model(row).logits).abs().max().item()
    require(difference <= LOGITS_TOLERANCE, f"saved and loaded again, scores differ by {difference:.2e}")
    with torch.enable_grad():
        model.train()(row, labels=torch.tensor([1])).loss.backward()
    reached = sum(p.grad is not None for name, p in model.named_parameters() if ".experts." in name)
    require(reached, "no gradient reaches the experts")
    return f"{reached} expert tensors have gradients"


def without_one(path):
    """The checkpoint without its first `order`."""
    other = folder()
    for file in path.iterdir():
        if file.suffix in (".py", ".json") and not file.name.startswith("model.safetensors"):
            shutil.copy(file, other)
    kept = tensors(path)
    lost = min(name for name in kept if name.endswith(".order"))
    del kept[lost]
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(kept, "model.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    return other


def check_fails(load, path, expected, batch):
    """An error, when it loads or when it runs. Logits are what must not come."""
    try:
        logits_of(load(path), batch)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    raise AssertionError("it ran")


def loosely(path):
    model = built(path)
    model.load_state_dict(tensors(path), strict=False)
    return model


def right_or_error(load, path, expected, batch):
    """A path that this code cannot mend may fail, but may not give other logits."""
    try:
        logits = logits_of(load(path), batch)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    difference = (logits - expected).abs().max().item()
    require(difference <= LOGITS_TOLERANCE, f"silently other logits, by {difference:.2e}")
    return f"logits within {difference:.0e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", type=Path, nargs="+", metavar="DIR", help="factored checkpoint")
    print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}")
    return 1 if sum(check_all(path) for path in parser.parse_args().compressed) else 0


def check_all(path):
    """How many ways to load a checkpoint fail."""
    print(f"-- {path.name}", flush=True)
    model = reference(path)
    batch = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, batch)
    with torch.no_grad():
        hidden = model.model(batch).last_hidden_state
    # A head that is tied to the embedding lies where that lies.
    some = ["model.layers.1", *([] if model.config.tie_word_embeddings else ["lm_head"])]
    check = Checks()
    paths = {
        "plain": from_pretrained,
        "low_cpu_mem_usage": lambda path: from_pretrained(path, low_cpu_mem_usage=True),
        'device_map "cpu"': lambda path: from_pretrained(path, device_map="cpu"),
        'device_map "auto"': lambda path: from_pretrained(path, device_map="auto"),
        "some layers and the head on disk": lambda path: offloaded_to_disk(path, some),
        "every layer on disk": offloaded_to_disk,
        "accelerate, offloaded to the CPU with buffers": cpu_offload,
        "accelerate, offloaded to the CPU without buffers": cpu_offload_without_buffers,
        "accelerate, offloaded to disk": disk_offload,
        "accelerate, offloaded to disk with buffers": lambda path: disk_offload(path, offload_buffers=True),
        "accelerate, from meta": load_and_dispatch,
        "accelerate, from meta to disk with buffers": lambda path: load_and_dispatch(path, "disk", offload_buffers=True),
        "meta device, tensors assigned": assigned,
        "meta device, emptied, tensors copied": emptied,
        "saved and loaded again": saved,
    }
    for name, load in paths.items():
        check(name, check_same, load, path, expected, batch)
    # Here the caller's choice leaves buffers unloaded, or transformers 4 looks for them among the parameters.
    for name, load in {
        "every layer on disk, saved and loaded again": lambda path: saved(path, offloaded_to_disk),
        "every layer on disk, offload_buffers=False": lambda path: offloaded_to_disk(path, offload_buffers=False),
        "accelerate, from meta to disk without buffers": lambda path: load_and_dispatch(path, "disk"),
    }.items():
        check(f"{name}: right or an error", right_or_error, load, path, expected, batch)
    check("AutoModel", check_headless, path, batch, hidden)
    disk = {key.removeprefix("model."): where for key, where in device_map(path, "disk").items() if key != "lm_head"}
    check("AutoModel, layers on disk", lambda: check_headless(path, batch, hidden, device_map=disk, offload_folder=folder()))
    check("AutoModelForSequenceClassification", check_classifier, path, batch, hidden)
    if any(name.endswith(".order") for name in model.state_dict()):
        lacking = without_one(path)
        for name, load in {
            "from_pretrained": from_pretrained,
            "every layer on disk": offloaded_to_disk,
            "AutoModelForCausalLM.from_config": lambda _: built(path),
            "load_state_dict(strict=False)": loosely,
            "accelerate, from meta": load_and_dispatch,
        }.items():
            check(f"without one `order`, {name} fails", check_fails, load, lacking, expected, batch)
    print(f"{check.passed} passed, {check.failed} failed", flush=True)
    return check.failed


if __name__ == "__main__":
    sys.exit(main())
