"""Compare our logits with those of the transformers that is installed here, at every position.

    python tests/golden/check_live.py --logits-program target/release/examples/logits DIR [DIR …]

The program is `cargo build --release -p lowrank-forward --example logits`; it is run as `logits DIR ids.json OUT`.
Each DIR is a checkpoint that transformers can load (a compressed one through its own modeling code).
Ends with `N passed, N failed`; the exit status is 1 if any failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4


@torch.no_grad()
def check(program, path, length):
    # transformers widens fp8 to the checkpoint's dtype, whichever is asked for.
    fp8 = "quantization_config" in json.loads((Path(path) / "config.json").read_text())
    dtype = "auto" if fp8 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True).float().eval()
    length = min(length, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(0, model.config.vocab_size, (t,), generator=generator) for t in (length, length // 3)]
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.json", Path(folder) / "logits.safetensors"
        ids.write_text(json.dumps([sequence.tolist() for sequence in sequences]))
        subprocess.run([program, path, ids, out], check=True)
        ours = load_file(out)
    worst = 0.0
    for s, sequence in enumerate(sequences):
        theirs, mine = model(input_ids=sequence[None]).logits[0].float(), ours[f"logits.{s}"]
        if mine.shape != theirs.shape or not torch.isfinite(mine).all():
            return float("inf")
        worst = max(worst, (mine - theirs).abs().max().item())
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits-program", required=True)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longer sequence")
    parser.add_argument("directories", nargs="+")
    arguments = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    passed = failed = 0
    for directory in arguments.directories:
        try:
            worst = check(arguments.logits_program, directory, arguments.length)
            good, text = worst <= TOLERANCE, f"largest difference of a logit {worst:.1e}"
        except Exception as error:  # a checkpoint that does not load is a failure to report, and the others still run
            good, text = False, f"{type(error).__name__}: {error}"
        passed, failed = passed + good, failed + (not good)
        print(f"{'ok' if good else 'FAILED'}  {directory}: {text}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
