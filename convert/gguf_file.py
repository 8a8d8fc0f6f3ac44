"""The GGUF container: metadata and tensors, every length checked against the file before it is used.

The `gguf` package's own reader keeps two small arrays per vocabulary entry (seconds and hundreds of megabytes for
a large vocabulary) and follows lengths of a damaged file without end, so only its tables and its
dequantisation are used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import ml_dtypes
import numpy as np

from intraslice_jax.errors import InputError

MAGIC = b"GGUF"

_T = TypeVar("_T")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 127  # llama.cpp takes 63
_PLAIN = {
    gguf.GGMLQuantizationType.F64: np.dtype(np.float64),
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


class GgufTensor(NamedTuple):
    """Where one tensor is; `shape` in NumPy's order."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    nbytes: int

    @property
    def dtype(self) -> str:
        """What it is read as: its own dtype, float32 where quantised."""
        return _PLAIN.get(self.kind, np.dtype(np.float32)).name


class GgufFile:
    """A GGUF file of version 2 or 3, little-endian.

    Attributes:
        metadata: the key/value pairs.
        tensors: places by name.

    Raises:
        InputError: the file is truncated, damaged, contradicts itself or is not GGUF.
    """

    def __init__(self, path: Path):
        self.path = path
        self._size = path.stat().st_size
        try:
            with path.open("rb") as stream:
                self._stream = stream
                if self._bytes(4) != MAGIC:
                    raise _DamagedError("it does not start with GGUF")
                (version,) = self._unpack("I")
                if version not in (2, 3):
                    raise _DamagedError(f"version {version}, expected 2 or 3, little-endian")
                tensors, pairs = self._unpack("QQ")
                self.metadata = _unique(self._pair() for _ in range(pairs))
                places = _unique(self._tensor() for _ in range(tensors))
                start = stream.tell()
                align = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
                if not isinstance(align, int) or align < 1 or align & (align - 1):
                    raise _DamagedError(f"general.alignment is {repr(align)[:40]}, expected a power of two")
        except (_DamagedError, struct.error, ValueError, RecursionError) as error:
            raise InputError(f"{path} is damaged or not a GGUF file ({error}); download it again") from error
        start = -(-start // align) * align
        self.tensors = {name: place._replace(offset=start + place.offset) for name, place in places.items()}
        for name, place in self.tensors.items():
            if place.offset + place.nbytes > self._size:
                raise InputError(
                    f"{path} is truncated: tensor {name!r} ends at byte {place.offset + place.nbytes}, "
                    f"the file at {self._size}; download it again"
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 where it is quantised.

        Raises:
            InputError: the quantisation is one that the `gguf` package cannot undo.
        """
        place = self.tensors[name]
        plain = _PLAIN.get(place.kind)
        if plain is not None:
            count = math.prod(place.shape)
            return np.fromfile(self.path, plain, count, offset=place.offset).reshape(place.shape)
        raw = np.fromfile(self.path, np.uint8, place.nbytes, offset=place.offset)
        try:
            shape = gguf.quant_shape_to_byte_shape(place.shape, place.kind)
            return gguf.dequantize(raw.reshape(shape), place.kind)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self.path}: tensor {name!r} is quantised as {place.kind.name}, which cannot be undone ({error}); "
                "use another quantisation of the model, for example Q8_0"
            ) from error

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise _DamagedError(f"it ends inside its header, at byte {self._size}")
        return self._stream.read(count)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._bytes(struct.calcsize("<" + layout)))

    def _string(self) -> str:
        return self._bytes(self._unpack("Q")[0]).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._unpack("IQ")
            if item in _SCALARS:
                size = struct.calcsize("<" + _SCALARS[item])
                return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._bytes(count * size)))
            return [self._value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise _DamagedError(f"unknown value type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _pair(self) -> tuple[str, Any]:
        return self._string(), self._value(self._unpack("I")[0])

    def _tensor(self) -> tuple[str, GgufTensor]:
        name = self._string()
        if len(name) > _LONGEST_NAME:
            raise _DamagedError(f"a tensor's name has {len(name)} characters")
        (axes,) = self._unpack("I")
        if not 1 <= axes <= 4:
            raise _DamagedError(f"tensor {name!r} has {axes} axes")
        shape = tuple(reversed(self._unpack(f"{axes}Q")))
        kind, offset = self._unpack("IQ")
        kind = gguf.GGMLQuantizationType(kind)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise _DamagedError(f"tensor {name!r} of the type {kind.name} has the shape {list(shape)}")
        return name, GgufTensor(shape, kind, offset, math.prod(shape) // block * nbytes)


class _DamagedError(Exception):
    """The file contradicts itself."""


def _unique(pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for name, value in pairs:
        if name in found:
            raise _DamagedError(f"it has {name[:100]!r} twice")
        found[name] = value
    return found
