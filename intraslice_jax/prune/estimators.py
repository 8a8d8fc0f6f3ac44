"""Estimators of how much each layer can lose, by name (docs/method.md section 4).

A new estimator is one class, or one function, that follows `Estimator`; `ESTIMATORS[name] = MyEstimator()` makes it
known to `--ratios name`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import yaml
from jaxtyping import Float, Int

from intraslice_jax.calibrate.gradients import GroupGradients, OnBatch, group_gradients, head_grams
from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.model import LanguageModel
from intraslice_jax.prune.allocation import UnitScores, allocate, allocate_evenly
from intraslice_jax.prune.budget import LayerRatios
from intraslice_jax.prune.linalg import eigh_descending, solver_precision, to_solver
from intraslice_jax.prune.sensitivity import KLSensitivity
from intraslice_jax.settings import closest

DEGENERATE = 1e-6
"""Eigenvalues closer than this times the largest count as equal: float32 moments do not tell them apart."""


@runtime_checkable
class Estimator(Protocol):
    """Judges the units of a model.

    Returns either `UnitScores`, which are ranked over the whole model and turned into ratios that meet the
    budget, or `LayerRatios`, which are used as they are.
    """

    def __call__(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None = None,
    ) -> UnitScores | LayerRatios:
        """Scores or ratios.

        Args:
            model: to be pruned.
            windows: int32 calibration tokens.
            config: how much is to be removed.
            on_batch: to be told the sequences done and their number, by estimators that take long.
        """
        ...


def estimate_ratios(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    on_batch: OnBatch | None = None,
) -> LayerRatios:
    """The ratios that `config.ratios` names: an estimator, or a file of ratios.

    Raises:
        InputError: there is no such estimator, the file is malformed, or the budget is beyond what can be removed.
        RunError: an activation, a loss or a gradient is not finite.
    """
    estimator = find_estimator(config.ratios)
    if not isinstance(estimator, FromFile):
        allocate_evenly(model.config, config)  # says at once when the budget is beyond reach
    found = estimator(model, windows, config, on_batch)
    if isinstance(found, UnitScores):
        return allocate(model.config, found, config)
    check_ratios(found, model.config, config, config.ratios)
    return found


def find_estimator(name: str) -> Estimator:
    """The estimator of that name, or one that reads the file of that name."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    path = Path(name)
    if path.suffix.lower() in (".json", ".yaml", ".yml") or path.is_file():
        return FromFile(path)
    raise InputError(f"unknown ratios {name!r}; {closest(name, ESTIMATORS)}; or name a .json or .yaml file of ratios")


@dataclass(frozen=True)
class Uniform:
    """The same ratio everywhere."""

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> LayerRatios:
        return allocate_evenly(model.config, config)


@dataclass(frozen=True)
class Fisher:
    """Whole heads, and channels, by the squared gradients of their masks."""

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> UnitScores:
        heads = _Totals()
        channels = _Totals()
        for group in _gradients(model, windows, config, on_batch):
            heads.add(np.square(g.sum(1, dtype=np.float64)) for g in group.attention)
            channels.add(np.square(g, dtype=np.float64) for g in group.mlp)
        return UnitScores(heads.arrays, channels.arrays)


@dataclass(frozen=True)
class FisherPCA:
    """Principal components of heads, by the squared gradients of the heads' masks rotated into their basis."""

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> UnitScores:
        # All that the gradients g of a head say in any basis is in the sum of g^T g.
        products, grams, channels = _Totals(), _Totals(), _Totals()
        for group in _gradients(model, windows, config, on_batch):
            products.add(np.einsum("hv,hw->hvw", g, g, dtype=np.float64) for g in group.attention)
            grams.add(np.asarray(gram, np.float64) for gram in group.head_gram)
            channels.add(np.square(g, dtype=np.float64) for g in group.mlp)
        scores = tuple(
            rotated_scores(product, gram) for product, gram in zip(products.arrays, grams.arrays, strict=True)
        )
        return UnitScores(scores, channels.arrays)


@dataclass(frozen=True)
class FisherComponents:
    """Principal components of heads, by the squared gradients of masks on the components themselves."""

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> UnitScores:
        grams = head_grams(model, windows, batch_size=config.batch_size, memory_budget=config.memory_budget)
        bases = [eigenbases(gram) for gram in grams]
        components, channels = _Totals(), _Totals()
        for group in _gradients(model, windows, config, on_batch, matrices=True):
            components.add(component_scores(matrix, basis) for matrix, basis in zip(group.matrices, bases, strict=True))
            channels.add(np.square(g, dtype=np.float64) for g in group.mlp)
        return UnitScores(tuple(a.reshape(-1) for a in components.arrays), channels.arrays)


@dataclass(frozen=True)
class FromFile:
    """Ratios from a JSON or YAML file `{"attention": [...], "mlp": [...]}` with a number per layer."""

    path: Path

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> LayerRatios:
        return read_ratios(self.path, model.config)


ESTIMATORS: dict[str, Estimator] = {
    "uniform": Uniform(),
    "fisher": Fisher(),
    "fisher_pca": FisherPCA(),
    "fisher_components": FisherComponents(),
    "kl": KLSensitivity(),
    "kl_curves": KLSensitivity((0.5, 1.0, 1.75)),
}
"""Known estimators; may be added to."""


@dataclass(frozen=True)
class Eigenbases:
    """Principal components of the heads of a layer.

    Attributes:
        vectors: as columns, in descending order of their eigenvalue; [heads, v, v].
        space: number of the eigenspace of each; [heads, v]. Within one the vectors are arbitrary.
    """

    vectors: np.ndarray
    space: np.ndarray


def eigenbases(gram: Float[np.ndarray, "heads v v"]) -> Eigenbases:
    """Eigenvectors of each head's second moment."""
    with solver_precision():
        values, vectors = (np.asarray(a) for a in eigh_descending(to_solver(gram)))
    apart = values[:, :-1] - values[:, 1:] > DEGENERATE * values[:, :1]
    space = np.concatenate([np.zeros((len(values), 1), int), np.cumsum(apart, 1)], 1)
    return Eigenbases(vectors, space)


def rotated_scores(
    products: Float[np.ndarray, "heads v v"], gram: Float[np.ndarray, "heads v v"]
) -> Float[np.ndarray, " components"]:
    """Sum over groups of (g Q)_i^2 for every component i of every head, given the sums of g^T g.

    Within an eigenspace the mean over its components stands for each: it does not depend on the basis.
    """
    basis = eigenbases(gram)
    squares = np.einsum("hvi,hvw,hwi->hi", basis.vectors, products, basis.vectors, optimize=True)
    same = basis.space[:, :, None] == basis.space[:, None, :]
    return ((same @ squares[:, :, None])[:, :, 0] / same.sum(2)).reshape(-1)


def component_scores(
    matrix: Float[np.ndarray, "heads v v"], basis: Eigenbases
) -> Float[np.ndarray, "heads components"]:
    """[Q^T M Q]_ii^2 for every component i of every head of one group.

    Within an eigenspace of m components with the block B of the symmetrised matrix, the mean over all its
    orthonormal bases stands for each: (2 ||B||^2 + tr(B)^2) / (m (m + 2)), by the fourth moments of a uniformly
    distributed unit vector.
    """
    rotated = np.einsum("hvi,hvw,hwj->hij", basis.vectors, matrix, basis.vectors, optimize=True)
    rotated = 0.5 * (rotated + rotated.swapaxes(1, 2))
    same = basis.space[:, :, None] == basis.space[:, None, :]
    size = same.sum(2)
    diagonal = np.diagonal(rotated, axis1=1, axis2=2)
    trace = (same @ diagonal[:, :, None])[:, :, 0]
    rows = np.where(same, np.square(rotated), 0).sum(2)
    norm = (same @ rows[:, :, None])[:, :, 0]
    return (2 * norm + np.square(trace)) / (size * (size + 2))


def read_ratios(path: Path, config: ModelConfig) -> LayerRatios:
    """Ratios from a file, checked against the model.

    Raises:
        InputError: the file is missing, not JSON or YAML, or does not hold one number in [0, 1] per layer.
    """
    data = _read(path)
    if not isinstance(data, Mapping):
        raise InputError(f"{path} must hold the lists 'attention' and 'mlp', found {type(data).__name__}")
    known = ("attention", "mlp")
    for key in data:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}; {closest(str(key), known)}")
    lists = []
    for key in known:
        values = data.get(key)
        if not isinstance(values, list):
            raise InputError(f"{path}: {key!r} must be a list of {config.num_layers} ratios, found {values!r}")
        lists.append(tuple(_number(value, f"{path}: {key}[{i}]") for i, value in enumerate(values)))
    ratios = LayerRatios(*lists)
    _check_shape(ratios, config, str(path))
    return ratios


def check_ratios(ratios: LayerRatios, model: ModelConfig, prune: PruneConfig, name: str) -> None:
    """Raises InputError unless there is a ratio between 0 and the maximum for every layer and kind."""
    _check_shape(ratios, model, name)
    for kind in ("attention", "mlp"):
        for i, ratio in enumerate(getattr(ratios, kind)):
            if ratio > prune.max_ratio + 1e-9:
                raise InputError(
                    f"{name}: {kind}[{i}] is {ratio:g}, above the maximum of {prune.max_ratio:g}; "
                    "lower it or raise max_ratio"
                )


def _check_shape(ratios: LayerRatios, model: ModelConfig, name: str) -> None:
    for kind in ("attention", "mlp"):
        values = getattr(ratios, kind)
        if len(values) != model.num_layers:
            raise InputError(f"{name}: {kind!r} holds {len(values)} ratios, the model has {model.num_layers} layers")
        for i, value in enumerate(values):
            if not 0 <= value <= 1:  # NaN is neither
                raise InputError(f"{name}: {kind}[{i}] is {value:g}, expected a ratio between 0 and 1")


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; --ratios takes a file of ratios or one of {_names()}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable as JSON or YAML: {' '.join(str(error).split())}") from error


def _names() -> str:
    return ", ".join(ESTIMATORS)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise InputError(f"{where} is {value!r}, expected a number between 0 and 1")
    return float(value)


def _gradients(
    model: LanguageModel,
    windows: np.ndarray,
    config: PruneConfig,
    on_batch: OnBatch | None,
    matrices: bool = False,
) -> Iterator[GroupGradients]:
    return group_gradients(
        model,
        windows,
        group=config.gradient_group,
        matrices=matrices,
        batch_size=config.batch_size,
        memory_budget=config.memory_budget,
        on_batch=on_batch,
    )


class _Totals:
    """Sums of one array per layer."""

    def __init__(self) -> None:
        self.arrays: tuple[np.ndarray, ...] = ()

    def add(self, arrays: Iterable[np.ndarray]) -> None:
        """Adds one array to each sum."""
        if self.arrays:
            self.arrays = tuple(total + array for total, array in zip(self.arrays, arrays, strict=True))
        else:
            self.arrays = tuple(arrays)
