"""MLP: which channels stay and what makes up for the others (docs/method.md 3.1, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.calibrate.statistics import DriftMoments, GramMoments, MapMoments
from intraslice_jax.programs import by_shape
from intraslice_jax.prune.compensation import Compensation, Sums, missed_squares, relative_error, ridge
from intraslice_jax.prune.dense_targets import Regression, correction, strength_note
from intraslice_jax.prune.drift import Drift
from intraslice_jax.prune.elimination import eliminate_channels, inverse_moment
from intraslice_jax.prune.linalg import on_solver, solver_name, to_solver, widened
from intraslice_jax.prune.method import PrunedMLP


def rank_channels(
    gram: Float[Array | np.ndarray, "inner inner"], down_proj: Float[Array | np.ndarray, "inner hidden"]
) -> Int[np.ndarray, " inner"]:
    """Channels by falling ||W_d[j]||^2 H_jj (docs/method.md 3.1)."""
    return rank_energies(*(np.asarray(a).astype(np.float64) for a in (np.diagonal(np.asarray(gram)), down_proj)))


def rank_energies(
    energies: Float[np.ndarray, " inner"], down_proj: Float[np.ndarray, "inner hidden"]
) -> Int[np.ndarray, " inner"]:
    """`rank_channels` given the Gram matrix's diagonal."""
    return np.argsort(-energies * np.square(down_proj).sum(-1), kind="stable")


def select_channels(
    gram: Float[Array | np.ndarray, "inner inner"], down_proj: Float[Array | np.ndarray, "inner hidden"], keep: int
) -> Int[np.ndarray, " keep"]:
    """The `keep` best channels, ascending."""
    return np.sort(rank_channels(gram, down_proj)[:keep])


def eliminate(
    arrays: Mapping[str, Array], moments: GramMoments, tokens: int, keep: int, damping: float, noise: float
) -> Int[np.ndarray, " keep"]:
    """The channels left when those that the others replace best leave one by one, ascending (docs/method.md 6.1)."""
    down = to_solver(arrays["down_proj"])
    inverse = inverse_moment(moments, tokens, damping, "down_bias" in arrays, noise)
    left = eliminate_channels(inverse, down, jnp.asarray(len(down) - keep, jnp.int32))
    return np.flatnonzero(np.asarray(left.stays))


def fuse_mlp(
    arrays: Mapping[str, Array],
    moments: GramMoments,
    tokens: int,
    kept: Int[np.ndarray, " keep"],
    damping: float,
    drift: Drift | None = None,
    dense_targets: float = 0.0,
) -> PrunedMLP:
    """Keeps some channels and folds the rest, regressed on them, into the down-projection.

    Args:
        arrays: the module's weights by name (`up_proj` [hidden, inner], ...).
        moments: of the down-projection's input.
        tokens: how many tokens the moments sum over.
        kept: channels that stay, ascending.
        damping: relative ridge damping.
        drift: of the down-projection's input against the module's drift from the dense model, where it is to be
            corrected.
        dense_targets: the largest strength of that correction.
    """
    gram, total, down = map(on_solver, (moments.gram, moments.total, arrays["down_proj"]))
    bias = on_solver(arrays["down_bias"]) if "down_bias" in arrays else None
    dropped = np.setdiff1d(np.arange(len(down)), kept)
    new, error, indefinite, strength = _fold(
        gram, total, down, bias, kept, dropped, float(tokens), damping, jax.tree.map(to_solver, drift), dense_targets
    )
    new |= {name: np.asarray(arrays[name])[..., kept] for name in arrays if not name.startswith("down")}
    notes = {"solver": solver_name(indefinite), **strength_note(strength)}
    return PrunedMLP(new, float(error), kept, notes)


@by_shape
@jax.jit
def _fold(
    gram: Float[Array, "inner inner"],
    total: Float[Array, " inner"],
    down: Float[Array, "inner hidden"],
    bias: Float[Array, " hidden"] | None,
    kept: Int[Array, " keep"],
    dropped: Int[Array, " drop"],
    tokens: Float[Array, ""],
    damping: Float[Array, ""],
    drift: Drift | None = None,
    dense_targets: Float[Array, ""] | float = 0.0,
) -> tuple[dict[str, Array], Float[Array, ""], Bool[Array, ""], Float[Array, ""] | None]:
    """The small down-projection, the relative error of the output, and whether the Gram matrix was indefinite.

    The last is the strength of the correction towards the dense model; the error is the one without it.
    """
    total, down, bias = widened((total, down, bias))
    # The kept channels are known exactly; only what the dropped ones give to the output is predicted.
    inputs, stay, lost = _part(gram, kept, kept), down[kept], down[dropped]
    cross = _part(gram, kept, dropped) @ lost
    sums = None if bias is None else Sums(total[kept], total[dropped] @ lost, tokens)
    fit = ridge(inputs, cross, damping, sums)
    new = {"down_proj": stay + fit.weights}
    given = jnp.sum(lost * (_part(gram, dropped, dropped) @ lost))
    error = missed_squares(fit, inputs, cross, given, damping, sums)
    if bias is not None and fit.offset is not None:
        new["down_bias"] = bias + fit.offset
    energy = given + jnp.sum(stay * (inputs @ stay + 2 * cross))
    strength = None
    if drift is not None:
        pairs = ((GramMoments(gram, total), drift.whole), (cast(GramMoments, drift.held_plain), drift.held))
        whole, held = (_regression(plain, extra, lost, kept, dropped) for plain, extra in pairs)
        added = correction(whole, held, damping, dense_targets, bias is not None)
        new["down_proj"] = new["down_proj"] + added.weights
        if added.offset is not None:
            new["down_bias"] = new["down_bias"] + added.offset
        strength = added.strength
    return new, error / jnp.maximum(energy, 1e-30), fit.indefinite, strength


def _part(gram: Float[Array, "inner inner"], rows: Int[Array, " n"], columns: Int[Array, " m"]) -> Float[Array, "n m"]:
    """Some rows and columns, in the solver's dtype: widening the whole takes longer than a Cholesky of the part."""
    return widened(gram[rows[:, None], columns])


def _regression(
    plain: GramMoments,
    drift: DriftMoments,
    lost: Float[Array, "drop hidden"],
    kept: Int[Array, " keep"],
    dropped: Int[Array, " drop"],
) -> Regression:
    """Of the kept channels on what the dropped ones give to the output."""
    return Regression(
        _part(plain.gram, kept, kept),
        _part(plain.gram, kept, dropped) @ lost,
        drift.cross[kept],
        plain.total[kept],
        plain.total[dropped] @ lost,
        drift.drift_sum,
        drift.tokens[0],
    )


def fuse_inner(
    arrays: Mapping[str, Array], inner: Mapping[str, Array], moments: MapMoments, tokens: int, damping: float
) -> PrunedMLP:
    """A small MLP of any inner weights, its down-projection regressed on the dense inner activations.

    Args:
        arrays: the dense module's weights by name.
        inner: the small module's, all but the down-projection.
        moments: the small module's inner activations against the dense ones.
        tokens: how many tokens the moments sum over.
        damping: relative ridge damping.
    """
    fit = fit_inner(arrays, moments, tokens, damping)
    down = to_solver(arrays["down_proj"])
    new = {**inner, "down_proj": fit.weights @ down}
    if fit.offset is not None:
        new["down_bias"] = to_solver(arrays["down_bias"]) + fit.offset @ down
    return PrunedMLP(new, inner_error(arrays, fit, moments, tokens), None, {"solver": solver_name(fit.indefinite)})


def fit_inner(arrays: Mapping[str, Array], moments: MapMoments, tokens: int, damping: float) -> Compensation:
    """The ridge map of small onto dense inner activations, affine where the module has an output bias."""
    return ridge(to_solver(moments.gram), to_solver(moments.cross), damping, _sums(arrays, moments, tokens))


def inner_error(arrays: Mapping[str, Array], fit: Compensation, moments: MapMoments, tokens: int) -> float:
    """Relative squared error of the module's output under a fitted map, on the tokens of the moments."""
    gram, cross, target = (to_solver(m) for m in (moments.gram, moments.cross, moments.target_gram))
    sums = _sums(arrays, moments, tokens)
    return float(relative_error(fit, gram, cross, target, to_solver(arrays["down_proj"]), sums))


def _sums(arrays: Mapping[str, Array], moments: MapMoments, tokens: int) -> Sums | None:
    if "down_bias" not in arrays:
        return None
    return Sums(to_solver(moments.input_sum), to_solver(moments.target_sum), float(tokens))
