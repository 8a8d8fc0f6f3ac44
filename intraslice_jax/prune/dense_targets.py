"""The correction that brings a pruned module nearer to the dense model's stream (docs/method.md 6.7)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from intraslice_jax.prune.compensation import Compensation, Sums, ridge
from intraslice_jax.prune.linalg import Number


class Regression(NamedTuple):
    """Sums over tokens of inputs X [tokens, inputs], plain targets T and drifts D [tokens, hidden]; float64."""

    gram: Float[Array, "inputs inputs"]
    """X^T X."""
    cross: Float[Array, "inputs hidden"]
    """X^T T."""
    drift: Float[Array, "inputs hidden"]
    """X^T D."""
    input_sum: Float[Array, " inputs"]
    target_sum: Float[Array, " hidden"]
    drift_sum: Float[Array, " hidden"]
    tokens: Float[Array, ""]
    """Sum of the tokens' weights."""


class Correction(NamedTuple):
    """What is added to the plain map and its offset."""

    weights: Float[Array, "inputs hidden"]
    offset: Float[Array, " hidden"] | None
    strength: Float[Array, ""]


def correction(whole: Regression, held: Regression, damping: Number, most: Number, affine: bool) -> Correction:
    """A (X^T X + damping)^-1 X^T D on all tokens, with the a in [0, most] of the least error on those held out.

    For a, both maps are fitted on the other tokens alone.

    Args:
        whole: of all tokens.
        held: of those held out.
        damping: relative ridge damping, as of the plain map.
        most: the largest a.
        affine: whether the maps have offsets.
    """
    train = jax.tree.map(jnp.subtract, whole, held)
    plain = _fit(train, train.cross, train.target_sum, damping, affine)
    extra = _fit(train, train.drift, train.drift_sum, damping, affine)
    strength = jnp.clip(_best_strength(held, plain, extra), 0.0, most)
    final = _fit(whole, whole.drift, whole.drift_sum, damping, affine)
    offset = None if final.offset is None else strength * final.offset
    return Correction(strength * final.weights, offset, strength)


def strength_note(strength: Array | None) -> dict[str, float]:
    """For a module's record."""
    return {} if strength is None else {"dense_targets": float(strength)}


def _fit(moments: Regression, cross: Array, target_sum: Array, damping: Number, affine: bool) -> Compensation:
    sums = Sums(moments.input_sum, target_sum, moments.tokens) if affine else None
    return ridge(moments.gram, cross, damping, sums)


def _best_strength(on: Regression, plain: Compensation, extra: Compensation) -> Float[Array, ""]:
    """The a of the least ||T + D - X W - o - a (X W' + o')||^2, a quadratic in a; 0 where a makes no difference."""
    gram_extra = on.gram @ extra.weights
    left = on.cross + on.drift - on.gram @ plain.weights
    slope, curvature = jnp.sum(extra.weights * left), jnp.sum(extra.weights * gram_extra)
    if plain.offset is not None and extra.offset is not None:
        slope -= jnp.dot(on.input_sum @ extra.weights, plain.offset)
        drifts = on.target_sum + on.drift_sum - on.input_sum @ plain.weights - on.tokens * plain.offset
        slope += jnp.dot(extra.offset, drifts)
        curvature += jnp.dot(extra.offset, 2 * (on.input_sum @ extra.weights) + on.tokens * extra.offset)
    return jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1.0), 0.0)
