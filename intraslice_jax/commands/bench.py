"""`intraslice bench`: how fast a model is, beside another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from intraslice_jax.commands._types import Checkpoint, Config, Dtype, JsonOutput

PHASES = {"prefill": "prefill", "decode": "decode, one token"}
PARTS = {"model": "whole model", "layers": "all decoder layers", "layer": "decoder layer {}"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure prefill and decode speed, memory and arithmetic of a model; `bench prune` measures pruning.

    With --against two models take turns, on the same random tokens, and ratios are printed.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        against: the model to compare with, such as the one that was pruned.
        batch_size: sequences at once.
        context: tokens of a sequence; the paper's 4096, or the model's maximum if that is less, if not given.
        layer: the decoder layer measured by itself; that with the median number of parameters if not given.
        repeats: how often everything is measured; medians are printed.
        seed: of the random tokens.
        dtype: dtype of the weights; as stored if not given.
        output: JSON file for the result.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace the JSON file if it exists.
    """

    checkpoint: Checkpoint
    against: Annotated[str | None, arg(metavar="CHECKPOINT")] = None
    batch_size: int = 1
    context: int | None = None
    layer: int | None = None
    repeats: int = 5
    seed: int = 0
    dtype: Dtype | None = None
    output: JsonOutput = None
    config: Config = None
    overwrite: bool = False


def run(options: Options) -> None:
    """Loads, measures, prints."""
    from intraslice_jax.commands._output import check_json_output, print_table, say, write_json

    check_json_output(options.output, options.overwrite)

    import jax

    from intraslice_jax import api
    from intraslice_jax.commands._command_line import command_line
    from intraslice_jax.environment import peak_rss_bytes
    from intraslice_jax.evaluate.speed import Workload, common_context, measure_speed, middle_layer
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.settings import as_settings

    sources = {"against": options.against, "model": options.checkpoint}
    models = {name: api.load(path, options.dtype) for name, path in sources.items() if path is not None}
    context = common_context([model.config for model in models.values()], options.context)
    layer = middle_layer(models["model"].config) if options.layer is None else options.layer
    work = Workload(options.batch_size, context, layer, options.repeats, options.seed)
    measured = measure_speed(models, work)
    device = jax.local_devices()[0]
    print(f"batch {work.batch}, context {work.context}, {device.device_kind}, medians of {work.repeats} rounds")
    print_table(_rows(measured, sources, layer))
    if options.against is None and models["model"].report.get("removed_block_fraction"):
        say("pass --against MODEL, the model before pruning, for ratios")
    if options.output is not None:
        facts = {
            "batch_size": work.batch,
            "context": work.context,
            "layer": layer,
            "device": device.device_kind,
            "platform": device.platform,
            "models": {name: {"source": sources[name], **found} for name, found in measured.items()},
            "ratios": _ratios(measured),
            "peak_rss_bytes": peak_rss_bytes(),
            "command": command_line("bench", options),
            "settings": as_settings(options),
            "versions": versions(),
        }
        write_json(options.output, facts)


def _rows(measured: dict[str, Any], sources: dict[str, str | None], layer: int) -> list[list[str]]:
    from intraslice_jax.commands._output import number

    both = len(measured) > 1
    names = {"against": "against", "model": "model"}
    rows = [["", *(names[name] for name in measured), *(["ratio"] if both else [])]]

    def row(label: str, values: list[Any], show: Any, faster: bool = False) -> None:
        cells = [label, *(show(value) for value in values)]
        if both:
            cells.append(_faster(values[0] / values[1]) if faster else f"{values[1] / values[0]:.3f}")
        rows.append(cells)

    for phase, phase_label in PHASES.items():
        for part, label in PARTS.items():
            values = [found["seconds"][phase][part] for found in measured.values()]
            row(f"{phase_label}, {label.format(layer)}", values, lambda s: f"{1e3 * s:.2f} ms", faster=True)
    for phase in PHASES:
        values = [found["flops"][phase]["layers"] for found in measured.values()]
        row(f"{phase}, FLOPs of the layers", values, lambda n: f"{n / 1e9:.3f} G")
    for key in ("parameters", "block_parameters"):
        row(key.replace("_", " "), [found[key] for found in measured.values()], number)
    for key, label in (
        ("weight_bytes", "weights"),
        ("block_bytes", "weights of the layers"),
        ("cache_bytes", "KV cache"),
    ):
        row(label, [found[key] for found in measured.values()], lambda n: f"{n / 2**20:.1f} MiB")
    return rows


def _faster(ratio: float) -> str:
    return f"{ratio:.2f} x faster" if ratio >= 1 else f"{1 / ratio:.2f} x slower"


def _ratios(measured: dict[str, Any]) -> dict[str, Any]:
    """What of the other model's time, arithmetic and memory the model needs; empty without another one.

    `saved_time_by_saved_flops` is 1 where the layers' time falls as much as their arithmetic.
    """
    if len(measured) < 2:
        return {}
    before, after = measured["against"], measured["model"]

    def ratios(key: str) -> dict[str, Any]:
        return {
            phase: {part: after[key][phase][part] / before[key][phase][part] for part in before[key][phase]}
            for phase in before[key]
        }

    seconds, flops = ratios("seconds"), ratios("flops")
    saved = {
        phase: {
            part: (1 - seconds[phase][part]) / (1 - flops[phase][part]) if flops[phase][part] < 1 else None
            for part in seconds[phase]
        }
        for phase in seconds
    }
    sizes = ("parameters", "block_parameters", "weight_bytes", "block_bytes", "cache_bytes")
    return {
        "seconds": seconds,
        "flops": flops,
        "saved_time_by_saved_flops": saved,
        **{key: after[key] / before[key] for key in sizes},
    }
