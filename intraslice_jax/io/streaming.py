"""Orbax state written and read array by array, for models that do not fit into memory."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from intraslice_jax.errors import InputError, RunError

_CHUNK = 16 * 2**20
"""Bytes that Orbax encodes in one go."""
_IN_FLIGHT = 64 * 2**20
"""Bytes that Orbax writes at the same time."""

# What fails in Orbax reaches the caller as an exception; its log says it again, in two hundred lines.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


def write_failure(path: Path, error: BaseException) -> RunError:
    """What to say, in one line, when a file or an Orbax state cannot be written."""
    text = " ".join(str(error).split())
    # The system's number of the error stands somewhere in a long message of tensorstore, and at the front of Python's.
    found = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", text)
    said = os.strerror(int(found[1] or found[2])).lower() if found else text[:300]
    return RunError(f"{path} cannot be written: {said}")


@contextmanager
def settled() -> Iterator[None]:
    """When Orbax fails inside, its threads end before the block does, and say nothing more.

    They would go on to make files in a folder that is to be removed.
    """
    before, hook = set(threading.enumerate()), sys.unraisablehook

    def without_echoes(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):  # of those who waited for what failed
            hook(unraisable)

    sys.unraisablehook = without_echoes
    try:
        yield
    except BaseException:
        for thread in set(threading.enumerate()) - before:
            if type(thread).__name__ == "_SignalingThread":
                thread.join(10)
        raise  # the hook stays: some echoes come later
    sys.unraisablehook = hook


def not_empty(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that Orbax can hold: those of size zero follow from their shapes."""
    return {name: array for name, array in arrays.items() if math.prod(array.shape)}


def write_streamed(
    path: Path,
    arrays: Iterable[tuple[str, Any]],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes arrays by name as `ocp.save` would, never holding more than about the largest of them.

    Args:
        path: the folder to write, absolute.
        arrays: pairs of name and array, taken one after the other. Several processes give arrays on their mesh, in
            the same order, and each writes its parts. Those of size zero are left out.
        abstract: their shapes and dtypes.
        metadata: Orbax's custom metadata.
    """
    sizes = {name: math.prod(a.shape) * a.dtype.itemsize for name, a in abstract.items()}
    most = max(max(sizes.values()) // 4, 32 * 2**20)  # of a batch: reading and writing hold more than its arrays
    batch: dict[str, Any] = {}
    with frugal(), settled():
        for name, array in arrays:
            if not sizes[name]:
                continue
            if batch and sum(sizes[held] for held in batch) + sizes[name] > most:
                ocp.partial.save(str(path), batch, custom_metadata=metadata)
                batch = {}
            # Orbax would copy all of a batch that is not contiguous.
            batch[name] = array if isinstance(array, jax.Array) else np.ascontiguousarray(array)
            del array
        ocp.partial.save(str(path), batch, custom_metadata=metadata)
        ocp.partial.finalize(str(path))


class StreamedArrays(Mapping[str, np.ndarray]):
    """The arrays of an Orbax state by name, each read when it is asked for, as a whole or in part.

    They are read past Orbax, whose functions wait for all processes: here every process reads what it needs when it
    needs it, in any thread.

    Args:
        path: the folder that Orbax wrote.
        abstract: shapes, and the dtypes in which the arrays come.

    Raises:
        InputError: on access: the array is missing, damaged, or of another shape or kind.
    """

    def __init__(self, path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]):
        self._path, self._abstract = path, abstract

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, ())

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[path][index]`, for which only that part is read."""
        wanted = self._abstract[path]
        base = {"driver": "file", "path": f"{self._path}/state/"}  # "state" is Orbax's name for a lone tree
        store = {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{path}/"}}
        try:
            if not math.prod(wanted.shape):
                return np.zeros(wanted.shape, wanted.dtype)[index]
            stored = tensorstore.open(store, open=True, read=True).result()
            found = f"{stored.dtype.name} {list(stored.shape)}"
            if stored.shape == wanted.shape and _kind(stored.dtype.numpy_dtype) == _kind(wanted.dtype):
                return np.asarray(stored[index].read().result()).astype(wanted.dtype, copy=False)
        except (ValueError, OSError) as error:
            found = " ".join(str(error).split())[:200]
        expected = f"{wanted.dtype} {list(wanted.shape)}"
        raise InputError(f"{self._path} is damaged: {path} must be {expected}, found {found}; write it again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


def _kind(dtype: Any) -> tuple[bool, bool]:
    return jnp.issubdtype(dtype, np.integer), jnp.issubdtype(dtype, np.floating)


def stored_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all arrays of an Orbax state by name, read past Orbax: of a damaged one it says much.

    Raises:
        ValueError: it is damaged.
    """
    base = {"driver": "file", "path": f"{path}/state/"}
    keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    names = sorted({key.decode().partition("/")[0] for key in keys})
    stores = [{"driver": "auto", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}} for name in names]
    opened = [tensorstore.open(store, open=True, read=True) for store in stores]
    return {name: found.result().shape for name, found in zip(names, opened, strict=True)}


def frugal() -> ocp.Context:
    """Orbax without copies of whole arrays: neither a safety copy nor a compressed one."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _IN_FLIGHT
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    return context
