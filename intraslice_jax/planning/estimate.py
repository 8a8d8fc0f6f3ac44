"""A first estimate of a run's time, from formulas alone: nothing is compiled for it but one matrix product."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np

from intraslice_jax.config import CalibrationConfig, ModelConfig, PruneConfig, window_length
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.floor import loop_flops
from intraslice_jax.model import LanguageModel
from intraslice_jax.parallel.placement import mesh_of
from intraslice_jax.planning.memory import MeshSizes
from intraslice_jax.planning.plan import Run
from intraslice_jax.planning.stages import measured_rate, solve_flops
from intraslice_jax.planning.typical import typical
from intraslice_jax.planning.whole_stages import forward_flops, head_flops, whole_model_work

EFFICIENCY = 0.5
"""Of the rate of a matrix product, what a run reaches with all that lies between its products (docs/speed.md)."""

COMPILING = {"ratios": (10.0, 0.0), "layers": (1.0, 0.5), "refinement": (2.0, 3.5), "perplexity": (1.0, 0.6)}
"""Seconds of a CPU core that compiling takes: once, and for every layer of another shape. None where a cache has it."""

WRITING = 200e6
"""Bytes per second of a checkpoint, its digests included."""


def stage_seconds(config: ModelConfig, prune: PruneConfig, samples: int, seq: int, rate: float) -> dict[str, float]:
    """Seconds of the stages of `prune_model` that a run has, in their order.

    Args:
        config: the dense model.
        prune: how it is pruned; ratios of a file count as uniform ones.
        samples: calibration windows.
        seq: tokens of each.
        rate: float32 operations per second of all devices together (`intraslice_jax.planning.stages.measured_rate`).
    """
    small = typical(config, prune)
    run = Run("", "device", samples, seq, 0, "float32", prune.target_sparsity, prune.ratios, prune.refine)
    floors = loop_flops(config, small, samples, seq)
    loop = {
        "attention": float(floors["attention moments"]),
        "kept attention": float(floors["attention re-run"]),
        "MLP": float(floors["MLP moments"] + floors["outputs"]),
        "solves": sum(map(solve_flops, config.layers, small.layers, itertools.repeat(config.hidden_size))),
    }
    work = {name: part.of(loop) for name, part in whole_model_work(config, small, run, MeshSizes(1, 1)).items()}
    refinement = work.pop("refinement", 0.0)
    flops = {"ratios": sum(work.values()), "layers": sum(loop.values()), "refinement": refinement}
    shapes = 1 if prune.layout == "uniform" else config.num_layers
    return {name: count / (EFFICIENCY * rate) + _compiling(name, shapes) for name, count in flops.items() if count}


def _compiling(stage: str, shapes: int) -> float:
    once, each = COMPILING[stage]
    return once + each * shapes


def perplexity_seconds(dense: ModelConfig, small: ModelConfig, windows: tuple[int, ...], rate: float) -> float:
    """Of the perplexities before and after, on so many windows of so many tokens."""
    count, seq = windows
    flops = count * sum(forward_flops(config, seq) + head_flops(config, seq) for config in (dense, small))
    return flops / (EFFICIENCY * rate) + _compiling("perplexity", small.num_layers)


def expected_seconds(
    model: LanguageModel, prune: PruneConfig, calibrate: CalibrationConfig, windows: np.ndarray | None
) -> dict[str, float]:
    """Seconds of the stages of `intraslice prune` after reading, at the rate of this process's devices.

    Args:
        model: the dense model.
        prune: how it is pruned.
        calibrate: how many windows, and how long.
        windows: those that perplexity is measured on before and after, if any.

    Returns:
        Nothing where the budget is beyond reach, which the run itself says.
    """
    config, rate = model.config, measured_rate(512 if jax.default_backend() == "cpu" else 4096)
    mesh = mesh_of(model.decoder)
    if mesh is not None and jax.default_backend() != "cpu":  # devices of one CPU share its cores
        rate *= mesh.size
    if prune.target_sparsity == 0:
        prune = dataclasses.replace(prune, ratios="uniform", refine=0)
    try:
        length = window_length(calibrate.sequence_length, config.max_position_embeddings)
        found = stage_seconds(config, prune, calibrate.samples, length, rate)
        if windows is not None:
            found["perplexity"] = perplexity_seconds(config, typical(config, prune), windows.shape, rate)
    except InputError:
        return {}
    return found | {"writing": 1 + 4 * config.total_parameters() / WRITING}
