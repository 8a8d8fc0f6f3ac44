"""What the value PCA saw, for reports: docs/method.md 2.3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

DIGITS = 4
"""Significant digits that are recorded: a picture needs no more, and a deep model has a hundred thousand values."""


def value_spectra(kept_gram: Float[Array | np.ndarray, "inputs inputs"], query_to_kv: Sequence[int]) -> dict[str, Any]:
    """The eigenvalues of each KV head's share of the o-projection's input, as fractions of their sum.

    Args:
        kept_gram: second moment of the kept heads' y', heads side by side, [kept heads * v, kept heads * v].
        query_to_kv: the KV head of each kept query head.

    Returns:
        `kv_heads`, and for each of them a descending list of v numbers in `shares`, JSON-serialisable. The first
        `v_head_dim` components of a layer's record are those that stayed.
    """
    heads = len(query_to_kv)
    v = len(kept_gram) // heads
    rows, to_kv = np.arange(heads), np.asarray(query_to_kv)
    blocks = np.asarray(kept_gram, np.float64).reshape(heads, v, heads, v)[rows, :, rows]
    kv_heads = sorted(set(query_to_kv))
    shares = []
    for kv in kv_heads:
        values = np.maximum(np.linalg.eigvalsh(blocks[to_kv == kv].sum(0))[::-1], 0.0)
        total = max(float(values.sum()), np.finfo(np.float64).tiny)
        shares.append([float(f"{value / total:.{DIGITS}g}") for value in values])
    return {"kv_heads": list(kv_heads), "shares": shares}
