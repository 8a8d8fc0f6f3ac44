"""`intraslice eval`: perplexity of a model on a text, and tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from intraslice_jax.commands._types import Checkpoint, Config, Dtype, Files, JsonOutput, Names
from intraslice_jax.config import ParallelConfig

if TYPE_CHECKING:
    from intraslice_jax.calibrate.sources import EvaluationSource, EvaluationText
    from intraslice_jax.evaluate.harness import TaskResult
    from intraslice_jax.evaluate.perplexity import PerplexityResult
    from intraslice_jax.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model: its perplexity on a text, its answers to tasks, or both.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        text: text files.
        dataset: instead of files, a data set: wikitext2, c4, ptb or alpaca (prepared as the field does), `NAME` or
            `NAME:CONFIG`; `NAME@FOLDER` reads a local copy of a well-known one.
        split: which split of the data set; the one the field reports on, `test` mostly, if not given.
        column: which column of the data set, or field of a file, holds the text.
        sequence_length: tokens per window; 2,048, or the model's context where that is shorter, if not given. Compare
            only perplexities of the same length.
        windows: how many windows from the start of the text; all if not given.
        bos: begin each window with the BOS token, as prompts do, in place of its first one.
        tasks: names of lm-evaluation-harness, such as arc_easy,piqa (needs the extra `eval`).
        num_fewshot: examples before each question; what the task says if not given, mostly none.
        limit: only the first so many questions of each task.
        include_path: a folder with task files of your own.
        batch_size: windows, or texts of a task, per step; 0 to choose it.
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
    sequence_length: int | None = None
    windows: int | None = None
    bos: bool = False
    tasks: Names = ()
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    batch_size: int = 0
    dtype: Dtype | None = None
    output: JsonOutput = None
    config: Config = None
    overwrite: bool = False
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)


def run(options: Options) -> None:
    """Loads, measures, prints."""
    from intraslice_jax.commands._output import check_json_output, gibibytes, number, percent, print_table, write_json

    check_json_output(options.output, options.overwrite)
    _check(options)

    from intraslice_jax import api
    from intraslice_jax.calibrate.data import text_hash
    from intraslice_jax.environment import peak_rss_bytes
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.parallel.distributed import is_first
    from intraslice_jax.parallel.mesh import make_mesh
    from intraslice_jax.report.schema import VERSION
    from intraslice_jax.settings import as_settings

    source = _read(options)
    tasks = _find_tasks(options)  # unknown names are found before the model is loaded
    model = api.load(options.checkpoint, options.dtype, make_mesh(options.parallel.mesh))
    facts: dict[str, Any] = {}
    rows: list[list[str]] = []
    if source is not None:
        text = source.rendered(model.require_tokenizer())
        measured = _perplexity(model, text, options)
        facts |= {**dataclasses.asdict(measured), "text": text.name, "text_sha256": text_hash(text.text)}
        facts["bos"] = options.bos
        rows += _perplexity_rows(measured)
    results: list[TaskResult] = []
    if tasks is not None:
        results = _answer(model, tasks, options)
        facts["tasks"] = [dataclasses.asdict(result) for result in results]
    facts |= {
        "format_version": VERSION,
        "parameters": model.config.total_parameters(),
        "block_parameters": model.config.block_parameters(),
        "peak_rss_bytes": peak_rss_bytes(),
        "settings": as_settings(options),
        "versions": versions(),
    }
    rows.append(["parameters", number(facts["parameters"])])
    if "removed_block_fraction" in model.report:
        rows.append(["removed from blocks", percent(model.report["removed_block_fraction"])])
    rows.append(["peak memory", gibibytes(facts["peak_rss_bytes"])])
    print_table(rows)
    if results:
        print()
        print_table([["task", "items", "shots", "metric", "value", "±"], *_task_rows(results)])
    if options.output is not None and is_first():
        write_json(options.output, facts)


def _check(options: Options) -> None:
    from intraslice_jax.errors import InputError

    if not (options.text or options.dataset or options.tasks):
        raise InputError("give --text FILE or --dataset NAME to measure perplexity, or --tasks NAME,NAME")
    for name in ("num_fewshot", "limit", "include_path"):
        if getattr(options, name) is not None and not options.tasks:
            raise InputError(f"--{name.replace('_', '-')} belongs to --tasks, which is missing")


def _read(options: Options) -> EvaluationSource | None:
    from intraslice_jax.calibrate.sources import read_evaluation

    if not (options.text or options.dataset):
        return None
    return read_evaluation(options.text, options.dataset, options.split, options.column, options.windows)


def _perplexity(model: LanguageModel, source: EvaluationText, options: Options) -> PerplexityResult:
    from intraslice_jax import api
    from intraslice_jax.evaluate.perplexity import perplexity
    from intraslice_jax.progress import window_progress

    windows = api.text_windows(model, source.text, options.sequence_length, source.windows, options.bos)
    with window_progress("evaluating") as on_batch:
        return perplexity(model, windows, options.batch_size, on_batch)


def _perplexity_rows(result: PerplexityResult) -> list[list[str]]:
    from intraslice_jax.commands._output import number
    from intraslice_jax.progress import duration

    return [
        ["perplexity", f"{result.perplexity:.4f}"],
        ["evaluated tokens", number(result.evaluated_tokens)],
        ["sequence length", number(result.sequence_length)],
        *([f"loss after {band} tokens", f"{loss:.4f}"] for band, loss in result.loss_by_position.items()),
        ["time", duration(result.seconds)],
    ]


def _find_tasks(options: Options) -> dict[str, Any] | None:
    if not options.tasks:
        return None
    from intraslice_jax.errors import InputError

    try:
        from intraslice_jax.evaluate.harness import find_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("intraslice_jax"):
            raise
        raise InputError(
            f"--tasks needs lm-evaluation-harness ({error.name} is not installed); "
            "pip install -e '.[eval]' in a clone of this program"
        ) from error
    return find_tasks(options.tasks, options.include_path)


def _answer(model: LanguageModel, tasks: dict[str, Any], options: Options) -> list[TaskResult]:
    from intraslice_jax.evaluate.harness import run_tasks
    from intraslice_jax.evaluate.tasks import IntraSliceLM
    from intraslice_jax.progress import window_progress

    with window_progress("answering") as on_batch:
        lm = IntraSliceLM(model, options.batch_size, on_batch=on_batch)
        return run_tasks(lm, tasks, options.num_fewshot, options.limit)


def _task_rows(results: list[TaskResult]) -> list[list[str]]:
    rows = []
    for result in results:
        for i, (metric, value) in enumerate(result.metrics.items()):
            error = result.standard_errors.get(metric)
            counts = ["" if i or n is None else str(n) for n in (result.items, result.num_fewshot)]
            shown = "" if error is None else f"{error:.4f}"
            rows.append(["" if i else result.task, *counts, metric, f"{value:.4f}", shown])
    return rows
