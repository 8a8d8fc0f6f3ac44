"""Files and folders that appear under their final name only when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intraslice_jax.errors import InputError


def check_output(path: str | Path, overwrite: bool) -> Path:
    """Refuses an output that exists, unless it may be overwritten; call it before the work starts."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another output, or replace it with `overwrite=True`")
    for part in (path, *path.parents):
        if part.is_file():
            raise InputError(f"{part} is a file; the output must be a folder")
    return path


def check_file(path: str | Path, overwrite: bool) -> Path:
    """`check_output` for an output that is a file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; the output must be a file")
    if path.is_file():
        if not overwrite:
            raise InputError(f"{path} exists already; choose another output, or replace it with `overwrite=True`")
        return path
    check_output(path, overwrite)
    return path


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path`, renamed to `path` when the block ends without an error.

    On any error, Ctrl-C included, the folder is removed and what stood at `path` before stays.

    Raises:
        InputError: `path` exists and `overwrite` is False.
    """
    path = check_output(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    work.chmod(0o777 & ~_umask())
    try:
        yield work
        old = work.with_suffix(".old")
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(work, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields the name of a file beside `path`, renamed to `path` when the block ends without an error.

    On any error the file is removed and what stood at `path` before stays.

    Raises:
        InputError: `path` exists and `overwrite` is False, or is a folder.
    """
    path = check_file(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    work = Path(name)
    try:
        work.chmod(0o666 & ~_umask())
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, and the folder it is in, replacing what was there."""
    with atomic_file(path, overwrite=True) as work:
        work.write_bytes(content)


def flush(folder: str | Path) -> None:
    """Returns when all files of a folder and their names are on the disk, and not only in the system's memory."""
    folder = Path(folder)
    for path in (*folder.rglob("*"), folder):
        flush_one(path)


def flush_one(path: Path) -> None:
    """`flush` for one file, or for the names in one folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def journal_of(output: Path) -> Path:
    """The folder beside an output in which an unfinished run keeps its state."""
    return output.with_name(f"{output.name}.journal")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
