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
        raise InputError(f"{path} exists already; choose another output or pass --overwrite")
    for part in (path, *path.parents):
        if part.is_file():
            raise InputError(f"{part} is a file; the output must be a folder")
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


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, and the folder it is in, replacing what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(work, 0o666 & ~_umask())
        os.replace(work, path)
    except BaseException:
        os.unlink(work)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
