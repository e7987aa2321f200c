#!/usr/bin/env python3
"""Does an output's tokenizer do what its base's does, judged by the library that people load it with?

    check_tokenizer.py --of BASE OUTPUT [OUTPUT ...] [--of BASE OUTPUT [OUTPUT ...] ...]

Loads both by AutoTokenizer and GenerationConfig. The same ids, the same chat templates by name, and every template renders
the same text. Prints one line per output; exits 1 if any differs. CPU, offline.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Before transformers is imported: nothing is fetched.
SCRATCH = tempfile.TemporaryDirectory(prefix="lowrank-conformance-")
os.environ.update(HF_HOME=SCRATCH.name, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

MESSAGES = [
    {"role": "user", "content": "Tell me about the whale."},
    {"role": "assistant", "content": "It is white."},
    {"role": "user", "content": "And the captain?"},
]
TOOLS = [{"type": "function", "function": {"name": "harpoon", "description": "throws", "parameters": {}}}]
TEXT = "<s> It was the best of times </s>[INST] ä 漢 \n\t<unk>"


def load(path):
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except ValueError as error:
        # The bundled model was saved by v5, whose name for a plain fast tokenizer v4 does not know.
        if "TokenizersBackend" not in str(error):
            raise
        return PreTrainedTokenizerFast.from_pretrained(path)


def rendered(tokenizer):
    """Text of every template by its name; {} without any."""
    templates = tokenizer.chat_template or {}
    names = list(templates) if isinstance(templates, dict) else [None]
    options = dict(tools=TOOLS, tokenize=False, add_generation_prompt=True)
    return {name: tokenizer.apply_chat_template(MESSAGES, chat_template=name, **options) for name in names}


def generation(path):
    return GenerationConfig.from_pretrained(path).to_dict() if (Path(path) / "generation_config.json").exists() else None


def facts(path):
    tokenizer = load(path)
    return {
        "ids": tokenizer(TEXT)["input_ids"],
        "special tokens": tokenizer.all_special_tokens,
        "templates": rendered(tokenizer),
        "generation config": generation(path),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="+", action="append", required=True, metavar="DIR", help="a base, then its outputs")
    return 1 if sum(check(*folders) for folders in parser.parse_args().of) else 0


def check(base, *outputs):
    """How many differ; a base without outputs counts as one."""
    expected, failed = facts(base), int(not outputs)
    for output in outputs:
        found = facts(output)
        differing = [name for name in expected if found[name] != expected[name]]
        failed += bool(differing)
        names = sorted(str(name or "default") for name in expected["templates"])
        said = f"differ from the base's: {differing}" if differing else f"as the base's, templates: {names}"
        print(f"{'FAIL' if differing else 'ok'}    {Path(output).name}: ids, templates and generation {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
