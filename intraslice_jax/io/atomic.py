"""Files and folders that appear under their final name only when complete."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intraslice_jax.errors import InputError, RunError

_LONGEST_NAME = 255 - len("..12345678.partial")
"""Bytes; file systems allow 255, and the names of what is unfinished are longer than the output's."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_name(path: Path) -> None:
    """Refuses an output that cannot be made under its name, whatever is there now."""
    if "\0" in str(path) or path.name in ("", ".."):
        raise InputError(f"{str(path)!r} cannot be an output; give a name of its own to a file or folder")
    size = len(os.fsencode(path.name))
    if size > _LONGEST_NAME:
        raise InputError(f"{path.name[:40]}... has {size} bytes, the name of an output at most {_LONGEST_NAME}")
    try:
        path.exists()  # may it be looked at?
        file = next((part for part in path.parents if part.is_file()), None)
    except OSError as error:
        raise cannot_write(path, error) from error
    if file is not None:
        raise InputError(f"{file} is a file; the output must be in a folder")


def cannot_write(path: Path, error: OSError) -> InputError | RunError:
    """What to say of an output: on a full disk the run has failed, otherwise the output was a wrong input."""
    said = f"{path} cannot be written: {(error.strerror or str(error)).lower()}"
    return RunError(said) if error.errno in _FULL else InputError(f"{said}; choose another output")


def check_output(path: str | Path, overwrite: bool) -> Path:
    """Refuses an output that exists, unless it may be overwritten; call it before the work starts."""
    path = Path(path)
    check_name(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another output, or replace it with `overwrite=True`")
    for part in (path, *path.parents):
        if part.is_file():
            raise InputError(f"{part} is a file; the output must be a folder")
    return path


def check_file(path: str | Path, overwrite: bool) -> Path:
    """`check_output` for an output that is a file."""
    path = Path(path)
    check_name(path)
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
        InputError: `path` exists and `overwrite` is False, or nothing can be written there.
        RunError: the disk is full.
    """
    path = check_output(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        work.chmod(0o777 & ~_umask())
        with _room_for(path):
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
        InputError: `path` exists and `overwrite` is False, is a folder, or cannot be written.
        RunError: the disk is full.
    """
    path = check_file(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    os.close(handle)
    work = Path(name)
    try:
        work.chmod(0o666 & ~_umask())
        with _room_for(path):
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


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Names the output when the disk is full: the system's error says neither which file nor which disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise cannot_write(path, error) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
