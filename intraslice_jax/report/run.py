"""A finished run as its folder tells it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intraslice_jax.errors import InputError
from intraslice_jax.reading import parse_json, read_bytes
from intraslice_jax.report.schema import Evaluation, TaskScores, check_evaluation, check_report

log = logging.getLogger(__name__)

REQUIRED = (
    "layers", "dense_layers", "removed_by_layer", "removed_block_fraction", "removed_model_fraction",
    "block_parameters", "total_parameters", "stages",
)  # fmt: skip
"""Without these a report is not of a pruning run."""

EVALUATION, MEASURED = {"parameters", "block_parameters", "settings"}, {"perplexity", "tasks"}
"""A JSON file with all of the first and one of the second is a result of `eval`."""


Key = tuple[str, int, int, bool]


@dataclass
class Perplexity:
    """What was measured on one text, before and after.

    Attributes:
        text: what the user called it.
        sequence_length: tokens per window.
        evaluated_tokens: predicted tokens.
        text_sha256: of the text; only perplexities of the same text, length and number of tokens compare.
        bos: whether each window begins with the BOS token.
        dense, pruned: None where it was not measured.
        losses: in nats by band of positions, of `dense` and of `pruned`.
    """

    text: str
    sequence_length: int
    evaluated_tokens: int
    text_sha256: str
    bos: bool = False
    dense: float | None = None
    pruned: float | None = None
    losses: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What must be equal for two perplexities to compare."""
        return self.text_sha256, self.sequence_length, self.evaluated_tokens, self.bos


@dataclass
class TaskScore:
    """A metric of a task before and after: (value, standard error or None, items or None)."""

    task: str
    metric: str
    dense: tuple[float, float | None, int | None] | None = None
    pruned: tuple[float, float | None, int | None] | None = None


@dataclass(frozen=True)
class Run:
    """A pruning run.

    Attributes:
        name: of the folder.
        report: what the run recorded, checked against `schema.Report`, with the keys of `REQUIRED`.
        perplexities: from the run itself and from what `eval` wrote into the folder.
        tasks: likewise.
    """

    name: str
    report: Mapping[str, Any]
    perplexities: list[Perplexity] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)


def read_run(folder: str | Path) -> Run:
    """Reads what `prune` or `demo` wrote, and the results of `eval` that lie beside it (any `*.json`).

    Which of the two models a result belongs to is told by the number of parameters.

    Raises:
        InputError: the folder is no run, or one of these files is damaged.
    """
    folder = Path(folder)
    report = _report(folder)
    texts, tasks = [], []
    for text, values in report.get("texts", {}).items():
        counts = values["sequence_length"], values["evaluated_tokens"]
        found = Perplexity(text, *counts, values["text_sha256"])
        for which in ("dense", "pruned"):
            _measured(found, which, values[f"{which}_perplexity"], values.get(f"{which}_loss_by_position", {}))
        texts.append(found)
    for path in sorted(folder.glob("*.json")):
        results = _evaluation(path)
        if results is None:
            continue
        which = _which(report, results)
        if which is None:
            log.warning("%s: left out, it measures neither the dense nor the pruned model of this run", path)
            continue
        if "perplexity" in results:
            found = _perplexity(texts, results)
            _measured(found, which, results["perplexity"], results.get("loss_by_position", {}))
        _add_tasks(tasks, results.get("tasks", []), which)
    return Run(folder.resolve().name, report, texts, tasks)


def _report(folder: Path) -> Mapping[str, Any]:
    expected = "give a folder that `intraslice prune` wrote"
    path = folder / "report.json"
    try:
        if not folder.is_dir():
            raise InputError(f"{folder} {'is a file' if folder.is_file() else 'does not exist'}; {expected}")
        if not path.exists():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise InputError(f"{folder} is no run: it has no report.json (it holds {found}); {expected}")
    except OSError as error:  # a name too long, a folder of somebody else
        raise InputError(f"{folder} cannot be read: {error.strerror}; {expected}") from error
    report = parse_json(read_bytes(path, expected), str(path), expected)
    missing = [name for name in REQUIRED if not isinstance(report, dict) or name not in report]
    if missing:
        raise InputError(f"{folder} is no pruning run: its report.json has no {missing[0]!r}; {expected}")
    return check_report(report, path)


def _evaluation(path: Path) -> Evaluation | None:
    """What `eval` wrote, None for any other file."""
    try:
        results = parse_json(read_bytes(path), str(path))
    except InputError:
        return None  # whatever it is, `eval` did not write it: its files appear only when complete
    ours = isinstance(results, dict) and results.keys() >= EVALUATION and not results.keys().isdisjoint(MEASURED)
    return check_evaluation(results, path) if ours else None


def _which(report: Mapping[str, Any], results: Evaluation) -> str | None:
    """`dense` or `pruned`, by the number of parameters; None for another model."""
    for which in ("dense", "pruned"):
        counts = report["block_parameters"][which], report["total_parameters"][which]
        if (results["block_parameters"], results["parameters"]) == counts:
            return which
    return None


def _perplexity(known: list[Perplexity], results: Mapping[str, Any]) -> Perplexity:
    hashed = results["text_sha256"]
    name = results.get("text", f"text {hashed[:8]}")  # early versions did not note the name
    bos = results.get("bos", False)
    name = f"{name} after BOS" if bos else name
    new = Perplexity(name, results["sequence_length"], results["evaluated_tokens"], hashed, bos)
    for perplexity in known:
        if perplexity.key == new.key:
            return perplexity
    known.append(new)
    return new


def _measured(text: Perplexity, which: str, perplexity: float, losses: Mapping[str, float]) -> None:
    setattr(text, which, perplexity)
    text.losses[which] = losses or text.losses.get(which, {})  # older results have none


def _add_tasks(known: list[TaskScore], results: Sequence[TaskScores], which: str) -> None:
    for result in results:
        for metric, value in result["metrics"].items():
            score = next((s for s in known if (s.task, s.metric) == (result["task"], metric)), None)
            if score is None:
                score = TaskScore(result["task"], metric)
                known.append(score)
            setattr(score, which, (value, result["standard_errors"].get(metric), result["items"]))
