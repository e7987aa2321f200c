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
        answers = server.complete(prompts, reference.NEW_TOKENS, logprobs=reference.LIKELIEST, prompt_logprobs=0)
        name = server.served_by()
    text, good = reference.compared(arguments.logits_program, model, prompts, answers)
    line = f"{name}, {case['parallel']} | {text} | started in {seconds:.0f} s"
    return line, good and name == case["class"]


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
