"""Serves checkpoints with vLLM over HTTP, and compares with transformers and with our own forward pass.

    python tests/serving/check_vllm.py CASES.json --vllm PYTHON --logits-program target/release/examples/logits --work DIR

CASES.json is a list of {name, model, class, plugin, parallel, uses}: the class of vLLM that must serve the model, whether this
repository's plugin is installed, workers that share the model, and what the model's `lowrank_config` must have. Each server gets
lists of token ids and answers with greedy tokens and log-probabilities: of the tokens of the prompt, and of the likeliest at
every new place. Both programs then run over prompt and answer. The exit status is 1 if a token or a class differs, or a
log-probability by more than 1e-3.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import reference
from server import Server

NEW_TOKENS = 32
LIKELIEST = 5
TOLERANCE = 1e-3


def differences(prompt, answer, log_probabilities):
    """How many tokens are not those that `log_probabilities` ranks first, and the largest difference of a log-probability."""
    tokens = answer["token_ids"]
    assert len(tokens) == NEW_TOKENS, tokens
    pairs = [
        (theirs[str(prompt[at])]["logprob"], log_probabilities[at - 1, prompt[at]])
        for at, theirs in enumerate(answer["prompt_logprobs"])
        if at > 0
    ]
    wrong = 0
    for new, token in enumerate(tokens):
        row = log_probabilities[len(prompt) + new - 1]
        wrong += token != row.argmax().item()
        top = answer["logprobs"]["top_logprobs"][new]
        assert len(top) >= LIKELIEST, top
        pairs += [(theirs, row[int(name.removeprefix("token_id:"))]) for name, theirs in top.items()]
    return wrong, reference.largest(abs(theirs - ours.item()) for theirs, ours in pairs)


def check(case, arguments):
    """A line of the table, and whether all is as it should be."""
    model = Path(case["model"])
    settings = json.loads((model / "config.json").read_text()).get("lowrank_config", {})
    missing = [key for key in case["uses"] if not settings.get(key)]
    if missing or (not case["uses"] and settings):
        return f"its lowrank_config has {sorted(settings)}, not {case['uses']}", False
    prompts = reference.prompts(model)
    started = time.monotonic()
    server = Server(arguments.vllm, model, arguments.work, case["name"].replace(" ", "-"),
                    plugin=case["plugin"], parallel=case["parallel"])  # fmt: skip
    with server:
        seconds = time.monotonic() - started
        answers = server.complete(prompts, NEW_TOKENS, logprobs=LIKELIEST, prompt_logprobs=0)
        name = server.served_by()
    sequences = [prompt + answer["token_ids"] for prompt, answer in zip(prompts, answers)]
    good, parts = name == case["class"], []
    for label, found in (
        ("transformers", reference.by_transformers(model, sequences)),
        ("our own", reference.by_our_own(arguments.logits_program, model, sequences)),
    ):
        each = [differences(*of) for of in zip(prompts, answers, found)]
        wrong, largest = sum(wrong for wrong, _ in each), reference.largest(largest for _, largest in each)
        total = NEW_TOKENS * len(prompts)
        parts.append(f"{label}: {total - wrong} of {total} tokens, {largest:.1e}")
        good &= wrong == 0 and largest <= TOLERANCE
    return f"{name}, {case['parallel']} | {' | '.join(parts)} | started in {seconds:.0f} s", good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vLLM's CPU build")
    parser.add_argument("--logits-program", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and for what vLLM compiles")
    arguments = parser.parse_args()
    # So that a server ends with this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print("case | served by, workers | tokens equal, largest difference of a log-probability", flush=True)
    reference.run(arguments.cases, lambda case: check(case, arguments))


if __name__ == "__main__":
    main()
