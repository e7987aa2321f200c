"""Times the forward pass of the transformers that is installed here, in f32, on windows of token ids.

    python tests/bench/forward.py DIR ids.json --threads 2 --experts default

Every window goes through the whole model to its logits, `--batch` windows at a time. Prints one JSON document: tokens, wall
seconds, CPU seconds, perplexity, and what a product of square f32 matrices reaches per CPU second on the same threads.
`cargo xtask bench forward` calls it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM


@torch.no_grad()
def forward(model, windows, batch):
    loss, predicted = 0.0, 0
    for first in range(0, len(windows), batch):
        ids = torch.tensor(windows[first : first + batch])
        logits = model(input_ids=ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss, predicted = loss + losses.item(), predicted + ids[:, 1:].numel()
    return math.exp(loss / predicted)


def product_gflops(size=2048, runs=5):
    a, b = torch.rand(size, size), torch.rand(size, size)
    torch.mm(a, b)
    start = time.process_time()
    for _ in range(runs):
        torch.mm(a, b)
    return 2e-9 * runs * size**3 / (time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("ids")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--experts", default="default", help="experts_implementation of transformers 5")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {} if arguments.experts == "default" else {"experts_implementation": arguments.experts}
    model = AutoModelForCausalLM.from_pretrained(arguments.directory, dtype=torch.float32, **chosen).eval()
    windows = json.loads(Path(arguments.ids).read_text())
    forward(model, windows[: arguments.batch], arguments.batch)  # not timed: what is set up at the first use
    wall, cpu = time.perf_counter(), time.process_time()
    perplexity = forward(model, windows, arguments.batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(map(len, windows))
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"tokens": tokens, "wall_s": wall, "cpu_s": cpu, "perplexity": perplexity,
                      "product_gflops": product_gflops(), "version": version}))


if __name__ == "__main__":
    main()
