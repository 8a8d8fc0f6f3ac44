"""A finished run as its folder tells it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intraslice_jax.errors import InputError

log = logging.getLogger(__name__)

REQUIRED = ("layers", "dense_layers", "removed_by_layer", "removed_block_fraction", "block_parameters", "stages")


@dataclass
class Perplexity:
    """What was measured on one text, before and after.

    Attributes:
        text: what the user called it.
        sequence_length: tokens per window.
        evaluated_tokens: predicted tokens.
        text_sha256: of the text; only perplexities of the same text, length and number of tokens compare.
        dense, pruned: None where it was not measured.
    """

    text: str
    sequence_length: int
    evaluated_tokens: int
    text_sha256: str
    dense: float | None = None
    pruned: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """What must be equal for two perplexities to compare."""
        return self.text_sha256, self.sequence_length, self.evaluated_tokens


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
        report: what the run recorded.
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
        InputError: the folder is no run.
    """
    folder = Path(folder)
    report = _report(folder)
    found = Run(folder.resolve().name, report)
    for text, values in report.get("texts", {}).items():
        found.perplexities.append(
            Perplexity(
                text,
                values["sequence_length"],
                values["evaluated_tokens"],
                values["text_sha256"],
                values["dense_perplexity"],
                values["pruned_perplexity"],
            )
        )
    for path in sorted(folder.glob("*.json")):
        results = _evaluation(path)
        if not results:
            continue
        which = _which(report, results)
        if which is None:
            log.warning("%s: left out, it measures neither the dense nor the pruned model of this run", path)
            continue
        if "perplexity" in results:
            setattr(_perplexity(found.perplexities, results), which, results["perplexity"])
        _add_tasks(found.tasks, results.get("tasks", []), which)
    return found


def _report(folder: Path) -> dict[str, Any]:
    expected = "give a folder that `intraslice prune` wrote"
    if not folder.is_dir():
        raise InputError(f"{folder} {'is a file' if folder.is_file() else 'does not exist'}; {expected}")
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise InputError(f"{folder} is no run: it has no report.json (it holds {found}); {expected}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}); {expected}") from error
    missing = [name for name in REQUIRED if not isinstance(report, dict) or name not in report]
    if missing:
        raise InputError(f"{folder} is no pruning run: its report.json has no {missing[0]!r}; {expected}")
    return report


def _evaluation(path: Path) -> dict[str, Any]:
    """What `eval` wrote, {} for any other file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_evaluation = isinstance(results, dict) and {"parameters", "block_parameters", "settings"} <= results.keys()
    return results if is_evaluation and isinstance(results["block_parameters"], int) else {}


def _which(report: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    """`dense` or `pruned`, by the number of parameters; None for another model."""
    for which in ("dense", "pruned"):
        counts = report["block_parameters"][which], report["total_parameters"][which]
        if (results.get("block_parameters"), results.get("parameters")) == counts:
            return which
    return None


def _perplexity(known: list[Perplexity], results: Mapping[str, Any]) -> Perplexity:
    new = Perplexity(results["text"], results["sequence_length"], results["evaluated_tokens"], results["text_sha256"])
    for perplexity in known:
        if perplexity.key == new.key:
            return perplexity
    known.append(new)
    return new


def _add_tasks(known: list[TaskScore], results: list[dict[str, Any]], which: str) -> None:
    for result in results:
        for metric, value in result["metrics"].items():
            score = next((s for s in known if (s.task, s.metric) == (result["task"], metric)), None)
            if score is None:
                score = TaskScore(result["task"], metric)
                known.append(score)
            setattr(score, which, (value, result["standard_errors"].get(metric), result["items"]))
