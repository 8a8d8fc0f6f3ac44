"""Which mesh and residency would fit a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.planning.devices import Accelerator
from intraslice_jax.planning.memory import RESIDENCIES, MeshSizes, Residency, Setting, standing
from intraslice_jax.planning.plan import Run, make_plan
from intraslice_jax.planning.stages import Rates
from intraslice_jax.planning.typical import typical


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

    Only meshes are compiled for on which what always lies there leaves room. Where layers are not all on the devices
    there is no refinement.
    """
    pruned = typical(config, PruneConfig(sparsity=run.sparsity))
    for sizes in arrangements(devices):
        for residency in residencies:
            setting = Setting(config, pruned, run.dtype, sizes, run.samples, run.sequence_length, 1, 0, False, False)
            if sum(standing(setting, residency).values()) > 0.9 * memory:
                continue
            mesh = f"data={sizes.data},model={sizes.model}"
            refine = run.refine if residency == "device" else 0
            other = dataclasses.replace(run, mesh=mesh, residency=residency, refine=refine)
            plan = make_plan(config, other, rates, accelerator)
            if plan["device_bytes"] <= memory:
                return plan
    return None


def refuse(name: str, config: ModelConfig, plan: dict[str, Any], memory: int, accelerator: Accelerator | None) -> None:
    """Raises InputError, with what would fit, when a plan exceeds a device's memory."""
    if plan["device_bytes"] <= memory:
        return
    run = Run(**plan["run"])
    remedy = _remedy(config, run, plan, memory, accelerator)
    raise InputError(
        f"{name} needs {plan['device_bytes'] / 2**30:.2f} GiB per device on {run.mesh} with residency "
        f"{run.residency} ({plan['peak_phase']}), a device has {memory / 2**30:.2f} GiB; {remedy}"
    )


def _remedy(config: ModelConfig, run: Run, plan: dict[str, Any], memory: int, accelerator: Accelerator | None) -> str:
    """What to do about a plan that does not fit: of the same mesh, if that helps."""
    unrefined = max(size for phase, size in plan["phase_bytes"].items() if phase != "refinement")
    if unrefined <= memory:
        return "`refine=0` fits"
    for residency, size in plan["device_bytes_by_residency"].items():
        if size <= memory:
            return f"{_elsewhere(run, residency)} fits"
    other = find_fit(config, run, plan["devices"], memory, accelerator=accelerator)
    if other is not None:
        return f"`mesh={other['run']['mesh']}` {_elsewhere(run, other['run']['residency'])} fits"
    return "more devices, or a smaller `samples` or `memory_budget`, are needed"


def _elsewhere(run: Run, residency: str) -> str:
    return f"`residency={residency}`" + (" `refine=0`" if run.refine and residency != "device" else "")
