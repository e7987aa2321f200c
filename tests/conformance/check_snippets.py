"""Runs the Python of the documents as it stands: `check_snippets.py BASE OUTPUT SCRATCH DOCUMENT...`.

Names of models in a block are replaced: those of outputs by OUTPUT, those of originals by BASE, those of what a block writes
by a folder in SCRATCH. A block that imports what is not installed here is named and left out.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

#: Lines of a block beside blank ones.
LINES_MAX = 8


def main():
    base, output, scratch, *documents = sys.argv[1:]
    ran = 0
    for place, document in enumerate(documents):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", Path(document).read_text(), re.S), 1):
            name = f"{document}, block {number}"
            lines = [line for line in block.splitlines() if line.strip()]
            assert len(lines) <= LINES_MAX, f"{name}: {len(lines)} lines"
            missing = [module for module in imported(block) if importlib.util.find_spec(module) is None]
            if missing:
                print(f"{name}: not run, {', '.join(missing)} is not installed")
                continue
            # What one block writes a later one of the same document reads.
            written = Path(scratch) / f"written-{place}"
            code = block.replace("mixtral-8x7b-36b", output).replace("./mixtral", base).replace("mixtral-small", str(written))
            subprocess.run([sys.executable, "-c", code], check=True)
            print(f"{name}: runs")
            ran += 1
    assert ran, "no block was run"


def imported(block):
    """Top modules that a block imports, and that are not obvious from its first line."""
    found = re.findall(r"^\s*(?:import|from) (\w+)", block, re.M)
    extra = ["bitsandbytes"] if "BitsAndBytesConfig" in block else []
    extra += ["torchao"] if "TorchAoConfig" in block else []
    extra += ["matplotlib"] if ".plot(" in block else []
    return dict.fromkeys(found + extra)


if __name__ == "__main__":
    main()
