"""This project's own rows: a checkpoint that `lowrank-compress` wrote, opened with the project's Python package."""

import json
import math
import struct

import lowrank_compress  # noqa: F401  registers the classes
from evaluator import drive, load


def params(folder):
    """Numbers in the headers of a checkpoint; those of the original, less this, are what was removed."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        with open(shard, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        # Orders of rows are integers and no parameters.
        total += sum(math.prod(entry["shape"]) for entry in entries if entry["dtype"] in ("BF16", "F16", "F32"))
    return total


def compress(job):
    removed = params(job.model) - params(job.source)
    return load(job.source), job.expert_params - removed


drive(compress, {"settings": "", "patches": []})
