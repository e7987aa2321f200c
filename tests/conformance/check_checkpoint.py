#!/usr/bin/env python3
"""Are factored checkpoints what they claim to be, judged by the library that people load them with?

    check_checkpoint.py --pair COMPRESSED DENSE [--pair COMPRESSED DENSE ...]

COMPRESSED is a factored checkpoint; DENSE is the same one multiplied back (`lowrank-compress densify --dtype f32`, so that no
rounding lies between them), which transformers loads with its own class. Prints one line per check, then `N passed, N failed`
for each pair; exits 1 if any failed. CPU, offline, a few seconds on a small model.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before transformers is imported: nothing is fetched, and remote code is copied to a place of its own.
SCRATCH = tempfile.TemporaryDirectory(prefix="lowrank-conformance-")
os.environ.update(
    HF_HOME=SCRATCH.name, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false"
)

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()

LOGITS_TOLERANCE = 1e-4
SENTENCES = [
    "It was the best of times, it was the worst of times,",
    "Call me Ishmael. Some years ago, never mind how long precisely,",
]


class Checks:
    """Runs functions, prints a line for each, and counts."""

    def __init__(self):
        self.passed = self.failed = 0

    def __call__(self, name, function, *args):
        try:
            detail = function(*args)
        except Exception as error:  # a check fails by raising; the others still run
            self.failed += 1
            print(f"FAIL  {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
            return None
        self.passed += 1
        print(f"ok    {name}{': ' + detail if isinstance(detail, str) else ''}", flush=True)
        return detail


def require(condition, message):
    if not condition:
        raise AssertionError(message)


def load(path, auto=AutoModelForCausalLM, allowed_unexpected=(), **options):
    """from_pretrained, with not one key missing, left over or of another shape."""
    options.setdefault("dtype", torch.float32)
    model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info[kind]))
        if kind == "unexpected_keys":
            found = [key for key in found if key not in allowed_unexpected]
        require(not found, f"{kind}: {len(found)}, first {found[:3]}")
    return model.eval()


def load_tokenizer(path):
    try:
        # v5 looks at the model's config for this, so the code beside it is asked for.
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except ValueError as error:
        # The bundled model was saved by v5, whose name for a plain fast tokenizer v4 does not know.
        require("TokenizersBackend" in str(error), str(error))
        return PreTrainedTokenizerFast.from_pretrained(path, model_input_names=["input_ids", "attention_mask"])


def prompts(tokenizer, vocab_size):
    """Two sentences of equal length, and seeded random tokens that visit every expert."""
    rows = [tokenizer(text)["input_ids"] for text in SENTENCES]
    length = min(map(len, rows))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(vocab_size, (2, 64), generator=generator)
    return [torch.tensor([row[:length] for row in rows]), noise]


@torch.no_grad()
def logits_differ_by(a, b, batches):
    return max((a(batch).logits - b(batch).logits).abs().max().item() for batch in batches)


def check_code(compressed):
    model = load(compressed, trust_remote_code=True)
    require(type(model).__name__.startswith("LowRank"), f"loaded as {type(model).__name__}")
    return model


def check_native(dense):
    model = load(dense)
    require(type(model).__module__.startswith("transformers."), f"loaded from {type(model).__module__}")
    return model


def check_count(compressed, model):
    index = json.loads((compressed / "model.safetensors.index.json").read_text())
    # A router's bias is a buffer there, and a stored tensor like others here.
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    held = sum(tensor.numel() for tensor in [*model.parameters(), *biases])
    stated = index["metadata"]["total_parameters"]
    require(held == stated, f"the model holds {held} parameters, the index states {stated}")
    ranks = json.loads((compressed / "config.json").read_text())["lowrank_config"]["ranks"]
    for name, rank in ranks.items():
        require(model.get_submodule(name).rank == rank, f"{name} has another rank than {rank}")
    return f"{held} parameters, {len(ranks)} matrices factored"


def check_logits(model, native, batches):
    difference = logits_differ_by(model, native, batches)
    require(difference <= LOGITS_TOLERANCE, f"logits differ by {difference:.2e}, more than {LOGITS_TOLERANCE:.0e}")
    return f"largest difference {difference:.1e}"


@torch.no_grad()
def check_generation(model, native, batches):
    for batch in batches:
        options = dict(
            attention_mask=torch.ones_like(batch), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0
        )
        a, b = model.generate(batch, **options), native.generate(batch, **options)
        require(torch.equal(a, b), "greedy continuations differ")
    return f"{sum(map(len, batches))} prompts, 40 tokens each"


@torch.no_grad()
def check_router_loss(model, native, batches):
    # Needs the router logits, which the two generations of transformers record in different ways.
    a, b = (m(batches[1], labels=batches[1], output_router_logits=True) for m in (model, native))
    if getattr(b, "aux_loss", None) is None:
        # Biases balance the experts of these families. transformers 4 shows no router logits of them either.
        theirs, ours = (getattr(out, "router_logits", None) or () for out in (b, a))
        difference = max((abs(x - y).max().item() for x, y in zip(ours, theirs, strict=True)), default=0.0)
        require(difference <= LOGITS_TOLERANCE, f"router logits differ by {difference:.2e}")
        return f"the class has no such loss; router logits of {len(theirs)} layers"
    layers = sum(name.endswith(".experts") for name, _ in model.named_modules())
    counts = len(a.router_logits), len(b.router_logits)
    require(counts == (layers, layers), f"{counts} router logits for {layers} layers with experts")
    difference = abs(a.aux_loss.item() - b.aux_loss.item())
    require(difference <= LOGITS_TOLERANCE, f"load-balancing losses differ by {difference:.2e}")
    return f"loss {a.aux_loss.item():.4f}"


def check_gradients(model, batches):
    model.train()
    try:
        model(batches[0], labels=batches[0]).loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if ".experts." in n and p.grad is not None]
        require(grads and all(grad.isfinite().all() for grad in grads), "no finite gradient reaches the factors")
    finally:
        model.zero_grad()
        model.eval()
    return f"{len(grads)} expert tensors"


@torch.no_grad()
def check_headless(compressed, model, batches):
    body = load(compressed, auto=AutoModel, trust_remote_code=True, allowed_unexpected={"lm_head.weight", "lm_head.bias"})
    a, b = body(batches[0]).last_hidden_state, model.model(batches[0]).last_hidden_state
    require(torch.equal(a, b), "hidden states differ from those of the whole model")


@torch.no_grad()
def check_call(compressed):
    """The call of the model card: half precision, automatic placement, chat template, generate."""
    tokenizer = load_tokenizer(compressed)
    model = load(compressed, trust_remote_code=True, dtype=torch.float16, device_map="auto")
    require(model.dtype == torch.float16, f"dtype is {model.dtype}")
    messages = [{"role": "user", "content": "Tell me about the whale."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    require("[INST] Tell me about the whale. [/INST]" in text or "INST" not in (tokenizer.chat_template or ""), text)
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(model.device)
    out = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    new = out[0, inputs["input_ids"].shape[1] :]
    require(len(new) == 20, f"{len(new)} new tokens")
    require(model(out).logits.isfinite().all().item(), "a logit is not finite")
    return repr(tokenizer.decode(new))


@torch.no_grad()
def check_saving(compressed, model, batches):
    again = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    model.save_pretrained(again)
    names = lambda path: set(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"])
    if (again / "model.safetensors.index.json").exists():
        saved = names(again)
    else:
        from safetensors import safe_open

        with safe_open(again / "model.safetensors", "pt") as file:
            saved = set(file.keys())
    require(saved == names(compressed), f"other tensors: {sorted(saved ^ names(compressed))[:3]}")
    kind = model.config.model_type
    for file in (f"configuration_{kind}.py", f"modeling_{kind}.py", "lowrank_experts.py"):
        require((again / file).exists(), f"{file} was not saved")
    reloaded = load(again, trust_remote_code=True)
    was, now = model.state_dict(), reloaded.state_dict()
    require(was.keys() == now.keys(), f"other weights: {sorted(was.keys() ^ now.keys())[:3]}")
    changed = [name for name in was if not torch.equal(was[name], now[name])]
    require(not changed, f"weights changed: {changed[:3]}")
    # Where a file places a weight in memory decides how BLAS sums, so logits may differ by rounding.
    difference = logits_differ_by(model, reloaded, batches)
    require(difference <= LOGITS_TOLERANCE, f"logits differ by {difference:.2e}")
    return f"{len(saved)} tensors, every weight the same bits, logits within {difference:.1e}"


def check_refused(change, compressed, words):
    """Code that does not understand a checkpoint must say so, not load something else."""
    other = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    for file in compressed.iterdir():
        if file.suffix in (".py", ".json"):
            shutil.copy(file, other)
    config = json.loads((other / "config.json").read_text())
    change(config["lowrank_config"])
    (other / "config.json").write_text(json.dumps(config))
    try:
        config = AutoConfig.from_pretrained(other, trust_remote_code=True)
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    except ValueError as error:
        require(words in str(error), f"another refusal: {error}")
        return str(error)
    raise AssertionError("was built")


def check_untrusted(compressed):
    try:
        AutoModelForCausalLM.from_pretrained(compressed, trust_remote_code=False)
    except ValueError:
        return "an error, not random experts"
    raise AssertionError("was loaded without its code")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", type=Path, nargs=2, action="append", required=True, metavar=("COMPRESSED", "DENSE"),
        help="a factored checkpoint, and the same densified in f32",
    )
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    failed = [compressed.name for compressed, dense in parser.parse_args().pair if not check_pair(compressed, dense)]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def check_pair(compressed, dense):
    print(f"-- {compressed.name}", flush=True)
    torch.manual_seed(0)
    check = Checks()
    model = check("the factored checkpoint loads, no key missing or left over", check_code, compressed)
    native = check("the densified checkpoint loads natively, no key missing or left over", check_native, dense)
    if model is not None and native is not None:
        batches = prompts(load_tokenizer(compressed), model.config.vocab_size)
        check("parameters and ranks are the stated ones", check_count, compressed, model)
        check("f32 logits equal those of the densified model", check_logits, model, native, batches)
        check("greedy generation is equal", check_generation, model, native, batches)
        check("router logits and load-balancing loss are equal", check_router_loss, model, native, batches)
        check("gradients reach the factors", check_gradients, model, batches)
        check("AutoModel gives the same hidden states", check_headless, compressed, model, batches)
        check("saved and loaded again, nothing changes", check_saving, compressed, model, batches)
    check("fp16, device_map=\"auto\", apply_chat_template, generate", check_call, compressed)
    check("without trust_remote_code it is refused", check_untrusted, compressed)
    for name, change, words in [
        ("another format version", lambda c: c.update(format_version=99), "format_version"),
        ("another storage", lambda c: c.update(storage="unheard-of"), "storage"),
        ("another format", lambda c: c.update(format="x"), "lowrank_config"),
    ]:
        check(f"{name} is refused", check_refused, change, compressed, words)
    print(f"{check.passed} passed, {check.failed} failed", flush=True)
    return not check.failed


if __name__ == "__main__":
    sys.exit(main())
