# SPDX-License-Identifier: MIT OR Apache-2.0
"""Ranks and errors of a compressed checkpoint, or of a plan for one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

# What the program writes: into a compressed checkpoint, and with `plan`.
_FILES = ("lowrank_report.json", "plan.json")


@dataclass(frozen=True)
class Matrix:
    """One expert matrix W [rows, cols] of the original."""

    name: str
    layer: int
    #: "shared" of an expert that every token takes.
    expert: int | str
    projection: str
    rows: int
    cols: int
    #: Channels that its expert keeps: of the rows of gate and up, and of the columns of down.
    width: int
    #: None if it is dense.
    rank: int | None
    #: The truncation error ‖W − Ŵ‖ / ‖W‖, Frobenius.
    relative_error: float
    #: The same ratio in the norm of the calibration, None without one.
    calibrated_error: float | None


@dataclass(frozen=True)
class Plan:
    """What a compression removes, and from where."""

    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    storage: str
    #: Layers whose experts share a base: there a matrix with a rank is the base plus its factors.
    shared_base_layers: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    #: The whole document, as docs/format.md describes it.
    document: dict[str, Any]

    def ranks(self) -> dict[str, int]:
        """Ranks of the factored matrices, by name, as `compress(..., ranks=FILE)` reads them from a JSON file."""
        return {matrix.name: matrix.rank for matrix in self.matrices if matrix.rank is not None}

    def table(self) -> pandas.DataFrame:
        """One row per expert matrix. Needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Plan.table needs pandas: pip install 'lowrank-compress[table]'") from error
        table = pandas.DataFrame([asdict(matrix) for matrix in self.matrices])
        return table.astype({"rank": "Int64", "calibrated_error": "float64"})


def read_plan(path: str | PathLike[str]) -> Plan:
    """Reads a compressed checkpoint's folder, its `lowrank_report.json`, or a `plan.json`.

    FileNotFoundError if there is neither, ValueError if the file is something else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no {' and no '.join(_FILES)} in it")
        path = found[0]
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        before, after = document["before"], document["after"]
        return Plan(
            params_before=before["params"],
            params_after=after["params"],
            bytes_before=before["bytes"],
            bytes_after=after["bytes"],
            storage=document["storage"] if "storage" in document else document["cost"]["storage"],
            shared_base_layers=tuple(document.get("shared_base_layers", ())),
            matrices=tuple(_matrix(row, _widths(document)) for row in document["matrices"]),
            document=document,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: neither a report nor a plan of lowrank-compress ({error!r})") from error


def _widths(document: dict[str, Any]) -> dict[tuple[int, int | str], int]:
    """Of the narrowed experts, by layer and expert. A plan has the channels themselves, as the digits of a bitmap."""
    rows = document.get("experts", [])
    width = lambda row: row["width"] if "width" in row else int(row["channels"], 16).bit_count()
    return {(row["layer"], row["expert"]): width(row) for row in rows}


def _matrix(row: dict[str, Any], widths: dict[tuple[int, int | str], int]) -> Matrix:
    shape = row["shape"]
    rows, cols = (shape["rows"], shape["cols"]) if isinstance(shape, dict) else shape
    full = cols if row["projection"] == "down" else rows
    return Matrix(
        name=row["name"],
        layer=row["layer"],
        expert=row["expert"],
        projection=row["projection"],
        rows=rows,
        cols=cols,
        width=widths.get((row["layer"], row["expert"]), full),
        rank=row["rank"],
        relative_error=row["relative_error"],
        calibrated_error=row.get("calibrated_error"),
    )
