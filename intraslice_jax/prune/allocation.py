"""From importances of units to a ratio per layer and module (docs/method.md section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import root_scalar

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.prune.budget import LayerRatios, narrowest


@dataclass(frozen=True)
class UnitScores:
    """Importance of every unit of the model, the least important going first.

    Attributes:
        attention: per layer the scores of its units. A layer may have any number of units of equal size: heads,
            or components of heads.
        mlp: per layer the scores of its channels.
    """

    attention: tuple[np.ndarray, ...]
    mlp: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Modules:
    """All attentions, or all MLPs, of a model.

    Attributes:
        parameters: of each layer's module, float64.
        caps: the largest ratio of each.
    """

    parameters: Float[np.ndarray, " layers"]
    caps: Float[np.ndarray, " layers"]

    @property
    def reachable(self) -> float:
        """The largest ratio of all of them together."""
        return float(self.parameters @ self.caps / self.parameters.sum())

    def target(self, ratio: float) -> float:
        """Parameters to remove from all of them together."""
        return ratio * float(self.parameters.sum())


def allocate(config: ModelConfig, scores: UnitScores, prune: PruneConfig) -> LayerRatios:
    """Ranks the units of a kind over the whole model and removes the least important up to the budget.

    Raises:
        InputError: the budget cannot be met.
        RunError: a score is not finite.
    """
    return _per_kind(
        config,
        prune,
        lambda modules, target, kind: rank(getattr(scores, kind), modules.parameters, target, kind),
    )


def allocate_evenly(config: ModelConfig, prune: PruneConfig) -> LayerRatios:
    """The same ratio in all modules of a kind.

    Raises:
        InputError: the budget cannot be met.
    """
    return _per_kind(
        config, prune, lambda modules, target, _: np.full(config.num_layers, target / modules.parameters.sum())
    )


LEAST_COST = 1e-7
"""Nats per token: below it, divergences are rounding."""

EXPONENTS = (1.4, 6.0)
"""Between these are the powers with which costs grow. Below the first the least noise would decide between nothing and
all of a module."""


def allocate_by_costs(
    config: ModelConfig,
    points: Sequence[float],
    costs: tuple[Float[np.ndarray, "layers points"], Float[np.ndarray, "layers points"]],
    prune: PruneConfig,
) -> LayerRatios:
    """Ratios of all modules, attentions and MLPs together, whose costs add up to the least within the budget.

    The cost of a module is a power of its ratio (`power_laws`). At the minimum one more parameter costs the same in
    every module, except where a cap cuts (docs/method.md 6.3).

    Args:
        config: the model.
        points: ascending ratios in (0, 1] at which costs were measured.
        costs: of the attentions and of the MLPs; more than 0.
        prune: budget, caps and alignment.

    Raises:
        InputError: the budget cannot be met.
        RunError: a cost is not finite.
    """
    for kind, found in zip(("attention", "MLP"), costs, strict=True):
        for i in np.flatnonzero(~np.isfinite(found).all(1)):
            raise RunError(f"layer {i}, {kind}: what its pruning costs is not finite")
    kinds = modules(config, prune)
    check_reachable(*kinds, prune)
    both = Modules(*(np.concatenate([getattr(kind, name) for kind in kinds]) for name in ("parameters", "caps")))
    scale, exponent = power_laws(points, np.concatenate(costs))

    def at(price: float) -> Float[np.ndarray, " modules"]:
        """The ratios where one more parameter costs so much, a logarithm."""
        logs = (price + np.log(both.parameters) - scale - np.log(exponent)) / (exponent - 1)
        return np.minimum(np.exp(np.minimum(logs, 0)), both.caps)

    target = both.target(prune.target_sparsity)
    found = root_scalar(lambda price: at(price) @ both.parameters - (1 - 1e-8) * target, bracket=(-500.0, 500.0))
    attention, mlp = (tuple(map(float, part)) for part in np.split(cap_and_spread(at(found.root), both, target), 2))
    return LayerRatios(attention, mlp)


def power_laws(
    points: Sequence[float], costs: Float[np.ndarray, "modules points"]
) -> tuple[Float[np.ndarray, " modules"], Float[np.ndarray, " modules"]]:
    """Of each module's cost exp(a) ratio^p the logarithm a of its scale and its exponent p, 2 from a single point.

    Least squares of the logarithms; the exponents stay within `EXPONENTS`. Costs of `LEAST_COST` are left out where the
    module has others: at that ratio rounding to whole heads and pairs took nothing from it.
    """
    real = costs > LEAST_COST
    real |= ~real.any(1, keepdims=True)
    logs, x = np.log(costs), np.log(np.asarray(points))
    middle, level = (np.mean(np.broadcast_to(a, costs.shape), 1, where=real) for a in (x, logs))
    apart = (x - middle[:, None]) * real
    spread = (apart**2).sum(1)
    slope = (logs * apart).sum(1) / np.where(spread > 0, spread, 1)
    exponent = np.where(spread > 0, np.clip(slope, *EXPONENTS), 2.0)
    return level - exponent * middle, exponent


def _per_kind(config: ModelConfig, prune: PruneConfig, ratios_of) -> LayerRatios:
    attention, mlp = modules(config, prune)
    shares = split(attention, mlp, prune)
    found = []
    for kind, group, share in (("attention", attention, shares[0]), ("mlp", mlp, shares[1])):
        target = group.target(share)
        ratios = cap_and_spread(ratios_of(group, target, kind), group, target)
        found.append(tuple(float(r) for r in ratios))
    return LayerRatios(found[0], found[1])


def modules(config: ModelConfig, prune: PruneConfig) -> tuple[Modules, Modules]:
    """The attentions and the MLPs of a model, with what at least stays of each: a head, an aligned width."""
    attention = np.array([config.attention_parameters(s) for s in config.layers], np.float64)
    mlp = np.array([config.mlp_parameters(s) for s in config.layers], np.float64)
    one_head = np.array([config.attention_parameters(_one_head(s)) for s in config.layers])
    least = np.array([narrowest(s.intermediate_size, prune.align, prune.max_ratio) for s in config.layers])
    full = np.array([s.intermediate_size for s in config.layers])
    per_channel = config.hidden_size * (3 if config.gated_mlp else 2) + config.mlp_bias * (1 + config.gated_mlp)
    return (
        Modules(attention, np.minimum(prune.max_ratio, 1 - one_head / attention)),
        Modules(mlp, np.minimum(prune.max_ratio, (full - least) * per_channel / mlp)),
    )


def check_reachable(attention: Modules, mlp: Modules, prune: PruneConfig) -> None:
    """Raises InputError, with what could be removed, if the budget is beyond that."""
    total = float(attention.parameters.sum() + mlp.parameters.sum())
    largest = attention.target(attention.reachable) + mlp.target(mlp.reachable)
    if prune.target_sparsity * total > largest + 1e-9 * total:
        raise InputError(
            f"sparsity {prune.target_sparsity:g} cannot be reached: at most {_floor(largest / total)} of the "
            f"attention and MLP parameters can be removed with max_ratio {prune.max_ratio:g} and align {prune.align}"
        )


def split(attention: Modules, mlp: Modules, prune: PruneConfig) -> tuple[float, float]:
    """The ratios of all attentions and of all MLPs: the first is `kind_bias` times the second.

    Raises:
        InputError: one of them is beyond what can be removed.
    """
    sparsity, bias = prune.target_sparsity, prune.kind_bias
    sizes = attention.parameters.sum(), mlp.parameters.sum()
    wanted = sparsity * sum(sizes)
    check_reachable(attention, mlp, prune)
    mlp_ratio = wanted / (bias * sizes[0] + sizes[1])
    attention_ratio = bias * mlp_ratio
    slack = 1e-9
    if attention_ratio <= attention.reachable + slack and mlp_ratio <= mlp.reachable + slack:
        return min(attention_ratio, attention.reachable), min(mlp_ratio, mlp.reachable)
    kind, ratio, group = (
        ("attention", attention_ratio, attention)
        if attention_ratio > attention.reachable + slack
        else ("MLP", mlp_ratio, mlp)
    )
    low = max(0.0, (wanted - mlp.target(mlp.reachable)) / sizes[0] / mlp.reachable) if mlp.reachable else math.inf
    rest = wanted - attention.target(attention.reachable)
    high = attention.reachable * sizes[1] / rest if rest > 0 else math.inf
    raise InputError(
        f"kind_bias {bias:g} takes {ratio:.1%} of all {kind} parameters at sparsity {sparsity:g}; with max_ratio "
        f"{prune.max_ratio:g} and align {prune.align}, at most {_floor(group.reachable)} can go; {_between(low, high)}"
    )


def rank(
    scores: Sequence[np.ndarray], parameters: Float[np.ndarray, " layers"], target: float, kind: str
) -> Float[np.ndarray, " layers"]:
    """Ratios that remove the least important units of all layers until `target` parameters are gone.

    The last unit may go in part. Units of equal score go from all layers alike.

    Raises:
        RunError: a score is not finite.
    """
    for i, layer in enumerate(scores):
        if not np.isfinite(layer).all():
            raise RunError(f"layer {i}, {kind}: the importance of a unit is not finite")
    counts = np.array([len(layer) for layer in scores])
    layers = np.repeat(np.arange(len(scores)), counts)
    within = np.concatenate([np.argsort(np.argsort(layer, kind="stable")) / len(layer) for layer in scores])
    order = np.lexsort((within, np.concatenate([np.asarray(s, np.float64) for s in scores])))
    costs = (parameters / counts)[layers][order]
    before = np.cumsum(costs) - costs
    taken = np.clip((target - before) / costs, 0, 1)
    return np.bincount(layers[order], taken, len(scores)) / counts


def cap_and_spread(ratios: Float[np.ndarray, " layers"], group: Modules, target: float) -> Float[np.ndarray, " layers"]:
    """Ratios of at most the caps that still remove `target` parameters.

    What a cap cuts off is spread over the other layers in proportion to what they give already, or, if they give
    nothing, to their parameters.
    """
    ratios = ratios.copy()
    for _ in range(len(ratios) + 1):  # every round but the last caps at least one more layer
        capped = ratios >= group.caps
        ratios[capped] = group.caps[capped]
        given = ratios * group.parameters
        missing = target - given.sum()
        if missing <= 1e-12 * target or capped.all():
            break
        if given[~capped].sum() > 0:
            ratios[~capped] *= 1 + missing / given[~capped].sum()
        else:
            ratios[~capped] = missing / group.parameters[~capped].sum()
    return ratios


def _one_head(shape: LayerShape) -> LayerShape:
    """The smallest attention: one head, two channels wide."""
    narrow = min(2, shape.qk_head_dim)
    return LayerShape((0,), narrow, min(narrow, shape.rotary_dim), min(2, shape.v_head_dim), shape.intermediate_size)


def _floor(ratio: float) -> str:
    """A ratio rounded down, so that asking for what is printed works."""
    return f"{math.floor(ratio * 1e4) / 1e4:g}"


def _between(low: float, high: float) -> str:
    """Which values of kind_bias are allowed, rounded inwards."""
    if math.isinf(low):
        return "no kind_bias changes that"
    low = math.ceil(low * 1e3) / 1e3
    if math.isinf(high):
        return f"kind_bias may be {low:g} or more"
    high = math.floor(high * 1e3) / 1e3
    return f"kind_bias may be between {low:g} and {high:g}"
