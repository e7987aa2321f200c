"""Runs the Python of the documents as it stands: `check_snippets.py BASE OUTPUT SCRATCH DOCUMENT... [--vllm PYTHON]`.

Names of models in a block are replaced: those of outputs by OUTPUT, those of originals by BASE, those of what a block writes
by a folder in SCRATCH. A block that imports what is not installed here is named and left out; one that imports vllm is run by
PYTHON.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

#: Lines of a block beside blank ones.
LINES_MAX = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "output", "scratch"):
        parser.add_argument(name)
    parser.add_argument("documents", nargs="+")
    parser.add_argument("--vllm", help="a Python with vLLM")
    a = parser.parse_args()
    ran = 0
    for place, document in enumerate(a.documents):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", Path(document).read_text(), re.S), 1):
            name = f"{document}, block {number}"
            lines = [line for line in block.splitlines() if line.strip()]
            assert len(lines) <= LINES_MAX, f"{name}: {len(lines)} lines"
            modules = imported(block)
            by_vllm = a.vllm is not None and "vllm" in modules
            missing = [module for module in modules if importlib.util.find_spec(module) is None]
            if missing and not by_vllm:
                print(f"{name}: not run, {', '.join(missing)} is not installed")
                continue
            # What one block writes a later one of the same document reads.
            written = Path(a.scratch) / f"written-{place}"
            code = block.replace("mixtral-8x7b-36b", a.output).replace("./mixtral", a.base).replace("mixtral-small", str(written))
            script = Path(a.scratch) / "block.py"
            script.write_text(code)
            python, environment = (a.vllm, with_vllm(Path(a.scratch))) if by_vllm else (sys.executable, os.environ)
            subprocess.run([python, script], check=True, env=environment)
            print(f"{name}: runs")
            ran += 1
    assert ran, "no block was run"


def with_vllm(folder):
    sys.path.append(str(Path(__file__).parents[1] / "serving"))
    from server import environment

    return environment(folder / "vllm", plugin=True)


def imported(block):
    """Top modules that a block imports, and that are not obvious from its first line."""
    found = re.findall(r"^\s*(?:import|from) (\w+)", block, re.M)
    extra = ["bitsandbytes"] if "BitsAndBytesConfig" in block else []
    extra += ["torchao"] if "TorchAoConfig" in block else []
    extra += ["matplotlib"] if ".plot(" in block else []
    return dict.fromkeys(found + extra)


if __name__ == "__main__":
    main()
