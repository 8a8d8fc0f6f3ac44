"""Which mesh and residency would fit a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.planning.devices import Accelerator
from intraslice_jax.planning.memory import MeshSizes, Residency, Setting, standing
from intraslice_jax.planning.plan import Run, make_plan
from intraslice_jax.planning.stages import Rates
from intraslice_jax.planning.typical import typical

RESIDENCIES: tuple[Residency, ...] = ("device", "host", "disk")


def arrangements(devices: int) -> Iterator[MeshSizes]:
    """All meshes of so many devices, those with more `data` first: they communicate least."""
    return (MeshSizes(devices // m, m) for m in range(1, devices + 1) if devices % m == 0)


def find_fit(
    config: ModelConfig,
    run: Run,
    devices: int,
    memory: int,
    residencies: tuple[Residency, ...] = RESIDENCIES,
    rates: Rates | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any] | None:
    """The first plan that fits, of the residencies in their order and of all meshes; None if there is none.

    Only meshes are compiled for on which what always lies there leaves room.
    """
    pruned = typical(config, PruneConfig(sparsity=run.sparsity))
    for sizes in arrangements(devices):
        for residency in residencies:
            setting = Setting(config, pruned, run.dtype, sizes, run.samples, run.sequence_length, 1, 0, False, False)
            if sum(standing(setting, residency).values()) > 0.9 * memory:
                continue
            mesh = f"data={sizes.data},model={sizes.model}"
            plan = make_plan(config, dataclasses.replace(run, mesh=mesh, residency=residency), rates, accelerator)
            if plan["device_bytes"] <= memory:
                return plan
    return None


def refuse(name: str, config: ModelConfig, plan: dict[str, Any], memory: int, accelerator: Accelerator | None) -> None:
    """Raises InputError, with what would fit, when a plan exceeds a device's memory."""
    if plan["device_bytes"] <= memory:
        return
    run = Run(**plan["run"])
    fits = [each for each in RESIDENCIES if plan["device_bytes_by_residency"][each] <= memory]
    if fits:
        remedy = f"--residency {fits[0]} fits"
    else:
        other = find_fit(config, run, plan["devices"], memory, accelerator=accelerator)
        remedy = "more devices, or a smaller --samples or --memory-budget, are needed"
        if other is not None:
            remedy = f"--mesh {other['run']['mesh']} --residency {other['run']['residency']} fits"
    raise InputError(
        f"{name} needs {plan['device_bytes'] / 2**30:.2f} GiB per device on {run.mesh} with residency "
        f"{run.residency} ({plan['peak_phase']}), a device has {memory / 2**30:.2f} GiB; {remedy}"
    )
