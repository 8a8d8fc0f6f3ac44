"""`intraslice plan`: what a pruning run needs, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from intraslice_jax.commands._types import Config, Dtype, JsonOutput, Model
from intraslice_jax.config import DEFAULT_PRESET, check_refine, preset, window_length

if TYPE_CHECKING:
    from intraslice_jax.planning.devices import Accelerator
    from intraslice_jax.planning.stages import Rates


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a pruning run needs per device, from the model's configuration alone.

    Attributes:
        model: a folder with config.json, a .gguf file, a hub id, or a ready name such as llama-2-70b.
        devices: what the run would have, such as v5e-16, v5p-64 or 8xH100; sets memory and rates.
        mesh: `data=D,model=M`; these devices need not exist. With `--devices` the first mesh that fits if not given.
        device_memory: of one device, such as 16GiB; without it and `--devices` nothing is refused.
        flops: operations per second of one device, for the time, or `measured` for those of this machine, which are
            also taken if neither this nor `--devices` is given; with `--devices` an assumed share of the peak.
        residency: where the weights wait: all on the devices, in host memory or in their files; then a device holds
            one layer and the next.
        preset: of `prune`; says the ratios and the refinement that are not given.
        ratios: as for `prune`; those of a file count as uniform ones.
        refine: passes of the refinement, as for `prune`; it needs all weights on the devices.
        dense_targets: as for `prune`; above 0 the dense model's stream and further moments are held.
        sparsity, samples, sequence_length, memory_budget: as for `prune`.
        dtype: of the weights.
        output: JSON file to write the plan to.
        overwrite: replace it if it exists.
        config: YAML file with any of these options; the command line is stronger.
    """

    model: Model
    devices: str | None = None
    mesh: str | None = None
    device_memory: str | None = None
    flops: str | None = None
    residency: Literal["device", "host", "disk"] = "device"
    preset: Literal["fast", "paper", "quality"] = DEFAULT_PRESET
    sparsity: float = 0.3
    ratios: str | None = None
    refine: int | None = None
    dense_targets: float = 0.0
    samples: int = 128
    sequence_length: int | None = None
    memory_budget: int = 512 * 2**20
    dtype: Dtype = "bfloat16"
    output: JsonOutput = None
    overwrite: bool = False
    config: Config = None


def run(options: Options) -> None:
    """Compiles, adds up, prints."""
    from intraslice_jax.commands._output import check_json_output, write_json

    check_json_output(options.output, options.overwrite)
    named = preset(options.preset)
    ratios = named.ratios if options.ratios is None else options.ratios
    refine = named.refine if options.refine is None else options.refine
    check_refine(refine, options.residency)

    from intraslice_jax.convert.shards import parse_size
    from intraslice_jax.planning.describe import describe
    from intraslice_jax.planning.devices import parse_devices
    from intraslice_jax.planning.fitting import find_fit, refuse
    from intraslice_jax.planning.plan import Run, make_plan, mesh_sizes

    accelerator, count = (None, None) if options.devices is None else parse_devices(options.devices)
    memory = None if accelerator is None else accelerator.memory
    if options.device_memory is not None:
        memory = parse_size(options.device_memory)
    sizes = mesh_sizes(options.mesh or (f"data={count}" if count else "data=1"), count)
    model = describe(options.model)
    setting = Run(
        f"data={sizes.data},model={sizes.model}",
        options.residency,
        options.samples,
        window_length(options.sequence_length, model.max_position_embeddings),
        options.memory_budget,
        options.dtype,
        options.sparsity,
        ratios,
        refine,
        options.dense_targets,
    )
    rates = _rates(options.flops, accelerator)
    plan = None
    if options.mesh is None and count and memory is not None:
        plan = find_fit(model, setting, count, memory, (options.residency,), rates, accelerator)
    plan = plan or make_plan(model, setting, rates, accelerator)
    if memory is not None:
        refuse(options.model, model, plan, memory, accelerator)
    _print(plan)
    if options.devices is None and options.flops in (None, "measured"):
        print("times are those of this machine's processors; compilation, reading and writing are left out")
    if options.output is not None:
        write_json(options.output, plan)


def _rates(given: str | None, accelerator: Accelerator | None) -> Rates:
    from intraslice_jax.errors import InputError
    from intraslice_jax.planning.estimate import EFFICIENCY
    from intraslice_jax.planning.stages import Rates, measured_rate

    if given is None and accelerator is not None:
        return Rates.of(accelerator)
    try:
        rate = EFFICIENCY * measured_rate() if given in (None, "measured") else float(given)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise InputError(f"--flops takes operations per second such as 1e14, or measured; found {given!r}")
    return Rates(rate, rate, rate)


def _print(plan: dict[str, Any]) -> None:
    from intraslice_jax.commands._output import gibibytes, number, print_table
    from intraslice_jax.progress import duration

    run, traffic, disk = plan["run"], plan["collective_bytes_per_layer"], plan["disk_bytes"]
    print_table(
        [
            [f"per device, at its peak ({plan['peak_phase']})", ""],
            *([name, gibibytes(size)] for name, size in plan["parts"].items()),
            ["together", gibibytes(plan["device_bytes"])],
        ]
    )
    print(f"{run['mesh']}, residency {run['residency']}; {number(plan['parameters'])} parameters")
    flops, seconds = plan["flops_per_device"], plan.get("seconds_by_stage", {})
    print_table(
        [
            ["per device", "FLOPs", *(["time"] if seconds else [])],
            *([name, f"{n:.3g}", *([duration(seconds[name])] if seconds else [])] for name, n in flops.items()),
            ["together", f"{sum(flops.values()):.3g}", *([duration(plan["seconds"])] if seconds else [])],
        ]
    )
    print("received per layer: " + ", ".join(f"{name} {gibibytes(size)}" for name, size in traffic.items()))
    print(
        f"host memory {gibibytes(plan['host_bytes'])}, checkpoint {gibibytes(disk['checkpoint'])}, "
        f"journal {gibibytes(disk['journal'])}"
    )
    shapes, compiled = plan["distinct_layer_shapes"], plan["compiled_programs"]
    print(
        f"layer shapes: {shapes['dense']} before, at least {shapes['pruned']} after; {compiled['least']} to "
        f"{compiled['most']} programs to compile"
    )
