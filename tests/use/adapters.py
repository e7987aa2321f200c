"""Trains adapters on outputs with PEFT: `adapters.py --text FILE --work DIR FOLDER...`.

Of every output and every choice of modules below: the loss of a text falls, the experts' adapters change, merging keeps the
logits, and the merged model is saved and loaded again with the same logits. `w1`, `w2`, `w3` themselves are refused by PEFT.
"""

import argparse
import shutil
from pathlib import Path

import lowrank_compress  # noqa: F401  registers the classes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, WINDOWS, WINDOW = 20, 4, 64
LIMIT = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    for folder in a.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(a.text.read_text())["input_ids"][: WINDOWS * WINDOW]
        ids = torch.tensor(ids).view(WINDOWS, WINDOW)
        for modules in ("all-linear", [*factors_of(folder)], r".*\.experts\.\d+\.w1\.(u|v|basis|coefficients)"):
            train(folder, modules, ids, a.work / "merged")
        refused(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def factors_of(folder):
    """What the factors of an output are called."""
    names = {name.split(".")[-1] for name, _ in load(folder).named_modules() if ".experts." in name}
    return sorted(names & {"u", "v", "basis", "coefficients"})


def train(folder, modules, ids, merged):
    torch.manual_seed(0)
    model = get_peft_model(load(folder), LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    of_experts = [p for name, p in model.named_parameters() if ".experts." in name and "lora_B" in name]
    reached = sum(bool(p.abs().max() > 0) for p in of_experts)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = model.merge_and_unload()
        merging = (plain(input_ids=ids).logits - expected).abs().max().item()
        shutil.rmtree(merged, ignore_errors=True)
        plain.save_pretrained(merged)
        again = (load(merged).eval()(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
    print(
        f"{folder.name}, {modules}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {reached} of {len(of_experts)} adapters of experts "
        f"changed; merged {merging:.1e}, loaded again {again:.1e}",
        flush=True,
    )
    assert losses[-1] < 0.9 * losses[0], losses
    assert 0 < len(of_experts) and 2 * reached >= len(of_experts), reached
    assert merging < LIMIT and again < LIMIT, (merging, again)


def refused(folder):
    try:
        get_peft_model(load(folder), LoraConfig(target_modules=["w1", "w2", "w3"]))
    except ValueError as error:
        print(f"{folder.name}, w1, w2, w3: refused: {str(error).splitlines()[0][:120]}", flush=True)
        return
    raise AssertionError("PEFT takes the names of products, and docs/serving.md says that it does not")


if __name__ == "__main__":
    main()
