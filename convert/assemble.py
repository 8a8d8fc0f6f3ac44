"""Checkpoint tensors into a decoder, one after the other, every one of them accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.families import Family, default_rope_pairs
from intraslice_jax.convert.mapping import Tensor
from intraslice_jax.convert.sources import TensorSource
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import Decoder, decoder_from_arrays

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Tables that older checkpoints store although they follow from the configuration.
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK = 1 << 24  # elements that the search for NaN looks at in one go


def read_decoder(family: Family, config: ModelConfig, source: TensorSource, dtype: str | None) -> Decoder:
    """A decoder with the checkpoint's weights.

    Args:
        family: how the checkpoint names its tensors.
        config: the model.
        source: the tensors.
        dtype: one of DTYPES, or None for the one in which most of the checkpoint's numbers are stored.

    Raises:
        InputError: a tensor is missing, left over, misshapen or holds NaN or infinity.
    """
    tensors = family.tensors(config)
    names = _match(tensors, config, source)
    target = DTYPES[dtype or stored_dtype(source)]
    arrays: dict[str, jax.Array] = {}
    for tensor in tensors:
        name = names[tensor.name]
        stored = source.read(name)
        _check_finite(stored, name, source.where)
        for path, array in tensor.unpack(stored).items():
            arrays[path] = _place(array, target, name, source.where)
        del stored
    if config.tie_word_embeddings and _HEAD in source.dtypes and _EMBEDDING in source.dtypes:
        _check_tied(source)
    for path, pairs in default_rope_pairs(config).items():
        arrays.setdefault(path, jnp.asarray(pairs))
    return decoder_from_arrays(config, arrays)


def stored_dtype(source: TensorSource) -> str:
    """The floating dtype in which most of a checkpoint's numbers are stored; float64 counts as float32."""
    counts = dict.fromkeys(DTYPES, 0)
    for name, dtype in source.dtypes.items():
        dtype = "float32" if dtype == "float64" else dtype
        if dtype in counts:
            counts[dtype] += math.prod(source.shapes[name])
    return max(counts, key=counts.__getitem__)


def _match(tensors: Sequence[Tensor], config: ModelConfig, source: TensorSource) -> dict[str, str]:
    """The name in the checkpoint of every tensor, once none is missing, left over or misshapen."""
    there = {name for name in source.dtypes if not _NOT_WEIGHTS.search(name)}
    names = {tensor.name: tensor.name for tensor in tensors}
    if config.tie_word_embeddings:
        if _EMBEDDING not in there and _HEAD in there:
            names[_EMBEDDING] = _HEAD
        else:
            there.discard(_HEAD)
    missing, left = set(names.values()) - there, there - set(names.values())
    if missing or left:
        hint = ""
        if missing == {_HEAD}:
            hint = "; if the head is the embedding, config.json needs tie_word_embeddings true"
        raise InputError(
            f"{source.where} does not fit its configuration: missing {_some(missing)}; left over {_some(left)}{hint}"
        )
    for tensor in tensors:
        found = source.shapes[names[tensor.name]]
        if found != tensor.shape:
            raise InputError(
                f"{source.where}: tensor {tensor.name} has shape {list(found)}, "
                f"the configuration implies {list(tensor.shape)}"
            )
    return names


def _check_tied(source: TensorSource) -> None:
    """A tied checkpoint may store the head a second time, but not another one."""
    if not np.array_equal(source.read(_HEAD), source.read(_EMBEDDING)):
        raise InputError(
            f"{source.where}: {_HEAD} differs from {_EMBEDDING} although tie_word_embeddings is true; "
            "set it to false in config.json"
        )


def _place(array: np.ndarray, target: np.dtype, name: str, where: str) -> jax.Array:
    if array.dtype.kind == "i":
        return jnp.asarray(array.astype(np.int32))
    if array.dtype == target:
        return jnp.asarray(array)
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    if target.itemsize < array.dtype.itemsize or target == np.float16:
        try:
            _check_finite(cast, name, where)
        except InputError as error:
            raise InputError(
                f"{where}: tensor {name} does not fit into {target.name}; use bfloat16 or float32"
            ) from error
    return jnp.asarray(cast)


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
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "nothing") + more
