"""Orbax state written and read array by array, for models that do not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

_CHUNK = 16 * 2**20
"""Bytes that Orbax encodes in one go."""
_IN_FLIGHT = 64 * 2**20
"""Bytes that Orbax writes at the same time."""


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
            the same order, and each writes its parts.
        abstract: their shapes and dtypes.
        metadata: Orbax's custom metadata.
    """
    sizes = {name: math.prod(a.shape) * a.dtype.itemsize for name, a in abstract.items()}
    most = max(max(sizes.values()) // 4, 32 * 2**20)  # of a batch: reading and writing hold more than its arrays
    batch: dict[str, Any] = {}
    with frugal():
        for name, array in arrays:
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
    """

    def __init__(self, path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]):
        self._path, self._abstract = path, abstract

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, ())

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[path][index]`, for which only that part is read."""
        dtype = self._abstract[path].dtype
        base = {"driver": "file", "path": f"{self._path}/state/"}  # "state" is Orbax's name for a lone tree
        store = {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{path}/"}}
        stored = tensorstore.open(store, open=True, read=True).result()
        return np.asarray(stored[index].read().result()).astype(dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


def frugal() -> ocp.Context:
    """Orbax without copies of whole arrays: neither a safety copy nor a compressed one."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _IN_FLIGHT
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    return context
