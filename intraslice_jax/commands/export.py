"""`intraslice export`: a folder or file that other programs load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intraslice_jax.commands._types import Checkpoint, Config, Out


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model for PyTorch or llama.cpp.

    A pruned model loads with `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)`. An unpruned one, and
    one pruned with `--layout uniform`, is an ordinary checkpoint that needs no `trust_remote_code`.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        output: the folder to write; a file OUT.gguf for the format `gguf`, with OUT.gguf.json beside it.
        format: `hf` is a Hugging Face folder; `padded` one in the original shapes, with zeros where something was
            pruned, for programs that know only the stock class; `gguf` a file for llama.cpp. If not given: `gguf` for
            a name that ends in .gguf, else `hf`.
        dtype: dtype of the written weights, `q8_0` for `gguf` only; as stored if not given.
        max_shard_size: above this size the weights of a folder are split over several files.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
    """

    checkpoint: Checkpoint
    output: Out
    format: Literal["hf", "padded", "gguf"] | None = None
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    max_shard_size: str = "5GB"
    config: Config = None
    overwrite: bool = False


def run(options: Options) -> None:
    """Reads and writes tensor by tensor."""
    from intraslice_jax.convert.formats import format_of
    from intraslice_jax.io.atomic import check_file, check_output
    from intraslice_jax.io.memory import return_freed_arrays

    is_file = format_of(options.output, options.format) == "gguf"
    facts_at = Path(f"{options.output}.json") if is_file else options.output / "export.json"
    (check_file if is_file else check_output)(options.output, options.overwrite)
    if is_file:
        check_file(facts_at, options.overwrite)
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
        format=options.format,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    files = [options.output] if is_file else options.output.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    facts = {
        "parameters": model.config.total_parameters(),
        "weight_bytes": size,
        "seconds": time.monotonic() - started,
        "settings": as_settings(options),
        "versions": versions(),
    }
    write_json(facts_at, facts)
    print_table(
        [
            ["written", str(options.output)],
            ["parameters", number(facts["parameters"])],
            ["weights", f"{size / 1e6:,.1f} MB"],
        ]
    )
