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
    plain, extra = _fits(train, damping, affine)
    strength = jnp.clip(_best_strength(held, plain, extra), 0.0, most)
    sums = Sums(whole.input_sum, whole.drift_sum, whole.tokens) if affine else None
    final = ridge(whole.gram, whole.drift, damping, sums)
    offset = None if final.offset is None else strength * final.offset
    return Correction(strength * final.weights, offset, strength)


def strength_note(strength: Array | None) -> dict[str, float]:
    """For a module's record."""
    return {} if strength is None else {"dense_targets": float(strength)}


def _fits(moments: Regression, damping: Number, affine: bool) -> tuple[Compensation, Compensation]:
    """The maps onto plain targets and onto drifts, of one solve."""
    sums = None
    if affine:
        sums = Sums(moments.input_sum, jnp.concatenate([moments.target_sum, moments.drift_sum]), moments.tokens)
    both = ridge(moments.gram, jnp.concatenate([moments.cross, moments.drift], 1), damping, sums)
    weights = jnp.split(both.weights, 2, 1)
    offsets = (None, None) if both.offset is None else jnp.split(both.offset, 2)
    plain, extra = (Compensation(w, o, both.indefinite) for w, o in zip(weights, offsets, strict=True))
    return plain, extra


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
