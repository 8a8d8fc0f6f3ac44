"""Any choice of RoPE frequencies as factors on the frequencies of an ordinary head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intraslice_jax.config import ModelConfig, RopeConfig
from intraslice_jax.models.rope import inverse_frequencies

STILL = 1e30
"""Divides a frequency so far that no position of any text turns by a measurable angle."""


def chosen_frequencies(config: ModelConfig, pairs: Sequence[int], slots: int) -> RopeConfig:
    """`longrope` parameters of a head with `slots` pairs: first the given ones of the original head, then still ones.

    The factor on cosines and sines is left out: it belongs into the weights (`attention_factor`).

    Args:
        config: the model, whose rope type has the same frequencies at all lengths or is `longrope`, or `dynamic`
            within the trained context.
        pairs: of the original head.
        slots: pairs of the new head.
    """
    limit = config.max_position_embeddings
    original = config.rope.get("original_max_position_embeddings", limit) if _two_tables(config) else limit
    plain = config.rope.theta ** (-np.arange(slots) / slots)
    factors = {}
    for name, length in (("short_factor", 1), ("long_factor", original + 1 if _two_tables(config) else 1)):
        table = np.asarray(inverse_frequencies(config.rope, config.rotary_dim, limit, length)[0], np.float64)
        divisors = np.full(slots, STILL)
        divisors[: len(pairs)] = plain[: len(pairs)] / table[list(pairs)]
        factors[name] = tuple(float(x) for x in divisors)
    parameters: Mapping[str, Any] = {
        **factors,
        "attention_factor": 1.0,
        "factor": max(1.0, limit / original),
        "original_max_position_embeddings": original,
    }
    return RopeConfig(config.rope.theta, "longrope", tuple(sorted(parameters.items())))


def attention_factor(config: ModelConfig) -> float:
    """What cosines and sines of the original model are multiplied with."""
    return inverse_frequencies(config.rope, config.rotary_dim, config.max_position_embeddings, 1)[1]


def query_scales(config: ModelConfig, width: int) -> tuple[float, float]:
    """Factors on rotated and other query channels that make a head of `width` channels score as the original one.

    The reader multiplies scores with width ** -0.5 and knows no factor on cosines and sines.
    """
    scale = math.sqrt(width / config.head_dim)
    return scale * attention_factor(config) ** 2, scale


def fraction(part: int, whole: int) -> float:
    """The quotient part / whole such that int(whole x fraction) is the part again."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, math.inf)


def _two_tables(config: ModelConfig) -> bool:
    return config.rope.rope_type == "longrope"
