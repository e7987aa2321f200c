"""The evaluator of `cargo xtask bench peers`, which every driver in this folder uses, and what the drivers share.

A driver compresses a Mixtral by calling the functions of a published program from a clone that the user gives, and returns
the model. The evaluator runs it in f32 on the first tokens of the texts and prints one JSON document: expert parameters
before and after, and per text the increase of perplexity with the standard error of the paired difference over windows.
Texts become windows by the rule of `crates/lowrank-text/src/windows.rs`: pieces of 50,000 characters are encoded one by
one, and every window of 256 tokens begins with BOS.
"""

import argparse
import contextlib
import importlib.machinery
import json
import math
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

WINDOW = 256
PIECE_CHARACTERS = 50_000
BATCH = 16


class NotRun(Exception):
    """The program cannot do what is asked; the message says why, for the page."""


def windows(model, text, tokens, spread):
    """Token ids [count, 256]: the first windows of the text, or windows spread evenly over it."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    text = Path(text).read_text()
    pieces = [text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS)]
    ids = [id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False).ids]
    prefix = tokenizer.encode("").ids
    room = WINDOW - len(prefix)
    cut = [prefix + ids[at : at + room] for at in range(0, len(ids) - room + 1, room)]
    wanted = min(tokens // WINDOW, len(cut))
    return torch.tensor([cut[i * len(cut) // wanted] for i in range(wanted)] if spread else cut[:wanted])


def load(model, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


@torch.no_grad()
def losses(model, ids):
    """Mean loss of every window, in nats per predicted token."""
    found = []
    for batch in ids.split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits.double()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        found.append(loss.view(len(batch), -1).mean(dim=1))
    found = torch.cat(found)
    if not found.isfinite().all():
        raise NotRun("the compressed model's loss is not finite")
    return found


def expert_params(model):
    """Parameters of the MoE blocks without their routers; what experts share counts once."""
    of_blocks = [(name, p) for name, p in model.named_parameters() if ".block_sparse_moe." in name or ".mlp." in name]
    return sum(p.numel() for name, p in of_blocks if not name.endswith(".gate.weight"))


def original_losses(job):
    """Losses of the original by text, and its expert parameters, from a file if it was measured before."""
    key = {"texts": [Path(text).name for text in job.texts], "evaluation_tokens": job.evaluation_tokens}
    stored = json.loads(Path(job.original).read_text()) if Path(job.original).exists() else {}
    if stored.get("key") != key:
        model = load(job.model)
        found = [losses(model, windows(job.model, text, job.evaluation_tokens, False)).tolist() for text in job.texts]
        stored = {"key": key, "expert_params": expert_params(model), "losses": found}
        Path(job.original).write_text(json.dumps(stored))
    return stored


def drive(compress, about):
    """Runs a driver: `compress(job)` gives the model, and where it did not count them itself, None, and its expert
    parameters otherwise. `about` holds its `settings` and `patches`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True, help="clone of the program, or our checkpoint")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, required=True)
    parser.add_argument("--budget", type=float, required=True, help="share of the expert parameters to remove, 0 to 1")
    parser.add_argument("--text", dest="texts", action="append", required=True)
    parser.add_argument("--evaluation-tokens", type=int, required=True)
    parser.add_argument("--original", type=Path, required=True, help="file for the original's losses")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for what the program writes; it is the cwd")
    job = parser.parse_args()
    for name in ("source", "model", "calibrate", "original", "scratch"):
        setattr(job, name, getattr(job, name).resolve())
    job.texts = [Path(text).resolve() for text in job.texts]
    os.chdir(job.scratch)
    torch.manual_seed(0)
    result = dict(about)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            original = original_losses(job)
            job.expert_params = original["expert_params"]
            model, counted = compress(job)
            model = model.float().eval()
            left = expert_params(model) if counted is None else counted
            result |= {"expert_params": job.expert_params, "removed_params": job.expert_params - left}
            result["texts"] = [
                score(torch.tensor(before), losses(model, windows(job.model, text, job.evaluation_tokens, False)))
                for text, before in zip(job.texts, original["losses"])
            ]
        except NotRun as reason:
            result["not_run"] = str(reason)
    print(json.dumps(result))


def score(before, after):
    difference = after - before.to(after)
    ratio = math.exp(difference.mean())
    error = (difference.std() / math.sqrt(len(difference))).item()
    return {"perplexity_original": math.exp(before.mean()), "increase": ratio - 1, "increase_error": ratio * error}


def calibration(job):
    """Windows to calibrate on, as this project's own rows have them without their share of the vocabulary."""
    return windows(job.model, job.calibrate, job.calibration_tokens, True)


def absent(*names):
    """Puts empty modules where a program imports, at its top, what the functions used here never call."""
    for name in names:
        module = mock.MagicMock(name=name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__, module.__all__ = [], []
        sys.modules[name] = module


def namespace(name, folder):
    """Makes a package out of a folder without running its `__init__.py`."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def experts_to_keep(job, experts, least):
    """Whole experts that are left of so many, to the nearest ratio."""
    kept = experts - round(job.budget * experts)
    if kept < least:
        raise NotRun(f"fewer than {least} experts would be left")
    return kept
