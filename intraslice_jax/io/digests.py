"""Digests of stored files: damage that still parses would otherwise load as wrong weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from intraslice_jax.errors import InputError

NAME = "SHA256SUMS"


def write_digests(folder: Path, part: str) -> None:
    """Writes SHA256SUMS for all files under `folder/part`; `sha256sum -c SHA256SUMS` reads it too."""
    files = sorted(p for p in (folder / part).rglob("*") if p.is_file())
    lines = [f"{_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / NAME).write_text("".join(lines))


def check_digests(folder: Path) -> None:
    """Compares the files with SHA256SUMS.

    Raises:
        InputError: a file is missing or differs, or there is no list.
    """
    try:
        lines = (folder / NAME).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is damaged: {NAME} cannot be read; write or copy the checkpoint again") from error
    for line in lines:
        expected, _, name = line.partition("  ")
        file = folder / name
        problem = "is missing" if not file.is_file() else "differs from what was written"
        if not file.is_file() or _digest(file) != expected:
            raise InputError(f"{folder} is damaged: {name} {problem}; write or copy the checkpoint again")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
