"""Ratios by what really happens when a module alone is pruned (docs/method.md 6.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from intraslice_jax.calibrate.gradients import OnBatch
from intraslice_jax.config import PruneConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.prune.allocation import LEAST_COST, allocate_by_costs, allocate_evenly
from intraslice_jax.prune.budget import LayerRatios
from intraslice_jax.prune.divergence import Tail, judging, split_windows
from intraslice_jax.prune.resume import Resumable, RunLog
from intraslice_jax.prune.trials import variants

MEASURED = "divergences"
"""What a run's log calls the costs of its first layers."""


@dataclass(frozen=True)
class KLSensitivity(Resumable):
    """One module after the other is pruned, all else dense, and the KL divergence is what that costs.

    The divergence is that of the next-token distribution from the dense model's. Each module is pruned at two
    ratios, the wanted one and another, which shows how its cost grows.
    """

    def resumed(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None,
        run_log: RunLog | None,
    ) -> LayerRatios:
        """Ratios of the least total cost, going on after the layers of which the log has measurements.

        `on_batch` is told the measurements done and their number.
        """
        if config.target_sparsity == 0:
            return allocate_evenly(model.config, config)
        ratios = measured_ratios(config.target_sparsity)
        costs = divergences(model, windows, config, ratios, on_batch, run_log)
        return allocate_by_costs(model.config, ratios, costs, config)


FAR, NEAR = 0.75, 0.5
"""The second ratio at which modules are pruned, and above which wanted one it is half of that instead."""


def measured_ratios(sparsity: float) -> tuple[float, float]:
    """At which ratios each module is pruned, ascending."""
    return (sparsity, FAR) if sparsity <= NEAR else (sparsity / 2, sparsity)


def divergences(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    ratios: tuple[float, ...],
    on_batch: OnBatch | None = None,
    run_log: RunLog | None = None,
) -> tuple[Float[np.ndarray, "layers ratios"], Float[np.ndarray, "layers ratios"]]:
    """Mean KL divergence per token, in nats, that pruning each layer's attention, and each layer's MLP, alone gives.

    Args:
        model: dense, or pruned before.
        windows: int32 calibration tokens. The last ones are held out, unless there is but one; `judging` says what the
            divergence is measured on.
        config: the method.
        ratios: at which each module is pruned.
        on_batch: told the measurements done and their number, before the first and after each.
        run_log: keeps what was measured, layer by layer.
    """
    train, _ = split_windows(windows)
    tails = [Tail.start(model, part) for part in judging(windows)]
    costs = np.zeros((2, model.config.num_layers, len(ratios)))
    measured = [] if run_log is None else run_log.get(MEASURED, list[tuple[list[float], list[float]]]) or []
    for layer, found in enumerate(measured):
        costs[:, layer] = found
    first = len(measured)
    if on_batch is not None:
        on_batch(first * 2 * len(ratios), costs.size)

    found = variants(model, train, config, ratios, first)
    for done, variant in enumerate(found, first * 2 * len(ratios) + 1):
        for tail in tails:
            tail.advance_to(variant.layer)
            costs[variant.kind, variant.layer, variant.number] += tail.divergence(variant.block) / len(tails)
        if run_log is not None and (variant.kind, variant.number) == (1, len(ratios) - 1):
            measured.append(tuple(costs[:, variant.layer].tolist()))
            run_log.put(MEASURED, measured)
        if on_batch is not None:
            on_batch(done, costs.size)
    costs = np.maximum(costs, LEAST_COST)
    return costs[0], costs[1]
