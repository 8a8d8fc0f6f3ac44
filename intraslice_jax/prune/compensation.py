"""Ridge regression from moments: the best linear (or affine) map of kept activations onto dense ones."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from intraslice_jax.prune.linalg import Number, centred, damped, solve_gram


class Sums(NamedTuple):
    """Sums over tokens, given where the fitted map may have an offset."""

    inputs: Float[Array, " inputs"]
    targets: Float[Array, " targets"]
    tokens: Number


class Compensation(NamedTuple):
    """targets ~ inputs @ weights + offset; `indefinite` as in `linalg.Solution`."""

    weights: Float[Array, "inputs targets"]
    offset: Float[Array, " targets"] | None
    indefinite: Bool[Array, ""]


def ridge(
    gram: Float[Array, "inputs inputs"],
    cross: Float[Array, "inputs targets"],
    damping: Number,
    sums: Sums | None = None,
) -> Compensation:
    """Argmin ||inputs A - targets||^2 + damping mean(diag gram) ||A||^2 (docs/method.md 2.3 and 3.2).

    Args:
        gram: sum of inputs^T inputs over tokens.
        cross: sum of inputs^T targets.
        damping: relative to the mean of the Gram matrix's diagonal.
        sums: given, the map is affine and its offset absorbs the means.
    """
    gram, cross = _about_means(gram, cross, sums)
    weights, indefinite = solve_gram(damped(gram, damping), cross)
    offset = None if sums is None else (sums.targets - sums.inputs @ weights) / sums.tokens
    return Compensation(weights, offset, indefinite)


def _about_means(gram: Array, cross: Array, sums: Sums | None) -> tuple[Array, Array]:
    if sums is None:
        return gram, cross
    n, inputs = sums.tokens, sums.inputs
    return centred(gram, inputs, inputs, n), centred(cross, inputs, sums.targets, n)


def missed_squares(
    fit: Compensation,
    gram: Float[Array, "inputs inputs"],
    cross: Float[Array, "inputs targets"],
    target_squares: Float[Array, ""],
    damping: Number,
    sums: Sums | None = None,
) -> Float[Array, ""]:
    """||inputs A + offset - targets||^2 over the tokens that `ridge` has fitted the map on with the same arguments.

    By the normal equations A^T (G + d) A = A^T cross it takes no product with the Gram matrix G.
    """
    gram, cross = _about_means(gram, cross, sums)
    if sums is not None:
        target_squares = target_squares - jnp.sum(sums.targets**2) / sums.tokens
    ridge_term = damping * jnp.mean(jnp.diagonal(gram)) * fit.weights
    return jnp.maximum(target_squares - jnp.sum(fit.weights * (cross + ridge_term)), 0)


def relative_error(
    fit: Compensation,
    gram: Float[Array, "inputs inputs"],
    cross: Float[Array, "inputs targets"],
    target_gram: Float[Array, "targets targets"],
    output: Float[Array, "targets hidden"],
    sums: Sums | None = None,
) -> Float[Array, ""]:
    """||(inputs A + offset - targets) W||^2 / ||targets W||^2 over tokens, for a projection W.

    The moments need not be those that the map was fitted on.
    """
    mapped = fit.weights @ output
    error = (
        jnp.sum(output * (target_gram @ output))
        - 2 * jnp.sum(mapped * (cross @ output))
        + jnp.sum(mapped * (gram @ mapped))
    )
    if sums is not None and fit.offset is not None:
        offset, drift = fit.offset @ output, (sums.inputs @ fit.weights - sums.targets) @ output
        error += jnp.sum(offset * (2 * drift + sums.tokens * offset))
    return jnp.maximum(error, 0) / jnp.maximum(jnp.sum(output * (target_gram @ output)), 1e-30)
