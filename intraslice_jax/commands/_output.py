"""What commands print and write: short tables for people, the same facts as JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intraslice_jax.errors import InputError
from intraslice_jax.io.atomic import write_bytes


def say(message: str) -> None:
    """A line about what is going on, on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells on standard output, the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        print("  ".join(cells).rstrip())


def check_json_output(path: Path | None, overwrite: bool) -> None:
    """Refuses a report file that exists, before the work starts."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; --output takes the name of a JSON file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another output or pass --overwrite")


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Writes a JSON file that appears under its name only when complete."""
    write_bytes(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def number(value: int) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def percent(fraction: float) -> str:
    """0.3 as 30.00 %."""
    return f"{100 * fraction:.2f} %"


def gibibytes(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"
