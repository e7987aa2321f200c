"""Converts plain checkpoints to GGUF with llama.cpp's converter, runs them with llama.cpp, and compares with transformers and
with our own forward pass.

    python tests/serving/check_gguf.py CASES.json --llama-cpp SOURCES --logits-program target/release/examples/logits --work DIR
    python tests/serving/check_gguf.py --add-tokenizer DIR

CASES.json is a list of {name, model, same_as}: a checkpoint without code of ours, and the one whose log-probabilities it must
have. llama.cpp gets lists of token ids, in f32 with a cache in f32, and answers greedily. The exit status is 1 if a token differs
from the one that the others rank first, a log-probability of any token at any place differs by more than 1e-3, or llama.cpp reads
a text as other tokens than SentencePiece.

The converter knows a byte-level tokenizer only if it is one of a list of published ones, and the bundled models' is not. Mixtral's
own tokenizer is one of SentencePiece, which the converter takes from any model: `--add-tokenizer` trains such a tokenizer.model,
with as many tokens as the model has, and puts it into a copy of the base. Everything after that is what a user does.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import reference
import sentencepiece

NEW_TOKENS = 32
TOLERANCE = 1e-3
CONTEXT = 512


def add_tokenizer(model):
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(reference.TEXT), model_prefix=str(model / "tokenizer"), vocab_size=vocabulary, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,  # as Mixtral's own
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (model / "tokenizer.vocab").unlink()


def converted(case, arguments):
    out = arguments.work / f"{case['name'].replace(' ', '-')}.gguf"
    command = [sys.executable, arguments.llama_cpp / "convert_hf_to_gguf.py", case["model"], "--outtype", "f32", "--outfile", out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the converter failed: {done.stderr[-2000:]}")
    return out


def check(case, arguments):
    import llama_cpp
    import numpy as np
    import torch

    model = llama_cpp.Llama(
        model_path=str(converted(case, arguments)), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    text = reference.TEXT.read_text()[:2000]
    words = sentencepiece.SentencePieceProcessor(model_file=str(Path(case["model"]) / "tokenizer.model"))
    if model.tokenize(text.encode(), add_bos=False) != words.encode(text):
        return "llama.cpp reads a text as other tokens than SentencePiece", False
    sequences, logits = [], []
    for prompt in reference.prompts(case["model"]):
        ids = list(prompt)
        model.reset()
        model.eval(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(np.argmax(model.scores[len(ids) - 1])))
            model.eval(ids[-1:])
        sequences.append(ids)
        logits.append(torch.tensor(model.scores[: len(ids)]).float().log_softmax(-1))
    good, parts = True, []
    for label, found in (
        ("transformers", reference.by_transformers(case["same_as"], sequences)),
        ("our own", reference.by_our_own(arguments.logits_program, case["same_as"], sequences)),
    ):
        wrong = sum(
            (ids[-NEW_TOKENS:] != ours[-NEW_TOKENS - 1 : -1].argmax(-1).tolist()) for ids, ours in zip(sequences, found)
        )
        largest = reference.largest((theirs - ours).abs().max() for theirs, ours in zip(logits, found))
        parts.append(f"{label}: {len(found) - wrong} of {len(found)} answers, {largest:.1e}")
        good &= wrong == 0 and largest <= TOLERANCE
    return " | ".join(parts), good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="?")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--logits-program")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--add-tokenizer", type=Path)
    arguments = parser.parse_args()
    if arguments.add_tokenizer:
        return add_tokenizer(arguments.add_tokenizer)
    print("GGUF | answers equal, largest difference of a log-probability", flush=True)
    reference.run(arguments.cases, lambda case: check(case, arguments))


if __name__ == "__main__":
    main()
