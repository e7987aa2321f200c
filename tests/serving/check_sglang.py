"""Runs checkpoints with SGLang on the CPU, and compares with transformers and with our own forward pass.

    python tests/serving/check_sglang.py CASES.json --sglang PYTHON --logits-program target/release/examples/logits

CASES.json is a list of {name, model, uses}, as for check_vllm.py. The exit status is 1 if a token differs, or a log-probability by
more than 1e-3. SGLang's wheel lacks an operator for CPUs without AMX: `sglang_lacks` has it.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import reference

HERE = Path(__file__).parent


def answers_of(python, model, prompts):
    paths = [HERE.parents[1] / "python", HERE / "sglang_lacks"]
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "lowrank_compress.sglang",
    }  # fmt: skip
    command = [python, HERE / "sglang_engine.py", model, str(reference.NEW_TOKENS), str(reference.LIKELIEST)]
    run = subprocess.run(command, input=json.dumps(prompts), env=os.environ | settings, text=True, capture_output=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    if not lines:
        raise RuntimeError(f"SGLang ended with {run.returncode}: {(run.stderr or run.stdout)[-2000:]}")
    return json.loads(lines[0].removeprefix("ANSWERS "))


def check(case, arguments):
    """A line of the table, and whether all is as it should be."""
    model = Path(case["model"])
    settings = json.loads((model / "config.json").read_text()).get("lowrank_config", {})
    if missing := [key for key in case["uses"] if not settings.get(key)]:
        return f"its lowrank_config has no {missing}", False
    prompts = reference.prompts(model)
    answers = answers_of(arguments.sglang, model, prompts)
    return reference.compared(arguments.logits_program, model, prompts, answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--sglang", required=True, help="the Python of an environment with SGLang")
    parser.add_argument("--logits-program", required=True)
    arguments = parser.parse_args()
    print("case | tokens equal, largest difference of a log-probability", flush=True)
    reference.run(arguments.cases, lambda case: check(case, arguments))


if __name__ == "__main__":
    main()
