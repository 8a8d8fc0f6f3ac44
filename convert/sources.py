"""Where tensors are read from, one at a time, into memory of their own (no map of the file stays behind)."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from intraslice_jax.errors import InputError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
_BIN_REMEDY = "or convert the checkpoint to safetensors"


class TensorSource(ABC):
    """A checkpoint's tensors by name.

    Attributes:
        where: the file or folder, for messages.
        dtypes: by tensor, NumPy's name of what it is read as.
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


class _Place(NamedTuple):
    file: Path
    dtype: np.dtype
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
        self.dtypes = {name: place.dtype.name for name, place in self._places.items()}
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        place = self._places[name]
        count = math.prod(place.shape)
        return np.fromfile(place.file, place.dtype, count, offset=place.offset).reshape(place.shape)

    def view(self, name: str) -> np.ndarray:
        place = self._places[name]
        if not math.prod(place.shape):
            return self.read(name)
        return np.memmap(place.file, place.dtype, "r", place.offset, place.shape)


def _read_header(file: Path) -> dict[str, _Place]:
    if not file.is_file():
        raise InputError(f"{file} is missing; copy the whole checkpoint")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{file} is truncated or not a safetensors file; download it again")
        try:
            header = json.loads(stream.read(length))
            places, end = {}, 0
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, stop = entry["data_offsets"]
                places[name] = _place(file, name, entry, 8 + length + start, stop - start)
                end = max(end, 8 + length + stop)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} has no valid safetensors header ({error}); download it again") from error
    if end != size:
        raise InputError(
            f"{file} has {size} bytes, its header describes {end}: it is "
            f"{'truncated' if size < end else 'damaged'}; download it again"
        )
    return places


def _place(file: Path, name: str, entry: Mapping[str, Any], offset: int, nbytes: int) -> _Place:
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    if dtype is None:
        raise InputError(
            f"{file}: tensor {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}. "
            "Use the model's unquantised checkpoint"
        )
    if offset < 8 or min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != nbytes:
        raise InputError(f"{file}: tensor {name} {list(shape)} does not fit its {nbytes} bytes; download it again")
    return _Place(file, dtype, shape, offset)


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
        self.dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in self._tensors.items()}
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if self.dtypes[name] == "bfloat16":
            # NumPy has no bfloat16 of its own; the bits travel as integers.
            import torch

            return tensor.contiguous().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy().copy()


def _torch_load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} is missing; copy the whole checkpoint")
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
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise InputError(f"{file} does not hold a mapping of names to tensors; {_BIN_REMEDY[3:]}")
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
        if single.is_file():
            return kind([single], str(single))
        if index.is_file():
            return kind(_shards(index), str(folder))
        shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        if shards:
            return kind(shards, str(folder))
    raise InputError(
        f"{folder} holds no weights: expected model.safetensors, its shards with an index, or pytorch_model.bin"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download it again")
    names = {str(name) for name in weight_map.values()}
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{index} names a shard outside its folder: {outside[0]}")
    return [index.parent / name for name in sorted(names)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: it is missing or not JSON.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data
