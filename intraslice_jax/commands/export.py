"""`intraslice export`: a folder that PyTorch programs load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from intraslice_jax.commands._types import Checkpoint, Config, Dtype, Out


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model as a Hugging Face folder for PyTorch.

    A pruned model loads with `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)`; an unpruned one
    is an ordinary checkpoint of its family.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        output: the folder to write.
        format: `hf` is a Hugging Face folder.
        dtype: dtype of the written weights; as stored if not given.
        max_shard_size: above this size the weights are split over several files.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
    """

    checkpoint: Checkpoint
    output: Out
    format: Literal["hf"] = "hf"
    dtype: Dtype | None = None
    max_shard_size: str = "5GB"
    config: Config = None
    overwrite: bool = False


def run(options: Options) -> None:
    """Reads and writes tensor by tensor."""
    from intraslice_jax.io.atomic import check_output
    from intraslice_jax.io.memory import return_freed_arrays

    check_output(options.output, options.overwrite)
    return_freed_arrays()

    from intraslice_jax import api
    from intraslice_jax.commands._output import number, print_table, write_json
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.settings import as_settings

    started = time.monotonic()
    model = api.open_stored(options.checkpoint)
    api.export(
        model,
        options.output,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    size = sum(file.stat().st_size for file in options.output.glob("*.safetensors"))
    facts = {
        "parameters": model.config.total_parameters(),
        "weight_bytes": size,
        "seconds": time.monotonic() - started,
        "settings": as_settings(options),
        "versions": versions(),
    }
    write_json(options.output / "export.json", facts)
    print_table(
        [
            ["written", str(options.output)],
            ["parameters", number(facts["parameters"])],
            ["weights", f"{size / 1e6:,.1f} MB"],
        ]
    )
