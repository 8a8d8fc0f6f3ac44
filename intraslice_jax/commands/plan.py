"""`intraslice plan`: what a pruning run needs, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intraslice_jax.commands._types import Config, Dtype, JsonOutput, Model


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a pruning run needs per device, from the model's configuration alone.

    Attributes:
        model: a folder with config.json, a .gguf file, or a ready name such as llama-2-70b.
        mesh: `data=D,model=M`; these devices need not exist.
        device_memory: of one device, such as 16GiB; without it nothing is refused.
        flops: floating-point operations per second of one device, for an estimate of the time.
        residency: where the weights wait: all on the devices, or one layer and the next.
        samples: calibration windows.
        sequence_length: tokens per window.
        memory_budget: as for `prune`.
        dtype: of the weights.
        output: JSON file to write the plan to.
        overwrite: replace it if it exists.
        config: YAML file with any of these options; the command line is stronger.
    """

    model: Model
    mesh: str = "data=1"
    device_memory: str | None = None
    flops: float | None = None
    residency: Literal["device", "host", "disk"] = "device"
    samples: int = 128
    sequence_length: int = 2048
    memory_budget: int = 512 * 2**20
    dtype: Dtype = "bfloat16"
    output: JsonOutput = None
    overwrite: bool = False
    config: Config = None


def run(options: Options) -> None:
    """Compiles, adds up, prints."""
    from intraslice_jax.commands._output import check_json_output, gibibytes, print_table, write_json

    check_json_output(options.output, options.overwrite)

    from intraslice_jax.convert.shards import parse_size
    from intraslice_jax.errors import InputError
    from intraslice_jax.planning.describe import describe
    from intraslice_jax.planning.plan import Run, make_plan
    from intraslice_jax.progress import duration

    memory = None if options.device_memory is None else parse_size(options.device_memory)
    setting = Run(
        options.mesh,
        options.residency,
        options.samples,
        options.sequence_length,
        options.memory_budget,
        options.dtype,
        options.flops,
    )
    plan = make_plan(describe(options.model), setting)
    if memory is not None and plan["device_bytes"] > memory:
        fits = [name for name, size in plan["device_bytes_by_residency"].items() if size <= memory]
        remedy = f"--residency {fits[0]} fits" if fits else "more devices, or fewer --samples, are needed"
        raise InputError(
            f"{options.model} needs {gibibytes(plan['device_bytes'])} per device on {options.mesh} with residency "
            f"{options.residency}, a device has {gibibytes(memory)}; {remedy}"
        )
    print_table([["per device", ""], *([name, gibibytes(size)] for name, size in plan["parts"].items())])
    print(f"{gibibytes(plan['device_bytes'])} per device, without the solves; {plan['flops_per_device']:.3g} FLOPs")
    if plan["seconds"] is not None:
        print(f"about {duration(plan['seconds'])} in the passes over the text")
    if options.output is not None:
        write_json(options.output, plan)
