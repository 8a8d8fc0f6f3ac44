"""`intraslice bench prune`: how near pruning comes to the arithmetic that it must do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from intraslice_jax.commands._types import Config, Dtype, JsonOutput, Model
from intraslice_jax.config import CalibrationConfig, PruneConfig, window_length


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prune a model without writing it, and compare each stage's time with its floor.

    The floor is the arithmetic that the stage must do, at the matmul rate of this machine in the same process.
    Compilation is shown apart.

    Attributes:
        model: a folder, a hub id, a .gguf file, or a checkpoint.
        layers: only the first so many layers; all if not given.
        dtype: dtype of the weights; as stored if not given.
        output: JSON file for the result.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace the JSON file if it exists.
    """

    model: Model
    layers: int | None = None
    dtype: Dtype | None = None
    output: JsonOutput = None
    config: Config = None
    overwrite: bool = False
    prune: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    calibrate: OmitArgPrefixes[CalibrationConfig] = field(default_factory=CalibrationConfig)


def run(options: Options) -> None:
    """Loads, prunes, prints."""
    from intraslice_jax.commands._output import check_json_output, gibibytes, print_table, write_json

    check_json_output(options.output, options.overwrite)

    import numpy as np

    from intraslice_jax import api
    from intraslice_jax.calibrate.data import encode
    from intraslice_jax.calibrate.sources import read_sources
    from intraslice_jax.calibrate.windows import calibration_windows
    from intraslice_jax.commands._command_line import command_line
    from intraslice_jax.environment import peak_rss_bytes
    from intraslice_jax.evaluate.floor import StageCost, first_layers, measure_pruning
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.settings import as_settings

    calibrate = options.calibrate
    model = api.load(options.model, options.dtype)
    length = window_length(calibrate.sequence_length, model.config.max_position_embeddings)
    shape = (calibrate.samples, length)
    if calibrate.calibration:
        documents = read_sources(calibrate.calibration, calibrate.split, calibrate.column, "--calibration")
        tokenizer = model.require_tokenizer()
        text = documents.rendered(tokenizer)
        calibrate = dataclasses.replace(calibrate, sequence_length=length)
        windows = calibration_windows(tokenizer, text, encode(tokenizer, text.text), calibrate)
    else:
        windows = np.random.default_rng(calibrate.seed).integers(0, model.config.vocab_size, shape, dtype=np.int32)
    if options.layers is not None:
        model = first_layers(model, options.layers)
    cost, pruned = measure_pruning(model, windows, options.prune)

    def row(part: StageCost) -> list[str]:
        floor = [f"{part.flops / 1e9:.1f}", f"{part.floor:.2f} s"] if part.flops else ["", ""]
        ratio = "" if part.ratio is None else f"{part.ratio:.2f}"
        return [part.stage, *floor, f"{part.seconds:.2f} s", ratio, f"{part.compiling:.2f} s"]

    header = ["", "GFLOP", "floor", "measured", "ratio", "compiling, apart"]
    print_table([header, *map(row, cost.stages), *map(row, cost.groups)])
    spread = f"{min(cost.rates) / 1e9:.0f} to {max(cost.rates) / 1e9:.0f}"
    print(f"matmul rate {cost.rate / 1e9:.0f} GFLOP/s (median of {len(cost.rates)}, {spread})")
    print(f"{cost.compilations} programs compiled; peak memory {gibibytes(peak_rss_bytes())}")
    if options.output is not None:
        facts = {
            "stages": [{**dataclasses.asdict(part), "ratio": part.ratio} for part in cost.stages],
            "groups": [{**dataclasses.asdict(part), "ratio": part.ratio} for part in cost.groups],
            "flops_per_second": cost.rate,
            "flops_per_second_samples": cost.rates,
            "compilations": cost.compilations,
            "layers": model.config.num_layers,
            "distinct_layer_shapes": pruned.config.distinct_shapes(),
            "peak_rss_bytes": peak_rss_bytes(),
            "command": command_line("bench prune", options),
            "settings": as_settings(options),
            "versions": versions(),
        }
        write_json(options.output, facts)
