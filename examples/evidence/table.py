"""Finished runs as rows of a CSV: settings first, then the outcome."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from training import Outcome, Run

READ: dict[Any, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": "True".__eq__,
}
HEADER = [each.name for kind in (Run, Outcome) for each in fields(kind)]


def load(path: Path) -> list[tuple[Run, Outcome]]:
    """All rows; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        read = csv.DictReader(file)
        if read.fieldnames != HEADER:
            raise SystemExit(f"{path} has other columns: remove it, or name another --out")
        return [(_parsed(Run, row), _parsed(Outcome, row)) for row in read]


def _parsed(kind: type, row: dict[str, str]) -> Any:
    return kind(**{each.name: READ[each.type](row[each.name]) for each in fields(kind)})


def append(path: Path, run: Run, outcome: Outcome) -> None:
    """Adds a row, below the header if it is the first."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(HEADER)
        writer.writerow((*astuple(run), *map(_short, astuple(outcome))))


def _short(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value


def missing(path: Path, runs: Sequence[Run]) -> list[Run]:
    """The runs without a row."""
    finished = {run for run, _ in load(path)}
    return [run for run in dict.fromkeys(runs) if run not in finished]
