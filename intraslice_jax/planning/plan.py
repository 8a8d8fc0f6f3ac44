"""A plan: memory, arithmetic and communication of each device."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import jax

from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.mesh import make_mesh
from intraslice_jax.planning.memory import MeshSizes, Residency, parts, widest
from intraslice_jax.planning.programs import layer_programs
from intraslice_jax.prune.calibration import batch_size


@dataclass(frozen=True)
class Run:
    """The options of the run that is planned, as `prune` spells them."""

    mesh: str
    residency: Residency
    samples: int
    sequence_length: int
    memory_budget: int
    dtype: str
    flops: float | None = None


def make_plan(config: ModelConfig, run: Run) -> dict[str, Any]:
    """What the passes over the text need, JSON-serialisable. The solves, and gradients for ratios, are not in it.

    Raises:
        InputError: the mesh is malformed, or the windows do not fit the model.
    """
    sizes = _mesh_sizes(run.mesh)
    if run.samples < 1 or not 2 <= run.sequence_length <= config.max_position_embeddings:
        raise InputError(
            f"{run.samples} windows of {run.sequence_length} tokens do not fit a context of "
            f"{config.max_position_embeddings}; change --samples or --sequence-length"
        )
    mesh = make_mesh(f"data={sizes.data},model={sizes.model}", _cpu_devices(sizes.devices))
    assert mesh is not None  # the text names one
    prune = PruneConfig(memory_budget=run.memory_budget)
    per_row = batch_size(config, (run.samples, run.sequence_length), prune, sizes.data)
    steps = math.ceil(run.samples / sizes.data / per_row)
    programs = layer_programs(config, widest(config), mesh, per_row, run.sequence_length, run.dtype)
    scratch = max(program.scratch_bytes for program in programs.values())
    arrays = abstract_arrays(config, run.dtype)

    def parts_with(residency: Residency) -> dict[str, int]:
        return parts(config, arrays, sizes, run.samples, run.sequence_length, residency, scratch, run.memory_budget)

    everywhere: tuple[Residency, ...] = ("device", "host", "disk")
    flops = config.num_layers * steps * sum(program.flops for program in programs.values())
    return {
        "run": asdict(run),
        "parts": parts_with(run.residency),
        "device_bytes": sum(parts_with(run.residency).values()),
        "device_bytes_by_residency": {name: sum(parts_with(name).values()) for name in everywhere},
        "programs": {name: asdict(program) for name, program in programs.items()},
        "flops_per_device": flops,
        "collective_bytes_per_layer": steps * sum(p.collective_bytes for p in programs.values()),
        "distinct_layer_shapes": config.distinct_shapes(),
        "seconds": None if run.flops is None else flops / run.flops,
    }


def _mesh_sizes(text: str) -> MeshSizes:
    sizes = {"data": 1, "model": 1}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in sizes or not value.isdecimal() or int(value) < 1:
            raise InputError(f"--mesh {text!r}: expected data=D,model=M, for example --mesh data=4,model=2")
        sizes[name] = int(value)
    return MeshSizes(**sizes)


def _cpu_devices(count: int) -> list[Any]:
    """So many devices to compile for; the number is fixed when jax first counts them."""
    with contextlib.suppress(RuntimeError):  # counted already, by whoever uses this as a library
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"this process has {len(devices)} devices to plan for {count}; plan in a process of its own")
    return devices[:count]
