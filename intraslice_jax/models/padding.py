"""A narrow module inside a wider one that computes the same: the channels and heads that it lacks are zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from intraslice_jax.config import LayerShape


def query_places(narrow: LayerShape, wide: LayerShape) -> Int[np.ndarray, " heads"]:
    """Where each query head stands in a layer with larger groups."""
    starts = [wide.query_to_kv.index(kv) for kv in range(narrow.num_key_value_heads)]
    places = []
    for head, kv in enumerate(narrow.query_to_kv):
        places.append(starts[kv] + head - narrow.query_to_kv.index(kv))
    return np.asarray(places)


def pad_attention(arrays: Mapping[str, Any], narrow: LayerShape, wide: LayerShape) -> dict[str, np.ndarray]:
    """An attention's arrays by name (`q_proj` [hidden, heads, qk], ...) in the shapes of a wider layer.

    Args:
        arrays: of the narrow layer.
        narrow: its shape.
        wide: has at least as many KV heads, query heads in each, RoPE pairs and channels.
    """
    half, wide_half = narrow.rotary_dim // 2, wide.rotary_dim // 2
    rotated, rest = np.arange(half), np.arange(narrow.qk_head_dim - narrow.rotary_dim)
    channels = np.concatenate([rotated, wide_half + rotated, wide.rotary_dim + rest])
    values, kv, query = np.arange(narrow.v_head_dim), np.arange(narrow.num_key_value_heads), query_places(narrow, wide)
    places = {
        "q": (query, channels, (wide.num_attention_heads, wide.qk_head_dim)),
        "k": (kv, channels, (wide.num_key_value_heads, wide.qk_head_dim)),
        "v": (kv, values, (wide.num_key_value_heads, wide.v_head_dim)),
        "o": (query, values, (wide.num_attention_heads, wide.v_head_dim)),
        "rope_pairs": (kv, rotated, (wide.num_key_value_heads, wide_half)),
    }
    padded = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        if name == "o_bias":
            padded[name] = array
            continue
        heads, inner, size = places[name if name == "rope_pairs" else name[0]]
        if name in ("q_proj", "k_proj", "v_proj"):
            full = np.zeros((len(array), *size), array.dtype)
            full[:, heads[:, None], inner] = array
        else:
            full = np.zeros((*size, *array.shape[2:]), array.dtype)
            full[heads[:, None], inner] = array
        padded[name] = full
    return padded


def pad_mlp(arrays: Mapping[str, Any], width: int) -> dict[str, np.ndarray]:
    """An MLP's arrays by name (`up_proj` [hidden, inner], ...) with that many inner channels."""
    padded = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        if name == "down_bias":
            padded[name] = array
            continue
        axis = 0 if name == "down_proj" else array.ndim - 1
        padded[name] = np.pad(array, [(0, (width - n) * (i == axis)) for i, n in enumerate(array.shape)])
    return padded
