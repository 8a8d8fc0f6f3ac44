"""One line per checkpoint tensor says how it and our arrays become each other, in both directions.

A checkpoint stores a linear map as torch does, [outputs, inputs]; we store [inputs, outputs] with the side that
belongs to heads split into heads and channels. Nothing is ever added, scaled or rounded on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from intraslice_jax.errors import InputError

Layout = Literal["same", "flat", "outputs", "inputs"]


class Entry(NamedTuple):
    """One row of a family's table; `{i}` stands for the layer.

    Attributes:
        name: the tensor's name in the checkpoint.
        paths: our arrays that it holds. Several mean a fused tensor: their outputs stand one below the other.
        layout: `same`: stored as we have it; `flat`: a vector; `outputs`: a linear map, the trailing axes of our
            array are its outputs; `inputs`: a linear map, the leading axes of our array are its inputs.
    """

    name: str
    paths: tuple[str, ...]
    layout: Layout


class Tensor(NamedTuple):
    """An `Entry` for one layer of one model, with the shapes of our arrays by path."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        parts = [stored_shape(self.layout, shape) for shape in self.shapes.values()]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def unpack(self, stored: np.ndarray) -> dict[str, np.ndarray]:
        """Our arrays, as views of the checkpoint's tensor, which has shape `shape`."""
        arrays, start = {}, 0
        for path, shape in self.shapes.items():
            stop = start + stored_shape(self.layout, shape)[0]
            part = stored[start:stop]
            arrays[path] = (part.T if self.layout in ("outputs", "inputs") else part).reshape(shape)
            start = stop
        return arrays

    def pack(self, arrays: Mapping[str, Any]) -> np.ndarray:
        """The checkpoint's tensor, C-contiguous; the inverse of `unpack`."""
        parts = [to_stored(self.layout, np.asarray(arrays[path])) for path in self.shapes]
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def stored_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the checkpoint of one of our arrays."""
    match layout:
        case "same":
            return shape
        case "flat":
            return (math.prod(shape),)
        case "outputs":
            return (math.prod(shape[1:]), shape[0])
        case "inputs":
            return (shape[-1], math.prod(shape[:-1]))


def to_stored(layout: Layout, array: np.ndarray) -> np.ndarray:
    """One of our arrays as the checkpoint has it."""
    match layout:
        case "same":
            return array
        case "flat":
            return array.reshape(-1)
        case "outputs":
            return array.reshape(array.shape[0], -1).T
        case "inputs":
            return array.reshape(-1, array.shape[-1]).T


def resolve(entries: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]], layers: int) -> list[Tensor]:
    """The tensors of a model that has the given arrays, in the order in which a forward pass needs them.

    Rows whose arrays the model does not have (a bias, an untied head) drop out.

    Raises:
        InputError: the model has only some of the arrays of a fused tensor, so it has no such checkpoint.
    """
    tensors = []
    per_layer = [entry for entry in entries if "{i}" in entry.name]
    first = next(n for n, entry in enumerate(entries) if "{i}" in entry.name)
    for entry in entries[:first]:
        tensors += _tensor(entry, shapes, "")
    for i in range(layers):
        for entry in per_layer:
            tensors += _tensor(entry, shapes, str(i))
    for entry in entries[first:]:
        if "{i}" not in entry.name:
            tensors += _tensor(entry, shapes, "")
    return tensors


def _tensor(entry: Entry, shapes: Mapping[str, tuple[int, ...]], layer: str) -> list[Tensor]:
    name = entry.name.replace("{i}", layer)
    paths = [path.replace("{i}", layer) for path in entry.paths]
    there = {path: tuple(shapes[path]) for path in paths if path in shapes}
    if not there:
        return []
    if len(there) < len(paths):
        absent = ", ".join(path for path in paths if path not in there)
        raise InputError(f"tensor {name} is fused and needs {absent}, which the model does not have")
    return [Tensor(name, there, entry.layout)]
