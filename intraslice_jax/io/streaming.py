"""Orbax state written and read array by array, for models that do not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

_CHUNK = 16 * 2**20
"""Bytes that Orbax encodes in one go."""
_IN_FLIGHT = 64 * 2**20
"""Bytes that Orbax writes at the same time."""


def write_streamed(
    path: Path, arrays: Mapping[str, Any], abstract: Mapping[str, jax.ShapeDtypeStruct], metadata: dict[str, Any]
) -> None:
    """Writes arrays by name as `ocp.save` would, never holding more than about the largest of them.

    Args:
        path: the folder to write, absolute.
        arrays: read in their own order, each once.
        abstract: their shapes and dtypes.
        metadata: Orbax's custom metadata.
    """
    sizes = {name: math.prod(a.shape) * a.dtype.itemsize for name, a in abstract.items()}
    most = max(max(sizes.values()) // 4, 32 * 2**20)  # of a batch: reading and writing hold more than its arrays
    batch: dict[str, np.ndarray] = {}
    with frugal():
        for name in arrays:
            if batch and sum(sizes[held] for held in batch) + sizes[name] > most:
                ocp.partial.save(str(path), batch, custom_metadata=metadata)
                batch = {}
            batch[name] = np.ascontiguousarray(arrays[name])  # Orbax would copy all of a batch
        ocp.partial.save(str(path), batch, custom_metadata=metadata)
        ocp.partial.finalize(str(path))


class StreamedArrays(Mapping[str, np.ndarray]):
    """The arrays of an Orbax state by name, each read when it is asked for."""

    def __init__(self, path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]):
        self._path, self._abstract = path, abstract

    def __getitem__(self, name: str) -> np.ndarray:
        wanted: dict[str, Any] = dict.fromkeys(self._abstract, ocp.PLACEHOLDER)
        # A NumPy array of no memory asks for one in return; jax's would be copied on its way to a device.
        abstract = self._abstract[name]
        wanted[name] = np.broadcast_to(np.zeros((), abstract.dtype), abstract.shape)
        with frugal():
            return np.asarray(ocp.load(self._path, wanted)[name])

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
