"""Times vLLM servers over HTTP on the CPU: an original by vLLM's own class, and compressed ones by this repository's plugin.

    python tests/serving/throughput.py --vllm PYTHON --work DIR ORIGINAL OUTPUT...

All servers run at the same time and answer in turns, the same prompts each: `--batch` prompts in one request. Prints medians of
tokens per second, by the clock and by the CPU seconds of the server's processes, each over the original's. CPU seconds count
where other programs use the machine.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

from server import Server

PREFILL_TOKENS = 256
DECODE_TOKENS = 64


def turn(server, prompts, tokens):
    """Seconds by the clock and of the CPU."""
    before, started = server.cpu_seconds(), time.monotonic()
    server.complete(prompts, tokens)
    return time.monotonic() - started, server.cpu_seconds() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    draw = random.Random(5)
    ids = lambda count: [[1] + [draw.randrange(3, 700) for _ in range(count - 1)] for _ in range(arguments.batch)]
    kinds = (("prefill", ids(PREFILL_TOKENS), 1, PREFILL_TOKENS), ("decode", ids(8), DECODE_TOKENS, DECODE_TOKENS))
    with contextlib.ExitStack() as running:
        servers = [
            # Without a cache of prefixes, which would answer every turn but the first.
            running.enter_context(Server(arguments.vllm, model, arguments.work, f"throughput-{model.name}".replace(" ", "-"),
                                         plugin=at > 0, options=["--no-enable-prefix-caching"]))  # fmt: skip
            for at, model in enumerate(arguments.models)
        ]
        print(f"batch {arguments.batch}, medians of {arguments.turns}, one thread for each server; load {os.getloadavg()[0]:.1f}")
        for label, prompts, tokens, counted in kinds:
            times = [[] for _ in servers]
            for at in range(arguments.turns + 1):
                for server, its in zip(servers, times):
                    took = turn(server, prompts, tokens)
                    if at > 0:  # the first turn warms up
                        its.append(took)
            # As many CPU seconds were counted as the system's clock of processes ticks: 10 ms each.
            medians = [tuple(statistics.median(column) for column in zip(*its)) for its in times]
            for model, server, median in zip(arguments.models, servers, medians):
                ratios = [first / its for first, its in zip(medians[0], median)]
                rate = arguments.batch * counted / median[0]
                print(f"{label} | {model.name}, {server.served_by()} | {rate:.0f} tokens/s | over the original's: "
                      f"clock {ratios[0]:.2f}, CPU seconds {ratios[1]:.2f}", flush=True)  # fmt: skip
        print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
