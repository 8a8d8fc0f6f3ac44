"""Safetensors files written tensor by tensor, split over several files above a size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from intraslice_jax.errors import InputError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BLOCK = 1 << 24  # elements that are converted and written at a time


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB` or a number.

    Raises:
        InputError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    found = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if found < 1:
        raise InputError(f"max_shard_size must be a size such as 5GB or 500MB, found {size!r}")
    return found


def write_tensors(
    folder: Path, plan: Sequence[Planned], tensors: Iterable[tuple[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes `model.safetensors`, or shards and their index where the plan is larger than `max_shard_size`.

    Args:
        folder: where.
        plan: all tensors, in the order in which they come.
        tensors: names and arrays of any floating dtype; each is converted to the planned one block by block, so
            that no more than one tensor is in memory.
        max_shard_size: bytes; a larger tensor has a shard of its own.

    Raises:
        InputError: a number is too large for the planned dtype.
    """
    shards = _split(plan, max_shard_size)
    several = len(shards) > 1
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if several else "model.safetensors"
             for i in range(len(shards))]  # fmt: skip
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, stream)
    if several:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in plan)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_shard(path: Path, shard: Sequence[Planned], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    # Wide dtypes first, as the format's own writer does, so that every tensor is aligned in the file.
    offsets, end = {}, 0
    for tensor in sorted(shard, key=lambda t: (-t.dtype.itemsize, t.name)):
        offsets[tensor.name] = end
        end += tensor.nbytes
    entries = {
        t.name: {
            "dtype": _DTYPES[t.dtype.name],
            "shape": list(t.shape),
            "data_offsets": [offsets[t.name], offsets[t.name] + t.nbytes],
        }
        for t in shard
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for planned, (name, array) in zip(shard, tensors):  # noqa: B905 (the stream goes on with the next shard)
            if (name, array.shape) != (planned.name, planned.shape):
                raise ValueError(f"{name} {array.shape} came where {planned.name} {planned.shape} was planned")
            file.seek(8 + len(header) + offsets[name])
            _write_array(file, planned, array)
            del array


def _write_array(file: IO[bytes], planned: Planned, array: np.ndarray) -> None:
    rows = max(1, _BLOCK // max(1, math.prod(planned.shape[1:])))
    for start in range(0, planned.shape[0], rows):
        block = array[start : start + rows]
        cast = converted(planned.name, block, planned.dtype)
        file.write(cast.view(np.uint8).data)


def converted(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another dtype, C-contiguous.

    Raises:
        InputError: a number is too large for it; `name` is named.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=dtype)
    if cast.dtype != array.dtype:
        overflow = np.isfinite(array) & ~np.isfinite(cast)
        if overflow.any():
            raise InputError(
                f"dtype {dtype.name}: tensor {name} holds {float(array[overflow][0]):.6g}, which is too "
                "large for it; export as bfloat16 or float32"
            )
    return cast
