"""Exact backward elimination of channels: after each one that leaves, the others make up for it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.prune.linalg import centred, inverse_gram, to_solver

_BLOCK = 32
"""Eliminations that are kept as factors before they are multiplied into the matrices."""


def inverse_moment(
    moments: GramMoments, tokens: int, damping: float, affine: bool, noise: float = 0.0
) -> Float[Array, "channels channels"]:
    """Inverse of the damped second moment, about the mean if `affine`; float64.

    Args:
        moments: of all channels.
        tokens: how many tokens the moments sum over.
        damping: relative to the mean of the second moment's diagonal.
        affine: a bias absorbs the mean.
        noise: by which fraction of its own second moment each channel is to be less predictable than the text shows.
    """
    gram = to_solver(moments.gram)
    if affine:
        total = to_solver(moments.total)
        gram = centred(gram, total, total, tokens)
    return inverse_gram(gram + noise * jnp.diag(jnp.diagonal(gram)), damping)


class Eliminated(NamedTuple):
    """Weights after an elimination and which of their rows stay."""

    weights: Float[Array, "channels hidden"]
    stays: Bool[Array, " channels"]


class _Block(NamedTuple):
    """Eliminations since the matrices were last updated: H^-1 - columns columns^T, W - columns rows."""

    columns: Float[Array, "channels block"]
    rows: Float[Array, "block hidden"]
    diagonal: Float[Array, " channels"]
    norms: Float[Array, " channels"]
    stays: Bool[Array, " channels"]


@jax.jit
def eliminate_channels(
    inverse: Float[Array, "channels channels"], weights: Float[Array, "channels hidden"], count: Int[Array, ""]
) -> Eliminated:
    """Removes `count` channels, always the one with the least ||W_j||^2 / (H^-1)_jj, in float64.

    Exactly one by one, but an elimination only touches the diagonal, the row norms and its own column; the
    matrices follow once per block.
    """
    tiny = jnp.finfo(weights.dtype).tiny

    def block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        inverse, weights, stays = state

        def step(k: Array, done: _Block) -> _Block:
            active = k < count - index * _BLOCK
            pivot = jnp.argmin(jnp.where(done.stays, done.norms / done.diagonal, jnp.inf))
            column = inverse[pivot] - done.columns @ done.columns[pivot]
            row = weights[pivot] - done.columns[pivot] @ done.rows
            # A step beyond the count multiplies by zero and so changes nothing.
            scale = jnp.where(active, jax.lax.rsqrt(jnp.maximum(column[pivot], tiny)), 0.0)
            column, row = column * scale, row * scale
            overlap = weights @ row - done.columns @ (done.rows @ row)
            norms = done.norms - 2 * column * overlap + jnp.square(column) * jnp.sum(jnp.square(row))
            return _Block(
                done.columns.at[:, k].set(column),
                done.rows.at[k].set(row),
                jnp.maximum(done.diagonal - jnp.square(column), tiny),
                jnp.maximum(norms, 0.0),
                done.stays & ((jnp.arange(len(weights)) != pivot) | ~active),
            )

        channels, hidden = weights.shape
        start = _Block(
            jnp.zeros((channels, _BLOCK), weights.dtype),
            jnp.zeros((_BLOCK, hidden), weights.dtype),
            jnp.maximum(jnp.diagonal(inverse), tiny),
            jnp.square(weights).sum(1),
            stays,
        )
        done = jax.lax.fori_loop(0, _BLOCK, step, start)
        inverse = inverse - done.columns @ done.columns.T
        return inverse, weights - done.columns @ done.rows, done.stays

    stays = jnp.ones(len(weights), bool)
    blocks = (count + _BLOCK - 1) // _BLOCK
    _, weights, stays = jax.lax.fori_loop(0, blocks, block, (inverse, weights, stays))
    return Eliminated(jnp.where(stays[:, None], weights, 0.0), stays)
