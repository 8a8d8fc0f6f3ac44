"""Digests of stored files: damage that still parses would otherwise load as wrong weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from intraslice_jax.errors import InputError

NAME = "SHA256SUMS"


def write_digests(folder: Path, part: str) -> None:
    """Writes SHA256SUMS for all files under `folder/part`; `sha256sum -c SHA256SUMS` reads it too."""
    lines = [f"{_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in _files(folder, part)]
    (folder / NAME).write_text("".join(lines))


def check_digests(folder: Path, part: str) -> None:
    """Compares the files under `folder/part` with SHA256SUMS.

    Raises:
        InputError: a file is missing, differs or is not listed, or there is no list.
    """
    problem = damage(folder, part)
    if problem is not None:
        raise InputError(f"{folder} is damaged: {problem}; write or copy the checkpoint again")


def damage(folder: Path, part: str) -> str | None:
    """What is wrong with the files under `folder/part`, in words; None if they are as they were written."""
    try:
        lines = (folder / NAME).read_text().splitlines()
    except (OSError, ValueError):
        return f"{NAME} cannot be read"
    listed = {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
    for name, expected in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != expected:
            return f"{name} differs from what was written"
    for file in _files(folder, part):
        if file.relative_to(folder).as_posix() not in listed:
            return f"{file.relative_to(folder).as_posix()} is not in {NAME}"
    return None if listed else f"{NAME} is empty"


def _files(folder: Path, part: str) -> list[Path]:
    return sorted(p for p in (folder / part).rglob("*") if p.is_file() and p != folder / NAME)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
