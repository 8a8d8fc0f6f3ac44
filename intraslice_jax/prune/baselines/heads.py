"""Whole query heads: which stay, and the attention without the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.config import LayerShape
from intraslice_jax.errors import InputError
from intraslice_jax.prune.baselines.channels import mean_shift, module_error
from intraslice_jax.prune.calibration import AttentionCalibration
from intraslice_jax.prune.linalg import solver_precision, to_solver
from intraslice_jax.prune.method import PrunedAttention


def removed_share(shape: LayerShape, kept: Collection[int]) -> float:
    """Fraction of an attention's weights that leaves when only some query heads stay.

    A query head takes its q- and o-projection with it, a KV head its k- and v-projection, which leave with the
    last query head that reads them; both weigh hidden x (qk + v).
    """
    left = len(kept) + len({shape.query_to_kv[h] for h in kept})
    return 1 - left / (shape.num_attention_heads + shape.num_key_value_heads)


def nearer(shape: LayerShape, fewer: Collection[int], more: Collection[int], ratio: float) -> bool:
    """Whether keeping `fewer` heads removes a share of the weights nearer to `ratio` than keeping `more`."""
    return abs(removed_share(shape, fewer) - ratio) < abs(removed_share(shape, more) - ratio)


def best_heads(shape: LayerShape, scores: Float[np.ndarray, " heads"], ratio: float) -> tuple[int, ...]:
    """Drops the head with the lowest score while that brings the removed share nearer to `ratio`; one stays."""
    kept = list(range(shape.num_attention_heads))
    while len(kept) > 1:
        fewer = [h for h in kept if h != min(kept, key=lambda h: scores[h])]
        if not nearer(shape, fewer, kept, ratio):
            break
        kept = fewer
    return tuple(kept)


def without_heads(
    arrays: dict[str, Array], shape: LayerShape, heads: Sequence[int]
) -> tuple[dict[str, Array], LayerShape]:
    """An attention with some query heads (ascending) and the KV heads they read, all weights as they are."""
    kv_heads = sorted({shape.query_to_kv[h] for h in heads})
    query, kv = jnp.asarray(heads), jnp.asarray(kv_heads)
    axes = {"q_proj": (1, query), "k_proj": (1, kv), "v_proj": (1, kv), "o_proj": (0, query)}
    axes |= {"q_bias": (0, query), "k_bias": (0, kv), "v_bias": (0, kv), "rope_pairs": (0, kv)}
    new = {name: jnp.take(arrays[name], index, axis) for name, (axis, index) in axes.items() if name in arrays}
    local = tuple(kv_heads.index(shape.query_to_kv[h]) for h in heads)
    return new, dataclasses.replace(shape, query_to_kv=local)


def keep_heads(
    layer: AttentionCalibration,
    moments: GramMoments,
    heads: tuple[int, ...],
    *,
    o_proj: Float[Array, "heads v hidden"] | None = None,
    fill_bias: bool = False,
    notes: dict[str, Any] | None = None,
) -> PrunedAttention:
    """The attention with some heads, and its error on the calibration text.

    Args:
        layer: the attention before.
        moments: of the o-projection's input.
        heads: which stay, ascending.
        o_proj: new o-projection, float64; only the kept heads are read. None leaves the weights as they are.
        fill_bias: the o-projection's bias, where there is one, takes up the mean of what is lost.
        notes: for the record.

    Raises:
        InputError: KV heads are to keep equally many query heads, which nothing here sees to.
    """
    if layer.config.grouping == "uniform" and max(layer.shape.group_sizes) > 1:
        raise InputError(
            f"method {layer.config.method} drops query heads one by one, which grouping uniform forbids; "
            "use grouping ragged or method intraslice"
        )
    arrays, shape = without_heads(layer.arrays, layer.shape, heads)
    with solver_precision():
        before = to_solver(layer.arrays["o_proj"])
        stays = np.isin(np.arange(len(before)), heads)
        after = jnp.where(stays[:, None, None], before if o_proj is None else o_proj, 0.0)
        arrays["o_proj"] = after[jnp.asarray(heads)]
        lost = (before - after).reshape(-1, before.shape[-1])
        shift = None
        if fill_bias and "o_bias" in layer.arrays:
            shift = mean_shift(moments, layer.tokens, lost)
            arrays["o_bias"] = to_solver(layer.arrays["o_bias"]) + shift
        error = module_error(moments, layer.tokens, before.reshape(lost.shape), lost, shift)
    return PrunedAttention(arrays, shape, heads, error, notes or {})
