"""Whether learned mixtures replace plain selection in an MLP: a held-out part of the calibration text decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.calibrate.statistics import MapMoments, add_mlp_map, empty_map_moments
from intraslice_jax.prune.calibration import MLPCalibration
from intraslice_jax.prune.iterative import IterativeSettings, learn_mixtures
from intraslice_jax.prune.linalg import solver_precision, to_solver
from intraslice_jax.prune.method import PrunedMLP
from intraslice_jax.prune.mlp import fit_inner, fuse_inner, inner_error, rank_channels


def better_mlp(layer: MLPCalibration, plain: PrunedMLP, keep: int, settings: IterativeSettings) -> PrunedMLP:
    """The MLP with learned mixtures if its output is nearer to the dense one's on held-out windows, else `plain`.

    Both candidates' maps are fitted on the other windows for the comparison; an accepted one is then fitted on
    all. The notes tell both errors and the learning curves.
    """
    windows = jnp.concatenate(list(layer.inputs()))
    held_out = held_out_count(len(windows))
    if len(windows) <= held_out:
        return _with_note(plain, {"accepted": False, "reason": "one window cannot be split"})
    train, held = windows[:-held_out], windows[-held_out:]
    arrays, act, damping = layer.arrays, layer.block.mlp.hidden_act, layer.config.damping
    with solver_precision():
        order = rank_channels(to_solver(layer.moments.gram), to_solver(arrays["down_proj"]))
    learned = learn_mixtures(arrays, act, order, keep, train, settings, damping)
    inner = {name: array for name, array in arrays.items() if not name.startswith("down")}
    candidates = {
        "selection": {name: array[..., np.sort(order[:keep])] for name, array in inner.items()},
        "mixtures": {name: array.astype(inner[name].dtype) for name, array in learned.arrays.items()},
    }
    errors, moments = {}, {}
    for name, candidate in candidates.items():
        on_train, on_held = (_map_moments(act, candidate, inner, part) for part in (train, held))
        with solver_precision():
            fit = fit_inner(arrays, on_train, train.shape[0] * train.shape[1], damping)
            errors[name] = inner_error(arrays, fit, on_held, held.shape[0] * held.shape[1])
        moments[name] = jax.tree.map(jnp.add, on_train, on_held)
    accepted = errors["mixtures"] < errors["selection"]
    note = {"accepted": accepted, "held_out_errors": errors, "losses": learned.losses}
    if not accepted:
        return _with_note(plain, note)
    with solver_precision():
        fused = fuse_inner(arrays, candidates["mixtures"], moments["mixtures"], layer.tokens, damping)
    return _with_note(fused, note)


def _map_moments(
    act: str,
    small: Mapping[str, Array],
    dense: Mapping[str, Array],
    windows: Float[Array, "windows seq hidden"],
) -> MapMoments:
    moments = empty_map_moments(small["up_proj"].shape[-1], dense["up_proj"].shape[-1])
    for x in windows:
        moments = add_mlp_map(moments, act, dict(small), dict(dense), x[None])
    return moments


def _with_note(mlp: PrunedMLP, note: dict) -> PrunedMLP:
    return dataclasses.replace(mlp, notes={**mlp.notes, "iterative": note})
