"""MLP: which channels stay and what makes up for the others (docs/method.md 3.1, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.prune.compensation import Sums, relative_error, ridge
from intraslice_jax.prune.linalg import to_solver
from intraslice_jax.prune.method import PrunedMLP


def select_channels(
    gram: Float[Array, "inner inner"], down_proj: Float[Array, "inner hidden"], keep: int
) -> Int[np.ndarray, " keep"]:
    """The channels with the largest ||W_d[j]||^2 H_jj, ascending (docs/method.md 3.1)."""
    scores = np.asarray(jnp.diagonal(gram) * jnp.square(down_proj).sum(-1))
    return np.sort(np.argsort(-scores, kind="stable")[:keep])


def fuse_mlp(arrays: Mapping[str, Array], moments: GramMoments, tokens: int, keep: int, damping: float) -> PrunedMLP:
    """Keeps the best channels and folds the rest, regressed on them, into the down-projection.

    Args:
        arrays: the module's weights by name (`up_proj` [hidden, inner], ...).
        moments: of the down-projection's input.
        tokens: how many tokens the moments sum over.
        keep: number of channels that stay.
        damping: relative ridge damping.
    """
    gram, total, down = to_solver(moments.gram), to_solver(moments.total), to_solver(arrays["down_proj"])
    kept = jnp.asarray(select_channels(gram, down, keep))
    sums = Sums(total[kept], total, tokens) if "down_bias" in arrays else None
    inputs, cross = gram[kept[:, None], kept], gram[kept]
    fit = ridge(inputs, cross, damping, sums)
    # The kept channels are known exactly; only the dropped ones are predicted.
    exact = fit.weights.at[:, kept].set(jnp.eye(keep, dtype=gram.dtype))
    offset = None if fit.offset is None else fit.offset.at[kept].set(0.0)
    fit = fit._replace(weights=exact, offset=offset)
    new = {name: arrays[name][..., kept] for name in ("gate_proj", "up_proj", "gate_bias", "up_bias") if name in arrays}
    new["down_proj"] = fit.weights @ down
    if offset is not None:
        new["down_bias"] = to_solver(arrays["down_bias"]) + offset @ down
    error = relative_error(fit, inputs, cross, gram, down, sums)
    return PrunedMLP(new, error, {"solver": fit.method})
