"""Rotary position embedding: frequencies of every scaling type, tables and the rotation.

The scaling types are those of Hugging Face configurations (`rope_type`): `default`, `linear`, `dynamic`, `yarn`,
`llama3`, `longrope`. Tables hold the frequencies of the *original* head; a pruned layer picks its kept pairs
from them by index, so a pruned model follows every scaling type without further code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.config import RopeConfig
from intraslice_jax.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class RopeTable(NamedTuple):
    """Cosines and sines of every position and frequency of the original head, scaled by the attention factor."""

    cos: Float[Array, "rows seq pairs"]
    sin: Float[Array, "rows seq pairs"]


def rope_table(
    rope: RopeConfig,
    rotary_dim: int,
    max_position_embeddings: int,
    positions: Int[Array, "rows seq"],
    seq_len: int | Int[Array, ""],
) -> RopeTable:
    """Tables for the given positions.

    Args:
        rope: base and scaling.
        rotary_dim: rotated channels of an original head.
        max_position_embeddings: the model's context, from which `dynamic` scaling starts.
        positions: int32 positions; one row serves a whole batch.
        seq_len: length of the whole context, on which `dynamic` and `longrope` depend.
    """
    inv_freq, factor = inverse_frequencies(rope, rotary_dim, max_position_embeddings, seq_len)
    angles = positions.astype(jnp.float32)[..., None] * inv_freq[None, None]
    return RopeTable(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def inverse_frequencies(
    rope: RopeConfig, rotary_dim: int, max_position_embeddings: int, seq_len: int | Int[Array, ""]
) -> tuple[Float[Array, " pairs"], float]:
    """Inverse frequencies [rotary_dim / 2] in float32 and the factor on cosines and sines.

    Raises:
        InputError: unknown rope type, or parameters that contradict the width.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(max(rotary_dim, 1))
    # The power in float64: numpy's float32 one is off by a unit in the last place, which long contexts amplify.
    plain = np.float32(1.0) / (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    match rope.rope_type:
        case "default":
            return jnp.asarray(plain), 1.0
        case "linear":
            return jnp.asarray(plain / np.float32(rope.get("factor", 1.0))), 1.0
        case "dynamic":
            return _dynamic(rope, rotary_dim, exponents, max_position_embeddings, seq_len), 1.0
        case "llama3":
            return jnp.asarray(_llama3(rope, plain)), 1.0
        case "yarn":
            return _yarn(rope, rotary_dim, plain, max_position_embeddings)
        case "longrope":
            return _longrope(rope, plain, max_position_embeddings, seq_len)
    raise InputError(f"rope_type {rope.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")


def _dynamic(rope: RopeConfig, rotary_dim: int, exponents: np.ndarray, limit: int, seq_len) -> Array:
    """NTK-aware scaling: the base grows with the context once it passes the trained one."""
    factor = rope.get("factor", 1.0)
    length = jnp.maximum(jnp.asarray(seq_len, jnp.float32), float(limit))
    growth = (factor * length / limit) - (factor - 1.0)
    base = rope.theta * growth ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / base ** jnp.asarray(exponents)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: low frequencies divided by the factor, high ones kept, a ramp between."""
    factor, low, high = rope.get("factor"), rope.get("low_freq_factor"), rope.get("high_freq_factor")
    original = rope.get("original_max_position_embeddings")
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    ramp = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelength > original / low, plain / factor, ramp)
    return np.where(wavelength < original / high, plain, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, rotary_dim: int, plain: np.ndarray, limit: int) -> tuple[Array, float]:
    """YaRN (arXiv 2309.00071)."""
    original = rope.get("original_max_position_embeddings") or limit
    factor = rope.get("factor") or limit / original
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = (
            _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
            if mscale and mscale_all
            else _yarn_mscale(factor, 1.0)
        )
    low, high = (
        rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        for rotations in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    inv_freq = plain / factor * ramp + plain * (1 - ramp)
    return jnp.asarray(inv_freq.astype(np.float32)), float(attention_factor)


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _longrope(rope: RopeConfig, plain: np.ndarray, limit: int, seq_len) -> tuple[Array, float]:
    """LongRoPE (Phi-3): one factor per frequency, other ones beyond the original context."""
    original = _original_context(rope, limit)
    tables = []
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if factors is None or len(factors) != len(plain):
            found = "none" if factors is None else len(factors)
            raise InputError(f"rope {name} must hold {len(plain)} numbers, found {found}")
        tables.append(plain / np.asarray(factors, np.float32))
    factor = rope.get("factor") or limit / original
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return jnp.where(jnp.asarray(seq_len) > original, tables[1], tables[0]), float(attention_factor)


def longrope_limit(rope: RopeConfig, max_position_embeddings: int) -> int | None:
    """The longest context that `longrope` rotates with its short factors, None for other types."""
    return _original_context(rope, max_position_embeddings) if rope.rope_type == "longrope" else None


def _original_context(rope: RopeConfig, limit: int) -> int:
    return rope.get("original_max_position_embeddings") or limit


def rotate(
    x: Float[Array, "batch seq heads width"],
    cos: Float[Array, "rows seq heads pairs"],
    sin: Float[Array, "rows seq heads pairs"],
) -> Float[Array, "batch seq heads width"]:
    """Rotates channel pairs (p, p + pairs) of the first 2 x pairs channels, in float32; the rest pass through."""
    pairs = cos.shape[-1]
    first, second = (x[..., i * pairs : (i + 1) * pairs].astype(jnp.float32) for i in (0, 1))
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [x[..., 2 * pairs :]], -1)
