"""Checkpoint tensors as our arrays, one after the other, every one of them accounted for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.families import Family, default_rope_pairs
from intraslice_jax.convert.mapping import Tensor
from intraslice_jax.convert.sources import TensorSource, not_read
from intraslice_jax.errors import InputError

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Tables that older checkpoints store although they follow from the configuration; transformers ignores them, too.
_NOT_WEIGHTS = re.compile(
    r"(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|(^|\.)(position_ids|causal_mask)"
    r"|\.(attention|attn|self_attn)\.(masked_bias|bias))$"
)
_LAYER, _BIAS = re.compile(r"\.\d+\."), re.compile(r"\.(self_attn|mlp)\.\w+\.bias$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_UNTIE = "if the model is not tied, set tie_word_embeddings to false in config.json"
_WHOLE = ("int32", "int64")
_CHUNK = 1 << 24  # elements that the search for NaN looks at in one go


class CheckpointArrays(Mapping[str, np.ndarray]):
    """Our arrays by dotted path, each read from the checkpoint and checked when it is asked for.

    Args:
        family: how the checkpoint names its tensors.
        config: the model.
        source: the tensors.
        dtype: one of DTYPES, or None for the one in which most of the checkpoint's numbers are stored.

    Raises:
        InputError: a tensor is missing, left over or misshapen; on access: it holds NaN or infinity.
    """

    def __init__(self, family: Family, config: ModelConfig, source: TensorSource, dtype: str | None):
        _check_layers(config, source)
        tensors = family.tensors(config)
        self._names = _match(tensors, config, source)
        self._source = source
        self.dtype = DTYPES[dtype or stored_dtype(source)]
        self._tensors = {path: tensor for tensor in tensors for path in tensor.shapes}
        self._pairs = {p: pairs for p, pairs in default_rope_pairs(config).items() if p not in self._tensors}
        self._fused: tuple[str, np.ndarray] | None = None
        if config.tie_word_embeddings and _HEAD in source.dtypes and _EMBEDDING in source.dtypes:
            _check_tied(source)

    def __getitem__(self, path: str) -> np.ndarray:
        if path in self._pairs:
            return self._pairs[path]
        tensor = self._tensors[path]
        name = self._names.get(tensor.name)
        if name is None:
            return np.zeros(tensor.shapes[path], self.dtype)
        return _cast(tensor.unpack(self._read(tensor, name))[path], self.dtype, name, self._source.where)

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[path][index]`, for which only that part is read."""
        if path in self._pairs:
            return self._pairs[path][index]
        tensor = self._tensors[path]
        name = self._names.get(tensor.name)
        if name is None:
            return self[path][index]
        part = np.ascontiguousarray(tensor.unpack(self._source.view(name))[path][index])
        _check_finite(part, name, self._source.where)
        return _cast(part, self.dtype, name, self._source.where)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._tensors, *self._pairs])

    def __len__(self) -> int:
        return len(self._tensors) + len(self._pairs)

    def _read(self, tensor: Tensor, name: str) -> np.ndarray:
        """The stored tensor; a fused one is kept until another is read, as its other parts mostly come next."""
        if self._fused is not None and self._fused[0] == name:
            return self._fused[1]
        self._fused = None
        stored = self._source.read(name)
        _check_finite(stored, name, self._source.where)
        if len(tensor.shapes) > 1:
            self._fused = (name, stored)
        return stored


def stored_dtype(source: TensorSource) -> str:
    """The floating dtype in which most of a checkpoint's numbers are stored; float64 counts as float32."""
    counts = dict.fromkeys(DTYPES, 0)
    for name, dtype in source.dtypes.items():
        dtype = "float32" if dtype == "float64" else dtype
        if dtype in counts:
            counts[dtype] += math.prod(source.shapes[name])
    return max(counts, key=counts.__getitem__)


def _check_layers(config: ModelConfig, source: TensorSource) -> None:
    """Raises InputError before more layers than there are get described: that takes a while for each."""
    stored = {found[1] for name in source.dtypes if (found := re.search(r"\.layers\.(\d+)\.", name))}
    if config.num_layers > len(stored):
        raise InputError(
            f"{source.where} holds {len(stored)} layers, the configuration says {config.num_layers}; "
            "the checkpoint is incomplete, or num_hidden_layers is wrong"
        )


def _match(tensors: Sequence[Tensor], config: ModelConfig, source: TensorSource) -> dict[str, str]:
    """The name in the checkpoint of every tensor, once none is missing, left over or misshapen.

    Biases that a checkpoint may leave out have no name.
    """
    there = {name for name in source.dtypes if not _NOT_WEIGHTS.search(name)}
    names = {tensor.name: tensor.name for tensor in tensors}
    if config.tie_word_embeddings:
        if _EMBEDDING not in there and _HEAD in there:
            names[_EMBEDDING] = _HEAD
        else:
            there.discard(_HEAD)
    for name in sorted(there.intersection(names.values())):
        if source.dtypes[name] not in (*DTYPES, "float64", *_WHOLE):
            raise not_read(source.where, name, source.dtypes[name])
    missing, left = set(names.values()) - there, there - set(names.values())
    absent = _absent_biases(missing, there, source.layers_lack_biases)
    names = {name: stored for name, stored in names.items() if stored not in absent}
    missing -= absent
    if missing or left:
        hint = ""
        if missing == {_HEAD}:
            hint = "; if the head is the embedding, config.json needs tie_word_embeddings true"
        raise InputError(
            f"{source.where} does not fit its configuration: missing {_some(missing)}; left over {_some(left)}{hint}"
        )
    for tensor in (tensor for tensor in tensors if tensor.name in names):
        name = names[tensor.name]
        found = source.shapes[name]
        if found != tensor.shape:
            raise InputError(
                f"{source.where}: tensor {tensor.name} has shape {list(found)}, "
                f"the configuration implies {list(tensor.shape)}"
            )
        if any(path.endswith("rope_pairs") for path in tensor.shapes) != (source.dtypes[name] in _WHOLE):
            raise InputError(f"{source.where}: tensor {name} must not be {source.dtypes[name]}; the file is damaged")
    return names


def _absent_biases(missing: set[str], there: set[str], by_layer: bool) -> set[str]:
    """Of the missing tensors the biases that count as zero, as for transformers and llama.cpp.

    Others of the same module have biases then; where no layer may be an exception, no layer has this one.
    """
    modules = {found[1] for name in there if (found := _BIAS.search(name))}
    projections = set() if by_layer else {_LAYER.sub(".", name) for name in there}
    return {
        name
        for name in missing
        if (found := _BIAS.search(name)) and found[1] in modules and _LAYER.sub(".", name) not in projections
    }


def _check_tied(source: TensorSource) -> None:
    """A tied checkpoint may store the head a second time, but not another one."""
    if source.shapes[_HEAD] != source.shapes[_EMBEDDING]:
        raise InputError(f"{source.where}: {_HEAD} and {_EMBEDDING} have different shapes; {_UNTIE}")
    # By digest, so that only one of the two is in memory.
    head, embedding = (hashlib.sha256(source.read(name).view(np.uint8).data).digest() for name in (_HEAD, _EMBEDDING))
    if head != embedding:
        raise InputError(
            f"{source.where}: {_HEAD} differs from {_EMBEDDING} although tie_word_embeddings is true; {_UNTIE}"
        )


def _cast(array: np.ndarray, target: np.dtype, name: str, where: str) -> np.ndarray:
    if array.dtype.kind == "i":
        return array.astype(np.int32)
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    if target.itemsize < array.dtype.itemsize or target == np.float16:
        try:
            _check_finite(cast, name, where)
        except InputError as error:
            raise InputError(
                f"{where}: tensor {name} does not fit into {target.name}; use bfloat16 or float32"
            ) from error
    return cast


def _check_finite(array: np.ndarray, name: str, where: str) -> None:
    if array.dtype.kind == "i":
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        good = np.isfinite(flat[start : start + _CHUNK])
        if not good.all():
            first = start + int(np.argmin(good))
            index = [int(i) for i in np.unravel_index(first, array.shape)]
            raise InputError(
                f"{where}: tensor {name} holds {float(flat[first])} at index {index}; the checkpoint is damaged"
            )


def _some(names: set[str], most: int = 4) -> str:
    listed = sorted(name if name.isprintable() else repr(name) for name in names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "nothing") + more
