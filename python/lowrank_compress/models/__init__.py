# SPDX-License-Identifier: MIT OR Apache-2.0
"""transformers' classes of compressed models: a package whose modules are filled from the templates that the program writes
beside a checkpoint. They are files, because `save_pretrained` copies the files of a model's classes."""

import json
import re
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

_TEMPLATES = files("lowrank_compress") / "templates"
_FOLDER = TemporaryDirectory(prefix="lowrank-compress-")  # removed when the process ends

FAMILIES: list[dict[str, str]] = json.loads((_TEMPLATES / "families.json").read_text())


def _fill(template: str, family: dict[str, str]) -> str:
    text = (_TEMPLATES / template).read_text()
    return re.sub(r"\{\{ (\w+) \}\}", lambda key: family[key[1]], text)


def _write(name: str, text: str) -> None:
    (Path(_FOLDER.name) / name).write_text(text)


_write("lowrank_experts.py", (_TEMPLATES / "lowrank_experts.py").read_text())
for _family in FAMILIES:
    for _kind in ("configuration", "modeling"):
        _write(f"{_kind}_{_family['model_type']}.py", _fill(f"{_kind}.py.jinja", _family))

__path__ = [_FOLDER.name]
