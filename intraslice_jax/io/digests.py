"""Digests of stored files: damage that still parses would otherwise load as wrong weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

from intraslice_jax.errors import InputError
from intraslice_jax.reading import read_bytes

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\0]+)")


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
        lines = read_bytes(folder / NAME).decode().splitlines()
    except ValueError:
        return f"{NAME} cannot be read"
    listed = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2]) if match else None
        if match is None or name is None or name.is_absolute() or ".." in name.parts:
            return f"{NAME} has a line that is not a digest and the name of a file in this folder"
        listed[match[2]] = match[1]
    for name, expected in listed.items():
        try:
            found = _digest(folder / name) if (folder / name).is_file() else None
        except OSError as error:  # a name that is too long, no permission
            return f"{name[:100]} cannot be read: {error.strerror}"
        if found is None:
            return f"{name} is missing"
        if found != expected:
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
