"""`intraslice eval`: perplexity of a model on a text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tyro.conf import OmitArgPrefixes

from intraslice_jax.commands._types import Checkpoint, Config, Dtype, Files, JsonOutput
from intraslice_jax.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the perplexity of a model on a text.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        text: text files.
        dataset: instead of files, a data set: `NAME` or `NAME:CONFIG`.
        split: which split of the data set; the one the field reports on, `test` mostly, if not given.
        column: which column of the data set holds the text.
        sequence_length: tokens per window; compare only perplexities of the same length.
        windows: how many windows from the start of the text; all if not given.
        batch_size: windows per step, 0 to choose it.
        dtype: dtype of the weights; as stored if not given.
        output: JSON file for the result.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace the JSON file if it exists.
    """

    checkpoint: Checkpoint
    text: Files = ()
    dataset: str | None = None
    split: str | None = None
    column: str = "text"
    sequence_length: int = 2048
    windows: int | None = None
    batch_size: int = 0
    dtype: Dtype | None = None
    output: JsonOutput = None
    config: Config = None
    overwrite: bool = False
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)


def run(options: Options) -> None:
    """Loads, measures, prints."""
    from intraslice_jax.commands._output import (
        check_json_output,
        gibibytes,
        number,
        percent,
        print_table,
        write_json,
    )

    check_json_output(options.output, options.overwrite)

    from intraslice_jax import api
    from intraslice_jax.calibrate.data import text_hash
    from intraslice_jax.environment import peak_rss_bytes
    from intraslice_jax.evaluate.perplexity import perplexity
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.parallel.distributed import is_first
    from intraslice_jax.parallel.mesh import make_mesh
    from intraslice_jax.progress import duration, window_progress
    from intraslice_jax.settings import as_settings

    text = _read(options)
    model = api.load(options.checkpoint, options.dtype, make_mesh(options.parallel.mesh))
    windows = api.text_windows(model, text, options.sequence_length, options.windows)
    with window_progress("evaluating") as on_batch:
        result = perplexity(model, windows, options.batch_size, on_batch)
    facts: dict[str, Any] = {
        **dataclasses.asdict(result),
        "text_sha256": text_hash(text),
        "parameters": model.config.total_parameters(),
        "block_parameters": model.config.block_parameters(),
        "peak_rss_bytes": peak_rss_bytes(),
        "settings": as_settings(options),
        "versions": versions(),
    }
    rows = [
        ["perplexity", f"{result.perplexity:.4f}"],
        ["evaluated tokens", number(result.evaluated_tokens)],
        ["sequence length", number(result.sequence_length)],
        ["parameters", number(facts["parameters"])],
    ]
    if "removed_block_fraction" in model.report:
        rows.append(["removed from blocks", percent(model.report["removed_block_fraction"])])
    rows += [["time", duration(result.seconds)], ["peak memory", gibibytes(facts["peak_rss_bytes"])]]
    print_table(rows)
    if options.output is not None and is_first():
        write_json(options.output, facts)


def _read(options: Options) -> str:
    from intraslice_jax.calibrate.data import read_dataset, read_text
    from intraslice_jax.errors import InputError

    if bool(options.text) == bool(options.dataset):
        raise InputError("give either --text FILE or --dataset NAME, to say what is to be predicted")
    if options.dataset:
        name, _, config = options.dataset.partition(":")
        return read_dataset(name, config or None, options.split, options.column)
    return read_text(options.text)
