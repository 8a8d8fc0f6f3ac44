"""A plan: memory, arithmetic and communication of each device."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from intraslice_jax.config import ModelConfig, PruneConfig, check_refine
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.batches import even_batches
from intraslice_jax.parallel.linalg import fits_one_device
from intraslice_jax.parallel.mesh import make_mesh, parse_mesh
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.planning.devices import Accelerator
from intraslice_jax.planning.memory import RESIDENCIES, MeshSizes, Residency, Setting, phases, widest
from intraslice_jax.planning.programs import Program
from intraslice_jax.planning.stages import Rates, stages
from intraslice_jax.planning.typical import typical
from intraslice_jax.planning.whole_model import WholeModel
from intraslice_jax.planning.whole_programs import WholeModelSteps
from intraslice_jax.prune.calibration import batch_size
from intraslice_jax.prune.refine import BYTES_LEARNED


@dataclass(frozen=True)
class Run:
    """The options of the run that is planned, as `prune` spells them; ratios of a file count as uniform ones."""

    mesh: str
    residency: Residency
    samples: int
    sequence_length: int
    memory_budget: int
    dtype: str
    sparsity: float = 0.3
    ratios: str = "uniform"
    refine: int = 0
    dense_targets: float = 0.0


def make_plan(
    config: ModelConfig, run: Run, rates: Rates | None = None, accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """What a run needs, JSON-serialisable.

    Args:
        config: the dense model.
        run: its options.
        rates: operations per second, for a time.
        accelerator: what the devices are; without it they solve themselves.

    Raises:
        InputError: the mesh is malformed, the windows do not fit the model, the sparsity is beyond reach, there are no
            such ratios, or a refinement does not go with the residency.
    """
    check_refine(run.refine, run.residency)
    if run.samples < 1 or not 2 <= run.sequence_length <= config.max_position_embeddings:
        raise InputError(
            f"{run.samples} windows of {run.sequence_length} tokens do not fit a context of "
            f"{config.max_position_embeddings}; change `samples` or `sequence_length`"
        )
    sizes = mesh_sizes(run.mesh)
    mesh = None if sizes.devices == 1 else make_mesh(run.mesh, _cpu_devices(sizes.devices))
    prune = PruneConfig(sparsity=run.sparsity, memory_budget=run.memory_budget, refine=run.refine)
    pruned, index = typical(config, prune), widest(config)
    per_row = batch_size(config, (run.samples, run.sequence_length), prune, sizes.data)
    steps = len(list(even_batches(run.samples, per_row, sizes.data)))
    inner = config.layers[index].intermediate_size
    solves = accelerator is None or accelerator.solves
    memory = None if accelerator is None else accelerator.memory if solves else accelerator.host_memory
    one_device = sizes.devices == 1 or fits_one_device(inner, memory)
    setting = Setting(
        config,
        pruned,
        run.dtype,
        sizes,
        run.samples,
        run.sequence_length,
        steps,
        run.memory_budget,
        solves,
        one_device,
        run.dense_targets > 0,
    )
    compiled = WholeModelSteps(config, config.layers[index], pruned.layers[index], mesh, run.sequence_length, run.dtype)
    z_bytes = per_row * run.sequence_length * inner * jnp.dtype(run.dtype).itemsize
    solving = compiled.solves(run.dense_targets > 0)
    programs = compiled.passes(per_row, steps * z_bytes <= run.memory_budget) | solving
    whole = WholeModel.of(setting, run, compiled)
    by_residency: dict[Residency, dict[str, dict[str, int]]] = {}
    for name in RESIDENCIES:
        loop = phases(setting, programs, name)
        by_residency[name] = loop | whole.phases(loop, name)
    totals = {name: max(sum(p.values()) for p in found.values()) for name, found in by_residency.items()}
    here = by_residency[run.residency]
    peak = max(here, key=lambda phase: sum(here[phase].values()))
    every = {**programs, **whole.programs}
    work = stages(config, pruned, programs, steps, per_row * run.sequence_length, sizes, run, rates)
    return {
        "run": asdict(run),
        "devices": sizes.devices,
        "parts": here[peak],
        "peak_phase": peak,
        "phase_bytes": {name: sum(found.values()) for name, found in here.items()},
        "device_bytes": totals[run.residency],
        "device_bytes_by_residency": totals,
        "programs": {name: asdict(program) for name, program in every.items()},
        **work,
        "collective_bytes_per_layer": _traffic(setting, programs),
        "host_bytes": _host_bytes(setting, solving, run.residency, accelerator),
        "disk_bytes": _disk_bytes(setting, run.refine),
        "distinct_layer_shapes": {"dense": config.distinct_shapes(), "pruned": pruned.distinct_shapes()},
        "compiled_programs": {
            "least": len(every) * max(config.distinct_shapes(), pruned.distinct_shapes()),
            "most": len(every) * config.num_layers,
        },
        "pruned_parameters": pruned.total_parameters(),
        "parameters": config.total_parameters(),
    }


def mesh_sizes(text: str, devices: int | None = None) -> MeshSizes:
    """The mesh that a text names; an axis that it leaves out is 1, or gets what is left of so many devices.

    Raises:
        InputError: it is malformed, or does not divide the devices.
    """
    if devices is None:
        # As many devices as the text asks for: any number that it divides will do to read it.
        data, model = parse_mesh(text, math.prod(int(n) for part in text.split(",") if (n := _size(part))) or 1)
    else:
        data, model = parse_mesh(text, devices)
    return MeshSizes(data, model)


def _size(part: str) -> str | None:
    value = part.partition("=")[2].strip()
    return value if value.isdecimal() and int(value) else None


def _traffic(setting: Setting, programs: dict[str, Program]) -> dict[str, int]:
    """What a device receives per layer: its weights and the moments once, activations along `model` in every batch."""
    mesh, shape = setting.mesh, setting.dense.layers[widest(setting.dense)]
    gathered = setting.layer(setting.dense, RULES.in_use()) - setting.layer(setting.dense)
    width = shape.num_attention_heads * shape.v_head_dim
    kept = setting.pruned.layers[widest(setting.dense)].num_attention_heads * shape.v_head_dim
    gram = 4 * shape.intermediate_size**2 // (1 if setting.one_device else mesh.devices)
    moments = 4 * (kept**2 + kept * width + width**2) + gram
    return {
        "weights": gathered,
        "moments": moments if mesh.devices > 1 else 0,
        "batches": setting.steps * sum(program.collective_bytes for program in programs.values()),
    }


PROGRAM_BYTES = 10**9
"""The interpreter, its libraries and compiled programs: measured at 0.6 GB for a small model, more for large ones."""


def _host_bytes(
    setting: Setting, solving: dict[str, Program], residency: Residency, accelerator: Accelerator | None
) -> int:
    """Of one host: the program, the weights that wait there, and the solves that it does for devices that cannot."""
    layer = setting.layer(setting.dense) * setting.mesh.devices
    weights = {"device": layer, "host": layer * setting.dense.num_layers, "disk": 2 * layer}[residency]
    hosts = 1 if accelerator is None else math.ceil(setting.mesh.devices / accelerator.per_host)
    total = PROGRAM_BYTES + weights // hosts
    if setting.solves:
        return total
    usable = solving if setting.one_device else {"attention solve": solving["attention solve"]}
    return total + max(p.argument_bytes + p.temporary_bytes + p.new_bytes for p in usable.values())


def _disk_bytes(setting: Setting, refine: int) -> dict[str, int]:
    """At most: for a moment the journal has two states of the refinement."""
    learned = sum(math.prod(a.shape) for path, a in abstract_arrays(setting.pruned).items() if path.endswith("_proj"))
    states = 2 * BYTES_LEARNED * learned if refine else 0
    itemsize = jnp.dtype(setting.dtype).itemsize
    stream = setting.samples * setting.seq * setting.dense.hidden_size * itemsize
    return {
        "checkpoint": setting.pruned.total_parameters() * itemsize,
        "journal": setting.pruned.block_parameters() * itemsize + 2 * (1 + setting.dense_targets) * stream + states,
    }


def _cpu_devices(count: int) -> list[Any]:
    """So many devices to compile for; the number is fixed when jax first counts them."""
    with contextlib.suppress(RuntimeError):  # counted already, by whoever uses this as a library
        jax.config.update("jax_num_cpu_devices", max(count, 1))
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"this process has {len(devices)} devices to plan for {count}; plan in a process of its own")
    return devices[:count]
