"""Several pruning methods on the same calibration and the same evaluation windows."""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.model import LanguageModel
from intraslice_jax.prune.allocation import UnitScores, allocate
from intraslice_jax.prune.baselines.slicegpt import prune_slicegpt
from intraslice_jax.prune.budget import LayerRatios
from intraslice_jax.prune.estimators import check_ratios, find_estimator
from intraslice_jax.prune.methods import METHODS, SLICEGPT, check_name
from intraslice_jax.prune.pipeline import prune_model

BIASES = "+biases"
"""Ending of a method's name that turns on `output_biases`: `flap+biases`."""


@dataclass(frozen=True)
class Trial:
    """One pruned model to be measured: what it is called in the table, and how it is made."""

    method: str
    config: PruneConfig

    @property
    def ratios(self) -> str:
        """The estimator; SliceGPT has one width for the whole model and needs none."""
        return "" if self.config.method == SLICEGPT else self.config.ratios


@dataclass(frozen=True)
class Row:
    """What one trial gave.

    Attributes:
        method: as the user named it, or `dense`.
        ratios: the estimator of ratios per layer, empty where the method takes none.
        sparsity: what was asked for.
        removed_block_fraction: of the parameters of the decoder layers, all that the method adds counted in.
        removed_model_fraction: of all parameters; negative where the model grew.
        perplexity: on the evaluation windows, None after a failure.
        evaluated_tokens: predicted tokens, 0 after a failure.
        prune_seconds, evaluate_seconds: wall time; estimating the ratios counts in every row that uses them.
        error: why there is no perplexity, else empty.
    """

    method: str
    ratios: str
    sparsity: float
    removed_block_fraction: float | None
    removed_model_fraction: float | None
    perplexity: float | None
    evaluated_tokens: int
    prune_seconds: float
    evaluate_seconds: float
    error: str = ""


def plan_trials(
    methods: Sequence[str], sparsities: Sequence[float], ratios: Sequence[str], settings: PruneConfig
) -> list[Trial]:
    """Every method at every sparsity with every estimator, checked before anything runs.

    Args:
        methods: names of methods, `slicegpt` among them, each perhaps with `+biases`.
        sparsities: fractions to remove.
        ratios: names of estimators or files of ratios.
        settings: everything else.

    Raises:
        InputError: a name is unknown, a sparsity out of range, or a list empty.
    """
    for name, given in (("methods", methods), ("sparsity", sparsities), ("ratios", ratios)):
        if not given:
            raise InputError(f"{name} is empty; give at least one")
    for name in ratios:
        find_estimator(name)
    trials = []
    for method in dict.fromkeys(methods):
        base, biases, _ = method.partition(BIASES)
        check_name(base, [*METHODS, SLICEGPT])
        if method != base + biases or (biases and base == SLICEGPT):
            raise InputError(f"there is no method {method!r}; {BIASES} ends the name of {', '.join(METHODS)}")
        for sparsity in dict.fromkeys(sparsities):
            for name in ratios[:1] if base == SLICEGPT else dict.fromkeys(ratios):
                biased = bool(biases) or settings.output_biases
                changes = {"method": base, "sparsity": sparsity, "ratios": name, "output_biases": biased}
                trials.append(Trial(method, dataclasses.replace(settings, **changes)))
    return trials


def compare(
    model: LanguageModel,
    calibration: Int[np.ndarray, "samples seq"],
    evaluation: Int[np.ndarray, "windows seq"],
    trials: Sequence[Trial],
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measures the dense model and every trial; one that fails leaves a row with the reason.

    Args:
        model: dense.
        calibration: int32 windows that every method is calibrated on.
        evaluation: int32 windows that every perplexity is measured on.
        trials: from `plan_trials`.
        on_row: called with each row as soon as it is there, the dense model's first.

    Raises:
        InputError: the windows do not fit the model.
        RunError: the dense model's loss is not finite.
    """
    result = perplexity(model, evaluation)
    rows = [Row("dense", "", 0.0, 0.0, 0.0, result.perplexity, result.evaluated_tokens, 0.0, result.seconds)]
    if on_row is not None:
        on_row(rows[0])
    ratios = _Ratios(model, calibration)
    for trial in trials:
        rows.append(_measure(model, calibration, evaluation, trial, ratios))
        if on_row is not None:
            on_row(rows[-1])
    return rows


class _Ratios:
    """Ratios per layer, with the scores of units estimated once and allocated anew for every sparsity."""

    def __init__(self, model: LanguageModel, calibration: np.ndarray) -> None:
        self._model = model
        self._calibration = calibration
        self._scores: dict[str, tuple[UnitScores, float]] = {}

    def of(self, config: PruneConfig) -> tuple[LayerRatios, float]:
        """The ratios that a configuration names, and what estimating them takes in seconds."""
        started = time.monotonic()
        if config.ratios not in self._scores:
            with jax.default_matmul_precision("highest"):
                found = find_estimator(config.ratios)(self._model, self._calibration, config)
            if isinstance(found, LayerRatios):
                check_ratios(found, self._model.config, config, config.ratios)
                return found, time.monotonic() - started
            self._scores[config.ratios] = found, time.monotonic() - started
        scores, seconds = self._scores[config.ratios]
        return allocate(self._model.config, scores, config), seconds


def _measure(
    model: LanguageModel, calibration: np.ndarray, evaluation: np.ndarray, trial: Trial, ratios: _Ratios
) -> Row:
    config, started = trial.config, time.monotonic()
    row = Row(trial.method, trial.ratios, config.target_sparsity, None, None, None, 0, 0.0, 0.0)
    try:
        if config.method == SLICEGPT:
            pruned, estimated = prune_slicegpt(model, calibration, config), 0.0
        else:
            found, estimated = ratios.of(config)
            started = time.monotonic()
            pruned = prune_model(model, calibration, config, ratios=found)
        row = dataclasses.replace(
            row,
            removed_block_fraction=pruned.report["removed_block_fraction"],
            removed_model_fraction=pruned.report["removed_model_fraction"],
            prune_seconds=estimated + time.monotonic() - started,
        )
        result = perplexity(pruned, evaluation)
    except Exception as error:  # whatever it is, the other methods' results are worth having
        reason = " ".join(str(error).split()) or type(error).__name__
        return dataclasses.replace(row, error=reason, prune_seconds=row.prune_seconds or time.monotonic() - started)
    return dataclasses.replace(
        row,
        perplexity=result.perplexity,
        evaluated_tokens=result.evaluated_tokens,
        evaluate_seconds=result.seconds,
    )


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()
