"""Arithmetic by stage of a run, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.planning.devices import UTILISATION, Accelerator
from intraslice_jax.planning.memory import MeshSizes, widest
from intraslice_jax.planning.programs import Program
from intraslice_jax.planning.whole_stages import whole_model_work

if TYPE_CHECKING:
    from intraslice_jax.planning.plan import Run

UPPER = 0.625
"""The part of a symmetric matrix that is computed (`intraslice_jax.calibrate.statistics`)."""


@dataclass(frozen=True)
class Rates:
    """Operations per second: of bfloat16 passes, of float32 at the highest precision, of float64 solves."""

    narrow: float
    wide: float
    solve: float

    @classmethod
    def of(cls, accelerator: Accelerator) -> Rates:
        """The assumed share of the peak."""
        return cls(*(UTILISATION * rate for rate in (accelerator.narrow, accelerator.wide, accelerator.solve)))


def stages(
    config: ModelConfig,
    pruned: ModelConfig,
    programs: Mapping[str, Program],
    steps: int,
    tokens: int,
    mesh: MeshSizes,
    run: Run,
    rates: Rates | None,
) -> dict[str, Any]:
    """FLOPs of each device by stage, and seconds where rates are given; communication takes none here.

    Passes are what the compiler counts; solves are counted by hand, for it does not see into them.
    """
    index = widest(config)
    shape, small, hidden = config.layers[index], pruned.layers[index], config.hidden_size
    layers, wide = config.num_layers, dict.fromkeys(programs, 0.0)
    width, inner = shape.num_attention_heads * shape.v_head_dim, shape.intermediate_size
    inputs = small.num_attention_heads * shape.v_head_dim
    wide["head moments"] = programs["head moments"].flops
    wide["kept attention"] = 2 * tokens * (UPPER * (inputs**2 + width**2) + inputs * width) / mesh.model
    wide["MLP"] = 2 * tokens * UPPER * inner**2 / mesh.model
    passes = {name: p.flops for name, p in programs.items() if not name.endswith("solve")}
    # Where the activations of the first pass were too many to keep, they are computed again for the second.
    flops = {name: layers * steps * count for name, count in passes.items()}
    flops["attention"] *= 1 if _mixed_fits(programs, steps, mesh, run) else 2
    flops["solves"] = layers * solve_flops(shape, small, hidden)
    narrow = 1.0 if rates is None else rates.wide if run.dtype == "float32" else rates.narrow
    seconds: dict[str, float] = {}
    if rates is not None:
        for name, count in flops.items():
            share = layers * steps * wide.get(name, 0.0)
            seconds[name] = count / rates.solve if name == "solves" else (count - share) / narrow + share / rates.wide
    more = whole_model_work(config, pruned, run, mesh)
    flops |= {name: work.of(flops) for name, work in more.items()}
    if rates is not None:
        seconds |= {name: work.of(seconds, narrow) for name, work in more.items()}
    return {
        "flops_per_device": flops,
        **({} if rates is None else {"seconds_by_stage": seconds}),
        "seconds": None if rates is None else sum(seconds.values()),
    }


def _mixed_fits(programs: Mapping[str, Program], steps: int, mesh: MeshSizes, run: Run) -> bool:
    return steps * programs["attention"].new_bytes * mesh.model <= run.memory_budget


def solve_flops(shape: LayerShape, small: LayerShape, hidden: int) -> float:
    """Of the two regressions of a layer, given its shape before and after."""
    width = shape.num_attention_heads * shape.v_head_dim
    inputs, outputs = small.num_attention_heads * shape.v_head_dim, small.num_attention_heads * small.v_head_dim
    return (
        _ridge_flops(outputs, width, hidden)
        + 2 * outputs * inputs * (inputs + width)
        + _ridge_flops(small.intermediate_size, shape.intermediate_size, hidden)
    )


def _ridge_flops(inputs: int, targets: int, hidden: int) -> float:
    """A Cholesky factorisation, its solve, the new projection, and the products of the output's error."""
    solve = inputs**3 / 3 + 2 * inputs**2 * targets
    return solve + 2 * hidden * (2 * inputs * targets + targets**2 + inputs**2)


def measured_rate(size: int = 1024) -> float:
    """Float32 operations per second of a matrix product on this process's first device."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    product(a).block_until_ready()
    seconds = []
    for _ in range(40):  # the first ones are slow while threads wake up
        started = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)
