"""Where tensors are read from, one at a time, into memory of their own (no map of the file stays behind)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ml_dtypes
import numpy as np
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from intraslice_jax import reading
from intraslice_jax.errors import InputError
from intraslice_jax.reading import check, parse_json

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
_TORCH = ("float64", "float32", "float16", "bfloat16", "int64", "int32")
_BIN_REMEDY = "or convert the checkpoint to safetensors"
_LONGEST_HEADER = 100_000_000
"""Bytes; the format's own library reads no longer ones."""

Size = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Described(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[tuple[Size, ...], Field(max_length=64)]  # NumPy has no more dimensions
    data_offsets: tuple[Size, Size]


class ShardIndex(TypedDict):
    """A model.safetensors.index.json or pytorch_model.bin.index.json: each tensor's file."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class TensorSource(ABC):
    """A checkpoint's tensors by name.

    Attributes:
        where: the file or folder, for messages.
        dtypes: by tensor, NumPy's name of what it is read as, or the file's of what is not read (`F8_E4M3`).
        shapes: by tensor, as `read` will give it.
        layers_lack_biases: whether a layer may lack a bias that others have; it is zero then.
    """

    where: str
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    layers_lack_biases = False
    _viewed: tuple[str, np.ndarray] | None = None

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor, in an array that nothing else refers to."""

    def view(self, name: str) -> np.ndarray:
        """One tensor of which only parts are used; what is not looked at need not be read.

        Here all of it is, and kept until another is asked for.
        """
        if self._viewed is None or self._viewed[0] != name:
            self._viewed = (name, self.read(name))
        return self._viewed[1]


def not_read(where: str, name: str, dtype: str) -> InputError:
    """What to say of a tensor of numbers that are not read: float8, packed integers."""
    expected = "float32, float16, bfloat16 or float64"
    return InputError(f"{where}: {name} is stored as {dtype}, expected {expected}; use the unquantised checkpoint")


class _Place(NamedTuple):
    file: Path
    dtype: np.dtype | None
    stored: str
    shape: tuple[int, ...]
    offset: int


class Safetensors(TensorSource):
    """Tensors of one or several safetensors files; only the headers are read at first.

    Raises:
        InputError: a file is missing, truncated or malformed.
    """

    def __init__(self, files: list[Path], where: str):
        self.where = where
        self._places: dict[str, _Place] = {}
        for file in files:
            for name, place in _read_header(file).items():
                if name in self._places:
                    raise InputError(f"tensor {name} is in {self._places[name].file} and in {file}")
                self._places[name] = place
        self.dtypes = {name: p.dtype.name if p.dtype else p.stored for name, p in self._places.items()}
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        place = self._places[name]
        if place.dtype is None:
            raise not_read(self.where, name, place.stored)
        count = math.prod(place.shape)
        return np.fromfile(place.file, place.dtype, count, offset=place.offset).reshape(place.shape)

    def view(self, name: str) -> np.ndarray:
        place = self._places[name]
        if place.dtype is None or not math.prod(place.shape):
            return self.read(name)
        return np.memmap(place.file, place.dtype, "r", place.offset, place.shape)


def _read_header(file: Path) -> dict[str, _Place]:
    _check_file(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise InputError(f"{file} is truncated or not a safetensors file; download it again")
        header = parse_json(stream.read(length), f"the header of {file}")
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    described = check(header, dict[str, Described], f"the header of {file}")
    places, end = {}, 8 + length
    for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if start != end:  # no bytes belong to two tensors, or to none
            raise InputError(f"{file}: tensor {name} begins at byte {start}, expected {end}; download it again")
        places[name] = _place(file, name, entry, start, stop - start)
        end = stop
    if end != size:
        raise InputError(
            f"{file} has {size} bytes, its header describes {end}: it is "
            f"{'truncated' if size < end else 'damaged'}; download it again"
        )
    return places


def _check_file(file: Path) -> None:
    try:
        found = "is missing" if not file.exists() else None if file.is_file() else "is not a file"
    except OSError as error:  # a name that is too long
        found = f"cannot be read: {error.strerror}"
    if found:
        raise InputError(f"{file} {found}; copy the whole checkpoint")


def _place(file: Path, name: str, entry: Described, offset: int, nbytes: int) -> _Place:
    dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
    if dtype is not None and math.prod(shape) * dtype.itemsize != nbytes:
        raise InputError(
            f"{file}: tensor {name} {str(list(shape))[:100]} does not fit its {nbytes} bytes; download it again"
        )
    return _Place(file, dtype, entry["dtype"], shape, offset)


class TorchFiles(TensorSource):
    """Tensors of `pytorch_model.bin` files, read by torch (which must be installed) without unpickling objects.

    Raises:
        InputError: torch is missing, or a file is damaged or holds more than tensors.
    """

    def __init__(self, files: list[Path], where: str):
        self.where = where
        self._tensors: dict[str, Any] = {}
        for file in files:
            self._tensors.update(_torch_load(file))
        self.dtypes = {name: _torch_dtype(t) for name, t in self._tensors.items()}
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if self.dtypes[name] not in _TORCH:
            raise not_read(self.where, name, self.dtypes[name])
        if self.dtypes[name] == "bfloat16":
            # NumPy has no bfloat16 of its own; the bits travel as integers.
            import torch

            return tensor.detach().contiguous().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
        return tensor.detach().contiguous().numpy().copy()  # a parameter wants to know its gradient


def _torch_dtype(tensor: Any) -> str:
    """NumPy's name for it; another for tensors whose numbers do not lie side by side in memory."""
    if str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        return f"{tensor.layout} on {tensor.device.type}".removeprefix("torch.")
    return str(tensor.dtype).removeprefix("torch.")


def _torch_load(file: Path) -> dict[str, Any]:
    _check_file(file)
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{file} is read by torch: install it (pip install torch), {_BIN_REMEDY}") from error
    try:
        # Mapped, so that only the tensors in use are in memory; the oldest format cannot be.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"{file} is damaged or holds more than tensors ({reason}); {_BIN_REMEDY[3:]}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{file} does not hold a mapping of names to tensors; {_BIN_REMEDY[3:]}")
    for name, tensor in content.items():
        # A stride of 0 makes a terabyte of one number.
        if (
            tensor.layout is torch.strided
            and tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise InputError(f"{file}: tensor {name} {list(tensor.shape)} is larger than what is stored of it")
    return content


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def open_folder(folder: Path) -> TensorSource:
    """The weights of a Hugging Face folder: safetensors before `.bin`, single before sharded.

    Raises:
        InputError: there are none, or an index or a shard is missing or damaged.
    """
    for stem, suffix, kind in (("model", "safetensors", Safetensors), ("pytorch_model", "bin", TorchFiles)):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            return kind([single], str(single))
        if index.exists():
            return kind(_shards(index), str(folder))
        shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        if shards:
            return kind(shards, str(folder))
    raise InputError(
        f"{folder} holds no weights: expected model.safetensors, its shards with an index, or pytorch_model.bin"
    )


def _shards(index: Path) -> list[Path]:
    names = set(reading.read_json(index, ShardIndex)["weight_map"].values())
    outside = [name for name in names if Path(name).name != name or name in ("", "..") or "\0" in name]
    if outside:
        raise InputError(f"{index} names a shard outside its folder: {outside[0]!r}")
    return [index.parent / name for name in sorted(names)]
