"""Log-probabilities of checkpoints by two programs that serve nothing, transformers and our own forward pass; and what checks
against them share."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()
TEXT = Path(__file__).parents[1] / "fixtures/text/inaugural_addresses.txt"
# Tokens of the prompts: from less than a block of vLLM's cache to many blocks.
PROMPT_TOKENS = (2, 17, 64, 200)
NEW_TOKENS = 32
LIKELIEST = 5
TOLERANCE = 1e-3


def prompts(model):
    """Token ids from different places of a text, each list beginning with BOS."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    text, found = TEXT.read_text(), []
    for place, count in enumerate(PROMPT_TOKENS):
        begin = len(text) // len(PROMPT_TOKENS) * place
        ids = tokenizer(text[begin : begin + 40 * count])["input_ids"][:count]
        assert len(ids) == count and ids[0] == tokenizer.bos_token_id, ids[:3]
        found.append(ids)
    return found


@torch.no_grad()
def by_transformers(model, sequences):
    """One tensor of log-probabilities [tokens, vocabulary] for each list of token ids."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=True).eval()
    return [loaded(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in sequences]


def by_our_own(program, model, sequences):
    """The same by the example `logits` of the crate lowrank-forward."""
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.json", Path(folder) / "logits.safetensors"
        ids.write_text(json.dumps(sequences))
        subprocess.run([program, model, ids, out], check=True)
        logits = load_file(out)
    return [logits[f"logits.{s}"].float().log_softmax(-1) for s in range(len(sequences))]


def differences(prompt, answer, log_probabilities):
    """How many tokens are not those that `log_probabilities` ranks first, and the largest difference of a log-probability."""
    tokens = answer["token_ids"]
    assert len(tokens) == NEW_TOKENS, tokens
    pairs = [
        (theirs[str(prompt[at])]["logprob"], log_probabilities[at - 1, prompt[at]])
        for at, theirs in enumerate(answer["prompt_logprobs"])
        if at > 0
    ]
    wrong = 0
    for new, token in enumerate(tokens):
        row = log_probabilities[len(prompt) + new - 1]
        wrong += token != row.argmax().item()
        top = answer["logprobs"]["top_logprobs"][new]
        assert len(top) >= LIKELIEST, top
        pairs += [(theirs, row[int(name.removeprefix("token_id:"))]) for name, theirs in top.items()]
    return wrong, largest(abs(theirs - ours.item()) for theirs, ours in pairs)


def compared(logits_program, model, prompts, answers):
    """A server's answers beside both programs: a part of the table's line, and whether all is equal."""
    sequences = [prompt + answer["token_ids"] for prompt, answer in zip(prompts, answers, strict=True)]
    good, parts = True, []
    for label, found in (
        ("transformers", by_transformers(model, sequences)),
        ("our own", by_our_own(logits_program, model, sequences)),
    ):
        each = [differences(*of) for of in zip(prompts, answers, found, strict=True)]
        wrong, distance = sum(wrong for wrong, _ in each), largest(distance for _, distance in each)
        total = NEW_TOKENS * len(prompts)
        parts.append(f"{label}: {total - wrong} of {total} tokens, {distance:.1e}")
        good &= wrong == 0 and distance <= TOLERANCE
    return " | ".join(parts), good


def largest(values):
    """The largest of some numbers, and NaN if one of them is."""
    return torch.tensor(list(values)).max().item()


def run(cases, check):
    """Prints a line for each case, and ends the program; with 1 if a case failed."""
    failed = 0
    for case in json.loads(cases.read_text()):
        try:
            text, good = check(case)
        except Exception as error:  # a checkpoint that does not load is a failure to report, and the others still run
            text, good = f"{type(error).__name__}: {error}", False
        failed += not good
        print(f"{'ok' if good else 'FAILED'}  {case['name']} | {text}", flush=True)
    sys.exit(1 if failed else 0)
