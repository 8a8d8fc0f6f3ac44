"""Zero-shot and few-shot tasks by name, through lm-evaluation-harness (extra `eval`)."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.evaluator
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.tasks import IntraSliceLM

BOOTSTRAP = 1000
"""Resamples for the standard errors of metrics that are not means."""

FEWSHOT_SEED = 1234
"""The harness's own, so that the same examples are drawn."""


@dataclass(frozen=True)
class TaskResult:
    """What a task, or a group of tasks, gave.

    Attributes:
        task: its name.
        items: questions that were answered, None for a group.
        num_fewshot: examples before each question, None for a group.
        version: of the task's definition.
        metrics: by name (`acc`, `acc_norm`, `perplexity`), with the filter's name behind a comma unless it is none.
        standard_errors: of the same names, where they are defined.
    """

    task: str
    items: int | None
    num_fewshot: int | None
    version: str
    metrics: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, Any]:
    """Tasks with their data sets, as the harness's `evaluate` takes them.

    The harness's own thousands of files are read only when a name is not among those of `include_path`.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with task files of one's own, which are stronger.

    Raises:
        InputError: a name is unknown, a task file lacks a field, or a data set cannot be had.
    """
    if not names:
        raise InputError("no task was given; name at least one, for example `tasks=arc_easy,piqa`")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"`include_path={include_path}` is not a folder; give one that holds task files (*.yaml)")
    own = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=own, include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.task_index:
            raise InputError(f"there is no task {name!r}{_nearest(name, manager)}{_unnamed(include_path)}")
        path = manager.task_index[name].yaml_path
        if include_path is not None and path is not None and path.is_relative_to(include_path):
            _check_file(path)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        for kind, found in _load(manager, name).items():
            loaded[kind].update(found)
    return loaded


def run_tasks(
    lm: IntraSliceLM, tasks: Mapping[str, Any], num_fewshot: int | None = None, limit: int | None = None
) -> list[TaskResult]:
    """Asks a model all questions.

    Args:
        lm: the model.
        tasks: from `find_tasks`.
        num_fewshot: examples before each question, None for what the task says (mostly none). A task that fixes
            0 in its file keeps it.
        limit: only the first so many questions of each task.

    Raises:
        InputError: a number is out of range, or a task wants what the model class lacks.
        RunError: a log-likelihood is not finite.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}; leave it out to take all questions")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot must be 0 or more, found {num_fewshot}")
    for task in tasks["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (num_fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with _one_process():
        found: Any = lm_eval.evaluator.evaluate(
            lm=lm, task_dict=dict(tasks), limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAP
        )
    return [_result(name, dict(values), found) for name, values in found["results"].items()]


@contextmanager
def _one_process() -> Iterator[None]:
    """Keeps the harness from forking for its bootstrap, which jax's threads might not survive, and from stdout."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _result(name: str, values: dict[str, Any], found: Mapping[str, Any]) -> TaskResult:
    metrics, errors = {}, {}
    for key, value in values.items():
        metric, _, of_filter = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not of_filter:
            continue
        into, metric = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (metrics, metric)
        into[metric if of_filter == "none" else f"{metric},{of_filter}"] = float(value)
    items = found["n-samples"].get(name, {}).get("effective")
    return TaskResult(name, items, found["n-shot"].get(name), str(found["versions"].get(name, "")), metrics, errors)


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    """One task or group, every failure as an InputError."""
    entry = manager.task_index[name]
    where = f"task {name} ({entry.yaml_path})" if entry.yaml_path else f"task {name}"
    try:
        return dict(manager.load([name]))
    except InputError:
        raise
    except Exception as error:  # a task file is a program; anything may happen in it
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ConnectionError) or type(error).__name__ == "DatasetNotFoundError":
            dataset = (entry.cfg or {}).get("dataset_path", "its data set")
            raise InputError(
                f"{where}: {dataset} cannot be downloaded ({line}); without a network write a task file whose "
                "dataset_path is a local copy and pass its folder as `include_path` (docs/tasks.md)"
            ) from error
        raise InputError(f"{where}: {type(error).__name__}: {line}") from error


def _check_file(path: Path) -> None:
    """Raises InputError that names what a task file lacks: the harness would say so in many ways, or not at all."""
    settings = load_yaml(path, resolve_func=False)
    if "group" in settings or "class" in settings:
        return
    wanted: list[tuple[str, ...]] = [
        ("dataset_path", "custom_dataset"),
        ("doc_to_text", "use_prompt"),
        ("test_split", "validation_split"),
    ]
    if settings.get("output_type") == "multiple_choice":
        wanted.append(("doc_to_choice",))
    if settings.get("output_type") != "loglikelihood_rolling":
        wanted.append(("doc_to_target", "process_results"))
    for fields in wanted:
        if not any(settings.get(name) is not None for name in fields):
            other = "".join(f" (or {name!r})" for name in fields[1:])
            raise InputError(f"task file {path}: field {fields[0]!r} is missing{other}; docs/tasks.md has an example")


def _nearest(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    return f"; did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists those of the harness"


def _unnamed(include_path: Path | None) -> str:
    """A hint at files that define no task: one of them may have been meant."""
    for path in sorted(include_path.rglob("*.yaml")) if include_path is not None else ():
        try:
            settings = load_yaml(path, resolve_func=False)
        except Exception as error:  # not YAML, or an `include` that is not there
            return f"; {path} cannot be read ({' '.join(str(error).split())})"
        if "task" not in settings and "group" not in settings:
            return f"; {path} has no field 'task'"
    return ""
