# SPDX-License-Identifier: MIT OR Apache-2.0
"""Calls the program `lowrank-compress`, which this package brings along."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from os import PathLike
from pathlib import Path
from typing import Any

from .plan import Plan, read_plan

NAME = "lowrank-compress"


class CompressError(RuntimeError):
    """The program refused or failed. `code` is its exit code: docs/exit-codes.md."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def program() -> Path:
    """Where the program is: `LOWRANK_COMPRESS`, beside this Python, or on PATH."""
    if named := os.environ.get("LOWRANK_COMPRESS"):
        return Path(named)
    beside = Path(sysconfig.get_path("scripts")) / (NAME + (sysconfig.get_config_var("EXE") or ""))
    found = beside if beside.is_file() else shutil.which(NAME)
    if not found:
        raise FileNotFoundError(f"the program {NAME} is neither in {beside.parent} nor on PATH: set LOWRANK_COMPRESS to it")
    return Path(found)


def compress(
    model: str | PathLike[str], out: str | PathLike[str], budget: str | int | None = None, **options: Any
) -> Plan:
    """Compresses the checkpoint `model` into the new folder `out`, and returns what was removed.

    `budget` is a number of parameters ("10B") or a share of them ("20%"). Options are the program's flags, as in
    `lowrank-compress --help`, with underscores: `storage="uv"`, `calibrate="none"`, `keep_dense=["layers.0"]` for a flag that
    may be repeated, `restart=True` for one without a value. None and False leave a flag out. Progress goes to stderr, unless
    `quiet=True`.

    CompressError, with the program's message and exit code, if it fails.
    """
    arguments = ["compress", *_flags({"model": model, "out": out, "budget": budget, **options})]
    _run(arguments)
    return read_plan(out)


def _flags(options: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is True:
                flags.append(flag)
            elif one is not None and one is not False:
                flags.append(f"{flag}={os.fspath(one) if isinstance(one, PathLike) else one}")
    return flags


def _run(arguments: list[str]) -> None:
    """Runs the program, passes on what it says to stderr line by line (a notebook shows it), and keeps the last line."""
    command = [os.fspath(program()), *arguments]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        except BaseException:
            process.terminate()  # an unfinished run resumes when it is called again
            raise
    if process.returncode:
        message = last.removeprefix("error: ") or f"{NAME} ended with code {process.returncode}"
        raise CompressError(message, process.returncode)
