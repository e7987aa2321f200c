"""Uses the installed package as a new user would: `use_wheel.py BASE OUT`. Fails where something is not what it should be."""

import shutil
import subprocess
import sys
from pathlib import Path

import lowrank_compress
import matplotlib
import torch
from lowrank_compress import cpu_experts
from transformers import AutoModelForCausalLM, AutoTokenizer

matplotlib.use("agg")
base, out = sys.argv[1:]
environment = Path(sys.prefix).resolve()
assert environment in Path(lowrank_compress.__file__).resolve().parents, lowrank_compress.__file__

# The command is in the environment's bin, and says its version.
command = environment / "bin" / "lowrank-compress"
assert command.is_file() and shutil.which("lowrank-compress", path=str(command.parent))
version = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout.split()[-1]
print(f"lowrank-compress {version}")

# The engines' products on the CPU are in the wheel as a source, and compile.
assert cpu_experts.compiled_products() is not None

plan = lowrank_compress.compress(base, out, budget="30%", calibration_tokens=4096, sensitivity_tokens=1024)
removed = plan.params_before - plan.params_after
assert removed >= 0.3 * plan.params_before, removed

model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
assert type(model).__module__.startswith("lowrank_compress"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(out)
inputs = tokenizer("It was the best of times,", return_tensors="pt")
generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)
assert generated.shape[1] > inputs["input_ids"].shape[1]
print(tokenizer.decode(generated[0], skip_special_tokens=True))

table = lowrank_compress.read_plan(out).table()
assert len(table) == 96, len(table)
means = table.groupby(["layer", "projection"])["rank"].mean().unstack()
print(means)
figure = means.plot().figure
figure.savefig(Path(out).parent / "ranks.png")
