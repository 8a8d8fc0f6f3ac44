"""`intraslice convert`: any model as a checkpoint of this program, unpruned."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from intraslice_jax.commands._types import Config, Dtype, Model, Out


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model as a checkpoint, unpruned: Hugging Face or GGUF to Orbax.

    Attributes:
        model: a folder, a hub id or a .gguf file.
        output: the checkpoint folder to write.
        dtype: dtype of the weights; as stored if not given.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
    """

    model: Model
    output: Out
    dtype: Dtype | None = None
    config: Config = None
    overwrite: bool = False


def run(options: Options) -> None:
    """Reads and writes array by array."""
    from intraslice_jax.io.atomic import check_output
    from intraslice_jax.io.memory import return_freed_arrays

    check_output(options.output, options.overwrite)
    return_freed_arrays()

    from intraslice_jax import api
    from intraslice_jax.commands._output import number, print_table
    from intraslice_jax.progress import duration
    from intraslice_jax.settings import as_settings

    started = time.monotonic()
    model = api.open_stored(options.model, options.dtype)
    facts = {
        "parameters": model.config.total_parameters(),
        "block_parameters": model.config.block_parameters(),
        "convert_settings": as_settings(options),
        "convert_seconds": time.monotonic() - started,
    }
    # A checkpoint that is converted again (to another dtype) keeps what its pruning recorded.
    model = dataclasses.replace(model, report={**model.report, **facts})
    api.save(model, options.output, options.overwrite)
    print_table(
        [
            ["written", str(options.output)],
            ["architecture", model.config.model_type],
            ["layers", number(model.config.num_layers)],
            ["parameters", number(facts["parameters"])],
            ["in blocks", number(facts["block_parameters"])],
            ["time", duration(time.monotonic() - started)],
        ]
    )
