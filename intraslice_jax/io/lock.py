"""A file that says which process writes something; the system frees it when that process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ConfigDict
from typing_extensions import TypedDict

from intraslice_jax.errors import InputError
from intraslice_jax.io.atomic import cannot_write, check_name
from intraslice_jax.reading import Count, check, parse_json

log = logging.getLogger(__name__)


class Owner(TypedDict):
    """The process that has a lock; `boot` is the machine's since it was started, "" where the system has none."""

    __pydantic_config__ = ConfigDict(extra="ignore")  # pyright: ignore[reportGeneralTypeIssues]

    pid: Count
    host: str
    boot: str


class Lock:
    """A lock of one process, or of the first of several.

    Args:
        path: the lock file; its folder exists.
        subject: what is locked, for messages.
    """

    def __init__(self, path: Path, subject: Path):
        self._path, self._subject = path, subject
        self._handle: int | None = None

    def take(self, resume: bool = False) -> None:
        """Takes the lock, also that of a process that has ended; does nothing if this object has it.

        Args:
            resume: the user says that a run on another host has ended.

        Raises:
            InputError: another process has it, or may have it on another host; or the file cannot be written.
        """
        while self._handle is None:
            handle = self._open()
            try:
                free = self._is_free(handle)
                if not _is_at(handle, self._path):  # its last owner removed it meanwhile
                    continue
                owner = _owner(handle, wait=not free)
                # A lock that is free on this host may not be on another: some file systems do not tell them.
                if not free or (owner is not None and not resume and not _is_here(owner)):
                    raise self._refusal(owner, sure=not free)
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
                self._handle, handle = handle, -1
            except OSError as error:
                raise cannot_write(self._subject, error) from error
            finally:
                if handle >= 0:
                    os.close(handle)

    def release(self) -> None:
        """Removes the file, if this object has the lock."""
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        try:
            # Without waiting for the other end of a pipe.
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except IsADirectoryError:
            raise InputError(f"{self._path} is a folder, expected the file of a lock; remove it") from None
        except OSError as error:
            raise cannot_write(self._subject, error) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InputError(f"{self._path} is not a file, expected that of a lock; remove it")
        return handle

    def _is_free(self, handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); make sure that no other run uses it", self._subject, error)
            owner = _owner(handle)
            return owner is None or not _is_here(owner) or not _is_alive(owner["pid"])
        return True

    def _refusal(self, owner: Owner | None, sure: bool) -> InputError:
        who = f"process {owner['pid']} on host {owner['host']}" if owner else "another process"
        if sure:
            return InputError(f"{self._subject} is in use by another run, {who}; wait for it, or choose another output")
        return InputError(
            f"{self._subject} may be in use by another run, {who}: look there; if it has ended, remove {self._path}"
        )


@contextmanager
def locked(output: Path, resume: bool = False) -> Iterator[None]:
    """Keeps other runs from an output, a file or a folder, from now on; folders above it are made.

    The lock is the file `.NAME.lock` beside the output. When the block ends it is removed, and so are the folders that
    were made for it and are still empty.

    Raises:
        InputError: another process has the lock, or nothing can be written there.
    """
    check_name(output)
    missing = [folder for folder in output.absolute().parents if not folder.exists()]
    lock = Lock(output.with_name(f".{output.name}.lock"), output)
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(output, error) from error
        lock.take(resume)
        yield
    finally:
        lock.release()
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _this_process() -> Owner:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}


def _boot() -> str:
    """The same in all containers of a machine, whatever their host names are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_here(owner: Owner) -> bool:
    return owner["host"] == socket.gethostname() or (owner["boot"] == _boot() != "")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _owner(handle: int, wait: bool = False) -> Owner | None:
    """Who a lock says has it; None if it does not say so."""
    for _ in range(20 if wait else 1):
        try:
            return check(parse_json(os.pread(handle, 4096, 0), ""), Owner, "")
        except InputError:
            time.sleep(0.05 if wait else 0)  # a process that has just taken it writes this next
    return None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
