"""Whole MLP channels: the module without the others, and how wrong it is on the calibration text."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.prune.calibration import MLPCalibration
from intraslice_jax.prune.linalg import solver_precision, to_solver
from intraslice_jax.prune.method import PrunedMLP


def best_channels(scores: Float[np.ndarray, " inner"], keep: int) -> Bool[np.ndarray, " inner"]:
    """Which channels have the `keep` highest scores; of equal ones the first."""
    stays = np.zeros(len(scores), bool)
    stays[np.argsort(-scores, kind="stable")[:keep]] = True
    return stays


def keep_channels(
    layer: MLPCalibration,
    stays: Bool[np.ndarray, " inner"],
    *,
    down_proj: Float[Array, "inner hidden"] | None = None,
    fill_bias: bool = False,
    notes: dict[str, Any] | None = None,
) -> PrunedMLP:
    """The MLP with some channels, and its error on the calibration text.

    Args:
        layer: the MLP before.
        stays: which channels do.
        down_proj: new down-projection, float64; only the kept rows are read. None leaves it as it is.
        fill_bias: the down-projection's bias, where there is one, takes up the mean of what is lost.
        notes: for the record.
    """
    arrays, kept = layer.arrays, np.flatnonzero(stays)
    columns = ("gate_proj", "up_proj", "gate_bias", "up_bias")
    new = {name: arrays[name][..., kept] for name in columns if name in arrays}
    with solver_precision():
        before = to_solver(arrays["down_proj"])
        after = jnp.where(stays[:, None], before if down_proj is None else down_proj, 0.0)
        new["down_proj"] = after[kept]
        shift = None
        if fill_bias and "down_bias" in arrays:
            shift = mean_shift(layer.moments, layer.tokens, before - after)
            new["down_bias"] = to_solver(arrays["down_bias"]) + shift
        error = module_error(layer.moments, layer.tokens, before, before - after, shift)
    return PrunedMLP(new, error, kept, notes or {})


def mean_shift(moments: GramMoments, tokens: int, lost: Float[Array, "channels hidden"]) -> Float[Array, " hidden"]:
    """Mean output of the projection `lost`, in float64; call it inside `solver_precision`."""
    return to_solver(moments.total) / tokens @ lost


def module_error(
    moments: GramMoments,
    tokens: int,
    before: Float[Array, "channels hidden"],
    lost: Float[Array, "channels hidden"],
    shift: Float[Array, " hidden"] | None,
) -> float:
    """||z lost - shift||^2 / ||z before||^2 summed over tokens; call it inside `solver_precision`."""
    gram = to_solver(moments.gram)
    error = jnp.sum(lost * (gram @ lost))
    if shift is not None:
        # `shift` is the mean of z lost: what remains is the variance.
        error -= tokens * jnp.sum(jnp.square(shift))
    return float(jnp.maximum(error, 0) / jnp.maximum(jnp.sum(before * (gram @ before)), 1e-30))
