"""Several processes as one program: starting together, agreeing, and noticing when one is gone."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from intraslice_jax.config import ParallelConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.atomic import atomic_folder
from intraslice_jax.parallel.threads import enough_threads

_PULSE, _FAILED = "intraslice/pulse", "intraslice/failed"
_INTERVAL = 1.0
"""Seconds between two signs of life."""


def start(config: ParallelConfig) -> None:
    """Joins the processes of a run; call it before anything else of jax. One process needs nothing.

    Raises:
        InputError: some of the explicit options are missing, or no cluster is detected.
    """
    explicit = {
        "`coordinator`": config.coordinator,
        "`num_processes`": config.num_processes,
        "`process_id`": config.process_id,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if not given and not config.distributed:
        return
    if given and len(given) < len(explicit):
        missing = [name for name in explicit if name not in given]
        raise InputError(
            f"{', '.join(given)} without {', '.join(missing)}; give all three, or `distributed` alone on a TPU pod "
            "slice, under Slurm or under Open MPI"
        )
    if config.num_processes is not None and not 0 <= (config.process_id or 0) < config.num_processes:
        raise InputError(f"`process_id={config.process_id}` is not below `num_processes={config.num_processes}`")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        enough_threads()
    with _deadline(config):
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                # Ours come first: jax's end the process with a stack trace.
                initialization_timeout=config.startup_timeout + 60,
                heartbeat_timeout_seconds=2 * config.peer_timeout,
                shutdown_timeout_seconds=config.peer_timeout,
            )
        except ValueError as error:
            raise InputError(
                f"`distributed`: no TPU pod slice, Slurm or Open MPI job was detected ({error}); give "
                "`coordinator=HOST:PORT`, `num_processes` and `process_id`"
            ) from error
    if jax.process_count() > 1:
        threading.Thread(target=_watch, args=(_client(), float(config.peer_timeout)), daemon=True).start()


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Nothing is printed inside by any process but the first; failures are told outside."""
    if is_first():
        yield
        return
    before = logging.root.manager.disable
    logging.disable()  # its handlers have the stream that was there before
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(values: Any) -> Any:
    """What the first process has, as NumPy arrays, on all processes: a tree of arrays of the same shapes."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(values)


@contextlib.contextmanager
def shared_folder(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """`atomic_folder` that all processes write into together; the first one makes and renames it."""
    if jax.process_count() == 1:
        with atomic_folder(path, overwrite) as folder:
            yield folder
    elif is_first():
        with atomic_folder(path, overwrite) as folder:
            _text_from_first(str(folder))
            yield folder
            barrier("written")
        barrier("renamed")
    else:
        yield Path(_text_from_first(""))
        barrier("written")
        barrier("renamed")


def _text_from_first(text: str) -> str:
    padded = np.frombuffer(text.encode().ljust(4096), np.uint8)
    return bytes(np.asarray(from_first(padded))).decode().strip()


def agree(facts: str, where: str) -> None:
    """Stops a run whose processes have come to different results; all of them call it.

    Raises:
        RunError: the text differs from the first process's.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(hashlib.sha256(facts.encode()).digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(own))
    odd = [i for i, digest in enumerate(every) if digest.tobytes() != every[0].tobytes()]
    if odd:
        raise RunError(
            f"{where}: process {odd[0]} decided otherwise than process 0; all hosts need the same model, text, "
            "options, software and kind of processor"
        )


def abandon(message: str, code: int) -> NoReturn:
    """Ends this process of several at once, and tells the others why instead of leaving them waiting."""
    client = _client()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_FAILED}/{jax.process_index()}", message, allow_overwrite=True)
        if is_first():
            time.sleep(3 * _INTERVAL)  # this process serves the others the message
    _exit(code)


def _client() -> Any:
    # jax offers no public way to the key-value store of its coordinator.
    from jax._src import distributed

    return distributed.global_state.client


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit waits for the others


@contextlib.contextmanager
def _deadline(config: ParallelConfig) -> Iterator[None]:
    """Ends the process with a message when the others do not come in time: jax would wait, then abort."""
    others = f"{config.num_processes} processes at {config.coordinator}" if config.coordinator else "the processes"

    def give_up() -> None:
        _complain(
            f"after {config.startup_timeout} s not all of {others} are there; start the missing ones, open the "
            "coordinator's port, or raise startup_timeout (--startup-timeout)"
        )
        _exit(1)

    timer = threading.Timer(config.startup_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watch(client: Any, timeout: float) -> None:
    """Gives signs of life, and ends the process when another one gives none or has failed."""
    own, others = jax.process_index(), [i for i in range(jax.process_count()) if i != jax.process_index()]
    last = {i: ("", time.monotonic()) for i in others}
    count = 0
    while True:
        time.sleep(_INTERVAL)
        count += 1
        with contextlib.suppress(Exception):
            client.key_value_set(f"{_PULSE}/{own}", str(count), allow_overwrite=True)
        for i in others:
            message = _lookup(client, f"{_FAILED}/{i}")
            if message:
                _complain(f"process {i} failed: {message}")
                _exit(1)
            pulse, since = _lookup(client, f"{_PULSE}/{i}"), last[i][1]
            if pulse and pulse != last[i][0]:
                last[i] = (pulse, time.monotonic())
            elif time.monotonic() - since > timeout:
                _complain(
                    f"process {i} gave no sign of life for {timeout:g} s; it was killed, or its host or network is "
                    "gone. Start all processes again; prune goes on with --resume"
                )
                _exit(1)


def _lookup(client: Any, key: str) -> str:
    try:
        return client.key_value_try_get(key)
    except Exception:  # not there yet
        return ""


def _complain(message: str) -> None:
    # The process's own standard error, whatever `only_first_speaks` made of it.
    print(f"intraslice: {message}", file=sys.__stderr__, flush=True)
